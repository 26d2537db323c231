"""The report of a detector: metrics as JSON and CSV, plots, and images of the worst errors."""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.evaluation.average_precision import COCO_METRICS
from yolo_lightning.evaluation.curves import CONFIDENCES, MATCH_IOU, Curves, compute_curves
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.evaluation.error_analysis import (
    ConfusionMatrix,
    DetectionError,
    Matches,
    confusion_matrix,
    find_errors,
    match_predictions,
)
from yolo_lightning.evaluation.matching import Table
from yolo_lightning.evaluation.plots import (
    ReadImage,
    draw_error_grid,
    plot_confidence,
    plot_confusion_matrix,
    plot_precision_recall,
)
from yolo_lightning.evaluation.tables import (
    class_table,
    confusion_table,
    error_table,
    unique_names,
)
from yolo_lightning.images import Image
from yolo_lightning.tree.wordtree import WordTree
from yolo_lightning.version import __version__

_CURVE_METRICS = ("precision", "recall", "f1")


@dataclass
class ReportData:
    """The results that a report is made from; see `DetectionEvaluation`."""

    tree: WordTree
    targets: Table
    detections: Table
    metrics: Mapping[str, float]
    per_class: Mapping[str, Mapping[str, float]]
    per_coarse_class: Mapping[str, Mapping[str, float]]
    metadata: Mapping[str, Any]  # checkpoint, recipe, image size and number of images

    @classmethod
    def from_evaluation(
        cls, evaluation: DetectionEvaluation, metadata: Mapping[str, Any]
    ) -> "ReportData":
        """Return the results of the last `compute` of an evaluation."""
        return cls(
            evaluation.tree,
            evaluation.targets,
            evaluation.detections,
            evaluation.metrics,
            evaluation.per_class,
            evaluation.per_coarse_class,
            metadata,
        )


