"""Four recipes in miniature: a classifier at two sizes, a detector, a joint detector."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.paths import REPO

NAMES = ["classify_small", "classify_large", "detect", "joint"]
TREE = str(REPO / "recipes/trees/shapes.tsv")
SHAPES = "yolo_lightning.datamodules.Shapes"


@dataclass
class Miniature:
    """Sizes of the miniature: `steps` of the four stages, `sizes` of the classifiers' input, px."""

    steps: tuple[int, int, int, int] = (4, 4, 6, 4)
    sizes: tuple[int, int] = (32, 64)
    backbone: Any = "small"
    classes: list[str] | None = None
    boxed_images: int = 16
    labelled_images: int = 24
    evaluated_images: int = 6
    batch_size: int = 4
    labels_batch_size: int = 4
    crops: dict[str, Any] = field(default_factory=dict)  # of images with labels
    head_channels: int = 8
    learning_rates: tuple[float, float, float, float] = (0.05, 0.01, 0.01, 0.01)
    validations: int = 2  # in each stage
    logger: bool = True

    def write(self, folder: Path) -> list[Path]:
        """Write the four recipes, and return their files."""
        files = [folder / f"{name}.yaml" for name in NAMES]
        for number, file in enumerate(files):
            recipe = self._classifier(number) if number < 2 else self._detector(number)
            file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return files

    def _classifier(self, number: int) -> dict[str, Any]:
        model = {"class_path": "yolo_lightning.ClassifierModule", "init_args": self._model(number)}
        data = {
            "classification": self._source("ImageLabels", self.labelled_images, number),
            "validation": self._source("ImageLabels", self.evaluated_images, number, 1_000_001),
            "classification_augmentation": {
                "class_path": "yolo_lightning.datamodules.ClassificationAugmentation",
                "init_args": {"shorter_side": [1.0, 1.25], **self.crops},
            },
        }
        return self._recipe(number, model, data, "val/top1")

    def _detector(self, number: int) -> dict[str, Any]:
        anchors = [[1.6, 1.7], [2.4, 2.5], [3.0, 3.0]] if number == 2 else [[1.6, 1.7], [2.4, 2.5]]
        head = {
            "anchors_wh_cell": anchors,
            # the joint detector has no head, as the authors' YOLO9000
            "head_channels": self.head_channels if number == 2 else 0,
            "passthrough_channels": self.head_channels // 2 if number == 2 else 0,
            "loss": {"anchor_prior_images": self.steps[number] * self.batch_size // 10},
        }
        model = {
            "class_path": "yolo_lightning.DetectorModule",
            "init_args": {**self._model(number), **head},
        }
        data = {
            "detection": self._source("Detection", self.boxed_images, number),
            "validation": self._source("Detection", self.evaluated_images, number, 1_000_001),
            "detection_augmentation": {
                "class_path": "yolo_lightning.datamodules.DetectionAugmentation"
            },
        }
        if number == 3:
            data["classification"] = self._source("ImageLabels", self.labelled_images, number)
        return self._recipe(number, model, data, "val/AP50")

    def _model(self, number: int) -> dict[str, Any]:
        schedule = {"burn_in_steps": self.steps[number] // 10, "total_steps": self.steps[number]}
        return {
            "tree": TREE,
            "backbone": self.backbone,
            "pretrained": None,
            "learning_rate": self.learning_rates[number],
            "momentum": 0.9,
            "weight_decay": 0.0005,
            "schedule": {
                "class_path": "yolo_lightning.schedules.PolynomialDecay",
                "init_args": {**schedule, "power": 1.0},
            },
        }

    def _size(self, number: int) -> int:
        return self.sizes[min(number, 1)]

    def _source(self, kind: str, length: int, number: int, seed: int = 0) -> dict[str, Any]:
        values: dict[str, Any] = {"length": length, "image_size": self._size(number), "seed": seed}
        values["classes"] = self.classes
        return {"class_path": SHAPES + kind, "init_args": values}

    def _recipe(
        self, number: int, model: dict[str, Any], data: dict[str, Any], monitor: str
    ) -> dict[str, Any]:
        size, steps = self._size(number), self.steps[number]
        values = {
            "tree": TREE,
            **data,
            "detection_batch_size": self.batch_size,
            "classification_batch_size": self.labels_batch_size,
            "image_size": size,
            "num_workers": 0,
        }
        logger = {
            "class_path": "yolo_lightning.tracking.RunLogger",
            "init_args": {"experiment_name": NAMES[number], "system_metrics": False},
        }
        best = {"filename": "best", "monitor": monitor, "mode": "max"}
        callbacks: list[dict[str, Any]] = [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {**best, "enable_version_counter": False},
            },
            {
                "class_path": "yolo_lightning.callbacks.LastCheckpoint",
                "init_args": {"every_n_steps": max(1, steps // 4)},
            },
        ]
        return {
            "seed_everything": 0,
            "model": model,
            "data": {"class_path": "yolo_lightning.CombinedDataModule", "init_args": values},
            "trainer": {
                "max_steps": steps,
                "max_epochs": -1,
                "accelerator": "cpu",
                "devices": 1,
                "gradient_clip_val": 10.0,
                "val_check_interval": max(1, steps // self.validations),
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "default_root_dir": f"outputs/{NAMES[number]}",
                "logger": logger if self.logger else False,
                "callbacks": callbacks,
            },
        }
