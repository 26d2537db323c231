"""Comparison of MLflow runs: metrics, different parameters, batches and curves."""

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray
from sqlalchemy.exc import SQLAlchemyError

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.tracking.names import mask_credentials
from yolo_lightning.visualization.figures import new_figure, save_figure

MAX_PARAM_COLUMNS = 3
"""Up to so many parameters are columns of the table of runs; more are listed below it."""
DEFAULT_METRICS = (
    "val/AP50", "val/AP", "val/top1", "val/top5", "test/AP50", "test/AP", "test/top1", "train/loss",
)  # fmt: skip
"""The first two of these that a run has are shown by default."""
_MIN_ID_LENGTH, _MAX_LISTED, _MAX_VALUES, _MAX_POINTS = 6, 20, 6, 200


@contextlib.contextmanager
def open_client(uri: str) -> Iterator[MlflowClient]:
    """Yield a client; a failed request in the context raises `InputError` with one line."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    try:
        yield MlflowClient(uri)
    except (MlflowException, SQLAlchemyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{mask_credentials(uri)}: {mask_credentials(lines[0])}") from None


def _search(search: Callable[..., Any], **options: Any) -> Iterator[Any]:
    """Yield the results of all pages; each page is requested when it is needed."""
    token = None
    while token != "":
        page = search(page_token=token, max_results=200, **options)
        yield from page
        token = page.token or ""


def find_runs(
    client: MlflowClient, experiment_names: Sequence[str]
) -> tuple[dict[str, str], Iterator[Run]]:
    """Return experiments, as names by id, and their runs that are not deleted, newest first."""
    experiments = {e.experiment_id: e.name for e in _search(client.search_experiments)}
    existing = list(experiments.values())
    for name in experiment_names:
        if name not in existing:
            hint = nearest(name, existing) or f"existing experiments: {', '.join(existing)}"
            raise InputError(f"--experiment {name!r}: no such experiment; {hint}")
    ids = [key for key, name in experiments.items() if name in (experiment_names or existing)]
    order = ["attributes.start_time DESC"]
    return experiments, _search(client.search_runs, experiment_ids=ids, order_by=order)


def select_runs(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """Return runs by name, id, or the first 6 or more characters of the id.

    A parent without metrics is replaced by its child runs.
    """
    selected: dict[str, Run] = {}
    for name in names:
        matches = [run for run in runs if name in (run.info.run_name, run.info.run_id)] or [
            run for run in runs if len(name) >= _MIN_ID_LENGTH and run.info.run_id.startswith(name)
        ]
        if not matches:
            hint = nearest(name, [str(run.info.run_name) for run in runs])
            hint = hint or "--max-runs lists the newest"
            raise InputError(f"--run {name!r}: no such run; {hint}")
        for match in matches:
            parent = match.info.run_id
            children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
            chosen = [match] if match.data.metrics or not children else children[::-1]
            selected |= {run.info.run_id: run for run in chosen}
    return list(selected.values())


def select_metrics(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return the named metrics; without names, the first two of `DEFAULT_METRICS` that exist."""
    metrics = {name for run in runs for name in run.data.metrics}
    existing = sorted(metrics, key=lambda name: (name.startswith("system/"), name))
    for name in names:
        if name not in existing:
            listed = ", ".join(existing[:_MAX_LISTED])
            hint = nearest(name, existing) or f"existing metrics: {listed} …"
            raise InputError(f"--metric {name!r}: none of these runs has it; {hint}")
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


def _finite(values: pd.Series) -> pd.Series:
    """Return numbers, with NaN for those that are infinite or missing."""
    return values.astype(float).replace([np.inf, -np.inf], np.nan)


