"""`StepFlags`: what ranks tell each other in every optimizer step, without waiting for a device."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

FLAGS = ("loss", "gradient", "stop", "save")
"""Whether the loss or a gradient is not finite, which signal to stop was received, as its position
in `signals.SIGNALS` from 1, and whether a checkpoint is due."""


@dataclass(frozen=True)
class FlagValues:
    """The flags of one step, on the host."""

    step: int
    own: dict[str, float]  # of this rank
    all_ranks: dict[str, float]  # the maxima


class StepFlags:
    """Flags that any rank may raise in a step, and that all ranks read when the next one is queued.

    The flags stay on the device: one all-reduce gives their maximum over the ranks, which the
    optimizer may use in the same step, and their copy to the host has arrived a step later.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._zero = device, torch.zeros((), device=device)
        self._raised: dict[str, Tensor] = {}
        self._reduced_step = -1
        self._maxima = self._zero.repeat(len(FLAGS))
        self._unread: list[tuple[int, Tensor, torch.cuda.Event | None]] = []
        nothing = dict.fromkeys(FLAGS, 0.0)
        self.latest = FlagValues(-1, nothing, nothing)  # what was read last

    def set(self, name: str, value: Tensor | int) -> None:
        """Set a flag of the coming step to a value of 0 or more; tensors are on the device."""
        if isinstance(value, int):
            value = torch.full_like(self._zero, value) if value else self._zero
        self._raised[name] = value.float()

    def reduce(self, step: int) -> None:
        """Find the maximum of each flag over the ranks, at the first call in a step."""
        if step == self._reduced_step:
            return
        self._reduced_step = step
        own = torch.stack([self._raised.get(name, self._zero) for name in FLAGS])
        self._raised, self._maxima = {}, own
        if dist.is_available() and dist.is_initialized():
            self._maxima = own.clone()
            dist.all_reduce(self._maxima, dist.ReduceOp.MAX)  # on GPUs, only the stream waits
        values = torch.stack([own, self._maxima]).to("cpu", non_blocking=True)
        event = torch.cuda.Event() if self.device.type == "cuda" else None
        if event is not None:
            event.record()
        self._unread.append((step, values, event))

    def maximum(self, *names: str) -> Tensor:
        """Return the maximum of some flags over the ranks in this step, float (), on the device."""
        index = [FLAGS.index(name) for name in names]
        return torch.stack([self._maxima[k] for k in index]).amax()

    def read(self, newest: bool = False) -> list[FlagValues]:
        """Return what has not been read yet of the steps before the newest one, or of all."""
        count = len(self._unread) - (not newest)
        ready, self._unread = self._unread[: max(0, count)], self._unread[max(0, count) :]
        found = []
        for step, values, event in ready:
            if event is not None:
                event.synchronize()
            own, maxima = (dict(zip(FLAGS, row, strict=True)) for row in values.tolist())
            self.latest = FlagValues(step, own, maxima)
            found.append(self.latest)
        return found


_flags: WeakKeyDictionary[pl.Trainer, StepFlags] = WeakKeyDictionary()


def step_flags(trainer: pl.Trainer) -> StepFlags:
    """Return the flags of a training."""
    if trainer not in _flags:
        _flags[trainer] = StepFlags(trainer.strategy.root_device)
    return _flags[trainer]
