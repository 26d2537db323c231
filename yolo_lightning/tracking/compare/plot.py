"""The picture of `yolo-lightning mlflow compare`: metrics over steps, all runs side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.tracking.compare.runs import Curve
from yolo_lightning.visualization.figures import COLOURS, LINE, TEXT, _figure, _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS, _WIDTH, _HEIGHT, _LEGEND_LINE = 3, 5.4, 3.9, 0.2
_CHARACTERS_AN_INCH, _STYLES = 12.0, ("-", (0, (5, 1.5)), (0, (1, 1)))
_MAX_POINTS, _FEW_POINTS = 200, 60


def thinned(curve: Curve) -> tuple[Curve, int]:
    """Return a curve of at most 200 points, and how many of its points each is the mean of.

    Steps become means as well, rounded. Values that are not finite become NaN, which is not drawn.
    """
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    size = -(-len(values) // _MAX_POINTS)
    if size == 1:
        return Curve(curve.steps, values), 1
    starts = np.arange(0, len(values), size)
    known = np.isfinite(values)
    counts = np.add.reduceat(known, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    means = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    lengths = np.diff([*starts, len(values)])
    steps = np.add.reduceat(curve.steps, starts) // lengths
    return Curve(steps, means), size


def mean_and_spread(
    curves: Sequence[Curve],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return steps, mean and standard deviation (n - 1) where all curves have values.

    Between its own steps a curve is a straight line. One curve has no spread: 0.

    Args:
        curves: of the runs of a group, at least one.
    """
    sound = [np.isfinite(curve.values) for curve in curves]
    if not all(known.any() for known in sound):
        return np.empty(0, dtype=np.int64), np.empty(0), np.empty(0)
    lines = [(c.steps[known], c.values[known]) for c, known in zip(curves, sound, strict=True)]
    steps = np.unique(np.concatenate([line[0] for line in lines]))
    start, end = max(line[0][0] for line in lines), min(line[0][-1] for line in lines)
    steps = steps[(steps >= start) & (steps <= end)]
    table = np.stack([np.interp(steps, *line) for line in lines])
    spread = table.std(axis=0, ddof=1) if len(lines) > 1 else np.zeros(len(steps))
    return steps, table.mean(axis=0), spread


def save_curves(panels: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path) -> None:
    """Draw a panel a metric: a line a run, or of groups their mean, a band, and thin lines.

    Args:
        panels: of each metric the curves by label; a label has one colour in all panels.
        path: of the PNG file; its folder is made.

    Raises:
        InputError: no matplotlib, or a place that cannot be written.
    """
    labels = list(next(iter(panels.values())))
    wide = min(_COLUMNS, len(panels))
    high = -(-len(panels) // wide)
    width = max(7.5, _WIDTH * wide)
    columns = max(1, int(width * _CHARACTERS_AN_INCH / (max(map(len, labels)) + 8)))
    legend_lines = -(-len(labels) // columns) + 1
    figure = _figure(width, _HEIGHT * high + _LEGEND_LINE * legend_lines)
    grid = figure.subplots(high, wide, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (metric, lines) in zip(grid, panels.items(), strict=False):
        most = max(_draw(axes, number, list(lines[label])) for number, label in enumerate(labels))
        title = f"{metric}, means of {most} points" if most > 1 else metric
        axes.set_title(title, fontsize=10, color=TEXT)
        axes.set_xlabel("step", fontsize=8, color=TEXT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=TEXT, labelsize=8)
        axes.grid(color=LINE, linewidth=0.6)
    handles = [
        grid[0].plot([], [], label=label, linewidth=2, **_look(number))[0]
        for number, label in enumerate(labels)
    ]
    grouped = any(len(curves) > 1 for lines in panels.values() for curves in lines.values())
    place: dict[str, Any] = {"loc": "outside lower left", "ncols": columns, "frameon": False}
    if grouped:
        place |= {
            "title": "bold: mean of the runs; band: standard deviation to both sides",
            "title_fontsize": 8,
        }
    figure.legend(handles=handles, fontsize=8, labelcolor=TEXT, alignment="left", **place)
    _save(figure, path)


def _look(number: int) -> dict[str, Any]:
    style = _STYLES[number // len(COLOURS) % len(_STYLES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": style}


def _draw(axes: "Axes", number: int, curves: Sequence[Curve]) -> int:
    """Draw a run, or a group of runs; return how many points a drawn one is the mean of at most."""
    look, most = _look(number), 1
    shown = [thinned(curve) for curve in curves]
    for curve, size in shown:
        marker = "o" if len(curve.steps) <= _FEW_POINTS else ""
        width, alpha = (1.5, 1.0) if len(curves) == 1 else (0.7, 0.35)
        size_px = 3 if len(curves) == 1 else 0
        axes.plot(
            curve.steps, curve.values, marker=marker, ms=size_px, lw=width, alpha=alpha, **look
        )
        most = max(most, size)
    if len(curves) > 1:
        steps, mean, spread = mean_and_spread([curve for curve, _ in shown])
        axes.plot(steps, mean, lw=2.2, **look)
        axes.fill_between(steps, mean - spread, mean + spread, color=look["color"], alpha=0.15)
    return most
