"""CSV tables of a report."""

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yolo_lightning.errors import csv_cell
from yolo_lightning.evaluation.error_analysis import ConfusionMatrix, DetectionError
from yolo_lightning.evaluation.matching import BOX, LABEL, SCORE, Table
from yolo_lightning.tree.wordtree import WordTree

_CORNERS = ("x1", "y1", "x2", "y2")


def unique_names(tree: WordTree) -> dict[int, str]:
    """Return the name of every node, with its key where several nodes have the same name."""
    counts = Counter(tree.names)
    return {
        node: name if counts[name] == 1 else f"{name} ({key})"
        for node, (name, key) in enumerate(zip(tree.names, tree.keys, strict=True))
    }


def write_class_table(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the metrics of each class, by key, with one row per class."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = ([key, *map(row.get, columns)] for key, row in rows.items())
    _write_csv(path, ["key", *(columns or ("name", "objects"))], cells)


def write_confusion_table(path: Path, matrix: ConfusionMatrix, names: Mapping[int, str]) -> None:
    """Write the counts of a confusion matrix, given the names of the nodes."""
    columns = [names[node] for node in matrix.nodes.tolist()]
    rows = zip([*columns, "background"], matrix.counts.tolist(), strict=True)
    _write_csv(path, ["target", *columns, "missed"], ([name, *counts] for name, counts in rows))


def write_error_table(
    path: Path,
    errors: Mapping[str, Sequence[DetectionError]],
    names: Mapping[int, str],
    image_name: Callable[[int], str],
) -> None:
    """Write all errors, one per row, given names of nodes and files of images."""
    header = ["kind", "image", "file", "predicted", "score", "target", "iou", *_CORNERS]
    header += [f"target_{corner}" for corner in _CORNERS]

    def name_score_box(row: Table | None) -> tuple[Any, ...]:
        return (None,) * 6 if row is None else (names[int(row[LABEL])], row[SCORE], *row[BOX])

    rows = []
    for error in (error for group in errors.values() for error in group):
        name, score, *box = name_score_box(error.detection)
        target, _, *target_box = name_score_box(error.target)
        image = error.image, image_name(error.image)
        rows.append([error.kind, *image, name, score, target, error.iou or None, *box, *target_box])
    _write_csv(path, header, rows)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(csv_cell, header))
        writer.writerows(map(_cell, row) for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return csv_cell(value)
