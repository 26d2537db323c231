"""The report of an evaluation: metrics as JSON and CSV; plots and worst errors of a detector."""

import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import numpy as np
import torch

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.evaluation.coco import COCO_METRICS
from yolo_lightning.evaluation.curves import CONFIDENCES, Curves, compute_curves
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.evaluation.error_analysis import (
    ConfusionMatrix,
    DetectionError,
    Matches,
    confusion_matrix,
    find_errors,
    match_predictions,
)
from yolo_lightning.evaluation.label_accuracy import LabelAccuracy
from yolo_lightning.evaluation.matching import MATCH_IOU, Table
from yolo_lightning.evaluation.plots import (
    ImageSource,
    draw_error_grid,
    plot_confidence,
    plot_confusion_matrix,
    plot_precision_recall,
)
from yolo_lightning.evaluation.tables import (
    unique_names,
    write_class_table,
    write_confusion_table,
    write_error_table,
)
from yolo_lightning.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def num_images_read(batches: Sequence[int | float], data: Any, world_size: int, source: Any) -> int:
    """Return the number of images of a source read in `batches` of each loader of a rank."""
    has_boxes = hasattr(source, "shapes_wh_px")
    local_batch_size = max(1, int(data.batch_sizes[0 if has_boxes else 1]) // world_size)
    return min(len(source), int(sum(batches)) * local_batch_size * world_size)


@dataclass
class ReportOptions:
    """Options of a report.

    Args:
        folder: to write to, new or empty; null for a new one in the run folder of the checkpoint.
        level: of the tree, 1 at the top, for the confusion matrix; null for the classes themselves.
        confidence: minimum score for the confusion matrix and the error analysis, 0…1.
        seen_classes: the classes that count as trained with boxes: a file with one class per line,
            imagenet_det_44 or coco; null for the classes of the training boxes.

    Raises:
        InputError: a value out of range, or a folder that is not empty.
    """

    folder: str | None = None
    level: int | None = None
    confidence: float = 0.25
    seen_classes: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.confidence <= 1:
            raise InputError(f"report.confidence is {self.confidence:g}; allowed: 0 … 1")
        if self.folder is None:
            return
        folder = Path(self.folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"report.folder {self.folder!r} is not empty; use a new folder")


def check_report_options(args: Sequence[str]) -> None:
    """Raise `InputError` if a command line, subcommand first, has invalid report options."""
    allowed = [field.name for field in fields(ReportOptions)]
    for arg in args[1:]:
        name = arg.partition("=")[0].removeprefix("--report.")
        if arg.startswith("--report.") and args[0] == "fit":
            raise InputError(f"--report.{name}: an option of validate and test, not of fit")
        if arg.startswith("--report.") and name not in allowed:
            hint = nearest(name, allowed) or f"allowed: {', '.join(allowed)}"
            raise InputError(f"report.{name}: no such option; {hint}")


def write_report(
    folder: Path,
    evaluation: DetectionEvaluation | LabelAccuracy,
    metadata: Mapping[str, Any],
    source: ImageSource,
    options: ReportOptions | None = None,
) -> list[str]:
    """Write the files of a report and return a summary, as lines.

    ``per_class.csv``, ``metrics.json``, and of a detector ``confusion.csv``, ``errors.csv``,
    ``precision_recall.png``, ``confidence.png``, ``confusion.png`` and ``errors.jpg``. Plots
    without data are left out.

    Args:
        folder: to write to; created if it does not exist.
        evaluation: the results of its last `compute` are written.
        metadata: added to ``metrics.json``: checkpoint, recipe, image size and number of images.
        source: the images that were evaluated.
        options: of the report.

    Raises:
        InputError: the tree has no such level, or the folder cannot be written.
    """
    values: dict[str, Any]
    lines: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(evaluation, LabelAccuracy):
            values = {"metrics": evaluation.metrics, "per_class": evaluation.per_class}
        else:
            options = options or ReportOptions()
            values, lines = _write_detection_files(folder, evaluation, source, options)
        write_class_table(folder / "per_class.csv", values["per_class"])
        values = {**metadata, "versions": _versions(), **values}
        text = json.dumps(_without_nan(values), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "metrics.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{str(folder)!r}: {error.strerror or error}") from None
    return lines


def _write_detection_files(
    folder: Path, evaluation: DetectionEvaluation, source: ImageSource, options: ReportOptions
) -> tuple[dict[str, Any], list[str]]:
    """Write the tables and plots of a detector; return the content of ``metrics.json``, summary."""
    names = unique_names(evaluation.tree)
    targets, detections = evaluation.targets, evaluation.detections
    curves = compute_curves(targets, detections)
    matches = match_predictions(targets, detections, evaluation.tree, options.confidence)
    matrix = confusion_matrix(matches, evaluation.tree, options.level)
    errors = find_errors(matches)
    values = _results(evaluation, curves, matches, errors, options)
    write_confusion_table(folder / "confusion.csv", matrix, names)
    write_error_table(folder / "errors.csv", errors, names, source.image_name)
    _write_plots(folder, curves, matrix, names, options)
    if any(errors.values()):
        grid = draw_error_grid(errors, names, source, options.confidence)
        grid.save(folder / "errors.jpg", quality=88)
    counts = ", ".join(f"{kind} {len(group)}" for kind, group in errors.items())
    lines = [f"errors at confidence {options.confidence:g}: {counts}"]
    if not len(curves.nodes):
        lines.append("no targets: no curves")
    if best := values["best_f1"]:
        lines.insert(0, f"best mean F1 {best['f1']:.3f} at confidence {best['confidence']:g}")
    return values, lines


def _versions() -> dict[str, str]:
    return {
        "yolo-lightning": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def _results(
    evaluation: DetectionEvaluation,
    curves: Curves,
    matches: Matches,
    errors: Mapping[str, Sequence[DetectionError]],
    options: ReportOptions,
) -> dict[str, Any]:
    """Return the content of ``metrics.json`` without the metadata; values may be NaN."""
    names = dict(zip(evaluation.tree.keys, evaluation.tree.names, strict=True))
    at_best: dict[str, Table] = {}
    best_f1: dict[str, float] | None = None
    if (best := curves.best_index) is not None:
        at_best = {
            metric: getattr(curves, metric)[:, best] for metric in ("precision", "recall", "f1")
        }
        best_f1 = {"confidence": round(float(CONFIDENCES[best]), 3)}
        best_f1 |= {metric: float(v[~np.isnan(v)].mean()) for metric, v in at_best.items()}
    keys = [evaluation.tree.keys[node] for node in curves.nodes.tolist()]
    per_class: dict[str, dict[str, Any]] = {
        key: {"name": names[key], "objects": 0, **evaluation.per_class.get(key, {})}
        for key in dict.fromkeys([*keys, *evaluation.per_class])
    }
    for k, key in enumerate(keys):
        per_class[key]["objects"] = int(curves.num_targets[k])
        per_class[key] |= {metric: float(values[k]) for metric, values in at_best.items()}
    return {
        "objects": len(matches.targets),
        "metrics": dict.fromkeys(COCO_METRICS) | evaluation.metrics,
        "best_f1": best_f1,
        "errors": {
            "confidence": options.confidence,
            "iou": MATCH_IOU,
            "detections": len(matches.detections),
            "true_positives": int((matches.matched >= 0).sum()),
            **{kind: len(group) for kind, group in errors.items()},
        },
        "confusion": {"confidence": options.confidence, "level": options.level},
        "per_class": per_class,
        "per_coarse_class": {
            key: {"name": names[key], **row} for key, row in evaluation.per_coarse_class.items()
        },
    }


def _write_plots(
    folder: Path,
    curves: Curves,
    matrix: ConfusionMatrix,
    names: Mapping[int, str],
    options: ReportOptions,
) -> None:
    """Write the plots that have data."""
    plots: dict[str, Callable[[], Figure]] = {}
    if len(curves.nodes):
        plots["precision_recall.png"] = partial(plot_precision_recall, curves, names)
        plots["confidence.png"] = partial(plot_confidence, curves, names)
    if len(matrix.nodes):
        level = f", level {options.level} of the tree" if options.level else ""
        title = f"Confusion matrix at confidence {options.confidence:g}{level}"
        plots["confusion.png"] = partial(plot_confusion_matrix, matrix, names, title)
    for file, plot in plots.items():
        plot().savefig(folder / file, bbox_inches="tight", pad_inches=0.1)


def _without_nan(value: Any) -> Any:
    """Return plain values with None instead of NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
