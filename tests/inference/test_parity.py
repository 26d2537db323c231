"""Equal detections from `detect`, Python, `validate` and the exported graph."""

import csv
import json
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from tests.helpers import miniatures
from tests.helpers.trees import BACKBONE
from yolo_lightning import CombinedDataModule, load
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import VOCFolder
from yolo_lightning.detector import DetectorModule
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.models.head import Location

pytestmark = pytest.mark.end_to_end

NAMES = ["apple", "banana", "cherry"]
SCORE = 0.1


@pytest.fixture(scope="module", params=["area", "darknet"])
def interpolation(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, interpolation):
    """Images of several shapes with a box each, and a network with confident predictions."""
    folder = tmp_path_factory.mktemp("parity")
    generator = np.random.default_rng(1)
    for k, (height, width) in enumerate([(96, 128), (200, 120), (64, 64), (90, 300)]):
        coarse = generator.integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
        image = coarse.repeat(10, 0).repeat(10, 1)
        miniatures.save(folder / f"images/{k}.png", image)
        miniatures.write_xml(folder / f"images/{k}.xml", "banana", (5, 5, 40, 40))
    torch.manual_seed(5)
    location: Location = "direct" if interpolation == "area" else "offset"
    model = DetectorModule(
        tree=NAMES, anchors_wh_cell=[(1, 1), (2, 1.5)], backbone=BACKBONE, head_channels=0,
        passthrough_channels=0, image_size=96, interpolation=interpolation,
        location=location,
    )  # fmt: skip
    with torch.no_grad():
        model.network.box_conv.weight.mul_(40)
        model.network.class_weight.mul_(60)
    torch.save(build_checkpoint(model.eval(), {}), folder / "model.ckpt")
    return folder


@pytest.fixture(scope="module")
def from_python(folder):
    detect: Any = load(folder / "model.ckpt")
    detections = [detect(folder / f"images/{k}.png", SCORE) for k in range(4)]
    assert all(detections)
    assert len({one.name for image in detections for one in image}) == 3
    return detections


def test_detect_equals_python(folder, from_python):
    images = [str(folder / f"images/{k}.png") for k in range(4)]
    options = ("--score-threshold", str(SCORE), "--format", "csv", "--output", str(folder / "out"))
    assert main(["detect", str(folder / "model.ckpt"), *images, *options]) == 0
    with (folder / "out/detections.csv").open() as file:
        rows = list(csv.DictReader(file))
    for k, image in enumerate(images):
        image_rows = [row for row in rows if row["file"] == image]
        assert [row["name"] for row in image_rows] == [one.name for one in from_python[k]]
        for row, one in zip(image_rows, from_python[k], strict=True):
            assert float(row["score"]) == pytest.approx(one.score, abs=1e-5)
            corners = [float(row[name]) for name in ("x1", "y1", "x2", "y2")]
            assert corners == pytest.approx(one.box_xyxy_orig_px, abs=1e-2)


def test_validation_evaluates_the_same_detections(folder, from_python, interpolation):
    """Validation evaluates all classes of a box; Python's detections are among them."""
    model: Any = load(folder / "model.ckpt")
    validation = VOCFolder(str(folder / "images"))
    data = CombinedDataModule(
        NAMES, VOCFolder(str(folder / "images")), validation=validation, image_size=96,
        detection_batch_size=2, num_workers=0, interpolation=interpolation,
    )  # fmt: skip
    nodes = torch.arange(3)
    model._reset_evaluation = lambda stage: model.evaluation.reset(nodes, model.boxed_ancestors())
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.validate(model, data, verbose=False)
    table = model.evaluation.detections
    for k, image in enumerate(from_python):
        index = next(i for i in range(4) if validation.image_name(i).endswith(f"{k}.png"))
        rows = table[table[:, 0] == index]
        for one in image:
            same_class = rows[rows[:, 1] == one.node]
            differences = np.abs(same_class[:, 4:] - one.box_xyxy_orig_px).max(axis=1)
            assert differences.min() < 1e-2
            assert same_class[differences.argmin(), 2] == pytest.approx(one.score, abs=1e-5)


# test_export.py has that of "area": test_files_equal_the_python_api_for_an_image
@pytest.mark.parametrize("interpolation", ["darknet"], indirect=True)
def test_exported_graph_equals_python(folder, from_python, interpolation):
    onnxruntime = pytest.importorskip("onnxruntime")
    file = folder / "model.onnx"
    options = ("--score-threshold", str(SCORE), "--output", str(file))
    assert main(["export", str(folder / "model.ckpt"), *options]) == 0
    session = onnxruntime.InferenceSession(str(file))
    metadata = session.get_modelmeta().custom_metadata_map
    names = json.loads(metadata["names"])
    assert json.loads(metadata["interpolation"]) == interpolation
    module: Any = load(folder / "model.ckpt")
    for k, image in enumerate(from_python):
        fitted, size = module.preprocess(folder / f"images/{k}.png")
        feed = {"images": fitted[None].numpy(), "sizes_hw_orig": np.array([size])}
        boxes, scores, nodes = (part[0] for part in session.run(None, feed))
        valid = nodes >= 0
        assert [names[node] for node in nodes[valid]] == [one.name for one in image]
        assert scores[valid] == pytest.approx([one.score for one in image], abs=1e-4)
        assert boxes[valid] == pytest.approx(
            np.array([one.box_xyxy_orig_px for one in image]), abs=1e-2
        )


def test_detect_overrides_the_interpolation(folder, interpolation, from_python):
    other = {"area": "darknet", "darknet": "area"}[interpolation]
    module: Any = load(folder / "model.ckpt")
    module.hparams["interpolation"] = other
    expected = module(folder / "images/0.png", SCORE)
    assert [one.score for one in expected] != [one.score for one in from_python[0]]
    out = folder / "other"
    options = ("--score-threshold", str(SCORE), "--format", "csv", "--output", str(out))
    command = ["detect", str(folder / "model.ckpt"), str(folder / "images/0.png"), *options]
    assert main([*command, "--interpolation", other]) == 0
    with (out / "detections.csv").open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx([one.score for one in expected], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", ["0", "0.45", "1"])
def test_thresholds_equal_to_other_constants_can_be_exported(folder, threshold):
    """0 and 1 also occur in shapes, 0.45 in suppression; only the score threshold may change."""
    file = folder / f"threshold-{threshold}.onnx"
    args = ("--score-threshold", threshold, "--output", str(file))
    assert main(["export", str(folder / "model.ckpt"), *args]) == 0
    assert file.is_file()
