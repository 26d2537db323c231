"""Multi-scale training: a new image size every few batches."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.errors import InputError


def size_at_step(step: int, sizes: list[int], every: int, seed: int) -> int:
    """Return the image size of a step (a batch number), px; all ranks compute the same one."""
    draw = np.random.SeedSequence((seed, step // every)).generate_state(1)[0]
    return sizes[int(draw) % len(sizes)]


def resize(images: Tensor, size: int) -> Tensor:
    """Return float images (B, 3, size, size) in 0…1 of uint8 or float images, on their device."""
    unit = images.float() / 255 if not images.is_floating_point() else images
    if images.shape[-1] == size:
        return unit
    return F.interpolate(unit, size=(size, size), mode="bilinear", antialias=True)


def dry_run(module: pl.LightningModule, batch: Any) -> None:
    """Run a forward and a backward pass without side effects."""
    buffers = list(module.buffers())
    saved = [buffer.clone() for buffer in buffers]
    parameters = [p for p in module.parameters() if p.requires_grad]
    terms: dict[str, Tensor] = module.loss_terms(batch)  # type: ignore[operator]
    loss = torch.stack(list(terms.values())).sum()
    # accumulates no gradients, so that no hooks of DDP run
    torch.autograd.grad(loss, parameters, allow_unused=True)
    for buffer, value in zip(buffers, saved, strict=True):
        buffer.copy_(value)


class MultiScale(pl.Callback):
    """Resize training batches to a random size that changes every few batches; has no state.

    Args:
        sizes: px, multiples of 32, at most `data.canvas_size`.
        every_n_batches: number of batches with one size.
        seed: of the sequence of sizes.

    Raises:
        InputError: a value out of range; for `data.canvas_size`, when training starts.

    Source: YOLO9000, section 2, "Multi-Scale Training".
    """

    def __init__(self, sizes: list[int], every_n_batches: int = 10, seed: int = 0) -> None:
        if not sizes or any(size <= 0 or size % 32 for size in sizes):
            raise InputError(f"MultiScale: sizes is {sizes}; allowed: positive multiples of 32")
        if every_n_batches < 1:
            raise InputError(
                f"MultiScale: every_n_batches is {every_n_batches}; allowed: 1 or more"
            )
        self.sizes, self.every_n_batches, self.seed = sizes, every_n_batches, seed

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that no size is above the canvas size."""
        canvas = getattr(trainer.datamodule, "canvas_size", max(self.sizes))  # type: ignore[attr-defined]
        if max(self.sizes) > canvas:
            raise InputError(
                f"MultiScale: size {max(self.sizes)} is above data.canvas_size {canvas}; "
                f"set data.canvas_size to {max(self.sizes)} or more"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run a step of each kind at the largest size: fail now if memory is too small."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "batch"):
            return
        rank, world = trainer.global_rank, trainer.world_size
        size = max(self.sizes)
        for step in data.order.first_steps:
            batch = data.batch(step, rank, world).to(pl_module.device)
            batch.images = resize(batch.images, size)
            try:
                with trainer.precision_plugin.train_step_context():
                    dry_run(pl_module, batch)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{len(batch)} images of {size} px, the largest size of MultiScale, need more "
                    f"memory than is available ({str(error).splitlines()[0]}); reduce "
                    "data.detection_batch_size or data.classification_batch_size, and increase "
                    "trainer.accumulate_grad_batches instead"
                ) from None

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Resize the images of the batch."""
        if isinstance(batch, DetectionBatch | ClassificationBatch):
            size = size_at_step(batch.step, self.sizes, self.every_n_batches, self.seed)
            batch.images = resize(batch.images, size)
