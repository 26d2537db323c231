"""`FiniteGuard`: skips steps with NaN or infinite loss or gradients."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.callbacks.last_checkpoint import completes_optimizer_step
from yolo_lightning.callbacks.step_flags import FlagValues, step_flags
from yolo_lightning.errors import InputError, printable
from yolo_lightning.training_module import TrainingModule

Batch = DetectionBatch | ClassificationBatch


_MAX_OVERFLOWS = 40  # consecutive ones in float16, after which the scale is nearly zero


class NonFiniteError(RuntimeError):
    """Too many consecutive steps were skipped."""


class FiniteGuard(pl.Callback):
    """Skip steps whose loss or gradient is NaN or infinite, on all ranks.

    A skipped step changes no weights, momentum or running statistics: a flag on the device tells
    the optimizer, and is printed when the next step has been queued. In float16, where the gradient
    scaler skips overflowing steps, gradients count only after 40 consecutive steps. If training
    fails, a step late, each rank with a non-finite batch saves it.

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
        self._step = _Step()
        self._unread: list[_Step] = []  # steps whose flags have not been read yet
        self._statistics: list[Tensor] = []
        self._saved_statistics = torch.zeros(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the running statistics; forget the flags of a training that ended by an error."""
        self._unread.clear()
        step_flags(trainer).read(newest=True)
        self._statistics = [b for b in pl_module.buffers() if b.is_floating_point()]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Copy the running statistics at the start of an optimizer step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._step = _Step()
            if self._statistics:
                self._saved_statistics = torch.cat([b.flatten() for b in self._statistics])
        self._step.batches.append(batch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Record whether the loss of this rank is finite."""
        self._step.bad_losses.append(~torch.isfinite(loss.detach()).all())

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Skip a step on all ranks if it is non-finite on one; the host learns it a step later."""
        assert isinstance(pl_module, TrainingModule)
        flags = step_flags(trainer)
        flags.set("loss", torch.stack(self._step.bad_losses).any())
        # after the all-reduce, a non-finite gradient on one rank is one on all
        flags.set("gradient", ~torch.isfinite(pl_module.gradient_norm(optimizer)))
        flags.reduce(trainer.global_step)
        self._unread.append(self._step)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            optimizer.found_inf = skip = flags.maximum("loss", "gradient")  # type: ignore[attr-defined]
        else:  # it passes its own flag to the optimizer, and reduces its scale
            skip = flags.maximum("loss")
            for found in scaler._found_inf_per_device(optimizer).values():
                found.copy_(torch.maximum(found, skip))
            if self._overflows >= _MAX_OVERFLOWS:
                skip = flags.maximum("loss", "gradient")
        self._restore_statistics(skip)

    def _restore_statistics(self, skip: Tensor) -> None:
        """Restore the running statistics where `skip`, float (), is not 0."""
        if self._statistics:
            current = torch.cat([b.flatten() for b in self._statistics])
            kept = torch.where(skip > 0, self._saved_statistics, current)
            parts = kept.split([b.numel() for b in self._statistics])
            shaped = [p.view_as(b) for p, b in zip(parts, self._statistics, strict=True)]
            torch._foreach_copy_(self._statistics, shaped)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Print if the step before was skipped; raise `NonFiniteError` after too many."""
        if completes_optimizer_step(trainer, batch_idx):
            self._read(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """See to it that no checkpoint is written after too many skipped steps."""
        self._read(trainer, newest=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the flags of the last step."""
        self._read(trainer, newest=True)

    def _read(self, trainer: pl.Trainer, newest: bool = False) -> None:
        for values in step_flags(trainer).read(newest):
            self._count(trainer, self._unread.pop(0), values)

    def _count(self, trainer: pl.Trainer, step: "_Step", values: FlagValues) -> None:
        """Count and name a step that was skipped; raise `NonFiniteError` after too many."""
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._overflows = self._overflows + 1 if values.all_ranks["gradient"] else 0
        overflow = scaled and self._overflows <= _MAX_OVERFLOWS
        own, highest = (
            2 if flags["loss"] else int(bool(flags["gradient"]) and not overflow)
            for flags in (values.own, values.all_ranks)
        )
        if not highest:
            self._consecutive = 0
            return
        is_cause = own == highest
        self.skipped, self._consecutive = self.skipped + 1, self._consecutive + 1
        if is_cause:
            print(
                f"rank {trainer.global_rank}, {printable(step.describe())}; the step is skipped",
                flush=True,
            )
        if self._consecutive > self.max_consecutive:
            self._stop_training(trainer, step if is_cause else None)

    def _stop_training(self, trainer: pl.Trainer, cause: "_Step | None") -> None:
        message = (
            f"{self._consecutive} consecutive steps were not finite; allowed: "
            f"{self.max_consecutive}"
        )
        folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
        if cause is not None:
            folder.mkdir(parents=True, exist_ok=True)
            step = cause.batches[-1].step
            file = folder / f"not-finite-step{step}-rank{trainer.global_rank}.pt"
            torch.save([asdict(batch.to("cpu")) for batch in cause.batches], file)
            message += (
                f"\n  rank {trainer.global_rank}, {cause.describe()}\n"
                f"  the batches are saved in {file}"
            )
        trainer.strategy.barrier("not finite")  # all ranks have saved their batches
        raise NonFiniteError(message)


@dataclass
class _Step:
    """The batches of an optimizer step on this rank, and whether their losses are not finite."""

    batches: list[Batch] = field(default_factory=list)
    bad_losses: list[Tensor] = field(default_factory=list)  # bool (), on the device

    def describe(self) -> str:
        """Name the samples of the batches with a bad loss, or of all if only gradients are bad."""
        flags = [bool(flag) for flag in self.bad_losses]
        parts = []
        for batch, flag in zip(self.batches, flags, strict=True):
            if flag or not any(flags):
                kind = "detection" if isinstance(batch, DetectionBatch) else "classification"
                ids = ", ".join(str(number) for number in batch.sample_ids.tolist())
                parts.append(f"step {batch.step}, {kind} samples {ids}")
        return f"{'loss' if any(flags) else 'gradient'} is not finite: {'; '.join(parts)}"
