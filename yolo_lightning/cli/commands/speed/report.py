"""Output of `speed`: a table, JSON, CSV and a plot."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError
from yolo_lightning.inference.timing import Timing
from yolo_lightning.visualization.figures import COLOURS, LINE, TEXT, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STAGES = ("network", "decode", "suppression")
_TIMING_COLUMNS = {
    "latency_ms": "median_ms", "latency_10_percent_ms": "p10_ms", "latency_90_percent_ms": "p90_ms",
    **{f"{stage}_share": f"{stage}_share" for stage in _STAGES},
}  # fmt: skip
"""Column name to attribute of `Timing`."""
_COLUMNS = (
    ("", "px", 5), ("", "{}", 5), ("", "{}", 5), ("billion", "operations", 10),
    ("one image", "images/s", 9), ("", "ms (10 … 90 %)", 22),
    ("batch of {}", "images/s", 11), ("", "ms (10 … 90 %)", 22),
    ("network", "%", 7), ("decode", "%", 6), ("suppress", "%", 8),
)  # fmt: skip
"""Headings, in two lines, and width of the columns of the printed table."""


@dataclass
class SizeResult:
    """Speed and accuracy at one image size."""

    image_size: int  # px
    billion_operations: float  # for one image
    single: Timing  # of single images
    batch: Timing | None  # of batches; None if the memory is too small
    accuracy: dict[str, float | None]  # two metrics, 0…1; None without test images of the classes

    def to_dict(self) -> dict[str, float | int | None]:
        """Return all values by column name; columns of batches start with ``batch_``."""
        values: dict[str, float | int | None] = {
            "image_size": self.image_size,
            **self.accuracy,
            "billion_operations": self.billion_operations,
        }
        for prefix, timing in (("", self.single), ("batch_", self.batch)):
            values[f"{prefix}images_per_second"] = timing.images_per_second if timing else None
            for name, attribute in _TIMING_COLUMNS.items():
                values[prefix + name] = getattr(timing, attribute) if timing else None
        return values


def table_header(setup: dict[str, Any]) -> str:
    """Return the measurement setup and the headings of the table."""
    values = iter((*setup["metrics"], setup["batch_size"]))
    has_stages = _has_stages(setup["metrics"])
    columns = _COLUMNS if has_stages else _COLUMNS[: -len(_STAGES)]
    headings = [
        [part.format(next(values)) if "{}" in part else part for part in column[:2]]
        for column in columns
    ]
    stages = "network, decoding and suppression: % of the time of one image\n" if has_stages else ""
    return (
        f"{setup['checkpoint']} on {_format_machine(setup)}\n"
        f"yolo-lightning {setup['yolo_lightning']}, torch {setup['torch']}\n"
        f"{setup['images']}; from uint8 on the device to {setup['until']}\n"
        f"medians of {setup['runs']} runs after {setup['warm_up_runs']} warm-up runs; load before: "
        f"{setup['load_before']:.1f} of {setup['cores']} cores\n"
        f"{stages}\n" + "\n".join(map(_format_row, zip(*headings, strict=True)))
    )


def _has_stages(metrics: Iterable[str]) -> bool:
    """Return whether the table has the stages of a detector; a classifier has one only."""
    return "AP50" in metrics


def _format_machine(setup: dict[str, Any]) -> str:
    threads = f"{setup['threads']} thread{'s' if setup['threads'] > 1 else ''}"
    return f"{setup['device_name']} ({setup['device']}), {threads}, {setup['precision']}"


def table_line(row: SizeResult) -> str:
    """Return one line of the table."""
    single, batch = row.single, row.batch
    stages = _STAGES if _has_stages(row.accuracy) else ()
    cells = (
        str(row.image_size),
        *("-" if value is None else f"{value:.3f}" for value in row.accuracy.values()),
        f"{row.billion_operations:.2f}",
        f"{single.images_per_second:.1f}",
        _format_ms(single),
        f"{batch.images_per_second:.1f}" if batch else "-",
        _format_ms(batch) if batch else "too little memory",
        *(f"{100 * getattr(single, f'{part}_share'):.1f}" for part in stages),
    )
    return _format_row(cells)


def _format_row(cells: Sequence[str]) -> str:
    return "  ".join(f"{cell:>{width}}" for cell, (*_, width) in zip(cells, _COLUMNS, strict=False))


def _format_ms(timing: Timing) -> str:
    return f"{timing.median_ms:.1f} ({timing.p10_ms:.1f} … {timing.p90_ms:.1f})"


def write_tables(folder: Path, setup: dict[str, Any], rows: Sequence[SizeResult]) -> None:
    """Write or replace `speed.json` and `speed.csv`."""
    values = [row.to_dict() for row in rows]
    text = json.dumps({**setup, "sizes": values}, indent=2, allow_nan=False)
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


def draw_plot(path: Path, setup: dict[str, Any], rows: Sequence[SizeResult]) -> None:
    """Plot accuracy against speed, or latency against image size if there is no accuracy.

    The left panel shows single images, the right one batches.

    Source: YOLO9000, figure 4.
    """
    metric = setup["metrics"][0]
    has_accuracy = any(row.accuracy[metric] is not None for row in rows)
    figure = new_figure(9.0, 4.4)
    panels = figure.subplots(1, 2, sharey=True)
    panels[0].set_title("one image at a time", fontsize=10, color=TEXT)
    panels[1].set_title(f"batches of {setup['batch_size']}", fontsize=10, color=TEXT)
    draw_panel = _draw_accuracy if has_accuracy else _draw_latency
    draw_panel(panels[0], [(row, row.single) for row in rows])
    draw_panel(panels[1], [(row, row.batch) for row in rows if row.batch is not None])
    ylabel = (
        f"{metric} on the test images" if has_accuracy else "ms per image, median and 10 … 90 %"
    )
    panels[0].set_ylabel(ylabel, color=TEXT)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", colors=TEXT)
        axes.xaxis.label.set_color(TEXT)
        axes.grid(color=LINE, linewidth=0.6)
    title = f"{Path(setup['checkpoint']).name} on {_format_machine(setup)}"
    figure.suptitle(title, fontsize=10, color=TEXT)
    save_figure(figure, path)


def _draw_accuracy(axes: "Axes", points: Sequence[tuple[SizeResult, Timing]]) -> None:
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = [
        (timing.images_per_second, accuracy, row.image_size)
        for row, timing in points
        if (accuracy := next(iter(row.accuracy.values()))) is not None
    ]
    axes.plot([speed for speed, *_ in values], [y for _, y, _ in values], "o-", color=COLOURS[0])
    for speed, accuracy, size in values:
        axes.annotate(
            f"{size} px", (speed, accuracy), (0, 8), textcoords="offset points", ha="center",
            fontsize=9, color=TEXT, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
    axes.set(xscale="log", xlabel="images per second")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7), numticks=30))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.15)


def _draw_latency(axes: "Axes", points: Sequence[tuple[SizeResult, Timing]]) -> None:
    sizes = [row.image_size for row, _ in points]
    low, median, high = (
        [getattr(timing, name) / timing.batch_size for _, timing in points]
        for name in ("p10_ms", "median_ms", "p90_ms")
    )
    axes.plot(sizes, median, "o-", color=COLOURS[0], ms=5)
    axes.fill_between(sizes, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axes.set(xticks=sizes, xlabel="image size, px")
    axes.set_ylim(bottom=0)
