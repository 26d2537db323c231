"""A short training on generated shapes."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.datamodules import ShapesDetection
from yolo_lightning.tracking.logger import RunLogger

NAMES = ["ring", "circle"]


TREE = [("n13875392", "-", "ring"), ("n13873502", "-", "circle")]


class Remembered(RunLogger):
    """Keeps what a run logger is given, and has no store."""

    name = version = run_id = "run"
    save_dir = root_dir = None

    def __init__(self) -> None:
        self.pictures: list[tuple[str, Any, int]] = []
        self.folders: list[tuple[Path, str]] = []

    def log_picture(self, name, image, step) -> None:
        self.pictures.append((name, image, step))

    def log_folder(self, path, folder) -> None:
        self.folders.append((Path(path), folder))

    def log_metrics(self, *args, **options) -> None:
        """Do nothing."""

    log_hyperparams = log_graph = finalize = after_save_checkpoint = save = log_metrics


class Watched(DetectorModule):
    """Remember with which weights images are looked at, and what else could be changed by that."""

    def __init__(self, **options) -> None:
        super().__init__(
            TREE, [(1.5, 1.5), (3, 3)], "small", 8, 4, image_size=64, learning_rate=0.01, **options
        )
        self.looked: list[tuple[float, bool]] = []
        self.measured: list[float] = []

    def _sum(self) -> float:
        return float(sum(p.double().abs().sum() for p in self.parameters()))

    def describe(self, *args, **options):
        self.looked.append((self._sum(), self.training))
        return super().describe(*args, **options)

    def validation_step(self, batch, batch_idx) -> None:
        self.measured.append(self._sum())
        super().validation_step(batch, batch_idx)


def data_of(validation: Any = None) -> CombinedDataModule:
    return CombinedDataModule(
        TREE,
        ShapesDetection(length=8, image_size=64, classes=NAMES),
        validation=validation or ShapesDetection(5, NAMES, image_size=64, seed=5),
        detection_batch_size=2,
        image_size=64,
        num_workers=0,
    )


def train(
    callbacks: Any,
    data: Any = None,
    module: Any = None,
    loggers: Any = None,
    **options,
) -> Any:
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        **{
            "max_steps": 6, "max_epochs": -1, "val_check_interval": 2, "accelerator": "cpu",
            "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False, "callbacks": callbacks, **options,
        },
    )  # fmt: skip
    trainer.loggers = [Remembered()] if loggers is None else loggers
    trainer.fit(module or Watched(), data or data_of())
    return trainer
