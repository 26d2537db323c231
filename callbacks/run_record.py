"""What a run needs to be understood, beside its checkpoints and in its MLflow run."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.utilities import rank_zero_warn

from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint
from yolo_lightning.callbacks.preemption import Preempted
from yolo_lightning.checkpoints.io import LAST, PREVIOUS
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.serving.mlflow_model import save_model
from yolo_lightning.tracking.journal import FOLDER
from yolo_lightning.tracking.logger import RunLogger, run_loggers
from yolo_lightning.tracking.provenance import device_name, git_state, versions
from yolo_lightning.tracking.store import without_password


class RunRecord(pl.Callback):
    """Save the recipe as written and as resolved, and keep the MLflow run's account of itself.

    Args:
        folder: the run's own folder.
        written: the recipe files, byte for byte, and the command line: name and text each.
        resolved: every value that holds, nested.
        recipe: what the recipe is called.
    """

    def __init__(
        self, folder: Path, written: dict[str, str], resolved: dict[str, Any], recipe: str = "run"
    ) -> None:
        self.folder, self.written, self.resolved = folder, written, resolved
        self.recipe = recipe

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the files and the parameters, on rank 0."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        resumed = (self.folder / "resolved.yaml").exists()
        # the copies of a resumed run stand beside the first ones
        prefix = f"resumed-{_next_number(self.folder)}-" if resumed else ""
        texts = {**self.written, "resolved.yaml": yaml.safe_dump(self.resolved, sort_keys=False)}
        for name, text in texts.items():
            (self.folder / f"{prefix}{name}").write_text(without_password(text), encoding="utf-8")
        for logger in run_loggers(trainer):
            logger.log_hyperparams(self._parameters())
            for name in texts:
                logger.log_file(self.folder / f"{prefix}{name}", "recipe")

    def _parameters(self) -> dict[str, Any]:
        """Return the recipe without what belongs to one start of it, or is said by the data."""
        values = {key: value for key, value in self.resolved.items() if key != "ckpt_path"}
        model = dict((values.get("model") or {}).get("init_args") or {})
        data = (values.get("data") or {}).get("init_args") or {}
        if "image_size" in data:  # the model takes it over
            model.pop("image_size", None)
            values["model"] = {**values["model"], "init_args": model}
        return values

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the run runs on and learns from, once all of it is there."""
        loggers = run_loggers(trainer)
        if not loggers or not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        inputs: list[dict[str, Any]] = data.inputs() if hasattr(data, "inputs") else []
        tags = {
            "recipe": self.recipe,
            "run_folder": str(self.folder),
            "device": device_name(trainer.strategy.root_device),
            "world_size": str(trainer.world_size),
            "precision": str(trainer.precision),
            **(git_state(Path.cwd()) or git_state(Path(__file__).parent)),
            **{f"version.{name}": text for name, text in versions().items()},
            **_data_tags(inputs),
            "mlflow.note.content": self._note(inputs),
        }
        files = self._tables(pl_module)
        for logger in loggers:
            logger.set_tags(tags)
            logger.log_datasets([_dataset(one) for one in inputs])
            for path, folder in files:
                logger.log_file(path, folder)

    def _tables(self, module: Any) -> list[tuple[Path, str]]:
        """Write the tree and the anchors as files; return these, and their folders in the run."""
        written = []
        if (tree := getattr(module, "tree", None)) is not None:
            (self.folder / "tree.tsv").write_text(tree.text(), encoding="utf-8")
            written.append((self.folder / "tree.tsv", "tree"))
        network = getattr(module, "network", None)
        if (anchors := getattr(network, "anchors_wh_cell", None)) is not None:
            path = self.folder / "anchors.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("width_cell", "height_cell"), *anchors.tolist()])
            written.append((path, "anchors"))
        return written

    def _note(self, inputs: list[dict[str, Any]]) -> str:
        """Return what the run's page says about it, as Markdown."""
        recipe = self.written.get("recipe.yaml", "")
        comment = []
        for line in recipe.splitlines():
            if not line.startswith("#"):
                break
            comment.append(line.removeprefix("#").removeprefix(" "))
        purpose = "\n".join(comment).split("\n\n")[0] if comment else ""
        rows = [
            f"| {one['use']} | {one['holds']} | {one['name']} | {one['images']:,} "
            f"| {one['labelled']:,} | {one['nodes']:,} | `{one['fingerprint']}` |"
            for one in inputs
        ]
        table = ["| | holds | source | images | labelled | classes | fingerprint |",
                 "| --- | --- | --- | --- | --- | --- | --- |", *rows]  # fmt: skip
        command = self.written.get("command.txt", "").strip()
        return "\n".join(
            [f"# {self.recipe}", "", purpose, "", *table, "", f"`{command}`", "",
             f"Everything of this run lies in `{self.folder}`."]
        )  # fmt: skip

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say from which step on training runs, and whether it repeats what a kill cut off."""
        own = self.folder / "checkpoints"
        path = Path(str(trainer.ckpt_path)) if trainer.ckpt_path else None
        newest = path is None or (path.name in (LAST, PREVIOUS) and path.parent == own)
        for logger in run_loggers(trainer):
            logger.begin(trainer.global_step, repeats=newest)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Name the MLflow run in the checkpoint, once the store has."""
        for logger in run_loggers(trainer)[:1]:
            if logger.run_id is not None:
                checkpoint["mlflow_run_id"] = logger.run_id

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the best checkpoint as a model, or the last one where none is chosen."""
        loggers = run_loggers(trainer)
        if not loggers or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        path = Path(best) if best else LastCheckpoint.path(trainer)
        for logger in loggers:
            try:
                self._log_model(logger, path, trainer)
            except Exception as error:  # tracking may fail, training may not
                rank_zero_warn(f"{path} is no MLflow model of the run: {error}")

    def _log_model(self, logger: RunLogger, path: Path, trainer: pl.Trainer) -> None:
        if not path.is_file():
            return
        source = getattr(trainer.datamodule, "validation", None)  # type: ignore[attr-defined]
        first = source.read(0) if source is not None and len(source) else None
        example = first[0] if isinstance(first, tuple) else getattr(first, "image", None)
        folder = self.folder / FOLDER / "model.part"
        save_model(path, folder, example)
        held = read_checkpoint(path)
        name = held["module"].removesuffix("Module").lower()
        logger.log_model(folder, name, held["global_step"])

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Tell a training that was stopped from one that failed."""
        status = ""
        if isinstance(exception, Preempted):
            status = "RUNNING" if exception.requeued else "KILLED"
        elif isinstance(exception, KeyboardInterrupt):
            status = "KILLED"
        for logger in run_loggers(trainer):
            logger.ends_as(status)


def _data_tags(inputs: list[dict[str, Any]]) -> dict[str, str]:
    """Return fingerprints and node counts, numbered where a use has several sources."""
    tags: dict[str, str] = {}
    for one in inputs:
        name = f"data.{one['use']}.{one['holds'].replace(' ', '_')}"
        number = 2
        while f"{name}.fingerprint" in tags:
            name = f"{name.rstrip('0123456789-')}-{number}"
            number += 1
        tags |= {f"{name}.{key}": str(one[key]) for key in ("fingerprint", "images", "nodes")}
    return tags


def _dataset(one: dict[str, Any]) -> dict[str, Any]:
    """Return a source as MLflow describes datasets."""
    shown = {key: one[key] for key in ("holds", "images", "labelled", "nodes")}
    return {
        "use": one["use"],
        "dataset": {
            "name": one["name"][-500:],
            "digest": one["fingerprint"],
            "source_type": "local",
            "source": yaml.safe_dump({"name": one["name"]}),
            "profile": yaml.safe_dump(shown, sort_keys=False),
        },
    }


def _next_number(folder: Path) -> int:
    return 1 + len(list(folder.glob("resumed-*-resolved.yaml")))
