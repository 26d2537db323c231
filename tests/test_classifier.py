"""The classifier: training, metrics, pretrained weights, and the command `classify`."""

import json
import os
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.helpers.darknet import write_values
from tests.helpers.hostile_images import fifo, png_texts, progressive_jpeg
from tests.helpers.images import write_image
from yolo_lightning import ClassifierModule, CombinedDataModule, WordTree, load
from yolo_lightning.batches import ClassificationBatch
from yolo_lightning.boxes import letterbox_geometry
from yolo_lightning.checkpoints.pretrained import load_pretrained
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.cli import recipe as cli
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import ImageFolder
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.tree_accuracy import KINDS
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.images import read_image
from yolo_lightning.inference.classification import class_logits, classify, prepare
from yolo_lightning.models.backbones import SMALL, detector_layers
from yolo_lightning.models.layers import layers_to_rows
from yolo_lightning.models.networks import Classifier, YOLOv2
from yolo_lightning.tree.wordtree import Row

TREE: list[Row] = [
    ("pet", "-", "pet"), ("cat", "pet", "cat"), ("dog", "pet", "dog"), ("car", "-", "car"),
]  # fmt: skip

RECIPE = """
model:
  class_path: yolo_lightning.ClassifierModule
  init_args:
    tree: {tree}
    backbone: [[conv, 4], [pool], [conv, 8], [pool]]
    learning_rate: 0.05
data:
  class_path: yolo_lightning.CombinedDataModule
  init_args:
    tree: ${{...model.init_args.tree}}
    classification:
      class_path: yolo_lightning.datamodules.ImageFolder
      init_args: {{root: train}}
    validation:
      class_path: yolo_lightning.datamodules.ImageFolder
      init_args: {{root: val}}
    classification_batch_size: 4
    image_size: 32
    num_workers: 0
trainer:
  max_epochs: 2
  accelerator: cpu
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  default_root_dir: runs
  callbacks:
    - class_path: yolo_lightning.callbacks.LastCheckpoint
"""


@pytest.fixture
def folders(workplace: Path) -> Path:
    """Two classes that differ in brightness, and one that no test image shows."""
    for split, count in (("train", 6), ("val", 5)):
        for k in range(count):
            write_image(workplace / split / "cat" / f"{k}.png", 40, 36, 20 + k)
            write_image(workplace / split / "dog" / f"{k}.png", 36, 40, 220 + k)
    return workplace


