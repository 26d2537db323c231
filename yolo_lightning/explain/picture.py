"""The picture of `yolo-lightning explain`, drawn with matplotlib."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError
from yolo_lightning.explain.analysis import (
    Box,
    BoxesExplained,
    Corners,
    ExplainedObject,
    LabelExplained,
)
from yolo_lightning.images import Image
from yolo_lightning.visualization.figures import COLOURS, LINE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_OBJECTS, ALL_ANCHORS_UP_TO = 10, 3
"""Objects that are told about; and up to how many the picture has room for every anchor."""

_DPI = 150
# inches
_SIDE, _LEFT, _TOP, _GAP, _LINE = 6.0, 0.4, 0.85, 0.35, 0.165
_TILE, _ROW, _PANEL = 1.1, 1.35, 6.0
_CHARACTERS = 84
_DOTS, _DASHES = (0, (1, 1.6)), (0, (5, 3))
_SMALL, _MONO = 8.0, {"family": "monospace", "fontsize": 7.2}


class _Page:
    """A figure whose parts are placed in inches from its left upper corner."""

    def __init__(self, height: float) -> None:
        try:  # not pyplot: it looks for a screen, and keeps every figure
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError(
                "the picture needs matplotlib: pip install 'yolo-lightning[plots]'"
            ) from None
        self.width, self.height = _LEFT + _SIDE + _GAP + _PANEL + 0.15, height
        self.figure: Figure = Figure(figsize=(self.width, height), dpi=_DPI, facecolor="white")

    def axes(self, left: float, top: float, side: float) -> "Axes":
        """Return a square of axes."""
        bottom = self.height - top - side
        box = (left / self.width, bottom / self.height, side / self.width, side / self.height)
        return self.figure.add_axes(box)

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        """Write a line, its left upper corner at a place."""
        place = (left / self.width, 1 - top / self.height)
        given = {"fontsize": _SMALL, "color": TEXT, **style}
        self.figure.text(*place, text.replace("$", r"\$"), va="top", **given)

    def lines(self, left: float, top: float, lines: Sequence[str], **style: Any) -> float:
        """Write lines one below the other and return where they end."""
        for line in lines:
            self.text(left, top, line, **style)
            top += _LINE
        return top

    def save(self, path: Path) -> None:
        """Write the file, its format chosen by the ending."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.figure.savefig(path)
        except OSError as error:
            raise InputError(f"{str(path)!r}: {error.strerror or error}") from None


@dataclass(frozen=True)
class View:
    """What is drawn, and where to.

    Attributes:
        image: uint8 (S, S, 3), RGB, the network input.
        title: what the image is called.
        path: of the picture; the ending chooses its format.
    """

    image: Image
    title: str
    path: Path


def save_boxes(
    view: View, explained: BoxesExplained, told: Sequence[Sequence[str]], summary: Sequence[str]
) -> None:
    """Draw an image with boxes: what is responsible for each object, and what it costs.

    Args:
        view: the image.
        explained: what the loss sees in it.
        told: about each object, its name first.
        summary: about the image.

    Raises:
        InputError: no matplotlib, or a place that cannot be written.
    """
    objects = explained.objects
    by_size = sorted(range(len(objects)), key=lambda k: -_area(objects[k].truth_xyxy_norm))
    shown = sorted(by_size[:MAX_OBJECTS])
    colours = {k: COLOURS[rank % len(COLOURS)] for rank, k in enumerate(shown)}
    folded = {k: [told[k][0], *_folded(told[k][1:])] for k in shown}
    rows = {k: max(_ROW, (len(lines) + 1.5) * _LINE) for k, lines in folded.items()}
    end = _TOP + _SIDE + 0.6
    page = _Page(max(end + _LINE * (len(summary) + 1), _TOP + 0.25 + sum(rows.values()) + 0.3))
    axes, size = _network_input(page, view, explained), len(view.image)
    _draw_objects(axes, explained, colours, size)
    _legend(page, _object_handles())
    page.lines(_LEFT, end, summary, **_MONO)
    left, top = _LEFT + _SIDE + _GAP, _TOP
    if objects:
        page.text(left, top, "truth and anchors about one middle; the most alike is responsible")
        top += 0.25
    for k, (head, *rest) in folded.items():
        _draw_shapes(page.axes(left, top, _TILE), explained, objects[k], size, colours[k])
        page.text(left + _TILE + 0.15, top, head, color=colours[k], weight="bold", fontsize=9)
        page.lines(left + _TILE + 0.15, top + 0.2, rest)
        top += rows[k]
    if len(objects) > len(shown):
        page.text(left, top, f"and {len(objects) - len(shown)} smaller ones", style="italic")
    if not objects:
        page.text(left, top, "no objects: every box learns that there is nothing")
    page.save(view.path)