def num_images_read(
    batches: Sequence[int | float], data: Any, world_size: int, source_length: int
) -> int:
    """Return the number of images read in `batches` of each loader of a rank."""
    local_batch_size = max(1, int(data.batch_sizes[0]) // world_size)
    return min(source_length, int(sum(batches)) * local_batch_size * world_size)


@dataclass
class ReportOptions:
    """Options of a report.

    Args:
        folder: to write to, new or empty; null for a new one in the run folder of the checkpoint.
        level: of the tree, 1 at the top, for the confusion matrix; null for the classes themselves.
        confidence: minimum score for the confusion matrix and the error analysis, 0…1.
        seen_classes: the classes that count as trained with boxes: a file with one class per line,
            or imagenet_det_44; null for the classes of the training boxes.

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
    data: ReportData,
    read_image: ReadImage,
    image_name: Callable[[int], str] = str,
    options: ReportOptions | None = None,
) -> list[str]:
    """Write the files of a report and return a summary, as lines.

    ``per_class.csv``, ``confusion.csv``, ``errors.csv``, ``precision_recall.png``,
    ``confidence.png``, ``confusion.png``, ``errors.jpg``, and last ``metrics.json``. Plots without
    data or without matplotlib are skipped, which the summary mentions. `image_name` returns the
    file of an image by its index; `read_image` may raise `UnreadableSample`.

    Raises:
        InputError: the tree has no such level, or the folder cannot be written.
    """
    options = options or ReportOptions()
    names = unique_names(data.tree)
    curves = compute_curves(data.targets, data.detections)
    matches = match_predictions(data.targets, data.detections, data.tree, options.confidence)
    matrix = confusion_matrix(matches, data.tree, options.level)
    errors = find_errors(matches)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = _class_rows(data, curves)
        _write_text(folder / "per_class.csv", class_table(rows))
        _write_text(folder / "confusion.csv", confusion_table(matrix, names))
        _write_text(folder / "errors.csv", error_table(errors, names, image_name))
        skipped = _write_plots(folder, curves, matrix, names, options)
        if any(errors.values()):
            grid = draw_error_grid(errors, names, read_image, options.confidence)
            _write(folder / "errors.jpg", grid)
        values = _to_plain(data, rows, curves, matches, errors, options)
        text = json.dumps(_without_nan(values), indent=2, ensure_ascii=False, allow_nan=False)
        _write_text(folder / "metrics.json", text + "\n")
    except OSError as error:
        raise InputError(f"{str(folder)!r}: {error.strerror or error}") from None
    return [*_summary(curves, errors, options.confidence), *skipped]


class ImageSource(Protocol):
    """A source of images by index."""

    def read(self, index: int) -> Any:
        """Return a sample with `image`, uint8 RGB (H, W, 3), and `size_hw_orig`, px."""


def image_reader(source: ImageSource) -> ReadImage:
    """Return a function that reads the images of a source for `write_report`."""

    def read(index: int) -> tuple[Image, tuple[float, float]]:
        sample = source.read(index)
        (height, width), (height_orig, width_orig) = sample.image.shape[:2], sample.size_hw_orig
        return sample.image, (width / width_orig, height / height_orig)

    return read


def _class_rows(data: ReportData, curves: Curves) -> dict[str, dict[str, Any]]:
    keys = [data.tree.keys[node] for node in curves.nodes.tolist()]
    rows: dict[str, dict[str, Any]] = {}
    names = dict(zip(data.tree.keys, data.tree.names, strict=True))
    for key in dict.fromkeys([*keys, *data.per_class]):
        rows[key] = {"name": names[key], "objects": 0, **data.per_class.get(key, {})}
    for k, key in enumerate(keys):
        rows[key]["objects"] = int(curves.num_targets[k])
        if curves.best_index is not None:
            for metric in _CURVE_METRICS:
                rows[key][metric] = float(getattr(curves, metric)[k, curves.best_index])
    return rows


def _write_plots(
    folder: Path,
    curves: Curves,
    matrix: ConfusionMatrix,
    names: Mapping[int, str],
    options: ReportOptions,
) -> list[str]:
    """Write the plots that have data; return messages about skipped ones."""
    plots: dict[str, Callable[[], bytes]] = {}
    if len(curves.nodes):
        plots["precision_recall.png"] = lambda: plot_precision_recall(curves, names)
        plots["confidence.png"] = lambda: plot_confidence(curves, names)
    if len(matrix.nodes):
        level = f", level {options.level} of the tree" if options.level else ""
        title = f"Confusion matrix at confidence {options.confidence:g}{level}, % of each row"
        plots["confusion.png"] = lambda: plot_confusion_matrix(matrix, names, title)
    messages = [] if len(curves.nodes) else ["no targets: no curves"]
    try:
        for file, plot in plots.items():
            _write(folder / file, plot())
    except InputError as error:  # no matplotlib
        messages.append(f"skipped {', '.join(plots)}: {error}")
    return messages


def _to_plain(
    data: ReportData,
    rows: Mapping[str, Mapping[str, Any]],
    curves: Curves,
    matches: Matches,
    errors: Mapping[str, Sequence[DetectionError]],
    options: ReportOptions,
) -> dict[str, Any]:
    names = dict(zip(data.tree.keys, data.tree.names, strict=True))
    coarse = {key: {"name": names[key], **row} for key, row in data.per_coarse_class.items()}
    return {
        **data.metadata,
        "objects": len(matches.targets),
        "versions": {
            "yolo-lightning": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
        "metrics": dict.fromkeys(COCO_METRICS) | dict(data.metrics),
        "best_f1": _best_f1(curves),
        "errors": {
            "confidence": options.confidence,
            "iou": MATCH_IOU,
            "detections": len(matches.detections),
            "true_positives": int((matches.matched >= 0).sum()),
            **{kind: len(group) for kind, group in errors.items()},
        },
        "confusion": {"confidence": options.confidence, "level": options.level},
        "per_class": rows,
        "per_coarse_class": coarse,
    }


def _best_f1(curves: Curves) -> dict[str, float] | None:
    if curves.best_index is None:
        return None
    means = {m: float(_mean(getattr(curves, m)[:, curves.best_index])) for m in _CURVE_METRICS}
    return {"confidence": round(float(CONFIDENCES[curves.best_index]), 3), **means}


def _mean(values: Table) -> float:
    defined = values[values == values]
    return float(defined.mean()) if defined.size else math.nan


def _summary(
    curves: Curves, errors: Mapping[str, Sequence[DetectionError]], confidence: float
) -> list[str]:
    counts = ", ".join(f"{kind} {len(group)}" for kind, group in errors.items())
    lines = [f"errors at confidence {confidence:g}: {counts}"]
    if best := _best_f1(curves):
        lines.insert(0, f"best mean F1 {best['f1']:.3f} at confidence {best['confidence']:g}")
    return lines


def _without_nan(value: Any) -> Any:
    """Return plain values with None instead of NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_text(path: Path, text: str) -> None:
    _write(path, text.encode("utf-8"))


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
