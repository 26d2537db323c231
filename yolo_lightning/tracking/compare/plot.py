"""Plots of `yolo-lightning mlflow compare`: metrics over steps, for several runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.tracking.compare.runs import Curve
from yolo_lightning.visualization.figures import COLOURS, LINE, TEXT, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_COLUMNS, _PANEL_WIDTH, _PANEL_HEIGHT, _LEGEND_LINE_HEIGHT = 3, 5.4, 3.9, 0.2  # inches
_CHARACTERS_PER_INCH, _LINE_STYLES = 12.0, ("-", (0, (5, 1.5)), (0, (1, 1)))
_MAX_POINTS, _MAX_POINTS_WITH_MARKERS = 200, 60


def downsample(curve: Curve) -> tuple[Curve, int]:
    """Average neighbouring points to at most 200; also return the number of points per mean.

    Mean steps are rounded down. Values that are not finite become NaN, which is not drawn.
    """
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    size = -(-len(values) // _MAX_POINTS)
    if size == 1:
        return Curve(curve.steps, values), 1
    starts = np.arange(0, len(values), size)
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    lengths = np.diff([*starts, len(values)])
    steps = np.add.reduceat(curve.steps, starts) // lengths
    return Curve(steps, means), size


def mean_and_std(
    curves: Sequence[Curve],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return steps, mean and standard deviation (n - 1) over the range that all curves cover.

    Curves are interpolated linearly. The standard deviation of a single curve is 0.
    """
    finite = [np.isfinite(curve.values) for curve in curves]
    if not all(mask.any() for mask in finite):
        return np.empty(0, dtype=np.int64), np.empty(0), np.empty(0)
    lines = [(c.steps[mask], c.values[mask]) for c, mask in zip(curves, finite, strict=True)]
    steps = np.unique(np.concatenate([line[0] for line in lines]))
    start, end = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)
    steps = steps[(steps >= start) & (steps <= end)]
    values = np.stack([np.interp(steps, *line) for line in lines])
    std = values.std(axis=0, ddof=1) if len(lines) > 1 else np.zeros(len(steps))
    return steps, values.mean(axis=0), std


def save_curves(panels: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path) -> None:
    """Draw a PNG with one panel per metric: a line per run, or mean, band and lines per group.

    Args:
        panels: for each metric, curves by label. A label has the same colour in all panels.
        path: of the file; its folder is created.
    """
    labels = list(next(iter(panels.values())))
    columns = min(_MAX_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width = max(7.5, _PANEL_WIDTH * columns)
    legend_columns = max(1, int(width * _CHARACTERS_PER_INCH / (max(map(len, labels)) + 8)))
    legend_lines = -(-len(labels) // legend_columns) + 1
    figure = new_figure(width, _PANEL_HEIGHT * rows + _LEGEND_LINE_HEIGHT * legend_lines)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (metric, lines) in zip(grid, panels.items(), strict=False):
        size = max(_draw(axes, number, list(lines[label])) for number, label in enumerate(labels))
        title = f"{metric}, means of {size} points" if size > 1 else metric
        axes.set_title(title, fontsize=10, color=TEXT)
        axes.set_xlabel("step", fontsize=8, color=TEXT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=TEXT, labelsize=8)
        axes.grid(color=LINE, linewidth=0.6)
    handles = [
        grid[0].plot([], [], label=label, linewidth=2, **_line_style(number))[0]
        for number, label in enumerate(labels)
    ]
    has_groups = any(len(curves) > 1 for lines in panels.values() for curves in lines.values())
    options: dict[str, Any] = {
        "loc": "outside lower left", "ncols": legend_columns, "frameon": False
    }  # fmt: skip
    if has_groups:
        options |= {
            "title": "bold: mean of the runs; band: ± 1 standard deviation",
            "title_fontsize": 8,
        }
    figure.legend(handles=handles, fontsize=8, labelcolor=TEXT, alignment="left", **options)
    save_figure(figure, path)


def _line_style(number: int) -> dict[str, Any]:
    style = _LINE_STYLES[number // len(COLOURS) % len(_LINE_STYLES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": style}


def _draw(axes: "Axes", number: int, curves: Sequence[Curve]) -> int:
    """Draw a run or a group of runs; return the largest number of points per drawn point."""
    style, max_size = _line_style(number), 1
    downsampled = [downsample(curve) for curve in curves]
    for curve, size in downsampled:
        marker = "o" if len(curve.steps) <= _MAX_POINTS_WITH_MARKERS else ""
        width, alpha = (1.5, 1.0) if len(curves) == 1 else (0.7, 0.35)
        marker_size = 3 if len(curves) == 1 else 0
        axes.plot(
            curve.steps, curve.values, marker=marker, ms=marker_size, lw=width, alpha=alpha, **style
        )
        max_size = max(max_size, size)
    if len(curves) > 1:
        steps, mean, std = mean_and_std([curve for curve, _ in downsampled])
        axes.plot(steps, mean, lw=2.2, **style)
        axes.fill_between(steps, mean - std, mean + std, color=style["color"], alpha=0.15)
    return max_size
