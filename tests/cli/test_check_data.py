"""`check-data`, and `batch`, which shows the batch of a training step."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.helpers.hostile_images import fifo, progressive_jpeg
from tests.helpers.images import write_image
from tests.helpers.paths import REPO
from yolo_lightning.cli.data import recipe_data
from yolo_lightning.cli.main import main

pytestmark = pytest.mark.end_to_end

RECIPE = """
model:
  class_path: yolo_lightning.DetectorModule
  init_args: {tree: [cat, dog], anchors_wh_cell: [[1, 1]], backbone: small}
data:
  class_path: yolo_lightning.CombinedDataModule
  init_args:
    tree: ${...model.init_args.tree}
    detection: {class_path: yolo_lightning.datamodules.VOCFolder, init_args: {root: boxes}}
    classification: {class_path: yolo_lightning.datamodules.ImageFolder, init_args: {root: named}}
    test: {class_path: yolo_lightning.datamodules.VOCFolder, init_args: {root: held}}
    detection_augmentation:
      class_path: yolo_lightning.datamodules.DetectionAugmentation
    detection_batch_size: 4
    classification_batch_size: 2
    image_size: 96
trainer:
  devices: 2
  num_nodes: 1
  callbacks:
    - class_path: yolo_lightning.callbacks.MultiScale
      init_args: {sizes: [64, 96, 128], every_n_batches: 2}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_voc) -> Path:
    monkeypatch.chdir(tmp_path)
    for k in range(5):
        write_voc(tmp_path / "boxes", f"b{k}", [("cat", 1, 1, 10 + k, 20), ("dog", 5, 5, 30, 30)])
    rng = np.random.default_rng(0)
    for k in range(5):
        noise = rng.integers(0, 255, (48, 64, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"boxes/b{k}.jpg"), noise)
    write_voc(tmp_path / "held", "h", [("dog", 1, 1, 20, 20)])
    for k in range(3):
        write_image(tmp_path / f"named/cat/{k}.png", value=k)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def read_report(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "outputs/check-data/recipe/report.json").read_text())
    assert isinstance(report, dict)
    return report


