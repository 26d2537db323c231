"""Real photographs; skipped without the developers' datasets."""

import json
from pathlib import Path

import pytest

from yolo_lightning import WordTree
from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import CombinedDataModule, ImageFolder, VOCFolder

pytestmark = pytest.mark.data


def test_fruit_reads_every_image_and_reports_37_sizes_of_zero(real_data):
    tree = WordTree.from_names(["apple", "banana", "orange"])
    boxes: list[tuple[int, int]] = []
    faults: list[str] = []
    for split in ("train", "test"):
        source = VOCFolder(str(real_data / "fruit_abo"), split)
        source.bind(tree)
        samples = [source.read(k) for k in range(len(source))]
        boxes.append((len(samples), sum(len(sample.labels) for sample in samples)))
        faults += source.faults
    assert boxes == [(240, 465), (60, 117)]
    assert sum("gives the size as 0 x 0" in fault for fault in faults) == 37


def test_fruit_trains_from_the_command_line(real_data, workplace, capsys):
    options = ["--trainer.max_steps=2", "--data.steps_per_epoch=2", "--trainer.accelerator=cpu"]
    options += [f"--model.pretrained={real_data / 'tiny_darknet/tiny.weights'}"]
    options += ["--trainer.check_val_every_n_epoch=1", "--data.num_workers=0"]
    root = f"--data.detection.root={real_data / 'fruit_abo'}"
    assert main(["fit", "--config", "recipes/fruit.yaml", root, *options]) == 0
    assert "Annotations: 37 repaired or skipped" in capsys.readouterr().out


def test_bccd_image_sets(real_data):
    source = VOCFolder(str(real_data / "bccd"), "train")
    source.bind(WordTree.from_names(["RBC", "WBC", "Platelets"]))
    lines = (real_data / "bccd/ImageSets/Main/train.txt").read_text().split()
    assert len(source) == len(lines)
    for k in range(0, len(source), 20):
        assert len(source.read(k).labels) > 0


def test_pets_give_joint_batches_over_a_tree(real_data):
    pets = real_data / "pets_joint"
    data = CombinedDataModule(
        [("cat", "-", "cat"), ("dog", "-", "dog"), ("Abyssinian", "cat", "Abyssinian"),
         ("Bengal", "cat", "Bengal"), ("american_bulldog", "dog", "american_bulldog")],
        VOCFolder(str(pets / "detection")),
        ImageFolder(str(pets / "classification")),
        validation=VOCFolder(str(pets / "test")),
        detection_batch_size=4, classification_batch_size=4, image_size=96, num_workers=0,
    )  # fmt: skip
    data.setup("fit")
    assert data.boxed_nodes.tolist() == [0, 1]
    assert isinstance(data.validation, VOCFolder)
    assert data.validation.nodes.tolist() == [2, 3, 4]
    batches = iter(data.train_dataloader())
    first, second = next(batches), next(batches)
    assert isinstance(first, DetectionBatch)
    assert isinstance(second, ClassificationBatch)
    assert (first.labels >= 0).any(dim=1).all()
    assert set(second.labels.tolist()) <= {2, 3, 4}


def test_tiny_darknet_classifies_the_dog_as_the_original_program(real_data, workplace, capsys):
    tiny = real_data / "tiny_darknet"
    names = ["--names", str(tiny / "imagenet.shortnames.list")]
    names += ["--labels", str(tiny / "imagenet.labels.list")]
    files = ["--cfg", str(tiny / "tiny.cfg"), "--weights", str(tiny / "tiny.weights")]
    assert main(["darknet", "import", *files, *names, "--output", "tiny.ckpt"]) == 0
    letterbox = ["--resize", "letterbox"]  # as `darknet classifier predict`
    assert main(["classify", "tiny.ckpt", str(tiny / "dog.jpg"), "--json", *letterbox]) == 0
    out = capsys.readouterr().out
    (result,) = json.loads(out[out.index("[\n") :])
    found = [(row["name"], 100 * row["probability"]) for row in result["classes"]]
    assert [name for name, _ in found] == [
        "malamute", "Newfoundland", "dogsled", "standard schnauzer", "Eskimo dog",
    ]  # fmt: skip
    assert [p for _, p in found] == pytest.approx([14.51, 6.09, 5.59, 4.55, 4.05], abs=0.1)
    assert main(["darknet", "export", "tiny.ckpt", "--output", "back"]) == 0
    theirs = (tiny / "tiny.weights").read_bytes()[16:]  # a shorter header
    assert Path("back.weights").read_bytes()[20:] == theirs
