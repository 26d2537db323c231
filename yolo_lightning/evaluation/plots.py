"""The pictures of an evaluation: curves, confusion, and the worst mistakes."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.curves import CONFIDENCES, RECALLS, Curves, mean_precision
from yolo_lightning.evaluation.error_analysis import Confusion, Mistake
from yolo_lightning.evaluation.matching import Table
from yolo_lightning.images import Image, UnreadableSample
from yolo_lightning.visualization.figures import COLOURS, LINE, TEXT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ReadImage = Callable[[int], tuple[Image, tuple[float, float]]]
"""From the number of an image in its source to its pixels, uint8 RGB (H, W, 3), and how many of
them, along x and y, are a px of the original."""

_DPI, _MEAN = 150, "#202020"
_MAX_NAMED, _MAX_NAME = 12, 24
_MAX_CELL, _MIN_CELL, _CELLS_WIDE = 0.5, 0.105, 9.0
_MIN_SIDE, _MAX_SIDE = 2.2, 24.0
_MAX_NUMBERS, _MAX_LINES, _MAX_LABELS = 16, 90, 230

COLUMNS = 6
_TILE, _GAP, _EDGE, _HEAD, _CAPTION = 172, 10, 18, 34, 38
_GREEN, _ORANGE, _GREY, _INK = (24, 160, 70), (245, 110, 0), (110, 110, 110), (25, 25, 25)
_PAPER, _NOTHING, _MIN_CROP, _MARGIN = (255, 255, 255), (228, 228, 228), 24.0, 1.5
_MEANING = {
    "wrong class": "lies on an object of another class",
    "badly placed": "near an object, IoU 0.1 to 0.5",
    "duplicate": "on an object that a surer one has found",
    "background": "on nothing that is asked for",
    "missed": "nothing of its class near, nothing else on it",
}


def precision_recall(curves: Curves, names: Mapping[int, str]) -> bytes:
    """Return a PNG of precision over recall, a line a class and their mean in bold.

    Args:
        curves: of at least one class.
        names: of the nodes.

    Raises:
        InputError: no matplotlib.
    """
    figure = _figure(8.2, 5.2)
    axes = figure.add_subplot()
    each = curves.precision_at_recall.mean(axis=1)
    order = _by_ap50(curves)
    labels = [f"{each[k]:.3f}  {_short(names[int(curves.nodes[k])])}" for k in order]
    mean = curves.precision_at_recall.mean(axis=0)
    _lines(axes, RECALLS, curves.precision_at_recall[order], mean, labels, f"{each.mean():.3f}  ")
    axes.set(xlabel="recall", ylabel="precision", title="Precision over recall, IoU 0.5")
    _legend(figure, axes, "AP50")
    return _png(figure)


def confidence(curves: Curves, names: Mapping[int, str]) -> bytes:
    """Return a PNG of F1 and of precision over confidence, a line a class and their mean in bold.

    Args:
        curves: of at least one class.
        names: of the nodes.

    Raises:
        InputError: no matplotlib.
    """
    figure = _figure(11.5, 4.6)
    left, right = figure.subplots(1, 2)
    order = _by_ap50(curves)
    labels = [_short(names[int(curves.nodes[k])]) for k in order]
    panels = (
        (left, curves.f1, curves.f1.mean(axis=0), "F1 over confidence", "best mean"),
        (
            right,
            curves.precision,
            mean_precision(curves.precision),
            "Precision over confidence",
            "mean",
        ),
    )
    for axes, each, mean, title, what in panels:
        _lines(axes, CONFIDENCES, each[order], mean, labels, "")
        if curves.best is not None:
            at, value = CONFIDENCES[curves.best], mean[curves.best]
            axes.axvline(at, color=_MEAN, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            axes.plot(at, value, "o", color=_MEAN, markersize=6, zorder=5)
            title += f": {what} {value:.3f} at {at:.3g}"
        axes.set(xlabel="confidence")
        axes.set_title(title, fontsize=11)
    _legend(figure, right, "")
    return _png(figure)


def _by_ap50(curves: Curves) -> list[int]:
    """Return the places of the classes by falling AP50: a class has one colour in all pictures."""
    order: list[int] = np.argsort(-curves.precision_at_recall.mean(axis=1), kind="stable").tolist()
    return order


def _lines(
    axes: "Axes", across: Table, each: Table, mean: Table, labels: Sequence[str], prefix: str
) -> None:
    """Draw a thin line a class, faint where there are many, and their mean."""
    few = len(each) <= _MAX_NAMED
    for number, values in enumerate(each):
        colour = COLOURS[number % len(COLOURS)] if few else "#8a8a8a"
        style = "-" if number < len(COLOURS) or not few else (0, (5, 1.5))
        width, alpha = (1.2, 0.9) if few else (0.7, max(0.15, min(0.5, 20 / len(each))))
        label = labels[number] if few else "each class" if not number else None
        axes.plot(across, values, color=colour, linestyle=style, lw=width, alpha=alpha, label=label)
    if len(each) > 1:
        label = f"{prefix}mean of {len(each)} classes"
        axes.plot(across, mean, color=_MEAN, linewidth=3, label=label, zorder=4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(color=LINE, linewidth=0.6)


def _legend(figure: "Figure", axes: "Axes", title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:  # the mean first
        handles, labels = [handles[-1], *handles[:-1]], [labels[-1], *labels[:-1]]
    legend = figure.legend(handles, labels, loc="outside right upper", frameon=False, title=title)
    legend.set_alignment("left")
    for handle in legend.get_lines():
        handle.set_alpha(1.0)


def confusion_matrix(found: Confusion, names: Mapping[int, str], title: str) -> bytes:
    """Return a PNG of the confusion matrix, each row as shares, background last.

    Args:
        found: of at least one class.
        names: of the nodes.
        title: stands above.

    Raises:
        InputError: no matplotlib.
    """
    count = len(found.counts)
    side = count * min(_MAX_CELL, max(_MIN_CELL, _CELLS_WIDE / count))
    side = max(_MIN_SIDE, min(_MAX_SIDE, side))
    figure = _figure(side + 3.0, side + 2.0)
    from matplotlib.colors import PowerNorm

    axes = figure.add_subplot()
    shares = found.counts / found.counts.sum(axis=1).clip(1)[:, None]
    shares = np.where(found.counts > 0, shares, np.nan)
    # a power, so that the few per cent beside the diagonal are seen
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.6, 0, 1))
    size = max(4.5, min(10.0, side / count * 72 * 0.62))
    _label(axes, found, [_short(names[node]) for node in found.nodes.tolist()], size)
    _rule(axes, count)
    if count <= _MAX_NUMBERS:
        for row, column in np.argwhere(found.counts > 0).tolist():
            share = shares[row, column]
            ink = "white" if share > 0.5 else _MEAN
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink, "fontsize": size}
            axes.text(column, row, f"{100 * share:.0f}", **style)
    axes.set(xlabel="predicted as", ylabel="truth, and how many")
    axes.set_title(title, fontsize=12, loc="left")
    bar = figure.colorbar(picture, ax=axes, shrink=min(0.8, 4 / side), pad=0.02)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1], labels=["0 %", "5 %", "20 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    return _png(figure)


def _label(axes: "Axes", found: Confusion, names: Sequence[str], size: float) -> None:
    """Name rows and columns, rows with their totals; where they are too narrow for it, none."""
    axes.tick_params(length=0, colors=TEXT)
    axes.set(xticks=[], yticks=[])
    count, totals = len(found.counts), found.counts.sum(axis=1).tolist()
    if count > _MAX_LABELS:
        return
    rows = [f"{name}  {total}" for name, total in zip([*names, "background"], totals, strict=True)]
    axes.set_yticks(range(count), rows, fontsize=size)
    axes.set_xticks(range(count), [*names, "missed"], fontsize=size, rotation=90)


def _rule(axes: "Axes", count: int) -> None:
    """Draw lines between the cells, where these are wide enough, and before background."""
    for draw in (axes.axhline, axes.axvline):
        for place in range(count - 2 if count <= _MAX_LINES else 0):
            draw(place + 0.5, color=LINE, linewidth=0.5, zorder=1)
        draw(count - 1.5, color=_MEAN, linewidth=1.2 if count <= _MAX_LABELS else 0.3)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def _figure(width_inch: float, height_inch: float) -> "Figure":
    """Return an empty figure."""
    try:  # not pyplot: it looks for a screen, and keeps every figure
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib: pip install 'yolo-lightning[plots]'") from None
    return Figure(figsize=(width_inch, height_inch), dpi=_DPI, layout="constrained")


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.1)
    return file.getvalue()


def mistakes_grid(
    found: Mapping[str, Sequence[Mistake]], names: Mapping[int, str], read: ReadImage, least: float
) -> bytes:
    """Return a JPEG of the worst mistakes, a row for each kind.

    Args:
        found: by kind, the worst first.
        names: of the nodes.
        read: gives the images; those that cannot be read stay grey.
        least: the least score that counts, 0…1.
    """
    width = 2 * _EDGE + COLUMNS * _TILE + (COLUMNS - 1) * _GAP
    heights = [_HEAD + (_TILE + _CAPTION + _GAP if each else 0) for each in found.values()]
    canvas = Pillow.new("RGB", (width, _HEAD + _EDGE + sum(heights) + _EDGE), _PAPER)
    draw = ImageDraw.Draw(canvas)
    _head(draw, width, f"The worst mistakes at confidence {least:g}")
    top = _HEAD + _EDGE
    for (kind, each), height in zip(found.items(), heights, strict=True):
        title = f"{kind}: {len(each) or 'none'}"
        draw.text((_EDGE, top), title, _INK, _font(19))
        start = _EDGE + draw.textlength(title, _font(19)) + 12
        draw.text((start, top + 4), _MEANING[kind], _GREY, _font(14))
        for column, mistake in enumerate(each[:COLUMNS]):
            place = (_EDGE + column * (_TILE + _GAP), top + _HEAD - 4)
            canvas.paste(tile(mistake, read), place)
            _caption(draw, (place[0], place[1] + _TILE + 2), mistake, names)
        top += height
    file = io.BytesIO()
    canvas.save(file, format="JPEG", quality=88)
    return file.getvalue()


def _head(draw: "ImageDraw.ImageDraw", width: int, title: str) -> None:
    """Write the title and what the colours mean."""
    draw.text((_EDGE, 12), title, _INK, _font(23))
    x = float(width - _EDGE)
    for text, colour in (("prediction", _ORANGE), ("truth", _GREEN)):
        x -= draw.textlength(text, _font(15))
        draw.text((x, 19), text, _INK, _font(15))
        draw.rectangle((x - 26, 20, x - 8, 34), outline=colour, width=3)
        x -= 44
    draw.line((_EDGE, 44, width - _EDGE, 44), fill=(215, 215, 215))


def _caption(
    draw: "ImageDraw.ImageDraw", place: tuple[int, int], mistake: Mistake, names: Mapping[int, str]
) -> None:
    near = "" if mistake.truth_label is None else names[mistake.truth_label]
    over = f"IoU {mistake.iou:.2f}"
    other = "" if mistake.label == mistake.truth_label else f", truth: {near}"
    under = {
        "wrong class": f"truth: {near}",
        "badly placed": over + other,
        "duplicate": "found already",
        "background": "nothing there",
        "missed": "not found",
    }[mistake.kind]
    first, number = near, ""
    if mistake.label is not None:
        first, number = names[mistake.label], f" {mistake.score:.2f}"
    x, y = place
    room = _TILE - draw.textlength(number, _font(14))
    draw.text((x, y), _fitting(draw, first, 14, room) + number, _INK, _font(14))
    draw.text((x, y + 17), _fitting(draw, under, 13, _TILE), _GREY, _font(13))


def _fitting(draw: "ImageDraw.ImageDraw", text: str, size: int, room: float) -> str:
    """Return as much of a text as there is room for, px."""
    if draw.textlength(text, _font(size)) <= room:
        return text
    while text and draw.textlength(text + "…", _font(size)) > room:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def tile(mistake: Mistake, read: ReadImage) -> Pillow.Image:
    """Return the part of an image around a mistake, enlarged, with its boxes."""
    picture = Pillow.new("RGB", (_TILE, _TILE), _NOTHING)
    try:
        pixels, scale_xy = read(mistake.image)
    except UnreadableSample:
        return picture
    boxes = [
        (np.array(box) * [*scale_xy, *scale_xy], colour, line)
        for box, colour, line in (
            (mistake.truth_xyxy_orig_px, _GREEN, 4),
            (mistake.box_xyxy_orig_px, _ORANGE, 3),
        )
        if box is not None
    ]
    low = np.min([box[:2] for box, *_ in boxes], axis=0)
    high = np.max([box[2:] for box, *_ in boxes], axis=0)
    size = np.array([pixels.shape[1], pixels.shape[0]])
    side = int(min(max(_MARGIN * (high - low).max(), _MIN_CROP), size.max()))
    start = ((low + high - side) / 2).astype(int).clip(0, (size - side).clip(0))
    part = pixels[start[1] : start[1] + side, start[0] : start[0] + side]
    scale = _TILE / side
    height, width = (max(1, round(length * scale)) for length in part.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    part = cv2.resize(part, (width, height), interpolation=method)
    left_top = np.array([(_TILE - width) // 2, (_TILE - height) // 2])
    picture.paste(Pillow.fromarray(part), tuple(left_top.tolist()))
    draw = ImageDraw.Draw(picture)
    for box, colour, line in boxes:
        corners = (box - np.tile(start, 2)) * scale + np.tile(left_top, 2)
        draw.rectangle(np.clip(corners.round(), 0, _TILE - 1).tolist(), outline=colour, width=line)
    return picture
