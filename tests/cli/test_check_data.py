"""`check-data` and `batch`: what is told about data before, and about any step of, training."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.helpers.images import write_image
from tests.helpers.paths import REPO
from yolo_lightning.cli.data import recipe_data
from yolo_lightning.cli.main import main

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
    canvas_size: 128
trainer:
  devices: 2
  num_nodes: 1
  callbacks:
    - class_path: yolo_lightning.callbacks.MultiScale
      init_args: {sizes: [64, 96, 128], every_n_batches: 2}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_voc) -> Path:
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


def report(place: Path) -> dict[str, Any]:
    found = json.loads((place / "outputs/check-data/recipe/report.json").read_text())
    assert isinstance(found, dict)
    return found


def test_a_sound_recipe_would_start(place, capsys):
    assert main(["check-data", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    assert "detection: VOC boxes: 5 images, 10 boxes" in out
    assert "Classes: 2; they learn 1 from boxes, 0 from image labels, 1 from both" in out
    found = report(place)
    assert found["starts"] is True
    source = found["sources"][0]
    assert source["classes"] == {"cat": 5, "dog": 5}
    assert source["image_sizes"] == {"64 x 48": 5}
    # sides are roots of areas: the cats' are 10 … 14 x 20 px, the dogs' 26 x 26
    assert source["box_side_px"]["least"] == round(200**0.5, 3)
    assert source["box_side_px"]["most"] == 26
    assert source["objects_per_image"]["median"] == 2
    assert source["boxes_by_area"]["small, below 32 x 32 px"] == 10
    page = (place / "outputs/check-data/recipe/index.html").read_text()
    assert "Training would start." in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing from elsewhere
    pictures = re.findall(r"data:image/\w+;base64,([^\"]+)", page)
    assert len(pictures) == 5  # labels of three sources, a batch of either kind
    for picture in pictures:
        data = np.frombuffer(base64.b64decode(picture), np.uint8)
        assert cv2.imdecode(data, cv2.IMREAD_COLOR) is not None


def test_everything_faulty_is_counted_and_named(place, capsys, write_voc):
    (place / "boxes/b1.jpg").write_bytes(b"no image")
    write_voc(place / "boxes", "flat", [("cat", 9, 9, 9, 20), ("cat", 100, 1, 120, 9)])
    (place / "held/h.jpg").write_bytes((place / "boxes/b2.jpg").read_bytes())
    (place / "named/cat/again.png").write_bytes((place / "named/cat/1.png").read_bytes())
    assert main(["check-data", "recipe.yaml"]) == 0
    out = capsys.readouterr().out
    found = report(place)
    source = found["sources"][0]
    assert source["fault_kinds"] == {
        "boxes without an area": 1, "boxes outside their image": 1,
    }  # fmt: skip
    assert "b1.jpg: not a readable image" in source["unreadable"][0]
    assert "flat.xml: object 1 has no area, skipped" in out
    same = [{part for part, _ in group} for group in found["same_files"]]
    assert sorted(map(sorted, same)) == [["classification"], ["detection", "test"]]
    assert "2 images there more than once, 1 of them in several parts" in out


def test_what_keeps_training_from_starting_decides_the_exit_code(place, capsys, write_voc):
    write_voc(place / "boxes", "x", [("cta", 1, 1, 9, 9)])
    (place / "named/bird").mkdir()
    write_image(place / "named/bird/1.png")
    assert main(["check-data", "recipe.yaml", "--data.test.root", "nowhere"]) == 2
    said = capsys.readouterr()
    assert "training would not start:" in said.err
    assert "x.xml: object 1: label 'cta' is not in the tree; did you mean 'cat'?" in said.err
    assert "label 'bird' is not in the tree" in said.err
    # `fit` does not need what only `test` reads: told, yet no reason
    assert "folder 'nowhere' not found" in said.out
    assert "folder 'nowhere' not found" not in said.err
    assert "detection: VOC boxes: 6 images" in said.out  # all was read all the same
    assert report(place)["starts"] is False
    assert main(["fit", "--config", "recipe.yaml", "--trainer.devices=1"]) == 2


def test_weights_to_start_from_and_sizes_are_looked_at_too(place, capsys):
    assert main(["check-data", "recipe.yaml", "--model.pretrained", "gone.weights"]) == 2
    assert "model.pretrained 'gone.weights' not found" in capsys.readouterr().err
    write_image(place / "boxes/b1.jpg", 32, 24)  # annotated at 64 x 48
    assert main(["check-data", "recipe.yaml"]) == 0
    assert "b1.jpg: is 32 x 24, its annotation says 64 x 48" in capsys.readouterr().out
    source = report(place)["sources"][0]
    assert source["fault_kinds"] == {"sizes that are not the image's": 1}
    assert [row["name"] for row in report(place)["classes"]] == ["cat", "dog"]
    assert report(place)["classes"][0]["images"] == {"cat": 3}


def test_what_a_folder_sets_apart_is_checked_too(place, capsys, write_voc):
    write_voc(place / "split/train", "a", [("cat", 1, 1, 9, 9)])
    write_voc(place / "split/test", "b", [("cat", 1, 1, 9, 9)])
    (place / "split/test/b.jpg").write_bytes((place / "split/train/a.jpg").read_bytes())
    assert main(["check-data", "split"]) == 0
    out = capsys.readouterr().out
    assert "test: VOC split (test): 1 images" in out
    assert "1 images there more than once, 1 of them in several parts" in out


def test_a_dataset_alone_is_checked_by_its_own_names(place, capsys):
    assert main(["check-data", "named"]) == 0
    assert "classification: image folder named: 3 images" in capsys.readouterr().out
    assert main(["check-data", "boxes", "--output", "there"]) == 0
    assert (place / "there/index.html").is_file()
    assert main(["check-data", "nothing"]) == 2
    assert "'nothing': no such recipe or dataset" in capsys.readouterr().err
    (place / "empty").mkdir()
    assert main(["check-data", "empty"]) == 2
    assert "no images with boxes recognised" in capsys.readouterr().err


# --- batch


def test_any_step_is_what_training_reads_there(place, capsys):
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
    # what the loader of a training at that step gives
    data.num_workers = 0
    batches = {batch.step: batch for batch in data.train_dataloader()}
    alone = data.batch(2)
    assert (batches[2].images == alone.images).all()
    assert batches[2].sample_ids.tolist() == alone.sample_ids.tolist()
    size = int(re.findall(r"image size: (\d+) px", out)[0])
    assert size in (64, 96, 128)
    picture = cv2.imread(str(place / "outputs/batch/recipe-6-1.png"))
    assert picture is not None
    scale = 224 // size
    assert picture.shape[0] == size * scale + 12


def test_several_sources_stand_in_a_recipe_as_a_list(place, capsys, write_voc):
    write_voc(place / "more", "m", [("chat", 1, 1, 20, 20)])
    kind = "yolo_lightning.datamodules."
    listed = RECIPE.replace(
        "detection: {class_path: yolo_lightning.datamodules.VOCFolder, init_args: {root: boxes}}",
        f"detection:\n      - {{class_path: {kind}VOCFolder, init_args: {{root: boxes}}}}\n"
        f"      - class_path: {kind}VOCFolder\n"
        "        init_args: {root: more, mapping: {chat: cat}}",
    )
    (place / "listed.yaml").write_text(listed)
    override = ["--data.detection_batch_size=12", "--trainer.devices=1"]
    assert main(["batch", "listed.yaml", *override]) == 0
    out = capsys.readouterr().out
    assert "12 images, detection" in out
    assert out.count("/more/m.jpg") == 2  # two passes over five and one images
    assert main(["check-data", "listed.yaml"]) == 0
    out = capsys.readouterr().out
    assert "detection: VOC boxes: 5 images" in out
    assert "detection: VOC more: 1 images" in out
    assert "names that met: cat = chat (cat)" in out
    short = ["--trainer.max_steps=2", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "listed.yaml", *override, *short]) == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--step", "-1"], "--step is -1; allowed: 0 or more, below"),
        (["--rank", "2"], "--rank is 2 of 2; allowed: 0 … 1"),
        (["--trainer.devices", "auto"], "trainer.devices is 'auto', another number on each"),
        (["--trainer.devices", "4", "--rank", "4"], "--rank is 4 of 4; allowed: 0 … 3"),
        (["--world-size", "3"], "4 images cannot be shared equally by 3 ranks"),
        (["--data.detection.root", "gone"], "folder 'gone' not found"),
    ],
)
def test_batches_that_cannot_be_are_refused(place, capsys, argv, said):
    assert main(["batch", "recipe.yaml", *argv]) == 2
    assert said in capsys.readouterr().err


def test_every_recipe_of_ours_has_a_first_batch(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(REPO)
    output = str(tmp_path / "p.png")
    assert main(["batch", "recipes/quickstart.yaml", "--step", "1", "--output", output]) == 0
    assert "16 images, classification" in capsys.readouterr().out
    picture = cv2.imread(output)
    assert picture is not None
    assert picture.shape[1] > 6 * 192
