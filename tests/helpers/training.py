"""Short trainings on generated shapes."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.datamodules import ShapesDetection
from yolo_lightning.tracking.logger import RunLogger

NAMES = ["ring", "circle"]
TREE = [("n13875392", "-", "ring"), ("n13873502", "-", "circle")]


class RecordingLogger(RunLogger):
    """Records logged images and folders, and has no store."""

    name = version = run_id = "run"
    save_dir = root_dir = None

    def __init__(self) -> None:
        self.images: list[tuple[str, Any, int]] = []
        self.folders: list[tuple[Path, str]] = []

    def log_image(self, name, image, step) -> None:
        self.images.append((name, image, step))

    def log_artifacts(self, path, folder) -> None:
        self.folders.append((Path(path), folder))

    def log_metrics(self, *args, **options) -> None:
        """Do nothing."""

    log_hyperparams = log_graph = finalize = after_save_checkpoint = save = log_metrics


class RecordingDetector(DetectorModule):
    """Records the sum of the weights at each prediction and validation step."""

    def __init__(self, **options) -> None:
        super().__init__(
            TREE, [(1.5, 1.5), (3, 3)], "small", 8, 4, image_size=64, learning_rate=0.01, **options
        )
        self.predict_weights: list[tuple[float, bool]] = []
        self.validation_weights: list[float] = []

    def _sum(self) -> float:
        return float(sum(p.double().abs().sum() for p in self.parameters()))

    def detect_most_specific(self, *args, **options):
        self.predict_weights.append((self._sum(), self.training))
        return super().detect_most_specific(*args, **options)

    def validation_step(self, batch, batch_idx) -> None:
        self.validation_weights.append(self._sum())
        super().validation_step(batch, batch_idx)


def make_datamodule(validation: Any = None) -> CombinedDataModule:
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
    ckpt_path: Any = None,
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
    trainer.loggers = [RecordingLogger()] if loggers is None else loggers
    module, data = module or RecordingDetector(), data or make_datamodule()
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer
