"""CSV tables of a report."""

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from yolo_lightning.evaluation.error_analysis import ConfusionMatrix, DetectionError
from yolo_lightning.tree.wordtree import WordTree


def unique_names(tree: WordTree) -> dict[int, str]:
    """Return the name of every node, with its key where several nodes have the same name."""
    counts = Counter(tree.names)
    return {
        node: name if counts[name] == 1 else f"{name} ({key})"
        for node, (name, key) in enumerate(zip(tree.names, tree.keys, strict=True))
    }


def class_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the metrics of each class, by key, with one row per class."""
    names = dict.fromkeys(name for row in rows.values() for name in row)
    columns = [*names] or ["name", "objects"]
    cells = ([key, *(_cell(row.get(column)) for column in columns)] for key, row in rows.items())
    return _csv(["key", *columns], cells)


def confusion_table(matrix: ConfusionMatrix, names: Mapping[int, str]) -> str:
    """Return the counts of a confusion matrix, given the names of the nodes."""
    columns = [names[node] for node in matrix.nodes.tolist()]
    rows = zip([*columns, "background"], matrix.counts.tolist(), strict=True)
    return _csv(["target", *columns, "missed"], ([name, *counts] for name, counts in rows))


def error_table(
    errors: Mapping[str, Sequence[DetectionError]],
    names: Mapping[int, str],
    image_name: Callable[[int], str],
) -> str:
    """Return all errors, one per row, given names of nodes and files of images."""
    header = ["kind", "image", "file", "predicted", "score", "target", "iou"]
    corners = ("x1", "y1", "x2", "y2")
    header += [*corners, *(f"target_{corner}" for corner in corners)]
    rows = (
        [
            error.kind,
            error.image,
            image_name(error.image),
            "" if error.label is None else names[error.label],
            _cell(error.score),
            "" if error.target_label is None else names[error.target_label],
            _cell(error.iou) if error.iou else "",
            *(_cell(side) for side in error.box_xyxy_orig_px or [None] * 4),
            *(_cell(side) for side in error.target_xyxy_orig_px or [None] * 4),
        ]
        for group in errors.values()
        for error in group
    )
    return _csv(header, rows)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.5g}" if isinstance(value, float) else value


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue()
