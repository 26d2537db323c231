"""The tables of `yolo-lightning mlflow compare`."""

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

FEW_PARAMS = 3
"""So many differing parameters stand in the table of runs; more get lines of their own."""
_MAX_VALUES, _MAX = 6, 40

Cell = str | float | None


@dataclass
class Table:
    """Rows under a head.

    Attributes:
        head: names of the columns, each once.
        rows: a cell a column; None where there is no value.
        short: what stands over a column in text, where that is not its name.
        hidden: columns that text leaves out.
    """

    head: list[str]
    rows: list[list[Cell]]
    short: Mapping[str, str] = field(default_factory=dict)
    hidden: Collection[str] = ()

    def text(self) -> str:
        """Return aligned columns, numbers to the right; what is long is cut in its middle."""
        columns = []
        for name, cells in zip(self.head, zip(*self.rows, strict=True), strict=True):
            if name in self.hidden:
                continue
            texts = [self.short.get(name, name), *map(_shown, cells)]
            width = max(map(len, texts))
            to_left = any(isinstance(cell, str) for cell in cells)
            columns.append([f"{text:{'<' if to_left else '>'}{width}}" for text in texts])
        return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

    def write(self, path: Path) -> None:
        """Write all of it as CSV.

        Raises:
            InputError: a place that cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as handle:
                csv.writer(handle).writerows([self.head, *self.rows])
        except OSError as error:
            raise InputError(f"--csv {str(path)!r}: {error.strerror or error}") from None


def _shown(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.4f}" if cell == 0 or 1e-3 <= abs(cell) < 100 else f"{cell:.4g}"
    return "-" if cell is None else cut(str(cell))


def cut(text: str, longest: int = _MAX) -> str:
    """Return a text, a long one without its middle."""
    half = (longest - 1) // 2
    return text if len(text) <= longest else f"{text[: longest - 1 - half]}…{text[-half:]}"


def is_lowest(metric: str) -> bool:
    """Return whether a metric is better the lower it is."""
    return "loss" in metric


def labels_of(runs: Sequence[TrackedRun]) -> list[str]:
    """Return the names of runs, with the beginning of the id where a name is not the only one."""
    names = [run.name for run in runs]
    return [
        f"{run.name} ({run.run_id[:8]})" if names.count(run.name) > 1 else run.name for run in runs
    ]


def differing(groups: Sequence[Sequence[TrackedRun]]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the parameters that are not the same everywhere.

    Args:
        groups: of one run each, or of several.

    Returns:
        Those that have one value in a group, and others in other groups: a value a group. And the
        names of those that differ within a group.
    """
    between, within = {}, []
    for name in sorted({name for group in groups for run in group for name in run.params}):
        values = [{run.params.get(name, "-") for run in group} for group in groups]
        if any(len(value) > 1 for value in values):
            within.append(name)
        elif any(value != values[0] for value in values):
            between[name] = [value.pop() for value in values]
    return between, within


def alike(params: Mapping[str, list[str]], first: str = "") -> dict[str, list[str]]:
    """Return one name for all parameters that have the same values everywhere, and the others.

    A value of a recipe that others refer to changes them with it.

    Args:
        params: as `differing` gives them.
        first: speaks for the others where it is among them; else the one nearest to the top.
    """
    having: dict[tuple[str, ...], list[str]] = {}
    for name, values in params.items():
        having.setdefault(tuple(values), []).append(name)
    found = {}
    for names in having.values():
        names.sort(key=lambda name: (name != first, name.count("."), name))
        found[names[0]] = names[1:]
    return found


def _rank(value: str) -> tuple[float, str]:
    """Return a key that sorts numbers by size, and before words."""
    try:
        number = float(value)
    except ValueError:
        return math.inf, value
    return (math.inf if math.isnan(number) else number), value


def figures_of(runs: Sequence[TrackedRun], metric: str, last: bool) -> list[float]:
    """Return the best finite value of a metric of each run, or its last where that is finite."""
    found = []
    for run in runs:
        if metric in run.curves:
            curve = run.curves[metric]
            best = curve.best(lowest=is_lowest(metric))
            value = curve.last if last else best[1] if best else math.nan
            found += [value] if math.isfinite(value) else []
    return found


def place(run: TrackedRun, metric: str, last: bool) -> float:
    """Return a key that sorts the best run first, runs without a finite value last."""
    figures = figures_of([run], metric, last)
    return math.inf if not figures else figures[0] if is_lowest(metric) else -figures[0]


