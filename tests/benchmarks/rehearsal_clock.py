"""A callback that measures start-up, the parts of a step, and memory, as lines of JSON."""

import functools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil
import torch
import torch.distributed as dist
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from torch.optim.optimizer import register_optimizer_step_post_hook

from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.callbacks import LastCheckpoint, MultiScale
from yolo_lightning.datamodules.batching import JointDataset
from yolo_lightning.datamodules.sampler import BatchPlan

MIB = 2**20
_BUCKET_BYTES = 25 * MIB  # DDP's own

_seconds: dict[str, float] = defaultdict(float)  # since the start, or the last step
_first_call_s: list[float] = []


def _time(owner: type, name: str, part: str) -> None:
    """Replace a method by one that adds its duration to `_seconds`."""
    method: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.time()
        _first_call_s.append(start)
        try:
            return method(*args, **kwargs)
        finally:
            _seconds[part] += time.time() - start

    setattr(owner, name, timed)


_time(DetectorModule, "__init__", "tree and network")
_time(CombinedDataModule, "setup", "indices, bound to the tree")
_time(DDPStrategy, "setup_environment", "process group")
_time(MultiScale, "on_train_start", "dry run at the largest size")
_time(MultiScale, "on_train_batch_start", "resize")
_time(DetectorModule, "training_step", "forward and loss")
_time(LastCheckpoint, "_save", "checkpoint")


_folder = Path()  # of the files, in loader workers too


def _time_loading() -> None:
    """Record the processor time of each batch that a loader worker prepares."""
    read = JointDataset.__getitem__

    def timed(dataset: JointDataset, plan: BatchPlan) -> Any:
        start = time.process_time()
        batch = read(dataset, plan)
        cpu_s = time.process_time() - start
        line = {"kind": plan.kind, "images": len(batch), "cpu_s": cpu_s}
        with (_folder / f"loader-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return batch

    JointDataset.__getitem__ = timed  # type: ignore[method-assign]


_time_loading()


def memory() -> dict[str, float]:
    """Return memory of this process: resident, of it anonymous, and the peak; MiB."""
    process = Path("/proc/self")
    rollup = _fields(process / "smaps_rollup")
    peak = _fields(process / "status")["VmHWM"]
    return {"rss": rollup["Rss"], "anonymous": rollup["Anonymous"], "peak": peak}


def _fields(file: Path) -> dict[str, float]:
    """Return the values in kB of a file of /proc as MiB."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {
        line[0].rstrip(":"): int(line[1]) / 1024
        for line in lines
        if len(line) == 3 and line[2] == "kB"
    }


def _workers() -> list[dict[str, float]]:
    """Return the memory of the loader workers: resident, and what only this one has; MiB."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            info = child.memory_full_info()
        except psutil.Error:
            continue
        found.append({"rss": info.rss / MIB, "own": info.uss / MIB})
    return found


class Clock(pl.Callback):
    """Write measurements of each process to a folder: ``clock-<rank>-<process id>.jsonl``.

    Args:
        folder: for the files.
    """

    def __init__(self, folder: str) -> None:
        global _folder
        self.folder = _folder = Path(folder)
        self._started_s = psutil.Process().create_time()
        self._at_s: dict[str, float] = {}
        self._step_end_s = 0.0
        register_optimizer_step_post_hook(self._on_optimizer_step)

    def _write(self, trainer: pl.Trainer, event: str, **values: Any) -> None:
        pid = psutil.Process().pid
        with (self.folder / f"clock-{trainer.global_rank}-{pid}.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")

    # --- start

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Time the fetching of batches."""
        before, after = _TrainingEpochLoop._on_before_fetch, _TrainingEpochLoop._on_after_fetch

        def before_fetch(loop: Any) -> None:
            self._at_s["fetch"] = time.time()
            before(loop)

        def after_fetch(loop: Any) -> None:
            after(loop)
            _seconds["wait for data"] += time.time() - self._at_s["fetch"]

        loop: Any = _TrainingEpochLoop
        loop._on_before_fetch, loop._on_after_fetch = before_fetch, after_fetch

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the memory before gradients and momentum exist."""
        parameters = sum(p.numel() for p in pl_module.parameters())
        self._write(trainer, "fit_start", parameters=parameters, **memory())

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the sanity check."""
        self._at_s["sanity"] = time.time()

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of the sanity check."""
        _seconds["sanity check of the validation"] += time.time() - self._at_s["sanity"]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the parts of the start before the first step."""
        if self._step_end_s:
            return
        now = time.time()
        parts = dict(_seconds)
        parts["first batch"] = parts.pop("wait for data", 0.0)
        parts["imports and recipe"] = min(_first_call_s) - self._started_s
        for name in ("resize", "checkpoint"):
            parts.pop(name, None)
        parts["other: MLflow, DDP, optimizer, checkpoint"] = (
            now - self._started_s - sum(parts.values())
        )
        self._write(trainer, "start", seconds=now - self._started_s, parts=parts, **memory())
        self._step_end_s = now
        _seconds.clear()

    # --- step

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        """Start the clock of the backward pass."""
        self._at_s["backward"] = time.time()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of the backward pass, in which DDP adds up the gradients."""
        _seconds["backward and all-reduce"] += time.time() - self._at_s["backward"]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Start the clock of the optimizer."""
        self._at_s["optimizer"] = time.time()

    def _on_optimizer_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        _seconds["optimizer"] += time.time() - self._at_s.pop("optimizer", time.time())

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Record the parts of the step before; its checkpoint is saved after this."""
        now = time.time()
        values: dict[str, Any] = {} if batch.step % 10 else {"workers": _workers(), **memory()}
        self._write(
            trainer, "step", step=batch.step, kind=type(batch).__name__,
            size=batch.images.shape[-1], images=len(batch), seconds=now - self._step_end_s,
            parts=dict(_seconds), **values,
        )  # fmt: skip
        self._step_end_s = now
        _seconds.clear()

    # --- validation and end

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of a validation."""
        self._at_s["validation"] = time.time()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record a validation."""
        if not trainer.sanity_checking:
            seconds = time.time() - self._at_s["validation"]
            self._write(
                trainer, "validation", seconds=seconds, workers=_workers(),
                images=len(trainer.datamodule.validation), **memory(),  # type: ignore[attr-defined]
            )  # fmt: skip

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Time an all-reduce of as many bytes as the gradients have, without arithmetic beside."""
        if not (dist.is_initialized() and trainer.world_size > 1):
            return
        size = 4 * sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        pieces = [torch.zeros(_BUCKET_BYTES // 4) for _ in range(max(1, size // _BUCKET_BYTES))]
        dist.barrier()
        start = time.time()
        for piece in pieces:
            dist.all_reduce(piece)
        seconds = (time.time() - start) * size / (len(pieces) * _BUCKET_BYTES)
        self._write(trainer, "all_reduce", bytes=size, seconds=seconds, **memory())
