"""Multi-scale training: a new image size every few batches."""

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.errors import InputError


def size_at_step(
    step: int, sizes: list[int], every: int, seed: int, first_at_largest: float = math.inf
) -> int:
    """Return the image size of a step (a batch number), px; all ranks compute the same one."""
    if step >= first_at_largest:
        return max(sizes)
    draw = np.random.SeedSequence((seed, step // every)).generate_state(1)[0]
    return sizes[int(draw) % len(sizes)]


def first_batch_at_largest(trainer: Any, batches_per_epoch: float, last_batches: int) -> float:
    """Return the number of the first of the last batches of a training; infinity for none.

    Args:
        trainer: a trainer, or that of a recipe.
        batches_per_epoch: of the data; infinity if unknown.
        last_batches: how many batches before the end of the training.

    Raises:
        InputError: the training has no known end.
    """
    if not last_batches:
        return math.inf
    has_epochs, has_steps = trainer.max_epochs not in (None, -1), trainer.max_steps != -1
    if not (has_epochs or has_steps) or math.isinf(batches_per_epoch):
        raise InputError(
            f"MultiScale: last_batches_at_largest is {last_batches}; allowed without "
            "trainer.max_steps and trainer.max_epochs, or with data of unknown length: 0"
        )
    ends = [trainer.max_epochs * batches_per_epoch] if has_epochs else []
    if has_steps:
        # the last batches of an epoch make an optimizer step, even if they are too few
        accumulate = trainer.accumulate_grad_batches
        epochs, steps = divmod(trainer.max_steps, math.ceil(batches_per_epoch / accumulate))
        ends.append(epochs * batches_per_epoch + steps * accumulate)
    return float(min(ends) - last_batches)


def resize(images: Tensor, size: int) -> Tensor:
    """Return float images (B, 3, size, size) in 0…1 of uint8 or float images, on their device."""
    unit = images.float() / 255 if not images.is_floating_point() else images
    if images.shape[-1] == size:
        return unit
    return F.interpolate(unit, size=(size, size), mode="bilinear", antialias=True)


def has_own_memory(device: torch.device) -> bool:
    """Return whether too little memory of a device is an error, which CPUs seldom raise."""
    return device.type != "cpu"


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
    """Train at a random image size that changes every few batches; has no state.

    The sequence of sizes follows from `data.seed`, which is the recipe's `seed_everything`. A
    `CombinedDataModule` reads images at the size of their step; those of another datamodule or
    loader are resized on the device.

    Args:
        sizes (px): of the network input, multiples of 32, one of which is drawn: the network learns
            all of them. Source: YOLO9000, section 2.
        every_n_batches (batches): until the next size. Source: YOLO9000, section 2.
        last_batches_at_largest (batches): at the end of the training, by `trainer.max_steps` or
            `trainer.max_epochs`, that have the largest size. Source: Darknet: 200.

    Raises:
        InputError: a value out of range; when training starts, a size above 2,048 px, or a
            training without an end.

    Source: YOLO9000, section 2, "Multi-Scale Training"; the original program trains the last 200
    batches at the largest size.
    """

    def __init__(
        self, sizes: list[int], every_n_batches: int = 10, last_batches_at_largest: int = 0
    ) -> None:
        if not sizes or any(size <= 0 or size % 32 for size in sizes):
            raise InputError(f"MultiScale: sizes is {sizes}; allowed: positive multiples of 32")
        if every_n_batches < 1:
            raise InputError(
                f"MultiScale: every_n_batches is {every_n_batches}; allowed: 1 or more"
            )
        if last_batches_at_largest < 0:
            raise InputError(
                f"MultiScale: last_batches_at_largest is {last_batches_at_largest}; "
                "allowed: 0 or more"
            )
        self.sizes, self.every_n_batches = sizes, every_n_batches
        self.last_batches_at_largest = last_batches_at_largest
        self._first_at_largest = math.inf

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the data read images at the size of their step."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and hasattr(data, "size_of_step"):
            data.check_size("MultiScale: sizes", max(self.sizes))
            # loader workers start before the trainer knows its number of batches
            first = first_batch_at_largest(
                trainer, data.batches_per_epoch, self.last_batches_at_largest
            )
            data.size_of_step = lambda step: self._size_at(step, data.seed, first)

    def _size_at(self, step: int, seed: int, first_at_largest: float) -> int:
        return size_at_step(step, self.sizes, self.every_n_batches, seed, first_at_largest)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the end; on a GPU, try a step of each kind at the largest size, for its memory."""
        self._first_at_largest = first_batch_at_largest(
            trainer, trainer.num_training_batches, self.last_batches_at_largest
        )
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not (has_own_memory(pl_module.device) and hasattr(data, "size_of_step")):
            return
        rank, world = trainer.global_rank, trainer.world_size
        size = max(self.sizes)
        for step in data.order.first_steps:
            batch = data.batch(step, rank, world, size).to(pl_module.device)
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
        """Resize the images of the batch, unless they were read at the size of the step."""
        if isinstance(batch, DetectionBatch | ClassificationBatch):
            seed = getattr(trainer.datamodule, "seed", 0)  # type: ignore[attr-defined]
            size = self._size_at(batch.step, seed, self._first_at_largest)
            if batch.images.shape[-1] != size:
                batch.images = resize(batch.images, size)
