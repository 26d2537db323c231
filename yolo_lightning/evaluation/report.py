"""What an evaluation leaves behind: figures as JSON and CSV, and pictures."""

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
from yolo_lightning.evaluation.average_precision import COCO_FIGURES
from yolo_lightning.evaluation.curves import CONFIDENCES, FOUND_IOU, Curves, curves
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.evaluation.error_analysis import (
    Confusion,
    Matches,
    Mistake,
    confusion,
    matches_at,
    mistakes,
)
from yolo_lightning.evaluation.matching import Table
from yolo_lightning.evaluation.plots import (
    ReadImage,
    confidence,
    confusion_matrix,
    mistakes_grid,
    precision_recall,
)
from yolo_lightning.evaluation.tables import (
    table_of_classes,
    table_of_confusion,
    table_of_mistakes,
    titles,
)
from yolo_lightning.images import Image
from yolo_lightning.tree.wordtree import WordTree
from yolo_lightning.version import __version__

_AT_BEST = ("precision", "recall", "f1")


@dataclass
class ReportData:
    """What a report is made of.

    Attributes:
        tree: the classes.
        truths: (N, 8), see `mistakes`; image is the number in the source.
        detections: (M, 8).
        figures: the means, by name, 0…1.
        per_class: figures of each class, by key.
        per_coarse_class: figures at the level that boxes taught, by key; none where it is the same.
        about: where the figures come from: checkpoint, recipe, image size, number of images.
    """

    tree: WordTree
    truths: Table
    detections: Table
    figures: Mapping[str, float]
    per_class: Mapping[str, Mapping[str, float]]
    per_coarse_class: Mapping[str, Mapping[str, float]]
    about: Mapping[str, Any]

    @classmethod
    def of(cls, found: DetectionEvaluation, about: Mapping[str, Any]) -> "ReportData":
        """Return what an evaluation has just found."""
        tables = found.truths, found.detections
        return cls(
            found.tree, *tables, found.figures, found.per_class, found.per_coarse_class, about
        )


def images_read(batches: Sequence[int | float], data: Any, world_size: int, images: int) -> int:
    """Return how many of a source's images an evaluation read; limits may leave some out.

    Args:
        batches: of each loader, on one rank.
        data: the datamodule, whose batch sizes are those of all ranks together.
        world_size: ranks.
        images: of the source.
    """
    share = max(1, int(data.batch_sizes[0]) // world_size)
    return min(images, int(sum(batches)) * share * world_size)


@dataclass
class ReportOptions:
    """How a report is made.

    Args:
        folder: to write to, one that holds no files; null for a fresh one in the folder of the
            checkpoint's run.
        level: of the tree, 1 at the top, that the confusion matrix is collapsed to; null for the
            classes as they are.
        confidence: the least score that counts in the confusion matrix and as a mistake, 0…1.
        seen: the classes that count as seen with boxes: a file that names one a line, or
            imagenet_det_44; null for those that training had boxes of.

    Raises:
        InputError: a value out of range, or a folder that holds files.
    """

    folder: str | None = None
    level: int | None = None
    confidence: float = 0.25
    seen: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.confidence <= 1:
            raise InputError(f"report.confidence is {self.confidence:g}; allowed: 0 … 1")
        if self.folder is None:
            return
        folder = Path(self.folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"report.folder {self.folder!r} is not empty; name a new one")


def check_options(args: Sequence[str]) -> None:
    """Refuse options of a report on a command line that do not exist, or not for its command.

    Args:
        args: the command line, subcommand first.

    Raises:
        InputError: names what is allowed.
    """
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
    found: ReportData,
    read: ReadImage,
    name: Callable[[int], str] = str,
    options: ReportOptions | None = None,
) -> list[str]:
    """Write the files of a report and return what there is to say about it, a line each.

    ``per_class.csv``, ``confusion.csv``, ``mistakes.csv``, ``precision_recall.png``,
    ``confidence.png``, ``confusion.png``, ``mistakes.jpg``, and last ``figures.json``. Pictures of
    nothing are left out, and said so.

    Args:
        folder: made where it is not there; files of a report in it are replaced.
        found: what the evaluation says.
        read: gives the images, see `ReadImage`; it may raise `UnreadableSample`.
        name: what an image is called, by its number.
        options: the defaults where None; `folder` and `seen` are not looked at.

    Raises:
        InputError: the tree has no such level, or the folder cannot be written.
    """
    options = options or ReportOptions()
    names = titles(found.tree)
    over = curves(found.truths, found.detections)
    matches = matches_at(found.truths, found.detections, found.tree, options.confidence)
    matrix = confusion(matches, found.tree, options.level)
    wrong = mistakes(matches)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = _class_rows(found, over)
        _write_text(folder / "per_class.csv", table_of_classes(rows))
        _write_text(folder / "confusion.csv", table_of_confusion(matrix, names))
        _write_text(folder / "mistakes.csv", table_of_mistakes(wrong, names, name))
        said = _pictures(folder, over, matrix, names, options)
        if any(wrong.values()):
            least = options.confidence
            _write(folder / "mistakes.jpg", mistakes_grid(wrong, names, read, least))
        plain = _plain(found, rows, over, matches, wrong, options)
        text = json.dumps(_without_nan(plain), indent=2, ensure_ascii=False, allow_nan=False)
        _write_text(folder / "figures.json", text + "\n")
    except OSError as error:
        raise InputError(f"{str(folder)!r}: {error.strerror or error}") from None
    return [*_summary(over, wrong, options.confidence), *said]


