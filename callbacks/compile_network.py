"""`CompileNetwork`: `torch.compile` for multi-scale training."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from yolo_lightning.errors import InputError


class CompileNetwork(pl.Callback):
    """Compile the layers of the network in place, with dynamic height and width.

    Recompilations are printed and logged (`train/compiled_graphs`); too many are an error.

    Args:
        backend: backend of `torch.compile`.
        mode: mode of `torch.compile`, such as `max-autotune`.
    """

    def __init__(self, backend: str = "inductor", mode: str | None = None) -> None:
        allowed = torch.compiler.list_backends(exclude_tags=())
        if backend not in allowed:
            raise InputError(f"CompileNetwork: backend is {backend!r}; allowed: {allowed}")
        self.backend, self.mode = backend, mode
        self._graphs = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile in place; the compilation itself runs in the first batch."""
        import torch._dynamo.config as settings

        settings.fail_on_recompile_limit_hit = True
        settings.suppress_errors = False
        body: torch.nn.Module = pl_module.network.body  # type: ignore[assignment, union-attr]
        body.compile(backend=self.backend, mode=self.mode, dynamic=True)
        self._graphs = compiled_graphs()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Print and log recompilations."""
        graphs = compiled_graphs()
        if graphs > self._graphs:
            size = tuple(batch.images.shape)
            rank_zero_info(
                f"torch.compile: {graphs - self._graphs} more graphs at step {batch.step}, "
                f"images {size}"
            )
        self._graphs = graphs
        # a tensor on the host: Lightning copies a number to the device, and waits for it
        pl_module.log("train/compiled_graphs", torch.tensor(float(graphs)), batch_size=len(batch))


def compiled_graphs() -> int:
    """Return the number of graphs that this process has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
