"""The tables of a report, as CSV."""

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from yolo_lightning.evaluation.error_analysis import Confusion, Mistake
from yolo_lightning.tree.wordtree import WordTree


def titles(tree: WordTree) -> dict[int, str]:
    """Return a name for every node, with its key where several nodes have the same name."""
    often = Counter(tree.names)
    return {
        node: name if often[name] == 1 else f"{name} ({key})"
        for node, (name, key) in enumerate(zip(tree.names, tree.keys, strict=True))
    }


def table_of_classes(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the figures of classes, by key, a class a row and a figure a column."""
    measures = dict.fromkeys(measure for row in rows.values() for measure in row)
    columns = [*measures] or ["name", "objects"]
    cells = ([key, *(_cell(row.get(column)) for column in columns)] for key, row in rows.items())
    return _csv(["key", *columns], cells)


def table_of_confusion(matrix: Confusion, names: Mapping[int, str]) -> str:
    """Return the counts of a confusion matrix, given the names of the nodes."""
    said = [names[node] for node in matrix.nodes.tolist()]
    lines = zip([*said, "background"], matrix.counts.tolist(), strict=True)
    return _csv(["truth", *said, "missed"], ([title, *counts] for title, counts in lines))


def table_of_mistakes(
    wrong: Mapping[str, Sequence[Mistake]], names: Mapping[int, str], name: Callable[[int], str]
) -> str:
    """Return all mistakes by kind, the worst first.

    Args:
        wrong: by kind.
        names: of the nodes.
        name: what an image is called, by its number.
    """
    head = ["kind", "image", "file", "predicted", "score", "truth", "iou"]
    corners = ("x1", "y1", "x2", "y2")
    head += [*corners, *(f"truth_{corner}" for corner in corners)]
    each = (mistake for group in wrong.values() for mistake in group)
    return _csv(
        head,
        (
            [
                one.kind,
                one.image,
                name(one.image),
                "" if one.label is None else names[one.label],
                _cell(one.score),
                "" if one.truth_label is None else names[one.truth_label],
                _cell(one.iou) if one.iou else "",
                *(_cell(side) for side in one.box_xyxy_orig_px or [None] * 4),
                *(_cell(side) for side in one.truth_xyxy_orig_px or [None] * 4),
            ]
            for one in each
        ),
    )


def _cell(value: Any) -> Any:
    """Return what a table shows: numbers to five digits, nothing where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.5g}" if isinstance(value, float) else value


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return file.getvalue()
