"""`RunRecord`: saves the recipe of a run, and describes the run in MLflow."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.utilities import rank_zero_warn

from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint
from yolo_lightning.callbacks.run_description import describe_run
from yolo_lightning.checkpoints.io import LAST, PREVIOUS
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.errors import mask_secrets
from yolo_lightning.signals import Stop
from yolo_lightning.tracking.journal import JOURNAL_FOLDER
from yolo_lightning.tracking.logger import RunLogger, run_loggers
from yolo_lightning.tracking.provenance import git_state, processor_name, versions


class RunRecord(pl.Callback):
    """Save the recipe as written and as resolved, and log parameters, tags and the final model.

    `files` are the texts of the recipe files, unchanged, and of the command line, by name;
    `resolved` are all values of the recipe, nested.
    """

    def __init__(
        self, folder: Path, files: dict[str, str], resolved: dict[str, Any], recipe: str = "run"
    ) -> None:
        self.folder, self.files, self.resolved = folder, files, resolved
        self.recipe = recipe

    def _write_recipe(self, trainer: pl.Trainer) -> None:
        """Write the recipe files, and log them and the parameters."""
        self.folder.mkdir(parents=True, exist_ok=True)
        resumed = (self.folder / "resolved.yaml").exists()
        # a resumed run keeps the files of earlier processes
        prefix = f"resumed-{_next_resume_number(self.folder)}-" if resumed else ""
        texts = {**self.files, "resolved.yaml": yaml.safe_dump(self.resolved, sort_keys=False)}
        for name, text in texts.items():
            (self.folder / f"{prefix}{name}").write_text(mask_secrets(text), encoding="utf-8")
        for logger in run_loggers(trainer):
            logger.log_hyperparams(self._params())
            for name in texts:
                logger.log_artifact(self.folder / f"{prefix}{name}", "recipe")

    def _params(self) -> dict[str, Any]:
        """Return the recipe without values of this process, and without duplicates."""
        values = {key: value for key, value in self.resolved.items() if key != "ckpt_path"}
        model = dict((values.get("model") or {}).get("init_args") or {})
        data = (values.get("data") or {}).get("init_args") or {}
        if model:  # it uses the values of the data
            model = {k: v for k, v in model.items() if k == "tree" or k not in data}
            values["model"] = {**values["model"], "init_args": model}
        return values

    def _write_inputs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the tree and the anchors; log them, tags and datasets."""
        files = self._write_tables(pl_module)
        loggers = run_loggers(trainer)
        if not loggers:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        inputs: list[dict[str, Any]] = data.inputs() if hasattr(data, "inputs") else []
        device = trainer.strategy.root_device
        cores = f", {os.cpu_count()} cores" if device.type == "cpu" else ""
        tags = {
            "recipe": self.recipe,
            "run_folder": str(self.folder),
            "device": processor_name(device) + cores,
            "world_size": str(trainer.world_size),
            "precision": str(trainer.precision),
            **(git_state(Path.cwd()) or git_state(Path(__file__).parent)),
            **{f"version.{name}": version for name, version in versions().items()},
            **_data_tags(inputs),
        }
        for logger in loggers:
            logger.set_tags(tags)
            logger.log_inputs([_to_mlflow_dataset(data) for data in inputs])
            for path, folder in files:
                logger.log_artifact(path, folder)
        self._describe(trainer, pl_module)

    def _write_tables(self, module: Any) -> list[tuple[Path, str]]:
        written = []
        if (tree := getattr(module, "tree", None)) is not None:
            (self.folder / "tree.tsv").write_text(tree.to_text(), encoding="utf-8")
            written.append((self.folder / "tree.tsv", "tree"))
        network = getattr(module, "network", None)
        if (anchors := getattr(network, "anchors_wh_cell", None)) is not None:
            path = self.folder / "anchors.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("width_cell", "height_cell"), *anchors.tolist()])
            written.append((path, "anchors"))
        return written

    def _describe(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        try:
            text = describe_run(trainer, module, self.recipe, self.files, self.folder)
        except Exception as error:  # tracking may fail, training may not
            rank_zero_warn(f"the run has no description: {type(error).__name__}: {error}")
            return
        for logger in run_loggers(trainer):
            logger.set_tags({"mlflow.note.content": text})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write and log the inputs of the run, on rank 0, and tell the loggers the first step.

        Not before: a start that fails on its data or weights leaves no run.
        """
        if trainer.is_global_zero:
            self._write_recipe(trainer)
            self._write_inputs(trainer, pl_module)
        checkpoints = self.folder / "checkpoints"
        path = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
        is_newest = path is None or (path.name in (LAST, PREVIOUS) and path.parent == checkpoints)
        for logger in run_loggers(trainer):
            logger.start_training(trainer.global_step, replay=is_newest)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store the MLflow run id in the checkpoint, if it is known."""
        for logger in run_loggers(trainer)[:1]:
            if logger.run_id is not None:
                checkpoint["mlflow_run_id"] = logger.run_id

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Describe the result, and log the best checkpoint, or else the last one, as a model.

        Resuming a finished run logs what a stop at its last step left out.
        """
        loggers = run_loggers(trainer)
        if not loggers or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._describe(trainer, pl_module)
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        path = Path(best) if best else LastCheckpoint.path(trainer)
        for logger in loggers:
            try:
                self._log_model(logger, path, trainer)
            except Exception as error:  # tracking may fail, training may not
                rank_zero_warn(f"{path} cannot be logged as an MLflow model: {error}")

    def _log_model(self, logger: RunLogger, path: Path, trainer: pl.Trainer) -> None:
        if not path.is_file():
            return
        source = getattr(trainer.datamodule, "validation", None)  # type: ignore[attr-defined]
        first = source.read(0) if source is not None and len(source) else None
        example = first[0] if isinstance(first, tuple) else getattr(first, "image", None)
        from yolo_lightning.serving.mlflow_model import save_model  # imports MLflow

        folder = self.folder / JOURNAL_FOLDER / "model.part"
        save_model(path, folder, example)
        checkpoint = read_checkpoint(path)
        name = checkpoint["module"].removesuffix("Module").lower()
        logger.log_model(folder, name, checkpoint["global_step"])

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Set the final status of an interrupted training, which differs from a failed one."""
        status = ""
        if isinstance(exception, Stop | KeyboardInterrupt):
            status = "RUNNING" if getattr(exception, "requeued", False) else "KILLED"
        for logger in run_loggers(trainer):
            logger.set_final_status(status)
        if run_loggers(trainer) and trainer.is_global_zero and trainer.global_step:
            self._describe(trainer, pl_module)


def _data_tags(inputs: list[dict[str, Any]]) -> dict[str, str]:
    """Return fingerprints and counts, numbered if there are several sources for one use."""
    tags: dict[str, str] = {}
    for data in inputs:
        name = f"data.{data['use']}.{data['holds'].replace(' ', '_')}"
        number = 2
        while f"{name}.fingerprint" in tags:
            name = f"{name.rstrip('0123456789-')}-{number}"
            number += 1
        tags |= {f"{name}.{key}": str(data[key]) for key in ("fingerprint", "images", "nodes")}
    return tags


def _to_mlflow_dataset(data: dict[str, Any]) -> dict[str, Any]:
    profile = {key: data[key] for key in ("holds", "images", "labelled", "nodes")}
    return {
        "use": data["use"],
        "dataset": {
            "name": data["name"][-500:],
            "digest": data["fingerprint"],
            "source_type": "local",
            "source": yaml.safe_dump({"name": data["name"]}),
            "profile": yaml.safe_dump(profile, sort_keys=False),
        },
    }


def _next_resume_number(folder: Path) -> int:
    return 1 + len(list(folder.glob("resumed-*-resolved.yaml")))
