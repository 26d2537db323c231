"""The quickstart recipe, and options that make its training short."""

from typing import Any

import yaml

from tests.helpers.paths import REPO
from yolo_lightning.cli.recipe_paths import relative_to_recipe

TINY = [
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.accelerator=cpu",
    "--data.detection.length=8",
    "--data.classification.length=8",
    "--data.validation.length=4",
    "--data.test.length=4",
    "--data.detection_batch_size=2",
    "--data.classification_batch_size=2",
    "--data.num_workers=0",
    "--model.head_channels=8",
    "--model.schedule.burn_in_steps=0",
]
QUICK = ["--config", "recipes/quickstart.yaml"]


def quickstart_values() -> dict[str, Any]:
    """Return the values of the quickstart recipe, for a recipe in any folder."""
    values: dict[str, Any] = yaml.safe_load(
        (REPO / "recipes/quickstart.yaml").read_text(encoding="utf-8")
    )
    return relative_to_recipe(values, REPO / "recipes/quickstart.yaml")
