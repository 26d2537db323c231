"""Tables of `yolo-lightning mlflow compare`."""

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.errors import InputError
from yolo_lightning.tracking.compare.runs import TrackedRun, first_difference

MAX_PARAM_COLUMNS = 3
"""Up to so many parameters are columns of the table of runs; more are listed below it."""
_MAX_VALUES, _MAX_LENGTH = 6, 40

Cell = str | float | None


@dataclass
class Table:
    """A table with named columns."""

    columns: list[str]  # unique names
    rows: list[list[Cell]]
    titles: Mapping[str, str] = field(default_factory=dict)  # in text, if not the names
    hidden: Collection[str] = ()  # columns that are not in the text

    def to_text(self) -> str:
        """Return aligned columns, numbers to the right; long cells are shortened."""
        columns = []
        for name, cells in zip(self.columns, zip(*self.rows, strict=True), strict=True):
            if name in self.hidden:
                continue
            texts = [self.titles.get(name, name), *map(_format, cells)]
            width = max(map(len, texts))
            align_left = any(isinstance(cell, str) for cell in cells)
            columns.append([f"{text:{'<' if align_left else '>'}{width}}" for text in texts])
        return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

    def write_csv(self, path: Path) -> None:
        """Write all columns to a CSV file.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as handle:
                csv.writer(handle).writerows([self.columns, *self.rows])
        except OSError as error:
            raise InputError(f"--csv {str(path)!r}: {error.strerror or error}") from None


def _format(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.4f}" if cell == 0 or 1e-3 <= abs(cell) < 100 else f"{cell:.4g}"
    return "-" if cell is None else shorten(str(cell))


def shorten(text: str, max_length: int = _MAX_LENGTH) -> str:
    """Replace the middle of a long text by ``…``."""
    half = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[: max_length - 1 - half]}…{text[-half:]}"


def lower_is_better(metric: str) -> bool:
    """Return whether the lowest value of a metric is the best one."""
    return "loss" in metric


def run_labels(runs: Sequence[TrackedRun]) -> list[str]:
    """Return the run names; a name that is not unique gets the first characters of the id."""
    names = [run.name for run in runs]
    return [
        f"{run.name} ({run.run_id[:8]})" if names.count(run.name) > 1 else run.name for run in runs
    ]


def different_params(
    groups: Sequence[Sequence[TrackedRun]],
) -> tuple[dict[str, list[str]], list[str]]:
    """Return parameters that differ between groups, with a value per group, or within groups."""
    between, within = {}, []
    for name in sorted({name for group in groups for run in group for name in run.params}):
        values = [{run.params.get(name, "-") for run in group} for group in groups]
        if any(len(value) > 1 for value in values):
            within.append(name)
        elif any(value != values[0] for value in values):
            between[name] = [value.pop() for value in values]
    return between, within


def merge_equal_params(
    params: Mapping[str, list[str]], preferred: str = ""
) -> dict[str, list[str]]:
    """Group parameters that have equal values in all runs, such as interpolated recipe values.

    Returns:
        The other names of each group by its representative: `preferred`, else the name with the
        fewest dots.
    """
    by_values: dict[tuple[str, ...], list[str]] = {}
    for name, values in params.items():
        by_values.setdefault(tuple(values), []).append(name)
    merged = {}
    for names in by_values.values():
        names.sort(key=lambda name: (name != preferred, name.count("."), name))
        merged[names[0]] = names[1:]
    return merged


def _sort_key(value: str) -> tuple[float, str]:
    """Return a key that sorts numbers by size, before words."""
    try:
        number = float(value)
    except ValueError:
        return math.inf, value
    return (math.inf if math.isnan(number) else number), value


def finite_values(runs: Sequence[TrackedRun], metric: str, last: bool) -> list[float]:
    """Return each run's best (or last) value of a metric, without runs that have no finite one."""
    values = []
    for run in runs:
        if metric in run.curves:
            curve = run.curves[metric]
            best = curve.best(lowest=lower_is_better(metric))
            value = curve.last if last else best[1] if best else math.nan
            values += [value] if math.isfinite(value) else []
    return values


def ranking_key(run: TrackedRun, metric: str, last: bool) -> float:
    """Return a key that sorts the best run first, and runs without a finite value last."""
    values = finite_values([run], metric, last)
    return math.inf if not values else values[0] if lower_is_better(metric) else -values[0]


