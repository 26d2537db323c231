"""What each class learns from, told before training; how fast data is read."""

import re
from collections import Counter

import pytest

from tests.helpers.images import write_image
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules.vocabulary import vocabulary_report
from yolo_lightning.tree.wordtree import WordTree

TREE = WordTree(
    [
        ("animal", "-", "animal"), ("tool", "-", "tool"), ("cat", "animal", "cat | kitty"),
        ("dog", "animal", "dog"), ("bengal", "cat", "Bengal"), ("manx", "cat", "Manx"),
        ("saw", "tool", "saw"),
    ]
)  # fmt: skip
NODE = {key: k for k, key in enumerate(TREE.keys)}


def counts(**names: dict[str, int]) -> dict[int, Counter[str]]:
    return {NODE[key]: Counter(found) for key, found in names.items()}


def test_the_report_tells_who_learns_from_what():
    boxes = counts(cat={"cat": 5}, dog={"dog": 2})
    images = counts(
        cat={"kitty": 3}, bengal={"Bengal": 4}, manx={"Manx": 1}, animal={"animal": 7},
        saw={"saw": 2},
    )  # fmt: skip
    assert vocabulary_report(TREE, boxes, images).splitlines() == [
        "Classes: 7; they learn 1 from boxes, 4 from image labels, 1 from both, 1 from below, "
        "0 from nothing",
        "  from both: cat",
        "  names that met: cat = kitty (cat)",
        "  boxes are coarser: cat over Bengal, Manx",
        "  image labels are coarser: animal over dog",
        "  no box on the way up: saw",
    ]


def test_thousands_of_classes_stay_a_few_lines():
    tree = WordTree.flat([f"c{k:04}" for k in range(3000)])
    all_of_them = {k: Counter({f"c{k:04}": 1}) for k in range(3000)}
    report = vocabulary_report(tree, all_of_them, all_of_them)
    assert "0 from boxes, 0 from image labels, 3000 from both, 0 from below" in report
    assert report.splitlines()[1].endswith("c0006, c0007, … and 2992 more")
    assert len(report) < 400


@pytest.fixture
def boxes(tmp_path, write_voc):
    for k in range(16):
        write_voc(tmp_path, f"i{k}", [("cat", 1, 1, 30, 20)])
    write_image(tmp_path / "i3.jpg", 90, 40)
    return tmp_path


def test_reading_is_measured_beside_a_bare_loop(boxes, capsys):
    argv = ["benchmark", str(boxes), "--image-size", "64", "--resized", "80x60"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("16 images to 64 px, images a second of one core\n")
    rates = [float(v) for v in re.findall(r"^  (?:decode|bare loop|ours) +(\d+)$", out, re.M)]
    assert len(rates) == 3
    assert rates[0] > rates[1] > 0
    times = re.findall(r"ours takes (\d\.\d\d) times", out)
    assert float(times[0]) == pytest.approx(rates[1] / rates[2], rel=0.05)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--image-size", "100"], "--image-size is 100; allowed: multiples of 32"),
        (["--resized", "640"], "--resized '640'; expected such as 640x480"),
        (["--resized", "0x9"], "--resized '0x9'; expected such as 640x480"),
    ],
)
def test_sizes_that_cannot_be_are_refused(boxes, capsys, argv, said):
    assert main(["benchmark", str(boxes), *argv]) == 2
    assert said in capsys.readouterr().err
