"""What a run needs to be understood, beside its checkpoints and in its MLflow run."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint
from yolo_lightning.tracking import RunLogger

RUN_ID_FILE = "mlflow_run_id"


class RunRecord(pl.Callback):
    """Save the recipe as written and as resolved, and log both with the best checkpoint.

    Args:
        folder: the run's own folder.
        written: the recipe files, byte for byte, and the command line: name and text each.
        resolved: every value that holds, nested.
    """

    def __init__(self, folder: Path, written: dict[str, str], resolved: dict[str, Any]) -> None:
        self.folder, self.written, self.resolved = folder, written, resolved

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the files and the parameters, on rank 0."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        resumed = (self.folder / "resolved.yaml").exists()
        # the copies of a resumed run stand beside the first ones
        prefix = f"resumed-{_next_number(self.folder)}-" if resumed else ""
        for name, text in self.written.items():
            (self.folder / f"{prefix}{name}").write_text(text, encoding="utf-8")
        resolved = self.folder / f"{prefix}resolved.yaml"
        resolved.write_text(yaml.safe_dump(self.resolved, sort_keys=False), encoding="utf-8")
        logger = trainer.logger
        if not isinstance(logger, RunLogger):
            return
        run_file = self.folder / RUN_ID_FILE
        if not run_file.is_file() or run_file.read_text(encoding="utf-8") != logger.run_id:
            logger.log_hyperparams(self.resolved)
            run_file.write_text(str(logger.run_id), encoding="utf-8")
        logger.experiment.log_artifact(logger.run_id, str(resolved), "recipe")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the best checkpoint, or the last one where none is chosen."""
        logger = trainer.logger
        if not trainer.is_global_zero or not isinstance(logger, RunLogger):
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        path = Path(best) if best else LastCheckpoint.path(trainer)
        if path.is_file():
            logger.experiment.log_artifact(logger.run_id, str(path), "checkpoints")


def _next_number(folder: Path) -> int:
    return 1 + len(list(folder.glob("resumed-*-resolved.yaml")))
