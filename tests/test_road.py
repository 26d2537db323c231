"""The road from YOLO to YOLOv2: its recipe, its overrides, its page and its miniature."""

import copy
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import road
from tests.benchmarks.road_report import HEADER, save_figure_of, table
from tests.benchmarks.road_steps import NEW_NETWORK, OLD_NETWORK, STEPS, miniature_steps
from tests.helpers.paths import REPO
from yolo_lightning.callbacks import MultiScale
from yolo_lightning.cli import recipe as cli
from yolo_lightning.darknet.released import LAYOUTS
from yolo_lightning.detector import DetectorModule
from yolo_lightning.models.backbones import backbone_layers, detector_layers
from yolo_lightning.models.layers import Conv, Route, layer_outputs
from yolo_lightning.models.networks import LayerStack

VARIABLES = ("EXTRACTION_224_PLAIN", "EXTRACTION_224", "EXTRACTION_448", "DARKNET19_448")
PAGE = REPO / "docs/road.md"

# by row: backbone's weights, stride, side of the image, anchors, location, whether it has a
# passthrough, sizes in training; by hand from the paper
CLAIMS: list[tuple[str, int, int, int, str, bool, int]] = [
    ("EXTRACTION_224_PLAIN", 64, 448, 1, "direct", False, 1),
    ("EXTRACTION_224", 64, 448, 1, "direct", False, 1),
    ("EXTRACTION_448", 64, 448, 1, "direct", False, 1),
    ("EXTRACTION_448", 32, 416, 9, "offset", False, 1),
    ("DARKNET19_448", 32, 416, 9, "offset", False, 1),
    ("DARKNET19_448", 32, 416, 5, "direct", False, 1),
    ("DARKNET19_448", 32, 416, 5, "direct", True, 1),
    ("DARKNET19_448", 32, 416, 5, "direct", True, 10),
    ("DARKNET19_448", 32, 544, 5, "direct", True, 10),
]
BOXES = [49, 49, 49, 1521, 1521, 845, 845, 845, 1445]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that gives the values of a row, from the real command line."""
    for name in VARIABLES:
        monkeypatch.setenv(name, f"{name}.ckpt")
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(cli.RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    root = f"--trainer.default_root_dir={tmp_path}"

    def run(row: int) -> Any:
        options = road.merge([step.values for step in STEPS[: row + 1]])
        return cli.main(["fit", "--config", road.ROAD, *options, root])

    return run


@pytest.mark.parametrize("row", [3, 8])  # each takes a second; all rows are built below
def test_the_overrides_of_a_row_describe_its_network(parse, monkeypatch, row):
    monkeypatch.setattr(cli.RecipeCLI, "instantiate_classes", lambda self: None)
    config = parse(row).config["fit"]
    weights, stride, size, anchors, location, has_passthrough, sizes = CLAIMS[row]
    model = config.model.init_args
    assert model.pretrained == f"{weights}.ckpt"
    assert (model.batch_norm, model.location) == (row > 0, location)
    layers = detector_layers(
        backbone_layers(model.backbone), model.head_channels, model.passthrough_channels
    )
    assert layer_outputs(layers)[-1].stride == stride
    assert any(isinstance(layer, Route) for layer in layers) == has_passthrough
    assert [layer for layer in layers if isinstance(layer, Conv)][-1] == Conv(1024)
    assert config.data.init_args.image_size == size
    assert len(model.anchors_wh_cell) == anchors
    assert anchors * (size // stride) ** 2 == BOXES[row]
    multi_scale = [one for one in config.trainer.callbacks if "MultiScale" in one.class_path]
    assert [len(one.init_args.sizes) for one in multi_scale] == ([] if sizes == 1 else [sizes])


@pytest.mark.slow
@pytest.mark.parametrize("row", range(len(STEPS) - 1))
def test_the_command_of_a_row_builds_its_network(parse, row):
    run = parse(row)
    _, stride, _, anchors, location, has_passthrough, sizes = CLAIMS[row]
    assert isinstance(run.model, DetectorModule)
    network = run.model.network
    assert (network.stride, network.location) == (stride, location)
    assert len(network.anchors_wh_cell) == anchors
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())
    backbone = 21 if row < 3 else 20 if row == 3 else 18
    assert norms == (backbone + 3 + has_passthrough if row else 0)
    callbacks = [one for one in run.trainer.callbacks if isinstance(one, MultiScale)]
    assert [len(one.sizes) for one in callbacks] == ([] if sizes == 1 else [sizes])


def test_the_anchors_of_a_row_are_those_of_the_paper():
    values = yaml.safe_load(STEPS[3].values["model.anchors_wh_cell"])
    # Faster R-CNN's on images of 600 px, here of 375 x 500 px in 416 px: 600 px are 312 px
    cells = [128 * scale * 312 / 600 / 32 for scale in (1, 2, 4)]
    expected = [(c * r, c / r) for c in cells for r in (math.sqrt(2), 1, math.sqrt(0.5))]
    assert [side for pair in values for side in pair] == pytest.approx(
        [side for pair in expected for side in pair], abs=0.006
    )
    released = LAYOUTS["yolov2-voc"]().region
    assert released is not None
    clusters = yaml.safe_load(STEPS[5].values["model.anchors_wh_cell"])
    assert tuple(side for pair in clusters for side in pair) == released.anchors


def page_text(values: dict[str, str]) -> str:
    """Return values as options for a shell."""
    return " ".join(shlex.join([f"--{key}={value}"]) for key, value in values.items()) or "none"


def test_the_page_lists_the_overrides_of_the_benchmark():
    text = PAGE.read_text(encoding="utf-8")
    for number, step in enumerate(STEPS):
        row = rf"^\| {number} \| {re.escape(step.name)} \| `?([^|]+?)`? \|$"
        assert re.findall(row, text, re.M) == [page_text(step.values)], number


def test_the_miniature_changes_what_the_full_size_changes():
    rows = miniature_steps(0, 8)
    for number, (step, values) in enumerate(zip(STEPS, rows, strict=True)):
        assert values.keys() == step.values.keys(), number
    assert len(json.loads(rows[5]["model.anchors_wh_cell"])) == 5


def test_both_networks_of_the_miniature_cost_about_the_same():
    costs, sizes = [], []
    for rows in (OLD_NETWORK, NEW_NETWORK):
        with torch.device("meta"):
            stack = LayerStack(backbone_layers(rows))
            with FlopCounterMode(display=False) as counter:
                stack(torch.empty(1, 3, 96, 96))
        assert (stack.stride, stack.out_channels) == (16, 128)
        costs.append(counter.get_total_flops() / 1e6)
        sizes.append(sum(p.numel() for p in stack.parameters()))
    assert costs == pytest.approx([39.1, 35.6], abs=0.06)
    assert sizes == [282_384, 282_960]


def seeds() -> list[dict[str, Any]]:
    """Return the results of two seeds with simple figures."""
    rows = [{"name": s.name, "AP50": 10.0 * k, "recall": 50.0} for k, s in enumerate(STEPS)]
    first, second = {"rows": rows}, {"rows": copy.deepcopy(rows)}
    second["rows"][1] |= {"AP50": 14.0, "recall": 60.0}
    return [first, second]


def test_the_table_gives_mean_and_spread_of_rows_and_gains(tmp_path):
    lines = table(seeds()).splitlines()
    assert lines[2].startswith("| 0 | YOLO, fully convolutional | 0.0 (0.0 … 0.0) |  | 50.0")
    assert "| 12.0 (10.0 … 14.0) | +12.0 (+10.0 … +14.0) | 55.0 (50.0 … 60.0) | 65.8 " in lines[3]
    assert "| 20.0 (20.0 … 20.0) | +8.0 (+6.0 … +10.0) |" in lines[4]
    assert lines[4].endswith("| 69.5 | +3.7 | 81 |")
    assert "| 30.0 | +10.0 | 50.0 | 69.2 | -0.3 | 88 |" in table(seeds()[:1])
    save_figure_of(seeds(), tmp_path / "road.png")
    assert (tmp_path / "road.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_reads_the_files_of_several_seeds(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"text\n\n{HEADER}\n| --- |\n| old |\n\nmore\n")
    files = [tmp_path / f"{k}.json" for k in range(2)]
    for file, seed in zip(files, seeds(), strict=True):
        file.write_text(json.dumps(seed))
    road.main(["--report", *map(str, files), "--page", str(page)])
    assert capsys.readouterr().out.strip() == table(seeds())
    assert page.read_text() == f"text\n\n{table(seeds())}\n\nmore\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_miniature_road_with_two_steps_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    for name in (*VARIABLES, "DARKNET19_224"):
        monkeypatch.setenv(name, "")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    short = ["--steps=2", "--classifier-steps=2", "--images=32", "--test-images=4"]
    road.main(["--seed=3", *short, f"--output={tmp_path}"])
    result = json.loads((tmp_path / "seed-3.json").read_text())
    assert [row["name"] for row in result["rows"]] == [step.name for step in STEPS]
    assert result["rows"][8]["checkpoint"] == result["rows"][7]["checkpoint"]
    assert all(0 <= row["recall"] <= 100 for row in result["rows"])
    assert table([result]) in capsys.readouterr().out
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("road")
    assert experiment is not None
    names = {run.info.run_name for run in client.search_runs([experiment.experiment_id])}
    assert {f"{k} {step.name}, seed 3" for k, step in enumerate(STEPS)} <= names
    assert len(names) == len(STEPS) + 5
