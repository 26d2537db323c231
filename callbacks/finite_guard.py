"""`FiniteGuard`: skips steps with NaN or infinite loss or gradients."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.callbacks.last_checkpoint import max_over_ranks
from yolo_lightning.errors import InputError, printable

Batch = DetectionBatch | ClassificationBatch


_MAX_OVERFLOWS = 40  # consecutive ones in float16, after which the scale is nearly zero


class NonFiniteError(RuntimeError):
    """Too many consecutive steps were skipped."""


class FiniteGuard(pl.Callback):
    """Skip steps whose loss or gradient is NaN or infinite, on all ranks.

    A skipped step changes no weights, momentum or running statistics. In float16, where the
    gradient scaler skips overflowing steps, gradients count only after 40 consecutive steps. If
    training fails, each rank with a non-finite batch saves it.

    Args:
        max_consecutive (steps): most that are skipped one after the other, 0 or more.
    """

    def __init__(self, max_consecutive: int = 10) -> None:
        if max_consecutive < 0:
            raise InputError(
                f"FiniteGuard: max_consecutive is {max_consecutive}; allowed: 0 or more"
            )
        self.max_consecutive = max_consecutive
        self.skipped = 0
        self._consecutive = self._overflows = 0
        self._batches: list[Batch] = []
        self._non_finite_losses: list[bool] = []
        self._saved_statistics: list[Tensor] = []
        self._statistics: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Allocate a copy of the running statistics."""
        self._statistics = [b for b in pl_module.buffers() if b.is_floating_point()]
        self._saved_statistics = [buffer.clone() for buffer in self._statistics]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy the running statistics at the start of an optimizer step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._batches, self._non_finite_losses = [], []
            if self._saved_statistics:
                torch._foreach_copy_(self._saved_statistics, self._statistics)
        self._batches.append(batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Record whether the loss of this rank is finite."""
        self._non_finite_losses.append(not bool(torch.isfinite(loss.detach()).all()))

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Skip a step on all ranks if it is non-finite on one, or raise `NonFiniteError`."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        # after the all-reduce, a non-finite loss on one rank makes the gradients of all non-finite
        finite = _finite_gradients(pl_module)
        self._overflows = 0 if finite else self._overflows + 1
        overflow = scaled and self._overflows <= _MAX_OVERFLOWS
        severity = 2 if any(self._non_finite_losses) else int(not finite and not overflow)
        max_severity = max_over_ranks(trainer, severity)
        if not max_severity:
            self._consecutive = 0
            return
        is_cause = severity == max_severity
        self.skipped, self._consecutive = self.skipped + 1, self._consecutive + 1
        if self._saved_statistics:
            torch._foreach_copy_(self._statistics, self._saved_statistics)
        gradients_scaled = scaled and getattr(optimizer, "_step_supports_amp_scaling", False)
        for parameter in pl_module.parameters():
            if gradients_scaled and parameter.grad is not None:
                parameter.grad.fill_(torch.inf)  # the scaler looks for it next, and skips the step
            else:
                parameter.grad = None  # the optimizer skips it: no momentum, no weight decay
        if is_cause:
            print(
                f"rank {trainer.global_rank}, {printable(self._describe_step())}; "
                "the step is skipped",
                flush=True,
            )
        if self._consecutive > self.max_consecutive:
            self._stop_training(trainer, is_cause)

    def _describe_step(self) -> str:
        parts = []
        has_loss = any(self._non_finite_losses)
        flags = self._non_finite_losses if has_loss else [True] * len(self._batches)
        for batch, flag in zip(self._batches, flags, strict=True):
            if flag:
                kind = "detection" if isinstance(batch, DetectionBatch) else "classification"
                ids = ", ".join(str(number) for number in batch.sample_ids.tolist())
                parts.append(f"step {batch.step}, {kind} samples {ids}")
        return f"{'loss' if has_loss else 'gradient'} is not finite: {'; '.join(parts)}"

    def _stop_training(self, trainer: pl.Trainer, save_batches: bool) -> None:
        message = (
            f"{self._consecutive} consecutive steps were not finite; allowed: "
            f"{self.max_consecutive}"
        )
        folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
        if save_batches:
            folder.mkdir(parents=True, exist_ok=True)
            step = self._batches[-1].step
            file = folder / f"not-finite-step{step}-rank{trainer.global_rank}.pt"
            torch.save([asdict(batch.to("cpu")) for batch in self._batches], file)
            message += (
                f"\n  rank {trainer.global_rank}, {self._describe_step()}\n"
                f"  the batches are saved in {file}"
            )
        trainer.strategy.barrier("not finite")  # all ranks have saved their batches
        raise NonFiniteError(message)


def _finite_gradients(module: pl.LightningModule) -> bool:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if not gradients:
        return True
    return bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())
