"""`RunLogger`: one MLflow run per training, without lost or duplicate points."""

import contextlib
import math
import os
import re
import shlex
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning.pytorch as pl
import numpy as np
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from numpy.typing import NDArray
from PIL import Image

from yolo_lightning.errors import InputError, mask_secrets, require_name
from yolo_lightning.tracking.journal import JOURNAL_FOLDER, Journal
from yolo_lightning.tracking.names import (
    MAX_EXPERIMENT_NAME_LENGTH,
    MAX_KEY_LENGTH,
    MAX_PARAM_LENGTH,
    MAX_RUN_NAME_LENGTH,
    MAX_TAG_LENGTH,
    absolute_uri,
    flatten_params,
    own_store,
    sanitize_text,
    valid_key,
)

# MLflow takes seconds to import, and a wrong recipe should not wait for it
if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from yolo_lightning.tracking.system_metrics import SystemMetrics
    from yolo_lightning.tracking.upload_thread import UploadThread

_DURATION_PARAMS = {"trainer.max_steps", "trainer.max_epochs", "trainer.max_time"}
"""Parameters that only set how long a training lasts."""
_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}
_MAX_IMAGE_KEY_LENGTH = 100  # file names have up to 255 characters
_THUMBNAIL_PX = (256, 256)
_INTERRUPTED_TIMEOUT_S = 12.0  # how long an interrupted training waits for the store


