"""Figure of `yolo-lightning explain`, drawn with matplotlib: the image, and the printed text."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.explain import text
from yolo_lightning.explain.analysis import (
    BoxLossExplanation,
    Corners,
    LabelLossExplanation,
    LossExplanation,
    PredictedBox,
    area,
    width_height,
)
from yolo_lightning.visualization.figures import COLOURS, LINE, TEXT, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_OBJECTS, MAX_OBJECTS_WITH_ALL_ANCHORS = 10, 3
"""Number of objects with an explanation, and number up to which all their anchors are drawn."""

_WIDTH, _HEIGHT, _TOP, _LINE_HEIGHT, _TILE_HEIGHT = 13.5, 7.6, 0.6, 0.16, 1.35  # inches
_MAX_LINE, _TILES_PER_ROW = 100, 5
_DOTTED, _DASHED = (0, (1, 1.6)), (0, (5, 3))


def _new_page(title: str, explanation: LossExplanation) -> "Figure":
    """Return the network input with its grid on the left, and axes for text on the right."""
    grid, size, anchors = explanation.grid, explanation.image_size, explanation.anchors_wh_norm
    figure = new_figure(_WIDTH, _HEIGHT, layout=None)
    axes, panel = figure.subplots(1, 2)
    panel.axis("off")
    axes.imshow(explanation.batch.images[0].permute(1, 2, 0).numpy(), extent=(0, 1, 1, 0))
    axes.set_anchor("NW")
    title = f"{title[-100:]}, {size} x {size} px, grid {grid} x {grid} of {size // grid} px cells"
    title = f"{title}, {len(anchors)} anchors".replace("$", r"\$")
    axes.set_title(title, loc="left", fontsize=8, weight="bold", color=TEXT, pad=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([(k + 0.5) / grid for k in range(grid)], [*map(str, range(grid))])
    axes.tick_params(colors=TEXT, length=0, labelsize=7, labeltop=True, labelbottom=False)
    edges = [k / grid for k in range(1, grid)]
    for colour, width, alpha in (("black", 0.9, 0.25), ("white", 0.5, 0.7)):
        for draw in (axes.vlines, axes.hlines):
            draw(edges, 0, 1, colour, linewidth=width, alpha=alpha, zorder=0.5)
    axes.set(xlim=(0, 1), ylim=(1, 0))
    axes.spines[:].set_visible(False)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    """Fit the page to its text and tiles, add a legend of what was drawn, and write it."""
    axes, panel = figure.axes
    tiles = -(-len(axes.child_axes) // _TILES_PER_ROW) * _TILE_HEIGHT
    height = max(_HEIGHT + tiles, _TOP + (len(panel.texts) + 1) * _LINE_HEIGHT)
    figure.set_size_inches(_WIDTH, height)
    figure.subplots_adjust(0.03, 0.1 / height, 0.99, 1 - _TOP / height, wspace=0.06)
    panel.set_ylim(-(height - _TOP - 0.1) / _LINE_HEIGHT, 0)
    handles, labels = axes.get_legend_handles_labels()
    drawn = dict(zip(labels, handles, strict=True))
    style: dict[str, Any] = {"frameon": False, "fontsize": 8, "labelcolor": TEXT}
    style |= {"loc": "upper left", "bbox_to_anchor": (0, 0), "ncols": 3, "handlelength": 3}
    axes.legend(drawn.values(), drawn, **style)
    save_figure(figure, path, file_format=None)


def _write(panel: "Axes", lines: Sequence[str], colour: str = TEXT, weight: str = "normal") -> None:
    """Write lines of text below those before."""
    style: dict[str, Any] = {"fontsize": 7.2, "family": "monospace", "va": "top"}
    for line in lines:
        for part in textwrap.wrap(line, _MAX_LINE, subsequent_indent="      ") or [""]:
            part = part.replace("$", r"\$")
            panel.text(0, -len(panel.texts), part, color=colour, weight=weight, **style)


def _around(x: float, y: float, w: float, h: float) -> Corners:
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def _draw_box(
    axes: "Axes", xyxy: Corners, colour: str, width: float, line: Any = "-", outline: str = "",
    label: str = "", **style: Any,
) -> None:  # fmt: skip
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    if outline:
        style["path_effects"] = [withStroke(linewidth=width + 1.4, foreground=outline)]
    style = {"fill": False, "color": colour, "lw": width, "ls": line, "label": label, **style}
    axes.add_patch(Rectangle(xyxy[:2], *width_height(xyxy), **style))


def _draw_responsible(
    axes: "Axes", explanation: LossExplanation, box: PredictedBox, colour: str, all_anchors: bool
) -> None:
    """Fill the cell of a box, and draw its anchor, in bold, or all anchors at its centre."""
    cell = 1 / explanation.grid
    x, y = (box.column + 0.5) * cell, (box.row + 0.5) * cell
    filled: dict[str, Any] = {"label": "its cell", "fill": True, "alpha": 0.35}
    _draw_box(axes, _around(x, y, cell, cell), colour, 0, **filled)
    corners = [_around(x, y, *wh) for wh in explanation.anchors_wh_norm]
    _draw_box(axes, corners.pop(box.anchor), colour, 2.4, _DOTTED, "white", "its anchor")
    for other in corners if all_anchors else ():
        _draw_box(axes, other, colour, 1.0, _DOTTED, "white", "other anchors")


def _draw_badge(axes: "Axes", xyxy: Corners, label: str, colour: str) -> None:
    """Write a label at a corner or an edge of a box, apart from earlier badges."""
    x1, y1, x2, y2 = (min(max(value, 0.02), 0.98) for value in xyxy)
    centre, badges = (x1 + x2) / 2, [badge.get_position() for badge in axes.texts]
    places = [(x1, y1), (x2, y1), (x1, y2), (x2, y2), (centre, y1), (centre, y2)]
    free = [p for p in places if all(math.dist(p, badge) > 0.05 for badge in badges)]
    box = {"facecolor": colour, "edgecolor": "none", "pad": 1.8}
    style: dict[str, Any] = {"color": "white", "fontsize": 8, "weight": "bold", "bbox": box}
    axes.text(*(free or places)[0], label, ha="center", va="center_baseline", **style)


def _draw_tile(axes: "Axes", explanation: BoxLossExplanation, k: int, colour: str) -> None:
    """Draw the target of object k and all anchors below the image, centred."""
    item, (row, column) = explanation.objects[k], divmod(len(axes.child_axes), _TILES_PER_ROW)
    tile = axes.inset_axes((0.2 * column, -0.31 - 0.21 * row, 0.17, 0.17))
    for anchor, wh in enumerate(explanation.anchors_wh_norm):
        width = 2.0 if anchor == item.box.anchor else 0.9
        _draw_box(tile, _around(0, 0, *wh), colour, width, _DOTTED)
    _draw_box(tile, _around(0, 0, *width_height(item.target_xyxy_norm)), colour, 2.0)
    tile.set_aspect("equal", adjustable="datalim")
    tile.autoscale_view()
    tile.set(xticks=[], yticks=[])
    tile.spines[:].set_color(LINE)
    tile.set_title(str(k + 1), color=colour, fontsize=8, weight="bold", pad=2)


def save_boxes(path: Path, title: str, explanation: BoxLossExplanation) -> None:
    """Draw the network input, the responsible box of each object, and the printed text."""
    figure, objects = _new_page(title, explanation), explanation.objects
    axes, panel = figure.axes
    by_size = sorted(range(len(objects)), key=lambda k: -area(objects[k].target_xyxy_norm))
    shown = sorted(by_size[:MAX_OBJECTS])
    colours = {k: COLOURS[rank % len(COLOURS)] for rank, k in enumerate(shown)}
    for k, colour in colours.items():
        _draw_box(axes, objects[k].target_xyxy_norm, colour, 2.6, label="target")
    for k, colour in colours.items():
        item, draw_all = objects[k], len(shown) <= MAX_OBJECTS_WITH_ALL_ANCHORS
        _draw_box(axes, item.box.xyxy_norm, "white", 1.4, _DASHED, colour, "responsible box")
        _draw_responsible(axes, explanation, item.box, colour, draw_all)
        _draw_badge(axes, item.target_xyxy_norm, str(k + 1), colour)
        _draw_tile(axes, explanation, k, colour)
        name, *lines = text.object_lines(explanation, k)
        _write(panel, [name], colour, "bold")
        _write(panel, [*lines, ""])
    for k in by_size[MAX_OBJECTS:]:
        _draw_box(axes, objects[k].target_xyxy_norm, TEXT, 0.9, "-", "white", "smaller targets")
    for one in explanation.false_positives:
        label = "objectness without an object"
        _draw_box(axes, one.box.xyxy_norm, "black", 1.3, "-.", "white", label)
        _draw_badge(axes, one.box.xyxy_norm, f"{one.box.objectness:.2f}", "black")
    if len(objects) > len(shown):
        _write(panel, [f"and {len(objects) - len(shown)} smaller objects", ""])
    note = "target and anchors, centred; the one with the largest IoU is responsible"
    note = note if objects else "no objects: every box has a no-object loss"
    axes.set_xlabel(note, loc="left", labelpad=38, color=TEXT, fontsize=8)
    _write(panel, [*text.other_boxes_lines(explanation), "", *text.terms_table(explanation)])
    _save(figure, path)


def save_label(path: Path, title: str, explanation: LabelLossExplanation) -> None:
    """Draw the network input, the best boxes for its label, and the printed text."""
    figure = _new_page(title, explanation)
    axes, panel = figure.axes
    boxes = [one.box for one in explanation.candidates]
    for box, colour in reversed([*zip(boxes, COLOURS, strict=False)][1:]):
        _draw_box(axes, box.xyxy_norm, colour, 1.5, "-", "white", "next best, ranked")
    _draw_box(axes, boxes[0].xyxy_norm, COLOURS[0], 3.0, "-", "black", "selected box")
    _draw_responsible(axes, explanation, boxes[0], COLOURS[0], all_anchors=False)
    name, *lines = text.label_lines(explanation)
    heading, *rows = text.candidates_table(explanation)
    _write(panel, [name], COLOURS[0], "bold")
    _write(panel, [*lines, "", heading])
    for k, (box, row) in enumerate(zip(boxes, rows, strict=True)):
        _draw_badge(axes, box.xyxy_norm, str(k + 1), COLOURS[k])
        _write(panel, [row], COLOURS[k])
    _write(panel, ["", *text.terms_table(explanation)])
    _save(figure, path)
