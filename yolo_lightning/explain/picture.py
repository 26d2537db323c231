"""Figure of `yolo-lightning explain`, drawn with matplotlib."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.explain.analysis import (
    BoxLossExplanation,
    Corners,
    LabelLossExplanation,
    ObjectExplanation,
    PredictedBox,
)
from yolo_lightning.images import Image
from yolo_lightning.visualization.figures import COLOURS, LINE, TEXT, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_OBJECTS, MAX_OBJECTS_WITH_ALL_ANCHORS = 10, 3
"""Number of objects with an explanation, and number up to which all their anchors are drawn."""

# inches
_SIDE, _LEFT, _TOP, _GAP, _LINE_HEIGHT = 6.0, 0.4, 0.85, 0.35, 0.165
_TILE, _MIN_ROW, _PANEL = 1.1, 1.35, 6.0
_MAX_CHARACTERS = 84
_DOTTED, _DASHED = (0, (1, 1.6)), (0, (5, 3))
_SMALL, _MONO = 8.0, {"family": "monospace", "fontsize": 7.2}


class _Page:
    """A figure with coordinates in inches from its upper left corner."""

    def __init__(self, height: float) -> None:
        self.width, self.height = _LEFT + _SIDE + _GAP + _PANEL + 0.15, height
        self.figure = new_figure(self.width, height, layout=None)

    def axes(self, left: float, top: float, side: float) -> "Axes":
        bottom = self.height - top - side
        box = (left / self.width, bottom / self.height, side / self.width, side / self.height)
        return self.figure.add_axes(box)

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        x, y = left / self.width, 1 - top / self.height
        style = {"fontsize": _SMALL, "color": TEXT, **style}
        self.figure.text(x, y, text.replace("$", r"\$"), va="top", **style)

    def lines(self, left: float, top: float, lines: Sequence[str], **style: Any) -> float:
        """Write lines of text and return the top of the next line."""
        for line in lines:
            self.text(left, top, line, **style)
            top += _LINE_HEIGHT
        return top

    def save(self, path: Path) -> None:
        save_figure(self.figure, path, file_format=None)


@dataclass(frozen=True)
class View:
    """An image to draw, and the file to write."""

    image: Image  # the network input, square
    title: str
    path: Path  # the extension selects the format


def save_boxes(
    view: View,
    explanation: BoxLossExplanation,
    texts: Sequence[Sequence[str]],
    summary: Sequence[str],
) -> None:
    """Draw an image with boxes: the responsible box of each object, and its loss.

    Args:
        view: the image.
        explanation: of its loss.
        texts: for each object, see `object_lines`.
        summary: see `boxes_summary`.
    """
    objects = explanation.objects
    by_size = sorted(range(len(objects)), key=lambda k: -_area(objects[k].target_xyxy_norm))
    shown = sorted(by_size[:MAX_OBJECTS])
    colours = {k: COLOURS[rank % len(COLOURS)] for rank, k in enumerate(shown)}
    wrapped = {k: [texts[k][0], *_wrap(texts[k][1:])] for k in shown}
    row_heights = {
        k: max(_MIN_ROW, (len(lines) + 1.5) * _LINE_HEIGHT) for k, lines in wrapped.items()
    }
    end = _TOP + _SIDE + 0.6
    page_height = max(
        end + _LINE_HEIGHT * (len(summary) + 1), _TOP + 0.25 + sum(row_heights.values()) + 0.3
    )
    page = _Page(page_height)
    axes, size = _draw_input(page, view, explanation), len(view.image)
    _draw_objects(axes, explanation, colours, size)
    _add_legend(page, _object_handles())
    page.lines(_LEFT, end, summary, **_MONO)
    left, top = _LEFT + _SIDE + _GAP, _TOP
    if objects:
        page.text(
            left, top, "target and anchors, centred; the one with the largest IoU is responsible"
        )
        top += 0.25
    for k, (name, *lines) in wrapped.items():
        _draw_shapes(page.axes(left, top, _TILE), explanation, objects[k], size, colours[k])
        page.text(left + _TILE + 0.15, top, name, color=colours[k], weight="bold", fontsize=9)
        page.lines(left + _TILE + 0.15, top + 0.2, lines)
        top += row_heights[k]
    if len(objects) > len(shown):
        page.text(left, top, f"and {len(objects) - len(shown)} smaller objects", style="italic")
    if not objects:
        page.text(left, top, "no objects: every box has a no-object loss")
    page.save(view.path)


def _draw_objects(
    axes: "Axes", explanation: BoxLossExplanation, colours: Mapping[int, str], size: int
) -> None:
    """Draw the boxes of the objects, in colour if they have one, and the false positives."""
    labels = list[Corners]()
    objects, all_anchors = explanation.objects, range(len(explanation.anchors_wh_norm))
    for k in set(range(len(objects))) - set(colours):
        _draw_box(axes, objects[k].target_xyxy_norm, size, TEXT, 0.9, "-", "white")
    for one in explanation.false_positives:
        _draw_box(axes, one.box.xyxy_norm, size, "black", 1.3, "-.", outline="white")
    for k, colour in colours.items():
        item = objects[k]
        draw_all = len(colours) <= MAX_OBJECTS_WITH_ALL_ANCHORS
        anchors = all_anchors if draw_all else [item.box.anchor]
        _draw_responsible(axes, explanation, item.box, size, colour, anchors)
        _draw_box(axes, item.target_xyxy_norm, size, colour, 2.6, "-")
    for k, colour in colours.items():
        _draw_box(axes, objects[k].box.xyxy_norm, size, "white", 1.4, _DASHED, colour)
    for k, colour in colours.items():
        _draw_label(axes, objects[k].target_xyxy_norm, size, str(k + 1), colour, labels)
    for one in explanation.false_positives:
        _draw_label(axes, one.box.xyxy_norm, size, f"{one.box.objectness:.2f}", "black", labels)


def save_label(
    view: View,
    explanation: LabelLossExplanation,
    lines: Sequence[str],
    table: Sequence[str],
    summary: Sequence[str],
) -> None:
    """Draw an image with an image label; the texts are those of `explain.text`."""
    page = _Page(_TOP + _SIDE + 0.45)
    axes, size = _draw_input(page, view, explanation), len(view.image)
    ranked, labels = list(enumerate(explanation.candidates)), list[Corners]()
    for k, one in reversed(ranked):
        if k:
            _draw_box(axes, one.box.xyxy_norm, size, COLOURS[k], 1.5, "-", "white")
            continue
        _draw_responsible(axes, explanation, one.box, size, COLOURS[0], [one.box.anchor])
        _draw_box(axes, one.box.xyxy_norm, size, COLOURS[0], 3.0, "-", "black")
    for k, one in ranked:
        _draw_label(axes, one.box.xyxy_norm, size, str(k + 1), COLOURS[k], labels)
    _add_legend(page, _label_handles())
    left = _LEFT + _SIDE + _GAP
    page.text(left, _TOP, lines[0], color=COLOURS[0], weight="bold", fontsize=11)
    top = page.lines(left, _TOP + 0.28, _wrap(lines[1:], 100)) + _LINE_HEIGHT
    page.text(left, top, table[0], **_MONO)
    for k, line in enumerate(table[1:]):
        top += _LINE_HEIGHT
        weight = "bold" if k == 0 else "normal"
        page.text(left, top, line, color=COLOURS[k], weight=weight, **_MONO)
    page.lines(left, top + 2 * _LINE_HEIGHT, summary, **_MONO)
    page.save(view.path)


def _wrap(lines: Sequence[str], width: int = _MAX_CHARACTERS) -> list[str]:
    """Wrap lines to the width of the panel, without breaks inside the nodes of a path."""
    unbreakable = [
        line.replace(" ", "\xa0").replace("\xa0·\xa0", "\xa0· ") if "·" in line else line
        for line in lines
    ]
    return [
        part.replace("\xa0", " ")
        for line in unbreakable
        for part in textwrap.wrap(line, width, subsequent_indent="    ")
    ]


def _area(xyxy: Corners) -> float:
    return (xyxy[2] - xyxy[0]) * (xyxy[3] - xyxy[1])


def _draw_input(
    page: _Page, view: View, explanation: BoxLossExplanation | LabelLossExplanation
) -> "Axes":
    """Draw the network input with its grid and the numbers of rows and columns."""
    size, (height, width) = len(view.image), explanation.grid_hw
    cell = size / width
    page.text(_LEFT, 0.12, view.title[-120:], weight="bold", fontsize=9)
    anchors = len(explanation.anchors_wh_norm)
    grid = f"{size} x {size} px, grid {height} x {width} of {cell:.0f} px cells, {anchors} anchors"
    page.text(_LEFT, 0.33, grid)
    axes = page.axes(_LEFT, _TOP, _SIDE)
    axes.imshow(view.image, extent=(0, size, size, 0))
    for k in range(1, width):
        for line in (axes.axvline, axes.axhline):
            line(k * cell, color="black", linewidth=0.9, alpha=0.25)
            line(k * cell, color="white", linewidth=0.5, alpha=0.7)
    centres = [(k + 0.5) * cell for k in range(width)]
    axes.set_xticks(centres, [str(k) for k in range(width)])
    axes.set_yticks(centres, [str(k) for k in range(width)])
    axes.tick_params(length=0, labelsize=7, colors=TEXT, labeltop=True, labelbottom=False, pad=2)
    axes.set(xlim=(0, size), ylim=(size, 0))
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _draw_box(
    axes: "Axes", xyxy_norm: Corners, size: int, colour: str, width: float, style: Any,
    outline: str | None = None,
) -> None:  # fmt: skip
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    x1, y1, x2, y2 = (size * value for value in xyxy_norm)
    effects = (
        [withStroke(linewidth=width + 1.4, foreground=outline, alpha=0.8)] if outline else None
    )
    axes.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width,
            linestyle=style, path_effects=effects,
        )
    )  # fmt: skip


def _draw_responsible(
    axes: "Axes",
    explanation: BoxLossExplanation | LabelLossExplanation,
    box: PredictedBox,
    size: int,
    colour: str,
    anchors: Sequence[int],
) -> None:
    """Fill the cell of a box, and draw anchors at its centre, the responsible one in bold."""
    from matplotlib.patches import Rectangle

    height, width = explanation.grid_hw
    cell = size / width
    corner = (box.column * cell, box.row * cell)
    axes.add_patch(Rectangle(corner, cell, cell, facecolor=colour, alpha=0.35, linewidth=0))
    axes.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=colour, linewidth=1.2))
    x, y = (box.column + 0.5) / width, (box.row + 0.5) / height
    for anchor in anchors:
        w, h = explanation.anchors_wh_norm[anchor]
        is_responsible = anchor == box.anchor
        xyxy = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        _draw_box(axes, xyxy, size, colour, 2.4 if is_responsible else 1.0, _DOTTED, "white")


def _draw_shapes(
    axes: "Axes", explanation: BoxLossExplanation, item: ObjectExplanation, size: int, colour: str
) -> None:
    """Draw the target and all anchors, centred, whose IoU determines the responsible anchor."""
    x1, y1, x2, y2 = item.target_xyxy_norm
    shapes = [*explanation.anchors_wh_norm, (x2 - x1, y2 - y1)]
    limit = 0.53 * size * max(max(shape) for shape in shapes)
    for k, (w, h) in enumerate(shapes):
        is_responsible, is_target = k == item.box.anchor, k == len(shapes) - 1
        xyxy = (-w / 2, -h / 2, w / 2, h / 2)
        width = 2.0 if is_responsible or is_target else 0.9
        _draw_box(axes, xyxy, size, colour, width, "-" if is_target else _DOTTED)
    axes.set(xlim=(-limit, limit), ylim=(limit, -limit), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(LINE)


def _draw_label(
    axes: "Axes", xyxy_norm: Corners, size: int, text: str, colour: str, labels: list[Corners]
) -> None:
    """Draw text at a corner of a box, apart from earlier labels, and add it to `labels`."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in xyxy_norm)
    width, height = 0.014 * len(text) + 0.014, 0.03
    corners = [(x, y) for y in (y1, y2 - height) for x in (x1, x2 - width)]
    corners += [(x1, y1 + k * height) for k in range(1, 9)]
    inside = [(min(max(x, 0.0), 1 - width), min(max(y, 0.0), 1 - height)) for x, y in corners]
    areas = [(x, y, x + width, y + height) for x, y in inside]
    free = [area for area in areas if not any(_overlap(area, other) for other in labels)] or areas
    labels.append(free[0])
    axes.text(
        size * free[0][0] + 0.007 * size, size * (free[0][1] + height / 2), text, color="white",
        fontsize=8, weight="bold", va="center_baseline",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _overlap(a: Corners, b: Corners) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _line(colour: str, width: float, style: Any, label: str, outline: str | None = None) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    effects = [withStroke(linewidth=width + 1.4, foreground=outline)] if outline else None
    return Line2D(
        [], [], color=colour, linewidth=width, linestyle=style, label=label, path_effects=effects
    )


def _cell(label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=COLOURS[0], alpha=0.35, label=label)


def _object_handles() -> list[Any]:
    colour = COLOURS[0]
    return [
        _line(colour, 2.6, "-", "target"),
        _line("white", 1.4, _DASHED, "decoded box of that cell and anchor", colour),
        _cell("responsible cell"),
        _line(colour, 2.4, _DOTTED, "responsible anchor"),
        _line(colour, 1.0, _DOTTED, "other anchors"),
        _line("black", 1.3, "-.", "objectness without an object"),
    ]


def _label_handles() -> list[Any]:
    colour = COLOURS[0]
    return [
        _line(colour, 3.0, "-", "selected box"),
        _cell("its cell"),
        _line(colour, 2.4, _DOTTED, "its anchor"),
        _line(COLOURS[1], 1.5, "-", "next best, ranked"),
    ]


def _add_legend(page: _Page, handles: Sequence[Any]) -> None:
    """Add a legend below the image."""
    page.figure.legend(
        handles=list(handles), loc="upper left", ncols=3 if len(handles) > 4 else 4, frameon=False,
        fontsize=_SMALL, handlelength=3, labelcolor=TEXT, borderaxespad=0, columnspacing=1.2,
        bbox_to_anchor=((_LEFT - 0.05) / page.width, 1 - (_TOP + _SIDE + 0.08) / page.height),
    )  # fmt: skip
