"""Plots of a report: curves, the confusion matrix, and images of the worst errors."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from yolo_lightning.evaluation.curves import CONFIDENCES, RECALLS, Curves, mean_precision
from yolo_lightning.evaluation.error_analysis import ConfusionMatrix, DetectionError
from yolo_lightning.evaluation.matching import BOX, LABEL, SCORE, Rows, Table
from yolo_lightning.images import UnreadableSample
from yolo_lightning.visualization.figures import COLOURS, LINE, TEXT, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEAN_COLOUR = "#202020"
_MAX_NAMED_CLASSES, _MAX_NAME_LENGTH = 12, 24
# inches
_MAX_CELL, _MIN_CELL, _MATRIX_WIDTH = 0.5, 0.105, 9.0
_MIN_SIDE, _MAX_SIDE = 2.2, 24.0
# classes up to which a confusion matrix has numbers in its cells, lines between them, and names
_MAX_NUMBERS, _MAX_LINES, _MAX_LABELS = 16, 90, 230

_COLUMNS = 6
# px
_TILE, _GAP, _MARGIN, _TITLE_HEIGHT, _CAPTION_HEIGHT = 172, 10, 18, 34, 38
_GREEN, _ORANGE, _GREY, _BLACK = (24, 160, 70), (245, 110, 0), (110, 110, 110), (25, 25, 25)
_WHITE, _LIGHT_GREY, _MIN_CROP, _CROP_SCALE = (255, 255, 255), (228, 228, 228), 24.0, 1.5
_DESCRIPTIONS = {
    "classification": "on a target of another class, IoU 0.5 or more",
    "localization": "near a target, IoU 0.1 to 0.5",
    "duplicate": "on a target with a higher-scoring detection",
    "background": "not near any target",
    "missed": "no detection of its class near, none of another class on it",
}


def plot_precision_recall(curves: Curves, names: Mapping[int, str]) -> "Figure":
    """Plot precision over recall, one line per class and their mean in bold."""
    figure = new_figure(8.2, 5.2)
    axes = figure.add_subplot()
    ap50 = curves.precision_at_recall.mean(axis=1)
    order = _by_ap50(curves)
    labels = [f"{ap50[k]:.3f}  {_short(names[int(curves.nodes[k])])}" for k in order]
    mean = curves.precision_at_recall.mean(axis=0)
    _plot_lines(
        axes, RECALLS, curves.precision_at_recall[order], mean, labels, f"{ap50.mean():.3f}  "
    )
    axes.set(xlabel="recall", ylabel="precision", title="Precision over recall, IoU 0.5")
    _add_legend(figure, axes, "AP50")
    return figure


def plot_confidence(curves: Curves, names: Mapping[int, str]) -> "Figure":
    """Plot F1 and precision over confidence, lines as in `plot_precision_recall`."""
    figure = new_figure(11.5, 4.6)
    left, right = figure.subplots(1, 2)
    order = _by_ap50(curves)
    labels = [_short(names[int(curves.nodes[k])]) for k in order]
    precision = curves.precision
    panels = (
        (left, curves.f1, curves.f1.mean(axis=0), "F1 over confidence", "best mean"),
        (right, precision, mean_precision(precision), "Precision over confidence", "mean"),
    )
    for axes, values, mean, title, mean_title in panels:
        _plot_lines(axes, CONFIDENCES, values[order], mean, labels, "")
        if curves.best_index is not None:
            x, y = CONFIDENCES[curves.best_index], mean[curves.best_index]
            axes.axvline(x, color=_MEAN_COLOUR, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            axes.plot(x, y, "o", color=_MEAN_COLOUR, markersize=6, zorder=5)
            title += f": {mean_title} {y:.3f} at {x:.3g}"
        axes.set(xlabel="confidence")
        axes.set_title(title, fontsize=11)
    _add_legend(figure, right, "")
    return figure


def _by_ap50(curves: Curves) -> list[int]:
    """Return indices of classes by descending AP50; gives a class the same colour in all plots."""
    order: list[int] = np.argsort(-curves.precision_at_recall.mean(axis=1), kind="stable").tolist()
    return order


def _plot_lines(
    axes: "Axes", x: Table, rows: Table, mean: Table, labels: Sequence[str], mean_prefix: str
) -> None:
    is_named = len(rows) <= _MAX_NAMED_CLASSES
    for number, values in enumerate(rows):
        colour = COLOURS[number % len(COLOURS)] if is_named else "#8a8a8a"
        style = "-" if number < len(COLOURS) or not is_named else (0, (5, 1.5))
        width, alpha = (1.2, 0.9) if is_named else (0.7, max(0.15, min(0.5, 20 / len(rows))))
        label = labels[number] if is_named else "each class" if not number else None
        axes.plot(x, values, color=colour, linestyle=style, lw=width, alpha=alpha, label=label)
    if len(rows) > 1:
        label = f"{mean_prefix}mean of {len(rows)} classes"
        axes.plot(x, mean, color=_MEAN_COLOUR, linewidth=3, label=label, zorder=4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=TEXT)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(color=LINE, linewidth=0.6)


def _add_legend(figure: "Figure", axes: "Axes", title: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:  # the mean first
        handles, labels = [handles[-1], *handles[:-1]], [labels[-1], *labels[:-1]]
    legend = figure.legend(handles, labels, loc="outside right upper", frameon=False, title=title)
    legend.set_alignment("left")
    for handle in legend.get_lines():
        handle.set_alpha(1.0)


def plot_confusion_matrix(
    matrix: ConfusionMatrix, names: Mapping[int, str], title: str
) -> "Figure":
    """Plot the counts of the confusion matrix, coloured by their share of the row, background last.

    With one class, all predictions on background are of this class: the label of the axis has
    their number.
    """
    count, is_single = len(matrix.counts), len(matrix.nodes) == 1
    counts = matrix.counts[:1] if is_single else matrix.counts
    side = count * min(_MAX_CELL, max(_MIN_CELL, _MATRIX_WIDTH / count))
    side = max(_MIN_SIDE, min(_MAX_SIDE, side))
    figure = new_figure(side + 3.0, side * len(counts) / count + 2.0)
    from matplotlib.colors import PowerNorm

    axes = figure.add_subplot()
    shares = counts / counts.sum(axis=1).clip(1)[:, None]
    shares = np.where(counts > 0, shares, np.nan)
    # a power makes small shares beside the diagonal visible
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.6, 0, 1))
    font_size = max(4.5, min(10.0, side / count * 72 * 0.62))
    _label_cells(axes, counts, [_short(names[node]) for node in matrix.nodes.tolist()], font_size)
    _draw_cell_lines(axes, count, is_single)
    if count <= _MAX_NUMBERS:
        for row, column in np.argwhere(counts > 0).tolist():
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": font_size}
            colour = "white" if shares[row, column] > 0.5 else _MEAN_COLOUR
            axes.text(column, row, str(counts[row, column]), color=colour, **style)
    unmatched = f"; {matrix.counts[1, 0]} predictions match no target" if is_single else ""
    axes.set(xlabel=f"predicted class{unmatched}", ylabel="true class, number of targets")
    axes.set_title(title, fontsize=12, loc="left")
    bar = figure.colorbar(image, ax=axes, shrink=min(0.8, 4 / side), pad=0.02)
    bar.set_ticks([0, 0.05, 0.2, 0.5, 1], labels=["0 %", "5 %", "20 %", "50 %", "100 %"])
    bar.set_label("share of the row")
    bar.outline.set_visible(False)
    return figure


def _label_cells(axes: "Axes", counts: Rows, names: Sequence[str], font_size: float) -> None:
    axes.tick_params(length=0, colors=TEXT)
    axes.set(xticks=[], yticks=[])
    if counts.shape[1] > _MAX_LABELS:
        return
    totals = counts.sum(axis=1).tolist()  # those of one class lack the row of the background
    rows = [f"{name}  {total}" for name, total in zip([*names, "background"], totals, strict=False)]
    axes.set_yticks(range(len(rows)), rows, fontsize=font_size)
    axes.set_xticks(range(counts.shape[1]), [*names, "missed"], fontsize=font_size, rotation=90)


def _draw_cell_lines(axes: "Axes", count: int, is_single: bool) -> None:
    for draw_line in (axes.axvline,) if is_single else (axes.axhline, axes.axvline):
        for index in range(count - 2 if count <= _MAX_LINES else 0):
            draw_line(index + 0.5, color=LINE, linewidth=0.5, zorder=1)
        width = 1.2 if count <= _MAX_LABELS else 0.3
        draw_line(count - 1.5, color=_MEAN_COLOUR, linewidth=width)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME_LENGTH else name[: _MAX_NAME_LENGTH - 1] + "…"


class ImageSource(Protocol):
    """A source of images by index."""

    def read(self, index: int) -> Any:
        """Return a sample with `image`, uint8 RGB (H, W, 3), and `size_hw_orig`, px."""

    def image_name(self, index: int) -> str:
        """Return the file of an image."""


def draw_error_grid(
    errors: Mapping[str, Sequence[DetectionError]],
    names: Mapping[int, str],
    source: ImageSource,
    confidence: float,
) -> Pillow.Image:
    """Draw the worst errors, one row per kind; unreadable images stay grey."""
    width = 2 * _MARGIN + _COLUMNS * _TILE + (_COLUMNS - 1) * _GAP
    row_height = _TILE + _CAPTION_HEIGHT + _GAP
    heights = [_TITLE_HEIGHT + (row_height if group else 0) for group in errors.values()]
    height = _TITLE_HEIGHT + _MARGIN + sum(heights) + _MARGIN
    canvas = Pillow.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(canvas)
    _draw_header(draw, width, f"The worst errors at confidence {confidence:g}")
    top = _TITLE_HEIGHT + _MARGIN
    for (kind, group), row in zip(errors.items(), heights, strict=True):
        title = f"{kind}: {len(group) or 'none'}"
        draw.text((_MARGIN, top), title, _BLACK, _font(19))
        start = _MARGIN + draw.textlength(title, _font(19)) + 12
        draw.text((start, top + 4), _DESCRIPTIONS[kind], _GREY, _font(14))
        for column, error in enumerate(group[:_COLUMNS]):
            left, tile_top = _MARGIN + column * (_TILE + _GAP), top + _TITLE_HEIGHT - 4
            canvas.paste(draw_error_tile(error, source), (left, tile_top))
            _draw_caption(draw, (left, tile_top + _TILE + 2), error, names)
        top += row
    return canvas


def _draw_header(draw: "ImageDraw.ImageDraw", width: int, title: str) -> None:
    draw.text((_MARGIN, 12), title, _BLACK, _font(23))
    x = float(width - _MARGIN)
    for text, colour in (("prediction", _ORANGE), ("target", _GREEN)):
        x -= draw.textlength(text, _font(15))
        draw.text((x, 19), text, _BLACK, _font(15))
        draw.rectangle((x - 26, 20, x - 8, 34), outline=colour, width=3)
        x -= 44
    draw.line((_MARGIN, 44, width - _MARGIN, 44), fill=(215, 215, 215))


def _draw_caption(
    draw: "ImageDraw.ImageDraw",
    left_top: tuple[int, int],
    error: DetectionError,
    names: Mapping[int, str],
) -> None:
    target = "" if error.target is None else names[int(error.target[LABEL])]
    name, score = target, ""
    if error.detection is not None:
        name, score = names[int(error.detection[LABEL])], f" {error.detection[SCORE]:.2f}"
    second_line = {
        "classification": f"target: {target}",
        "localization": f"IoU {error.iou:.2f}" + ("" if name == target else f", target: {target}"),
        "duplicate": "already detected",
        "background": "no target",
        "missed": "not detected",
    }[error.kind]
    x, y = left_top
    room = _TILE - draw.textlength(score, _font(14))
    draw.text((x, y), _shorten(draw, name, 14, room) + score, _BLACK, _font(14))
    draw.text((x, y + 17), _shorten(draw, second_line, 13, _TILE), _GREY, _font(13))


def _shorten(draw: "ImageDraw.ImageDraw", text: str, size: int, max_width: float) -> str:
    if draw.textlength(text, _font(size)) <= max_width:
        return text
    while text and draw.textlength(text + "…", _font(size)) > max_width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def draw_error_tile(error: DetectionError, source: ImageSource) -> Pillow.Image:
    """Return the enlarged part of an image around an error, with the boxes."""
    tile = Pillow.new("RGB", (_TILE, _TILE), _LIGHT_GREY)
    try:
        sample = source.read(error.image)
    except UnreadableSample:
        return tile
    size_wh, size_wh_orig = sample.image.shape[1::-1], sample.size_hw_orig[::-1]
    boxes = [
        (row[BOX] * np.tile(np.divide(size_wh, size_wh_orig), 2), colour, line_width)
        for row, colour, line_width in ((error.target, _GREEN, 4), (error.detection, _ORANGE, 3))
        if row is not None
    ]
    low = np.min([box[:2] for box, *_ in boxes], axis=0)
    high = np.max([box[2:] for box, *_ in boxes], axis=0)
    side = int(min(max(_CROP_SCALE * (high - low).max(), _MIN_CROP), max(size_wh)))
    start = ((low + high - side) / 2).astype(int).clip(0, (np.array(size_wh) - side).clip(0))
    crop = sample.image[start[1] : start[1] + side, start[0] : start[0] + side]
    scale = _TILE / side
    height, width = (max(1, round(length * scale)) for length in crop.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    crop = cv2.resize(crop, (width, height), interpolation=method)
    left_top = np.array([(_TILE - width) // 2, (_TILE - height) // 2])
    tile.paste(Pillow.fromarray(crop), tuple(left_top.tolist()))
    draw = ImageDraw.Draw(tile)
    for box, colour, line_width in boxes:
        corners = (box - np.tile(start, 2)) * scale + np.tile(left_top, 2)
        clipped = np.clip(corners.round(), 0, _TILE - 1).tolist()
        draw.rectangle(clipped, outline=colour, width=line_width)
    return tile
