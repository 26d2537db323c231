"""SGD as every recipe uses it: one rate and one schedule, both from the recipe."""

from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from yolo_lightning.errors import InputError


@dataclass(frozen=True)
class SGDConfig:
    """What SGD is told.

    Attributes:
        learning_rate: per optimizer step, for a gradient averaged over the images of the global
            batch.
        momentum, weight_decay: of SGD; biases and batch norms decay too, as in the original.
        backbone_lr_factor: factor of the backbone's learning rate; 0 freezes the backbone and its
            running statistics.
        schedule: factor of all learning rates at each optimizer step.
    """

    learning_rate: float
    momentum: float
    weight_decay: float
    backbone_lr_factor: float
    schedule: Callable[[int], float]

    def __post_init__(self) -> None:
        for name in ("learning_rate", "momentum", "weight_decay", "backbone_lr_factor"):
            if getattr(self, name) < 0:
                raise InputError(f"model.{name} is {getattr(self, name)}; allowed: 0 or more")


def sgd(
    module: pl.LightningModule, backbone: list[nn.Parameter], config: SGDConfig
) -> OptimizerLRSchedulerConfig:
    """Return SGD over a module and its schedule, per optimizer step.

    Args:
        module: with its trainer.
        backbone: the parameters that `config.backbone_lr_factor` is of.
        config: of the recipe.
    """
    inside = {id(parameter) for parameter in backbone}
    rest = [p for p in module.parameters() if id(p) not in inside]
    # two groups whatever the factor is, so that a resumed run may freeze the backbone or thaw it
    groups = [(rest, 1.0), (backbone, config.backbone_lr_factor)]
    # the fused kernel walks 29 million class weights once instead of four times; under mixed
    # precision it cannot be clipped
    fused = not module.trainer.gradient_clip_val
    optimizer = torch.optim.SGD(
        [{"params": p, "lr": config.learning_rate * factor} for p, factor in groups],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    # a function, not the object: its values stay out of the checkpoint and the recipe's hold
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.schedule(step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def apply_recipe_rates(module: pl.LightningModule, config: SGDConfig) -> None:
    """Let the recipe's config hold on resuming, where the checkpoint brought its own."""
    scheduler = module.lr_schedulers()
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    scheduler.base_lrs = [
        config.learning_rate * factor for factor in (1.0, config.backbone_lr_factor)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
        group.update(
            lr=rate * config.schedule(scheduler.last_epoch),
            initial_lr=rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )


def freeze(layers: list[nn.Module]) -> None:
    """Keep layers as they are while the rest trains: weights and running statistics.

    Said before the strategy wraps the module, which then waits for no gradient of theirs; Lightning
    leaves each layer's mode as it finds it.
    """
    for layer in layers:
        layer.eval().requires_grad_(False)


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse options of the trainer that would train something else than the recipe says.

    Raises:
        InputError: half of a precision, synchronised batch norm on CPUs, or validation between
            two halves of an optimizer step, whose gradient no checkpoint holds.
    """
    precision = str(trainer.precision)
    if precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise InputError(
            f"trainer.precision is {precision}; allowed: 32-true, 16-mixed, bf16-mixed"
        )
    synchronised = getattr(trainer.strategy, "_layer_sync", None) is not None
    if synchronised and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise InputError(
            "trainer.sync_batchnorm is true; on CPUs batch norm cannot be synchronised"
        )
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise InputError("trainer.gradient_clip_algorithm is value; allowed: norm")
    every, parts = trainer.val_check_interval, trainer.accumulate_grad_batches
    whole = isinstance(every, int) or every == 1.0
    if parts > 1 and (not whole or (isinstance(every, int) and every % parts)):
        raise InputError(
            f"trainer.val_check_interval is {every}; allowed: multiples of "
            f"trainer.accumulate_grad_batches, {parts}"
        )
