"""What `speed` writes: a table, JSON, CSV, and a picture."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError
from yolo_lightning.inference.timing import Timing
from yolo_lightning.visualization.figures import COLOURS, LINE, TEXT, _figure, _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FIGURES = {
    "latency_ms": "median_ms",
    "latency_10_percent_ms": "low_ms",
    "latency_90_percent_ms": "high_ms",
    "network_share": "network",
    "decode_share": "decode",
    "suppression_share": "suppression",
}


@dataclass(frozen=True)
class Row:
    """What one image size costs, and what it is worth.

    Attributes:
        image_size: side of the network input, px.
        billion_operations: for one image.
        one: single images, one after the other.
        many: batches; None where the memory holds none.
        ap50, ap: average precision, 0…1; None where no images are given, or none of the classes
            is among them.
    """

    image_size: int
    billion_operations: float
    one: Timing
    many: Timing | None = None
    ap50: float | None = None
    ap: float | None = None

    def values(self) -> dict[str, float | int | None]:
        """Return everything by name; ``batch_`` stands before the figures of batches."""
        found: dict[str, float | int | None] = {
            "image_size": self.image_size,
            "AP50": self.ap50,
            "AP": self.ap,
            "billion_operations": self.billion_operations,
        }
        for prefix, timing in (("", self.one), ("batch_", self.many)):
            found[f"{prefix}images_per_second"] = timing.images_per_second if timing else None
            for name, attribute in _FIGURES.items():
                found[prefix + name] = getattr(timing, attribute) if timing else None
        return found


def header(about: dict[str, Any]) -> str:
    """Return what the figures depend on, and the head of a table of rows."""
    size = about["batch_size"]
    return (
        f"{about['checkpoint']} on {_machine(about)}\n"
        f"yolo-lightning {about['yolo_lightning']}, torch {about['torch']}\n"
        f"{about['images']}; from uint8 on the device to detections above "
        f"{about['score_threshold']}\n"
        f"medians of {about['runs']} runs, after {about['warm_up_runs']} to warm up; load before: "
        f"{about['load_before']:.1f} of {about['cores']} cores\n\n"
        f"{'':>19}{'billion':>11}{'images':>9} {'one image':<22}"
        f"{'images':>8}  {f'batch of {size}':<26}share of the time, one image\n"
        f"{'px':>5}{'AP50':>7}{'AP':>7}{'operations':>11}{'a second':>9} {'ms (10 … 90 %)':<22}"
        f"{'a second':>8}  {'ms (10 … 90 %)':<26}network  decode  suppression"
    )


def _machine(about: dict[str, Any]) -> str:
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    return f"{about['device_name']} ({about['device']}), {threads}, {about['precision']}"


def table_line(row: Row) -> str:
    """Return one row as text."""
    ap50, ap = ("-" if v is None else f"{v:.3f}" for v in (row.ap50, row.ap))
    many, per_second = "too little memory", "-"
    if row.many is not None:
        many, per_second = _milliseconds(row.many), f"{row.many.images_per_second:.1f}"
    parts = (row.one.network, row.one.decode, row.one.suppression)
    shares = "".join(f"{100 * v:>{width}.1f} %" for v, width in zip(parts, (5, 6, 11), strict=True))
    return (
        f"{row.image_size:>5}{ap50:>7}{ap:>7}{row.billion_operations:>11.2f}"
        f"{row.one.images_per_second:>9.1f} {_milliseconds(row.one):<22}"
        f"{per_second:>8}  {many:<26}{shares}"
    )


def _milliseconds(timing: Timing) -> str:
    return f"{timing.median_ms:.1f} ({timing.low_ms:.1f} … {timing.high_ms:.1f})"


def write(folder: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write `speed.json` and `speed.csv`, whatever they held before.

    Args:
        folder: made where it is missing.
        about: what the figures depend on, by name.
        rows: measured so far.

    Raises:
        InputError: a place that cannot be written.
    """
    values = [row.values() for row in rows]
    text = json.dumps({**about, "sizes": values}, indent=2, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "speed.json").write_text(text + "\n", encoding="utf-8")
        if values:
            with (folder / "speed.csv").open("w", encoding="utf-8", newline="") as handle:
                table = csv.DictWriter(handle, list(values[0]))
                table.writeheader()
                table.writerows(values)
    except OSError as error:
        raise InputError(f"{str(folder)!r}: {error.strerror or error}") from None


def empty_figure() -> "Figure":
    """Return what `draw` draws on.

    Raises:
        InputError: no matplotlib.
    """
    return _figure(9.0, 4.4)


def draw(figure: "Figure", path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Draw accuracy against speed; without accuracy, the time of an image against its size.

    Single images stand on the left, batches on the right.

    Args:
        figure: an empty one.
        path: of the PNG file.
        about: what the figures depend on, by name.
        rows: by ascending size.

    Raises:
        InputError: a place that cannot be written.

    Source: YOLO9000, figure 4.
    """
    measured = any(row.ap50 is not None for row in rows)
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_title("one image at a time", fontsize=10, color=TEXT)
    panels[1].set_title(f"batches of {about['batch_size']}", fontsize=10, color=TEXT)
    (_draw_accuracy if measured else _draw_latency)(panels[0], [(row, row.one) for row in rows])
    batches = [(row, row.many) for row in rows if row.many is not None]
    (_draw_accuracy if measured else _draw_latency)(panels[1], batches)
    ylabel = "AP50 on the test images" if measured else "ms an image, median and 10 … 90 %"
    panels[0].set_ylabel(ylabel, color=TEXT)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", colors=TEXT)
        axes.xaxis.label.set_color(TEXT)
        axes.grid(color=LINE, linewidth=0.6)
    title = f"{Path(about['checkpoint']).name} on {_machine(about)}"
    figure.suptitle(title, fontsize=10, color=TEXT)
    _save(figure, path)


def _draw_accuracy(axes: "Axes", points: Sequence[tuple[Row, Timing]]) -> None:
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    known = [(t.images_per_second, row.ap50, row) for row, t in points if row.ap50 is not None]
    axes.plot(
        [speed for speed, _, _ in known], [ap50 for _, ap50, _ in known], "o-", color=COLOURS[0]
    )
    for speed, ap50, row in known:
        axes.annotate(
            f"{row.image_size} px", (speed, ap50), (0, 8), textcoords="offset points", ha="center",
            fontsize=9, color=TEXT, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
    axes.set(xscale="log", xlabel="images a second")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7), numticks=30))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.15)


def _draw_latency(axes: "Axes", points: Sequence[tuple[Row, Timing]]) -> None:
    sizes = [row.image_size for row, _ in points]
    low, median, high = (
        [getattr(timing, name) / timing.images for _, timing in points]
        for name in ("low_ms", "median_ms", "high_ms")
    )
    axes.plot(sizes, median, "o-", color=COLOURS[0], ms=5)
    axes.fill_between(sizes, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.set(xticks=sizes, xlabel="image size, px")
    axes.set_ylim(bottom=0)