@pytest.mark.parametrize("tree", ["[cat, dog, car]", "tree.tsv"])
def test_a_classifier_trains_and_logs_accuracy_per_class(folders, capsys, tree):
    Path("tree.tsv").write_text("".join("\t".join(row) + "\n" for row in TREE))
    Path("r.yaml").write_text(RECIPE.format(tree=tree))
    # 120 steps: running statistics keep 0.99 of their value a step
    assert main(["fit", "--config", "r.yaml", "--trainer.max_epochs=40"]) == 0
    capsys.readouterr()
    assert main(["test", "--config", "r.yaml"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^test/top1 +1\.000$", output, re.M)
    assert re.search(r"^test/top5 +1\.000$", output, re.M)
    rows = [line.split() for line in output.splitlines() if line.startswith(("cat ", "dog "))]
    table = {name: (accuracy, images) for name, accuracy, images in rows}
    assert set(table) == {"cat", "dog"}  # no image shows a car
    along_tree = "along the tree: depth1 1.000, depth2 1.000, right 1.000, not specific enough"
    assert (along_tree in output) == (tree == "tree.tsv")
    assert all(float(value) > 0.9 for value, _ in table.values())
    (folder,) = Path("runs").glob("*/test-001")
    assert f"report: {folder}" in output
    written = json.loads((folder / "metrics.json").read_text())
    assert written["per_class"]["cat"] == {"name": "cat", "images": 5, "top1": 1, "top5": 1}
    assert written["metrics"]["top1"] == 1
    assert (written["command"], written["images"], written["image_size"]) == ("test", 10, 32)
    assert ("depth1" in written["metrics"]) == (tree == "tree.tsv")
    lines = (folder / "per_class.csv").read_text().splitlines()
    assert lines == ["key,name,images,top1,top5", "cat,cat,5,1,1", "dog,dog,5,1,1"]
    assert main(["test", "--config", "r.yaml", "--report.level", "1"]) == 2
    assert "report: level, confidence and seen_classes need a detector" in capsys.readouterr().err
    (checkpoint,) = Path("runs").glob("*/checkpoints/last.ckpt")
    held = read_checkpoint(checkpoint)
    assert held["module"] == "ClassifierModule"
    assert held["hyper_parameters"]["image_size"] == 32
    assert main(["classify", str(checkpoint), "val/cat/0.png", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["classes"][0]["key"] == "cat"
    assert ("path" in result) == (tree == "tree.tsv")


def test_metrics_by_hand(monkeypatch):
    module = ClassifierModule(TREE, layers_to_rows(SMALL))
    logged: dict[str, Any] = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value}))
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    # columns: pet, cat, dog, car
    probs = [[0.8, 0.6, 0.4, 0.2], [0.3, 0.4, 0.6, 0.7], [0.9, 0.6, 0.4, 0.1], [0.9, 0.9, 0.1, 0.1]]
    monkeypatch.setattr(module, "forward", lambda images: torch.tensor(probs).log())
    # labels of the dataset: pet, cat, dog; the fourth image is padding
    labels, ids = torch.tensor([1, 2, 0, 2]), torch.tensor([0, 1, 2, -1])
    module.evaluation.set_labels(torch.tensor([0, 1, 2]))
    module.validation_step(ClassificationBatch(torch.zeros(4, 3, 8, 8), ids, labels), 0)
    module.on_validation_epoch_end()
    # the dog is more probable than the cat; a pet is always one of the two
    assert float(logged["val/top1"]) == pytest.approx(2 / 3)
    assert float(logged["val/top5"]) == 1
    assert set(logged) <= set(module.metric_names())
    rows = module.evaluation.per_class
    assert {key: (row["images"], row["top1"], row["top5"]) for key, row in rows.items()} == {
        "pet": (1, 0, 1), "cat": (1, 1, 1), "dog": (1, 1, 1),
    }  # fmt: skip
    # the cat is named pet (0.48 is below a half), the dog a car, the pet a cat
    kinds = {name: float(logged[f"val/{name}"]) for name in KINDS}
    assert kinds == pytest.approx(
        {"right": 1 / 3, "not_specific_enough": 1 / 3, "wrong_leaf": 0, "wrong_branch": 1 / 3}
    )
    assert logged["val/depth1"] == pytest.approx(2 / 3)
    assert logged["val/depth2"] == pytest.approx(1 / 2)


def test_a_classifier_is_trained_on_labels_only(folders, capsys, write_voc):
    write_voc(Path("boxes"), "a", [("cat", 2, 2, 20, 20)])
    recipe = RECIPE.format(tree="[cat, dog]").replace(
        "    classification:\n",
        "    detection:\n      class_path: yolo_lightning.datamodules.VOCFolder\n"
        "      init_args: {root: boxes}\n    classification:\n",
    )
    Path("r.yaml").write_text(recipe)
    assert main(["fit", "--config", "r.yaml"]) == 2
    assert "data.detection: a classifier is trained on labels only" in capsys.readouterr().err


def network(layers: Any, tree: WordTree, anchors: int = 2, seed: int = 0) -> YOLOv2:
    torch.manual_seed(seed)
    return YOLOv2(layers, len(tree), torch.ones(anchors, 2))


def save_module(path: Path, module: DetectorModule | ClassifierModule) -> Path:
    torch.save(build_checkpoint(module, {}), path)
    return path


def test_darknet_weights_of_a_backbone_initialise_a_detector(tmp_path):
    tree = WordTree.from_names(["a", "b"])
    classifier = Classifier(SMALL, 10)
    backbone = sum(
        t.numel() for n, t in classifier.body.state_dict().items() if "num_batches" not in n
    )
    path = write_values(tmp_path / "w", backbone + 257 * 10)
    net = network(detector_layers(SMALL, 8, 4), tree)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    report = load_pretrained(net, tree, path, len(SMALL))
    assert report.loaded_values == backbone
    text = str(report)
    assert "layers 0 … 10" in text
    assert "initialized  layers 11 … 17; boxes, objectness and classes" in text
    assert "2,570 values: a 1x1 convolution from 256 to 10 channels" in text
    numbers = np.random.default_rng(0).uniform(0.1, 1, backbone).astype("<f4")
    block: Any = net.body[0]
    assert block.norm.bias.tolist() == numbers[:16].tolist()
    last: Any = net.body[10]
    assert last.conv.weight.flatten().tolist() == numbers[-last.conv.weight.numel() :].tolist()
    assert torch.equal(net.class_weight, before["class_weight"])
    assert torch.equal(net.body[11].conv.weight, before["body.11.conv.weight"])  # type: ignore[arg-type, union-attr]


def test_weights_of_another_network_are_rejected_by_their_number(tmp_path):
    tree = WordTree.from_names(["a"])
    path = write_values(tmp_path / "w", 1234)
    with pytest.raises(InputError, match=r"1,234 values; the network has [\d,]+, its body"):
        load_pretrained(network(SMALL, tree), tree, path, len(SMALL))


def test_class_rows_are_copied_by_key_to_a_new_tree(tmp_path):
    old = [("cat", "-", "cat"), ("dog", "-", "dog"), ("fish", "-", "fish")]
    new: list[Row] = [("cow", "-", "cow"), ("dog", "-", "hound"), ("cat", "-", "cat")]
    first = DetectorModule(old, [(1.0, 1.0), (2.0, 2.0)], "small", 8, 4)
    path = save_module(tmp_path / "m.ckpt", first)
    tree = WordTree(new)
    net = network(detector_layers(SMALL, 8, 4), tree, seed=5)
    fresh = net.class_weight[:, 0].clone()
    text = str(load_pretrained(net, tree, path, len(SMALL)))
    theirs = first.network
    assert torch.equal(net.class_weight[:, 1], theirs.class_weight[:, 1])
    assert torch.equal(net.class_weight[:, 2], theirs.class_weight[:, 0])
    assert torch.equal(net.class_bias[:, 2], theirs.class_bias[:, 0])
    assert torch.equal(net.class_weight[:, 0], fresh)
    assert torch.equal(net.box_conv.weight, theirs.box_conv.weight)
    assert "2 of 3 classes, by key" in text
    assert "initialized  1 classes (cow)" in text
    assert "unused       1 classes (fish)" in text


def test_a_classifier_checkpoint_initialises_a_detector(tmp_path):
    classifier = ClassifierModule(["a", "b"], "small")
    tree = WordTree.from_names(["a", "b"])
    net = network(detector_layers(SMALL, 8, 4), tree)
    path = save_module(tmp_path / "c.ckpt", classifier)
    text = str(load_pretrained(net, tree, path, len(SMALL)))
    for k in range(len(SMALL)):
        for name, value in classifier.network.body[k].state_dict().items():
            assert torch.equal(net.body[k].state_dict()[name], value)
    assert "layers 0 … 10" in text
    assert "initialized  layers 11 … 17; boxes and objectness; all 2 classes" in text
    assert "514 values: class_conv.weight, class_conv.bias" in text


def test_layers_after_a_different_layer_are_initialised(tmp_path):
    tree = WordTree.from_names(["a"])
    first = DetectorModule(["a"], [(1.0, 1.0)], "small", 8, 4)
    net = network(detector_layers(SMALL, 8, 2), tree, anchors=1)
    text = str(load_pretrained(net, tree, save_module(tmp_path / "m.ckpt", first), len(SMALL)))
    assert "layers 0 … 12" in text  # the head's two convolutions, up to the passthrough
    assert "initialized  layers 14 … 17; boxes and objectness; all 1 classes" in text
    assert "layer 14, layer 17, box_conv.weight" in text


def test_partial_weights_stay_partial_in_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ClassifierModule(["a"], "small")
    metadata = {"first_missing_layer": 4}  # imported from the first two convolutions
    torch.save(build_checkpoint(module, metadata), "m.ckpt")
    tree = WordTree.from_names(["a"])
    net = Classifier(SMALL, 1)
    text = str(load_pretrained(net, tree, "m.ckpt", len(SMALL)))
    assert "layers 0 … 2" in text
    assert "initialized  layers 4 … 10; all 1 classes" in text
    mine, theirs = net.state_dict(), module.network.state_dict()
    assert torch.equal(mine["body.2.conv.weight"], theirs["body.2.conv.weight"])
    assert not torch.equal(mine["body.4.conv.weight"], theirs["body.4.conv.weight"])
    # the same straight from a file that ends between two layers
    count = sum(
        value.numel()
        for name, value in module.network.state_dict().items()
        if name.startswith(("body.0.", "body.2.")) and "num_batches" not in name
    )
    text = str(load_pretrained(net, tree, write_values(Path("w"), count), len(SMALL)))
    assert f"{count:,} of the network's" in text
    assert "layers 0 … 2" in text


def test_a_checkpoint_of_another_module_is_rejected(folders, capsys, write_voc):
    write_voc(Path("boxes"), "a", [("cat", 2, 2, 20, 20)])
    Path("c.yaml").write_text(RECIPE.format(tree="[cat, dog]"))
    boxes = "{class_path: yolo_lightning.datamodules.VOCFolder, init_args: {root: boxes}}"
    detector = (
        "model:\n  class_path: yolo_lightning.DetectorModule\n  init_args:\n    tree: [cat, dog]\n"
        "    backbone: small\n    head_channels: 8\n    anchors_wh_cell: [[1, 1]]\n"
        "data:\n  class_path: yolo_lightning.CombinedDataModule\n  init_args:\n"
        "    tree: [cat, dog]\n    image_size: 64\n    num_workers: 0\n"
        "    detection_batch_size: 1\n"
    )
    end = "trainer: {max_steps: 1, accelerator: cpu, logger: false, enable_progress_bar: false}\n"
    Path("d.yaml").write_text(f"{detector}    detection: {boxes}\n    test: {boxes}\n{end}")
    save_module(
        Path("c.ckpt"),
        ClassifierModule(["cat", "dog"], [["conv", 4], ["pool"], ["conv", 8], ["pool"]]),
    )
    save_module(Path("d.ckpt"), DetectorModule(["cat", "dog"], [(1.0, 1.0)], "small", 8))
    assert main(["test", "--config", "d.yaml", "--ckpt_path", "c.ckpt"]) == 2
    output = capsys.readouterr().err
    assert "holds a ClassifierModule, the recipe names a DetectorModule" in output
    assert main(["test", "--config", "c.yaml", "--ckpt_path", "d.ckpt"]) == 2
    assert "holds a DetectorModule" in capsys.readouterr().err
    assert main(["test", "--config", "d.yaml", "--ckpt_path", "d.ckpt"]) == 0
    # boxes where labels belong, and none where boxes do
    labels = "{class_path: yolo_lightning.datamodules.ImageFolder, init_args: {root: train}}"
    Path("e.yaml").write_text(f"{detector}    classification: {labels}\n{end}")
    assert main(["fit", "--config", "e.yaml"]) == 2
    assert "data.detection is empty; a detector is trained on images" in capsys.readouterr().err
    wrong = f"--data.validation={boxes}"
    assert main(["fit", "--config", "c.yaml", wrong]) == 2
    output = capsys.readouterr().err
    assert "data.validation: a classifier is evaluated on images with labels" in output


def test_the_network_of_a_recipe_is_not_mixed_with_that_of_the_checkpoint(workplace, monkeypatch):
    monkeypatch.setattr(cli.RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    rows = layers_to_rows(detector_layers(SMALL, 128, 64, "space_to_depth"))
    shapes = WordTree.from_file("recipes/trees/shapes.tsv").rows
    imported = DetectorModule(shapes, [(1.6, 1.7), (2.4, 2.5)], rows, 0, 0)
    save_module(Path("m.ckpt"), imported)
    run = cli.main(["test", "--config", "recipes/quickstart.yaml", "--ckpt_path", "m.ckpt"])
    assert run.model.hparams["head_channels"] == 128
    assert run.model.network.body.layers == imported.network.body.layers


def test_weights_without_a_matching_layer_are_rejected(tmp_path):
    tree = WordTree.from_names(["a"])
    path = save_module(tmp_path / "m.ckpt", ClassifierModule(["a"], [["conv", 3]]))
    with pytest.raises(InputError, match="nothing in it fits"):
        load_pretrained(network(SMALL, tree, 1), tree, path, len(SMALL))
    with pytest.raises(InputError, match="model.pretrained 'gone' not found"):
        load_pretrained(network(SMALL, tree, 1), tree, "gone", len(SMALL))


def test_training_starts_from_a_checkpoint_with_weights_only(folders, capsys):
    Path("r.yaml").write_text(RECIPE.format(tree="[cat, dog]"))
    module = ClassifierModule(["cat", "dog"], [["conv", 4], ["pool"], ["conv", 8], ["pool"]])
    save_module(Path("m.ckpt"), module)
    assert main(["fit", "--config", "r.yaml", "--ckpt_path", "m.ckpt"]) == 0
    output = capsys.readouterr().out
    assert "m.ckpt: contains weights only; training starts from them" in output
    assert "2 of 2 classes, by key" in output
    options = ["--model.pretrained", "gone.ckpt"]
    assert main(["fit", "--config", "r.yaml", *options]) == 2
    assert "model.pretrained 'gone.ckpt' not found" in capsys.readouterr().err


def test_an_imported_checkpoint_can_be_evaluated(folders, capsys):
    Path("r.yaml").write_text(RECIPE.format(tree="[cat, dog]"))
    layer = "[convolutional]\nbatch_normalize=1\nsize=3\npad=1\nactivation=leaky\nfilters="
    pool = "\n[maxpool]\nsize=2\nstride=2\n"
    Path("x.cfg").write_text(
        f"[net]\nwidth=32\nheight=32\n{layer}4{pool}{layer}8{pool}"
        "[convolutional]\nfilters=2\nsize=1\nactivation=linear\n[avgpool]\n[softmax]\n[cost]\n"
    )
    Path("x.names").write_text("cat\ndog\n")
    write_values(Path("x.weights"), 4 * 31 + 8 * 40 + 18)
    argv = ["darknet", "import", "--cfg", "x.cfg", "--weights", "x.weights", "--names", "x.names"]
    assert main([*argv, "--output", "m.ckpt"]) == 0
    for command in ("validate", "test"):
        assert main([command, "--config", "r.yaml", "--ckpt_path", "m.ckpt"]) == 0
    assert "test/top1" in capsys.readouterr().out
    assert main(["fit", "--config", "r.yaml", "--model.pretrained", "x.weights"]) == 0
    assert "462 of the network's 462 values; layers 0 … 2; classes" in capsys.readouterr().out


def test_another_backbone_than_that_of_the_checkpoint_is_rejected(folders, capsys):
    Path("r.yaml").write_text(RECIPE.format(tree="[cat, dog]"))
    save_module(Path("m.ckpt"), ClassifierModule(["cat", "dog"], [["conv", 5], ["pool"]]))
    assert main(["test", "--config", "r.yaml", "--ckpt_path", "m.ckpt"]) == 2
    assert "model.backbone differs from the checkpoint's" in capsys.readouterr().err


def write_noise(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    cv2.imwrite(str(path), pixels)


def test_classify_reads_folders_and_names_unreadable_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_module(Path("m.ckpt"), ClassifierModule(TREE, "small", image_size=64))
    for name in ("a.png", "deep/b.webp", "c.jpg"):
        write_noise(Path("images") / name, 40, 70)
    Path("images/broken.jpg").write_bytes(b"no image")
    Path("images/scans.jpg").write_bytes(progressive_jpeg(101, 64))
    Path("images/texts.png").write_bytes(png_texts(21, 100))
    fifo(Path("images/pipe.jpg"))
    assert main(["classify", "m.ckpt", "images"]) == 2
    output = capsys.readouterr()
    assert [line for line in output.out.splitlines() if line.startswith("images")] == [
        "images/a.png", "images/c.jpg", "images/deep/b.webp",
    ]  # fmt: skip
    assert "images/broken.jpg: not a readable image" in output.err
    assert "images/scans.jpg: 101 scans of 64 x 64 px; allowed: at most 100" in output.err
    assert "images/texts.png: 21 compressed texts; allowed: at most 20" in output.err
    assert "images/pipe.jpg: not a regular file" in output.err
    assert "Traceback" not in output.err


def test_classify_prints_the_path_or_the_leaves_of_a_tree(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ClassifierModule(TREE, "small", image_size=64)
    with torch.no_grad():  # P(pet) = 0.8, P(dog) = 0.8 x 0.9
        module.network.class_conv.weight.zero_()
        assert module.network.class_conv.bias is not None
        module.network.class_conv.bias.copy_(torch.log(torch.tensor([0.8, 0.1, 0.9, 0.2])))
    save_module(Path("m.ckpt"), module)
    write_noise(Path("a.png"), 50, 50)
    assert main(["classify", "m.ckpt", "a.png"]) == 0
    assert capsys.readouterr().out == "a.png\n   80.00 %  pet\n   72.00 %    dog\n"
    assert main(["classify", "m.ckpt", "a.png", "--top", "2"]) == 0
    assert capsys.readouterr().out == "a.png\n   72.00 %  dog\n   20.00 %  car\n"
    assert main(["classify", "m.ckpt", "a.png", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [row["key"] for row in result["classes"]] == ["dog", "car", "cat"]
    assert [round(row["probability"], 2) for row in result["path"]] == [0.8, 0.72]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["gone.ckpt", "a.png"], "checkpoint 'gone.ckpt' not found"),
        (["m.ckpt", "gone.png"], "file or folder 'gone.png' not found"),
        (["m.ckpt", "empty"], "holds no images"),
        (["a.png", "a.png"], "not a checkpoint of this program"),
        (["m.ckpt", "a.png", "--top", "0"], "--top is 0; allowed: 1 or more"),
        (["m.ckpt", "a.png", "--image-size", "100"], "--image-size is 100; allowed: multiples"),
        (["m.ckpt", "a.png", "--device", "cuba"], "device 'cuba'"),
    ],
)
def test_classify_reports_invalid_input(tmp_path, capsys, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    save_module(Path("m.ckpt"), ClassifierModule(TREE, "small"))
    write_noise(Path("a.png"), 40, 40)
    Path("empty").mkdir()
    assert main(["classify", *argv]) == 2
    output = capsys.readouterr().err
    assert message in output
    assert "Traceback" not in output


def test_ways_to_prepare_an_image(tmp_path):
    write_noise(tmp_path / "a.png", 30, 60)
    pixels = torch.from_numpy(read_image(tmp_path / "a.png")[0]).permute(2, 0, 1)[None] / 255
    module = ClassifierModule(TREE, "small", interpolation="darknet")
    frame, stretched, whole = (
        prepare(tmp_path / "a.png", module, (64, 64), way)
        for way in ("letterbox", "stretch", "shorter-side")
    )
    assert frame.shape == stretched.shape == (1, 3, 64, 64)
    assert (frame[:, :, :16] == 0.5).all()
    assert (frame[:, :, 48:] == 0.5).all()
    assert whole.shape == (1, 3, 64, 128)
    corners = (..., [0, 0, -1, -1], [0, -1, 0, -1])
    for resized in (frame[:, :, 16:48], stretched, whole):
        torch.testing.assert_close(resized[corners], pixels[corners])


@pytest.mark.parametrize("interpolation", ["area", "darknet"])
def test_classify_and_test_prepare_an_image_alike(tmp_path, interpolation):
    """A large JPEG, which may be decoded at a reduced size."""
    file = tmp_path / "photos/cat/a.jpg"
    write_noise(file, 300, 500)
    source = ImageFolder(str(tmp_path / "photos"))
    data = CombinedDataModule(
        ["cat", "dog"], classification=source, test=source, image_size=64, num_workers=0,
        interpolation=interpolation,
    )  # fmt: skip
    data.setup("test")
    (batch,) = list(data.test_dataloader())
    module = ClassifierModule(["cat", "dog"], "small", interpolation=interpolation)
    ours = prepare(file, module, (64, 64), "crop")
    assert ours.dtype == batch.images.dtype
    assert torch.equal(ours, batch.images)


def test_interpolation_of_a_checkpoint_and_of_the_command_line(folders, capsys):
    """Training copies it from the data to the checkpoint, which `classify` reads."""
    write_noise(Path("a.png"), 100, 100)

    def probability(checkpoint: str, *options: str) -> float:
        assert main(["classify", checkpoint, "a.png", "--json", *options]) == 0
        (result,) = json.loads(capsys.readouterr().out)
        return float(result["classes"][0]["probability"])

    for name in ("area", "darknet"):
        torch.manual_seed(0)
        module = ClassifierModule(["cat", "dog"], "small", image_size=64, interpolation=name)
        with torch.no_grad():
            module.network.class_conv.weight.mul_(3)
        save_module(Path(f"{name}.ckpt"), module)
    area, darknet = probability("area.ckpt"), probability("darknet.ckpt")
    assert abs(area - darknet) > 1e-4
    assert probability("area.ckpt", "--interpolation", "darknet") == darknet
    assert probability("darknet.ckpt", "--interpolation", "area") == area
    Path("r.yaml").write_text(RECIPE.format(tree="[cat, dog]"))
    for options, expected in (([], "area"), (["--data.interpolation", "darknet"], "darknet")):
        assert main(["fit", "--config", "r.yaml", "--trainer.max_steps=1", *options]) == 0
        newest = max(Path("runs").glob("*/checkpoints/last.ckpt"), key=os.path.getmtime)
        assert read_checkpoint(newest)["hyper_parameters"]["interpolation"] == expected


def test_classify_names_an_image_by_the_box_of_the_highest_objectness(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    module = DetectorModule(TREE, [(1.0, 1.0), (2.0, 2.0)], "small", 8, 4, image_size=64).eval()
    with torch.no_grad():
        for weight in (module.network.box_conv.weight, module.network.class_weight):
            weight.zero_()
        bias = module.network.box_conv.bias
        assert bias is not None
        bias.copy_(torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0, 0, 2]))  # the second anchor is surer
        module.network.class_bias.copy_(torch.tensor([[0.5] * 4, [0.8, 0.1, 0.9, 0.2]]).log())
    save_module(Path("d.ckpt"), module)
    write_noise(Path("a.png"), 50, 90)
    assert main(["classify", "d.ckpt", "a.png"]) == 0
    assert capsys.readouterr().out == "a.png\n   80.00 %  pet\n   72.00 %    dog\n"
    assert main(["classify", "d.ckpt", "a.png", "--top", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "a.png\n   72.00 %  dog\n   20.00 %  car\n"


def test_a_detector_names_each_image_of_a_batch_as_it_detects(tmp_path):
    torch.manual_seed(0)
    module = DetectorModule(["a", "b", "c"], [(1.0, 1.0), (2.0, 2.0)], "small", 8, 4).eval()
    with torch.no_grad():
        module.network.box_conv.weight.mul_(40)
        module.network.class_weight.mul_(40)
    images = torch.rand(3, 3, 64, 96)
    logits = class_logits(module, images)
    for image, row in zip(images, logits, strict=True):
        candidates, _ = module._candidates(image[None], torch.tensor([[64, 96]]), 0.0)
        ((_, of_boxes),) = candidates.chunks()
        expected = of_boxes[candidates.objectness.argmax()]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interpolation", ["area", "darknet"])
def test_a_detector_sees_the_whole_image_as_in_detect(tmp_path, capsys, monkeypatch, interpolation):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    module = DetectorModule(
        ["a", "b", "c"], [(1.0, 1.0)], "small", 8, 4, image_size=64, interpolation=interpolation
    ).eval()
    write_noise(Path("a.jpg"), 40, 80)
    ours, size_hw = module.preprocess("a.jpg")
    assert torch.equal(prepare(Path("a.jpg"), module, (64, 64), "letterbox")[0], ours)
    assert letterbox_geometry(size_hw, (64, 64)) == (32, 64, 16, 0)
    save_module(Path("d.ckpt"), module)
    printed = []
    for options in ([], ["--resize", "letterbox"], ["--resize", "crop"]):
        assert main(["classify", "d.ckpt", "a.jpg", "--json", *options]) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1] != printed[2]


def test_classify_rejects_images_that_are_too_large(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = ClassifierModule(TREE, "small", image_size=64, interpolation="darknet")
    save_module(Path("m.ckpt"), module)
    write_noise(Path("thin.png"), 1, 3000)
    assert main(["classify", "m.ckpt", "thin.png", "--resize", "shorter-side"]) == 2
    assert "thin.png: 3000 x 1 px is too thin for shorter-side" in capsys.readouterr().err
    for resize in ("crop", "letterbox"):
        assert main(["classify", "m.ckpt", "thin.png", "--resize", resize]) == 0
        monkeypatch.setattr("yolo_lightning.images.MAX_PIXELS", 1000)
        monkeypatch.setattr("yolo_lightning.inference.classification.MAX_PIXELS", 1000)
        assert main(["classify", "m.ckpt", "thin.png", "--resize", resize]) == 2
        assert "thin.png: 3000 x 1 px, more than " in capsys.readouterr().err
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)


def test_load_restores_the_saved_module(tmp_path):
    module = ClassifierModule(TREE, "small").eval()
    again = load(save_module(tmp_path / "m.ckpt", module))
    saved, loaded = module.state_dict(), again.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():  # a loaded module folds batch norm into the convolutions
        torch.testing.assert_close(again(images), module(images))
    torch.save(
        {"module": "Other", "state_dict": {}, "hyper_parameters": {"tree": []}}, tmp_path / "o"
    )
    with pytest.raises(InputError, match="holds a Other; allowed: DetectorModule, Classif"):
        load(tmp_path / "o")


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_backbone_lr_factor(folders, factor):
    Path("r.yaml").write_text(RECIPE.format(tree="[cat, dog]"))
    module = ClassifierModule(["cat", "dog"], [["conv", 4], ["pool"], ["conv", 8], ["pool"]])
    save_module(Path("m.ckpt"), module)
    options = ["--model.pretrained", "m.ckpt", f"--model.backbone_lr_factor={factor}"]
    assert main(["fit", "--config", "r.yaml", *options]) == 0
    (path,) = Path("runs").glob("*/checkpoints/last.ckpt")
    before, after = module.state_dict(), load(path).state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {"network.class_conv.weight", "network.class_conv.bias"} <= moved
    in_backbone = {k for k in moved if k.startswith("network.body")}
    assert bool(in_backbone) == bool(factor)
    groups = read_checkpoint(path)["optimizer_states"][0]["param_groups"]
    rates = [group["initial_lr"] for group in groups]
    assert rates == [0.05, 0.05, 0.05 * factor, 0.05 * factor]
    # resuming keeps the frozen backbone, and applies the rates and the weight decay of the recipe
    more = [*options, "--trainer.max_epochs=3", "--model.learning_rate=0.01"]
    more += ["--model.weight_decay=0.002"]
    assert main(["fit", "--config", "r.yaml", *more, "--ckpt_path", str(path)]) == 0
    resumed = read_checkpoint(path)
    groups = resumed["optimizer_states"][0]["param_groups"]
    rates = [(group["lr"], group["weight_decay"]) for group in groups]
    slow = 0.01 * factor
    assert rates == [(0.01, 0.002), (0.01, 0.0), (slow, 0.002), (slow, 0.0)]
    if not factor:
        for key in in_backbone | {k for k in before if k.startswith("network.body")}:
            assert torch.equal(before[key], resumed["state_dict"][key]), key


def test_only_children_and_rests_are_named_by_their_parents():
    tree = [
        ("cake", "-", "cake"), ("tool", "-", "tool"), ("donut", "cake", "donut"),
        ("cake/other", "cake", "other cake"), ("saw", "tool", "saw"), ("hand saw", "saw", "a"),
        ("jig saw", "saw", "b"),
    ]  # fmt: skip
    module = ClassifierModule(tree, "small").eval()
    bias = module.network.class_conv.bias
    assert bias is not None
    with torch.no_grad():
        module.network.class_conv.weight.zero_()
        bias.copy_(torch.tensor([0.6, 0.4, 0.3, 0.7, 1.0, 0.9, 0.1]).log())
    result = classify(module, torch.zeros(1, 3, 32, 32), top_k=9)
    named = [(row["name"], round(row["probability"], 4)) for row in result["classes"]]
    # a cake that is no donut: 0.6 x 0.7
    assert named == [("cake", 0.42), ("a", 0.36), ("donut", 0.18), ("b", 0.04)]
    assert [row["name"] for row in result["path"]] == ["cake"]
    with torch.no_grad():
        bias.copy_(torch.tensor([0.4, 0.6, 0.3, 0.7, 1.0, 0.9, 0.1]).log())
    result = classify(module, torch.zeros(1, 3, 32, 32), top_k=9)
    assert [row["name"] for row in result["path"]] == ["tool", "a"]
