"""SGD and batch norm against the original program's arithmetic."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn

from yolo_lightning import ClassifierModule, DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.models.layers import Activation, Conv
from yolo_lightning.models.networks import ConvBlock
from yolo_lightning.schedules import StepDecay
from yolo_lightning.training_module import check_trainer

NAMES = ["cat", "dog"]
LAYERS: list[list[Any]] = [["conv", 4], ["pool"], ["conv", 8, 3, 1, None, False], ["pool"]]


class MixedBackbone(nn.Module):
    """A backbone whose parameters have 0 to 4 dimensions."""

    out_channels, stride = 4, 8

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.temperature = nn.Parameter(torch.ones(()))
        self.embed = nn.Conv2d(3, 4, 8, 8)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = (self.embed(images) + self.position) * self.temperature
        return torch.as_tensor(self.mix(self.norm(features.movedim(1, 3))).movedim(3, 1))


def detector(**options: Any) -> DetectorModule:
    options = {"backbone": LAYERS, "head_channels": 4, "passthrough_channels": 0, **options}
    return DetectorModule(NAMES, [(1.0, 1.0), (2.0, 2.0)], **options)


def optimizer_of(module: DetectorModule | ClassifierModule) -> torch.optim.SGD:
    module._trainer = SimpleNamespace(gradient_clip_val=None)  # type: ignore[assignment]
    optimizer = module.configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.SGD)
    return optimizer


def decaying(module: DetectorModule | ClassifierModule) -> dict[str, float]:
    """Return the weight decay of each parameter that has one, by its name in the network."""
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer_of(module).param_groups
        for parameter in group["params"]
    }
    named = dict(module.network.named_parameters())
    assert len(decay) == len(named)  # every parameter is in one group
    return {name: decay[id(p)] for name, p in named.items() if decay[id(p)]}


def test_only_weights_of_convolutions_decay():
    assert decaying(detector(weight_decay=0.25)) == dict.fromkeys(
        [
            "body.0.conv.weight",
            "body.2.conv.weight",
            "body.4.conv.weight",
            "body.5.conv.weight",
            "body.6.conv.weight",
            "box_conv.weight",
            "class_weight",
        ],
        0.25,
    )
    assert set(decaying(ClassifierModule(NAMES, LAYERS))) == {
        "body.0.conv.weight",
        "body.2.conv.weight",
        "class_conv.weight",
    }


def test_weights_of_two_or_more_dimensions_of_an_own_backbone_decay():
    names = {n for n in decaying(detector(backbone=MixedBackbone())) if n.startswith("body.0.")}
    assert names == {"body.0.position", "body.0.embed.weight", "body.0.mix.weight"}


def test_groups_have_the_rates_of_head_and_backbone():
    module = detector(learning_rate=0.5, backbone_lr_factor=0.25, weight_decay=0.125)
    groups = optimizer_of(module).param_groups
    assert [(g["initial_lr"], g["weight_decay"]) for g in groups] == [
        (0.5, 0.125), (0.5, 0.0), (0.125, 0.125), (0.125, 0.0),
    ]  # fmt: skip
    backbone = {id(p) for layer in list(module.network.body)[:4] for p in layer.parameters()}
    for number, group in enumerate(groups):
        assert group["params"]
        assert all((id(p) in backbone) == (number >= 2) for p in group["params"])


def darknet_update(
    values: torch.Tensor, updates: torch.Tensor, decay: float, rate: float, momentum: float
) -> None:
    """Update as the original program; `updates` holds the sum of negative gradients."""
    updates -= decay * values
    values += rate * updates
    updates *= momentum


@pytest.mark.parametrize("name", ["body.0.conv.weight", "body.0.norm.weight", "body.2.conv.bias"])
def test_four_updates_equal_the_original_program(name):
    """Momentum, decay and a change of the rate, with random gradients."""
    torch.manual_seed(0)
    schedule = StepDecay([3], [0.1])
    module = detector(learning_rate=0.5, weight_decay=0.125, momentum=0.75, schedule=schedule)
    module._trainer = SimpleNamespace(gradient_clip_val=None)  # type: ignore[assignment]
    configured: Any = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    parameter = dict(module.network.named_parameters())[name]
    values, updates = parameter.detach().double().clone(), torch.zeros(parameter.shape).double()
    decay = 0.125 if name == "body.0.conv.weight" else 0.0
    for batch_number in (1, 2, 3, 4):
        parameter.grad = torch.randn_like(parameter)
        updates -= parameter.grad
        rate = 0.5 if batch_number < 3 else 0.05
        darknet_update(values, updates, decay, rate, momentum=0.75)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(parameter.detach().double(), values, rtol=1e-5, atol=1e-6)


def batch_norm(activation: Activation = "leaky") -> tuple[ConvBlock, dict[str, torch.Tensor]]:
    """Return a block that copies its input to batch norm, and batch norm's statistics."""
    block = ConvBlock(1, Conv(1, 1, activation=activation))
    assert block.norm is not None
    nn.init.ones_(block.conv.weight)
    return block, dict(block.norm.named_buffers())


