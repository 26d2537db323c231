"""Predictions with folded batch norm: equal results, current weights, untouched training."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.own_backbone import PatchBackbone
from tests.helpers.training import TREE, train
from yolo_lightning import DetectorModule, load
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.models import folding
from yolo_lightning.models.layers import Activation, Conv, Layer, Pool
from yolo_lightning.models.networks import ConvBlock, LayerStack, fold_for_prediction

LAYERS: tuple[Layer, ...] = (Conv(8), Pool(), Conv(16, 1), Conv(8, stride=2), Conv(6, 1))


def random_stack(layers: tuple[Layer, ...] = LAYERS) -> Any:
    """Return a network in evaluation mode, whose batch norms have random statistics."""
    torch.manual_seed(0)
    stack = LayerStack(layers)
    for norm in stack.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in norm.state_dict().values():
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return stack.eval()


def folded_copy(stack: nn.Module) -> Any:
    twin = copy.deepcopy(stack)
    fold_for_prediction(twin)
    return twin


def images(size: int = 24, count: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    shape = (count, 3, size, size)
    return torch.rand(shape, generator=generator).contiguous(memory_format=torch.channels_last)


@pytest.fixture(params=["oneDNN", "plain"])
def _layout(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(folding, "_has_onednn", lambda features: False)


@pytest.mark.usefixtures("_layout")
@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("activation", ["leaky", "linear", "relu", "logistic", "tanh", "elu"])
def test_folded_layers_give_the_same_results(activation: Activation, batch_norm):
    layers = (
        Conv(8, batch_norm=batch_norm, activation=activation),
        Conv(16, 1, batch_norm=batch_norm, activation=activation),
        Conv(8, 3, stride=2, padding=0, batch_norm=batch_norm, activation=activation),
    )
    stack = random_stack(layers)
    twin = folded_copy(stack)
    with torch.no_grad():
        for size, count in ((24, 1), (24, 1), (16, 3), (24, 1), (16, 3), (16, 3)):
            expected = stack(images(size, count))
            torch.testing.assert_close(twin(images(size, count)), expected, rtol=1e-5, atol=1e-5)
    assert twin[0].folded._folded.weight.is_mkldnn == folding._has_onednn(images())


def test_folded_layers_leave_the_parameters_alone():
    stack = random_stack()
    twin = folded_copy(stack)
    with torch.no_grad():
        twin(images())
    assert list(twin.state_dict()) == list(stack.state_dict())
    for name, tensor in stack.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor)
    assert all(parameter.requires_grad for parameter in twin.parameters())


@pytest.mark.usefixtures("_layout")
@pytest.mark.parametrize("change", ["weight", "running_mean", "load_state_dict", "double"])
def test_predictions_follow_changed_parameters(change):
    stack = random_stack()
    twin = folded_copy(stack)
    with torch.no_grad():
        before = twin(images())
        for network in (stack, twin):
            match change:
                case "weight":
                    network[2].conv.weight.mul_(2)
                case "running_mean":
                    network[2].norm.running_mean.add_(3)
                case "load_state_dict":
                    state = {k: 1.5 * v for k, v in network.state_dict().items()}
                    network.load_state_dict(state)
                case _:
                    network.double()
        if change == "double":
            found, expected = twin(images().double()), stack(images().double())
        else:
            found, expected = twin(images()), stack(images())
            assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_in_evaluation_mode_are_those_of_the_parameters():
    stack = random_stack()
    twin = folded_copy(stack)
    with torch.no_grad():
        twin(images())
    for network in (stack, twin):
        network(images()).square().sum().backward()
    for own, other in zip(stack.parameters(), twin.parameters(), strict=True):
        assert own.grad is not None
        assert torch.equal(own.grad, other.grad)


def test_weights_are_packed_again_only_for_a_shape_that_repeats(monkeypatch):
    if not folding._has_onednn(images()):
        pytest.skip("this build of PyTorch has no oneDNN")
    packed = []
    pack = folding._pack

    def counted(weight, conv, shape):
        packed.append(shape[-1])
        return pack(weight, conv, shape)

    monkeypatch.setattr(folding, "_pack", counted)
    twin = folded_copy(random_stack((Conv(8),)))
    with torch.no_grad():
        for size in (24, 24, 16, 24, 16, 24, 16, 16, 16):
            twin(images(size))
    assert packed == [24, 16]


def test_half_precision_by_autocast():
    stack = random_stack()
    twin = folded_copy(stack)
    with torch.no_grad():
        exact = stack(images())
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = twin(images()), stack(images())
        assert found.dtype == expected.dtype == torch.bfloat16
        error = (expected - exact).abs().max()
        assert (found - exact).abs().max() <= 2 * error
        torch.testing.assert_close(twin(images()), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_fold_their_own_weights(duplicate):
    twin = folded_copy(random_stack())
    with torch.no_grad():
        twin(images())
        other = duplicate(twin)
        other[0].conv.weight.mul_(2)
        expected = random_stack()
        assert torch.equal(other(images()), other(images()))
        torch.testing.assert_close(twin(images()), expected(images()), rtol=1e-5, atol=1e-5)
        expected[0].conv.weight.mul_(2)
        torch.testing.assert_close(other(images()), expected(images()), rtol=1e-5, atol=1e-5)


def test_an_own_backbone_is_not_folded():
    module = DetectorModule(["a"], [(1, 1)], PatchBackbone(6), 4, 0, image_size=64)
    twin = folded_copy(module.eval())
    inside = [*twin.network.body[0].modules()]
    folded = [block for block in twin.modules() if isinstance(block, ConvBlock) and block.folded]
    assert folded
    assert not set(inside) & set(folded)
    with torch.no_grad():
        expected = module.network(images(64)).box_logits
        found = twin.network(images(64)).box_logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_loaded_model_is_folded_and_trains_as_any_other(tmp_path):
    torch.manual_seed(3)
    torch.save(build_checkpoint(DetectorModule(TREE, [(1, 1)], "small", 8, 4), {}), tmp_path / "m")
    loaded: Any = load(tmp_path / "m")
    expected: Any = load(tmp_path / "m")
    for block in expected.modules():
        if isinstance(block, ConvBlock):
            assert block.folded
            block.folded = None
    with torch.no_grad():
        loaded.network(images(64))  # packs the weights before the training
    for module in (loaded, expected):
        train([], module=module.train(), max_steps=2)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not any(isinstance(block, ConvBlock) and block.folded for block in loaded.modules())
