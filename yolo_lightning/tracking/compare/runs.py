"""What a tracking store holds of runs: parameters, curves, and the batches that they read."""

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
from yolo_lightning.tracking.store import masked

BATCHES = "batches/steps.crc32"
KNOWN = (
    "val/AP50", "val/AP", "val/top1", "val/top5", "test/AP50", "test/AP", "test/top1", "train/loss",
)  # fmt: skip
"""Metrics that are shown unless others are asked for: the first two of them that a run has."""
_PAGE, _MIN_ID, _MAX_LISTED = 200, 6, 20
_MAX = float(np.finfo(np.float64).max)
_PARENT = "mlflow.parentRunId"


@dataclass
class Curve:
    """The values of a metric.

    Attributes:
        steps: int64 (P,), ascending, each once.
        values: float64 (P,), of which some may be NaN or infinite.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @property
    def last(self) -> float:
        """The value at the last step."""
        return float(self.values[-1])

    def best(self, *, lowest: bool) -> tuple[int, float] | None:
        """Return step and value of the best finite value, the first of equals; None without one."""
        finite = np.isfinite(self.values)
        if not finite.any():
            return None
        worst = np.inf if lowest else -np.inf
        values = np.where(finite, self.values, worst)
        place = int(values.argmin() if lowest else values.argmax())
        return int(self.steps[place]), float(values[place])


@dataclass
class TrackedRun:
    """One run of a store.

    Attributes:
        run_id: of MLflow.
        name: of the run, not always the only one of it.
        experiment: its name.
        status: `finished`, `running`, `failed` or `killed`.
        parent: id of the run that this one is a trial of.
        last_step: the largest that a metric was logged at; those of the machine do not count.
        params: by name.
        tags: by name.
        metrics: names of those that it has.
        curves: those that were read, by metric.
    """

    run_id: str
    name: str
    experiment: str
    status: str
    parent: str | None
    last_step: int
    params: dict[str, str]
    tags: dict[str, str]
    metrics: set[str]
    curves: dict[str, Curve] = field(default_factory=dict)

    def of(self, name: str) -> str | None:
        """Return a tag or a parameter, or the name of the experiment."""
        return {"experiment": self.experiment, **self.params, **self.tags}.get(name)


@contextlib.contextmanager
def reading(uri: str) -> Iterator[Any]:
    """Give MLflow's client of a store.

    Raises:
        InputError: the store fails in what is asked of it, in one line.
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
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{masked(uri)}: {masked(said[0])}") from None


def experiments(client: Any, wanted: Sequence[str]) -> dict[str, str]:
    """Return the names of experiments by id: the wanted ones, else all.

    Raises:
        InputError: no experiment of a wanted name.
    """
    found: dict[str, str] = {}
    token = None
    while token != "":
        page = client.search_experiments(max_results=_PAGE, page_token=token)
        found |= {one.experiment_id: one.name for one in page}
        token = page.token or ""
    for name in wanted:
        if name not in found.values():
            hint = nearest(name, found.values()) or f"there are: {', '.join(found.values())}"
            raise InputError(f"--experiment {name!r}: no such experiment; {hint}")
    return {key: name for key, name in found.items() if not wanted or name in wanted}


def runs_of(client: Any, names: dict[str, str]) -> Iterator[TrackedRun]:
    """Yield the runs of experiments, the newest first, without those that are deleted.

    Args:
        client: of MLflow.
        names: of the experiments, by id.
    """
    token = None
    while token != "":
        page = client.search_runs(
            list(names), max_results=_PAGE, page_token=token,
            order_by=["attributes.start_time DESC"],
        )  # fmt: skip
        yield from (_tracked(run, names) for run in page)
        token = page.token or ""


def _tracked(run: Any, names: dict[str, str]) -> TrackedRun:
    info, data = run.info, run.data
    # the dictionary `data.metrics` has no steps
    steps = {metric.key: metric.step for metric in data.to_proto().metrics}
    counted = [step for key, step in steps.items() if not key.startswith("system/")]
    return TrackedRun(
        run_id=info.run_id,
        name=info.run_name or info.run_id[:8],
        experiment=names[info.experiment_id],
        status=info.status.lower(),
        parent=data.tags.get(_PARENT),
        last_step=max(counted, default=0),
        params=dict(data.params),
        tags=dict(data.tags),
        metrics=set(steps),
    )


def named(runs: Iterable[TrackedRun], words: Sequence[str]) -> list[TrackedRun]:
    """Return the runs that words name, in their order; a parent without figures is its trials.

    Args:
        runs: to choose from.
        words: names, ids, or beginnings of ids.

    Raises:
        InputError: a word that names none.
    """
    listed = list(runs)
    chosen: dict[str, TrackedRun] = {}
    for word in words:
        found = [run for run in listed if word in (run.name, run.run_id)] or [
            run for run in listed if len(word) >= _MIN_ID and run.run_id.startswith(word)
        ]
        if not found:
            hint = nearest(word, [run.name for run in listed]) or "--max-runs lists the newest"
            raise InputError(f"--run {word!r}: no such run; {hint}")
        for run in found:
            trials = [] if run.metrics else [one for one in listed if one.parent == run.run_id]
            chosen |= {one.run_id: one for one in trials[::-1] or [run]}
    return list(chosen.values())


def metrics_of(runs: Sequence[TrackedRun], wanted: Sequence[str]) -> list[str]:
    """Return the metrics to show: the wanted ones, else the first two of `KNOWN` that a run has.

    Raises:
        InputError: a wanted one that no run has.
    """
    found = set().union(*(run.metrics for run in runs))
    present = sorted(found, key=lambda name: (name.startswith("system/"), name))
    for name in wanted:
        if name not in present:
            hint = nearest(name, present) or f"there are: {', '.join(present[:_MAX_LISTED])} …"
            raise InputError(f"--metric {name!r}: none of these runs has it; {hint}")
    if wanted:
        return list(dict.fromkeys(wanted))
    return [name for name in KNOWN if name in present][:2] or present[:1]


def read_curve(client: Any, run_id: str, metric: str) -> Curve:
    """Return a metric of a run; where a step was trained twice, its later value counts."""
    points = client.get_metric_history(run_id, metric)
    newest = {p.step: p.value for p in sorted(points, key=lambda p: (p.step, p.timestamp))}
    values = np.array(list(newest.values()), dtype=np.float64)
    # databases hold infinity as the largest number
    values[np.abs(values) >= _MAX] *= np.inf
    return Curve(np.array(list(newest), dtype=np.int64), values)


def read_batches(client: Any, run_id: str) -> NDArray[np.uint32] | None:
    """Return the CRC-32 of what each step read, 0 where none was trained; None: not recorded."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            raw = Path(client.download_artifacts(run_id, BATCHES, folder)).read_bytes()
        except (MlflowException, OSError):
            return None
    return np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<u4").astype(np.uint32)


def first_difference(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> tuple[int | None, int]:
    """Return the first step at which two runs read different batches, and how many steps both have.

    Args:
        one: uint32 (N,), the CRC-32 of what each step read, 0 where none was trained.
        other: uint32 (M,), of the other run.

    Returns:
        None in place of the step where all steps that both trained are the same.
    """
    count = min(len(one), len(other))
    both = (one[:count] != 0) & (other[:count] != 0)
    differ = np.flatnonzero(both & (one[:count] != other[:count]))
    return (int(differ[0]) if len(differ) else None), int(both.sum())
