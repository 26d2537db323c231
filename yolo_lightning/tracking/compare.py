"""Comparison of MLflow runs: metrics, different parameters, batches and curves."""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from yolo_lightning.errors import InputError, mask_secrets, nearest
from yolo_lightning.tracking.store import prepare_client, short_message

MAX_PARAM_COLUMNS = 3
"""Up to so many parameters are columns of the table of runs; more are listed below it."""
DEFAULT_METRICS = (
    "val/AP50", "val/AP", "val/top1", "val/top5", "test/AP50", "test/AP", "test/top1", "train/loss",
)  # fmt: skip
"""The first two of these that a run has are shown by default."""
_MIN_ID_LENGTH, _MAX_LISTED, _MAX_VALUES = 6, 20, 6


@contextlib.contextmanager
def open_client(uri: str) -> Iterator[MlflowClient]:
    """Yield an MLflow client of a store.

    Raises:
        InputError: a request in the context fails; one line.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    prepare_client()
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    try:
        yield MlflowClient(uri)
    except (MlflowException, SQLAlchemyError) as error:
        raise InputError(f"{mask_secrets(uri)}: {short_message(error)}") from None


def _check_names(option: str, names: Sequence[str], existing: Sequence[str], problem: str) -> None:
    for name in names:
        if name not in existing:
            more = " …" if len(existing) > _MAX_LISTED else ""
            hint = nearest(name, existing)
            hint = hint or f"existing: {', '.join(existing[:_MAX_LISTED])}{more}"
            raise InputError(f"{option} {name!r}: {problem}; {hint}")


def _pages(search: Callable[..., Any], **options: Any) -> Iterator[Any]:
    """Yield the results of all pages; each page is requested when it is needed."""
    token = None
    while token != "":
        page = search(page_token=token, max_results=100, **options)
        yield from page
        token = page.token or ""


def search_runs(client: MlflowClient, experiment_names: Sequence[str]) -> Iterator[Run]:
    """Yield the runs of experiments, by default of all, newest first, without deleted ones.

    The tag `experiment` of each run is set to the name of its experiment.

    Raises:
        InputError: no experiment has one of the names.
    """
    experiments = {e.experiment_id: e.name for e in _pages(client.search_experiments)}
    existing = list(experiments.values())
    _check_names("--experiment", experiment_names, existing, "no such experiment")
    ids = [key for key, name in experiments.items() if name in (experiment_names or existing)]
    newest_first = ["attributes.start_time DESC"]
    for run in _pages(client.search_runs, experiment_ids=ids, order_by=newest_first):
        run.data.tags["experiment"] = experiments[run.info.experiment_id]
        yield run


def select_runs(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """Return runs by name, id, or the first 6 or more characters of the id.

    A parent without metrics is replaced by its child runs.

    Raises:
        InputError: a name matches no run.
    """
    selected: dict[str, Run] = {}
    for name in names:
        matches = [run for run in runs if name in (run.info.run_name, run.info.run_id)] or [
            run for run in runs if len(name) >= _MIN_ID_LENGTH and run.info.run_id.startswith(name)
        ]
        if not matches:
            existing = [str(run.info.run_name) for run in runs]
            _check_names("--run", [name], existing, "no such run")
        for match in matches:
            parent = match.info.run_id
            children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
            chosen = [match] if match.data.metrics or not children else children[::-1]
            selected |= {run.info.run_id: run for run in chosen}
    return list(selected.values())


def select_metrics(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return the named metrics; without names, the first two of `DEFAULT_METRICS` that exist.

    Raises:
        InputError: no run has one of the metrics.
    """
    metrics = {name for run in runs for name in run.data.metrics}
    existing = sorted(metrics, key=lambda name: (name.startswith("system/"), name))
    _check_names("--metric", names, existing, "none of these runs has it")
    default = [name for name in DEFAULT_METRICS if name in existing][:2] or existing[:1]
    return list(dict.fromkeys(names)) or default


