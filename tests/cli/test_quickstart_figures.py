"""The full quickstart: image labels improve classes without boxes."""

import json

import pytest

from yolo_lightning.cli.main import main


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_image_labels_train_classes_without_boxes(workplace):
    assert main(["quickstart"]) == 0
    summary = json.loads((workplace / "outputs/quickstart/summary.json").read_text())
    joint, alone = summary["joint"], summary["detection_only"]
    assert joint["boxed_ap50"] >= 0.80
    assert joint["unboxed_ap50"] >= 0.50
    assert alone["unboxed_ap50"] < 0.2
    assert alone["detection_steps"] == joint["detection_steps"]
