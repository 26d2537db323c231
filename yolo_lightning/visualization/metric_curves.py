"""Plots of metrics over steps, for several runs or groups of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from yolo_lightning.visualization.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_MAX_POINTS = 200
_LINE_STYLES = ("-", "--", ":")


def downsample(curve: pd.Series) -> tuple[pd.Series, int]:
    """Average neighbouring points to at most 200; also return the number of points per mean.

    Mean steps (the index) are rounded down. Values that are not finite become NaN, which is not
    drawn.
    """
    size = max(1, -(-len(curve) // _MAX_POINTS))
    blocks = np.arange(len(curve)) // size
    steps = curve.index.to_series().groupby(blocks).mean().astype(int)
    means = curve.where(np.isfinite(curve)).groupby(blocks).mean()
    return means.set_axis(steps), size


def mean_and_std(curves: Sequence[pd.Series]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return steps, mean and standard deviation (n - 1) over the range that all curves cover.

    Curves are interpolated linearly. The standard deviation of a single curve is 0.
    """
    lines = pd.concat([curve.dropna() for curve in curves], axis=1).sort_index()
    lines = lines.interpolate(method="index", limit_area="inside").dropna()
    std = lines.std(axis=1).fillna(0)
    return lines.index.to_numpy(), lines.mean(axis=1).to_numpy(), std.to_numpy()


def save_curves(
    curves: Mapping[str, Mapping[str, pd.Series]], labels: pd.Series, path: Path
) -> None:
    """Draw a PNG with one panel per metric: a line per run, or mean, band and lines per group.

    Args:
        curves: for each metric, values by step (the index) of each run id that has it.
        labels: of the run ids; runs with the same label are a group, with the same colour in all
            panels.
        path: of the file; its folder is created.
    """
    groups = labels.groupby(labels, sort=False).groups
    figure = new_figure(8, 3.5 * len(curves) + 0.2 * len(groups))
    panels = figure.subplots(len(curves), squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axes, (metric, by_run) in zip(panels, curves.items(), strict=True):
        max_size = 1
        for number, (label, run_ids) in enumerate(groups.items()):
            downsampled = [downsample(by_run[run_id]) for run_id in run_ids if run_id in by_run]
            if downsampled:
                lines, sizes = zip(*downsampled, strict=True)
                style = {"color": f"C{number}", "linestyle": _LINE_STYLES[number // 10 % 3]}
                handles[label] = _draw(axes, lines, style)
                max_size = max(max_size, *sizes)
        axes.set_title(f"{metric}, means of {max_size} points" if max_size > 1 else metric)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    has_groups = labels.duplicated().any()
    title = "bold: mean of the runs; band: ± 1 standard deviation" if has_groups else ""
    figure.legend(
        handles.values(), handles, loc="outside lower left", title=title, alignment="left"
    )
    save_figure(figure, path)


def _draw(axes: "Axes", lines: Sequence[pd.Series], style: Mapping[str, Any]) -> "Line2D":
    """Draw a run, or the runs of a group with their mean; return the bold line."""
    if len(lines) == 1:
        return axes.plot(lines[0], marker=".", markersize=4, **style)[0]
    for line in lines:
        axes.plot(line, linewidth=0.7, alpha=0.4, **style)
    steps, mean, std = mean_and_std(lines)
    axes.fill_between(steps, mean - std, mean + std, color=style["color"], alpha=0.15)
    return axes.plot(steps, mean, linewidth=2, **style)[0]