def test_running_statistics_keep_99_percent_a_batch():
    block, statistics = batch_norm()
    images = torch.tensor([0.0, 2.0, 4.0, 6.0]).reshape(1, 1, 2, 2)  # mean 3, variance 20 / 3
    block(images)
    assert statistics["running_mean"].tolist() == pytest.approx([0.03])
    assert statistics["running_var"].tolist() == pytest.approx([0.99 + 0.2 / 3])
    block(images)
    assert statistics["running_mean"].tolist() == pytest.approx([0.99 * 0.03 + 0.03])


def test_batch_norm_divides_as_the_original_program_on_gpus():
    """x / sqrt(variance + 0.00001): small variances show the constant."""
    block, statistics = batch_norm("linear")
    statistics["running_var"].fill_(6e-5)
    result = block.eval()(torch.full((1, 1, 1, 1), 7e-3))
    assert result.item() == pytest.approx(7e-3 / 7e-5**0.5)


def test_clipping_of_sharded_gradients_is_rejected():
    strategy = object.__new__(FSDPStrategy)
    trainer: Any = SimpleNamespace(
        precision="32-true", strategy=strategy, gradient_clip_val=1.0, gradient_clip_algorithm=None
    )
    with pytest.raises(InputError, match=r"gradient_clip_val is 1.0; allowed with fsdp: null"):
        check_trainer(trainer)


def test_clipping_equals_that_of_torch():
    module = detector()
    module._trainer = SimpleNamespace(precision_plugin=None)  # type: ignore[assignment]
    parameters = list(module.parameters())
    for parameter in parameters[1:]:
        parameter.grad = torch.randn_like(parameter)
    expected = [torch.zeros(1), *(p.grad.clone() for p in parameters[1:] if p.grad is not None)]
    norm = torch.stack([g.square().sum() for g in expected]).sum().sqrt()
    assert norm > 2
    module.configure_gradient_clipping(optimizer=None, gradient_clip_val=2.0)  # type: ignore[arg-type]
    for parameter, gradient in zip(parameters[1:], expected[1:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 2 / norm)


def test_another_optimizer_cannot_be_resumed_but_its_network_be_tested():
    module: Any = detector()
    checkpoint: dict[str, Any] = {"hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    for groups, message in ((4, None), (2, "older version and cannot be resumed")):
        checkpoint["optimizer_states"] = [{"param_groups": [{}] * groups}]
        for command in ("fit", "test"):
            module._trainer = SimpleNamespace(state=SimpleNamespace(fn=command))
            if message is not None and command == "fit":
                with pytest.raises(InputError, match=message):
                    module.on_load_checkpoint(checkpoint)
            else:
                module.on_load_checkpoint(checkpoint)
