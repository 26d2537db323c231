"""A tree of classes as a round picture: SVG, or PNG."""

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
_READABLE, _SPREAD = 12.0, 0.7


@dataclass
class Drawing:
    """What a picture shows, in px, centre of the tree at 0, 0.

    Attributes:
        lines: x1, y1, x2, y2 each; they run outwards.
        arcs: radius, first and last angle each, radians clockwise; a ring's part over siblings.
        dots: x, y, radius, colour each.
        texts: x, y, degrees clockwise, whether it ends there, size, colour, words each.
        reach: px from the centre to the edge.
    """

    lines: list[tuple[float, float, float, float]] = field(default_factory=list)
    arcs: list[tuple[float, float, float]] = field(default_factory=list)
    dots: list[tuple[float, float, float, str]] = field(default_factory=list)
    texts: list[tuple[float, float, float, bool, float, str, str]] = field(default_factory=list)
    reach: float = 0.0


def depth_for(tree: WordTree, most: int = MAX_NODES) -> int:
    """Return how many levels can be shown with at most so many nodes; at least one."""
    levels = (tree.paths >= 0).sum(dim=1)
    depth = 1
    while depth < tree.paths.shape[1] and int((levels <= depth + 1).sum()) <= most:
        depth += 1
    return depth


def layout(tree: WordTree, kinds: Mapping[int, str], depth: int) -> Drawing:
    """Return the tree around its top, levels as rings, as many as `depth`.

    Args:
        tree: the classes.
        kinds: ``detection``, ``classification`` or ``both`` by node; ``neither`` otherwise.
        depth: levels to show; where more lie below, their number stands beside the name.
    """
    children: dict[int, list[int]] = {}
    for child, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(child)
    levels = (tree.paths >= 0).sum(dim=1).tolist()
    shown = {node for node in range(len(tree)) if levels[node] <= depth}
    tips = sum(levels[n] == depth or n not in children for n in shown)
    size = min(22.0, max(7.0, 5200 / max(tips, 1)))
    lone = len(children[-1]) == 1  # a single top stands in the middle
    rings = max(1, min(depth, max(levels)) - lone)
    ring = max(90.0, tips * size * 1.15 / (2 * math.pi * rings))
    drawing = Drawing()
    turned = 0

    def below(node: int) -> int:
        return sum(1 + below(child) for child in children.get(node, []))

    def place(node: int, level: int) -> tuple[float, float, float]:
        """Draw a branch; return its angle and where its node is."""
        nonlocal turned
        inner = [child for child in children.get(node, []) if child in shown]
        ends = [place(child, level + 1) for child in inner]
        if ends:
            angle = (ends[0][0] + ends[-1][0]) / 2
        else:
            angle = 2 * math.pi * turned / max(tips, 1)
            turned += 1
        # tips stand on the outer ring; few branches are as deep, so the upper levels get more room
        share = max(0, level) / rings if ends else 1.0
        radius = ring * rings * share**_SPREAD
        x, y = radius * math.cos(angle), radius * math.sin(angle)
        if radius > 0 and len(ends) > 1:
            drawing.arcs.append((radius, ends[0][0], ends[-1][0]))
        for end, end_x, end_y in ends:
            drawing.lines.append((radius * math.cos(end), radius * math.sin(end), end_x, end_y))
        if node >= 0:
            colour = COLOURS[kinds.get(node, "neither")]
            drawing.dots.append((x, y, max(2.0, size / 4), colour))
            hidden = 0 if inner else below(node)
            words = tree.names[node] + (f" (+{hidden})" if hidden else "")
            if not inner:
                _write(drawing, words, angle, radius, True, size, colour)
            elif below(node) * 60 >= len(shown):  # small branches stay without a name
                larger = size * min(3.5, 0.8 + math.log10(1 + below(node)))
                _write(drawing, words, angle, radius, False, larger, "#404040")
        return angle, x, y

    place(-1, -1 if lone else 0)
    longest = max((len(text[-1]) for text in drawing.texts), default=0)
    drawing.reach = rings * ring + 0.5 * size * longest + 20
    return drawing


def _write(
    drawing: Drawing,
    words: str,
    angle: float,
    radius: float,
    outside: bool,
    size: float,
    colour: str,
) -> None:
    """Put a name behind a tip, or small above an inner node, never upside down."""
    left = math.cos(angle) < -1e-9
    degrees = math.degrees(angle) + (180 if left else 0)
    away = radius + (size / 2 if outside else -size / 3)
    x, y = away * math.cos(angle), away * math.sin(angle)
    ends = left if outside else not left
    drawing.texts.append((x, y, degrees, ends, size, colour, words))


