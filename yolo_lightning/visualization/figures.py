"""Matplotlib figures of anchors and datasets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f77d0", "#f08c00", "#2a9d3a", "#c2337e", "#7a5cc9", "#8c6d4f", "#16a0a8", "#9a9a9a")
TEXT, LINE = "#404040", "#d8d8d8"
_MAX_PANEL_COLUMNS, _DPI = 3, 150
_MAX_BARS, _FEW_BARS = 30, 5


@dataclass
class ElbowCurve:
    """Average IoU of the boxes of one dataset with their closest anchors, 0…1."""

    average_ious: Sequence[float]  # with 1, 2, … clustered anchors
    hand_picked: float  # with the nine hand-picked anchors


@dataclass
class AnchorPlot:
    """Data of a plot of anchors."""

    anchors_wh_px: Sequence[Sequence[float]]  # by ascending area
    image_size: int  # side of the network input, px
    cell_px: int


def save_elbow_plot(curves: Mapping[str, ElbowCurve], num_anchors: int, path: Path) -> None:
    """Plot average IoU against the number of anchors, one curve per dataset, as PNG.

    `num_anchors` is highlighted.

    Source: YOLO9000, figure 2, left.
    """
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT)
    max_anchors = max(len(curve.average_ious) for curve in curves.values())
    axes.axvline(num_anchors, color=LINE, linewidth=8, alpha=0.6, zorder=0)
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        percent = [100 * value for value in curve.average_ious]
        label = name
        if num_anchors <= len(percent):
            label += f": {percent[num_anchors - 1]:.1f} % with {num_anchors}"
        axes.plot(range(1, len(percent) + 1), percent, "o-", color=colour, ms=4, label=label)
        axes.plot(9, 100 * curve.hand_picked, "D", color=colour, mfc="white", ms=7, zorder=3)
    axes.plot([], [], "D", color=TEXT, mfc="white", ms=7, label="9 hand-picked anchors")
    axes.set_xticks(range(1, max(max_anchors, 9) + 1))
    axes.set(xlabel="anchors", ylabel="average IoU with the closest anchor, %")
    axes.grid(color=LINE, linewidth=0.6)
    axes.legend(loc="lower right", frameon=True, facecolor="white", edgecolor="none")
    save_figure(figure, path)


def save_anchor_plot(plots: Mapping[str, AnchorPlot], path: Path) -> None:
    """Plot anchors as centred boxes in the network input, one panel per dataset, as PNG.

    Source: YOLO9000, figure 2, right.
    """
    columns = min(_MAX_PANEL_COLUMNS, len(plots))
    rows = -(-len(plots) // columns)
    figure = new_figure(5.8 * columns, 5.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(plots) :]:
        axes.set_axis_off()
    for axes, (name, plot) in zip(grid, plots.items(), strict=False):
        _draw_anchors(axes, name, plot)
    save_figure(figure, path)


@dataclass
class LabelPlot:
    """Data of a plot of a dataset's labels."""

    classes: Mapping[str, int]  # objects, or images, by name
    boxes_wh_norm: NDArray[Any]  # (M, 2), 0…1 of their images; empty for image labels
    boxes_wh_px: NDArray[Any]  # (M, 2)
    centres_norm: NDArray[Any]  # (M, 2)
    objects_per_image: NDArray[Any]  # (N,)
    sizes_wh_px: NDArray[Any]  # (N, 2), of the images