class ImageSource(Protocol):
    """What images are read from, by their numbers."""

    def read(self, index: int) -> Any:
        """Return a sample with `image`, uint8 RGB (H, W, 3), and `size_hw_orig`, px."""


def image_reader(source: ImageSource) -> ReadImage:
    """Return what reads the images of a source for the pictures of a report."""

    def read(index: int) -> tuple[Image, tuple[float, float]]:
        sample = source.read(index)
        (height, width), (height_orig, width_orig) = sample.image.shape[:2], sample.size_hw_orig
        return sample.image, (width / width_orig, height / height_orig)

    return read


def _class_rows(found: ReportData, over: Curves) -> dict[str, dict[str, Any]]:
    """Return the figures of each class by key; those at the best confidence come last."""
    keys = [found.tree.keys[node] for node in over.nodes.tolist()]
    rows: dict[str, dict[str, Any]] = {}
    called = dict(zip(found.tree.keys, found.tree.names, strict=True))
    for key in dict.fromkeys([*keys, *found.per_class]):
        rows[key] = {"name": called[key], "objects": 0, **found.per_class.get(key, {})}
    for k, key in enumerate(keys):
        rows[key]["objects"] = int(over.objects[k])
        if over.best is not None:
            for measure in _AT_BEST:
                rows[key][measure] = float(getattr(over, measure)[k, over.best])
    return rows


def _pictures(
    folder: Path, over: Curves, matrix: Confusion, names: Mapping[int, str], options: ReportOptions
) -> list[str]:
    """Draw what there is to draw, and say what was left out and why."""
    wanted: dict[str, Callable[[], bytes]] = {}
    if len(over.nodes):
        wanted["precision_recall.png"] = lambda: precision_recall(over, names)
        wanted["confidence.png"] = lambda: confidence(over, names)
    if len(matrix.nodes):
        level = f", level {options.level} of the tree" if options.level else ""
        title = f"Confusion at confidence {options.confidence:g}{level}, % of each row"
        wanted["confusion.png"] = lambda: confusion_matrix(matrix, names, title)
    said = [] if len(over.nodes) else ["no objects to find: no curves"]
    try:
        for file, draw in wanted.items():
            _write(folder / file, draw())
    except InputError as error:  # no matplotlib
        said.append(f"left out {', '.join(wanted)}: {error}")
    return said


def _plain(
    found: ReportData,
    rows: Mapping[str, Mapping[str, Any]],
    over: Curves,
    matches: Matches,
    wrong: Mapping[str, Sequence[Mistake]],
    options: ReportOptions,
) -> dict[str, Any]:
    """Return everything that `figures.json` holds."""
    called = dict(zip(found.tree.keys, found.tree.names, strict=True))
    coarse = {key: {"name": called[key], **row} for key, row in found.per_coarse_class.items()}
    return {
        **found.about,
        "objects": len(matches.truths),
        "versions": {
            "yolo-lightning": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
        "figures": dict.fromkeys(COCO_FIGURES) | dict(found.figures),
        "best_f1": _best(over),
        "mistakes": {
            "confidence": options.confidence,
            "iou": FOUND_IOU,
            "detections": len(matches.detections),
            "hits": int((matches.hits >= 0).sum()),
            **{kind.replace(" ", "_"): len(each) for kind, each in wrong.items()},
        },
        "confusion": {"confidence": options.confidence, "level": options.level},
        "per_class": rows,
        "per_coarse_class": coarse,
    }


def _best(over: Curves) -> dict[str, float] | None:
    """Return the confidence with the highest mean F1, and the means there."""
    if over.best is None:
        return None
    means = {m: float(_mean(getattr(over, m)[:, over.best])) for m in _AT_BEST}
    return {"confidence": round(float(CONFIDENCES[over.best]), 3), **means}


def _mean(values: Table) -> float:
    """Return the mean of what there is."""
    there = values[values == values]
    return float(there.mean()) if there.size else math.nan


def _summary(over: Curves, wrong: Mapping[str, Sequence[Mistake]], least: float) -> list[str]:
    counts = ", ".join(f"{kind} {len(each)}" for kind, each in wrong.items())
    lines = [f"mistakes at confidence {least:g}: {counts}"]
    if best := _best(over):
        lines.insert(0, f"best mean F1 {best['f1']:.3f} at confidence {best['confidence']:g}")
    return lines


def _without_nan(value: Any) -> Any:
    """Return plain values with None where a number is not one: JSON knows no NaN."""
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
    """Write a file that is whole whenever it is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)