def read_curves(client: MlflowClient, runs: Sequence[Run], metric: str) -> dict[str, pd.Series]:
    """Return a metric's values by step, for each run id; the later one of a step trained twice."""
    curves = {}
    for run_id in [run.info.run_id for run in runs if metric in run.data.metrics]:
        points = client.get_metric_history(run_id, metric)
        latest = {p.step: p.value for p in sorted(points, key=lambda p: (p.step, p.timestamp))}
        curve = pd.Series(latest, dtype=float)
        # databases store infinity as the largest number
        curves[run_id] = curve.where(curve.abs() < np.finfo(float).max, curve * np.inf)
    return curves


def _lower_is_better(metric: str) -> bool:
    return "loss" in metric


def runs_table(runs: Sequence[Run], curves: Mapping[str, dict[str, pd.Series]]) -> pd.DataFrame:
    """Return a row per run id: status, last step; best value, its step, last value of each metric.

    Last values that are not finite are text, to tell them from missing ones.
    """
    names = [run.info.run_name or run.info.run_id[:8] for run in runs]
    rows = []
    for run, name in zip(runs, names, strict=True):
        run_id = run.info.run_id
        metrics = run.data.to_proto().metrics  # the dictionary `metrics` has no steps
        steps = [metric.step for metric in metrics if not metric.key.startswith("system/")]
        row = {
            "run": f"{name} ({run_id[:8]})" if names.count(name) > 1 else name,
            "id": run_id,
            "experiment": run.data.tags["experiment"],
            "status": run.info.status.lower(),
            "last step": max(steps, default=0),
        }
        for metric, by_run in curves.items():
            values = _best_and_last(by_run[run_id], metric) if run_id in by_run else [None] * 3
            columns = (metric, f"{metric} best step", f"{metric} last")
            row |= dict(zip(columns, values, strict=True))
        rows.append(row)
    return pd.DataFrame(rows, dtype=object).set_index("id", drop=False)


def _best_and_last(curve: pd.Series, metric: str) -> list[Any]:
    """Return the best finite value, the first step that has it, and the last value."""
    last = curve.iloc[-1]
    last = last if np.isfinite(last) else str(last)
    finite = curve[np.isfinite(curve)]
    if finite.empty:
        return [None, None, last]
    step = finite.idxmin() if _lower_is_better(metric) else finite.idxmax()
    return [finite[step], step, last]


def ranking(table: pd.DataFrame, metric: str, last: bool) -> pd.Series:
    """Return each run's best (or last) value of a metric, best first; NaN if it is not finite."""
    values = table[f"{metric} last" if last else metric].astype(float)
    finite = values.where(np.isfinite(values))
    return finite.sort_values(ascending=_lower_is_better(metric), kind="stable")


def group_names(runs: Sequence[Run], key: str) -> pd.Series:
    """Return a tag or a parameter of each run id, ``-`` where it has none.

    Raises:
        InputError: no run has it.
    """
    values = {run.info.run_id: {**run.data.params, **run.data.tags} for run in runs}
    existing = sorted(set().union(*values.values()), key=lambda name: (name.count("."), name))
    _check_names("--group-by", [key], existing, "no run has a tag or parameter of this name")
    return pd.Series({k: by_name.get(key) or "-" for k, by_name in values.items()}, name=key)


def groups_table(
    table: pd.DataFrame, groups: pd.Series, metrics: Sequence[str], last: bool
) -> pd.DataFrame:
    """Return one row per metric and group: mean, standard deviation (n - 1) and range of its runs.

    Uses each run's best (or last) value; values that are not finite are left out.
    """
    stats = {}
    for metric in metrics:
        by_group = ranking(table, metric, last).groupby(groups)
        rows = by_group.agg(runs="count", mean="mean", sd="std", min="min", max="max")
        stats[metric] = rows.sort_values("mean", ascending=_lower_is_better(metric))
    return pd.concat(stats, names=["metric"]).reset_index(allow_duplicates=True)


def different_params(runs: Sequence[Run], groups: pd.Series) -> tuple[pd.DataFrame, list[str]]:
    """Return parameters that differ between groups, a row per group, or else within groups."""
    params = pd.DataFrame({run.info.run_id: run.data.params for run in runs}, dtype=object)
    by_group = params.T.sort_index(axis=1).fillna("-").groupby(groups, sort=False)
    varies = (by_group.nunique() > 1).any()
    between = by_group.first().loc[groups.unique(), ~varies]
    return between.loc[:, between.nunique() > 1], list(varies.index[varies])


