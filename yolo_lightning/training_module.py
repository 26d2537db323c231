"""The base of both LightningModules: SGD, pretrained weights, checks of data and checkpoints."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.checkpoints.pretrained import load_pretrained
from yolo_lightning.checkpoints.resuming import check_removable_paths, name_restore_errors
from yolo_lightning.checkpoints.validation import first_difference, network_layers
from yolo_lightning.errors import InputError, printable
from yolo_lightning.models.backbones import backbone_layers, plain_backbone
from yolo_lightning.models.layers import LayerRow, layers_to_rows
from yolo_lightning.models.networks import Classifier, YOLOv2
from yolo_lightning.models.preparation import PREPARATION
from yolo_lightning.schedules import Schedule
from yolo_lightning.tree.wordtree import WordTree

Batch = DetectionBatch | ClassificationBatch


class TrainingModule(pl.LightningModule):
    """Train `network` with SGD and a schedule of the learning rate.

    A subclass calls `set_network` in its constructor, and implements the steps, `_check_data`,
    `_reset_evaluation` and `_log_metrics`. For the parameters, see `DetectorModule`.
    """

    network: YOLOv2 | Classifier

    def __init__(
        self,
        tree: str | list[str] | list[tuple[str, str, str]],
        backbone: str | list[LayerRow] | nn.Module,
        pretrained: str | None,
        schedule: Schedule | None,
    ) -> None:
        super().__init__()
        self.tree = WordTree.from_source(tree)
        self.backbone_layers = backbone_layers(backbone)
        self.pretrained, self.schedule = pretrained, schedule or Schedule()
        self._gradient_norm: torch.Tensor | None = None  # of this step, once it is known
        self._losses: dict[str, torch.Tensor] = {}  # the newest of this epoch, on the device
        self._settings: dict[str, float] = {}  # of the newest step
        self._figures: dict[str, float] = {}  # both, once they are known

    def set_network(
        self,
        network: YOLOv2 | Classifier,
        backbone: str | list[LayerRow] | nn.Module,
        **hparams: Any,
    ) -> None:
        """Set the network, and save the hyper-parameters, which are plain values."""
        self.network = network
        # 20 % faster on CPUs
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name in ("learning_rate", "momentum", "weight_decay", "backbone_lr_factor"):
            if hparams[name] < 0:
                raise InputError(f"model.{name} is {hparams[name]}; allowed: 0 or more")
        # plain values, so that checkpoints load with weights_only=True
        tree = [list(row) for row in self.tree.rows]
        plain = {"tree": tree, "backbone": plain_backbone(backbone), **hparams}
        self.save_hyperparameters(plain, logger=False)

    @property
    def _datamodule(self) -> Any:
        return getattr(self.trainer, "datamodule", None)

    def setup(self, stage: str) -> None:
        """Check data and trainer, prepare images as the data does, and load pretrained weights."""
        self._own_preparation = {k: v for k, v in self.hparams.items() if k in PREPARATION}
        for name in self._own_preparation:
            value = getattr(self._datamodule, name, None)
            self.hparams[name] = self.hparams[name] if value is None else value
        data_tree = getattr(self._datamodule, "tree", None)
        if data_tree is not None and data_tree.rows != self.tree.rows:
            difference = first_difference(data_tree.rows, self.tree.rows, "the data", "the model")
            raise InputError(f"data.tree differs from model.tree: {difference}")
        self._check_data(stage)
        check_trainer(self.trainer)
        if stage != "fit":
            return
        name_restore_errors(self.trainer)
        if self.pretrained is not None and not self.trainer.ckpt_path:
            report = load_pretrained(
                self.network, self.tree, self.pretrained, len(self.backbone_layers)
            )
            rank_zero_only(print)(printable(str(report)))
        if not self.hparams["backbone_lr_factor"]:
            # before the strategy wraps the module, so that DDP expects no gradients for them;
            # Lightning keeps their evaluation mode
            for layer in self._backbone():
                layer.eval().requires_grad_(False)

    def teardown(self, stage: str) -> None:
        """After an evaluation, prepare images as before it."""
        if stage != "fit":
            self.hparams.update(self._own_preparation)

    def _check_data(self, stage: str) -> None:
        """Raise an `InputError` if the data does not suit the module."""
        raise NotImplementedError

    def _backbone(self) -> list[nn.Module]:
        return list(self.network.body)[: len(self.backbone_layers)]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return SGD and its schedule; the backbone has a learning rate of its own.

        Weights of two or more dimensions decay, biases and the scales of norms do not. The rule
        holds for a backbone given as a module, too.

        Source: the original program, whose update decays the weights of convolutions only.
        """
        backbone = {id(p) for layer in self._backbone() for p in layer.parameters()}
        # always four groups, so that a resumed run can freeze or unfreeze the backbone
        groups: list[list[nn.Parameter]] = [[] for _ in range(4)]
        for name, parameter in self.named_parameters():
            decays = parameter.ndim > 1 and not name.endswith("bias")  # `class_bias` is a matrix
            groups[2 * (id(parameter) in backbone) + (not decays)].append(parameter)
        optimizer = torch.optim.SGD(
            [
                {"params": parameters, **options}
                for parameters, options in zip(groups, self._group_options(), strict=True)
            ],
            # reads 29 million class weights once instead of four times, and skips a step by a flag
            # on the device
            fused=True,
        )
        # a lambda, because LambdaLR saves the state of callable objects in the checkpoint
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _group_options(self) -> list[dict[str, float]]:
        """Return the options of SGD: head, head without decay, backbone, and it without decay."""
        rate, momentum = self.hparams["learning_rate"], self.hparams["momentum"]
        return [
            {"lr": rate * factor, "momentum": momentum, "weight_decay": weight_decay}
            for factor in (1.0, self.hparams["backbone_lr_factor"])
            for weight_decay in (self.hparams["weight_decay"], 0.0)
        ]

    def on_train_start(self) -> None:
        """Apply the recipe's hyper-parameters to a resumed optimizer, and allocate its momentum."""
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        all_options = self._group_options()
        scheduler.base_lrs = [options["lr"] for options in all_options]
        factor = self.schedule(scheduler.last_epoch)
        for group, options in zip(scheduler.optimizer.param_groups, all_options, strict=True):
            group.update(options, lr=options["lr"] * factor, initial_lr=options["lr"], fused=True)
            # fused SGD leaves its first buffers uninitialised if the gradient scaler skips a step
            for parameter in group["params"] if self.hparams["momentum"] else ():
                state = scheduler.optimizer.state[parameter]
                if parameter.requires_grad and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def gradient_norm(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Return the norm of all gradients of an optimizer step, unscaled, float (), on the device.

        It is computed once a step.
        """
        if self._gradient_norm is None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                scaler.unscale_(optimizer)
            norms = torch._foreach_norm([p.grad for p in self.parameters() if p.grad is not None])
            self._gradient_norm = torch.linalg.vector_norm(torch.stack(norms))
        return self._gradient_norm

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the gradients: Lightning refuses it for a fused optimizer."""
        if gradient_clip_val:
            norm = self.gradient_norm(optimizer)
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)
        self._gradient_norm = None

    def on_train_epoch_start(self) -> None:
        """Forget the losses of the epoch before, as the trainer does."""
        self._losses, self._figures = {}, {}

    def _keep_losses(self, batch: Batch, losses: dict[str, torch.Tensor]) -> None:
        """Keep the losses of a step on the device, to be read when a step is logged."""
        self._losses.update(losses)
        lr, image_size = self.trainer.optimizers[0].param_groups[0]["lr"], batch.images.shape[-1]
        self._settings = {"train/lr": lr, "train/image_size": float(image_size)}
        self._figures = {}

    def newest_figures(self) -> dict[str, float]:
        """Return the newest losses of this epoch, of both kinds of batches, and their settings.

        It waits for the device once; with `self.log`, each value would be waited for.
        """
        if self._losses and not self._figures:
            values = torch.stack(list(self._losses.values())).tolist()
            # in float32, as `self.log` keeps numbers
            values += torch.tensor(list(self._settings.values())).tolist()
            self._figures = dict(zip([*self._losses, *self._settings], values, strict=True))
        return self._figures

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the losses if the step is to be logged."""
        if self.trainer._logger_connector.should_update_logs:
            self._log_figures()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the losses of the last step, too, where `max_time` has just ended the training."""
        if self.trainer.should_stop:
            self._log_figures()

    def _log_figures(self) -> None:
        # tensors on the host: Lightning copies numbers to the device, and waits for it
        figures = {name: torch.tensor(value) for name, value in self.newest_figures().items()}
        self.log_dict(figures, batch_size=1)

    def metric_names(self) -> list[str]:
        """Return the names of the losses and metrics that callbacks may monitor."""
        raise NotImplementedError

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update the metrics, as in a validation."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Set the classes of the metrics."""
        self._reset_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        """Set the classes of the metrics."""
        self._reset_evaluation("test")

    def _reset_evaluation(self, stage: str) -> None:
        """Set the classes of the metrics to those of a source of the data."""
        raise NotImplementedError

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        raise NotImplementedError

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the name of the module class."""
        checkpoint["module"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has the same module class, tree, anchors and layers."""
        saved, name = checkpoint["hyper_parameters"], type(self).__name__
        if checkpoint.get("module") != name:
            raise InputError(
                f"the checkpoint holds a {checkpoint.get('module', 'module of an older version')}, "
                f"the recipe names a {name}; to load only its backbone, use model.pretrained"
            )
        parts = [("model.tree", self.hparams["tree"], saved["tree"])]
        batch_norm = self.hparams["batch_norm"], saved["batch_norm"]
        parts.append(("model.batch_norm", *batch_norm))
        layers = "model.backbone"
        if isinstance(self.network, YOLOv2):
            anchors = self.hparams["anchors_wh_cell"], saved["anchors_wh_cell"]
            parts.append(("model.anchors_wh_cell", *anchors))
            location = self.hparams["location"], saved["location"]
            parts.append(("model.location", *location))
            layers = "the network's list of layers"
        rows = layers_to_rows(self.network.body.layers), layers_to_rows(network_layers(saved))
        for part, mine, theirs in [*parts, (layers, *rows)]:
            if mine != theirs:
                difference = first_difference(mine, theirs, "the recipe", "the checkpoint")
                raise InputError(f"{part} differs from the checkpoint's: {difference}")
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        check_removable_paths(checkpoint.get("callbacks", {}))
        groups = [state["param_groups"] for state in checkpoint.get("optimizer_states", ())]
        if any(len(one) != len(self._group_options()) for one in groups):
            raise InputError(
                "the checkpoint's optimizer is that of an older version and cannot be resumed; to "
                "start from its weights, use model.pretrained"
            )


def check_trainer(trainer: pl.Trainer) -> None:
    """Check the trainer's options.

    Raises:
        InputError: a true half precision, synchronised batch norm on CPUs, clipping by value or of
            sharded gradients, or validation during gradient accumulation (checkpoints do not
            contain gradients).
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
    if trainer.gradient_clip_val and isinstance(trainer.strategy, FSDPStrategy):
        raise InputError(
            f"trainer.gradient_clip_val is {trainer.gradient_clip_val}; allowed with fsdp: null"
        )
    interval, accumulate = trainer.val_check_interval, trainer.accumulate_grad_batches
    is_whole = isinstance(interval, int) or interval == 1.0
    if accumulate > 1 and (not is_whole or (isinstance(interval, int) and interval % accumulate)):
        raise InputError(
            f"trainer.val_check_interval is {interval}; allowed: multiples of "
            f"trainer.accumulate_grad_batches, {accumulate}"
        )
