"""A resumed training has the same samples and losses as an uninterrupted one, bit for bit."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers.paths import REPO
from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.callbacks import MultiScale
from yolo_lightning.cli import runs
from yolo_lightning.datamodules import (
    ClassificationAugmentation,
    DetectionAugmentation,
    ShapesDetection,
    ShapesImageLabels,
)
from yolo_lightning.errors import InputError
from yolo_lightning.schedules import PolynomialDecay

pytestmark = pytest.mark.end_to_end

TREE = str(REPO / "recipes/trees/shapes.tsv")
STEPS_PER_EPOCH = 6


class Diary(pl.Callback):
    """Record each step: number, batch type, image size, sample ids, bits of the loss."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        bits = outputs["loss"].view(torch.int32).item()
        size = batch.images.shape[-1]
        ids = batch.sample_ids.tolist()
        self.steps.append((batch.step, type(batch).__name__, size, ids, bits))


def datamodule(workers: int) -> CombinedDataModule:
    return CombinedDataModule(
        TREE,
        ShapesDetection(length=13, image_size=64),
        ShapesImageLabels(length=11, image_size=64),
        validation=ShapesDetection(length=2, image_size=64, seed=5),
        detection_batch_size=4,
        classification_batch_size=4,
        image_size=64,
        steps_per_epoch=STEPS_PER_EPOCH,
        detection_augmentation=DetectionAugmentation(),
        classification_augmentation=ClassificationAugmentation(),
        num_workers=workers,
    )


def train(
    folder: Path,
    epochs: int,
    workers: int = 0,
    ckpt: Path | None = None,
    last_at_largest: int = 0,
) -> Diary:
    pl.seed_everything(1 if ckpt is None else 2, verbose=False)  # weights come from the checkpoint
    schedule = PolynomialDecay(100, power=1, burn_in_steps=5)
    model = DetectorModule(
        TREE, [(1.5, 1.5), (3, 3)], "small", 8, 4, learning_rate=0.01, schedule=schedule
    )
    diary = Diary()
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[
            MultiScale([32, 64], every_n_batches=2, last_batches_at_largest=last_at_largest),
            diary,
            ModelCheckpoint(
                folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last=False
            ),
            ModelCheckpoint(folder, filename="epoch-{epoch}", save_top_k=-1, every_n_epochs=1),
        ],
    )
    trainer.fit(model, datamodule(workers), ckpt_path=ckpt, weights_only=True)
    assert trainer.global_step == epochs * STEPS_PER_EPOCH
    return diary


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, Diary]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, train(folder, epochs=3)


def test_uninterrupted_run_alternates_and_changes_size(uninterrupted):
    _, diary = uninterrupted
    assert [step for step, *_ in diary.steps] == list(range(18))
    kinds = [kind[0] for _, kind, *_ in diary.steps]
    assert "".join(kinds) == "DC" * 9
    assert {size for _, _, size, *_ in diary.steps} == {32, 64}
    epochs = [[ids for *_, ids, _ in diary.steps[k : k + 6]] for k in (0, 6, 12)]
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["step=3", "step=6", "epoch-epoch=0", "step=8", "step=17"])
def test_resumed_steps_equal_uninterrupted_ones(uninterrupted, tmp_path, name, workers):
    folder, diary = uninterrupted
    resumed = train(tmp_path, epochs=3, workers=workers, ckpt=folder / f"{name}.ckpt")
    first_step = 6 if "epoch" in name else int(name.split("=")[1])
    assert resumed.steps == diary.steps[first_step:]


def test_training_can_be_extended_by_an_epoch(uninterrupted, tmp_path):
    folder, _ = uninterrupted
    resumed = train(tmp_path, epochs=4, ckpt=folder / "epoch-epoch=2.ckpt")
    assert [step for step, *_ in resumed.steps] == list(range(18, 24))


def test_last_batches_at_the_largest_size_are_the_same_after_a_resume(uninterrupted, tmp_path):
    """The end follows from the trainer's epochs: batches 13 … 17 of 18."""
    folder, diary = uninterrupted
    resumed = train(tmp_path, 3, ckpt=folder / "step=8.ckpt", last_at_largest=5)
    sizes = [size for _, _, size, *_ in diary.steps]
    assert 32 in sizes[13:]
    assert [size for _, _, size, *_ in resumed.steps] == sizes[8:13] + [64] * 5


@pytest.mark.parametrize("name", [".lock", "mlflow/token", "checkpoints/other", "mlflow/files"])
def test_run_folder_with_a_link_or_a_pipe_is_not_resumed(tmp_path, name):
    """The training would truncate, log or remove what a link names, and wait for a pipe."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "mlflow").mkdir()
    for file in ("resolved.yaml", "checkpoints/last.ckpt"):
        (run / file).touch()
    checkpoint = str(run / "checkpoints/last.ckpt")
    assert runs.checkpoint_run_folder(checkpoint) == runs.tracked_run_folder(checkpoint) == run
    for make in (lambda path: path.symlink_to(tmp_path), os.mkfifo):
        make(run / name)
        for find in (
            lambda: runs.checkpoint_run_folder(checkpoint),
            lambda: runs.tracked_run_folder(checkpoint),
            lambda: runs.prepare_run_folder(tmp_path, None, run),  # a run without a checkpoint
        ):
            with pytest.raises(InputError, match=f"^{run / name}: a .*allowed in a run folder"):
                find()
        (run / name).unlink()
