"""How long `LastCheckpoint` holds up a training, against writing in the training's thread."""

import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from tests.benchmarks.rows import Row, Seconds, seconds_of, wall
from yolo_lightning import DetectorModule
from yolo_lightning.batches import DetectionBatch
from yolo_lightning.callbacks import LastCheckpoint


class TimedCheckpoint(LastCheckpoint):
    """Records how long saving a checkpoint takes of a step."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=2)
        self.found: list[Seconds] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *arguments: Any) -> None:
        """Save every second step, as the base class does."""
        took = seconds_of(lambda: super(TimedCheckpoint, self).on_train_batch_end(
            trainer, *arguments))  # fmt: skip
        if trainer.global_step % self.every_n_steps == 0:
            self.found.append(took)


class WriteInThread(pl.Callback):
    """Writes the same checkpoint after every other step, and waits for the disk."""

    def __init__(self, file: Path, pause_s: float) -> None:
        self.file, self.pause_s, self.found = file, pause_s, list[Seconds]()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Write."""
        if trainer.global_step % 2:
            time.sleep(self.pause_s)  # `LastCheckpoint` may still write in another thread
            self.found.append(seconds_of(lambda: self._write(trainer)))

    def _write(self, trainer: pl.Trainer) -> None:
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
        with self.file.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())


def _batch() -> DetectionBatch:
    none = torch.zeros(1, 8, dtype=torch.bool)
    return DetectionBatch(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, dtype=torch.long),
        torch.full((1, 8, 4), 0.5), torch.zeros(1, 8, dtype=torch.long), none, none,
        torch.tensor([[64, 64]]),
    )  # fmt: skip


def measure(tiny: bool = False) -> list[Row]:
    """Return the row, of a network of 200 MB, whose checkpoint has its momentum too."""
    pairs = 2 if tiny else 7
    module = DetectorModule(["a"], "voc", "small" if tiny else "darknet19", image_size=64)
    megabytes = 4 * sum(p.numel() for p in module.parameters()) / 1e6
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (
            TimedCheckpoint(),
            WriteInThread(Path(folder) / "other.ckpt", 0 if tiny else 4),
        )
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=2 * pairs, logger=False, callbacks=[ours, theirs],
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        batches: Any = [_batch()] * 2 * pairs
        trainer.fit(module, DataLoader(batches, batch_size=None))
    # the first save reads weights for the first time, the last one waits until all is written
    ours.found, theirs.found = ours.found[1:-1] or ours.found, theirs.found[1:-1] or theirs.found
    what = f"stall of a training by a checkpoint, network of {megabytes:.0f} MB and its momentum"
    row = Row(what, wall(ours.found, ".2f"), "–", "writing it in the training's thread, with fsync")
    return [row.versus(ours.found, theirs.found)]
