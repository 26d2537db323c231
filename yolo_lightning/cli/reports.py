"""The report that `validate` and `test` write."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from yolo_lightning.cli import runs
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.evaluation.error_analysis import check_level
from yolo_lightning.evaluation.label_accuracy import LabelAccuracy
from yolo_lightning.evaluation.report import ReportOptions, num_images_read, write_report
from yolo_lightning.tracking.logger import run_loggers
from yolo_lightning.tree.seen_classes import seen_nodes

Evaluation = DetectionEvaluation | LabelAccuracy


def model_evaluation(model: pl.LightningModule) -> Evaluation | None:
    """Return the evaluation of a detector or classifier; None for other models."""
    evaluation = getattr(model, "evaluation", None)
    return evaluation if isinstance(evaluation, Evaluation) else None


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Return metrics as text, a line each, without those of single classes."""
    values = {name: float(value) for name, value in metrics.items() if name.count("/") < 2}
    width = max(map(len, values), default=0) + 2
    return "\n".join(f"{name:<{width}}{value:.3f}" for name, value in values.items())


def apply_report_options(cli: LightningCLI) -> None:
    """Check the options of the report before the evaluation, and set the seen classes.

    Raises:
        InputError: they do not fit the model.
    """
    options, evaluation = _options(cli), model_evaluation(cli.model)
    if not isinstance(evaluation, DetectionEvaluation):
        if options != ReportOptions(folder=options.folder):
            raise InputError(
                "report: level, confidence and seen_classes need a detector; the model is not one"
            )
        return
    check_level(evaluation.tree, options.level)
    if options.seen_classes is not None:
        evaluation.seen_classes = seen_nodes(evaluation.tree, options.seen_classes)


def save_report(cli: LightningCLI, evaluation: Evaluation, recipes: Sequence[str]) -> None:
    """Write the report of `validate` or `test`, print its folder, and log it to the MLflow run."""
    options = _options(cli)
    source = cli.datamodule.test if cli.subcommand == "test" else cli.datamodule.validation
    folder = Path(options.folder) if options.folder else _new_folder(cli, recipes)
    metadata = _metadata(cli, source, recipes)
    lines = write_report(folder, evaluation, metadata, source, options)
    print("\n".join(["", *lines, f"report: {folder}"]))
    for logger in run_loggers(cli.trainer):
        logger.log_artifacts(folder, folder.name)


def _options(cli: LightningCLI) -> ReportOptions:
    options: ReportOptions = cli.config_init[cli.subcommand].report
    return options


def _new_folder(cli: LightningCLI, recipes: Sequence[str]) -> Path:
    """Create a folder in the checkpoint's run folder, or else in the folder of all runs."""
    config = cli.config[cli.subcommand]
    root = runs.checkpoint_run_folder(config.ckpt_path) or runs.runs_root(config, recipes)
    return runs.make_numbered_folder(root, str(cli.subcommand))


def _metadata(cli: LightningCLI, source: Any, recipes: Sequence[str]) -> dict[str, Any]:
    """Return the origin of the figures."""
    trainer = cli.trainer
    batches = trainer.num_test_batches if cli.subcommand == "test" else trainer.num_val_batches
    return {
        "command": cli.subcommand,
        "recipe": Path(recipes[-1]).name if recipes else None,
        "checkpoint": cli.config[cli.subcommand].ckpt_path,
        "image_size": cli.datamodule.image_size,
        "images": num_images_read(batches, cli.datamodule, trainer.world_size, source),
        "seen_classes": _options(cli).seen_classes,
    }
