"""The quickstart's claim at full length."""

import json

import pytest

from yolo_lightning.cli.main import main


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_image_labels_teach_classes_that_never_had_a_box(workplace):
    assert main(["quickstart"]) == 0
    summary = json.loads((workplace / "outputs/quickstart/summary.json").read_text())
    joint, alone = summary["joint"], summary["detection_only"]
    assert joint["boxed_ap50"] >= 0.80
    assert joint["unboxed_ap50"] >= 0.50
    assert alone["unboxed_ap50"] < 0.2
    assert alone["detection_steps"] == joint["detection_steps"]
