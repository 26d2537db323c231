"""A loader whose worker dies."""

from types import SimpleNamespace

import pytest

from yolo_lightning.datamodules.loader import ResumableLoader


class LostBatches:
    """Fails as a loader's iterator does where the tensors of a batch are still with a worker."""

    def __init__(self, is_alive):
        self._workers = [
            SimpleNamespace(is_alive=lambda: True),
            SimpleNamespace(is_alive=lambda: is_alive),
        ]

    def __iter__(self):
        return self

    def __next__(self):
        raise ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize(
    ("is_alive", "error", "text"),
    [
        (False, RuntimeError, "^DataLoader worker exited unexpectedly: .*Connection reset"),
        (True, ConnectionResetError, "Connection reset"),
    ],
)
def test_a_batch_that_died_with_its_worker_is_a_dead_worker(is_alive, error, text):
    loader = ResumableLoader([0, 1], range(2), num_workers=2)  # type: ignore[arg-type]
    with pytest.raises(error, match=text):
        loader._next(LostBatches(is_alive))
