"""Steps whose loss or gradient is no number: skipped on all ranks, up to a number."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.callbacks.last_checkpoint import most_over_ranks
from yolo_lightning.errors import InputError

Batch = DetectionBatch | ClassificationBatch


_MAX_OVERFLOWS = 40
"""In a row, of float16's gradients: its scale is down at nothing then, and they are no numbers."""


class NotFinite(RuntimeError):
    """Training ended since too many steps in a row were skipped."""


class FiniteGuard(pl.Callback):
    """Skip steps whose loss or gradient is NaN or infinite, on all ranks alike, up to a number.

    A skipped step changes nothing: neither weights nor momentum, and running statistics go back to
    what they were, since one NaN in them would spoil every later validation. After more than
    `most_in_a_row` the training ends; every rank whose own batch was bad has saved it then.

    In float16 the gradient scaler skips overflowing steps by itself and lowers its scale, which is
    no fault; there gradients count after forty steps in a row.

    Args:
        most_in_a_row: steps that may be skipped one after the other.

    Raises:
        InputError: less than none.
    """

    def __init__(self, most_in_a_row: int = 10) -> None:
        if most_in_a_row < 0:
            raise InputError(f"FiniteGuard: most_in_a_row is {most_in_a_row}; allowed: 0 or more")
        self.most_in_a_row = most_in_a_row
        self.skipped = 0
        self._in_a_row = self._overflows = 0
        self._batches: list[Batch] = []
        self._bad: list[bool] = []
        self._kept: list[Tensor] = []
        self._statistics: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make room for a copy of the running statistics."""
        self._statistics = [b for b in pl_module.buffers() if b.is_floating_point()]
        self._kept = [buffer.clone() for buffer in self._statistics]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy the running statistics where an optimizer step begins."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches, self._bad = [], []
            if self._kept:
                torch._foreach_copy_(self._kept, self._statistics)
        self._batches.append(batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Remember whether this rank's own loss is a number."""
        self._bad.append(not bool(torch.isfinite(loss.detach()).all()))

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Undo a step on all ranks where it is bad on one.

        Raises:
            NotFinite: more steps in a row than allowed.
        """
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        # one rank's bad loss makes the gradients of all bad, which is no news of theirs
        finite = _finite_gradients(pl_module)
        self._overflows = 0 if finite else self._overflows + 1
        overflow = scaled and self._overflows <= _MAX_OVERFLOWS
        own = 2 if any(self._bad) else int(not finite and not overflow)
        worst = most_over_ranks(trainer, own)
        if not worst:
            self._in_a_row = 0
            return
        bad = own == worst
        self.skipped, self._in_a_row = self.skipped + 1, self._in_a_row + 1
        if self._kept:
            torch._foreach_copy_(self._statistics, self._kept)
        if not scaled:  # the scaler has seen the overflow, and skips the step itself
            for parameter in pl_module.parameters():
                parameter.grad = None  # the optimizer passes it over: no momentum, no decay
        if bad:
            print(f"rank {trainer.global_rank}, {self._told()}; the step is skipped", flush=True)
        if self._in_a_row > self.most_in_a_row:
            self._end(trainer, bad)

    def _told(self) -> str:
        """Return which samples the step read."""
        parts = []
        flags = self._bad if any(self._bad) else [True] * len(self._batches)
        for batch, flag in zip(self._batches, flags, strict=True):
            if flag:
                kind = "detection" if isinstance(batch, DetectionBatch) else "classification"
                ids = ", ".join(str(number) for number in batch.sample_ids.tolist())
                parts.append(f"step {batch.step}, {kind} samples {ids}")
        what = "loss" if any(self._bad) else "gradient"
        return f"{what} is not finite: {'; '.join(parts)}"

    def _end(self, trainer: pl.Trainer, bad: bool) -> None:
        """Save what was bad on this rank, and end the training."""
        said = f"{self._in_a_row} steps in a row were not finite; allowed: {self.most_in_a_row}"
        folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
        if bad:
            folder.mkdir(parents=True, exist_ok=True)
            step = self._batches[-1].step
            file = folder / f"not-finite-step{step}-rank{trainer.global_rank}.pt"
            torch.save([asdict(batch.to("cpu")) for batch in self._batches], file)
            said += f"\n  rank {trainer.global_rank}, {self._told()}\n  the batches are in {file}"
        trainer.strategy.barrier("not finite")  # every rank has saved what is its own
        raise NotFinite(said)


def _finite_gradients(module: pl.LightningModule) -> bool:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if not gradients:
        return True
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
