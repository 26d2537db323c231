"""SGD as every recipe uses it: one rate, one schedule, both from the recipe."""

from collections.abc import Callable

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from yolo_lightning.errors import InputError


def sgd(
    module: pl.LightningModule,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    schedule: Callable[[int], float],
) -> OptimizerLRSchedulerConfig:
    """Return SGD and its schedule, per optimizer step; biases and batch norms decay too."""
    # the fused kernel walks 29 million class weights once instead of four times; under mixed
    # precision it cannot be clipped
    fused = not module.trainer.gradient_clip_val
    optimizer = torch.optim.SGD(
        module.parameters(), learning_rate, momentum, weight_decay=weight_decay, fused=fused
    )
    # a function, not the object: its values stay out of the checkpoint and the recipe's hold
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def keep_recipe_rates(
    module: pl.LightningModule,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    schedule: Callable[[int], float],
) -> None:
    """Let the recipe's rates hold on resuming, where the checkpoint brought its own."""
    scheduler = module.lr_schedulers()
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    for group in scheduler.optimizer.param_groups:
        group.update(
            lr=learning_rate * schedule(scheduler.last_epoch),
            initial_lr=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
        )


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse options of the trainer that would train something else than the recipe says.

    Raises:
        InputError: half of a precision, or validation between two halves of an optimizer step,
            whose gradient no checkpoint holds.
    """
    precision = str(trainer.precision)
    if precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise InputError(
            f"trainer.precision is {precision}; allowed: 32-true, 16-mixed, bf16-mixed"
        )
    every, parts = trainer.val_check_interval, trainer.accumulate_grad_batches
    if isinstance(every, int) and every % parts:
        raise InputError(
            f"trainer.val_check_interval is {every}; allowed: multiples of "
            f"trainer.accumulate_grad_batches, {parts}"
        )
