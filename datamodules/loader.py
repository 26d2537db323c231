"""The loader of whole batches."""

import functools
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from yolo_lightning import signals
from yolo_lightning.datamodules.batching import Batch
from yolo_lightning.datamodules.sampler import AlternatingBatchSampler
from yolo_lightning.errors import InputError
from yolo_lightning.memory import keep_freed_memory

_KEPT_BYTES, _KEPT_IN_WORKER = 2**30, 2**26


class ResumableLoader(DataLoader[Batch]):
    """A loader of whole batches; its sampler decides where a resumed training continues."""

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
        batches = self._start()
        return (self._next(batches) for _ in range(len(self)))

    def _start(self) -> Iterator[Any]:
        keep_freed_memory(_KEPT_BYTES)
        iterator = super().__iter__()  # starts the workers
        for worker in getattr(iterator, "_workers", []):  # exiting waits for them
            worker._popen.terminate = worker._popen.kill  # they ignore SIGTERM
        return iterator

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            images = self.pending_images()
            raise InputError(
                f"no batch within {self.timeout:g} s, waiting for {images or 'the dataset'}; "
                "see whether its disk answers, or set data.loader_timeout_s"
            ) from None
        except (OSError, EOFError) as error:
            # a worker that dies after it has announced a batch cannot hand its memory over; its
            # connections close a moment before it is seen to be dead
            workers = [worker.sentinel for worker in getattr(batches, "_workers", [])]
            if not connection.wait(workers, timeout=1):
                raise
            raise RuntimeError(f"DataLoader worker exited unexpectedly: {error}") from None

    def pending_images(self) -> str:
        """Return the names of the images that are being read."""
        pending = getattr(self.dataset, "pending", None)
        return ", ".join(pending.names()) if pending is not None else ""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignore the state."""


class TrainingLoader(ResumableLoader):
    """A loader that hands out an epoch at a time; its workers read on into the next one.

    An epoch begins at the first step that is not trained yet, and ends at a multiple of its length.
    """

    sampler: AlternatingBatchSampler

    def __init__(
        self,
        dataset: Dataset[Batch],
        sampler: AlternatingBatchSampler,
        num_workers: int,
        timeout_s: float = 0,
    ) -> None:
        super().__init__(dataset, sampler, num_workers, timeout_s)
        self._batches: Iterator[Any] | None = None
        self._next_step = -1  # of `_batches`, at the end of an epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Return the remaining batches of an epoch.

        Raises:
            InputError: a batch takes longer than the timeout; names the images being read.
        """
        first = self.sampler.first_step()
        steps = range(first, (first // len(self) + 1) * len(self))
        is_alive = self.num_workers == 0 or self._iterator is not None  # not shut down
        if self._batches is None or self._next_step != first or not is_alive:
            self._batches = self._start()
        self._next_step = -1
        return self._take(self._batches, steps)

    def _take(self, batches: Iterator[Any], steps: range) -> Iterator[Any]:
        for step in steps:
            batch = self._next(batches)
            if step + 1 == steps.stop:  # nobody asks for a batch after it
                self._next_step = steps.stop
            yield batch


def _init_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory(_KEPT_IN_WORKER)
    signals.ignore_stop_signals()  # schedulers signal every process of a job, workers too


def copy_to_gpu(batch: Batch, device: torch.device) -> Batch:
    """Return the batch on a GPU, copied on a stream of its own.

    The host is up to a step ahead of the GPU: the copy would queue behind the kernels of that step.
    """
    copying, computing = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        moved = batch.to(device)
    computing.wait_stream(copying)
    for value in vars(moved).values():
        if isinstance(value, torch.Tensor):
            value.record_stream(computing)  # keeps its memory until the step has read it
    return moved


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
