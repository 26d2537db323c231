"""A new image size every few batches."""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.errors import InputError


def size_at(step: int, sizes: list[int], every: int, seed: int) -> int:
    """Return the image size, px, of a step: a pure function, so that ranks agree untold.

    Args:
        step: number of the batch since training began.
        sizes: the sizes to choose from, px.
        every: batches between two draws.
        seed: chooses the sequence.
    """
    draw = np.random.SeedSequence((seed, step // every)).generate_state(1)[0]
    return sizes[int(draw) % len(sizes)]


def resize(images: Tensor, size: int) -> Tensor:
    """Return float images in 0…1, (B, 3, size, size), of uint8 or float ones, on their device."""
    unit = images.float() / 255 if not images.is_floating_point() else images
    if images.shape[-1] == size:
        return unit
    return F.interpolate(unit, size=(size, size), mode="bilinear", antialias=True)


def rehearse(module: pl.LightningModule, batch: Any) -> None:
    """Run a step forward and backward, and leave everything as it was.

    Gradients are asked for, not accumulated: nothing that waits for other ranks hears of them.

    Args:
        module: with `loss_terms`.
        batch: on its device.
    """
    buffers = list(module.buffers())
    kept = [buffer.clone() for buffer in buffers]
    parameters = [p for p in module.parameters() if p.requires_grad]
    terms: dict[str, Tensor] = module.loss_terms(batch)  # type: ignore[operator]
    loss = torch.stack(list(terms.values())).sum()
    torch.autograd.grad(loss, parameters, allow_unused=True)
    for buffer, before in zip(buffers, kept, strict=True):
        buffer.copy_(before)


class MultiScale(pl.Callback):
    """Resize each training batch to a size that changes every few batches; keeps no state.

    Boxes are relative to the image, so only the images change.

    Args:
        sizes: sizes to choose from, px, multiples of 32, none above the data's canvas.
        every_n_batches: batches between two draws.
        seed: chooses the sequence of sizes.

    Raises:
        InputError: no sizes, a size that is not a multiple of 32, or, when training starts, one
            above the canvas.

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
        """Refuse sizes that would have to be enlarged from a smaller canvas."""
        canvas = getattr(trainer.datamodule, "canvas_size", max(self.sizes))  # type: ignore[attr-defined]
        if max(self.sizes) > canvas:
            raise InputError(
                f"MultiScale: size {max(self.sizes)} is above data.canvas_size {canvas}; "
                f"set data.canvas_size to {max(self.sizes)} or more"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Try a step of each kind at the largest size, so that too little memory ends it now.

        Nothing stays of it: no gradient, no running statistics, no random number.

        Raises:
            InputError: out of memory.
        """
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
                    rehearse(pl_module, batch)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{len(batch)} images of {size} px, the largest size of MultiScale, take more "
                    f"memory than there is ({str(error).splitlines()[0]}); smaller: "
                    "data.detection_batch_size, data.classification_batch_size, with "
                    "trainer.accumulate_grad_batches in their place"
                ) from None

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Assign the resized images."""
        if isinstance(batch, DetectionBatch | ClassificationBatch):
            size = size_at(batch.step, self.sizes, self.every_n_batches, self.seed)
            batch.images = resize(batch.images, size)
