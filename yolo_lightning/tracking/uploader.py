"""Uploads a journal to an MLflow store: each entry once, also after crashes and lost responses."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from yolo_lightning.errors import mask_secrets
from yolo_lightning.tracking.artifacts import FILE_OPS, ArtifactWriter, InvalidEntry, MissingFile
from yolo_lightning.tracking.files import read_text, replace_text
from yolo_lightning.tracking.journal import RUN_ID_FILE, Journal
from yolo_lightning.tracking.names import own_store
from yolo_lightning.tracking.run_lookup import (
    INVALID_VALUE,
    NOT_FOUND,
    TOKEN_TAG,
    check_active,
    find_or_create_run,
)
from yolo_lightning.tracking.store import (
    StoreUnavailable,
    create_client,
    lock,
    short_message,
    unlock,
)

_MAX_POINTS = 1000  # in a request, MLflow's limit
_MAX_FAILED_FILES = 3  # until the next retry
_MAX_WARNINGS = 20  # a journal may come from a stranger

_Entry = dict[str, Any]


class Uploader:
    """Uploads the entries of a journal to its MLflow run, in order.

    The journal's newest ``open`` entry names the experiment and the run, but never the store, which
    would get the user's files and credentials. The run is found by its id, else by the journal's
    token, so that it is not created twice if a response is lost. A point has the time at which it
    was logged: a database does not store an identical point again.

    Args:
        journal: to upload.
        store_uri: default: `own_store`.
        existing_run_only: create no run.
    """

    RETRY_S = 60.0
    """Delay before files are tried again that the artifact store did not accept."""

    def __init__(
        self, journal: Journal, store_uri: str | None = None, existing_run_only: bool = False
    ) -> None:
        self.journal, self.store_uri, self.run_id = journal, store_uri or own_store(), ""
        self._store, self._existing_run_only = mask_secrets(self.store_uri), existing_run_only
        # files that are still to be uploaded, each with the offset after its entry
        self.pending: list[tuple[int, _Entry]] = []
        self._pending_start = self._failed_files = 0
        self._retry_at = 0.0
        self._offset = 0
        self._batches: Iterator[tuple[list[_Entry], int]] | None = None
        self._lock: int | None = None
        # the last step and value of each metric that the run had before this journal
        self._earlier: dict[str, tuple[int, float]] = {}
        self._warned: set[str] = set()
        self._warned_of_files = False

    def upload_next(self) -> bool:
        """Upload the next entries; return whether there were any.

        Raises:
            StoreUnavailable: the run is deleted, or another process is uploading.
        """
        if not self.run_id:
            if not self.journal.end:
                return False
            self._connect()
        if self.pending and time.monotonic() >= self._retry_at:
            self._upload_file()
            return True
        if self._batches is None:
            self._batches = self._read_batches()
        entries, end = next(self._batches, ([], 0))
        if not entries:
            self._batches = None  # the next one finds what is logged meanwhile
            return False
        try:
            self._upload(entries, end)
        except Exception:
            self._batches = None
            raise
        return True

    def retry_now(self) -> None:
        """Retry files without further delay."""
        self._retry_at = 0.0

    @property
    def progress(self) -> float:
        """Share of the journal that is uploaded, 0 to 1."""
        return self._offset / max(self.journal.end, 1)

    def close(self) -> None:
        """Release the lock of the journal."""
        if self._lock is not None:
            unlock(self._lock)
        self._lock, self.run_id = None, ""

    # --- the run

    def _connect(self) -> None:
        """Find or create the run, and restore the state after the last recorded upload to it."""
        if self._lock is None:
            with contextlib.suppress(OSError):  # a full disk
                self._lock = lock(self.journal.folder / "lock")
        all_opened = list(self.journal.state("open"))
        if not all_opened:
            raise StoreUnavailable("the journal does not name its run")
        # an evaluation, such as `validate`, creates no run if a training has not done so yet
        trainings = [entry for entry in all_opened if not entry["existing_run_only"]]
        opened = (trainings or all_opened)[-1]
        opened["existing_run_only"] |= self._existing_run_only
        self._client = create_client(self.store_uri)
        upload = self.journal.uploads.get(self._store, {})
        run_ids = [upload.get("run_id")]
        run_id_file = self.journal.folder.parent / RUN_ID_FILE
        is_own_store = self._store == opened["store"]
        if is_own_store:  # the other ids are of this store
            with contextlib.suppress(OSError):
                run_ids.append(read_text(run_id_file).strip())
            run_ids = [*opened["run_ids"], *run_ids, opened.get("checkpoint_run_id")]
        run = find_or_create_run(self._client, opened, run_ids, self.journal.token)
        self._restore(upload if run.info.run_id == upload.get("run_id") else {})
        self._earlier = {}
        if run.data.tags.get(TOKEN_TAG) != self.journal.token:
            self._earlier = {m.key: (m.step, m.value) for m in run.data._metric_objs}
        self._artifacts = ArtifactWriter(self._client, self.store_uri, run, self.journal)
        self.run_id = run.info.run_id
        self._record_progress()
        if is_own_store:
            with contextlib.suppress(OSError):
                replace_text(run_id_file, self.run_id)

    def _restore(self, upload: dict[str, Any]) -> None:
        """Restore what `_record_progress` wrote; `upload` is empty for a new run."""
        self._offset, self._batches, self.pending = upload.get("offset", 0), None, []
        if pending := upload.get("pending"):
            self._pending_start, ends = max(pending[0], 0), set(pending[1:])
            entries = self.journal.entries(self._pending_start, *FILE_OPS, end=self._offset)
            self.pending = [(end, entry) for entry, end in entries if end in ends]

    def _record_progress(self) -> None:
        pending = [self._pending_start, *(end for end, _ in self.pending)] if self.pending else []
        with contextlib.suppress(OSError):  # entries that are uploaded again are not duplicated
            self.journal.record_upload(self._store, self.run_id, self._offset, pending=pending)

    def _check_run(self) -> None:
        """Raise if the run is deleted; if it does not exist, search for it again next time."""
        try:
            run = self._client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code == NOT_FOUND:
                self.run_id = ""
            raise
        check_active(self._client, run)

    # --- entries

    def _read_batches(self) -> Iterator[tuple[list[_Entry], int]]:
        """Yield what is not uploaded: metrics together, others alone; and the offset after it."""
        if self.journal.end < self._offset:
            self._offset = 0  # the journal was deleted
        batch: list[_Entry] = []
        points, batch_end = 0, self._offset
        for entry, end in self.journal.entries(self._offset):
            is_metrics = entry["op"] == "metrics"
            new_points = max(len(entry["values"]), 1) if is_metrics else _MAX_POINTS
            if batch and points + new_points > _MAX_POINTS:
                yield batch, batch_end
                batch, points = [], 0
            batch.append(entry)
            points, batch_end = points + new_points, end
        if batch:
            yield batch, batch_end

    def _upload(self, entries: list[_Entry], end: int) -> None:
        entry = entries[0]
        if entry["op"] == "metrics":
            self._log("metrics", [p for entry in entries for p in self._new_points(entry)])
        elif entry["op"] in FILE_OPS:
            if not self.pending:
                self._pending_start = self._offset
            self.pending.append((end, entry))
        else:
            self._write(entry)
        self._offset = end
        self._record_progress()

    def _upload_file(self) -> None:
        """Upload the next file; the artifact store may fail while the tracking store works."""
        end, entry = self.pending.pop(0)
        try:
            uploaded = self._write(entry)
        except Exception as error:
            self.pending.append((end, entry))  # the others are tried first
            self._check_run()
            self._failed_files += 1
            if self._failed_files >= min(len(self.pending), _MAX_FAILED_FILES):
                self._failed_files, self._retry_at = 0, time.monotonic() + self.RETRY_S
            if not self._warned_of_files:
                self._warned_of_files = True
                rank_zero_warn(
                    f"MLflow at {self._store} cannot store the file "
                    f"{entry['file']} ({short_message(error)}); it is "
                    f"kept in {self.journal.folder} and uploaded later, training continues"
                )
            return
        self._record_progress()
        if uploaded:
            self.journal.remove_file(entry["file"], uploaded)
        if self._warned_of_files and not self.pending:
            self._failed_files, self._warned_of_files = 0, False
            rank_zero_info("MLflow stores files again; all of them are uploaded")

    def _new_points(self, entry: _Entry) -> Iterator[Metric]:
        """Yield the points of an entry, but no step twice that the run had before this journal."""
        step, is_evaluation = entry["step"], entry.get("evaluation")
        for key, value in entry["values"].items():
            earlier_step, earlier_value = self._earlier.get(key, (-math.inf, 0.0))
            is_other = is_evaluation and (step, value) != (earlier_step, earlier_value)
            if step > earlier_step or is_other or entry.get("system"):
                yield Metric(key, float(value), entry["t"], step)
            elif not is_evaluation:
                self._warn_once(
                    "earlier points",
                    f"MLflow run {self.run_id} already has points up to step {earlier_step}; they "
                    "are not logged again",
                )

    def _log(self, kind: str, items: Sequence[Any]) -> None:
        """Log metrics, params or tags; leave out those that the store rejects, by bisection."""
        if not items:
            return
        try:
            self._client.log_batch(self.run_id, **{kind: items}, synchronous=True)
        except MlflowException as error:
            self._raise_unless_rejected(error)
            if len(items) > 1:
                half = len(items) // 2
                self._log(kind, items[:half])
                self._log(kind, items[half:])
            else:
                text = short_message(f"{items[0].key}={items[0].value}")
                message = f"MLflow rejects {text}: {short_message(error)}"
                self._warn_once(f"{kind} {items[0].key}", message)

    def _raise_unless_rejected(self, error: MlflowException) -> None:
        if error.error_code in (NOT_FOUND, INVALID_VALUE):
            self._check_run()
        if error.error_code != INVALID_VALUE:
            raise error

    def _write(self, entry: _Entry) -> Any:
        """Write one entry; skip it with a warning if it is invalid or rejected."""
        try:
            if entry["op"] in FILE_OPS:
                return self._artifacts.write(entry)
            if write := getattr(self, f"_write_{entry['op']}", None):
                write(entry)
        except MissingFile as error:
            self._warn_once("missing", f"MLflow: {error}; such files are skipped")
        except InvalidEntry as error:
            text = short_message(json.dumps(entry))
            self._warn_once(text, f"MLflow: skipped {text} ({error})")
        except MlflowException as error:
            self._raise_unless_rejected(error)
            text = short_message(json.dumps(entry))
            self._warn_once(text, f"MLflow rejects {text}: {short_message(error)}")
        return None

    def _write_params(self, entry: _Entry) -> None:
        existing = self._client.get_run(self.run_id).data.params  # MLflow does not change them
        new = {key: value for key, value in entry["values"].items() if key not in existing}
        self._log("params", [Param(key, value) for key, value in new.items()])

    def _write_tags(self, entry: _Entry) -> None:
        self._log("tags", [RunTag(key, value) for key, value in entry["values"].items()])

    def _write_status(self, entry: _Entry) -> None:
        if entry["status"] == "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self.run_id, entry["status"], entry["t"])

    def _write_inputs(self, entry: _Entry) -> None:
        try:
            inputs = [
                DatasetInput(
                    Dataset(**item["dataset"]), [InputTag("mlflow.data.context", item["use"])]
                )
                for item in entry["datasets"]
            ]
        except (KeyError, TypeError) as error:
            raise InvalidEntry(f"{type(error).__name__}: {error}") from None
        self._client.log_inputs(self.run_id, datasets=inputs)

    def _write_unreadable(self, entry: _Entry) -> None:
        count = entry.get("count", 1)
        lines = "an unreadable line" if count == 1 else f"{count:,} unreadable lines"
        line = short_message(entry["line"])
        self._warn_once(line, f"MLflow: skipped {lines} in {self.journal.folder}: {line}")

    def _warn_once(self, kind: str, message: str) -> None:
        """Warn once for each kind, at most 20 times."""
        if kind not in self._warned and len(self._warned) < _MAX_WARNINGS:
            self._warned.add(kind)
            last = len(self._warned) == _MAX_WARNINGS
            rank_zero_warn(f"{message}; further entries are skipped silently" if last else message)
