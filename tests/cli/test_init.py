"""The command `init`: from two folders to a trained detector, then with an additional class."""

import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from tests.helpers.images import write_image
from tests.helpers.paths import REPO
from yolo_lightning import DetectorModule, WordTree, load
from yolo_lightning.checkpoints.pretrained import load_pretrained
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.cli.data import recipe_data
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.datamodules.shapes import SHAPES
from yolo_lightning.export.darknet import build_checkpoint

pytestmark = pytest.mark.end_to_end

SHAPES_TREE = WordTree.from_file(REPO / "recipes/trees/shapes.tsv")
BOXED = {"ring": "round", "semicircle": "round", "rhombus": "angular"}
LABELLED = {"ring": "ring", "semicircle": "semicircle", "rhombus": "rhombus"}


def write_photos(folder: Path, count: int) -> None:
    """Write generated images with boxes of the classes round and angular, as Pascal VOC."""
    source = ShapesDetection(count, [*BOXED], objects=(1, 2), image_size=96)
    source.bind(SHAPES_TREE)
    names = {SHAPES_TREE.find_node(SHAPES[name][0]): coarse for name, coarse in BOXED.items()}
    folder.mkdir(parents=True)
    for index in range(count):
        sample = source.read(index)
        cv2.imwrite(str(folder / f"{index}.png"), cv2.cvtColor(sample.image, cv2.COLOR_RGB2BGR))
        objects = ""
        for (x1, y1, x2, y2), label in zip(sample.boxes_xyxy_px, sample.labels, strict=True):
            objects += (
                f"<object><name>{names[int(label)]}</name><bndbox><xmin>{x1 + 1:.1f}</xmin>"
                f"<ymin>{y1 + 1:.1f}</ymin><xmax>{x2:.1f}</xmax>"
                f"<ymax>{y2:.1f}</ymax></bndbox></object>"
            )
        (folder / f"{index}.xml").write_text(
            f"<annotation><size><width>96</width><height>96</height></size>{objects}</annotation>"
        )


def write_labels(folder: Path, classes: list[str], count: int) -> None:
    """Write generated images, one folder per class."""
    for name in classes:
        source = ShapesImageLabels(count, [name], image_size=96)
        source.bind(SHAPES_TREE)
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = cv2.cvtColor(source.read(index)[0], cv2.COLOR_RGB2BGR)
            cv2.imwrite(str(folder / name / f"{index}.png"), image)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SHORT = ["--trainer.max_steps=6", "--data.num_workers=0", "--trainer.accelerator=cpu"]


