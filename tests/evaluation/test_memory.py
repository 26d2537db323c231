"""The memory of evaluation and prediction does not grow with batch x nodes."""

import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.paths import REPO
from yolo_lightning.evaluation import coco

MAX_MB = 300


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["2 validate", "6 detect", "1 validate 0", "1 detect 0"])
def test_an_untrained_detector_of_100_000_classes_needs_300_mb(arguments):
    command = [sys.executable, "-m", "tests.helpers.evaluation_memory", "100000"]
    run = subprocess.run(
        [*command, *arguments.split()], cwd=REPO, capture_output=True, text=True, check=True
    )
    first, last = run.stdout.splitlines()
    assert int(first.split()[-1]) > 0 or arguments == "1 detect 0"  # something was detected
    assert int(last.removeprefix("MB ")) < MAX_MB


def test_many_classes_are_evaluated_in_parts(monkeypatch):
    targets = np.zeros((6, 8))
    targets[:, 0], targets[:, 1] = [0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 2, 5]
    targets[:, 4:] = [0, 0, 50, 50]
    detections = np.delete(targets, 3, axis=0)
    detections[:, 2] = [0.9, 0.8, 0.7, 0.6, 0.5]
    expected = coco.evaluate_coco(targets, detections)
    assert {label: row["AP50"] for label, row in expected.per_class.items()} == pytest.approx(
        {0: 1, 1: 1, 2: 51 / 101, 5: 1}
    )
    assert list(coco._class_parts([0, 1, 2, 5], targets, detections)) == [[0, 1, 2, 5]]
    # two classes of two and of four rows: 2 x (2 + 4 + 3)
    for name, value in (("_PAIRS_PER_CLASS", 3), ("_MAX_PAIRS", 18)):
        monkeypatch.setattr(coco, name, value)
    assert list(coco._class_parts([0, 1, 2, 5], targets, detections)) == [[0, 1], [2, 5]]
    found = coco.evaluate_coco(targets, detections)
    assert found.metrics == pytest.approx(expected.metrics, abs=1e-12)
    assert found.per_class == expected.per_class
