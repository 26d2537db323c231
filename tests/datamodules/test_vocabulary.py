"""The report of what each class learns from, and the benchmark of reading."""

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


def test_report_counts_classes_by_what_they_learn_from():
    boxes = counts(cat={"cat": 5}, dog={"dog": 2})
    images = counts(
        cat={"kitty": 3}, bengal={"Bengal": 4}, manx={"Manx": 1}, animal={"animal": 7},
        saw={"saw": 2},
    )  # fmt: skip
    assert vocabulary_report(TREE, boxes, images).splitlines() == [
        # the saw, an only child, is named tool
        "Classes: 6; they learn 1 from boxes, 4 from image labels, 1 from both",
        "  from both: cat",
        "  merged names: cat = kitty (cat)",
        "  boxes are coarser: cat over Bengal, Manx",
        "  image labels are coarser: animal over dog",
        "  no class with boxes above, learn by themselves where they are: saw",
    ]
    # a box of a dog does not say where another animal is
    report = vocabulary_report(TREE, counts(dog={"dog": 2}), counts(manx={"Manx": 1}))
    assert report.splitlines()[-1].endswith("learn by themselves where they are: Manx")


def test_report_names_classes_that_cannot_be_told_apart():
    boxes, images = counts(tool={"tool": 5}), counts(saw={"saw": 2})
    assert vocabulary_report(TREE, boxes, images).splitlines() == [
        "Classes: 6; they learn 1 from both, 5 from nothing",
        "  from both: tool",
        "  boxes are coarser: tool over saw",
        "  cannot be learnt, since no other class below the same one has labels; add some: "
        "saw below tool",
    ]
    # nothing says what an animal is that is no dog
    report = vocabulary_report(TREE, counts(animal={"animal": 5}), counts(dog={"dog": 2}))
    assert report.splitlines()[-1].endswith("add some: dog below animal")
    more = counts(dog={"dog": 2}, manx={"Manx": 1})
    assert "cannot" not in vocabulary_report(TREE, counts(animal={"animal": 5}), more)
    # without labels of tool, it is just another name of saw
    assert "cannot be learnt" not in vocabulary_report(TREE, boxes={}, images=images)


def test_report_names_boxes_that_exclude_other_names():
    boxes = counts(cat={"cat": 5}, bengal={"Bengal": 1}, animal={"animal": 1}, dog={"dog": 1})
    nodes = [NODE[key] for key in ("animal", "cat", "dog", "bengal")]
    report = vocabulary_report(TREE, boxes, {}, [nodes])
    assert report.splitlines()[1:] == [
        "  boxes exclude other names below theirs: cat without Bengal is Manx",
        "  cannot be learnt, since nothing else is below the class; add a row such as animal/other "
        "to the tree: animal without cat and dog and Bengal",
    ]
    assert "exclude" not in vocabulary_report(TREE, boxes, {}, [[], nodes[1:3]])


def test_report_of_thousands_of_classes_is_short():
    tree = WordTree.from_names([f"c{k:04}" for k in range(3000)])
    all_of_them = {k: Counter({f"c{k:04}": 1}) for k in range(3000)}
    report = vocabulary_report(tree, all_of_them, all_of_them)
    assert "Classes: 3000; they learn 3000 from both\n" in report
    assert report.splitlines()[1].endswith("c0006, c0007, … and 2992 more")
    assert len(report) < 400


@pytest.fixture
def boxes(tmp_path, write_voc):
    for k in range(16):
        write_voc(tmp_path, f"i{k}", [("cat", 1, 1, 30, 20)])
    write_image(tmp_path / "i3.jpg", 90, 40)
    return tmp_path


def test_benchmark_compares_with_a_bare_loop(boxes, capsys):
    argv = ["benchmark", str(boxes), "--image-size", "64", "--resized", "80x60"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("16 images to 64 px, images per second on one core\n")
    rates = [float(v) for v in re.findall(r"^  (?:decode|plain loop|dataset) +(\d+)$", out, re.M)]
    assert len(rates) == 3
    assert rates[0] > rates[1] > 0
    times = re.findall(r"dataset takes (\d\.\d\d) times", out)
    assert float(times[0]) == pytest.approx(rates[1] / rates[2], rel=0.05)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image-size", "100"], "--image-size is 100; allowed: multiples of 32"),
        (["--resized", "640"], "--resized '640'; expected a size such as 640x480"),
        (["--resized", "0x9"], "--resized '0x9'; expected a size such as 640x480"),
    ],
)
def test_benchmark_sizes_are_checked(boxes, capsys, argv, message):
    assert main(["benchmark", str(boxes), *argv]) == 2
    assert message in capsys.readouterr().err


def test_benchmark_names_an_image_that_cannot_be_read(boxes, capsys):
    (boxes / "i5.jpg").write_bytes(b"no image")
    assert main(["benchmark", str(boxes)]) == 2
    error = capsys.readouterr().err
    assert "i5.jpg: not a readable image (allowed: JPEG" in error
    assert "; list all such" in error
