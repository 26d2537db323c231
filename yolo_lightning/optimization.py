"""SGD with a learning-rate schedule, both configured by the recipe."""

from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from yolo_lightning.errors import InputError


@dataclass(frozen=True)
class SGDConfig:
    """SGD hyper-parameters; see `DetectorModule`."""

    learning_rate: float
    momentum: float
    weight_decay: float
    backbone_lr_factor: float
    schedule: Callable[[int], float]

    def __post_init__(self) -> None:
        for name in ("learning_rate", "momentum", "weight_decay", "backbone_lr_factor"):
            if getattr(self, name) < 0:
                raise InputError(f"model.{name} is {getattr(self, name)}; allowed: 0 or more")


def build_sgd(
    module: pl.LightningModule, backbone: list[nn.Parameter], config: SGDConfig
) -> OptimizerLRSchedulerConfig:
    """Return SGD and its schedule; `backbone` has the learning rate x `backbone_lr_factor`."""
    backbone_ids = {id(parameter) for parameter in backbone}
    rest = [p for p in module.parameters() if id(p) not in backbone_ids]
    # always two groups, so that a resumed run can freeze or unfreeze the backbone
    groups = [(rest, 1.0), (backbone, config.backbone_lr_factor)]
    # the fused kernel reads 29 million class weights once instead of four times; with mixed
    # precision it does not support gradient clipping
    fused = not module.trainer.gradient_clip_val
    optimizer = torch.optim.SGD(
        [{"params": p, "lr": config.learning_rate * factor} for p, factor in groups],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=fused,
    )
    # a lambda, because LambdaLR saves the state of callable objects in the checkpoint
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: config.schedule(step))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def apply_sgd_config(module: pl.LightningModule, config: SGDConfig) -> None:
    """Apply the recipe's hyper-parameters to a resumed optimizer, which has the checkpoint's."""
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


def freeze_layers(layers: list[nn.Module]) -> None:
    """Freeze weights and running statistics of layers; Lightning keeps their training mode.

    Call it before the strategy wraps the module, so that DDP expects no gradients for them.
    """
    for layer in layers:
        layer.eval().requires_grad_(False)


def check_trainer(trainer: pl.Trainer) -> None:
    """Check the trainer's options.

    Raises:
        InputError: a true half precision, synchronised batch norm on CPUs, clipping by value, or
            validation during gradient accumulation (checkpoints do not contain gradients).
    """
    precision = str(trainer.precision)
    if precision not in ("32-true", "16-mixed", "bf16-mixed"):
        raise InputError(
            f"trainer.precision is {precision}; allowed: 32-true, 16-mixed, bf16-mixed"
        )
    is_sync = getattr(trainer.strategy, "_layer_sync", None) is not None
    if is_sync and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
        raise InputError("trainer.sync_batchnorm is true; allowed on CPUs: false")
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise InputError("trainer.gradient_clip_algorithm is value; allowed: norm")
    interval, accumulate = trainer.val_check_interval, trainer.accumulate_grad_batches
    is_whole = isinstance(interval, int) or interval == 1.0
    if accumulate > 1 and (not is_whole or (isinstance(interval, int) and interval % accumulate)):
        raise InputError(
            f"trainer.val_check_interval is {interval}; allowed: multiples of "
            f"trainer.accumulate_grad_batches, {accumulate}"
        )
