"""Networks: parity with the original program, layers, and the documented sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.darknet import build_network, conv_layers, operations
from tests.helpers.golden import load
from tests.helpers.golden_weights import random_image, write_random_weights
from tests.helpers.own_backbone import PatchBackbone
from yolo_lightning import ClassifierModule, DetectorModule
from yolo_lightning.checkpoints.pretrained import fill_last_conv, last_conv
from yolo_lightning.darknet.config import NetworkDescription
from yolo_lightning.darknet.released import LAYOUTS
from yolo_lightning.darknet.weights import WeightsReader, conv_blocks, conv_tensors, read_weights
from yolo_lightning.errors import InputError
from yolo_lightning.models.backbones import (
    BACKBONES,
    DARKNET19,
    SMALL,
    backbone_layers,
    detector_layers,
)
from yolo_lightning.models.layers import (
    Conv,
    Dropout,
    Layer,
    LayerRow,
    Pool,
    Reorg,
    ReorgKind,
    Route,
    layers_from_rows,
    layers_to_rows,
)
from yolo_lightning.models.networks import (
    Classifier,
    LayerStack,
    YOLOv2,
    fold_for_prediction,
    space_to_depth,
)


def load_network(description: NetworkDescription, path: Path) -> YOLOv2 | Classifier:
    write_random_weights(path, conv_layers(description))
    network = build_network(description)
    reader = WeightsReader(read_weights(path))
    for _, block in conv_blocks(network.body):
        reader.fill(block)
    fill_last_conv(network, reader)
    assert reader.remaining == 0
    return network.eval()


@torch.no_grad()
def dense_output(network: YOLOv2, size: int) -> torch.Tensor:
    """Return (A, 5 + K, Gh, Gw): sigmoid on x, y and objectness; w, h and classes raw."""
    features = network.body(torch.from_numpy(random_image(size))[None])
    raw = nn.functional.conv2d(features, *last_conv(network))[0]
    raw = torch.Tensor(raw.unflatten(0, (len(network.class_weight), -1)))
    raw[:, [0, 1, 4]] = raw[:, [0, 1, 4]].sigmoid()
    return raw


def max_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    spread = expected.max() - expected.min()
    return float((found - expected).abs().max() / spread)


def test_darknet19_probabilities_equal_the_original(tmp_path):
    network = load_network(LAYOUTS["darknet19"](), tmp_path / "w")
    golden = load("darknet19_forward.npz")["activated"]
    for prepare in (nn.Module.eval, fold_for_prediction):
        prepare(network)
        with torch.no_grad():
            probs = network(torch.from_numpy(random_image(224))[None])[0].softmax(dim=0)
        assert max_error(probs, golden) <= 1e-3


@pytest.mark.parametrize("name", ["yolov2-voc", "yolov2-tiny-voc"])
def test_yolov2_output_equals_the_original(name, tmp_path):
    network = load_network(LAYOUTS[name](), tmp_path / "w")
    assert isinstance(network, YOLOv2)
    golden = load(f"{name}_forward.npz")["activated"]
    for prepare in (nn.Module.eval, fold_for_prediction):
        prepare(network)
        found = dense_output(network, 416)
        found[:, 5:] = found[:, 5:].softmax(dim=1)
        assert max_error(found.flatten(0, 1), golden) <= 1e-3


def test_yolo9000_boxes_equal_the_original(tmp_path):
    network = load_network(LAYOUTS["yolo9000"](), tmp_path / "w")
    assert isinstance(network, YOLOv2)
    golden = load("yolo9000_forward.npz")["box_objectness"]
    for prepare in (nn.Module.eval, fold_for_prediction):
        prepare(network)
        assert max_error(dense_output(network, 160)[:, :5], golden) <= 1e-3


def test_one_different_layer_changes_the_output(tmp_path):
    description = LAYOUTS["yolov2-voc"]()
    network = load_network(description, tmp_path / "w")
    assert isinstance(network, YOLOv2)
    plain = tuple(Reorg(2) if isinstance(x, Reorg) else x for x in description.layers)
    other = YOLOv2(plain, 20, network.anchors_wh_cell).eval()
    other.load_state_dict(network.state_dict())
    golden = load("yolov2-voc_forward.npz")["activated"]
    assert max_error(dense_output(other, 416).flatten(0, 1)[:5], golden[:5]) > 1e-2


def build_reorg(kind: ReorgKind) -> nn.Module:
    return LayerStack([Conv(4), Reorg(2, kind)])[1]


def test_reorg_by_hand():
    plain = torch.arange(16.0).view(1, 1, 4, 4)
    out = build_reorg("space_to_depth")(plain)
    assert out[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert out[0, :, 1, 1].tolist() == [10, 11, 14, 15]
    four = torch.arange(16.0).view(1, 4, 2, 2)  # reread as one channel of 4 x 4
    quirk = build_reorg("darknet")(four)
    assert quirk.shape == (1, 16, 1, 1)
    assert quirk.flatten().tolist() == space_to_depth(plain, 2).flatten().tolist()
    assert space_to_depth(four, 2).flatten().tolist() != quirk.flatten().tolist()


@pytest.mark.parametrize("kind", ["darknet", "space_to_depth"])
def test_reorg_is_a_permutation(kind):
    values = torch.randperm(8 * 4 * 6).float().view(1, 8, 4, 6)
    out = build_reorg(kind)(values.contiguous(memory_format=torch.channels_last))
    assert out.shape == (1, 32, 2, 3)
    assert sorted(out.flatten().tolist()) == sorted(values.flatten().tolist())


@pytest.mark.parametrize(("passthrough", "joined"), [(64, 1280), (None, 3072), (0, 1024)])
def test_passthrough_channels_of_the_paper_and_the_release(passthrough, joined):
    layers = detector_layers(DARKNET19, 1024, passthrough)
    with torch.device("meta"):
        body = LayerStack(layers)
    (last,) = [block for k, block in conv_blocks(body) if k == len(layers) - 1]
    assert last.conv.in_channels == joined
    assert (body.stride, body.out_channels) == (32, 1024)


def test_pooling_windows_extend_beyond_the_right_and_lower_edges():
    image = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).expand(1, 3, 3, 3)
    assert LayerStack([Pool()])(image)[0, 0].tolist() == [[5, 6], [8, 9]]
    same = LayerStack([Pool(2, 1)])(image)[0, 0]
    assert same.tolist() == [[5, 6, 6], [8, 9, 9], [8, 9, 9]]
    assert LayerStack([Pool(3, 2)])(-image)[0, 0].tolist() == [[-1, -2], [-4, -5]]


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_accept_any_multiple_of_their_stride(name):
    with torch.device("meta"):
        body = LayerStack(BACKBONES[name])
        for height, width in ((2, 2), (3, 5)):
            out = body(torch.empty(1, 3, height * body.stride, width * body.stride))
            assert out.shape[2:] == (height, width)


def test_layers_round_trip_through_plain_values():
    layers: tuple[Layer, ...] = (
        Conv(8), Conv(4, 1, 2, 0, False, "linear"), Pool(2, 1), Reorg(2, "darknet"), Dropout(0.25),
        Route((-1, 0)),
    )  # fmt: skip
    plain = layers_to_rows(layers)
    assert plain[0] == ["conv", 8]
    assert plain[-1] == ["route", [-1, 0]]
    assert layers_from_rows(plain) == layers
    assert backbone_layers(plain) == layers


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["deconv", 3]], "layer 0 is .*; allowed types: conv, pool"),
        ([["conv", 8, 3, 1, 0, True, "leaky", 1]], "layer 0"),
        ([["conv", 0]], r"layer 0 \(conv\): filters is 0; allowed: 1 … 65,536"),
        ([["conv", 8, 3, 1, None, True, "mish"]], "activation is 'mish'; allowed: leaky"),
        ([["conv", 6], ["reorg", 2, "darknet"]], "6 input channels; allowed: multiples of 4"),
        ([["conv", 8], ["route", [-2]]], r"index -2; allowed: 0 … 0, or -1 … -1"),
        ([["conv", 8], ["pool"], ["route", [0, 1]]], "different strides"),
    ],
)
def test_invalid_layers_are_named_by_index(rows, message):
    with pytest.raises(InputError, match=message):
        LayerStack(layers_from_rows(rows))


def test_an_unknown_backbone_suggests_a_similar_name():
    with pytest.raises(InputError, match="did you mean 'darknet19'"):
        backbone_layers("darknet_19")


def test_every_convolution_of_a_network_without_batch_norm_has_a_bias():
    module = DetectorModule(["a"], [(1.0, 1.0)], "small", 8, 4, batch_norm=False)
    classifier = ClassifierModule(["a"], "small", batch_norm=False)
    for network in (module.network, classifier.network):
        assert not any(isinstance(part, nn.BatchNorm2d) for part in network.modules())
        convs = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
        assert all(conv.bias is not None for conv in convs)
    assert len([part for part in module.network.modules() if isinstance(part, nn.Conv2d)]) == 12
    usual = DetectorModule(["a"], [(1.0, 1.0)], "small", 8, 4)
    assert len([p for p in usual.network.modules() if isinstance(p, nn.BatchNorm2d)]) == 11
    # with batch norm, layers keep what they say themselves
    rows: list[LayerRow] = [["conv", 8], ["conv", 4, 1, 1, 0, False]]
    norms = [block.norm is not None for block in ClassifierModule(["a"], rows).network.body]
    assert norms == [True, False]


def test_the_batch_norm_of_a_module_cannot_be_removed():
    message = "model.batch_norm is false; allowed for a backbone that is a module: true"
    with pytest.raises(InputError, match=message):
        ClassifierModule(["a"], PatchBackbone(), batch_norm=False)
    with pytest.raises(InputError, match=message):
        DetectorModule(["a"], [(1, 1)], PatchBackbone(), 8, 0, batch_norm=False)


def test_an_unknown_location_is_refused():
    with pytest.raises(InputError, match="model.location is 'cell'; allowed: direct, offset"):
        DetectorModule(["a"], [(1, 1)], "small", 8, 4, location="cell")  # type: ignore[arg-type]


def test_no_passthrough_without_a_head():
    assert detector_layers(SMALL, 0, 0) == SMALL
    with pytest.raises(InputError, match="passthrough_channels is 64; allowed without a head"):
        detector_layers(SMALL, 0, 64)


def test_darknet19_has_as_many_operations_as_in_the_paper():
    assert operations("darknet19", 224) == pytest.approx(5.58, abs=0.005)


def test_the_extraction_network_of_yolo_has_as_many_operations_as_published():
    with torch.device("meta"):
        network = Classifier(BACKBONES["extraction"], 1000)
        with FlopCounterMode(display=False) as counter:
            features = network.body(torch.empty(1, 3, 224, 224))
            nn.functional.conv2d(features, network.class_conv.weight)
    assert counter.get_total_flops() / 1e9 == pytest.approx(8.52, abs=0.005)
    # kernels, scales and shifts of 20 convolutions, kernels and biases of the last, as in its .cfg
    assert sum(p.numel() for p in network.parameters()) == 23_437_224
    assert (network.body.stride, network.body.out_channels) == (32, 1024)
    assert LayerStack(BACKBONES["yolov1"]).stride == 64


def test_tensors_are_read_in_the_order_of_the_file(tmp_path):
    write_random_weights(tmp_path / "w", [(3, 4, 3, 1), (4, 2, 1, 0)])
    body = LayerStack([Conv(4), Conv(2, 1, batch_norm=False, activation="linear")])
    reader = WeightsReader(read_weights(tmp_path / "w"))
    for _, block in conv_blocks(body):
        reader.fill(block)
    rng = np.random.default_rng(7)
    shift, scale = 0.1 * rng.standard_normal(4), rng.uniform(0.5, 1.5, 4)
    first = conv_tensors(conv_blocks(body)[0][1])
    np.testing.assert_allclose(first[0].numpy(force=True), shift, rtol=1e-6)
    np.testing.assert_allclose(first[1].numpy(force=True), scale, rtol=1e-6)
