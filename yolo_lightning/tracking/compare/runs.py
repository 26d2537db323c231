"""Runs of a tracking store, as `yolo-lightning mlflow compare` reads them."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.tracking.names import mask_credentials

BATCHES_ARTIFACT = "batches/steps.crc32"
DEFAULT_METRICS = (
    "val/AP50", "val/AP", "val/top1", "val/top5", "test/AP50", "test/AP", "test/top1", "train/loss",
)  # fmt: skip
"""The first two of these that a run has are shown by default."""
_PAGE_SIZE, _MIN_ID_LENGTH, _MAX_LISTED = 200, 6, 20
_LARGEST_FLOAT = float(np.finfo(np.float64).max)
_PARENT_TAG = "mlflow.parentRunId"


@dataclass
class Curve:
    """The values of a metric."""

    steps: NDArray[np.int64]  # (P,), ascending, unique
    values: NDArray[np.float64]  # (P,), possibly NaN or infinite

    @property
    def last(self) -> float:
        """Value at the last step."""
        return float(self.values[-1])

    def best(self, *, lowest: bool) -> tuple[int, float] | None:
        """Return step and value of the best finite value, the first of equals; None if none."""
        finite = np.isfinite(self.values)
        if not finite.any():
            return None
        worst = np.inf if lowest else -np.inf
        values = np.where(finite, self.values, worst)
        index = int(values.argmin() if lowest else values.argmax())
        return int(self.steps[index]), float(values[index])


@dataclass
class TrackedRun:
    """One run of a store."""

    run_id: str
    name: str  # not always unique
    experiment: str
    status: str  # finished, running, failed or killed
    parent: str | None  # run id of the parent run of a sweep
    last_step: int  # without system metrics
    params: dict[str, str]
    tags: dict[str, str]
    metrics: set[str]
    curves: dict[str, Curve] = field(default_factory=dict)  # of the metrics that were read

    def get(self, name: str) -> str | None:
        """Return a tag, a parameter, or the experiment name for ``experiment``."""
        return {"experiment": self.experiment, **self.params, **self.tags}.get(name)


@contextlib.contextmanager
def open_client(uri: str) -> Iterator[Any]:
    """Yield an MLflow client of a store.

    Raises:
        InputError: a request in the context fails; one line.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    logging.getLogger("mlflow.store").setLevel(logging.WARNING)
    try:
        yield MlflowClient(uri)
    except (MlflowException, SQLAlchemyError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{mask_credentials(uri)}: {mask_credentials(lines[0])}") from None


def find_experiments(client: Any, names: Sequence[str]) -> dict[str, str]:
    """Return the named experiments, or all without names, as names by id.

    Raises:
        InputError: no experiment has one of the names.
    """
    experiments: dict[str, str] = {}
    token = None
    while token != "":
        page = client.search_experiments(max_results=_PAGE_SIZE, page_token=token)
        experiments |= {experiment.experiment_id: experiment.name for experiment in page}
        token = page.token or ""
    existing = experiments.values()
    for name in names:
        if name not in existing:
            hint = nearest(name, existing) or f"existing experiments: {', '.join(existing)}"
            raise InputError(f"--experiment {name!r}: no such experiment; {hint}")
    return {key: name for key, name in experiments.items() if not names or name in names}


def search_runs(client: Any, experiments: dict[str, str]) -> Iterator[TrackedRun]:
    """Yield the runs of experiments (names by id) that are not deleted, newest first."""
    token = None
    while token != "":
        page = client.search_runs(
            list(experiments), max_results=_PAGE_SIZE, page_token=token,
            order_by=["attributes.start_time DESC"],
        )  # fmt: skip
        yield from (_to_tracked_run(run, experiments) for run in page)
        token = page.token or ""


def _to_tracked_run(run: Any, experiments: dict[str, str]) -> TrackedRun:
    info, data = run.info, run.data
    # the dictionary `data.metrics` has no steps
    steps = {metric.key: metric.step for metric in data.to_proto().metrics}
    training_steps = [step for key, step in steps.items() if not key.startswith("system/")]
    return TrackedRun(
        run_id=info.run_id,
        name=info.run_name or info.run_id[:8],
        experiment=experiments[info.experiment_id],
        status=info.status.lower(),
        parent=data.tags.get(_PARENT_TAG),
        last_step=max(training_steps, default=0),
        params=dict(data.params),
        tags=dict(data.tags),
        metrics=set(steps),
    )


def select_runs(runs: Iterable[TrackedRun], names: Sequence[str]) -> list[TrackedRun]:
    """Return runs by name, id, or the first 6 or more characters of the id.

    A parent without metrics is replaced by its child runs.

    Raises:
        InputError: a name matches no run.
    """
    runs = list(runs)
    selected: dict[str, TrackedRun] = {}
    for name in names:
        matches = [run for run in runs if name in (run.name, run.run_id)] or [
            run for run in runs if len(name) >= _MIN_ID_LENGTH and run.run_id.startswith(name)
        ]
        if not matches:
            hint = nearest(name, [run.name for run in runs]) or "--max-runs lists the newest"
            raise InputError(f"--run {name!r}: no such run; {hint}")
        for run in matches:
            children = (
                [] if run.metrics else [child for child in runs if child.parent == run.run_id]
            )
            selected |= {child.run_id: child for child in children[::-1] or [run]}
    return list(selected.values())


def select_metrics(runs: Sequence[TrackedRun], names: Sequence[str]) -> list[str]:
    """Return the named metrics; without names, the first two of `DEFAULT_METRICS` that exist.

    Raises:
        InputError: no run has one of the metrics.
    """
    metrics = set().union(*(run.metrics for run in runs))
    existing = sorted(metrics, key=lambda name: (name.startswith("system/"), name))
    for name in names:
        if name not in existing:
            listed = ", ".join(existing[:_MAX_LISTED])
            hint = nearest(name, existing) or f"existing metrics: {listed} …"
            raise InputError(f"--metric {name!r}: none of these runs has it; {hint}")
    if names:
        return list(dict.fromkeys(names))
    return [name for name in DEFAULT_METRICS if name in existing][:2] or existing[:1]


def read_curve(client: Any, run_id: str, metric: str) -> Curve:
    """Return a metric of a run; if a step was trained twice, its later value."""
    points = client.get_metric_history(run_id, metric)
    latest = {p.step: p.value for p in sorted(points, key=lambda p: (p.step, p.timestamp))}
    values = np.array(list(latest.values()), dtype=np.float64)
    # databases store infinity as the largest number
    values[np.abs(values) >= _LARGEST_FLOAT] *= np.inf
    return Curve(np.array(list(latest), dtype=np.int64), values)


def read_batches(client: Any, run_id: str) -> NDArray[np.uint32] | None:
    """Return the CRC-32 of each step's batch, 0 if it was not trained; None if not recorded."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            raw = Path(client.download_artifacts(run_id, BATCHES_ARTIFACT, folder)).read_bytes()
        except (MlflowException, OSError):
            return None
    return np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<u4").astype(np.uint32)


def first_difference(
    first: NDArray[np.uint32], second: NDArray[np.uint32]
) -> tuple[int | None, int]:
    """Return the first step with different batches, or None, and the number of common steps.

    The arguments are from `read_batches`; a common step is one that both runs have trained.
    """
    count = min(len(first), len(second))
    trained = (first[:count] != 0) & (second[:count] != 0)
    differ = np.flatnonzero(trained & (first[:count] != second[:count]))
    return (int(differ[0]) if len(differ) else None), int(trained.sum())