class RunLogger(MLFlowLogger):
    """Lightning's `MLFlowLogger` with a journal on the local disk between training and store.

    A logging method returns as soon as the data is on the local disk; a thread uploads it to the
    store. If the store fails, hangs or rejects data, training goes on, and the rest is uploaded
    when the store is available again, when training is resumed, or by `yolo-lightning mlflow sync`.
    Only rank 0 logs.

    Args:
        experiment_name: MLflow experiment of the run.
        tracking_uri: of the store; default: the environment variable ``MLFLOW_TRACKING_URI``, else
            ``sqlite:///mlflow.db`` in the working folder.
        run_name: default: the last two parts of the run folder's path.
        run_id: run to continue; default: the environment variable ``MLFLOW_RUN_ID``, else the run
            named by the run folder, else by the checkpoint, else a new run.
        tags: of the run.
        parent: name of the parent run of a sweep; created if it does not exist.
        log_checkpoints: upload the best checkpoint of each `ModelCheckpoint`.
        system_metrics: log the use of CPUs, memory, disk, network and GPUs.
        flush_timeout_s: how long the end of a training waits for the upload; the rest is left to
            `yolo-lightning mlflow sync`.
        folder: run folder, which contains the journal; set by the command line.

    Raises:
        InputError: MLflow does not accept the experiment name.

    Deviation from Lightning's logger: training never waits for the store, so `run_id` is None until
    the run exists there. The default store is a database: MLflow 3.17 does not accept folders.
    """

    def __init__(
        self,
        experiment_name: str = "yolo-lightning",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
        tags: dict[str, str | int | float | bool] | None = None,
        parent: str | None = None,
        log_checkpoints: bool = True,
        system_metrics: bool = True,
        flush_timeout_s: float = 60.0,
        folder: str | None = None,
    ) -> None:
        super(MLFlowLogger, self).__init__()  # MLFlowLogger's own would connect to the store
        if not 0 < len(experiment_name) <= MAX_EXPERIMENT_NAME_LENGTH:
            raise InputError(
                f"experiment_name has {len(experiment_name):,} characters; "
                f"allowed: 1 to {MAX_EXPERIMENT_NAME_LENGTH}"
            )
        require_name(experiment_name, "experiment_name")
        self._tracking_uri = absolute_uri(tracking_uri) if tracking_uri else own_store()
        self.store = mask_secrets(self._tracking_uri)
        self._experiment_name, self._run_name = experiment_name, run_name
        self.tags, self._parent, self._prefix = tags, parent, ""
        self._log_checkpoints, self._log_system_metrics = log_checkpoints, system_metrics
        self._flush_timeout_s = flush_timeout_s
        self._requested_run_ids = [run_id, os.environ.get("MLFLOW_RUN_ID")]
        self._checkpoint_run_id: str | None = None
        self._running, self._has_images, self._final_status = False, False, ""
        self._evaluated_step: int | None = None
        self._params_changed = False
        self._folder = Path(folder) if folder else None
        self._journal: Journal | None = None
        self._thread: UploadThread | None = None
        self._system_metrics: SystemMetrics | None = None
        self._warned: set[str] = set()
        self._params: dict[str, str] = {}
        self._checkpoints: dict[str, int] = {}  # when each was modified
        self._last_points: dict[str, tuple[int, str]] = {}  # values as text: NaN equals NaN
        # points that an earlier process of this run has logged: key and step, with the value if
        # a checkpoint is only evaluated
        self._logged: set[tuple[str, int] | tuple[str, int, str]] = set()
        self._system_step = 0

    # --- the run and its journal

    def configure_run(
        self,
        folder: Path,
        name: str,
        checkpoint_run_id: str | None = None,
        evaluated_step: int | None = None,
    ) -> None:
        """Set the run's folder and name, unless the recipe does; call it before anything is logged.

        `evaluated_step` is the step of a checkpoint that is only evaluated. Its metrics are added
        to the existing run at this step; no run is created, and the status is not changed.
        """
        self._folder = self._folder or folder
        self._run_name = self._run_name or name
        self._checkpoint_run_id, self._evaluated_step = checkpoint_run_id, evaluated_step

    @property
    def _evaluates(self) -> bool:
        return self._evaluated_step is not None

    @property
    def journal(self) -> Journal:
        """The journal; opened on first access, which also starts the upload thread."""
        journal = self._open_journal()
        if self._thread is None:
            from yolo_lightning.tracking.upload_thread import UploadThread
            from yolo_lightning.tracking.uploader import Uploader

            uploader = Uploader(journal, self._tracking_uri, self._evaluates)
            self._thread = UploadThread(uploader)
        return journal

    def _open_journal(self) -> Journal:
        if self._journal is None:
            name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{uuid.uuid4().hex[:6]}"
            folder = self._folder or Path("outputs") / "tracked" / name
            self._journal = Journal(folder / JOURNAL_FOLDER)
            self._restore_state(self._journal)
            if not (self._evaluates and self._journal.end):
                self._append_open_entry()
        return self._journal

    def _append_open_entry(self) -> None:
        self._append(
            "open",
            store=self.store,
            experiment=sanitize_text(self._experiment_name),
            name=sanitize_text(self._run_name or "run")[:MAX_RUN_NAME_LENGTH],
            run_ids=self._requested_run_ids,
            checkpoint_run_id=self._checkpoint_run_id,
            parent=self._parent,
            existing_run_only=self._evaluates,
        )
        if self.tags:
            self.set_tags(self.tags)
        if not self._evaluates:
            self._set_running()

    def _set_running(self) -> None:
        self._append("status", status="RUNNING")
        self._running, self._final_status = True, ""
        if self._log_system_metrics and self._system_metrics is None:
            from yolo_lightning.tracking.system_metrics import SystemMetrics

            self._system_metrics = SystemMetrics(self._record_system)

    def _restore_state(self, journal: Journal) -> None:
        """Read the parameters and the evaluation that earlier processes of this run logged."""
        for entry in journal.state("params"):
            self._params |= entry["values"]
        if self._evaluated_step is not None:
            step = self._evaluated_step
            self._logged = {
                (key, step, repr(float(value)))
                for entry in journal.points(step, step)
                if entry["step"] == step and not entry.get("system")
                for key, value in entry.get("values", {}).items()
            }

    @property
    def run_id(self) -> str | None:
        """The MLflow run id; None until the run exists in the store."""
        if self._journal is None:
            return None
        upload = self._journal.uploads.get(self.store, {})
        return upload.get("run_id")

    @property
    def name(self) -> str:
        """The experiment name."""
        return self._experiment_name

    @property
    def version(self) -> str:
        """An id of this run that is known before the run exists in the store."""
        return f"run-{self.journal.token[:8]}" if getattr(rank_zero_only, "rank", 0) == 0 else "run"

    @property
    @rank_zero_experiment
    def experiment(self) -> "MlflowClient":
        """An MLflow client, on rank 0; its calls wait for the store and raise if it fails."""
        from yolo_lightning.tracking.store import LazyClient

        return cast("MlflowClient", LazyClient(self._tracking_uri))

    # --- logging

    @rank_zero_only
    def start_training(self, step: int = 0, replay: bool = True) -> None:
        """Set the step at which training starts or resumes.

        With `replay`, steps that a killed process has already logged are not logged again.
        """
        journal = self._open_journal()
        if not self._running:
            self._set_running()
        points = {
            (key, entry["step"])
            for entry in journal.points(step - 1)
            if entry["step"] >= step - 1 and not (entry.get("system") or entry.get("evaluation"))
            for key in (entry["values"] if entry["op"] == "metrics" else [_image_key(entry["key"])])
        }
        last = max((logged for _, logged in points), default=-1)
        is_repeated = replay and not self._params_changed
        self._logged = {*points} if is_repeated else set()
        if last >= step and not is_repeated:
            self._warn(
                f"steps {step} to {last} are trained again with a different result: the run "
                "keeps the points of both, the later ones have later timestamps"
            )

    def _record_system(self, values: Mapping[str, float]) -> None:
        self._system_step = max(int(time.time()), self._system_step + 1)
        self._append("metrics", step=self._system_step, values=dict(values), system=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics; identical points, which Lightning logs at epoch ends, are logged once."""
        self._open_journal()
        step = int(step or 0) if self._evaluated_step is None else self._evaluated_step
        values: dict[str, float] = {}
        for name, value in metrics.items():
            number = _to_float(value)
            if number is None:
                self._warn(f"metric {name} is not a number and is ignored", f"{value!r}"[:100])
                continue
            key, point = self._key(name), (step, repr(number))
            if (
                {(key, step), (key, *point)} & self._logged
                or self._last_points.get(key) == point
                or (self._evaluates and name == "epoch")
            ):
                continue
            if math.isinf(number):  # NaN is usual, such as the accuracy of no predictions
                shown = f"{'-' if number < 0 else '+'}1.8e308"
                self._warn(f"metric {name} is infinite", f"at step {step}", f"MLflow shows {shown}")
            self._last_points[key] = point
            values[key] = number
        if values:
            extra = {"evaluation": True} if self._evaluates else {}
            self._append("metrics", step=step, values=values, **extra)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log parameters once; MLflow keeps the first value if one changes on resume."""
        self._open_journal()  # reads those of earlier processes
        flat = {
            self._key(name): self._truncate(mask_secrets(value), MAX_PARAM_LENGTH, name)
            for name, value in flatten_params(
                params if isinstance(params, Mapping) else vars(params)
            ).items()
        }
        new = {key: value for key, value in flat.items() if self._params.get(key) != value}
        changed = new.keys() & self._params.keys() - _DURATION_PARAMS
        if new:
            self._append("params", values=new)
        self._params_changed |= bool(changed)
        self._params |= new

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run; a later value replaces an earlier one."""
        values = {
            self._key(str(name)): self._truncate(str(value), MAX_TAG_LENGTH, str(name))
            for name, value in tags.items()
        }
        self._append("tags", values=values)

    @rank_zero_only
    def log_inputs(self, datasets: list[dict[str, Any]]) -> None:
        """Log datasets: ``use``, the context, and ``dataset``, the fields of MLflow's entity."""
        self._append("inputs", datasets=datasets)

    @rank_zero_only
    def log_artifact(self, path: str | Path, folder: str) -> None:
        """Log the current content of a file; a later file of the same name replaces it."""
        self._log_file(Path(path), folder)

    @rank_zero_only
    def log_artifacts(self, path: str | Path, folder: str) -> None:
        """Log all files in a folder and its subfolders."""
        if not Path(path).is_dir():
            self._warn(f"{path} cannot be logged to MLflow: no such folder")
        for file in sorted(file for file in Path(path).rglob("*") if file.is_file()):
            subfolder = file.parent.relative_to(path).as_posix()
            self._log_file(file, folder if subfolder == "." else f"{folder}/{subfolder}")

    def _log_file(
        self, path: Path, folder: str, name: str = "", is_checkpoint: bool = False
    ) -> None:
        file, run_folder = f"{folder}/{name or path.name}", self.journal.folder.parent.absolute()
        is_own = path.absolute().is_relative_to(run_folder)
        source = str(path.absolute().relative_to(run_folder)) if is_own else ""
        with self._warn_on_error(path):
            replaced = self.journal.pending_path(file).exists()
            self.journal.add_file(path, file, link=is_checkpoint)
            self._append(
                "file", file=file, folder=folder, replaced=replaced, source=source,
                is_checkpoint=is_checkpoint,
            )  # fmt: skip

    @rank_zero_only
    def log_image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Log an image, uint8 (H, W, 3), RGB; MLflow shows the images of a name over steps."""
        key = re.sub(r"[^a-zA-Z0-9_\-./ ]", "_", name)
        if (_image_key(key), step) in self._logged:
            return
        # the names that MLflow's page of images parses; a file uploaded twice is one file
        page_key = key.replace("/", "~")[:_MAX_IMAGE_KEY_LENGTH]
        stem = f"{page_key}+step+{step}+timestamp+{int(time.time() * 1000)}+{uuid.uuid4()}"
        picture = Image.fromarray(image)
        with self._warn_on_error(f"image {name}"):
            for suffix in (".png", "+compressed.webp"):
                path = self.journal.pending_path(f"images/{stem}{suffix}")
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
                self._append("image", file=f"images/{path.name}", key=key, step=step)
                picture.thumbnail(_THUMBNAIL_PX)
        if not self._has_images:
            self._has_images = True
            self.set_tags({"mlflow.loggedImages": "True"})

    @rank_zero_only
    def log_model(
        self, folder: str | Path, name: str, step: int, registered_name: str | None = None
    ) -> None:
        """Log an MLflow model that `mlflow_model.save_model` wrote; its folder is moved away."""
        file = f"models/{name}-{step}"
        with self._warn_on_error(f"model {folder}"):
            path = self.journal.pending_path(file)
            shutil.rmtree(path, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, path)
            self._append("model", file=file, name=name, step=step, registered=registered_name)

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Log the best checkpoint of a callback in place of the one before."""
        path = Path(checkpoint_callback.best_model_path)
        if not self._log_checkpoints or not path.is_file():
            return
        is_fixed = "{" not in (checkpoint_callback.filename or "{")
        name = path.name if is_fixed else f"best-{checkpoint_callback.monitor}.ckpt"
        name, version = name.replace("/", "-"), path.stat().st_mtime_ns
        if self._checkpoints.get(name) != version:
            self._checkpoints[name] = version
            # linked at once: the callback may remove it before it is uploaded
            self._log_file(path, "checkpoints", name, is_checkpoint=True)

    # --- the end

    @rank_zero_only
    def set_final_status(self, status: str) -> None:
        """Set the status that `finalize` writes: ``KILLED``, or ``RUNNING`` if requeued.

        If it is empty, `finalize` writes Lightning's status.
        """
        self._final_status = status

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Write the final status and wait for the upload while the store accepts data."""
        if self._journal is None or self._evaluates:
            return  # an evaluation logs more after this, and calls `close`
        if self._running:
            self._running = False
            final = self._final_status or _STATUS.get(status, "FAILED")
            if self._system_metrics is not None:
                self._system_metrics.stop()
                self._system_metrics = None
            self._append("status", status=final)
        self.close(_INTERRUPTED_TIMEOUT_S if self._final_status else None)

    @rank_zero_only
    def close(self, timeout_s: float | None = None) -> None:
        """Upload the rest, for at most `timeout_s`, by default `flush_timeout_s`.

        Warns if the upload is not complete, with the command that completes it.
        """
        if self._thread is None or self._journal is None:
            return
        thread, self._thread = self._thread, None  # if Ctrl-C ends the wait, it is not repeated
        complete = False
        try:
            complete = thread.finish(self._flush_timeout_s if timeout_s is None else timeout_s)
        finally:
            if not complete:
                folder = shlex.quote(str(self._journal.folder.parent))
                is_own = self.store == mask_secrets(own_store())
                store = "" if is_own else f" --store {shlex.quote(self.store)}"
                self._warn(
                    f"upload to MLflow at {self.store} is not complete; the rest is in "
                    f"{self._journal.folder}. Upload it with: "
                    f"yolo-lightning mlflow sync {folder}{store}"
                )

    # --- helpers

    def _append(self, op: str, **fields: Any) -> None:
        journal = self.journal
        journal.append({"op": op, "t": int(time.time() * 1000), **fields})
        if journal.write_error:
            self._warn(f"MLflow journal: {journal.write_error}")

    @contextlib.contextmanager
    def _warn_on_error(self, source: object) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._warn(f"{source} cannot be logged to MLflow: {error.strerror or error}")

    def _warn(self, message: str, *details: str) -> None:
        """Warn once for each message, whatever its details."""
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(f"{message} ({'; '.join(details)})" if details else message)

    def _key(self, name: str) -> str:
        key = valid_key(name)
        if key != name:
            self._warn(
                f"MLflow does not accept the name {name[:MAX_KEY_LENGTH]!r}; logged as {key!r}"
            )
        return key

    def _truncate(self, text: str, max_length: int, name: str) -> str:
        text = sanitize_text(text)
        if len(text) <= max_length:
            return text
        self._warn(
            f"{name} is truncated for MLflow",
            f"{len(text):,} characters; allowed: up to {max_length:,}",
        )
        return text[: max_length - 1] + "…"


def run_loggers(trainer: pl.Trainer) -> list[RunLogger]:
    """Return the `RunLogger` instances of a trainer."""
    return [logger for logger in trainer.loggers if isinstance(logger, RunLogger)]


def _image_key(key: str) -> str:
    return f"images/{key}"


def _to_float(value: Any) -> float | None:
    """Return a metric's value, None if it is not a number."""
    if isinstance(value, str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