def _draw_objects(
    axes: "Axes", explained: BoxesExplained, colours: Mapping[int, str], size: int
) -> None:
    """Draw the boxes of those objects that have a colour, and what is unexpected."""
    tags = list[Corners]()
    anchors = range(len(explained.anchors_wh_norm))
    for k in set(range(len(explained.objects))) - set(colours):
        _rectangle(axes, explained.objects[k].truth_xyxy_norm, size, TEXT, 0.9, "-", "white")
    for one in explained.unexpected:
        _rectangle(axes, one.box.xyxy_norm, size, "black", 1.3, "-.", halo="white")
    for k, colour in colours.items():
        item = explained.objects[k]
        dotted = anchors if len(colours) <= ALL_ANCHORS_UP_TO else [item.box.anchor]
        _responsible(axes, explained, item.box, size, colour, dotted)
        _rectangle(axes, item.truth_xyxy_norm, size, colour, 2.6, "-")
    for k, colour in colours.items():
        _rectangle(axes, explained.objects[k].box.xyxy_norm, size, "white", 1.4, _DASHES, colour)
    for k, colour in colours.items():
        _tag(axes, explained.objects[k].truth_xyxy_norm, size, str(k + 1), colour, tags)
    for one in explained.unexpected:
        _tag(axes, one.box.xyxy_norm, size, f"{one.box.objectness:.2f}", "black", tags)


def save_label(
    view: View,
    explained: LabelExplained,
    told: Sequence[str],
    table: Sequence[str],
    summary: Sequence[str],
) -> None:
    """Draw an image with a label: which box was chosen, and why.

    Args:
        view: the image.
        explained: what the loss sees in it.
        told: about the choice, the label first.
        table: of the candidates, a heading first.
        summary: the terms.

    Raises:
        InputError: no matplotlib, or a place that cannot be written.
    """
    page = _Page(_TOP + _SIDE + 0.45)
    axes, size = _network_input(page, view, explained), len(view.image)
    ranked, tags = list(enumerate(explained.candidates)), list[Corners]()
    for k, one in reversed(ranked):
        if k:
            _rectangle(axes, one.box.xyxy_norm, size, COLOURS[k], 1.5, "-", "white")
            continue
        _responsible(axes, explained, one.box, size, COLOURS[0], [one.box.anchor])
        _rectangle(axes, one.box.xyxy_norm, size, COLOURS[0], 3.0, "-", "black")
    for k, one in ranked:
        _tag(axes, one.box.xyxy_norm, size, str(k + 1), COLOURS[k], tags)
    _legend(page, _label_handles())
    left = _LEFT + _SIDE + _GAP
    page.text(left, _TOP, told[0], color=COLOURS[0], weight="bold", fontsize=11)
    top = page.lines(left, _TOP + 0.28, _folded(told[1:], 100)) + _LINE
    page.text(left, top, table[0], **_MONO)
    for k, line in enumerate(table[1:]):
        top += _LINE
        weight = "bold" if k == 0 else "normal"
        page.text(left, top, line, color=COLOURS[k], weight=weight, **_MONO)
    page.lines(left, top + 2 * _LINE, summary, **_MONO)
    page.save(view.path)


def _folded(lines: Sequence[str], width: int = _CHARACTERS) -> list[str]:
    """Return lines that fit the panel; a name of a path stays in one."""
    whole = [
        line.replace(" ", "\xa0").replace("\xa0·\xa0", "\xa0· ") if "·" in line else line
        for line in lines
    ]
    return [
        p.replace("\xa0", " ")
        for line in whole
        for p in textwrap.wrap(line, width, subsequent_indent="    ")
    ]


def _area(xyxy: Corners) -> float:
    return (xyxy[2] - xyxy[0]) * (xyxy[3] - xyxy[1])


def _network_input(page: _Page, view: View, explained: BoxesExplained | LabelExplained) -> "Axes":
    """Draw the image and its grid, cells numbered."""
    size, (height, width) = len(view.image), explained.grid_hw
    cell = size / width
    page.text(_LEFT, 0.12, view.title[-120:], weight="bold", fontsize=9)
    anchors = len(explained.anchors_wh_norm)
    grid = f"{size} x {size} px, grid {height} x {width} of {cell:.0f} px cells, {anchors} anchors"
    page.text(_LEFT, 0.33, grid)
    axes = page.axes(_LEFT, _TOP, _SIDE)
    axes.imshow(view.image, extent=(0, size, size, 0))
    for k in range(1, width):
        for line in (axes.axvline, axes.axhline):
            line(k * cell, color="black", linewidth=0.9, alpha=0.25)
            line(k * cell, color="white", linewidth=0.5, alpha=0.7)
    middles = [(k + 0.5) * cell for k in range(width)]
    axes.set_xticks(middles, [str(k) for k in range(width)])
    axes.set_yticks(middles, [str(k) for k in range(width)])
    axes.tick_params(length=0, labelsize=7, colors=TEXT, labeltop=True, labelbottom=False, pad=2)
    axes.set(xlim=(0, size), ylim=(size, 0))
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _rectangle(
    axes: "Axes", xyxy_norm: Corners, size: int, colour: str, width: float, dashes: Any,
    halo: str | None = None,
) -> None:  # fmt: skip
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    x1, y1, x2, y2 = (size * value for value in xyxy_norm)
    effects = [withStroke(linewidth=width + 1.4, foreground=halo, alpha=0.8)] if halo else None
    axes.add_patch(
        Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width,
            linestyle=dashes, path_effects=effects,
        )
    )  # fmt: skip


