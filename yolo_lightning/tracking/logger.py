"""Experiment tracking: one training is one MLflow run, and nothing of it is lost."""

import math
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from mlflow.tracking import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from yolo_lightning.errors import InputError
from yolo_lightning.tracking.journal import FOLDER, Journal
from yolo_lightning.tracking.names import EXPERIMENT, KEY, PARAM, RUN, TAG, Names, clean, flattened
from yolo_lightning.tracking.shipper import Shipper
from yolo_lightning.tracking.shipping import ShippingThread
from yolo_lightning.tracking.store import LazyClient, absolute, public, without_password
from yolo_lightning.tracking.system_metrics import SystemMetrics

DEFAULT_STORE = "sqlite:///mlflow.db"

_CHANGED = "changed."
_LENGTHS = {"trainer.max_steps", "trainer.max_epochs", "trainer.max_time"}
"""Parameters that only say how long the same training goes on."""
_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}
_HURRIED_S = 12.0
"""How long a training that was told to stop waits for the store."""

_ENVIRONMENT = {
    # the journal waits, so a request need not: MLflow's own would hold on for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class RunLogger(MLFlowLogger):
    """Lightning's MLflow logger with a journal between the training and the store.

    What is logged is on this machine's disk when a method returns; a thread brings it into the
    store. A store that fails, hangs, or refuses costs the training nothing and the run nothing:
    what it did not take follows when it answers, when training is resumed, or by `yolo-lightning
    mlflow sync`. Rank 0 alone logs.

    Args:
        experiment_name: under which runs are listed together.
        tracking_uri: the environment's ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in
            the working folder.
        run_name: of the run; the command line suggests the names of its last two folders.
        run_id: the run to go on with; else the environment's ``MLFLOW_RUN_ID``, the one that the
            run's folder names, the one that the checkpoint names, or a new one.
        tags: of the run.
        parent: of a sweep: the run of that name holds this one as its child, and is opened where
            there is none.
        log_checkpoints: keep the checkpoints that `ModelCheckpoint` keeps in the run too.
        system_metrics: log the use of processors, memory, disk, network and GPUs.
        folder: of the run, where the journal lies; the command line gives its own.

    Raises:
        InputError: an experiment's name that MLflow does not take.

    Deviation from Lightning's: nothing asks the store while training waits. So `run_id` is None
    until it has answered, `version` is a name of the run that holds from the beginning, and the
    default store is a database, since MLflow 3.17 refuses folders.
    """

    def __init__(
        self,
        experiment_name: str = "yolo-lightning",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
        tags: dict[str, Any] | None = None,
        parent: str | None = None,
        log_checkpoints: bool = True,
        system_metrics: bool = True,
        folder: str | None = None,
    ) -> None:
        super(MLFlowLogger, self).__init__()  # its own asks the store at once
        prepare_environment()
        if not 0 < len(experiment_name) <= EXPERIMENT:
            held = f"{len(experiment_name):,} characters"
            raise InputError(f"experiment_name has {held}; allowed: 1 to {EXPERIMENT}")
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
        self.store, uri = public(uri), absolute(uri)
        self._tracking_uri, self._experiment_name, self._run_name = uri, experiment_name, run_name
        self.tags, self._parent, self._prefix = tags, parent, ""
        self._log_checkpoints, self._wants_system = log_checkpoints, system_metrics
        self._wanted = [run_id, os.environ.get("MLFLOW_RUN_ID")]
        self._held: str | None = None
        self._joins, self._running, self._ending = False, False, ""
        self._at: int | None = None
        self._differs = False
        self._there: set[tuple[str, str]] | None = None
        self._folder = Path(folder) if folder else None
        self._journal: Journal | None = None
        self._shipper: Shipper | None = None
        self._thread: ShippingThread | None = None
        self._system: SystemMetrics | None = None
        self._client = LazyClient(self._tracking_uri)
        self._names = Names()
        self._warned: set[str] = set()
        self._params: dict[str, str] = {}
        self._kept: dict[str, dict[str, int]] = {}
        self._last: dict[str, tuple[int, float]] = {}
        self._ahead: set[tuple[str, int]] = set()
        self._samples = 0

    # --- where the run is

    def place(
        self, folder: Path, name: str, held: str | None = None, joins_at: int | None = None
    ) -> None:
        """Say where the run lies, before anything is logged.

        Args:
            folder: of the run.
            name: of the run, unless the recipe gives one.
            held: the MLflow run that the checkpoint names.
            joins_at: only add to a run, as measuring a checkpoint of that step does: none is
                opened, its status stays, and points belong to that step.
        """
        self._folder = self._folder or folder
        self._run_name = self._run_name or name
        self._held, self._joins, self._at = held, joins_at is not None, joins_at

    @property
    def journal(self) -> Journal:
        """The journal; opened on first use."""
        journal = self._open_journal()
        if self._thread is None:
            self._shipper = Shipper(journal, self._tracking_uri, self._joins)
            self._thread = ShippingThread(self._shipper)
        return journal

    def _open_journal(self) -> Journal:
        if self._journal is None:
            name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{uuid.uuid4().hex[:6]}"
            folder = self._folder or Path("outputs") / "tracked" / name
            self._journal = Journal(folder / FOLDER)
            self._recall(self._journal)
            if not (self._joins and self._journal.end):
                self._open(self._journal)
        return self._journal

    def _open(self, journal: Journal) -> None:
        fresh = not journal.end
        journal.append(
            {
                "op": "open", "t": _now(), "store": without_password(self._tracking_uri),
                "experiment": clean(self._experiment_name),
                "name": clean(self._run_name or "run")[:RUN],
                "wanted": self._wanted, "held": self._held,
                "parent": self._parent, "joins": self._joins,
            }
        )  # fmt: skip
        if self.tags:
            self.set_tags(self.tags)
        if not self._joins:
            self._say_running()
            if fresh:  # else `begin` knows how many measurements there are already
                self._measure()

    def _say_running(self) -> None:
        self._append({"op": "status", "t": _now(), "status": "RUNNING"})
        self._running, self._ending = True, ""

    def _measure(self) -> None:
        if self._wants_system and self._system is None:
            self._system = SystemMetrics(self._record_system)

    def _recall(self, journal: Journal) -> None:
        """Read what earlier processes of this run logged once and for all."""
        kinds = ("params", "tags", "name", "file", "remove")
        for entry, _ in journal.entries(0, *kinds):
            if entry["op"] == "params":
                self._params |= entry["values"]
            elif entry["op"] == "tags":
                self._params |= _changed(entry["values"])
            elif entry["op"] == "name":
                self._names.recall(entry["name"], entry["key"])
            elif entry["op"] == "remove":
                for kept in self._kept.values():
                    kept.pop(Path(entry["path"]).name, None)
            elif "of" in entry:
                kept = self._kept.setdefault(str(entry["of"]), {})
                kept[Path(entry["file"]).name] = int(entry.get("at") or 0)

    @property
    def run_id(self) -> str | None:
        """The MLflow run, None while the store has not named it."""
        if self._shipper is not None and self._shipper.run_id:
            return self._shipper.run_id
        if self._journal is None:
            return None
        noted = self._journal.shipped.get(without_password(self._tracking_uri), {})
        return noted.get("run_id")

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._experiment_name

    @property
    def version(self) -> str:
        """A name of this run that holds before the store knows of it."""
        return f"run-{self.journal.token[:8]}" if getattr(rank_zero_only, "rank", 0) == 0 else "run"

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """A client of the store, for what this logger has no method for; on rank 0 alone.

        Its calls wait for the store and raise where it fails; see `run_id`.
        """
        return cast(MlflowClient, self._client)

    # --- what is logged

    @rank_zero_only
    def begin(self, step: int = 0, repeats: bool = True) -> None:
        """Say from which step on training runs.

        Args:
            step: the steps trained so far.
            repeats: training comes back to steps that an earlier process did in the same way, as
                after a kill: what that one logged of them is not logged again. Else, as from an
                older checkpoint or with other parameters, both stand in the run.
        """
        self._open_journal()
        if not self._running:
            self._say_running()
        self._ahead = set()
        for entry, _ in self.journal.entries(0, "metrics", "picture"):
            if entry.get("system"):
                self._samples = entry["step"] + 1
            elif entry["step"] >= step - 1 and not entry.get("again"):
                keys = entry.get("values") or [f"pictures/{entry['key']}"]
                self._ahead |= {(key, entry["step"]) for key in keys}
        last = max((at for _, at in self._ahead), default=0)
        if not (repeats and not self._differs):
            self._ahead = set()
            if last >= step:
                self._warn(
                    f"steps {step} to {last} are trained again, otherwise than before: the run "
                    "holds the points of both, the later ones by their times"
                )
        self._measure()

    def _record_system(self, values: Mapping[str, float]) -> None:
        entry = {"op": "metrics", "t": _now(), "step": self._samples, "values": dict(values)}
        self._append(entry | {"system": True})
        self._samples += 1

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log points; the same one twice, as Lightning logs the epoch, is one."""
        step = int(step or 0) if self._at is None else self._at
        values: dict[str, float] = {}
        for name, value in metrics.items():
            number = _number(value)
            if number is None:
                self._warn(f"metric {name} is no number, and is left out", f"{value!r}"[:100])
                continue
            key, again = self._named(name), self._last.get(name)
            if (key, step) in self._ahead or again is not None and _same(again, (step, number)):
                continue
            if self._joins and (name == "epoch" or (key, repr(number)) in self._points_there()):
                continue
            if not math.isfinite(number):
                shown = "NaN" if math.isnan(number) else f"{'-' if number < 0 else '+'}1.8e308"
                self._warn(
                    f"metric {name} is not finite",
                    f"{number} at step {step}",
                    f"MLflow shows {shown}",
                )
            self._last[name] = (step, number)
            values[key] = number
        if values:
            entry: dict[str, Any] = {"op": "metrics", "t": _now(), "step": step, "values": values}
            self._append(entry | ({"again": True} if self._joins else {}))

    def _points_there(self) -> set[tuple[str, str]]:
        """Return what the run holds of the step that figures join."""
        if self._there is None:
            self._there = {
                (key, repr(float(value)))  # NaN is equal to itself that way
                for entry, _ in self.journal.entries(0, "metrics")
                if entry["step"] == self._at and not entry.get("system")
                for key, value in entry["values"].items()
            }
        return self._there

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log parameters once; one that differs later, as a resumed run's may, becomes a tag."""
        named = flattened(params if isinstance(params, Mapping) else vars(params))
        flat = {
            self._named(name): self._cut(without_password(value), PARAM, name)
            for name, value in named.items()
        }
        fresh = {key: value for key, value in flat.items() if key not in self._params}
        changed = {
            key: value for key, value in flat.items() if self._params.get(key, value) != value
        }
        if fresh:
            self._append({"op": "params", "t": _now(), "values": fresh})
        if changed:
            self.set_tags({f"{_CHANGED}{key}": value for key, value in changed.items()})
        self._differs |= bool(changed.keys() - _LENGTHS)
        self._params |= flat

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; a later value replaces an earlier one."""
        values = {self._named(str(k)): self._cut(str(v), TAG, str(k)) for k, v in tags.items()}
        self._append({"op": "tags", "t": _now(), "values": values})

    @rank_zero_only
    def log_datasets(self, datasets: list[dict[str, Any]]) -> None:
        """Log datasets as inputs of the run: ``use`` and MLflow's own ``dataset`` fields each."""
        self._append({"op": "inputs", "t": _now(), "datasets": datasets})

    @rank_zero_only
    def log_file(self, path: str | Path, folder: str) -> None:
        """Log a file as it is now; a later one of the same name replaces it."""
        self._log_file(Path(path), folder, {})

    @rank_zero_only
    def log_folder(self, path: str | Path, folder: str) -> None:
        """Log all files in a folder and below."""
        if not Path(path).is_dir():
            self._warn(f"{path} is not kept for MLflow: no such folder")
        for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
            within = file.parent.relative_to(path).as_posix()
            self._log_file(file, folder if within == "." else f"{folder}/{within}", {})

    def _log_file(self, path: Path, folder: str, more: dict[str, Any]) -> None:
        name = f"{folder}/{path.name}"
        replaced = self.journal.pending(name).exists()
        try:
            self.journal.keep(path, name, link="of" in more)
        except OSError as error:
            self._warn(f"{path} is not kept for MLflow: {error.strerror or error}")
            return
        entry = {"op": "file", "t": _now(), "file": name, "folder": folder, "replaced": replaced}
        run_folder = self.journal.folder.parent.absolute()
        if path.absolute().is_relative_to(run_folder):
            entry["source"] = str(path.absolute().relative_to(run_folder))
        self._append(entry | more)

    @rank_zero_only
    def log_picture(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Log a picture of a series, which the run's page shows over its steps.

        Args:
            name: of the series.
            image: uint8 (H, W, 3), RGB.
            step: of the training.
        """
        key = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", name)
        if (f"pictures/{key}", step) in self._ahead:
            return
        file = f"pictures/{zlib.crc32(key.encode()):08x}-{step}.png"
        path = self.journal.pending(file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        except OSError as error:
            self._warn(f"picture {name} is not kept for MLflow: {error.strerror or error}")
            return
        self._append({"op": "picture", "t": _now(), "file": file, "key": key, "step": step})

    @rank_zero_only
    def log_model(
        self, folder: str | Path, name: str, step: int, registered_name: str | None = None
    ) -> None:
        """Log an MLflow model, a folder that `mlflow_model.save_model` made; it is taken away."""
        file = f"models/{name}-{step}"
        path = self.journal.pending(file)
        try:
            shutil.rmtree(path, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, path)
        except OSError as error:
            self._warn(f"model {folder} is not kept for MLflow: {error.strerror or error}")
            return
        entry = {"op": "model", "t": _now(), "file": file, "name": name, "step": step}
        self._append(entry | {"registered": registered_name})

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Let the run hold the checkpoints that the callback keeps, and no superseded one."""
        if not self._log_checkpoints:
            return
        self._open_journal()
        of = str(checkpoint_callback.state_key)
        kept = self._kept.setdefault(of, {})
        paths = {*checkpoint_callback.best_k_models, checkpoint_callback.best_model_path}
        there = {Path(path).name: Path(path) for path in paths if path and Path(path).is_file()}
        for name in kept.keys() - there.keys():
            del kept[name]
            self._append({"op": "remove", "t": _now(), "path": f"checkpoints/{name}"})
            self.journal.release(f"checkpoints/{name}")  # a long outage would fill the disk
        for name, path in there.items():
            at = path.stat().st_mtime_ns
            if kept.get(name) != at:
                kept[name] = at
                self._log_file(path, "checkpoints", {"of": of, "at": at})

    # --- the end

    @rank_zero_only
    def ends_as(self, status: str) -> None:
        """Say how the training ends, where Lightning only knows that it fails.

        Args:
            status: ``KILLED``, or ``RUNNING`` where it goes on in another process.
        """
        self._ending = status

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write the status, and wait for the store as long as it takes what is left."""
        if self._journal is None or self._joins:
            return  # who measures has more to log, and closes
        if self._running:
            self._running = False
            said = self._ending or _STATUS.get(status, "FAILED")
            if self._system is not None:
                self._system.stop()
                self._system = None
            self._append({"op": "status", "t": _now(), "status": said})
        self.close(_HURRIED_S if self._ending else None)

    @rank_zero_only
    def close(self, patience_s: float | None = None) -> None:
        """Ship what is left; say what stays behind where the store does not take it.

        Args:
            patience_s: wait no longer than that for a store that takes entries.
        """
        if self._thread is None or self._journal is None:
            return
        if not self._thread.finish(patience_s):
            folder = self._journal.folder.parent
            self._warn(
                f"not all of this run is in MLflow at {self.store}; the rest is in "
                f"{self._journal.folder}: yolo-lightning mlflow sync {folder}"
            )
        self._thread = self._shipper = None

    # --- names and values

    def _append(self, entry: dict[str, Any]) -> None:
        journal = self.journal
        journal.append(entry)
        if journal.problem:
            self._warn(f"MLflow's journal: {journal.problem}; its lines wait in memory")

    def _warn(self, message: str, *details: str) -> None:
        """Say something once, whatever its details."""
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(f"{message} ({'; '.join(details)})" if details else message)

    def _named(self, name: str) -> str:
        """Return a name that MLflow takes, remembered by the journal where it is another one."""
        self._open_journal()
        key = self._names.key(name)
        if key != name and f"name {name}" not in self._warned:
            self._warned.add(f"name {name}")
            self._warn(
                f"MLflow does not take the name {name[:KEY]!r} beside others: it is {key!r} there"
            )
            self._append({"op": "name", "name": name, "key": key})
        return key

    def _cut(self, text: str, longest: int, name: str) -> str:
        text = clean(text)
        if len(text) <= longest:
            return text
        self._warn(
            f"{name} is cut off for MLflow", f"{len(text):,} characters, it takes {longest:,}"
        )
        return text[: longest - 1] + "…"


def prepare_environment() -> None:
    """Have MLflow's requests give up soon, unless the environment says otherwise."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def run_loggers(trainer: pl.Trainer) -> list[RunLogger]:
    """Return the loggers of a trainer that keep a journal."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]


def _changed(tags: Mapping[str, str]) -> dict[str, str]:
    return {k.removeprefix(_CHANGED): v for k, v in tags.items() if k.startswith(_CHANGED)}


def _number(value: Any) -> float | None:
    """Return a metric's value, None where it is no number."""
    if isinstance(value, str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _same(one: tuple[int, float], other: tuple[int, float]) -> bool:
    equal = one[1] == other[1] or (math.isnan(one[1]) and math.isnan(other[1]))
    return one[0] == other[0] and equal


def _now() -> int:
    return int(time.time() * 1000)
