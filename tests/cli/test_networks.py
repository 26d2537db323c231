"""`networks`, and the published figures that docs/tables.md compares with it."""

import re
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests.helpers.darknet import operations
from tests.helpers.paths import REPO
from yolo_lightning.cli.commands.networks import NETWORKS
from yolo_lightning.cli.main import main
from yolo_lightning.darknet.released import LAYOUTS
from yolo_lightning.inference.timing import billion_operations
from yolo_lightning.models.backbones import backbone_layers, detector_layers
from yolo_lightning.models.networks import Classifier, YOLOv2

ROW = r"^\| (.+?) \| `.*` \| [\d,]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (.*)\|$"


def build(name: str) -> Classifier | YOLOv2:
    settings, classes, anchors = NETWORKS[name]
    options: dict[str, Any] = yaml.safe_load(f"{{{settings}}}")
    layers = backbone_layers(options.pop("backbone"))
    with torch.device("meta"):
        if not anchors:
            return Classifier(layers, classes)
        return YOLOv2(detector_layers(layers, **options), classes, torch.empty(anchors, 2))


def test_the_page_of_networks_holds_what_the_command_prints(capsys):
    assert main(["networks"]) == 0
    printed = capsys.readouterr().out
    assert printed in (REPO / "docs/networks.md").read_text(encoding="utf-8")
    table = {row[0]: row[1:] for row in re.findall(ROW, printed, re.M)}
    assert set(table) == set(NETWORKS)
    assert float(table["`yolov2`"][0]) == pytest.approx(50_962_889 / 1e6, abs=0.0051)
    assert (table["`yolov2`"][4], table["`yolo9000`"][4]) == ("845 ", "507 ")  # 5 and 3 times 13²
    # an independent count
    for name, size, column in (("darknet19", 224, 1), ("yolo9000", 416, 2), ("tiny", 608, 3)):
        found = float(table[f"`{name}`"][column])
        assert found == pytest.approx(operations(name, size), abs=0.0051), name


def test_the_settings_of_a_recipe_build_the_released_networks():
    released = {name.strip("`"): network for name, network in NETWORKS.items() if "`" in name}
    assert set(released) == set(LAYOUTS) - {"darknet19_448"}
    for name, network in released.items():
        layout, built = LAYOUTS[name](), build(f"`{name}`")
        assert built.body.layers == layout.layers, name
        anchors = len(layout.region.anchors) // 2 if layout.region else 0
        assert (network.classes, network.anchors) == (layout.classes, anchors), name


def published() -> list[tuple[str, str, float, float]]:
    """Return network, figure, published value and ours, of docs/tables.md."""
    page = (REPO / "docs/tables.md").read_text(encoding="utf-8")
    section = page.partition("## Networks")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| ([\d.]+) \| ([\d.]+) \| .+\|$", section, re.M)
    return [(name, figure, float(theirs), float(ours)) for name, figure, theirs, ours in rows]


@pytest.mark.parametrize(("name", "figure", "theirs", "ours"), published())
def test_published_figures_are_ours_to_one_percent(name, figure, theirs, ours):
    network = build(name)
    if size := re.fullmatch(r"operations at (\d+) px", figure):
        found = billion_operations(network, int(size[1]))
    else:
        assert figure == "values in the weight file"
        norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
        statistics = sum(2 * norm.num_features for norm in norms)
        found = (sum(part.numel() for part in network.parameters()) + statistics) / 1e6
    assert found == pytest.approx(theirs, rel=0.01)
    assert ours == pytest.approx(found, abs=0.0051)


def test_published_figures_cover_every_network():
    compared: dict[str, set[str]] = {name: set() for name in NETWORKS}
    for name, figure, *_ in published():
        compared[name].add(figure.split()[0])
    # no weights of the paper's own form were released
    both = {"operations", "values"}
    assert compared == dict.fromkeys(NETWORKS, both) | {"YOLOv2 as in the paper": {"operations"}}
