"""Radial drawing of a class tree, as SVG or PNG."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from yolo_lightning.errors import InputError
from yolo_lightning.tree.wordtree import WordTree

COLOURS = {
    "detection": "#1f77d0",
    "classification": "#f08c00",
    "both": "#2a9d3a",
    "neither": "#9a9a9a",
}
LINE = "#c8c8c8"
MAX_NODES = 1500
MIN_SIDE, MAX_SIDE = 2400, 6000
_MIN_TEXT_PX, _RING_EXPONENT = 12.0, 0.7


@dataclass
class TreeDrawing:
    """Shapes of a drawing, in px, with the centre of the tree at (0, 0).

    Attributes:
        lines: x1, y1, x2, y2 of each edge, outwards.
        arcs: radius, first and last angle (radians, clockwise) of each arc over siblings.
        dots: x, y, radius, colour of each node.
        texts: x, y, degrees clockwise, whether the text ends at x, y (else it starts there), size,
            colour, text of each name.
        radius: from the centre to the edge, px.
    """

    lines: list[tuple[float, float, float, float]] = field(default_factory=list)
    arcs: list[tuple[float, float, float]] = field(default_factory=list)
    dots: list[tuple[float, float, float, str]] = field(default_factory=list)
    texts: list[tuple[float, float, float, bool, float, str, str]] = field(default_factory=list)
    radius: float = 0.0


def visible_depth(tree: WordTree, max_nodes: int = MAX_NODES) -> int:
    """Return the number of levels, at least one, that have at most `max_nodes` nodes together."""
    levels = (tree.paths >= 0).sum(dim=1)
    depth = 1
    while depth < tree.paths.shape[1] and int((levels <= depth + 1).sum()) <= max_nodes:
        depth += 1
    return depth


def layout_tree(tree: WordTree, kinds: Mapping[int, str], depth: int) -> TreeDrawing:
    """Lay out `depth` levels of a tree as rings, coloured by the kind of each node.

    Kinds are the keys of `COLOURS`. The number of hidden descendants follows a node's name.
    """
    children: dict[int, list[int]] = {}
    for child, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(child)
    levels = (tree.paths >= 0).sum(dim=1).tolist()
    shown = {node for node in range(len(tree)) if levels[node] <= depth}
    num_leaves = sum(levels[n] == depth or n not in children for n in shown)
    size = min(22.0, max(7.0, 5200 / max(num_leaves, 1)))
    single_root = len(children[-1]) == 1  # drawn in the centre
    rings = max(1, min(depth, max(levels)) - single_root)
    ring = max(90.0, num_leaves * size * 1.15 / (2 * math.pi * rings))
    drawing = TreeDrawing()
    leaves_placed = 0

    def num_descendants(node: int) -> int:
        return sum(1 + num_descendants(child) for child in children.get(node, []))

    def draw_branch(node: int, level: int) -> tuple[float, float, float]:
        """Draw a branch and return angle, x and y of its node."""
        nonlocal leaves_placed
        inner = [child for child in children.get(node, []) if child in shown]
        placed = [draw_branch(child, level + 1) for child in inner]
        if placed:
            angle = (placed[0][0] + placed[-1][0]) / 2
        else:
            angle = 2 * math.pi * leaves_placed / max(num_leaves, 1)
            leaves_placed += 1
        # leaves lie on the outer ring; few branches are deep, so upper levels get more room
        share = max(0, level) / rings if placed else 1.0
        radius = ring * rings * share**_RING_EXPONENT
        x, y = radius * math.cos(angle), radius * math.sin(angle)
        if radius > 0 and len(placed) > 1:
            drawing.arcs.append((radius, placed[0][0], placed[-1][0]))
        for child_angle, child_x, child_y in placed:
            start = radius * math.cos(child_angle), radius * math.sin(child_angle)
            drawing.lines.append((*start, child_x, child_y))
        if node >= 0:
            colour = COLOURS[kinds.get(node, "neither")]
            drawing.dots.append((x, y, max(2.0, size / 4), colour))
            hidden = 0 if inner else num_descendants(node)
            text = tree.names[node] + (f" (+{hidden})" if hidden else "")
            if not inner:
                _add_name(drawing, text, angle, radius, True, size, colour)
            elif num_descendants(node) * 60 >= len(shown):  # no names for small branches
                larger = size * min(3.5, 0.8 + math.log10(1 + num_descendants(node)))
                _add_name(drawing, text, angle, radius, False, larger, "#404040")
        return angle, x, y

    draw_branch(-1, -1 if single_root else 0)
    longest = max((len(text[-1]) for text in drawing.texts), default=0)
    drawing.radius = rings * ring + 0.5 * size * longest + 20
    return drawing


def _add_name(
    drawing: TreeDrawing,
    text: str,
    angle: float,
    radius: float,
    is_leaf: bool,
    size: float,
    colour: str,
) -> None:
    """Place a name outside a leaf or inside an inner node, never upside down."""
    left = math.cos(angle) < -1e-9
    degrees = math.degrees(angle) + (180 if left else 0)
    distance = radius + (size / 2 if is_leaf else -size / 3)
    x, y = distance * math.cos(angle), distance * math.sin(angle)
    ends_here = left if is_leaf else not left
    drawing.texts.append((x, y, degrees, ends_here, size, colour, text))


def to_svg(drawing: TreeDrawing, legend: Mapping[str, str]) -> str:
    """Return the drawing as SVG."""
    radius = drawing.radius
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-radius:.0f} {-radius:.0f} '
        f'{2 * radius:.0f} {2 * radius:.0f}" font-family="sans-serif">',
        f'<rect x="{-radius:.0f}" y="{-radius:.0f}" width="{2 * radius:.0f}" '
        f'height="{2 * radius:.0f}" fill="white"/>',
        f'<g stroke="{LINE}" stroke-width="1">',
        *(
            f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}"/>'
            for a, b, c, d in drawing.lines
        ),
        *(_svg_arc(*arc) for arc in drawing.arcs),
        "</g>",
        *(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{colour}"/>'
            for x, y, r, colour in drawing.dots
        ),
    ]
    for x, y, degrees, ends_here, size, colour, text in drawing.texts:
        anchor = "end" if ends_here else "start"
        parts.append(
            f'<text transform="translate({x:.1f},{y:.1f}) rotate({degrees:.1f})" '
            f'text-anchor="{anchor}" dominant-baseline="central" font-size="{size:.1f}" '
            f'fill="{colour}" stroke="white" stroke-width="{size / 5:.1f}" '
            f'paint-order="stroke">{escape(text)}</text>'
        )
    size = radius / 36
    for number, (kind, text) in enumerate(legend.items()):
        y = -radius + (number + 1.2) * 1.6 * size
        parts.append(
            f'<circle cx="{-radius + size:.1f}" cy="{y:.1f}" r="{size / 3:.1f}" '
            f'fill="{COLOURS[kind]}"/><text x="{-radius + 1.8 * size:.1f}" y="{y:.1f}" '
            f'dominant-baseline="central" font-size="{size:.1f}">{escape(text)}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _svg_arc(radius: float, first: float, last: float) -> str:
    (a, b), (c, d) = (
        (radius * math.cos(angle), radius * math.sin(angle)) for angle in (first, last)
    )
    large = int(last - first > math.pi)
    return (
        f'<path d="M{a:.1f} {b:.1f}A{radius:.1f} {radius:.1f} 0 {large} 1 {c:.1f} {d:.1f}" '
        'fill="none"/>'
    )


def image_side(drawing: TreeDrawing) -> int:
    """Return the side of a square image, px, that keeps the smallest names readable."""
    smallest = min((text[4] for text in drawing.texts), default=_MIN_TEXT_PX)
    return int(min(MAX_SIDE, max(MIN_SIDE, 2 * drawing.radius * _MIN_TEXT_PX / smallest)))


def to_image(drawing: TreeDrawing, legend: Mapping[str, str]) -> Image.Image:
    """Return the drawing as a square image."""
    side = image_side(drawing)
    scale = side / (2 * drawing.radius)
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)

    def to_px(value: float) -> float:
        return (value + drawing.radius) * scale

    for a, b, c, d in drawing.lines:
        pen.line((to_px(a), to_px(b), to_px(c), to_px(d)), fill=LINE, width=max(1, round(scale)))
    for radius, first, last in drawing.arcs:
        box = (to_px(-radius), to_px(-radius), to_px(radius), to_px(radius))
        width = max(1, round(scale))
        pen.arc(box, math.degrees(first), math.degrees(last), fill=LINE, width=width)
    for x, y, radius, colour in drawing.dots:
        r = max(1.0, radius * scale)
        cx, cy = to_px(x), to_px(y)
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=colour)
    for x, y, degrees, ends_here, size, colour, text in drawing.texts:
        _paste_text(
            image, text, to_px(x), to_px(y), degrees, ends_here, max(5.0, size * scale), colour
        )
    size = side / 72
    for number, (kind, text) in enumerate(legend.items()):
        y = (number + 1.2) * 1.6 * size
        pen.ellipse((size * 0.7, y - size / 3, size * 1.4, y + size / 3), fill=COLOURS[kind])
        pen.text((1.8 * size, y), text, "black", ImageFont.load_default(size), anchor="lm")
    return image


def _paste_text(
    image: Image.Image, text: str, x: float, y: float, degrees: float, ends_here: bool,
    size: float, colour: str,
) -> None:  # fmt: skip
    """Draw rotated text that starts, or ends, at a point."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(text)
    width, height = math.ceil(right - left) + 2, math.ceil(bottom - top) + 2
    # start or end in the middle of a transparent square, which is then rotated about its centre
    square = Image.new("RGBA", (2 * width + height, 2 * width + height), (255, 255, 255, 0))
    middle = square.width / 2
    start = middle - (width if ends_here else 0)
    ImageDraw.Draw(square).text(
        (start, middle), text, colour, font, anchor="lm", stroke_width=size / 10,
        stroke_fill="white",
    )  # fmt: skip
    rotated = square.rotate(-degrees, Image.Resampling.BICUBIC)
    image.paste(rotated, (round(x - middle), round(y - middle)), rotated)


def save_tree(drawing: TreeDrawing, legend: Mapping[str, str], path: Path) -> None:
    """Write the drawing; the extension selects the format.

    Raises:
        InputError: an extension other than .svg or .png, or the file cannot be written.
    """
    if path.suffix not in (".svg", ".png"):
        raise InputError(f"--output {str(path)!r}: allowed extensions: .svg, .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".svg":
            path.write_text(to_svg(drawing, legend), encoding="utf-8")
        else:
            to_image(drawing, legend).save(path)
    except OSError as error:
        raise InputError(f"--output {str(path)!r}: {error.strerror or error}") from None
