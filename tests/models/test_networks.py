"""Networks: parity with the original program, layers, and what the README says of their size."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers.darknet import conv_layers, network_of, operations
from tests.helpers.golden import load
from tests.helpers.golden_weights import random_image, write_random_weights
from tests.helpers.paths import REPO
from yolo_lightning.checkpoints.pretrained import fill_last_conv, last_conv
from yolo_lightning.darknet.config import LAYOUTS, Description
from yolo_lightning.darknet.files import WeightsReader, blocks_of, read_weights, tensors_of
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
    Pool,
    Reorg,
    ReorgKind,
    Route,
    from_plain,
    to_plain,
)
from yolo_lightning.models.networks import Classifier, LayerStack, YOLOv2, space_to_depth


def filled(description: Description, path: Path) -> YOLOv2 | Classifier:
    write_random_weights(path, conv_layers(description))
    network = network_of(description)
    reader = WeightsReader(read_weights(path))
    for _, block in blocks_of(network.body):
        reader.fill(block)
    fill_last_conv(network, reader)
    assert reader.remaining == 0
    return network.eval()


@torch.no_grad()
def activated(network: YOLOv2, size: int) -> torch.Tensor:
    """Return (A, 5 + K, Gh, Gw): sigmoid on x, y and objectness; w, h and classes raw."""
    features = network.body(torch.from_numpy(random_image(size))[None])
    raw = nn.functional.conv2d(features, *last_conv(network))[0]
    raw = torch.Tensor(raw.unflatten(0, (len(network.class_weight), -1)))
    raw[:, [0, 1, 4]] = raw[:, [0, 1, 4]].sigmoid()
    return raw


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    spread = expected.max() - expected.min()
    return float((found - expected).abs().max() / spread)


def test_darknet19_gives_the_original_s_probabilities(tmp_path):
    network = filled(LAYOUTS["darknet19"](), tmp_path / "w")
    golden = load("darknet19_forward.npz")["activated"]
    with torch.no_grad():
        probs = network(torch.from_numpy(random_image(224))[None])[0].softmax(dim=0)
    assert largest_error(probs, golden) <= 1e-3


@pytest.mark.parametrize("name", ["yolov2-voc", "yolov2-tiny-voc"])
def test_yolov2_gives_the_original_s_output(name, tmp_path):
    network = filled(LAYOUTS[name](), tmp_path / "w")
    assert isinstance(network, YOLOv2)
    golden = load(f"{name}_forward.npz")["activated"]
    found = activated(network, 416)
    found[:, 5:] = found[:, 5:].softmax(dim=1)
    assert largest_error(found.flatten(0, 1), golden) <= 1e-3


def test_yolo9000_gives_the_original_s_boxes(tmp_path):
    network = filled(LAYOUTS["yolo9000"](), tmp_path / "w")
    assert isinstance(network, YOLOv2)
    golden = load("yolo9000_forward.npz")["box_objectness"]
    assert largest_error(activated(network, 160)[:, :5], golden) <= 1e-3


def test_a_network_that_is_off_by_one_layer_is_not_at_parity(tmp_path):
    description = LAYOUTS["yolov2-voc"]()
    network = filled(description, tmp_path / "w")
    assert isinstance(network, YOLOv2)
    plain = tuple(Reorg(2) if isinstance(x, Reorg) else x for x in description.layers)
    other = YOLOv2(plain, 20, network.anchors_wh_cell).eval()
    other.load_state_dict(network.state_dict())
    golden = load("yolov2-voc_forward.npz")["activated"]
    assert largest_error(activated(other, 416).flatten(0, 1)[:5], golden[:5]) > 1e-2


def reorg_of(kind: ReorgKind) -> nn.Module:
    return LayerStack([Conv(4), Reorg(2, kind)])[1]


def test_reorg_by_hand():
    plain = torch.arange(16.0).view(1, 1, 4, 4)
    out = reorg_of("space_to_depth")(plain)
    assert out[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert out[0, :, 1, 1].tolist() == [10, 11, 14, 15]
    four = torch.arange(16.0).view(1, 4, 2, 2)  # reread as one channel of 4 x 4
    quirk = reorg_of("darknet")(four)
    assert quirk.shape == (1, 16, 1, 1)
    assert quirk.flatten().tolist() == space_to_depth(plain, 2).flatten().tolist()
    assert space_to_depth(four, 2).flatten().tolist() != quirk.flatten().tolist()


@pytest.mark.parametrize("kind", ["darknet", "space_to_depth"])
def test_reorg_loses_and_invents_nothing(kind):
    values = torch.randperm(8 * 4 * 6).float().view(1, 8, 4, 6)
    out = reorg_of(kind)(values.contiguous(memory_format=torch.channels_last))
    assert out.shape == (1, 32, 2, 3)
    assert sorted(out.flatten().tolist()) == sorted(values.flatten().tolist())


@pytest.mark.parametrize(("passthrough", "joined"), [(64, 1280), (None, 3072), (0, 1024)])
def test_passthrough_joins_what_the_paper_and_the_release_say(passthrough, joined):
    layers = detector_layers(DARKNET19, 1024, passthrough)
    with torch.device("meta"):
        body = LayerStack(layers)
    (last,) = [block for k, block in blocks_of(body) if k == len(layers) - 1]
    assert last.conv.in_channels == joined
    assert (body.stride, body.out_channels) == (32, 1024)


def test_pools_reach_over_the_right_and_lower_edges():
    image = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).expand(1, 3, 3, 3)
    assert LayerStack([Pool()])(image)[0, 0].tolist() == [[5, 6], [8, 9]]
    same = LayerStack([Pool(2, 1)])(image)[0, 0]
    assert same.tolist() == [[5, 6, 6], [8, 9, 9], [8, 9, 9]]
    assert LayerStack([Pool(3, 2)])(-image)[0, 0].tolist() == [[-1, -2], [-4, -5]]


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_take_any_multiple_of_their_stride(name):
    with torch.device("meta"):
        body = LayerStack(BACKBONES[name])
        for height, width in ((64, 64), (96, 160)):
            out = body(torch.empty(1, 3, height, width))
            assert out.shape[2:] == (height // body.stride, width // body.stride)


def test_layers_survive_as_plain_values():
    layers: tuple[Layer, ...] = (
        Conv(8), Conv(4, 1, 2, 0, False, "linear"), Pool(2, 1), Reorg(2, "darknet"), Dropout(0.25),
        Route((-1, 0)),
    )  # fmt: skip
    plain = to_plain(layers)
    assert plain[0] == ["conv", 8]
    assert plain[-1] == ["route", [-1, 0]]
    assert from_plain(plain) == layers
    assert backbone_layers(plain) == layers


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["deconv", 3]], "layer 0 is .*; allowed kinds: conv, pool"),
        ([["conv", 8, 3, 1, 0, True, "leaky", 1]], "layer 0"),
        ([["conv", 0]], r"layer 0 \(conv\): filters is 0; allowed: 1 or more"),
        ([["conv", 8, 3, 1, None, True, "mish"]], "activation is 'mish'; allowed: leaky"),
        ([["conv", 6], ["reorg", 2, "darknet"]], "6 channels; allowed: multiples of 4"),
        ([["conv", 8], ["route", [-2]]], r"names layer -2; allowed: 0 … 0, or -1 … -1"),
        ([["conv", 8], ["pool"], ["route", [0, 1]]], "different strides"),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_number(rows, message):
    with pytest.raises(InputError, match=message):
        LayerStack(from_plain(rows))


def test_an_unknown_backbone_names_the_near_one():
    with pytest.raises(InputError, match="did you mean 'darknet19'"):
        backbone_layers("darknet_19")


def test_a_head_of_nothing_takes_no_passthrough():
    assert detector_layers(SMALL, 0, 0) == SMALL
    with pytest.raises(InputError, match="passthrough_channels is 64; allowed without a head"):
        detector_layers(SMALL, 0, 64)


def test_darknet19_has_the_paper_s_operations():
    assert operations("darknet19", 224) == pytest.approx(5.58, abs=0.005)


def test_the_readme_s_table_of_networks_is_what_counts():
    rows = re.findall(
        r"^\| `([\w-]+)` \|.*?\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (REPO / "README.md").read_text(),
        re.MULTILINE,
    )
    assert {row[0] for row in rows} == set(LAYOUTS) - {"darknet19_448"}
    for name, parameters, *counted in rows:
        with torch.device("meta"):
            network = network_of(LAYOUTS[name]())
        learned = sum(p.numel() for p in network.parameters())
        assert float(parameters) == pytest.approx(learned / 1e6, abs=0.0051), name
        for size, figure in zip((224, 416, 608), counted, strict=True):
            assert float(figure) == pytest.approx(operations(name, size), abs=0.0051), (name, size)


def test_tensors_are_filled_in_the_order_of_the_file(tmp_path):
    write_random_weights(tmp_path / "w", [(3, 4, 3, 1), (4, 2, 1, 0)])
    body = LayerStack([Conv(4), Conv(2, 1, batch_norm=False, activation="linear")])
    reader = WeightsReader(read_weights(tmp_path / "w"))
    for _, block in blocks_of(body):
        reader.fill(block)
    rng = np.random.default_rng(7)
    shift, scale = 0.1 * rng.standard_normal(4), rng.uniform(0.5, 1.5, 4)
    first = tensors_of(blocks_of(body)[0][1])
    np.testing.assert_allclose(first[0].numpy(force=True), shift, rtol=1e-6)
    np.testing.assert_allclose(first[1].numpy(force=True), scale, rtol=1e-6)