def runs_table(
    runs: Sequence[Run], experiments: Mapping[str, str], curves: Mapping[str, dict[str, pd.Series]]
) -> pd.DataFrame:
    """Return a row per run id: status, last step, and each metric's best value, its step, the last.

    Last values that are not finite are strings, to tell them from missing ones.
    """
    rows, names = [], [run.info.run_name for run in runs]
    for run, name in zip(runs, names, strict=True):
        run_id, status = run.info.run_id, run.info.status.lower()
        label = f"{name} ({run_id[:8]})" if names.count(name) > 1 else name
        row = {"run": label, "id": run_id, "experiment": experiments[run.info.experiment_id]}
        metrics = run.data.to_proto().metrics  # the dictionary `metrics` has no steps
        steps = [metric.step for metric in metrics if not metric.key.startswith("system/")]
        row |= {"status": status, "last step": max(steps, default=0)}
        for metric, by_run in curves.items():
            curve = by_run.get(run_id, pd.Series(dtype=float))
            finite = _finite(curve).dropna().sort_values(ascending="loss" in metric, kind="stable")
            best, step = (finite.iloc[0], finite.index[0]) if len(finite) else (None, None)
            last = float(curve.iloc[-1]) if len(curve) else None
            row |= {metric: best, f"{metric} best step": step}
            row[f"{metric} last"] = last if last is None or np.isfinite(last) else str(last)
        rows.append(row)
    return pd.DataFrame(rows, dtype=object).set_index("id", drop=False)


def ranking_values(table: pd.DataFrame, metric: str, last: bool) -> pd.Series:
    """Return each run's best (or last) value of a metric, NaN if it has no finite one."""
    return _finite(table[f"{metric} last" if last else metric])


def group_names(runs: Sequence[Run], table: pd.DataFrame, key: str) -> pd.Series:
    """Return a tag, a parameter, or the experiment of each run, ``-`` where it has none."""
    names_by_run = {run.info.run_id: {**run.data.params, **run.data.tags} for run in runs}
    rows = {k: {"experiment": table.at[k, "experiment"], **v} for k, v in names_by_run.items()}
    groups = table["id"].map(lambda run_id: rows[run_id].get(key) or "-").rename(key)
    if (groups == "-").all():
        names = sorted({name for row in rows.values() for name in row})
        hint = nearest(key, names) or "examples: recipe, experiment, model.learning_rate"
        raise InputError(f"--group-by {key!r}: no run has a tag or parameter of this name; {hint}")
    return groups


def groups_table(
    table: pd.DataFrame, groups: pd.Series, metrics: Sequence[str], last: bool
) -> pd.DataFrame:
    """Return mean, standard deviation (n - 1) and range of the best (or last) values of groups."""
    stats = {}
    for metric in metrics:
        values = ranking_values(table, metric, last).groupby(groups, sort=False)
        summary = values.agg(runs="count", mean="mean", sd="std", min="min", max="max")
        stats[metric] = summary.sort_values("mean", ascending="loss" in metric, kind="stable")
    return pd.concat(stats, names=["metric"]).reset_index(allow_duplicates=True)


def different_params(runs: Sequence[Run], groups: pd.Series) -> tuple[pd.DataFrame, list[str]]:
    """Return parameters that differ only between groups, a row per group, or within groups."""
    rows = {run.info.run_id: run.data.params for run in runs}
    params = pd.DataFrame(list(rows.values()), list(rows)).sort_index(axis=1).fillna("-")
    by_group = params.loc[groups.index].groupby(groups, sort=False)
    varies = (by_group.nunique() > 1).any()
    between = by_group.first().loc[:, ~varies]
    return between.loc[:, between.nunique() > 1], list(varies.index[varies])


