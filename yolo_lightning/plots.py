"""Diagrams as PNG files, drawn with matplotlib, which is installed by the extra `plots`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f77d0", "#f08c00", "#2a9d3a", "#c2337e", "#7a5cc9", "#8c6d4f", "#16a0a8", "#9a9a9a")
TEXT, LINE = "#404040", "#d8d8d8"
_PANELS_WIDE, _DPI = 3, 150


@dataclass
class ElbowCurve:
    """How well more and more priors match the boxes of one dataset.

    Attributes:
        average_ious: of 1, 2, … priors, 0…1.
        hand_picked: average IoU of the nine hand-picked priors, 0…1.
    """

    average_ious: Sequence[float]
    hand_picked: float


@dataclass
class PriorsPicture:
    """What a picture of priors shows.

    Attributes:
        priors_wh_px: widths and heights in the network input, by ascending area.
        image_size: side of the network input, px.
        cell_px: side of a grid cell, px.
    """

    priors_wh_px: Sequence[Sequence[float]]
    image_size: int
    cell_px: int


def save_elbow(curves: Mapping[str, ElbowCurve], chosen: int, path: Path) -> None:
    """Draw average IoU against the number of priors, a curve for each dataset.

    Args:
        curves: by the name of the dataset.
        chosen: number of priors to mark.
        path: of the PNG file; its folder is made.

    Raises:
        InputError: no matplotlib, or a place that cannot be written.

    Source: YOLO9000, figure 2, left.
    """
    figure = _figure(7.2, 4.6)
    axes = figure.add_subplot()
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    axes.tick_params(colors=TEXT)
    most = max(len(curve.average_ious) for curve in curves.values())
    axes.axvline(chosen, color=LINE, linewidth=8, alpha=0.6, zorder=0)
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        percent = [100 * value for value in curve.average_ious]
        label = name
        if chosen <= len(percent):
            label += f": {percent[chosen - 1]:.1f} % with {chosen}"
        axes.plot(range(1, len(percent) + 1), percent, "o-", color=colour, ms=4, label=label)
        axes.plot(9, 100 * curve.hand_picked, "D", color=colour, mfc="white", ms=7, zorder=3)
    axes.plot([], [], "D", color=TEXT, mfc="white", ms=7, label="9 hand-picked priors")
    axes.set_xticks(range(1, max(most, 9) + 1))
    axes.set_xlabel("priors")
    axes.set_ylabel("average IoU with the closest prior, %")
    axes.grid(color=LINE, linewidth=0.6)
    axes.legend(loc="lower right", frameon=True, facecolor="white", edgecolor="none")
    _save(figure, path)


def save_priors(pictures: Mapping[str, PriorsPicture], path: Path) -> None:
    """Draw priors as centred boxes in the network input, a square for each dataset.

    Args:
        pictures: by the name of the dataset.
        path: of the PNG file; its folder is made.

    Raises:
        InputError: no matplotlib, or a place that cannot be written.

    Source: YOLO9000, figure 2, right.
    """
    columns = min(_PANELS_WIDE, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = _figure(5.8 * columns, 5.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(pictures) :]:
        axes.set_axis_off()
    for axes, (name, picture) in zip(grid, pictures.items(), strict=False):
        _draw_priors(axes, name, picture)
    _save(figure, path)


def _draw_priors(axes: "Axes", name: str, picture: PriorsPicture) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    side, cell, count = picture.image_size, picture.cell_px, len(picture.priors_wh_px)
    for line in range(cell, side, cell):
        axes.axvline(line, color=LINE, linewidth=0.5, zorder=0)
        axes.axhline(line, color=LINE, linewidth=0.5, zorder=0)
    step, width = min(0.07, 0.95 / count), 2.4 if count <= 9 else 1.3
    axes.text(1.05, 1, "w x h, px", color=TEXT, transform=axes.transAxes, va="top")
    for number in reversed(range(count)):  # the largest first, so that the smaller lie above
        w, h = picture.priors_wh_px[number]
        colour = colormaps["viridis"](0.8 * (1 - number / max(1, count - 1)))
        corner = ((side - w) / 2, (side - h) / 2)
        axes.add_patch(Rectangle(corner, w, h, fill=False, edgecolor=colour, linewidth=width))
        place: dict[str, Any] = {"transform": axes.transAxes, "va": "top"}
        height = 1 - step * (number + 1)
        axes.text(1.05, height, f"{w:.0f} x {h:.0f}", color=colour, weight="bold", **place)
    ticks = range(0, side + 1, cell * max(1, side // cell // 6))
    axes.set(xlim=(0, side), ylim=(side, 0), aspect="equal", xticks=ticks, yticks=ticks)
    axes.tick_params(colors=TEXT)
    axes.set_title(name, pad=10)
    axes.set_xlabel(f"{side} px network input, cells of {cell} px")


def _figure(width_inch: float, height_inch: float) -> "Figure":
    """Return an empty figure."""
    try:  # not pyplot: it looks for a screen, and keeps every figure
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'yolo-lightning[plots]'") from None
    return Figure(figsize=(width_inch, height_inch), dpi=_DPI, layout="constrained")


def _save(figure: "Figure", path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise InputError(f"{str(path)!r}: {error.strerror or error}") from None
