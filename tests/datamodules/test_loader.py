"""A loader whose worker dies."""

import os
import signal
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from yolo_lightning.datamodules.loader import ResumableLoader


class Tensors(Dataset[Any]):
    def __getitem__(self, index):
        if index < 0:
            raise ConnectionResetError("of the dataset")
        return torch.zeros(300, 300)


@pytest.mark.parametrize("step", range(50, 53))
def test_a_killed_worker_is_named_also_if_its_batch_is_on_the_way(step):
    loader = ResumableLoader(Tensors(), range(2000), num_workers=2)
    batches = iter(loader)
    for _ in range(step):
        next(batches)
    workers = getattr(loader._iterator, "_workers")  # noqa: B009
    os.kill(workers[step % 2].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="^DataLoader worker"):
        list(batches)
    loader._iterator = None


def test_an_error_of_the_dataset_stays_what_it_is():
    loader = ResumableLoader(Tensors(), [0, -1, 0], num_workers=2)
    with pytest.raises(ConnectionResetError, match="of the dataset"):
        list(loader)
