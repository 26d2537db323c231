"""The command `init`: from two folders to a trained detector, then with an additional class."""

import argparse
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
from yolo_lightning.cli import recipe
from yolo_lightning.cli.commands import init_defaults
from yolo_lightning.cli.commands.init_defaults import Machine
from yolo_lightning.cli.data import recipe_data
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.datamodules.shapes import SHAPES
from yolo_lightning.export.darknet import build_checkpoint

pytestmark = [pytest.mark.end_to_end, pytest.mark.usefixtures("known_step_time")]

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
    """Return the blocks of code of docs/boxes-and-labels.md that name this language."""
    page = (REPO / "docs/boxes-and-labels.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return [text for fence, text in blocks if fence == kind]


@pytest.mark.slow
def test_the_page_on_boxes_and_labels_runs_as_written(workdir, capsys):
    write_photos(workdir / "photos", 24)
    write_labels(workdir / "labels", ["ring", "semicircle", "rhombus", "square"], 20)
    (hierarchy,) = (text for text in page_blocks("yaml") if text.startswith("# classes.yaml\n"))
    (workdir / "classes.yaml").write_text(hierarchy)
    lines = "".join(page_blocks("sh")).replace("\\\n", " ").splitlines()
    ours = [shlex.split(line) for line in lines if re.match("yolo-lightning (init|fit) ", line)]
    first_init, first_fit, second_init, second_fit = ours
    small = ["--image-size", "96"]
    assert main([*first_init[1:], *small]) == 0
    assert main([*first_fit[1:], *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "boxes are coarser: angular over rhombus, square, round over ring" in printed
    assert "cannot be learnt" not in printed
    recipe = first_fit[-1]
    (last,) = (workdir / "outputs" / Path(recipe).stem).glob("*/checkpoints/last.ckpt")
    write_labels(workdir / "labels", ["pentagram"], 20)
    (workdir / "classes.yaml").write_text(hierarchy.replace("square]", "square, pentagram]"))
    second_init = [str(last) if part.endswith("last.ckpt") else part for part in second_init]
    assert main([*second_init[1:], *small]) == 0
    assert main([*second_fit[1:], *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "6 of 7 classes, by key" in printed
    assert "initialized  1 classes (pentagram)" in printed
    recipe = second_fit[-1]
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
    argv = ["init", "photos", "--classification", "labels", "--image-size", "96"]
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
    argv = ["init", "set", "--hierarchy", "own.yaml", "--image-size", "96"]
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
    argv = ["init", "set", "--classification", "labels", "--hierarchy", "own.yaml"]
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
    argv = ["init", "set", "--classification", "named", "--output", "my/own.yaml"]
    assert main([*argv, "--num-anchors", "2", "--image-size", "160"]) == 0
    out = capsys.readouterr().out
    assert "VOC set (train): 4 images; boxes: zebra 6" in out
    assert "bad.xml: object 1 has no area, skipped" in out
    assert "broken.jpg: not a readable image" in out
    recipe = yaml.safe_load((workdir / "my/own.yaml").read_text())
    data, model = recipe["data"]["init_args"], recipe["model"]["init_args"]
    training = {"root": "../set", "split": "train"}
    assert data["detection"]["init_args"] == {**training, "without": "own.val.txt"}
    assert data["validation"]["init_args"] == {**training, "only": "own.val.txt"}
    assert data["test"]["init_args"] == {"root": "../set", "split": "test"}
    assert "so 1 of the 4 training images are chosen at random (seed 0)" in out
    assert data["classification"]["class_path"].endswith("ImageFolder")
    # letterboxed from 64 px to 160 px, in cells of 16 px
    expected = np.array([[15, 35], [33, 25]]) * 160 / 64 / 16
    got = np.array(model["anchors_wh_cell"])
    assert np.abs(got - expected).max() < 0.25
    tree = WordTree.from_file(workdir / "my/own.tsv")
    assert {"n02391049", "n02439033"} <= set(tree.keys)
    capsys.readouterr()
    assert main(["fit", "--config", "my/own.yaml", *SHORT, "--trainer.max_steps=2"]) == 0
    out = capsys.readouterr().out
    assert "\nstep 2/2, " in out  # of all steps, not of an epoch
    assert main([*argv]) == 2
    assert "own.yaml exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "x.txt"], "expected a name such as recipe.yaml"),
        (["--image-size", "100"], "--image-size is 100; allowed: multiples of 32"),
        (["--backbone", "darknet20"], "did you mean 'darknet19'"),
        (["--path", "nowhere"], "file or folder 'nowhere' not found"),
        (["--path", "named"], "no images with boxes recognised; found 1 image in okapi/"),
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
    options = {"--path": "set", "--classification": "named", "--output": "own.yaml"}
    options |= dict(zip(argv[::2], argv[1::2], strict=True))
    path = options.pop("--path")
    assert main(["init", path, *(part for pair in options.items() for part in pair)]) == 2
    assert message in capsys.readouterr().err
    assert not list(workdir.glob("own.*"))


def test_boxes_alone_keep_their_names_and_need_no_other_option(workdir, write_voc, capsys):
    write_voc(workdir / "set", "a", [("crane", 1, 1, 33, 25), ("type 7", 1, 1, 20, 20)])
    assert main(["init", "set"]) == 0
    assert WordTree.from_file(workdir / "set.tsv").keys == ("crane", "type 7")
    recipe = yaml.safe_load((workdir / "set.yaml").read_text())
    data = recipe["data"]["init_args"]
    assert data["classification"] is None
    assert data["classification_batches_per_detection_batch"] == 0
    assert data["validation"] is None
    printed = capsys.readouterr().out
    assert "validation: none, as each image is the only one of a class" in printed
    assert "put\n  tiny.weights of https://pjreddie.com/darknet/tiny-darknet/" in printed
    assert re.search(r"about 15 minutes: 1,[45]\d0 steps of 0.5\d s on", printed)
    assert "first validation" not in printed
    assert printed.endswith("  yolo-lightning fit set.yaml\n")


def test_names_that_only_training_or_validation_has_are_named(workdir, write_voc, capsys):
    write_voc(workdir / "set/train", "a", [("crane", 1, 1, 33, 25), ("duck", 1, 1, 20, 20)])
    write_voc(workdir / "set/val", "b", [("duck", 1, 1, 33, 25), ("swan", 1, 1, 20, 20)])
    assert main(["init", "set"]) == 0
    printed = capsys.readouterr().out
    assert (
        "\nvalidation: without a box of crane\nvalidation: no training image has swan\n" in printed
    )
    assert "; first validation after " in printed
    assert printed.endswith("  yolo-lightning fit set.yaml\n  yolo-lightning test set.yaml\n")
    (workdir / "same.yaml").write_text("crane: duck\nswan: duck\n")
    assert main(["init", "set", "--mapping", "same.yaml", "--output", "same_names.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "without a box" not in printed
    assert "no training image" not in printed
    write_voc(workdir / "one", "a", [("crane", 1, 1, 33, 25)])
    write_voc(workdir / "one", "b", [("crane", 1, 1, 33, 25)])
    assert main(["init", "one", "--val-fraction", "0"]) == 0
    printed = capsys.readouterr().out
    assert "validation: none, so neither best.ckpt nor any AP while it trains\n" in printed
    assert printed.endswith("  yolo-lightning fit one.yaml\n")


def test_weights_in_their_usual_place_are_used(workdir, write_voc):
    write_voc(workdir / "set", "a", [("crane", 1, 1, 33, 25)])
    (workdir / "datasets").mkdir()
    (workdir / "datasets/tiny.weights").write_bytes(b"")
    assert main(["init", "set"]) == 0
    model = yaml.safe_load((workdir / "set.yaml").read_text())["model"]["init_args"]
    assert (model["pretrained"], model["loss"]["anchor_prior_images"]) == (
        "datasets/tiny.weights", 0,
    )  # fmt: skip


def test_images_of_a_group_stay_together(workdir, write_voc, capsys):
    for k in range(12):
        write_voc(workdir / "set", f"film{k // 3}_{k}", [("zebra", 1, 1, 30, 20 + k)])
    argv = ["init", "set", "--val-fraction", "0.25", "--group-by", r"film\d+"]
    assert main(argv) == 0
    assert "so 3 of the 12 training images (1 of 4 groups) are" in capsys.readouterr().out
    listed = (workdir / "set.val.txt").read_text().splitlines()
    assert len({name.partition("_")[0] for name in listed}) == 1
    data = recipe_data(["set.yaml"])
    data.setup("fit")
    names = [
        {Path(source.image_name(k)).name for k in range(len(source))}
        for source in (data.detection, data.validation)
    ]
    assert names[1] == set(listed)
    assert len(names[0]) == 9
    assert not names[0] & names[1]
    assert main([*argv, "--output", "again.yaml"]) == 0
    assert (workdir / "again.val.txt").read_text().splitlines() == listed


def test_no_class_is_left_out_of_validation_or_of_training(workdir, write_voc, capsys):
    # 30 images of one class, two of each of three others, and one of a last one
    names = ["zebra"] * 30 + ["crane", "crane", "duck", "duck", "swan", "swan", "dodo"]
    for k, name in enumerate(names):
        write_voc(workdir / "set", str(k), [(name, 1, 1, 30, 20 + k % 9)])
    assert main(["init", "set"]) == 0
    printed = capsys.readouterr().out
    assert "so 4 of the 37 training images are chosen at random" in printed
    assert "\nvalidation: without a box of dodo\n" in printed
    data = recipe_data(["set.yaml"])
    data.setup("fit")
    used, trained = (
        {name for names in source.node_counts().values() for name in names}
        for source in (data.validation, data.detection)
    )
    assert used == {"zebra", "crane", "duck", "swan"}
    assert trained == set(names)
    for k in range(30):  # an image of every class is more than twice the fraction
        (workdir / f"set/{k}.xml").unlink()
    assert main(["init", "set", "--output", "few.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "so 2 of the 7 training images are" in printed
    assert re.search(r"\nvalidation: without a box of (\w+, )?dodo", printed)
    assert main(["init", "set", "--output", "half.yaml", "--val-fraction", "0.5"]) == 0
    assert "so 3 of the 7 training images are" in capsys.readouterr().out


def test_images_that_are_the_only_ones_of_a_class_are_trained_on(workdir, write_voc, capsys):
    for name in ("crane", "duck"):
        write_voc(workdir / "set", name, [(name, 1, 1, 30, 20)])
    assert main(["init", "set"]) == 0
    assert "validation: none, as each image is the only one of a class\n" in capsys.readouterr().out
    assert "validation: null" in (workdir / "set.yaml").read_text()


def test_a_column_of_a_table_groups_images(workdir):
    lines = ["filename,xmin,ymin,xmax,ymax,class,video"]
    for k in range(8):
        write_image(workdir / f"set/images/{k}.jpg")
        lines.append(f"{k}.jpg,1,1,33,25,zebra,{'ab'[k % 2]}")
    (workdir / "set/boxes.csv").write_text("\n".join(lines))
    assert main(["init", "set", "--group-by", "video", "--output", "own.yaml"]) == 0
    listed = (workdir / "own.val.txt").read_text().split()
    assert listed in (["0.jpg", "2.jpg", "4.jpg", "6.jpg"], ["1.jpg", "3.jpg", "5.jpg", "7.jpg"])


def test_names_that_differ_little_are_asked_about_and_joined(workdir, write_voc, capsys):
    for k, name in enumerate(["Apple", "apple", "apple", "aple", "type 7", "type 8", "cat", "bat"]):
        write_voc(workdir / "set", str(k), [(name, 1, 1, 33, 20 + k)])
    assert main(["init", "set", "--output", "a.yaml"]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("one class or")]
    assert line == (
        "one class or two? 'Apple' (1) and 'apple' (2); 'aple' (1) and 'apple' (2); "
        "to join them: --mapping FILE with 'Apple': 'apple'"
    )
    (workdir / "join.yaml").write_text("'Apple': 'apple'\naple: apple\n")
    assert main(["init", "set", "--mapping", "join.yaml", "--output", "b.yaml"]) == 0
    assert "one class or two" not in capsys.readouterr().out
    assert len(WordTree.from_file("b.tsv").keys) == 5
    data = recipe_data(["b.yaml"])
    data.setup("fit")
    data.setup("validate")
    counts = [source.node_counts().values() for source in (data.detection, data.validation)]
    assert sum(sum(c.values()) for parts in counts for c in parts) == 8


@pytest.mark.parametrize(
    ("machine", "images", "expected"),
    [
        # 0.85 * 15 minutes of steps of 0.5 s and a little to read; or 1,500 for few images
        (Machine(0, 2), 160, ("tiny_darknet", 64, 16, 2, "bf16-mixed", 1500, 75)),
        (Machine(0, 1), 16_000, ("tiny_darknet", 64, 16, 1, "bf16-mixed", 1520, 76)),
        (Machine(1, 16, True), 160, ("tiny_darknet", 416, 16, 8, "bf16-mixed", 1500, 75)),
        # 60 passes of 250 batches
        (Machine(1, 4, False), 16_000, ("darknet19", 416, 64, 4, "32-true", 15_000, 750)),
        (Machine(3, 16, True), 16_000, ("darknet19", 416, 66, 5, "bf16-mixed", 14_520, 726)),
    ],
)
def test_defaults_by_machine(machine, images, expected, monkeypatch):
    def measure(network, size, count, device, precision):
        return (0.125 if precision == "bf16-mixed" else 0.5) * count / (4 if device == "cpu" else 1)

    class Boxes(ShapesDetection):
        def __len__(self):
            return images

        def read(self, index, min_side=None):
            return None

        def shapes_wh_px(self):
            return np.full((5, 2), 90.0), np.full((5, 2), 96.0)

    monkeypatch.setattr(init_defaults, "measure_step", measure)
    boxes, options = Boxes(), argparse.Namespace(image_size=64, minutes=None)
    if machine.gpus:
        options.image_size = None
    backbone = init_defaults.choose_backbone(None, machine, images)
    chosen = init_defaults.choose_settings(options, machine, boxes, 16, {}, 0)
    assert (
        backbone, chosen.image_size, chosen.batch, chosen.workers, chosen.precision, chosen.steps,
        chosen.every,
    ) == expected  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "has_bf16", "precision", "batch"),
    [(1, True, "bf16-mixed", 16), (1, False, "32-true", 16), (3, True, "bf16-mixed", 18)],
)
def test_recipe_of_a_machine_with_gpus_is_trained_on_all_of_them(
    workdir, write_voc, monkeypatch, capsys, gpus, has_bf16, precision, batch
):
    for k in range(6):
        write_voc(workdir / "set", str(k), [("zebra", 1, 1, 33, 25 + k)])
    timed: list[tuple[object, ...]] = []

    def measure(network: object, size: int, *options: object) -> float:
        timed.append(options)
        return 0.1

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
        patch.setattr(init_defaults, "measure_step", measure)
        assert main(["init", "set"]) == 0
    assert timed == [(batch // gpus, "cuda", precision)]
    printed = capsys.readouterr().out
    assert f"steps of 0.10 s on {gpus} GPU{'' if gpus == 1 else 's'}, as measured" in printed
    launch = re.search(r"\n  (.* fit set.yaml.*)\n  yolo-lightning test set.yaml\n", printed)
    assert launch
    words = launch[1].split()
    if gpus == 1:
        assert launch[1] == "yolo-lightning fit set.yaml"
    else:
        assert words[:2] == ["torchrun", f"--nproc-per-node={gpus}"]
    # the options of the printed command; here there is no GPU
    options = words[words.index("set.yaml") + 1 :]
    monkeypatch.setattr(recipe.RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    args = ["fit", "--config", "set.yaml", *options, "--trainer.accelerator=cpu"]
    run = recipe.main(args)
    assert run.trainer.num_devices == gpus
    assert run.trainer.precision == precision
    assert (run.datamodule.image_size, run.datamodule.batch_sizes[0]) == (416, batch)
    run.datamodule.setup("fit")
    assert len(run.datamodule.batch(0, gpus - 1, gpus)) == batch // gpus


def test_small_boxes_get_larger_images():
    class Boxes(ShapesDetection):
        side = 0.0

        def shapes_wh_px(self):
            return np.full((5, 2), self.side), np.full((5, 2), 640.0)

    boxes, sizes = Boxes(), []
    for boxes.side in (60.0, 40.0, 10.0):  # of 640 px: 21 px at 224, 20 at 320, never
        sizes.append(init_defaults.choose_image_size(boxes, Machine(0, 2)))
    assert sizes == [224, 320, 416]
    assert init_defaults.choose_image_size(boxes, Machine(1, 2)) == 416


def test_a_step_is_timed_and_the_gradient_reaches_the_backbone():
    network = {"backbone": "tiny_darknet", "head_channels": 32, "passthrough_channels": 16,
               "reorg": "space_to_depth"}  # fmt: skip
    assert 0 < init_defaults.measure_step(network, 32, 1, "cpu", "32-true") < 60


def test_training_and_validation_images_do_not_overlap(workdir, write_voc):
    for k in range(6):
        box = ("zebra", 1, 1, 30, 20 + k)
        write_voc(workdir / "set/Annotations", f"i{k}", [box], images="../JPEGImages")
    sets = workdir / "set/ImageSets/Main"
    sets.mkdir(parents=True)
    (sets / "trainval.txt").write_text("i0\ni1\ni2\ni3\n")
    (sets / "val.txt").write_text("i1\ni3\n")
    (sets / "test.txt").write_text("i4\ni5\n")
    assert main(["init", "set", "--output", "own.yaml"]) == 0
    data = yaml.safe_load((workdir / "own.yaml").read_text())["data"]["init_args"]
    assert data["detection"]["init_args"]["split"] == "trainval"
    assert data["validation"]["init_args"]["only"] == "own.val.txt"  # val is a part of trainval
    assert data["test"]["init_args"]["split"] == "test"
    (sets / "train.txt").write_text("i0\ni2\n")
    assert main(["init", "set", "--output", "apart.yaml"]) == 0
    data = yaml.safe_load((workdir / "apart.yaml").read_text())["data"]["init_args"]
    assert [data[part]["init_args"]["split"] for part in ("detection", "validation")] == [
        "train", "val",
    ]  # fmt: skip
    assert not (workdir / "apart.val.txt").exists()


@pytest.mark.parametrize("name", ["2007", "on", "my data"])
def test_recipe_parses_for_any_folder_name(workdir, write_voc, name):
    write_voc(workdir / name, "a", [("zebra", 1, 1, 33, 25), ("zebra", 1, 1, 20, 30)])
    assert main(["init", name, "--output", f"{name}.yaml"]) == 0
    assert main(["batch", f"{name}.yaml", "--output", "p.png"]) == 0
    recipe = yaml.safe_load((workdir / f"{name}.yaml").read_text())
    assert recipe["trainer"]["default_root_dir"] == f"outputs/{name}"
    text = (workdir / f"{name}.yaml").read_text()
    assert f"\n#   yolo-lightning test {shlex.quote(f'{name}.yaml')}\n" in text


def test_recipe_says_how_often_images_are_trained_on(workdir, write_voc, capsys):
    for k in range(18):
        write_voc(workdir / "set", f"{k}", [("zebra", 1, 1, 33, 25 + k)])
    assert main(["init", "set", "--val-fraction", "0"]) == 0
    assert "\nset.tsv: 1 class\n" in capsys.readouterr().out
    steps, epochs = re.findall(
        r"max_steps: (\d+)  # about (\d+) epochs", (workdir / "set.yaml").read_text()
    )[0]
    assert int(steps) == 2 * int(epochs)  # batches of 16 and of 2 images


def test_recipe_depends_on_the_backbone(workdir, write_voc, capsys):
    write_voc(workdir / "set", "a", [("zebra", 1, 1, 33, 25)])
    argv = ["init", "set", "--backbone", "darknet19", "--output"]
    assert main([*argv, "large.yaml"]) == 0
    model = yaml.safe_load((workdir / "large.yaml").read_text())["model"]["init_args"]
    assert (model["head_channels"], model["learning_rate"]) == (1024, 0.001)