def merge_equal_params(params: Mapping[str, Any], preferred: str = "") -> dict[str, list[str]]:
    """Group parameters with equal values in all runs, such as interpolated recipe values.

    Returns the other names of each group by `preferred`, else by the name with the fewest dots.
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
        numbers = pd.Series(pd.to_numeric(by_value.index, errors="coerce"))
        by_value = by_value.iloc[numbers.argsort(kind="stable")]
        text = ";  ".join(f"{shorten(value)} ({names})" for value, names in by_value.items())
        if len(by_value) > _MAX_VALUES:
            first, second, last = (shorten(by_value.index[k]) for k in (0, 1, -1))
            text = f"{len(by_value)} values: {first}, {second} … {last}"
        lines.append(f"  {name:<{max(map(len, params))}}  {text}")
    return "\n".join(lines)


def shorten(text: str, max_length: int = 40) -> str:
    """Replace the middle of a long text by ``…``."""
    half = (max_length - 1) // 2
    return text if len(text) <= max_length else f"{text[: max_length - 1 - half]}…{text[-half:]}"


def to_text(table: pd.DataFrame) -> str:
    """Return aligned columns; long cells are shortened."""

    def to_cell(value: Any) -> str:
        if pd.isna(value):
            return " -"
        if isinstance(value, float):
            return f" {value:.4f}" if value == 0 or 1e-3 <= abs(value) < 100 else f" {value:.4g}"
        return f" {shorten(str(value))}"

    titles = [re.sub(r".* (best step|last)$", r"\1", name) for name in table]
    widths = [len(title) + 1 for title in titles]  # two spaces between columns
    cells = table.map(to_cell)
    return str(cells.to_string(index=False, header=titles, col_space=widths))


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


def batches_text(batches: Sequence[NDArray[np.uint32]], labels: Sequence[str]) -> str:
    """Return at which step each run first reads other batches than the first run."""
    recorded = [k for k, steps in enumerate(batches) if len(steps)]
    by_result: dict[str, list[str]] = {}
    for k in recorded[1:]:
        step, count = first_difference(batches[recorded[0]], batches[k])
        result = f"the same batches in all {count:,} steps that both have trained"
        result = result if count else "no step that both have trained"
        result = result if step is None else f"different batches, first at step {step:,}"
        by_result.setdefault(result, []).append(str(k + 1))
    lines = [f"  {result}: # {', '.join(runs)}" for result, runs in by_result.items()]
    if len(recorded) == 2:
        lines = [f"{labels[recorded[0]]} and {labels[recorded[1]]}: {result}"]
    elif lines:
        lines.insert(0, f"batches, compared with those of # {recorded[0] + 1}")
    if missing := [str(k + 1) for k, steps in enumerate(batches) if not len(steps)]:
        which = f"# {', '.join(missing)}" if recorded else "any of these runs"
        lines.append(f"batches are not recorded for {which}")
    return "\n".join(lines)


def downsample(curve: pd.Series) -> tuple[pd.Series, int]:
    """Average neighbouring points to at most 200; also return the number of points per mean.

    Mean steps are rounded down. Values that are not finite become NaN, which is not drawn.
    """
    size = max(1, -(-len(curve) // _MAX_POINTS))
    blocks = np.arange(len(curve)) // size
    steps = curve.index.to_series().groupby(blocks).mean().astype(int)
    means = _finite(curve).groupby(blocks).mean()
    return means.set_axis(steps), size


def mean_and_std(curves: Sequence[pd.Series]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return steps, mean and standard deviation (n - 1) over the range that all curves cover.

    Curves are interpolated linearly. The standard deviation of a single curve is 0.
    """
    lines = pd.concat([_finite(curve).dropna() for curve in curves], axis=1).sort_index()
    lines = lines.interpolate(method="index", limit_area="inside").dropna()
    std = lines.std(axis=1).fillna(0)
    return lines.index.to_numpy(), lines.mean(axis=1).to_numpy(), std.to_numpy()


def save_curves(panels: Mapping[str, Mapping[str, Sequence[pd.Series]]], path: Path) -> None:
    """Draw a PNG with one panel per metric: a line per run, or mean, band and lines per group.

    `panels` are, for each metric, curves by label. A label has the same colour in all panels.
    """
    figure = new_figure(8, 3.5 * len(panels) + 0.2 * max(map(len, panels.values())))
    grid, handles, title = figure.subplots(len(panels), squeeze=False).ravel(), {}, None
    for axes, (metric, by_label) in zip(grid, panels.items(), strict=True):
        max_size = 1
        for number, (label, curves) in enumerate(by_label.items()):
            if not curves:
                continue
            style = {"color": f"C{number}", "ls": ("-", "--", ":")[number // 10 % 3]}
            means, sizes = zip(*map(downsample, curves), strict=True)
            max_size = max(max_size, *sizes)
            steps, mean, std = mean_and_std(means)
            (handles[label],) = axes.plot(steps, mean, lw=2, marker=".", **style)
            if len(curves) > 1:
                title = "bold: mean of the runs; band: ± 1 standard deviation"
                axes.fill_between(steps, mean - std, mean + std, color=f"C{number}", alpha=0.15)
                for curve in means:
                    axes.plot(curve, lw=0.7, alpha=0.4, **style)
        axes.set_title(f"{metric}, means of {max_size} points" if max_size > 1 else metric)
        axes.set_xlabel("step")
    figure.legend(handles.values(), handles, loc="outside lower left", title=title)
    save_figure(figure, path)