def runs_table(
    runs: Sequence[TrackedRun],
    metrics: Sequence[str],
    params: Mapping[str, list[str]],
    shown: Collection[str],
) -> Table:
    """Return a row a run: status, last step, each metric's best value, where, and its last.

    Args:
        runs: with their curves.
        metrics: to show.
        params: those that differ, a value a run.
        shown: names of those that text shows.
    """
    head = ["#", "run", "id", "experiment", "status", "last step"]
    short: dict[str, str] = {}
    hidden = {"id", *(name for name in params if name not in shown)}
    hidden |= {"experiment"} if len({run.experiment for run in runs}) == 1 else set()
    for metric in metrics:
        head += [metric, f"{metric} best step", f"{metric} last"]
        short |= {f"{metric} best step": "at step", f"{metric} last": "last"}
    rows: list[list[Cell]] = []
    for number, (run, label) in enumerate(zip(runs, labels_of(runs), strict=True)):
        row: list[Cell] = [number + 1, label, run.run_id, run.experiment, run.status, run.last_step]
        for metric in metrics:
            curve = run.curves.get(metric)
            best = curve.best(lowest=is_lowest(metric)) if curve else None
            row += [best[1], best[0]] if best else [None, None]
            row.append(curve.last if curve else None)
        rows.append(row + [values[number] for values in params.values()])
    return Table([*head, *params], rows, short, hidden)


def groups_table(
    groups: Mapping[str, Sequence[TrackedRun]], key: str, metrics: Sequence[str], last: bool
) -> Table:
    """Return a row a metric and group: mean, standard deviation (n - 1) and range over its runs.

    Args:
        groups: of runs with their curves, by what they share.
        key: the tag or the parameter that they share.
        metrics: to show.
        last: take each run's last value, not its best; values that are not finite do not count.
    """
    rows: list[list[Cell]] = []
    for metric in metrics:
        found = {name: figures_of(runs, metric, last) for name, runs in groups.items()}
        sign = 1 if is_lowest(metric) else -1
        # the best first, groups without a value last
        for name in sorted(found, key=lambda g: sign * fmean(found[g]) if found[g] else math.inf):
            values = found[name]
            spread = stdev(values) if len(values) > 1 else None
            ends = [fmean(values), spread, min(values), max(values)] if values else [None] * 4
            rows.append([metric, name, len(values), *ends])
    return Table(["metric", key, "runs", "mean", "sd", "min", "max"], rows)


def params_text(params: Mapping[str, list[str]], owners: Sequence[str]) -> str:
    """Return a line a parameter: its values, and who has each.

    Args:
        params: those that differ, a value an owner.
        owners: numbers of runs, or names of groups.
    """
    lines = []
    for name, values in params.items():
        having: dict[str, list[str]] = {}
        for owner, value in zip(owners, values, strict=True):
            having.setdefault(value, []).append(owner)
        known = sorted(having, key=_rank)
        text = ";  ".join(f"{cut(value)} ({', '.join(having[value])})" for value in known)
        if len(having) > _MAX_VALUES:
            text = f"{len(having)} values: {cut(known[0])}, {cut(known[1])} … {cut(known[-1])}"
        lines.append(f"  {name:<{max(map(len, params))}}  {text}")
    return "\n".join(lines)


def batches_text(recorded: Sequence[NDArray[np.uint32] | None], labels: Sequence[str]) -> str:
    """Return the first step at which runs read other batches than the first of them.

    Args:
        recorded: of at least two runs what each step read, as `read_batches` gives it.
        labels: of the runs.
    """
    having = [(k, steps) for k, steps in enumerate(recorded) if steps is not None]
    if not having:
        return "batches are not recorded of any of these runs"
    lines = []
    if len(having) > 1:
        first, reference = having[0]
        outcomes: dict[str, list[int]] = {}
        for k, steps in having[1:]:
            outcomes.setdefault(_difference(reference, steps), []).append(k)
        if len(having) == 2:
            said = next(iter(outcomes))
            lines = [f"{labels[first]} and {labels[having[1][0]]}: {said}"]
        else:
            lines = [f"batches, beside those of # {first + 1}"]
            lines += [f"  {said}: # {_numbers(which)}" for said, which in outcomes.items()]
    if len(having) < len(recorded):
        missing = [k for k, steps in enumerate(recorded) if steps is None]
        lines.append(f"batches are not recorded of # {_numbers(missing)}")
    return "\n".join(lines)


def _difference(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> str:
    step, count = first_difference(one, other)
    if step is not None:
        return f"different batches first at step {step:,}"
    same = f"the same batches in all {count:,} steps that both trained"
    return same if count else "no step that both trained"


def _numbers(places: Sequence[int]) -> str:
    return ", ".join(str(place + 1) for place in places)
