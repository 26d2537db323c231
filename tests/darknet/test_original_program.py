"""Imported networks against the original program, from Debian's package `darknet`."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import original_program
from tests.helpers.darknet import conv_layers, operations
from tests.helpers.golden_weights import write_random_weights
from tests.helpers.original_program import FILES, LIBRARY
from yolo_lightning.cli.main import main
from yolo_lightning.darknet.released import LAYOUTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not LIBRARY.is_file(), reason="the original program is missing: apt-get install darknet"
    ),
]

MAX_POINTS, MAX_PX = 1.0, 2.0
DOG = FILES / "data/dog.jpg"


CORNERS = ("x1", "y1", "x2", "y2")


def detections(folder: Path, *options: str) -> list[tuple[str, float, list[float]]]:
    """Return name, score in percent and corners of what `detect` finds on the dog."""
    assert main(["detect", *options, str(DOG), "--format", "csv", "--output", str(folder)]) == 0
    with (folder / "detections.csv").open(encoding="utf-8", newline="") as file:
        return [
            (
                row["name"],
                100 * float(row["score"]),
                [float(row[k]) for k in CORNERS],
            )
            for row in csv.DictReader(file)
        ]


@pytest.fixture(scope="module")
def random_detector(tmp_path_factory) -> Path:
    """Write golden random weights; a larger last layer makes some of its 845 boxes sure."""
    weights = Path(tmp_path_factory.mktemp("random")) / "random.weights"
    layers = conv_layers(LAYOUTS["yolov2-tiny-voc"]())
    write_random_weights(weights, layers)
    values = np.fromfile(weights, "<f4")
    values[-layers[-1][0] * layers[-1][1] :] *= 4
    values.tofile(weights)
    return weights


def test_a_detector_finds_the_boxes_of_the_original_program(random_detector, workplace):
    cfg, names = FILES / "cfg/yolov2-tiny-voc.cfg", FILES / "data/voc.names"
    found = original_program.detect(cfg, random_detector, DOG, classes=20, threshold=0.005)
    theirs: list[Any] = []
    for row in found:
        scores = 100 * np.array(row["scores"])
        box = np.array(row["box_xyxy_px"]).clip(0, (768, 576, 768, 576))
        theirs.append((names.read_text().split("\n")[scores.argmax()], scores.max(), box))
    files = ["--cfg", str(cfg), "--weights", str(random_detector), "--names", str(names)]
    everything = ["--iou-threshold", "1", "--score-threshold"]  # no box suppresses another one
    above = detections(Path("all"), *files, *everything, "0.25")
    assert len(above) > 100
    assert len({name for name, _, _ in above}) > 8

    def distance(one: Any, other: Any) -> float:
        """Return the difference in units of what is allowed."""
        if one[0] != other[0]:
            return np.inf
        px = float(np.abs(np.asarray(one[2]) - other[2]).max())
        return max(float(abs(one[1] - other[1])) / MAX_POINTS, px / MAX_PX)

    assert max(min(distance(one, other) for other in theirs) for one in above) <= 1
    surest = [one for one in theirs if one[1] > 25 + MAX_POINTS]
    assert len(surest) > 100
    assert max(min(distance(one, other) for other in above) for one in surest) <= 1
    # without the original program's interpolation it does not agree
    area = detections(Path("area"), *files, *everything, "0.25", "--interpolation", "area")
    assert max(min(distance(one, other) for other in theirs) for one in area) > 5


def test_tiny_darknet_names_the_dog_as_the_original_program(real_data, workplace, capsys):
    tiny, names = real_data / "tiny_darknet", FILES / "data/imagenet.shortnames.list"
    weights = Path("tiny.weights")
    weights.write_bytes((tiny / "tiny.weights").read_bytes())
    theirs = original_program.classify(FILES / "cfg/tiny.cfg", weights, names, DOG)
    files = ["--cfg", str(FILES / "cfg/tiny.cfg"), "--weights", str(weights), "--names", str(names)]
    assert main(["darknet", "import", *files, "--output", "tiny.ckpt"]) == 0
    assert main(["classify", "tiny.ckpt", str(DOG), "--json", "--resize", "letterbox"]) == 0
    out = capsys.readouterr().out
    (result,) = json.loads(out[out.index("[\n") :])
    ours = [(row["name"], 100 * row["probability"]) for row in result["classes"]]
    assert len(theirs) == 5
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], abs=MAX_POINTS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_operations_are_those_that_the_original_program_prints(name):
    size, printed = original_program.billion_operations(FILES / f"cfg/{name}.cfg")
    # printed with three decimals for each layer
    assert operations(name, size) == pytest.approx(printed, rel=2e-3)
