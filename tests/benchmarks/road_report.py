"""Table and figure of the road over several seeds."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.road_steps import STEPS
from yolo_lightning.visualization.figures import COLOURS, TEXT, new_figure, save_figure

HEADER = "| | step | AP50 | gain | recall | paper: mAP | gain | recall |"


def values_of(seeds: Sequence[dict[str, Any]], name: str) -> NDArray[np.float64]:
    """Return a figure of all rows, (seeds, rows)."""
    return np.array([[row[name] for row in seed["rows"]] for seed in seeds], dtype=np.float64)


def spread(values: NDArray[np.float64], form: str = ".1f") -> str:
    """Return the mean of several seeds, and in brackets the smallest and the largest."""
    text = format(values.mean(), form)
    if len(values) == 1:
        return text
    return f"{text} ({format(values.min(), form)} … {format(values.max(), form)})"


def table(seeds: Sequence[dict[str, Any]]) -> str:
    """Return the table as Markdown: our figures beside the paper's, each with its gain."""
    ap50, recall = values_of(seeds, "AP50"), values_of(seeds, "recall")
    lines = [
        HEADER,
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for k, step in enumerate(STEPS):
        gain = spread(ap50[:, k] - ap50[:, k - 1], "+.1f") if k else ""
        published = f"{step.paper - STEPS[k - 1].paper:+.1f}" if k else ""
        cells = [
            str(k), step.name, spread(ap50[:, k]), gain, spread(recall[:, k]), str(step.paper),
            published, "" if step.paper_recall is None else f"{step.paper_recall:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def replace_table(page: Path, text: str) -> None:
    """Replace the table of the results in a page."""
    old, found = page.read_text(encoding="utf-8"), re.escape(HEADER) + r"(\n\|.*)*"
    assert len(re.findall(found, old)) == 1, f"{page}: no table with the columns {HEADER}"
    page.write_text(re.sub(found, lambda _: text, old), encoding="utf-8")


def save_figure_of(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw AP50 of every row, the mean and each seed, beside the paper's mAP."""
    ap50 = values_of(seeds, "AP50")
    rows = np.arange(len(STEPS))
    figure = new_figure(8.4, 4.8)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT)
    label = f"miniature, mean of {len(seeds)} seeds (dots: each seed)"
    axes.plot(rows, ap50.mean(axis=0), "o-", color=COLOURS[0], label=label)
    for seed in ap50:
        axes.plot(rows, seed, "o", color=COLOURS[0], alpha=0.35, ms=4)
    paper = [step.paper for step in STEPS]
    axes.plot(rows, paper, "s--", color=COLOURS[1], label="paper, VOC 2007 mAP")
    axes.set_xticks(rows, [f"{k} {step.name}" for k, step in enumerate(STEPS)], rotation=30)
    for text in axes.get_xticklabels():
        text.set_horizontalalignment("right")
    axes.set(ylabel="AP at IoU 0.5, %")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", frameon=False)
    save_figure(figure, path)
