"""The description of a run on its MLflow page: its data, its result and its errors."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from yolo_lightning.callbacks.results_table import ResultsTable
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.evaluation.error_analysis import (
    match_predictions,
    most_confused,
    weakest_classes,
)
from yolo_lightning.evaluation.label_accuracy import LabelAccuracy

_METRICS = {"AP50": "AP50", "AP50_boxed": "boxed", "AP50_unboxed": "unboxed", "AP": "AP",
            "top1": "top-1", "top5": "top-5"}  # fmt: skip


def describe_run(
    trainer: pl.Trainer, module: Any, recipe: str, files: Mapping[str, str], folder: Path
) -> str:
    """Return a description in Markdown; the page shows its first five lines without a click.

    Args:
        trainer: of the run.
        module: that is trained.
        recipe: name of the recipe.
        files: texts of the recipe and the command, by file name.
        folder: run folder.
    """
    results = [c.summary(trainer) for c in trainer.callbacks if isinstance(c, ResultsTable)]  # type: ignore[attr-defined]
    evaluation = getattr(module, "evaluation", None)
    result, errors = "".join(results[:1]), ""
    if result and isinstance(evaluation, DetectionEvaluation | LabelAccuracy):
        result += _last_metrics(evaluation.metrics)
        errors = _describe_errors(evaluation)
    data = trainer.datamodule  # type: ignore[attr-defined]
    inputs = data.inputs() if hasattr(data, "inputs") else []
    used = ", ".join(_describe_data(data) for data in inputs if data["use"] == "training")
    head = [f"**{result}**" if result else "", f"Recipe **{recipe}**: {used}", errors]
    rest = [_first_comment(files.get("recipe.yaml", "")), _data_table(inputs)]
    rest += [f"`{files.get('command.txt', '').strip()}`", f"All files of this run: `{folder}`"]
    return "\n\n".join(["  \n".join(filter(None, head)), *filter(None, rest)])


def _last_metrics(metrics: Mapping[str, float]) -> str:
    values = {text: metrics.get(name, math.nan) for name, text in _METRICS.items()}
    known = [f"{text} {value:.3f}" for text, value in values.items() if not math.isnan(value)]
    return f" ({', '.join(known)})" if known else ""


def _describe_errors(evaluation: DetectionEvaluation | LabelAccuracy) -> str:
    names = dict(zip(evaluation.tree.keys, evaluation.tree.names, strict=True))
    worst = [f"{names[key]} {value:.2f}" for key, value in weakest_classes(evaluation.per_class)]
    texts = [f"Weakest: {', '.join(worst)}"] if worst else []
    if isinstance(evaluation, DetectionEvaluation) and len(evaluation.targets):
        matches = match_predictions(evaluation.targets, evaluation.detections, evaluation.tree)
        pairs = [
            f"{evaluation.tree.names[target]} for {evaluation.tree.names[predicted]} ({count})"
            for target, predicted, count in most_confused(matches)
        ]
        texts += [f"Mistaken: {', '.join(pairs)}"] if pairs else []
    return "  \n".join(texts)


def _describe_data(data: Mapping[str, Any]) -> str:
    holds = data["holds"].removeprefix("image ")
    return f"{data['images']:,} images with {holds} ({data['nodes']:,} classes)"


def _first_comment(recipe: str) -> str:
    """Return the first paragraph of the comment at the top of a recipe, on one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), recipe.splitlines())
    return " ".join(itertools.takewhile(bool, (line.lstrip("#").strip() for line in lines)))


def _data_table(inputs: list[dict[str, Any]]) -> str:
    rows = [
        f"| {data['use']} | {data['holds']} | {data['name']} | {data['images']:,} "
        f"| {data['labelled']:,} | {data['nodes']:,} | `{data['fingerprint']}` |"
        for data in inputs
    ]
    header = "| use | labels | source | images | labelled | classes | fingerprint |"
    return "\n".join([header, "| --- | --- | --- | --- | --- | --- | --- |", *rows])
