"""Training and evaluation where a dataset names a class and one below it."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch

from tests.helpers.images import write_image
from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.batches import DetectionBatch
from yolo_lightning.datamodules import COCOJson, VOCFolder
from yolo_lightning.datamodules.source import DetectionSource
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.losses import LossSettings, detection_loss
from yolo_lightning.models.head import HeadOutput
from yolo_lightning.tree.exclusive import ExclusiveNames
from yolo_lightning.tree.wordtree import WordTree

TREE = [
    ("food", "-", "food"), ("sandwich", "food", "sandwich"), ("fruit", "food", "fruit"),
    ("hot dog", "sandwich", "hot dog"), ("club", "sandwich", "club sandwich"),
]  # fmt: skip
SANDWICH, CLUB, HOT_DOG = 1, 4, 3


@pytest.fixture
def photos(tmp_path, write_voc):
    """An image with a sandwich at the top left and a hot dog at the bottom right."""
    folder = tmp_path / "photos"
    boxes = [("sandwich", 1, 1, 32, 32), ("hot dog", 65, 65, 96, 96)]
    write_voc(folder, "a", boxes, size=(96, 96))
    return folder


@pytest.fixture
def module(monkeypatch):
    """A detector that finds both, and is less sure of the sandwich than of the hot dog."""
    anchors = [(1.0, 1.0)]
    raw = torch.zeros(1, 5 + len(TREE), 3, 3)
    raw[0, 4] = -20.0
    raw[0, 4, 0, 0], raw[0, 4, 2, 2] = 3.0, 20.0
    raw[0, 5 + CLUB, 0, 0] = raw[0, 5 + HOT_DOG, 2, 2] = raw[0, 5 + SANDWICH] = 20.0
    module = DetectorModule(TREE, anchors, "small", 8, 4)
    monkeypatch.setattr(module.network, "forward", lambda images: HeadOutput.from_dense(raw, 1))
    return module


def build_data(photos, exclusive_names: bool) -> CombinedDataModule:
    source = VOCFolder(str(photos), exclusive_names=exclusive_names)
    return CombinedDataModule(
        TREE, source, validation=source, detection_batch_size=1, image_size=96, num_workers=0
    )


@pytest.mark.parametrize(("exclusive_names", "expected"), [(True, 1.0), (False, 0.5)])
def test_average_precision_of_a_perfect_detector(photos, module, exclusive_names, expected):
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.validate(module, build_data(photos, exclusive_names), verbose=False)
    rows = module.evaluation.per_class
    assert rows["hot dog"]["AP50"] == 1
    # every hot dog is a sandwich too, and would be a false one with the highest score
    assert rows["sandwich"]["AP50"] == pytest.approx(expected, abs=0.01)


def test_each_image_is_scored_by_the_names_of_its_source(photos, write_voc, module):
    # in the second source, where hot dogs are called sandwiches, P(sandwich) finds both
    others = photos.parent / "others"
    boxes = [("sandwich", 1, 1, 32, 32), ("sandwich", 65, 65, 96, 96)]
    write_voc(others, "b", boxes, size=(96, 96))
    data = CombinedDataModule(
        TREE, validation=[VOCFolder(str(photos)), VOCFolder(str(others))],
        detection_batch_size=1, image_size=96, num_workers=0,
    )  # fmt: skip
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.validate(module, data, verbose=False)
    assert module.evaluation.per_class["sandwich"]["AP50"] == pytest.approx(1, abs=0.01)


def test_a_level_above_keeps_names_apart(module):
    tree = WordTree(
        [
            ("food", "-", "food"), ("sandwich", "food", "sandwich"), ("bun", "sandwich", "bun"),
            ("toast", "sandwich", "toast"), ("hot dog", "bun", "hot dog"),
            ("burger", "bun", "burger"), ("big burger", "burger", "b"), ("small", "burger", "s"),
        ]
    )  # fmt: skip
    labels = [1, 4, 6]  # sandwich, hot dog, big burger
    evaluation = DetectionEvaluation(tree)
    names = ExclusiveNames(tree, [1], [labels])
    evaluation.reset(torch.tensor(labels), torch.full((len(tree),), -1), names)
    levels = {level.suffix: level for level in evaluation.levels}
    probs = torch.tensor([[1.0, 1.0, 0.8, 0.2, 0.3, 0.5, 0.4, 0.1]])
    # sandwich without hot dogs and big burgers; at level 3, both are buns
    expected = {"": [0.3, 0.3, 0.4], "_level3": [0.3, 0.7], "_level2": [1.0]}
    for suffix, values in expected.items():
        found = levels[suffix].class_probs(probs, torch.tensor([0]))
        torch.testing.assert_close(found, torch.tensor([values]))


def test_scores_of_a_source_by_hand(photos, module):
    data = build_data(photos, True)
    data.setup("validate")
    module.evaluation.reset(
        torch.tensor([SANDWICH, HOT_DOG]),
        module.boxed_ancestors(),
        data.exclusive_names(data.validation),
    )
    level = module.evaluation.levels[0]
    probs = torch.tensor([[1.0, 0.9, 0.1, 0.2, 0.7]])
    source = torch.tensor([0])
    torch.testing.assert_close(level.class_probs(probs, source), torch.tensor([[0.7, 0.2]]))
    # at the level of food, both are one class
    (food,) = [level for level in module.evaluation.levels if level.suffix == "_level1"]
    torch.testing.assert_close(food.class_probs(probs, source), torch.tensor([[1.0]]))


@pytest.mark.parametrize("exclusive_names", [True, False])
def test_loss_of_each_source(photos, write_voc, exclusive_names):
    # the first source has no other name below sandwich
    write_voc(photos.parent / "others", "b", [("sandwich", 1, 1, 32, 32)], size=(96, 96))
    write_voc(photos.parent / "hot", "c", [("hot dog", 1, 1, 32, 32)], size=(96, 96))
    sources: list[DetectionSource] = [
        VOCFolder(str(photos.parent / "others")),
        VOCFolder(str(photos), exclusive_names=exclusive_names),
        VOCFolder(str(photos.parent / "hot")),
    ]
    data = CombinedDataModule(
        TREE, detection=sources, detection_batch_size=3, image_size=96, num_workers=0
    )
    data.setup("fit")
    names, batch = data.exclusive_names(data.detection), data.batch(0)
    assert isinstance(batch, DetectionBatch)
    output = HeadOutput.from_dense(torch.zeros(3, 5 + len(TREE), 3, 3), 1)
    anchors, tree = torch.tensor([[1.0, 1.0]]), WordTree(TREE)
    terms = detection_loss(output, batch, anchors, tree, LossSettings(), names)
    # P(sandwich), P(sandwich) - P(hot dog), P(hot dog) twice
    probs = [1 / 2, 1 / 4 if exclusive_names else 1 / 2, 1 / 4, 1 / 4]
    assert float(terms["loss_class"]) == pytest.approx(-sum(map(math.log, probs)), rel=1e-6)


def test_names_that_occur_exclude_each_other(tmp_path):
    write_image(tmp_path / "a.jpg")
    names = ["sandwich", "hot dog", "club sandwich"]
    boxes = [(0, 0), (1, 1)]  # category, and whether it is a crowd
    text = {
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": k, "iscrowd": crowd, "bbox": [1, 1, 20, 20]}
            for k, crowd in boxes
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(text))
    source = COCOJson(str(tmp_path / "a.json"))
    source.bind(WordTree(TREE))
    assert source.nodes.tolist() == [SANDWICH]
    assert source.exclusive_nodes == [SANDWICH, HOT_DOG]
    mixed = COCOJson(str(tmp_path / "a.json"), exclusive_names=False)
    mixed.bind(WordTree(TREE))
    assert mixed.exclusive_nodes == []


@pytest.mark.parametrize("exclusive_names", [True, False])
def test_a_step_of_training(photos, write_voc, exclusive_names):
    boxes = [("sandwich", 1, 1, 32, 32), ("sandwich", 33, 1, 64, 32), ("hot dog", 65, 65, 96, 96)]
    write_voc(photos, "a", boxes, size=(96, 96))
    module = DetectorModule(TREE, [(1.0, 1.0)], "small", 8, 4, learning_rate=0.1)
    before = module.network.class_bias.detach().clone()
    trainer = pl.Trainer(
        logger=False, enable_progress_bar=False, accelerator="cpu", max_steps=1,
        limit_val_batches=0, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, build_data(photos, exclusive_names))
    change = (module.network.class_bias.detach() - before)[0]
    # two boxes say that they are no hot dog, or nothing about it, and one says that it is one
    assert (change[HOT_DOG] < change[CLUB]) == exclusive_names