def save_label_plot(labels: LabelPlot, path: Path) -> None:
    """Plot class frequencies, image sizes, and the sizes, centres and counts of boxes, as PNG."""
    from matplotlib.colors import PowerNorm

    boxes, num_panels = labels.boxes_wh_norm, (2, 3) if len(labels.boxes_wh_norm) else (1, 2)
    figure = new_figure(4.0 * num_panels[1], 3.2 * num_panels[0])
    panels = figure.subplots(*num_panels).ravel()
    _draw_classes(panels[0], labels.classes)
    panels[1].scatter(*labels.sizes_wh_px.T, s=8, alpha=0.3, color=COLOURS[0], linewidths=0)
    panels[1].set(title="image sizes, px", xlabel="width", ylabel="height")
    panels[1].set(xlim=(0, None), ylim=(0, None))
    if len(boxes):
        for axes, values_norm in ((panels[2], labels.centres_norm), (panels[3], boxes)):
            limits = ((0, 1), (0, 1))
            axes.hist2d(*values_norm.T, bins=40, range=limits, cmap="Blues", norm=PowerNorm(0.5))
            axes.set_aspect("equal")
        panels[2].set(title="centres of boxes", ylim=(1, 0))
        panels[3].set(title="box sizes, relative to the image", xlabel="width", ylabel="height")
        width, height = np.log2(labels.boxes_wh_px.clip(1e-3)).T
        aspect = (width - height).clip(-3, 3)
        panels[4].hist(aspect, bins=48, range=(-3, 3), color=COLOURS[0])
        panels[4].set_xticks(range(-3, 4), ["1:8", "1:4", "1:2", "1:1", "2:1", "4:1", "8:1"])
        panels[4].set_title("aspect of boxes, width to height")
        counts = np.bincount(labels.objects_per_image)
        panels[5].bar(range(len(counts)), counts, color=COLOURS[0])
        panels[5].xaxis.get_major_locator().set_params(integer=True)
        panels[5].set_title("objects in an image")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=TEXT, labelsize=8)
        axes.title.set(fontsize=10, color=TEXT)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(fontsize=8, color=TEXT)
    panels[0].tick_params(axis="x", labelsize=7)  # names of classes
    save_figure(figure, path)


def _draw_classes(axes: "Axes", classes: Mapping[str, int]) -> None:
    ranked = sorted(classes.items(), key=lambda item: -item[1])
    shown = ranked[:_MAX_BARS]
    axes.bar(range(len(shown)), [count for _, count in shown], color=COLOURS[0])
    axes.set_title(
        "classes" if len(shown) == len(ranked) else f"{len(shown)} of {len(ranked)} classes"
    )
    rotation = 0 if len(shown) <= _FEW_BARS else 90
    axes.set_xticks(range(len(shown)), [name[:18] for name, _ in shown], rotation=rotation)


def _draw_anchors(axes: "Axes", name: str, plot: AnchorPlot) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    side, cell, count = plot.image_size, plot.cell_px, len(plot.anchors_wh_px)
    for line in range(cell, side, cell):
        axes.axvline(line, color=LINE, linewidth=0.5, zorder=0)
        axes.axhline(line, color=LINE, linewidth=0.5, zorder=0)
    step, width = min(0.07, 0.95 / count), 2.4 if count <= 9 else 1.3
    axes.text(1.05, 1, "w x h, px", color=TEXT, transform=axes.transAxes, va="top")
    for number in reversed(range(count)):  # the largest first, so that smaller ones stay visible
        w, h = plot.anchors_wh_px[number]
        colour = colormaps["viridis"](0.8 * (1 - number / max(1, count - 1)))
        corner = ((side - w) / 2, (side - h) / 2)
        axes.add_patch(Rectangle(corner, w, h, fill=False, edgecolor=colour, linewidth=width))
        style: dict[str, Any] = {"transform": axes.transAxes, "va": "top"}
        height = 1 - step * (number + 1)
        axes.text(1.05, height, f"{w:.0f} x {h:.0f}", color=colour, weight="bold", **style)
    ticks = range(0, side + 1, cell * max(1, side // cell // 6))
    axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xticks=ticks, yticks=ticks)
    axes.tick_params(colors=TEXT)
    axes.set_title(name, pad=10)
    axes.set_xlabel(f"{side} px network input, cells of {cell} px")


def new_figure(
    width_inch: float, height_inch: float, layout: Literal["constrained"] | None = "constrained"
) -> "Figure":
    """Return an empty figure without pyplot, which needs a display and keeps every figure."""
    from matplotlib import rcdefaults
    from matplotlib.figure import Figure

    rcdefaults()  # not those of a matplotlibrc in the working folder, which may start programs
    return Figure(figsize=(width_inch, height_inch), dpi=_DPI, layout=layout, facecolor="white")


def save_figure(figure: "Figure", path: Path, file_format: str | None = "png") -> None:
    """Write a figure and create its folder; without a format, the extension selects it.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format=file_format)
    except OSError as error:
        raise InputError(f"{str(path)!r}: {error.strerror or error}") from None