def _responsible(
    axes: "Axes",
    explained: BoxesExplained | LabelExplained,
    box: Box,
    size: int,
    colour: str,
    anchors: Sequence[int],
) -> None:
    """Fill a box's cell, and dot anchors about its middle, its own bold."""
    from matplotlib.patches import Rectangle

    height, width = explained.grid_hw
    cell = size / width
    corner = (box.column * cell, box.row * cell)
    axes.add_patch(Rectangle(corner, cell, cell, facecolor=colour, alpha=0.35, linewidth=0))
    axes.add_patch(Rectangle(corner, cell, cell, fill=False, edgecolor=colour, linewidth=1.2))
    x, y = (box.column + 0.5) / width, (box.row + 0.5) / height
    for anchor in anchors:
        w, h = explained.anchors_wh_norm[anchor]
        own = anchor == box.anchor
        xyxy = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        _rectangle(axes, xyxy, size, colour, 2.4 if own else 1.0, _DOTS, "white")


def _draw_shapes(
    axes: "Axes", explained: BoxesExplained, item: ExplainedObject, size: int, colour: str
) -> None:
    """Draw the truth and all anchors about one middle: what chooses the responsible anchor."""
    x1, y1, x2, y2 = item.truth_xyxy_norm
    shapes = [*explained.anchors_wh_norm, (x2 - x1, y2 - y1)]
    reach = 0.53 * size * max(max(shape) for shape in shapes)
    for k, (w, h) in enumerate(shapes):
        own, truth = k == item.box.anchor, k == len(shapes) - 1
        xyxy = (-w / 2, -h / 2, w / 2, h / 2)
        width = 2.0 if own or truth else 0.9
        _rectangle(axes, xyxy, size, colour, width, "-" if truth else _DOTS)
    axes.set(xlim=(-reach, reach), ylim=(reach, -reach), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(LINE)


def _tag(
    axes: "Axes", xyxy_norm: Corners, size: int, text: str, colour: str, taken: list[Corners]
) -> None:
    """Write on a ground of its own at a corner of a box where nothing is written yet."""
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in xyxy_norm)
    width, height = 0.014 * len(text) + 0.014, 0.03
    places = [(x, y) for y in (y1, y2 - height) for x in (x1, x2 - width)]
    places += [(x1, y1 + k * height) for k in range(1, 9)]
    inside = [(min(max(x, 0.0), 1 - width), min(max(y, 0.0), 1 - height)) for x, y in places]
    spots = [(x, y, x + width, y + height) for x, y in inside]
    free = [s for s in spots if not any(_meet(s, other) for other in taken)] or spots
    taken.append(free[0])
    axes.text(
        size * free[0][0] + 0.007 * size, size * (free[0][1] + height / 2), text, color="white",
        fontsize=8, weight="bold", va="center_baseline",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _meet(a: Corners, b: Corners) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _line(colour: str, width: float, dashes: Any, label: str, halo: str | None = None) -> Any:
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    effects = [withStroke(linewidth=width + 1.4, foreground=halo)] if halo else None
    return Line2D(
        [], [], color=colour, linewidth=width, linestyle=dashes, label=label, path_effects=effects
    )


def _cell(label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=COLOURS[0], alpha=0.35, label=label)


def _object_handles() -> list[Any]:
    colour = COLOURS[0]
    return [
        _line(colour, 2.6, "-", "truth"),
        _line("white", 1.4, _DASHES, "decoded box of that cell and anchor", colour),
        _cell("responsible cell"),
        _line(colour, 2.4, _DOTS, "responsible anchor"),
        _line(colour, 1.0, _DOTS, "other anchors"),
        _line("black", 1.3, "-.", "objectness where no object is"),
    ]


def _label_handles() -> list[Any]:
    colour = COLOURS[0]
    return [
        _line(colour, 3.0, "-", "chosen box"),
        _cell("its cell"),
        _line(colour, 2.4, _DOTS, "its anchor"),
        _line(COLOURS[1], 1.5, "-", "next best, ranked"),
    ]


def _legend(page: _Page, handles: Sequence[Any]) -> None:
    """Name the lines below the image."""
    page.figure.legend(
        handles=list(handles), loc="upper left", ncols=3 if len(handles) > 4 else 4, frameon=False,
        fontsize=_SMALL, handlelength=3, labelcolor=TEXT, borderaxespad=0, columnspacing=1.2,
        bbox_to_anchor=((_LEFT - 0.05) / page.width, 1 - (_TOP + _SIDE + 0.08) / page.height),
    )  # fmt: skip
