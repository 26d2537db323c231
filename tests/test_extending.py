"""The code of docs/extending.md: written to files as the page names them, and trained with."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.commands import fences
from tests.helpers.images import write_image
from tests.helpers.paths import REPO
from yolo_lightning import WordTree, load
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import DetectionSource, ImageLabelSource
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint

PAGE = (REPO / "docs/extending.md").read_text(encoding="utf-8")
PYTHON = {re.findall(r"^# (\S+)\n", block)[0]: block for block in fences(PAGE, "python")}
*FRAGMENTS, RECIPE = fences(PAGE, "yaml")
SOURCE_METHODS = {"bind", "__len__", "node_counts", "read"}


def contains(whole: Any, part: Any) -> bool:
    """Return whether a recipe has all values of a part of a recipe."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            key in whole and contains(whole[key], value) for key, value in part.items()
        )
    return bool(whole == part)


@pytest.fixture
def project(workplace, monkeypatch):
    """A folder with the files of the page, two images and their boxes."""
    for name, code in PYTHON.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(code)
    Path("recipe.yaml").write_text(RECIPE)
    for name in ("a.jpg", "b.jpg"):
        write_image(workplace / name)
    rows = ["a.jpg,5,5,40,30,apple", "b.jpg,20,9,60,44,banana", "a.jpg,1,2,9,9,banana"]
    Path("boxes.csv").write_text("\n".join(["image,x1,y1,x2,y2,label", *rows]) + "\n")
    monkeypatch.syspath_prepend(str(workplace))
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)
    return workplace


def test_a_source_needs_the_four_methods_that_the_page_lists():
    for source in (DetectionSource, ImageLabelSource):
        assert source.__abstractmethods__ == SOURCE_METHODS
    table = PAGE[PAGE.index("| method |") : PAGE.index("Boxes from a table")]
    assert set(re.findall(r"^\| `(\w+)\(", table, re.M)) == SOURCE_METHODS


def test_a_source_has_about_thirty_lines():
    (block,) = (code for name, code in PYTHON.items() if "boxes_csv" in name)
    lines = [line for line in block[block.index("class ") :].splitlines() if line.strip()]
    assert len(lines) <= 30


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_the_recipe_has_the_lines_of_each_section(fragment):
    assert contains(yaml.safe_load(RECIPE), yaml.safe_load(fragment))


def test_the_recipe_trains_with_everything_of_the_page(project, capsys):
    allow = ["--allow-module", "my_package"]
    options = ["--trainer.accelerator=cpu", "--data.num_workers=0"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: csv}}"
    options += [f"--trainer.logger={logger}"]
    assert main(["fit", "--config", "recipe.yaml", *allow, *options]) == 0, capsys.readouterr()
    out = capsys.readouterr().out
    assert "Classes: 2; they learn 2 from boxes" in out
    (table,) = project.glob("csv/**/metrics.csv")
    header, *rows = table.read_text().splitlines()
    values = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert [float(row["train/objects_per_image"]) for row in values if row["train/loss"]] == [
        1.5, 1.5,
    ]  # fmt: skip
    assert all(float(row["train/loss_l1"]) > 0 for row in values)


def test_the_source_reads_the_boxes_of_the_table(project):
    scope: dict[str, Any] = {}
    exec(PYTHON["my_package/boxes_csv.py"], scope)
    source = scope["BoxesCSV"]("boxes.csv")
    source.bind(WordTree.from_names(["apple", "banana"]))
    assert len(source) == 2
    sample = source.read(0)
    assert sample.boxes_xyxy_px.tolist() == [[5, 5, 40, 30], [1, 2, 9, 9]]
    assert sample.labels.tolist() == [0, 1]
    assert source.node_counts() == {0: {"apple": 1}, 1: {"banana": 2}}
    boxes, images = source.shapes_wh_px()
    assert (boxes.shape, images.shape) == ((3, 2), (3, 2))
    with pytest.raises(InputError, match=r"boxes\.csv:3: label 'banana' is not in the tree"):
        scope["BoxesCSV"]("boxes.csv").bind(WordTree.from_names(["apple"]))


def test_a_checkpoint_loads_with_the_backbone_passed(project):
    module = importlib.import_module("my_package.backbones").StridedBackbone(8)
    detectors = importlib.import_module("my_package.detectors")
    detector = detectors.SparseDetector(
        ["apple", "banana"], [(1.5, 1.5)], module, head_channels=32, passthrough_channels=0
    ).eval()
    images = torch.rand(1, 3, 64, 96)
    assert module(images).shape == (1, module.out_channels, 4, 6)
    torch.save(build_checkpoint(detector, {}), "best.ckpt")
    backbone = importlib.import_module("my_package.backbones").StridedBackbone(8)
    loaded = detectors.SparseDetector.load_from_checkpoint("best.ckpt", backbone=backbone).eval()
    expected = detector.network(images).box_logits
    assert torch.equal(loaded.network(images).box_logits, expected)
    with pytest.raises(InputError, match="SparseDetector.*allowed: DetectorModule"):
        load("best.ckpt", backbone=backbone)
    checkpoint = torch.load("best.ckpt", weights_only=True)
    torch.save({**checkpoint, "module": "DetectorModule"}, "plain.ckpt")
    loaded = load("plain.ckpt", backbone=backbone)
    assert torch.equal(loaded.network(images).box_logits, expected)
