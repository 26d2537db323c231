"""Dimension clusters by hand, their properties, and the command `anchors`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageColor

from tests.helpers.paths import REPO
from yolo_lightning.boxes import shape_iou
from yolo_lightning.cli.commands.anchors import is_recipe, main, write_anchors
from yolo_lightning.errors import InputError
from yolo_lightning.models import anchors
from yolo_lightning.models.anchors import (
    as_yaml_values,
    average_iou,
    cluster_anchors,
    cluster_for_each_count,
    faster_rcnn_anchors,
    scale_to_letterbox,
    scale_to_shorter_side,
)
from yolo_lightning.visualization.figures import COLOURS

RECIPES = sorted(p for p in (REPO / "recipes").glob("*.yaml") if "anchors_wh_cell" in p.read_text())
ANCHORS = [[0.5, 1.25], [3.0, 2.0], [7.5, 8.0]]


def many_boxes(count: int, seed: int = 0) -> np.ndarray:
    """Return shapes (count, 2) from 1 to 416 px, most of them small, as photographs have them."""
    generator = np.random.default_rng(seed)
    side = np.exp(generator.normal(np.log(60), 1, count))
    ratio = np.exp(generator.normal(0, 0.5, count))
    return np.stack([side * ratio, side / ratio], axis=1).clip(1, 416).astype(np.float32)


def test_average_iou_by_hand():
    boxes = np.array([[2, 2], [4, 1]])
    # 4 x 1 and 2 x 2 share 2 of 6
    assert average_iou(boxes, np.array([[2, 2]])) == pytest.approx((1 + 1 / 3) / 2)
    # 4 x 1 and 4 x 2 share 4 of 8; 2 x 2 keeps its own
    assert average_iou(boxes, np.array([[2, 2], [4, 2]])) == pytest.approx((1 + 1 / 2) / 2)


def test_average_iou_over_several_chunks_equals_the_iou_of_the_loss():
    boxes, anchors = many_boxes(40_000), many_boxes(7, seed=1)
    expected = shape_iou(torch.from_numpy(boxes), torch.from_numpy(anchors)).amax(dim=1).mean()
    assert average_iou(boxes, anchors) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("copies", [1, 8000])
@pytest.mark.parametrize("distance", ["iou", "squared_error"])
def test_separate_clusters_are_recovered_exactly(copies, distance):
    centres = np.array([[10.0, 20.0], [60.0, 30.0], [200.0, 210.0]])
    around = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    boxes = np.tile((centres[:, None] + around).reshape(-1, 2), (copies, 1))
    np.testing.assert_array_equal(cluster_anchors(boxes, 3, distance=distance), centres)


@pytest.mark.parametrize("count", [500, 30_000])
def test_clusters_depend_on_the_seed_and_not_on_the_order_of_boxes(count):
    boxes = many_boxes(count)
    found = cluster_anchors(boxes, 5, restarts=2, seed=3)
    np.testing.assert_array_equal(found, cluster_anchors(boxes.copy(), 5, restarts=2, seed=3))
    shuffled = np.random.default_rng(1).permutation(boxes)
    np.testing.assert_array_equal(found, cluster_anchors(shuffled, 5, restarts=2, seed=3))
    others = [cluster_anchors(boxes, 5, restarts=1, seed=seed) for seed in range(4)]
    assert any(not np.array_equal(others[0], other) for other in others[1:])


@pytest.mark.parametrize("num", [5, 9])
def test_iou_clusters_match_better_than_squared_errors(num):
    boxes = many_boxes(4000)
    by_iou = average_iou(boxes, cluster_anchors(boxes, num))
    by_error = average_iou(boxes, cluster_anchors(boxes, num, distance="squared_error"))
    assert by_iou > by_error + 0.02


def test_squared_error_clusters_have_the_smaller_squared_error():
    boxes = many_boxes(4000)

    def error(anchors: np.ndarray) -> float:
        return float(((boxes[:, None] - anchors[None]) ** 2).sum(axis=2).min(axis=1).mean())

    assert error(cluster_anchors(boxes, 5, distance="squared_error")) < 0.9 * error(
        cluster_anchors(boxes, 5)
    )


def test_initial_boxes_are_drawn_in_proportion_to_the_distance():
    boxes = np.array([[1, 1], [2, 1], [4, 1]], dtype=np.float32)
    generator = np.random.default_rng(0)
    starts = [anchors._initialise(boxes, 3, "squared_error", generator)[:, 0] for _ in range(3000)]
    assert all(sorted(start) == [1, 2, 4] for start in starts), "a box was drawn twice"
    second = [start[1] for start in starts if start[0] == 1]
    assert len(second) == pytest.approx(1000, abs=100)
    # from 1 it is a squared distance of 1 to 2, and of 9 to 4
    assert second.count(4) / len(second) == pytest.approx(0.9, abs=0.04)


def test_more_restarts_never_decrease_the_average_iou():
    boxes = many_boxes(2000)
    found = [average_iou(boxes, cluster_anchors(boxes, 9, restarts=k)) for k in (1, 3, 10)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_the_best_iteration_is_returned_instead_of_the_last(monkeypatch):
    boxes = many_boxes(300)
    states = []
    nearest = anchors._nearest

    def watched(boxes_wh, anchors_wh, distance):
        cost, index = nearest(boxes_wh, anchors_wh, distance)
        if len(anchors_wh) == 5:  # while starts are drawn there is one
            states.append(1 - float(cost.mean(dtype=np.float64)))
        return cost, index

    monkeypatch.setattr(anchors, "_nearest", watched)
    found = cluster_anchors(boxes, 5, restarts=6)
    monkeypatch.undo()
    assert average_iou(boxes, found) == pytest.approx(max(states), abs=1e-12)
    assert states[-1] < max(states)


def test_anchors_are_sorted_by_area():
    areas = cluster_anchors(many_boxes(2000), 9).prod(axis=1)
    assert (np.diff(areas) > 0).all()


def test_shapes_missing_from_the_sample_still_get_an_anchor():
    rare = np.array([[3.0, 90.0], [90.0, 3.0], [300.0, 300.0]])
    boxes = np.vstack([np.full((60_000, 2), 20.0), rare])
    expected = [[3.0, 90.0], [90.0, 3.0], [20.0, 20.0], [300.0, 300.0]]
    for seed in range(3):  # a sample of a third rarely holds all three
        np.testing.assert_array_equal(cluster_anchors(boxes, 4, seed=seed), expected)


def test_fewer_distinct_boxes_than_anchors_are_refused():
    boxes = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    assert cluster_anchors(boxes, 2).tolist() == [[1.0, 2.0], [2.0, 1.0]]
    with pytest.raises(InputError, match="3 anchors require 3 distinct boxes; found: 2"):
        cluster_anchors(boxes, 3)


@pytest.mark.parametrize(
    ("boxes", "options", "message"),
    [
        (np.zeros((0, 2)), {}, r"boxes have shape \(0, 2\)"),
        (np.ones((3, 4)), {}, r"boxes have shape \(3, 4\)"),
        (np.array([[1.0, 0.0]]), {}, "not positive"),
        (np.array([[1.0, np.nan]]), {}, "not positive"),
        (np.ones((3, 2)), {"num": 0}, "num is 0; allowed: 1 or more"),
        (np.ones((3, 2)), {"restarts": 0}, "restarts is 0"),
        (np.ones((3, 2)), {"seed": -1}, "seed is -1"),
        (np.ones((3, 2)), {"distance": "l1"}, "allowed: iou, squared_error"),
    ],
)
def test_bad_input_is_refused(boxes, options, message):
    with pytest.raises(InputError, match=message):
        cluster_anchors(boxes, **{"num": 1, **options})


def test_average_iou_never_decreases_with_more_anchors():
    boxes = many_boxes(1000)
    curve = cluster_for_each_count(boxes, 15, restarts=1)
    assert [len(anchors) for anchors in curve] == list(range(1, 16))
    assert (np.diff([average_iou(boxes, anchors) for anchors in curve]) >= 0).all()
    np.testing.assert_array_equal(curve[4], cluster_anchors(boxes, 5, restarts=1))


def test_a_worse_clustering_is_replaced_by_the_previous_anchors(monkeypatch):
    boxes = many_boxes(200)
    one = cluster_anchors(boxes, 1)
    monkeypatch.setattr(anchors, "cluster_anchors", lambda b, num, *_: one / num**2)
    curve = cluster_for_each_count(boxes, 4)
    ious = [average_iou(boxes, anchors) for anchors in curve]
    assert [len(anchors) for anchors in curve] == [1, 2, 3, 4]
    assert (np.diff(ious) > 0).all()
    assert all((np.diff(anchors.prod(axis=1)) > 0).all() for anchors in curve)


def test_the_number_of_anchors_is_limited_by_the_distinct_boxes():
    boxes = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])
    ious = [average_iou(boxes, anchors) for anchors in cluster_for_each_count(boxes)]
    # 1 x 2 and 2 x 1 share 1 of 3; the mean of the three shapes would match worse than 1 x 2
    assert ious == [pytest.approx((2 + 1 / 3) / 3), 1.0]


def test_faster_rcnn_anchors_are_three_scales_by_three_ratios():
    anchors = faster_rcnn_anchors()
    np.testing.assert_allclose(anchors.prod(axis=1), np.repeat([128**2, 256**2, 512**2], 3))
    np.testing.assert_allclose(anchors[:, 1] / anchors[:, 0], np.tile([0.5, 1, 2], 3))


def test_boxes_are_scaled_with_their_images():
    boxes, images = np.array([[100, 50], [30, 90]]), np.array([[500, 250], [300, 600]])
    np.testing.assert_allclose(scale_to_letterbox(boxes, images, 416), [[83.2, 41.6], [20.8, 62.4]])
    np.testing.assert_allclose(scale_to_shorter_side(boxes, images), [[240, 120], [60, 180]])


def test_yaml_values_keep_four_significant_digits():
    assert as_yaml_values(np.array([[0.572731, 11.2364], [12, 0.0123449]])) == [
        [0.5727, 11.24],
        [12.0, 0.01234],
    ]


FLOW = "[[0.5, 1.25], [3.0, 2.0], [7.5, 8.0]]"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("anchors_wh_cell: [[1, 2]]  # mine", f"anchors_wh_cell: {FLOW}  # mine"),
        ("anchors_wh_cell: [[1, 2],\n      [3, 4]]", f"anchors_wh_cell: {FLOW}"),
        ("'anchors_wh_cell' :   []", f"'anchors_wh_cell' :   {FLOW}"),
        (
            "anchors_wh_cell:  # mine\n      - [1, 2]\n      - [3, 4]   # last\n    # below",
            "anchors_wh_cell:  # mine\n      - [0.5, 1.25]\n      - [3.0, 2.0]\n"
            "      - [7.5, 8.0]   # last\n    # below",
        ),
        (
            "anchors_wh_cell:\n    - - 1\n      - 2\n",
            "anchors_wh_cell:\n    - [0.5, 1.25]\n    - [3.0, 2.0]\n    - [7.5, 8.0]\n",
        ),
    ],
)
@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_writing_replaces_the_value_and_no_other_byte(tmp_path, before, after, line_break):
    around = "# größer\nmodel:\n  init_args:\n    a: 1   # x\n    {}\n    b: [ 1,2 ]\n\n\n# end"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(around.format(before).replace("\n", line_break).encode())
    recipe.chmod(0o640)
    write_anchors(recipe, ANCHORS)
    assert recipe.read_bytes() == around.format(after).replace("\n", line_break).encode()
    assert yaml.safe_load(recipe.read_bytes())["model"]["init_args"]["anchors_wh_cell"] == ANCHORS
    assert recipe.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["recipe.yaml"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_written_to(tmp_path, recipe):
    copy, link = tmp_path / recipe.name, tmp_path / "link.yaml"
    copy.write_bytes(recipe.read_bytes())
    link.symlink_to(copy)
    write_anchors(link, ANCHORS)
    assert link.is_symlink()
    before, after = yaml.safe_load(recipe.read_text()), yaml.safe_load(copy.read_text())
    assert after["model"]["init_args"].pop("anchors_wh_cell") == ANCHORS
    del before["model"]["init_args"]["anchors_wh_cell"]
    assert after == before
    comments = [
        [line for line in p.read_text().splitlines() if "#" in line] for p in (recipe, copy)
    ]
    assert comments[0] == comments[1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("anchors_wh_cell: ${a.b}", r"is '\$\{a.b\}'; --write replaces a list"),
        ("anchors_wh_cell:", "is ''; --write replaces a list"),
        ("anchors_wh_cell: {a: 1}", "--write replaces a list"),
        ("b: 1", "no such key to write to"),
        ("a: &p [[1, 2]]\n    anchors_wh_cell: *p", "more than numbers"),
        ("a: [&p [1, 2]]\n    anchors_wh_cell: [*p, [3, 4]]", "more than numbers"),
        ("anchors_wh_cell: &p [[1, 2]]\n    a: *p", "more than numbers"),
        ("anchors_wh_cell:\n      - [1, 2]  # mine\n      - [3, 4]", "more than numbers"),
        ("anchors_wh_cell: [['${a}', 2]]", "more than numbers"),
        ("anchors_wh_cell: [[1, 2]", "not YAML"),
    ],
)
def test_a_recipe_that_cannot_be_edited_is_left_unchanged(tmp_path, value, message):
    recipe = tmp_path / "recipe.yaml"
    text = f"model:\n  init_args:\n    {value}\n    c: 1\n"
    recipe.write_text(text)
    with pytest.raises(InputError, match=message):
        write_anchors(recipe, ANCHORS)
    assert recipe.read_text() == text


RECIPE = """\
# Five shapes.
model:
  class_path: yolo_lightning.DetectorModule
  init_args:
    tree: [thing]
    backbone: small
    anchors_wh_cell: [[1.28, 1.28], [5.12, 5.12]]  # too few
    head_channels: 16
    passthrough_channels: 8
    reorg: space_to_depth
