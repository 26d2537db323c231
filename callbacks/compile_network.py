"""`CompileNetwork`: `torch.compile` for multi-scale training."""

import os
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from yolo_lightning.callbacks.multi_scale import MultiScale
from yolo_lightning.errors import InputError

_OF_EVALUATION = 4  # graphs: full and last batches of validation and of PredictionGrid


class CompileNetwork(pl.Callback):
    """Compile the layers of the network in place, once for each shape of a batch.

    The number of graphs is bounded by the sizes of `MultiScale`: one more is an error. New graphs
    are printed, and logged as `train/compiled_graphs`. What cannot be compiled is an error, too;
    only synchronized batch norm is left out.

    Args:
        backend: backend of `torch.compile`.
        mode: mode of `torch.compile`, such as `max-autotune`.
        dynamic: compile with variable height and width: fewer graphs, each of which takes longer to
            compile and to run.

    Raises:
        InputError: an unknown backend; when training starts, `torch.compile` is disabled; later, it
            fails, compiles nothing, or too many graphs.
    """

    def __init__(
        self, backend: str = "inductor", mode: str | None = None, dynamic: bool = False
    ) -> None:
        allowed = torch.compiler.list_backends(exclude_tags=())
        if backend not in allowed:
            raise InputError(f"CompileNetwork: backend is {backend!r}; allowed: {allowed}")
        self.backend, self.mode, self.dynamic = backend, mode, dynamic
        self._graphs = self._earlier_graphs = self._limit = 0
        self._settings = ExitStack()  # of torch.compile, while this trains

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile in place; the compilation itself runs in the first batch of each shape."""
        import torch._dynamo.config as settings

        if settings.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise InputError(
                "CompileNetwork: torch.compile is disabled, by TORCH_COMPILE_DISABLE or "
                "TORCHDYNAMO_DISABLE; unset it, or leave the callback out"
            )
        # earlier trainings of this process count, too
        self._graphs = self._earlier_graphs = compiled_graphs()
        self._limit = most_graphs(trainer)
        limit = self._earlier_graphs + self._limit
        rank_zero_info("torch.compile: the first step of each size takes up to minutes")
        self._settings.enter_context(
            settings.patch(
                recompile_limit=limit,
                accumulated_recompile_limit=max(limit, settings.accumulated_recompile_limit),
                fail_on_recompile_limit_hit=True,
                suppress_errors=False,
            )
        )
        body: torch.nn.Module = pl_module.network.body  # type: ignore[assignment, union-attr]
        # synchronized batch norm reads on the host how many images each rank has
        whole = not any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in body.modules())
        body.compile(backend=self.backend, mode=self.mode, dynamic=self.dynamic, fullgraph=whole)
        # where `Module.compile` keeps the compiled call, which copies of the module leave out
        body._compiled_call_impl = self._naming_errors(body._compiled_call_impl)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Print and log new graphs."""
        graphs = compiled_graphs()
        if graphs > self._graphs:
            size = tuple(batch.images.shape)
            rank_zero_info(
                f"torch.compile: new graphs: {graphs - self._graphs}, at step {batch.step}, "
                f"images {size}"
            )
        if not graphs:
            raise InputError(
                "CompileNetwork: torch.compile compiled nothing; leave the callback out"
            )
        self._graphs = graphs
        # a tensor on the host: Lightning copies a number to the device, and waits for it
        count = torch.tensor(float(graphs - self._earlier_graphs))
        pl_module.log("train/compiled_graphs", count, batch_size=len(batch))

    def _naming_errors(self, compiled: Any) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        def call(images: torch.Tensor) -> Any:
            try:
                return compiled(images)
            except FailOnRecompileLimitHit as error:
                raise InputError(
                    f"CompileNetwork: more than {self._limit} graphs; allowed: two for each size "
                    f"of MultiScale and {_OF_EVALUATION} for evaluation"
                ) from error
            except TorchDynamoException as error:
                reason = next((line for line in str(error).splitlines() if line.strip()), "")
                raise InputError(
                    f"CompileNetwork: torch.compile with the backend {self.backend} failed: "
                    f"{reason or type(error).__name__}; leave the callback out to train without it"
                ) from error

        return call

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the network and the settings of `torch.compile`."""
        self._restore(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Restore them, because Lightning calls `teardown` only at a regular end."""
        self._restore(pl_module)

    def _restore(self, pl_module: pl.LightningModule) -> None:
        pl_module.network.body._compiled_call_impl = None  # type: ignore[union-attr]
        self._settings.close()


def most_graphs(trainer: pl.Trainer) -> int:
    """Return the largest number of shapes that batches can have: sizes by kinds, and evaluation."""
    scales = [callback for callback in trainer.callbacks if isinstance(callback, MultiScale)]  # type: ignore[attr-defined]
    sizes = {size for scale in scales for size in scale.sizes}
    return 2 * max(1, len(sizes)) + _OF_EVALUATION


def compiled_graphs() -> int:
    """Return the number of graphs that this process has compiled."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