def page_blocks(kind: str) -> list[str]:
    """Return the blocks of code of docs/your-own-classes.md that name this language."""
    page = (REPO / "docs/your-own-classes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return [text for fence, text in blocks if fence == kind]


@pytest.mark.slow
def test_the_page_on_own_classes_runs_as_written(workdir, capsys):
    write_photos(workdir / "photos", 24)
    write_labels(workdir / "labels", ["ring", "semicircle", "rhombus", "square"], 20)
    (hierarchy,) = page_blocks("yaml")
    assert hierarchy.startswith("# classes.yaml\n")
    (workdir / "classes.yaml").write_text(hierarchy)
    lines = "".join(page_blocks("sh")).replace("\\\n", " ").splitlines()
    first_init, first_fit, second_init, second_fit = (shlex.split(line) for line in lines)
    small = ["--image-size", "96"]
    assert main([*first_init[1:], *small]) == 0
    assert main([*first_fit[1:], *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "boxes are coarser: angular over rhombus, square, round over ring" in printed
    assert "cannot be learnt" not in printed
    recipe = first_fit[first_fit.index("--config") + 1]
    (last,) = (workdir / "outputs" / Path(recipe).stem).glob("*/checkpoints/last.ckpt")
    write_labels(workdir / "labels", ["pentagram"], 20)
    (workdir / "classes.yaml").write_text(hierarchy.replace("square]", "square, pentagram]"))
    second_init = [str(last) if part.endswith("last.ckpt") else part for part in second_init]
    assert main([*second_init[1:], *small]) == 0
    assert main([*second_fit[1:], *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "6 of 7 classes, by key" in printed
    assert "initialized  1 classes (pentagram)" in printed
    recipe = second_fit[second_fit.index("--config") + 1]
    (grown,) = (workdir / "outputs" / Path(recipe).stem).glob("*/checkpoints/last.ckpt")
    before, after = read_checkpoint(last), read_checkpoint(grown)
    old, new = (WordTree(c["hyper_parameters"]["tree"]) for c in (before, after))
    assert set(new.keys) - set(old.keys) == {"pentagram"}
    anchors = [c["hyper_parameters"]["anchors_wh_cell"] for c in (before, after)]
    assert anchors[0] == anchors[1]
    model = load(str(grown))
    assert isinstance(model, DetectorModule)
    image = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    (found,) = model.detect_most_specific(image, torch.tensor([[96, 96]]), score_threshold=0.0)
    assert len(found.labels)


def test_init_and_data_name_a_class_that_cannot_be_learnt(workdir, capsys):
    write_photos(workdir / "photos", 8)
    write_labels(workdir / "labels", ["ring", "semicircle", "rhombus"], 4)
    (workdir / "own.yaml").write_text("round: [ring, semicircle]\nangular: [rhombus]\n")
    argv = ["init", "--detection", "photos", "--classification", "labels", "--image-size", "96"]
    assert main([*argv, "--hierarchy", "own.yaml", "--output", "own/recipe.yaml"]) == 0
    warning = "no other class below the same one has labels; add some: rhombus below angular"
    assert warning in capsys.readouterr().out
    data = recipe_data(["own/recipe.yaml"])  # `fit` prints its report
    data.setup("fit")
    assert warning in data.vocabulary_report()


def test_init_adds_a_leaf_for_boxes_that_are_none_of_the_names_below(workdir, write_voc, capsys):
    for k in range(4):
        boxes = [("cake", 1, 1, 20, 20), ("doughnut", 30, 5, 60, 40)]
        write_voc(workdir / "set", str(k), boxes)
    (workdir / "own.yaml").write_text("cake: [doughnut]\n")
    argv = ["init", "--detection", "set", "--hierarchy", "own.yaml", "--image-size", "96"]
    assert main([*argv, "--output", "a.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "names below theirs: cake without doughnut is other cake" in printed
    rows = [
        ("cake", "-", "cake"),
        ("cake/other", "cake", "other cake"),
        ("doughnut", "cake", "doughnut"),
    ]
    assert WordTree.from_file("a.tsv").rows == rows
    assert "exclusive_names" not in (workdir / "a.yaml").read_text()
    assert main([*argv, "--output", "b.yaml", "--mixed-names"]) == 0
    assert (
        "no other class below the same one has labels; add some: doughnut below cake"
        in capsys.readouterr().out
    )
    assert WordTree.from_file("b.tsv").rows == [rows[0], rows[2]]
    source = yaml.safe_load((workdir / "b.yaml").read_text())["data"]["init_args"]["detection"]
    assert source["init_args"]["exclusive_names"] is False


def test_a_leaf_for_the_rest_keeps_its_row_when_a_class_is_added(workdir, write_voc):
    for k in range(4):
        boxes = [("cake", 1, 1, 20, 20), ("doughnut", 30, 5, 60, 40)]
        write_voc(workdir / "set", str(k), boxes)
    tree = [("cake", "-", "cake"), ("cake/other", "cake", "x"), ("doughnut", "cake", "y")]
    module = DetectorModule(
        tree, [(1.0, 1.0)], "tiny_darknet", 128, 64, reorg="space_to_depth", location="offset"
    )
    torch.save(build_checkpoint(module, {}), "old.ckpt")
    write_image(workdir / "labels/cheesecake/1.png")
    (workdir / "own.yaml").write_text("cake: [doughnut, cheesecake]\n")
    argv = ["init", "--detection", "set", "--classification", "labels", "--hierarchy", "own.yaml"]
    argv += ["--image-size", "96", "--pretrained", "old.ckpt", "--output", "grown.yaml"]
    assert main(argv) == 0
    recipe = yaml.safe_load(Path("grown.yaml").read_text())
    assert recipe["model"]["init_args"]["location"] == "offset"
    assert "batch_norm" not in recipe["model"]["init_args"]  # as by default
    grown = WordTree.from_file("grown.tsv")
    assert set(grown.keys) == {"cake", "cake/other", "doughnut", "cheesecake"}
    new = DetectorModule(
        grown.rows, [(1.0, 1.0)], "tiny_darknet", 128, 64, reorg="space_to_depth", location="offset"
    )
    report = str(load_pretrained(new.network, grown, "old.ckpt", len(new.backbone_layers)))
    assert "3 of 4 classes, by key" in report
    assert "initialized  1 classes (cheesecake)" in report
    rows = [(grown.find_node("doughnut"), 2), (grown.keys.index("cake/other"), 1)]
    for node, old in rows:
        assert torch.equal(new.network.class_weight[:, node], module.network.class_weight[:, old])


def test_init_writes_a_recipe_for_the_datasets(workdir, capsys, write_voc):
    for name in ("a", "b", "c"):
        write_voc(workdir / "set/train", name, [("zebra", 1, 1, 33, 25), ("zebra", 5, 5, 20, 40)])
    write_voc(workdir / "set/test", "d", [("giraffe", 1, 1, 9, 9)])
    write_voc(workdir / "set/train", "bad", [("zebra", 9, 9, 9, 9)])
    for kind in ("okapi", "zebra"):
        write_image(workdir / f"named/{kind}/1.png")
    (workdir / "named/okapi/broken.jpg").write_bytes(b"no image")
    argv = ["init", "--detection", "set", "--classification", "named", "--output", "my/own.yaml"]
    assert main([*argv, "--num-anchors", "2", "--image-size", "160"]) == 0
    out = capsys.readouterr().out
    assert "VOC set (train): 4 images; boxes: zebra 6" in out
    assert "bad.xml: object 1 has no area, skipped" in out
    assert "broken.jpg: not a readable image" in out
    recipe = yaml.safe_load((workdir / "my/own.yaml").read_text())
    data, model = recipe["data"]["init_args"], recipe["model"]["init_args"]
    assert data["detection"]["init_args"] == {"root": "set", "split": "train"}
    assert data["test"]["init_args"] == {"root": "set", "split": "test"}
    assert data["validation"] is None
    assert data["classification"]["class_path"].endswith("ImageFolder")
    # letterboxed from 64 px to 160 px, in cells of 16 px
    expected = np.array([[15, 35], [33, 25]]) * 160 / 64 / 16
    got = np.array(model["anchors_wh_cell"])
    assert np.abs(got - expected).max() < 0.25
    tree = WordTree.from_file(workdir / "my/own.tsv")
    assert {"n02391049", "n02439033"} <= set(tree.keys)
    assert main(["fit", "--config", "my/own.yaml", *SHORT, "--trainer.max_steps=2"]) == 0
    assert main([*argv]) == 2
    assert "own.yaml exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "x.txt"], "expected a name such as recipe.yaml"),
        (["--image-size", "100"], "--image-size is 100; allowed: multiples of 32"),
        (["--backbone", "darknet20"], "did you mean 'darknet19'"),
        (["--detection", "nowhere"], "file or folder 'nowhere' not found"),
        (["--detection", "named"], "no images with boxes recognised; known: COCO JSON"),
        (["--classification", "set"], "no images with labels recognised; known: a folder with"),
        (["--classification", "cranes"], "'crane' is ambiguous"),
        (
            ["--classification", "cranes", "--hierarchy", "h.yaml"],
            "h.yaml:2: 'crane' has the parent",
        ),
        (["--pretrained", "gone.ckpt"], "--pretrained 'gone.ckpt' not found"),
        (["--num-anchors", "9"], "9 anchors require 9 distinct boxes; found: 1"),
    ],
)
def test_rejected_input_leaves_no_files(workdir, capsys, write_voc, argv, message):
    write_voc(workdir / "set", "a", [("zebra", 1, 1, 33, 25)])
    write_image(workdir / "named/okapi/1.png")
    write_image(workdir / "cranes/crane/1.png")
    (workdir / "h.yaml").write_text("bird: [crane]\nmachine: [crane]\n")
    options = {"--detection": "set", "--classification": "named", "--output": "own.yaml"}
    options |= dict(zip(argv[::2], argv[1::2], strict=True))
    assert main(["init", *(part for pair in options.items() for part in pair)]) == 2
    assert message in capsys.readouterr().err
    assert not list(workdir.glob("own.*"))


def test_flat_uses_names_without_wordnet(workdir, write_voc):
    write_voc(workdir / "set", "a", [("crane", 1, 1, 33, 25), ("type 7", 1, 1, 20, 20)])
    argv = ["init", "--detection", "set", "--output", "own.yaml", "--flat", "--num-anchors", "2"]
    assert main(argv) == 0
    assert WordTree.from_file(workdir / "own.tsv").keys == ("crane", "type 7")
    recipe = yaml.safe_load((workdir / "own.yaml").read_text())
    data = recipe["data"]["init_args"]
    assert data["classification"] is None
    assert data["classification_batches_per_detection_batch"] == 0


def test_training_and_validation_images_do_not_overlap(workdir, write_voc):
    for k in range(6):
        box = ("zebra", 1, 1, 30, 20 + k)
        write_voc(workdir / "set/Annotations", f"i{k}", [box], images="../JPEGImages")
    sets = workdir / "set/ImageSets/Main"
    sets.mkdir(parents=True)
    (sets / "trainval.txt").write_text("i0\ni1\ni2\ni3\n")
    (sets / "val.txt").write_text("i1\ni3\n")
    (sets / "test.txt").write_text("i4\ni5\n")
    assert main(["init", "--detection", "set", "--output", "own.yaml"]) == 0
    data = yaml.safe_load((workdir / "own.yaml").read_text())["data"]["init_args"]
    assert data["detection"]["init_args"]["split"] == "trainval"
    assert data["validation"] is None
    assert data["test"]["init_args"]["split"] == "test"


@pytest.mark.parametrize("name", ["2007", "on", "my data"])
def test_recipe_parses_for_any_folder_name(workdir, write_voc, name):
    write_voc(workdir / name, "a", [("zebra", 1, 1, 33, 25), ("zebra", 1, 1, 20, 30)])
    assert main(["init", "--detection", name, "--output", f"{name}.yaml"]) == 0
    assert main(["batch", f"{name}.yaml", "--output", "p.png"]) == 0
    recipe = yaml.safe_load((workdir / f"{name}.yaml").read_text())
    assert recipe["trainer"]["default_root_dir"] == f"outputs/{name}"


def test_recipe_depends_on_the_backbone(workdir, write_voc, capsys):
    write_voc(workdir / "set", "a", [("zebra", 1, 1, 33, 25)])
    argv = ["init", "--detection", "set", "--backbone", "darknet19", "--output"]
    assert main([*argv, "large.yaml"]) == 0
    model = yaml.safe_load((workdir / "large.yaml").read_text())["model"]["init_args"]
    assert (model["head_channels"], model["learning_rate"]) == (1024, 0.001)