def runs_table(
    runs: Sequence[TrackedRun],
    metrics: Sequence[str],
    params: Mapping[str, list[str]],
    visible_params: Collection[str],
) -> Table:
    """Return one row per run: status, last step; best value, its step, last value of each metric.

    `params`, with a value per run, are columns too; the text has only `visible_params`.
    """
    columns = ["#", "run", "id", "experiment", "status", "last step"]
    titles: dict[str, str] = {}
    hidden = {"id", *(name for name in params if name not in visible_params)}
    hidden |= {"experiment"} if len({run.experiment for run in runs}) == 1 else set()
    for metric in metrics:
        columns += [metric, f"{metric} best step", f"{metric} last"]
        titles |= {f"{metric} best step": "at step", f"{metric} last": "last"}
    rows: list[list[Cell]] = []
    for number, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
        row: list[Cell] = [number + 1, label, run.run_id, run.experiment, run.status, run.last_step]
        for metric in metrics:
            curve = run.curves.get(metric)
            best = curve.best(lowest=lower_is_better(metric)) if curve else None
            row += [best[1], best[0]] if best else [None, None]
            row.append(curve.last if curve else None)
        rows.append(row + [values[number] for values in params.values()])
    return Table([*columns, *params], rows, titles, hidden)


def groups_table(
    groups: Mapping[str, Sequence[TrackedRun]], key: str, metrics: Sequence[str], last: bool
) -> Table:
    """Return one row per metric and group: mean, standard deviation (n - 1) and range of its runs.

    Uses each run's best (or last) value; values that are not finite are left out.
    """
    rows: list[list[Cell]] = []
    for metric in metrics:
        by_group = {name: finite_values(runs, metric, last) for name, runs in groups.items()}
        sign = 1 if lower_is_better(metric) else -1
        means = {name: sign * fmean(v) if v else math.inf for name, v in by_group.items()}
        for name in sorted(by_group, key=lambda group: means[group]):
            values = by_group[name]
            std = stdev(values) if len(values) > 1 else None
            stats = [fmean(values), std, min(values), max(values)] if values else [None] * 4
            rows.append([metric, name, len(values), *stats])
    return Table(["metric", key, "runs", "mean", "sd", "min", "max"], rows)


def params_text(params: Mapping[str, list[str]], owners: Sequence[str]) -> str:
    """Return one line per parameter: its values, each with its owners, runs or groups."""
    lines = []
    for name, values in params.items():
        by_value: dict[str, list[str]] = {}
        for owner, value in zip(owners, values, strict=True):
            by_value.setdefault(value, []).append(owner)
        ordered = sorted(by_value, key=_sort_key)
        text = ";  ".join(f"{shorten(value)} ({', '.join(by_value[value])})" for value in ordered)
        if len(by_value) > _MAX_VALUES:
            first, second, last = (shorten(ordered[k]) for k in (0, 1, -1))
            text = f"{len(by_value)} values: {first}, {second} … {last}"
        lines.append(f"  {name:<{max(map(len, params))}}  {text}")
    return "\n".join(lines)


def batches_text(batches: Sequence[NDArray[np.uint32] | None], labels: Sequence[str]) -> str:
    """Return at which step each run first reads other batches than the first run."""
    recorded = [(k, steps) for k, steps in enumerate(batches) if steps is not None]
    if not recorded:
        return "batches are not recorded for any of these runs"
    lines = []
    if len(recorded) > 1:
        first, reference = recorded[0]
        by_result: dict[str, list[int]] = {}
        for k, steps in recorded[1:]:
            by_result.setdefault(_difference_text(reference, steps), []).append(k)
        if len(recorded) == 2:
            result = next(iter(by_result))
            lines = [f"{labels[first]} and {labels[recorded[1][0]]}: {result}"]
        else:
            lines = [f"batches, compared with those of # {first + 1}"]
            lines += [f"  {result}: # {_numbers(runs)}" for result, runs in by_result.items()]
    if len(recorded) < len(batches):
        missing = [k for k, steps in enumerate(batches) if steps is None]
        lines.append(f"batches are not recorded for # {_numbers(missing)}")
    return "\n".join(lines)


def _difference_text(first: NDArray[np.uint32], second: NDArray[np.uint32]) -> str:
    step, count = first_difference(first, second)
    if step is not None:
        return f"different batches, first at step {step:,}"
    same = f"the same batches in all {count:,} steps that both have trained"
    return same if count else "no step that both have trained"


def _numbers(indices: Sequence[int]) -> str:
    return ", ".join(str(index + 1) for index in indices)
