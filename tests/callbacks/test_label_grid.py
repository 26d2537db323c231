"""`LabelGrid`: the first batches with their labels."""

from typing import Any

import cv2
import lightning.pytorch as pl
import numpy as np
import pytest

from tests.helpers.training import NAMES, TREE, make_datamodule, train
from yolo_lightning import CombinedDataModule
from yolo_lightning.callbacks import MultiScale
from yolo_lightning.callbacks.label_grid import LabelGrid
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels


class FirstImages(pl.Callback):
    """Keeps the first image of each kind of batch."""

    def __init__(self) -> None:
        self.images: dict[str, Any] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        image = batch.images[0].permute(1, 2, 0).numpy()
        self.images.setdefault(type(batch).__name__, image)


def joint_data() -> CombinedDataModule:
    labels = ShapesImageLabels(length=4, classes=NAMES, image_size=64)
    return CombinedDataModule(
        TREE, ShapesDetection(length=8, image_size=64, classes=NAMES), classification=labels,
        validation=ShapesDetection(5, NAMES, image_size=64, seed=5), detection_batch_size=2,
        classification_batch_size=3, image_size=64, num_workers=0,
    )  # fmt: skip


def test_both_kinds_are_drawn_as_the_network_receives_them(tmp_path):
    first = FirstImages()
    train([MultiScale([32]), LabelGrid(), first], joint_data(), default_root_dir=tmp_path)
    for kind, name, count in (
        ("DetectionBatch", "training_boxes.jpg", 2),
        ("ClassificationBatch", "training_labels.jpg", 3),
    ):
        drawn = cv2.cvtColor(cv2.imread(str(tmp_path / name)), cv2.COLOR_BGR2RGB)
        # images of 32 px, 7 times as large, with gaps of 6 px
        assert drawn.shape == (236, 6 + count * 230, 3)
        tile = drawn[6:230, 6:230][3::7, 3::7].astype(int)
        difference = np.abs(tile - first.images[kind]).mean(axis=2)
        assert np.median(difference) < 10, "JPEG changes little; labels cover a part"
        assert difference.max() > 60, "there are labels"


def test_the_batches_of_the_first_process_stay(tmp_path):
    path = tmp_path / "training_boxes.jpg"
    path.write_text("of the first process")
    train([LabelGrid()], default_root_dir=tmp_path)
    assert path.read_text() == "of the first process"


def test_an_error_becomes_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr("yolo_lightning.callbacks.label_grid.draw_batch", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="cannot draw the first batch: ZeroDivisionError"):
        trainer = train([LabelGrid()], make_datamodule(), default_root_dir=tmp_path)
    assert trainer.global_step == 6