data:
  class_path: yolo_lightning.CombinedDataModule
  init_args:
    tree: [thing]
    detection:
      class_path: yolo_lightning.datamodules.VOCFolder
      init_args: {root: voc}
    image_size: 96  # 75 px images grow by 1.28
"""
SHAPES = [(8, 8), (16, 8), (16, 16), (32, 32), (64, 64)]
VALUES = [[0.64, 0.64], [1.28, 0.64], [1.28, 1.28], [2.56, 2.56], [5.12, 5.12]]
"""In cells of 16 px: that is the stride of the backbone `small`."""


@pytest.fixture
def place(workplace: Path, write_voc) -> Path:
    """A recipe and its dataset: five shapes in images of 75 px; VOC counts px from 1."""
    for number, (w, h) in enumerate(SHAPES):
        write_voc(workplace / "voc", str(number), [("thing", 4, 5, 3 + w, 4 + h)], (75, 75))
    write_voc(workplace / "voc", "hard", [("thing", 0, 0, 70, 20)], (75, 75), difficult=1)
    (workplace / "recipe.yaml").write_text(RECIPE)
    return workplace


def test_the_command_prints_anchors_and_writes_both_plots(place, capsys):
    main(["recipe.yaml", "--restarts", "2", "--output", "drawn"])
    printed = capsys.readouterr().out
    cells = [line.rsplit(maxsplit=2) for line in printed.splitlines() if line.startswith("  ")]
    rows = {name.strip(): figures for name, *figures in cells}
    # at 600 px the squares of 16, 32, 64 are hand-picked ones; 16 x 8 fills half, 8 x 8 a quarter
    assert rows["hand-picked anchors, 9"] == ["75.0", "60.9"]
    assert rows["sum-squared clusters, 5"] == ["100.0", "58.7"]
    assert rows["IoU clusters, 5"] == ["100.0", "61.0"]
    assert rows["IoU clusters, 9"] == ["-", "67.2"]
    # against 16 x 16 and 64 x 64: 1/4 + 1/2 + 1 + 1/4 + 1
    assert rows["in the recipe, 2"] == ["60.0", "-"]
    assert "recipe.yaml: 5 boxes, network input of 96 px, cells of 16 px" in printed
    assert f"anchors_wh_cell: {VALUES}" in printed
    for name in ("elbow", "anchors"):
        assert (place / "drawn" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (place / "recipe.yaml").read_text() == RECIPE


def test_the_command_writes_the_anchors_into_the_recipe(place, capsys):
    main(["recipe.yaml", "--write", "--num", "5", "--restarts", "2"])
    assert "written into recipe.yaml" in capsys.readouterr().out
    assert (place / "recipe.yaml").read_text() == RECIPE.replace(
        "[[1.28, 1.28], [5.12, 5.12]]", str(VALUES)
    )
    assert (place / "outputs/anchors/elbow.png").is_file()


def test_the_command_accepts_several_datasets(place, capsys):
    main(["voc", "recipe.yaml", "voc", "--image-size", "192", "--num", "2", "--restarts", "2"])
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("anchors_wh_cell")]
    assert len(lines) == 2, "a place named twice counts once"
    dataset, recipe = (np.array(yaml.safe_load(line)["anchors_wh_cell"]) for line in lines)
    np.testing.assert_allclose(recipe, 2 * dataset, rtol=1e-3)  # cells of 16 px against 32
    assert printed.count("network input of 192 px") == 2
    for name in ("elbow", "anchors"):
        with Image.open(place / f"outputs/anchors/{name}.png") as image:
            drawn = {colour for _, colour in image.convert("RGB").getcolors(10**6) or []}
            assert image.width > 1.4 * image.height
        curves = {ImageColor.getrgb(colour) for colour in COLOURS[:3]}
        assert len(drawn & curves) == (2 if name == "elbow" else 0)
    main(["voc", "--num", "5", "--restarts", "2"])
    # 416 / 75 / 32
    assert "[[1.387, 1.387], [2.773, 1.387]" in capsys.readouterr().out


def test_the_command_passes_options_to_the_recipe(place, capsys):
    (place / "voc").rename(place / "elsewhere")
    overrides = ["--data.detection.root", "elsewhere", "--model.backbone", "darknet19"]
    main(["recipe.yaml", "--num", "1", "--restarts", "1", *overrides])
    expected = "recipe.yaml: 5 boxes, network input of 96 px, cells of 32 px"
    assert expected in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--data.x: 'elsewhere' is no recipe"):
        main(["elsewhere", "--data.x", "1"])


def test_stretched_images_stretch_their_boxes(place, write_voc, capsys):
    write_voc(place / "wide", "w", [("thing", 1, 1, 25, 25)], (100, 50))
    options = ["--data.detection.root", "wide", "--num", "1", "--restarts", "1"]
    values = []
    for resize in ("letterbox", "stretch"):
        main(["recipe.yaml", *options, "--data.resize", resize])
        line = re.findall(r"anchors_wh_cell: .*", capsys.readouterr().out)[0]
        values.append(yaml.safe_load(line)["anchors_wh_cell"])
    # 25 px of 100 px become 24 of 96, 1.5 cells; stretched, 25 of 50 px become 3 cells
    assert values == [[[1.5, 1.5]], [[1.5, 3.0]]]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["recipe.yaml", "--num", "6"], "--num is 6; allowed: 1 … 5"),
        (["recipe.yaml", "--num", "0"], "--num is 0; allowed: 1 or more"),
        (["recipe.yaml", "--restarts", "0"], "--restarts is 0"),
        (["recipe.yaml", "--seed", "-1"], "--seed is -1"),
        (["recipe.yaml", "--image-size", "100"], "--image-size is 100"),
        (["nowhere.yaml"], "recipe or dataset 'nowhere.yaml' not found"),
        (["recipe.yaml", "voc", "--write"], "one recipe; given: recipe.yaml, voc"),
        (["voc", "--write"], "one recipe; given: voc"),
        (["recipes/classify_imagenet_224.yaml", "--write"], "no such key to write to"),
        (["recipe.yaml", "--output", "recipe.yaml"], "recipe.yaml"),
    ],
)
def test_invalid_options_of_the_command(place, argv, message):
    with pytest.raises(InputError, match=message):
        main(argv)
    assert (place / "recipe.yaml").read_text() == RECIPE
    assert not (place / "outputs").exists()


def test_a_dataset_yaml_is_not_a_recipe(tmp_path):
    for name, text, expected in (
        ("recipe.yml", "data:\n  class_path: a.B\n", True),
        ("data.yaml", "path: .\ntrain: images/train\nnames: [a]\n", False),
        ("list.yaml", "[data, class_path]", False),
        ("empty.yaml", "", False),
        ("recipe.json", "data:\n  class_path: a.B\n", False),
    ):
        (tmp_path / name).write_text(text)
        assert is_recipe(str(tmp_path / name)) is expected, name


def test_a_recipe_without_boxes_is_refused(place, write_voc):
    (place / "labels" / "thing").mkdir(parents=True)
    (place / "voc" / "0.jpg").rename(place / "labels" / "thing" / "0.jpg")
    text = RECIPE.replace("detection:", "classification:").replace("VOCFolder", "ImageFolder")
    (place / "recipe.yaml").write_text(text.replace("root: voc", "root: labels"))
    with pytest.raises(InputError, match=r"has no data.detection"):
        main(["recipe.yaml"])


def test_help_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys; from yolo_lightning.cli.commands.anchors import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'lightning', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip().endswith("[]"), done.stderr
