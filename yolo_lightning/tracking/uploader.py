"""Uploads a journal to an MLflow store: each entry once, also after crashes and lost responses."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from yolo_lightning.tracking.entry_writer import EntryWriter, InvalidEntry
from yolo_lightning.tracking.journal import RUN_ID_FILE, Journal
from yolo_lightning.tracking.run_lookup import (
    INVALID_VALUE,
    NOT_FOUND,
    TOKEN_TAG,
    check_active,
    find_or_create_run,
)
from yolo_lightning.tracking.store import (
    JournalLock,
    StoreUnavailable,
    create_client,
    short_message,
    strip_credentials,
    strip_passwords,
)
from yolo_lightning.tracking.system_metrics import PREFIX as SYSTEM

_MAX_POINTS = 1000  # in a request, MLflow's limit
_MAX_FAILED_RETRIES = 3  # in one pass over the deferred entries
_MAX_RETRY_S = 600.0


class Uploader:
    """Uploads the entries of a journal to its MLflow run, in order.

    The journal's newest ``open`` entry names the experiment, the run and, unless `store_uri` does,
    the store. The run is found by its id, else by the journal's token, so that it is not created
    twice if a response is lost. A point has the time at which it was logged: a database does not
    store an identical point again.
    """

    RETRY_S = 60.0

    def __init__(
        self, journal: Journal, store_uri: str | None = None, existing_run_only: bool = False
    ) -> None:
        self.journal, self.store_uri, self.run_id = journal, store_uri or "", ""
        self._requested_uri, self._existing_run_only = store_uri, existing_run_only
        # file entries that the artifact store rejected, each with its offset in the journal
        self.deferred: list[tuple[int, dict[str, Any]]] = []
        self._offset = 0
        self._retry_at, self._retry_s = 0.0, self.RETRY_S
        self._lock = JournalLock(journal.folder)
        # points by metric and step that the run had before this journal; None: it had none
        self._earlier_points: dict[str, dict[int, set[float]]] | None = None
        self._reported_earlier_points = False
        self._system_step_offset = 0
        self._rejected: set[str] = set()

    def upload_next(self) -> bool:
        """Upload the next entries; return whether there were any.

        Raises:
            StoreUnavailable: the run is deleted, or another process is uploading.
        """
        if not self.run_id:
            if not self.journal.end:
                return False
            self._connect()
        entries, end = self._next_entries()
        if not entries:
            self._writer.warn_missing_files()
            return self._retry_deferred()
        try:
            self._upload(entries)
        except Exception:
            self._writer.may_exist = True
            raise
        self._offset, self._writer.may_exist = end, False
        self._record_progress()
        self._writer.remove_uploaded_files()
        return True

    def retry_now(self) -> None:
        """Retry deferred entries without further delay."""
        self._retry_at = 0.0

    @property
    def progress(self) -> float:
        """Share of the journal that is uploaded, 0 to 1."""
        return self._offset / max(self.journal.end, 1)

    def close(self) -> None:
        """Release the lock of the journal."""
        self._lock.release()
        self.run_id = ""

    def _next_entries(self) -> tuple[list[dict[str, Any]], int]:
        """Return entries to upload together, and the offset after them."""
        if self.journal.end < self._offset:
            self._offset = 0  # the journal was deleted
        entries: list[dict[str, Any]] = []
        end, points = self._offset, 0
        for entry, after in self.journal.entries(self._offset):
            is_metrics = entry["op"] == "metrics"
            points += len(entry["values"]) if is_metrics else 0
            if entries and (not is_metrics or points > _MAX_POINTS):
                break
            entries.append(entry)
            end = after
            if not is_metrics:
                break
        return entries, end

    def _record_progress(self) -> None:
        with contextlib.suppress(OSError):  # entries that are uploaded again are not duplicated
            self.journal.record_upload(
                strip_passwords(self.store_uri),
                self.run_id,
                self._offset,
                deferred=[offset for offset, _ in self.deferred],
                system_step_offset=self._system_step_offset,
            )

    # --- the run

    def _connect(self) -> None:
        self._lock.acquire()
        all_opened = [entry for entry, _ in self.journal.entries(0, "open")]
        if not all_opened:
            raise StoreUnavailable("the journal does not name its run")
        # an evaluation, such as `validate`, creates no run if a training has not done so yet
        trainings = [entry for entry in all_opened if not entry["existing_run_only"]]
        opened = (trainings or all_opened)[-1]
        self.store_uri = self._requested_uri or opened["store"]
        self._client = create_client(self.store_uri)
        store = strip_passwords(self.store_uri)
        upload = self.journal.uploads.get(store, {})
        run_ids = [upload.get("run_id")]
        is_own_store = store == opened["store"]
        if is_own_store:  # the other ids are of this store
            run_ids = [
                *opened["run_ids"], *run_ids, self._read_run_id(), opened.get("checkpoint_run_id")
            ]  # fmt: skip
        existing_run_only = opened["existing_run_only"] or self._existing_run_only
        opened = {**opened, "existing_run_only": existing_run_only}
        run = find_or_create_run(self._client, opened, run_ids, self.journal.token)
        self._continue_run(run, upload if run.info.run_id == upload.get("run_id") else {})
        if is_own_store:
            with contextlib.suppress(OSError):
                self._run_id_file.write_text(self.run_id, encoding="utf-8")

    @property
    def _run_id_file(self) -> Path:
        return self.journal.folder.parent / RUN_ID_FILE

    def _read_run_id(self) -> str | None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._run_id_file.read_text(encoding="utf-8").strip()
        return None

    def _continue_run(self, run: Run, upload: dict[str, Any]) -> None:
        """Restore the state after the last recorded upload to this run, empty for the first."""
        has_earlier_points = run.data.tags.get(TOKEN_TAG) != self.journal.token
        self._earlier_points = {} if has_earlier_points else None
        self._offset = upload.get("offset", 0)
        self.deferred = []
        for offset in upload.get("deferred", []):
            self.deferred += [(offset, entry) for entry, _ in self.journal.entries(offset)][:1]
        self._system_step_offset = upload.get(
            "system_step_offset", self._count_system_samples(run) if has_earlier_points else 0
        )
        self._writer = EntryWriter(self._client, self.store_uri, run, self.journal)
        self.run_id = run.info.run_id
        self._record_progress()

    def _count_system_samples(self, run: Run) -> int:
        key = next((key for key in run.data.metrics if key.startswith(SYSTEM)), None)
        if key is None:
            return 0
        history = self._client.get_metric_history(run.info.run_id, key)
        return 1 + max((point.step for point in history), default=-1)

    # --- entries

    def _upload(self, entries: list[dict[str, Any]]) -> None:
        if entries[0]["op"] == "metrics":
            points = [point for entry in entries for point in self._new_points(entry)]
            for start in range(0, len(points), _MAX_POINTS):
                self._split_on_error(
                    points[start : start + _MAX_POINTS], self._writer.write_metrics
                )
        elif entries[0]["op"] in EntryWriter.FILE_OPS:
            self._upload_file(entries[0])
        else:
            self._write(entries[0])

    def _new_points(self, entry: dict[str, Any]) -> Iterator[Metric]:
        """Yield the points of an entry that the run did not have before this journal."""
        step = entry["step"] + (self._system_step_offset if entry.get("system") else 0)
        for key, value in entry["values"].items():
            earlier = {} if entry.get("system") else self._earlier_values(key)
            is_evaluation = entry.get("evaluation")
            if step not in earlier or (is_evaluation and float(value) not in earlier[step]):
                yield Metric(key, float(value), entry["t"], step)
            elif not is_evaluation and not self._reported_earlier_points:
                self._reported_earlier_points = True
                rank_zero_info(
                    f"MLflow run {self.run_id} already has points up to step {max(earlier)}; they "
                    "are not logged again"
                )

    def _earlier_values(self, key: str) -> dict[int, set[float]]:
        if self._earlier_points is None:
            return {}
        if key not in self._earlier_points:
            self._earlier_points[key] = {}
            for point in self._client.get_metric_history(self.run_id, key):
                self._earlier_points[key].setdefault(point.step, set()).add(point.value)
        return self._earlier_points[key]

    def _write(self, entry: dict[str, Any]) -> None:
        """Write one entry; skip it with a warning if it is invalid or rejected."""
        try:
            self._split_on_error(
                [entry], lambda items: self._writer.write(items[0], self._split_on_error)
            )
        except InvalidEntry as error:
            rank_zero_warn(f"MLflow: skipped {short_message(json.dumps(entry))} ({error})")

    def _split_on_error(self, items: Sequence[Any], write: Callable[[Sequence[Any]], Any]) -> None:
        """Write items; skip those that the store rejects, found by bisection, with a warning."""
        if not items:
            return
        try:
            write(items)
        except MlflowException as error:
            if error.error_code == NOT_FOUND:
                self._check_run()
            if error.error_code != INVALID_VALUE:
                raise
            self._check_run()
            if len(items) == 1:
                self._warn_rejected(items[0], error)
                return
            half = len(items) // 2
            self._split_on_error(items[:half], write)
            self._split_on_error(items[half:], write)

    def _warn_rejected(self, item: Any, error: MlflowException) -> None:
        name = str(getattr(item, "key", item))
        if name not in self._rejected:
            self._rejected.add(name)
            text = f"{name}={item.value}" if hasattr(item, "value") else json.dumps(item)
            rank_zero_warn(f"MLflow rejects {short_message(text)}: {short_message(error)}")

    def _check_run(self) -> None:
        """Raise if the run is deleted; if it does not exist, search for it again next time."""
        try:
            run = self._client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code == NOT_FOUND:
                self.run_id = ""
            raise
        check_active(self._client, run)

    # --- files: the artifact store may fail while the tracking store works

    def _upload_file(self, entry: dict[str, Any]) -> None:
        if entry["op"] == "remove":
            self.deferred = [
                (offset, other)
                for offset, other in self.deferred
                if other.get("file") != entry["path"]
            ]
        if not self.deferred:
            try:
                self._write(entry)
                return
            except Exception as error:
                self._check_run()
                self._warn_deferred(entry, error)
        self.deferred.append((self._offset, entry))

    def _warn_deferred(self, entry: dict[str, Any], error: Exception) -> None:
        self._retry_s = self.RETRY_S
        self._retry_at = time.monotonic() + self._retry_s
        file = entry.get("file") or entry.get("path")
        rank_zero_warn(
            f"MLflow at {strip_credentials(self.store_uri)} cannot store the file {file} "
            f"({short_message(error)}); it is kept in {self.journal.folder} and uploaded later, "
            "training continues"
        )

    def _retry_deferred(self) -> bool:
        """Retry the deferred entries if their delay has passed; return whether one succeeded."""
        if not self.deferred or time.monotonic() < self._retry_at:
            return False
        waiting, before = list(self.deferred), len(self.deferred)
        failed: list[tuple[int, dict[str, Any]]] = []
        self._writer.may_exist = True
        try:
            while waiting and len(failed) < _MAX_FAILED_RETRIES:
                try:
                    self._write(waiting[0][1])
                except Exception:
                    self._check_run()
                    failed.append(waiting[0])
                waiting.pop(0)
        finally:
            self.deferred = [*waiting, *failed]  # the others are tried first next time
            succeeded = len(self.deferred) < before
            self._retry_s = self.RETRY_S if succeeded else min(2 * self._retry_s, _MAX_RETRY_S)
            self._retry_at = time.monotonic() + self._retry_s
        self._record_progress()
        self._writer.remove_uploaded_files()
        if not self.deferred:
            rank_zero_info("MLflow stores files again; all deferred files are uploaded")
        return succeeded