def merge_equal_params(params: Mapping[str, Any], preferred: str = "") -> dict[str, list[str]]:
    """Group parameters that have equal values in all runs, such as interpolated recipe values.

    Returns:
        The other names of each group by its representative: `preferred`, else the name with the
        fewest dots.
    """
    by_values: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(params, key=lambda name: (name != preferred, name.count("."), name)):
        by_values.setdefault(tuple(params[name]), []).append(name)
    return {first: others for first, *others in sorted(by_values.values())}


def params_text(params: pd.DataFrame) -> str:
    """Return one line per parameter: its values, each with its runs or groups (the index)."""
    lines, owners = [], params.index.to_series()
    for name, values in params.items():
        by_value = owners.groupby(values).agg(", ".join)
        # numbers by size, before words
        by_value = by_value.sort_index(key=partial(pd.to_numeric, errors="coerce"), kind="stable")
        text = ";  ".join(f"{shorten(value)} ({names})" for value, names in by_value.items())
        if len(by_value) > _MAX_VALUES:
            first, second, last = (shorten(by_value.index[k]) for k in (0, 1, -1))
            text = f"{len(by_value)} values: {first}, {second} … {last}"
        lines.append(f"  {name:<{max(map(len, params))}}  {text}")
    return "\n".join(lines)


def to_text(table: pd.DataFrame) -> str:
    """Return aligned columns, numbers to the right; long cells are shortened."""
    columns = []
    for name, values in table.items():
        title = re.sub(r".* (best step|last)$", r"\1", name)  # the metric's name is to the left
        cells = [title, *map(_format, values)]
        align = "<" if all(isinstance(value, str) for value in values) else ">"
        columns.append([f"{cell:{align}{max(map(len, cells))}}" for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _format(cell: Any) -> str:
    if isinstance(cell, float) and not np.isnan(cell):
        return f"{cell:.4f}" if cell == 0 or 1e-3 <= abs(cell) < 100 else f"{cell:.4g}"
    return "-" if pd.isna(cell) else shorten(str(cell))


def shorten(text: str, max_length: int = 40) -> str:
    """Replace the middle of a long text by ``…``."""
    half = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[: max_length - 1 - half]}…{text[-half:]}"


def read_batches(client: MlflowClient, run_id: str) -> NDArray[np.uint32]:
    """Return the CRC-32 of each step's batch, 0 if it was not trained; empty if not recorded."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(MlflowException, OSError):
        path = client.download_artifacts(run_id, "batches/steps.crc32", folder)
        return np.fromfile(path, dtype="<u4")
    return np.empty(0, dtype="<u4")


def first_difference(
    first: NDArray[np.uint32], second: NDArray[np.uint32]
) -> tuple[int | None, int]:
    """Return the first step with different batches, or None, and how many steps both trained."""
    count = min(len(first), len(second))
    trained = (first[:count] != 0) & (second[:count] != 0)
    differ = np.flatnonzero(trained & (first[:count] != second[:count]))
    return (int(differ[0]) if len(differ) else None), int(trained.sum())


def batches_text(batches: Mapping[str, NDArray[np.uint32]]) -> str:
    """Return at which step each run first reads other batches than the first one; by number."""
    recorded = [number for number, steps in batches.items() if len(steps)]
    if not recorded:
        return "batches are not recorded for any of these runs"
    by_result: dict[str, list[str]] = {}
    for number in recorded[1:]:
        step, count = first_difference(batches[recorded[0]], batches[number])
        if step is not None:
            result = f"different batches, first at step {step:,}"
        elif count:
            result = f"the same batches in all {count:,} steps that both have trained"
        else:
            result = "no step that both have trained"
        by_result.setdefault(result, []).append(number)
    lines = [f"  {result}: # {', '.join(numbers)}" for result, numbers in by_result.items()]
    if lines:
        lines.insert(0, f"batches, compared with those of # {recorded[0]}")
    if missing := [number for number in batches if number not in recorded]:
        lines.append(f"batches are not recorded for # {', '.join(missing)}")
    return "\n".join(lines)