def to_svg(drawing: Drawing, legend: Mapping[str, str]) -> str:
    """Return the picture as SVG."""
    reach = drawing.reach
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-reach:.0f} {-reach:.0f} '
        f'{2 * reach:.0f} {2 * reach:.0f}" font-family="sans-serif">',
        f'<rect x="{-reach:.0f}" y="{-reach:.0f}" width="{2 * reach:.0f}" '
        f'height="{2 * reach:.0f}" fill="white"/>',
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
    for x, y, degrees, ends, size, colour, words in drawing.texts:
        anchor = "end" if ends else "start"
        parts.append(
            f'<text transform="translate({x:.1f},{y:.1f}) rotate({degrees:.1f})" '
            f'text-anchor="{anchor}" dominant-baseline="central" font-size="{size:.1f}" '
            f'fill="{colour}" stroke="white" stroke-width="{size / 5:.1f}" '
            f'paint-order="stroke">{escape(words)}</text>'
        )
    size = reach / 36
    for number, (kind, words) in enumerate(legend.items()):
        y = -reach + (number + 1.2) * 1.6 * size
        parts.append(
            f'<circle cx="{-reach + size:.1f}" cy="{y:.1f}" r="{size / 3:.1f}" '
            f'fill="{COLOURS[kind]}"/><text x="{-reach + 1.8 * size:.1f}" y="{y:.1f}" '
            f'dominant-baseline="central" font-size="{size:.1f}">{escape(words)}</text>'
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


def side_for(drawing: Drawing) -> int:
    """Return the side of a square image, px, in which the smallest names can be read."""
    smallest = min((text[4] for text in drawing.texts), default=_READABLE)
    return int(min(MAX_SIDE, max(MIN_SIDE, 2 * drawing.reach * _READABLE / smallest)))


def to_image(drawing: Drawing, legend: Mapping[str, str]) -> Image.Image:
    """Return the picture as a square image."""
    side = side_for(drawing)
    scale = side / (2 * drawing.reach)
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)

    def at(value: float) -> float:
        return (value + drawing.reach) * scale

    for a, b, c, d in drawing.lines:
        pen.line((at(a), at(b), at(c), at(d)), fill=LINE, width=max(1, round(scale)))
    for radius, first, last in drawing.arcs:
        box = (at(-radius), at(-radius), at(radius), at(radius))
        width = max(1, round(scale))
        pen.arc(box, math.degrees(first), math.degrees(last), fill=LINE, width=width)
    for x, y, radius, colour in drawing.dots:
        r = max(1.0, radius * scale)
        pen.ellipse((at(x) - r, at(y) - r, at(x) + r, at(y) + r), fill=colour)
    for x, y, degrees, ends, size, colour, words in drawing.texts:
        _paste(image, words, at(x), at(y), degrees, ends, max(5.0, size * scale), colour)
    size = side / 72
    for number, (kind, words) in enumerate(legend.items()):
        y = (number + 1.2) * 1.6 * size
        pen.ellipse((size * 0.7, y - size / 3, size * 1.4, y + size / 3), fill=COLOURS[kind])
        pen.text((1.8 * size, y), words, "black", ImageFont.load_default(size), anchor="lm")
    return image


def _paste(
    image: Image.Image, words: str, x: float, y: float, degrees: float, ends: bool, size: float,
    colour: str,
) -> None:  # fmt: skip
    """Draw turned text that begins, or ends, at a point."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(words)
    width, height = math.ceil(right - left) + 2, math.ceil(bottom - top) + 2
    # begin or end in the middle of a transparent square, which then turns about its centre
    square = Image.new("RGBA", (2 * width + height, 2 * width + height), (255, 255, 255, 0))
    middle = square.width / 2
    start = middle - (width if ends else 0)
    ImageDraw.Draw(square).text(
        (start, middle), words, colour, font, anchor="lm", stroke_width=size / 10,
        stroke_fill="white",
    )  # fmt: skip
    turned = square.rotate(-degrees, Image.Resampling.BICUBIC)
    image.paste(turned, (round(x - middle), round(y - middle)), turned)


def save(drawing: Drawing, legend: Mapping[str, str], path: Path) -> None:
    """Write the picture; the ending chooses the format.

    Raises:
        InputError: another ending than .svg or .png, or a place that cannot be written.
    """
    if path.suffix not in (".svg", ".png"):
        raise InputError(f"--output {str(path)!r}: allowed endings: .svg, .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".svg":
            path.write_text(to_svg(drawing, legend), encoding="utf-8")
        else:
            to_image(drawing, legend).save(path)
    except OSError as error:
        raise InputError(f"--output {str(path)!r}: {error.strerror or error}") from None