def test_a_valid_recipe_would_start(folder, capsys):
    assert main(["check-data", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    assert "detection: VOC boxes: 5 images, 10 boxes" in out
    assert "Classes: 2; they learn 1 from boxes, 1 from both" in out
    report = read_report(folder)
    assert report["starts"] is True
    source = report["sources"][0]
    assert source["classes"] == {"cat": 5, "dog": 5}
    assert source["image_sizes"] == {"64 x 48": 5}
    # sides are roots of areas: the cats' are 10 … 14 x 20 px, the dogs' 26 x 26
    assert source["box_side_px"]["min"] == round(200**0.5, 3)
    assert source["box_side_px"]["max"] == 26
    assert source["objects_per_image"]["median"] == 2
    assert source["boxes_by_area"]["small, below 32 x 32 px"] == 10
    page = (folder / "outputs/check-data/recipe/index.html").read_text()
    assert "Training would start." in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # no external files
    images = re.findall(r"data:image/\w+;base64,([^\"]+)", page)
    assert len(images) == 5  # labels of three sources, a batch of either kind
    for image in images:
        data = np.frombuffer(base64.b64decode(image), np.uint8)
        assert cv2.imdecode(data, cv2.IMREAD_COLOR) is not None


def test_all_faults_are_counted_and_named(folder, capsys, write_voc):
    (folder / "boxes/b1.jpg").write_bytes(b"no image")
    (folder / "boxes/b3.jpg").write_bytes(progressive_jpeg(101, 64))
    (folder / "boxes/b4.jpg").unlink()
    fifo(folder / "boxes/b4.jpg")
    write_voc(folder / "boxes", "flat", [("cat", 9, 9, 9, 20), ("cat", 100, 1, 120, 9)])
    (folder / "held/h.jpg").write_bytes((folder / "boxes/b2.jpg").read_bytes())
    (folder / "named/cat/again.png").write_bytes((folder / "named/cat/1.png").read_bytes())
    assert main(["check-data", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    report = read_report(folder)
    source = report["sources"][0]
    assert source["fault_kinds"] == {
        "boxes without an area": 1, "boxes outside their image": 1,
    }  # fmt: skip
    for name, reason in (
        ("b1.jpg", "not a readable image"),
        ("b3.jpg", "101 scans of 64 x 64 px; allowed: at most 100"),
        ("b4.jpg", "not a regular file"),
    ):
        assert any(f"{name}: {reason}" in line for line in source["unreadable"])
    assert "flat.xml: object 1 has no area, skipped" in out
    same = [{part for part, _ in group} for group in report["same_files"]]
    assert sorted(map(sorted, same)) == [["classification"], ["detection", "test"]]
    assert "2 duplicate images, 1 of them in several parts" in out


def test_the_exit_code_says_whether_training_would_start(folder, capsys, write_voc):
    write_voc(folder / "boxes", "x", [("cta", 1, 1, 9, 9)])
    (folder / "named/bird").mkdir()
    write_image(folder / "named/bird/1.png")
    assert main(["check-data", "recipe.yaml", "--data.test.root", "nowhere"]) == 2
    output = capsys.readouterr()
    assert "training would not start:" in output.err
    assert "x.xml: object 1: label 'cta' is not in the tree; did you mean 'cat'?" in output.err
    assert "label 'bird' is not in the tree" in output.err
    # `fit` does not need the test data: reported, but not a problem
    assert "folder 'nowhere' not found" in output.out
    assert "folder 'nowhere' not found" not in output.err
    assert "detection: VOC boxes: 6 images" in output.out  # all data is read nevertheless
    assert read_report(folder)["starts"] is False
    assert main(["fit", "--config", "recipe.yaml", "--trainer.devices=1"]) == 2


def test_pretrained_weights_and_image_sizes_are_checked(folder, capsys):
    assert main(["check-data", "recipe.yaml", "--model.pretrained", "gone.weights"]) == 2
    assert "model.pretrained 'gone.weights' not found" in capsys.readouterr().err
    write_image(folder / "boxes/b1.jpg", 32, 24)  # annotated at 64 x 48
    assert main(["check-data", "recipe.yaml"]) == 0
    assert "b1.jpg: is 32 x 24, but annotated as 64 x 48" in capsys.readouterr().out
    source = read_report(folder)["sources"][0]
    assert source["fault_kinds"] == {"image sizes that differ from the file's": 1}
    assert [row["name"] for row in read_report(folder)["classes"]] == ["cat", "dog"]
    assert read_report(folder)["classes"][0]["images"] == {"cat": 3}


def test_all_splits_of_a_dataset_are_checked(folder, capsys, write_voc):
    write_voc(folder / "split/train", "a", [("cat", 1, 1, 9, 9)])
    write_voc(folder / "split/test", "b", [("cat", 1, 1, 9, 9)])
    (folder / "split/test/b.jpg").write_bytes((folder / "split/train/a.jpg").read_bytes())
    assert main(["check-data", "split"]) == 0
    out = capsys.readouterr().out
    assert "test: VOC split (test): 1 images" in out
    assert "1 duplicate images, 1 of them in several parts" in out


def test_a_dataset_without_a_recipe_is_checked_with_its_own_names(folder, capsys):
    assert main(["check-data", "named"]) == 0
    assert "classification: image folder named: 3 images" in capsys.readouterr().out
    assert main(["check-data", "boxes", "--output", "there"]) == 0
    assert (folder / "there/index.html").is_file()
    assert main(["check-data", "nothing"]) == 2
    assert "recipe or dataset 'nothing' not found" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert main(["check-data", "empty"]) == 2
    assert "no images with boxes recognised" in capsys.readouterr().err


# --- batch


def test_the_batch_of_a_step_equals_that_of_training(folder, capsys):
    argv = ["batch", "recipe.yaml", "--step", "6", "--rank", "1"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    data = recipe_data(["recipe.yaml"])
    data.setup("fit")
    plan = data.order.plan(6, 1, 2)
    assert f"step 6, rank 1 of 2: 2 images, {plan.kind}" in out
    assert plan.kind == "detection"
    source = data.detection
    assert source is not None
    for index, number in zip(plan.indices, plan.passes, strict=True):
        assert f"  {index:>8}  pass {number}  {source.image_name(index)}" in out
    # the batch of the training's loader at that step
    data.num_workers = 0
    batches = {batch.step: batch for batch in data.train_dataloader()}
    single = data.batch(2)
    assert (batches[2].images == single.images).all()
    assert batches[2].sample_ids.tolist() == single.sample_ids.tolist()
    size = int(re.findall(r"image size: (\d+) px", out)[0])
    assert size in (64, 96, 128)
    picture = cv2.imread(str(folder / "outputs/batch/recipe-6-1.png"))
    assert picture is not None
    scale = 224 // size
    assert picture.shape[0] == size * scale + 12


def test_the_image_size_of_a_batch_follows_seed_and_end_of_the_recipe(folder, capsys):
    def sizes(*override: str, steps: Sequence[int] = (0, 2, 4, 6, 8, 10)) -> list[str]:
        for step in steps:
            assert main(["batch", "recipe.yaml", f"--step={step}", *override]) == 0
        return re.findall(r"image size: (\d+) px", capsys.readouterr().out)

    drawn = sizes()
    assert drawn[:3] != sizes("--data.seed=1", steps=(0, 2, 4))
    end = ["--trainer.max_steps=12", "--trainer.callbacks.last_batches_at_largest=4"]
    assert sizes(*end, steps=(6, 8, 10)) == [drawn[3], "128", "128"]
    assert drawn[4:] != ["128", "128"]
    # an epoch is two batches of 4 images with boxes and two with labels
    epochs = ["--trainer.max_epochs=2", end[1]]
    assert sizes(*epochs, steps=(4, 6)) == ["128", "128"]


def test_a_list_of_sources_in_a_recipe(folder, capsys, write_voc):
    write_voc(folder / "more", "m", [("chat", 1, 1, 20, 20)])
    kind = "yolo_lightning.datamodules."
    listed = RECIPE.replace(
        "detection: {class_path: yolo_lightning.datamodules.VOCFolder, init_args: {root: boxes}}",
        f"detection:\n      - {{class_path: {kind}VOCFolder, init_args: {{root: boxes}}}}\n"
        f"      - class_path: {kind}VOCFolder\n"
        "        init_args: {root: more, mapping: {chat: cat}}",
    )
    (folder / "listed.yaml").write_text(listed)
    override = ["--data.detection_batch_size=12", "--trainer.devices=1"]
    assert main(["batch", "listed.yaml", *override]) == 0
    out = capsys.readouterr().out
    assert "12 images, detection" in out
    assert out.count("/more/m.jpg") == 2  # two passes over five and one images
    assert main(["check-data", "listed.yaml"]) == 0
    out = capsys.readouterr().out
    assert "detection: VOC boxes: 5 images" in out
    assert "detection: VOC more: 1 images" in out
    assert "merged names: cat = chat (cat)" in out
    short = ["--trainer.max_steps=2", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "listed.yaml", *override, *short]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--step", "-1"], "--step is -1; allowed: 0 or more, below"),
        (["--rank", "2"], "--rank is 2 of 2; allowed: 0 … 1"),
        (["--trainer.devices", "auto"], "trainer.devices is 'auto', which depends on the machine"),
        (["--trainer.devices", "4", "--rank", "4"], "--rank is 4 of 4; allowed: 0 … 3"),
        (["--world-size", "3"], "4 images cannot be shared equally by 3 ranks"),
        (["--data.detection.root", "gone"], "folder 'gone' not found"),
    ],
)
def test_invalid_batches_are_refused(folder, capsys, argv, message):
    assert main(["batch", "recipe.yaml", *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_batch_of_the_quickstart(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(REPO)
    output = str(tmp_path / "p.png")
    assert main(["batch", "recipes/quickstart.yaml", "--step", "1", "--output", output]) == 0
    assert "16 images, classification" in capsys.readouterr().out
    picture = cv2.imread(output)
    assert picture is not None
    assert picture.shape[1] > 6 * 192


def test_a_folder_of_boxes_is_no_class_called_images(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "set/images/a.jpg")
    (tmp_path / "set/annotations").mkdir()
    (tmp_path / "set/annotations/a.txt").write_text("0 .5 .5 .5 .5\n")
    assert main(["check-data", "set"]) == 2
    error = capsys.readouterr().err
    assert "set: no images with boxes recognised; found 1 TXT file in annotations/, 1 i" in error
    assert "no images with labels recognised" in error
