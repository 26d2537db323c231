"""The loader of whole batches."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from yolo_lightning import signals
from yolo_lightning.datamodules.batching import Batch
from yolo_lightning.errors import InputError


class ResumableLoader(DataLoader[Batch]):
    """A loader of whole batches; its sampler continues from the trainer's number of steps."""

    # Lightning warns about resuming within an epoch unless a loader has a state

    def __init__(
        self,
        dataset: Dataset[Batch],
        sampler: Iterable[Any],
        num_workers: int,
        timeout_s: float = 0,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            timeout=timeout_s if num_workers > 0 else 0,
            worker_init_fn=_init_worker,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Return the batches.

        Raises:
            InputError: a batch takes longer than the timeout; names the images being read.
        """
        iterator = super().__iter__()  # starts the workers
        for worker in getattr(iterator, "_workers", []):  # exiting waits for them
            worker._popen.terminate = worker._popen.kill  # they ignore SIGTERM
        return self._name_timeouts(iterator) if self.timeout else iterator

    def _name_timeouts(self, iterator: Any) -> Iterator[Any]:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                images = self.pending_images()
                raise InputError(
                    f"no batch within {self.timeout:g} s, waiting for {images or 'the dataset'}; "
                    "see whether its disk answers, or set data.loader_timeout_s"
                ) from None
            yield batch

    def pending_images(self) -> str:
        """Return the names of the images that are being read."""
        pending = getattr(self.dataset, "pending", None)
        return ", ".join(pending.names()) if pending is not None else ""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state."""


def _init_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    signals.ignore_stop_signals()  # schedulers signal every process of a job, workers too
