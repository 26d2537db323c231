"""The losses that a training logs: the newest of both kinds, at the steps that are logged."""

from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger

from tests.helpers.paths import REPO
from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels

TREE = str(REPO / "recipes/trees/shapes.tsv")


class Recorder(Callback):
    """The loss of each step, and when to stop."""

    def __init__(self, last_step: int) -> None:
        self.losses: list[float] = []
        self.last_step = last_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        trainer.should_stop = batch.step == self.last_step


class Logger(DummyLogger):
    """What is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.values.setdefault(step, {}).update(metrics)


def train(tmp_path, last_step=100, **options) -> tuple[Recorder, Logger]:
    pl.seed_everything(0, verbose=False)
    data = CombinedDataModule(
        TREE, ShapesDetection(length=16, image_size=64),
        ShapesImageLabels(length=16, image_size=64), detection_batch_size=2,
        classification_batch_size=2, image_size=64, num_workers=0, steps_per_epoch=6,
    )  # fmt: skip
    model = DetectorModule(TREE, [(1.5, 1.5)], "small", 8, 4, learning_rate=0.01)
    recorder, logger = Recorder(last_step), Logger()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=8, accelerator="cpu", log_every_n_steps=2,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[recorder], **options,
    )  # fmt: skip
    trainer.loggers = [logger]
    trainer.fit(model, data)
    return recorder, logger


def test_logged_steps_have_the_newest_losses_of_both_kinds(tmp_path):
    recorder, logger = train(tmp_path)
    logged = {step: values for step, values in logger.values.items() if "train/loss" in values}
    assert list(logged) == [1, 3, 5, 7]
    for step, values in logged.items():  # steps alternate: boxes, labels
        assert values["train/loss"] == pytest.approx(recorder.losses[step - 1])
        assert values["train/cls_loss"] == pytest.approx(recorder.losses[step])
        assert values["train/lr"] == pytest.approx(0.01)
        assert values["train/image_size"] == 64
        terms = [v for name, v in values.items() if name.startswith("train/loss_")]
        assert sum(terms) == pytest.approx(recorder.losses[step - 1], rel=1e-5)


def test_the_step_at_which_a_training_is_stopped_is_logged(tmp_path):
    recorder, logger = train(tmp_path, last_step=4)
    assert len(recorder.losses) == 5
    assert logger.values[4]["train/loss"] == pytest.approx(recorder.losses[4])
    assert logger.values[4]["train/cls_loss"] == pytest.approx(recorder.losses[3])
