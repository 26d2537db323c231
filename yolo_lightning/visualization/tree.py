"""Drawing of a class tree, from left to right or, with many nodes, as a wheel; SVG or PNG."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_lightning.errors import InputError
from yolo_lightning.tree.wordtree import WordTree
from yolo_lightning.visualization.figures import TEXT, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "detection": "#1f77d0",
    "classification": "#f08c00",
    "both": "#2a9d3a",
    "neither": "#606060",
}
LINE = "#b8b8b8"
MAX_NODES, MAX_ROWS = 1500, 100  # shown in all, and from left to right
_TEXT, _CHARACTER, _ROW = 9.0, 0.076, 0.2  # points, inch, inch
_WHEEL_TEXT, _RING_EXPONENT = 6.0, 0.7


@dataclass
class TreeLayout:
    """The shown nodes, parents first, with their place in the drawing."""

    rows: dict[int, float] = field(default_factory=dict)  # 0 … leaves - 1
    levels: dict[int, int] = field(default_factory=dict)  # from 0 at the top
    children: dict[int, list[int]] = field(default_factory=dict)  # of -1: those at the top
    names: dict[int, str] = field(default_factory=dict)  # with the number of hidden descendants
    sizes: list[int] = field(default_factory=list)  # nodes of each branch, its root included
    leaves: int = 0


def visible_depth(tree: WordTree, max_nodes: int = MAX_NODES) -> int:
    """Return the number of levels, at least one, that have at most `max_nodes` nodes together."""
    levels = (tree.paths >= 0).sum(dim=1)
    depth = 1
    while depth < tree.paths.shape[1] and int((levels <= depth + 1).sum()) <= max_nodes:
        depth += 1
    return depth


def layout_tree(tree: WordTree, depth: int) -> TreeLayout:
    """Lay out `depth` levels of a tree: leaves one after the other, parents amid their children."""
    layout = TreeLayout(sizes=tree.paths[tree.paths >= 0].bincount(minlength=len(tree)).tolist())
    children: dict[int, list[int]] = {}
    for child, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(child)

    def place(node: int, level: int) -> float:
        shown = children.get(node, []) if level + 1 < depth else []
        layout.children[node] = shown
        if node >= 0:
            hidden = 0 if shown else layout.sizes[node] - 1
            layout.levels[node] = level
            layout.names[node] = tree.names[node] + (f" (+{hidden})" if hidden else "")
        rows = [place(child, level + 1) for child in shown]
        if not rows:
            layout.leaves += 1
        layout.rows[node] = (rows[0] + rows[-1]) / 2 if rows else layout.leaves - 1.0
        return layout.rows[node]

    place(-1, -1)
    return layout


def plot_tree(layout: TreeLayout, kinds: Mapping[int, str], legend: Mapping[str, str]) -> "Figure":
    """Plot a tree, from left to right with up to `MAX_ROWS` nodes, else as a wheel.

    Args:
        layout: of the shown nodes.
        kinds: by node, keys of `COLOURS`; of other nodes `neither`.
        legend: texts by kind.
    """
    colours = {node: COLOURS[kinds.get(node, "neither")] for node in layout.names}
    plot = _plot_left_to_right if len(layout.names) <= MAX_ROWS else _plot_wheel
    figure = plot(layout, colours)
    axes = figure.axes[0]
    for kind, text in legend.items():
        axes.plot([], [], "o", color=COLOURS[kind], markersize=5, label=text)
    if legend:
        figure.legend(loc="upper left", ncols=len(legend), frameon=False, fontsize=_TEXT)
    return figure


def _plot_left_to_right(layout: TreeLayout, colours: Mapping[int, str]) -> "Figure":
    """Plot a column for each level, as wide as its longest name; units are inches."""
    columns = [0.3]
    for level in range(max(layout.levels.values(), default=0) + 1):
        names = [layout.names[node] for node, own in layout.levels.items() if own == level]
        columns.append(columns[-1] + _CHARACTER * max(map(len, names)) + 0.45)
    width, height = max(columns[-1], 5.0), _ROW * layout.leaves + 0.6
    figure = new_figure(width, height, None)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for node, name in layout.names.items():
        x, y = columns[layout.levels[node]], 0.5 + _ROW * (layout.rows[node] + 0.5)
        axes.plot(x, y, "o", color=colours[node], markersize=4)
        axes.text(
            x + 0.08, y, name, va="center", size=_TEXT, color=colours[node], parse_math=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
        ends = [0.5 + _ROW * (layout.rows[child] + 0.5) for child in layout.children[node]]
        if ends:
            right = columns[layout.levels[node] + 1]
            axes.hlines(y, x, right - 0.15, LINE, lw=0.8, zorder=1)
            axes.vlines(right - 0.15, min(ends), max(ends), LINE, lw=0.8, zorder=1)
            axes.hlines(ends, right - 0.15, right, LINE, lw=0.8, zorder=1)
    return figure


def _plot_wheel(layout: TreeLayout, colours: Mapping[int, str]) -> "Figure":
    """Plot a ring for each level, with the leaves outside; units are inches."""
    has_root = len(layout.children[-1]) == 1  # drawn in the centre
    rings = max(1, max(layout.levels.values()) + 1 - has_root)
    radius = max(4.0, 1.15 * layout.leaves * _WHEEL_TEXT / 72 / (2 * math.pi))
    longest = max(len(name) for node, name in layout.names.items() if not layout.children[node])
    side = 2 * (radius + longest * _CHARACTER * _WHEEL_TEXT / _TEXT + 0.2)
    figure = new_figure(side, side, None)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-side / 2, side / 2), ylim=(side / 2, -side / 2))
    axes.set_axis_off()

    def polar(node: int) -> tuple[float, float]:
        # few branches are deep, so the inner rings are wide
        share = max(0, layout.levels.get(node, -1) + 1 - has_root) / rings
        outer = radius * share**_RING_EXPONENT if layout.children[node] else radius
        return outer, 2 * math.pi * layout.rows[node] / layout.leaves

    def draw_line(points: list[tuple[float, float]]) -> None:
        x, y = zip(
            *((r * math.cos(angle), r * math.sin(angle)) for r, angle in points), strict=True
        )
        axes.plot(x, y, color=LINE, lw=0.6, zorder=1)

    for node, shown in layout.children.items():
        outer, angle = polar(node)
        ends = [polar(child) for child in shown]
        for end in ends:
            draw_line([(outer, end[1]), end])
        if ends:  # the arc over the children
            step = (ends[-1][1] - ends[0][1]) / 60
            draw_line([(outer, ends[0][1] + k * step) for k in range(61)])
        if node < 0 or (shown and len(layout.rows) > 60 * layout.sizes[node]):
            continue  # no names of small branches
        larger = min(3.0, 0.8 + math.log10(layout.sizes[node])) if shown else 1.0
        is_left = math.cos(angle) < -1e-9
        x, y = ((outer + (-0.05 if shown else 0.05)) * f(angle) for f in (math.cos, math.sin))
        axes.text(
            x, y, layout.names[node], size=larger * _WHEEL_TEXT, va="center", parse_math=False,
            ha="right" if is_left != bool(shown) else "left", rotation_mode="anchor",
            rotation=180 * is_left - math.degrees(angle), color=TEXT if shown else colours[node],
        )  # fmt: skip
    for node, colour in colours.items():
        outer, angle = polar(node)
        axes.plot(outer * math.cos(angle), outer * math.sin(angle), "o", color=colour, ms=2)
    return figure


def save_tree(figure: "Figure", path: Path) -> None:
    """Write a plot; the extension selects the format.

    Raises:
        InputError: an extension other than .svg or .png, or the file cannot be written.
    """
    from matplotlib import rc_context

    if path.suffix not in (".svg", ".png"):
        raise InputError(f"--output {str(path)!r}: allowed extensions: .svg, .png")
    with rc_context({"svg.fonttype": "none"}):  # names stay text
        save_figure(figure, path, None)
