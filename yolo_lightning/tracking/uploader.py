"""Uploads a journal to an MLflow store: each entry once, also after crashes and lost responses."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from yolo_lightning.errors import mask_secrets
from yolo_lightning.tracking.entry_writer import EntryWriter, InvalidEntry
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
from yolo_lightning.tracking.system_metrics import PREFIX as SYSTEM

_MAX_POINTS = 1000  # in a request, MLflow's limit
_MAX_FAILED_RETRIES = 3  # in one pass over the deferred entries
_MAX_RETRY_S = 600.0

_Item = tuple[dict[str, Any], int]  # an entry and the offset after it


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

    def __init__(
        self, journal: Journal, store_uri: str | None = None, existing_run_only: bool = False
    ) -> None:
        self.journal, self.store_uri, self.run_id = journal, store_uri or own_store(), ""
        self._existing_run_only = existing_run_only
        # file entries that the artifact store rejected, each with its offset in the journal
        self.deferred: list[tuple[int, dict[str, Any]]] = []
        self._offset = 0
        self._reader: Iterator[_Item] | None = None
        self._next: _Item | None = None  # was read, but not uploaded yet
        self._retry_at, self._retry_s = 0.0, self.RETRY_S
        self._lock: int | None = None
        # the last step of each metric that the run had before this journal; None: it had none
        self._earlier_steps: dict[str, int] | None = None
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
            self._writer.may_exist, self._reader, self._next = True, None, None
            raise
        self._offset, self._writer.may_exist = end, False
        self._record_progress()
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
        if self._lock is not None:
            unlock(self._lock)
        self._lock, self.run_id = None, ""

    def _next_entries(self) -> tuple[list[dict[str, Any]], int]:
        """Return entries to upload together, and the offset after them."""
        if self._reader is None:
            if self.journal.end < self._offset:
                self._offset = 0  # the journal was deleted
            self._reader, self._next = self.journal.entries(self._offset), None
        entries: list[dict[str, Any]] = []
        end, points = self._offset, 0
        while item := self._next or next(self._reader, None):
            self._next = item
            is_metrics = item[0]["op"] == "metrics"
            points += len(item[0]["values"]) if is_metrics else 0
            if entries and (not is_metrics or points > _MAX_POINTS):
                return entries, end
            entries.append(item[0])
            end, self._next = item[1], None
            if not is_metrics:
                return entries, end
        self._reader = None  # the next one finds what is logged meanwhile
        return entries, end

    def _record_progress(self) -> None:
        with contextlib.suppress(OSError):  # entries that are uploaded again are not duplicated
            self.journal.record_upload(
                mask_secrets(self.store_uri),
                self.run_id,
                self._offset,
                deferred=[offset for offset, _ in self.deferred],
                system_step_offset=self._system_step_offset,
            )
        self._writer.remove_uploaded_files()

    # --- the run

    def _connect(self) -> None:
        if self._lock is None:
            with contextlib.suppress(OSError):  # a full disk
                self._lock = lock(self.journal.folder / "lock")
        all_opened = list(self.journal.state("open"))
        if not all_opened:
            raise StoreUnavailable("the journal does not name its run")
        # an evaluation, such as `validate`, creates no run if a training has not done so yet
        trainings = [entry for entry in all_opened if not entry["existing_run_only"]]
        opened = (trainings or all_opened)[-1]
        self._client = create_client(self.store_uri)
        store = mask_secrets(self.store_uri)
        upload = self.journal.uploads.get(store, {})
        run_ids = [upload.get("run_id")]
        run_id_file = self.journal.folder.parent / RUN_ID_FILE
        is_own_store = store == opened["store"]
        if is_own_store:  # the other ids are of this store
            with contextlib.suppress(OSError):
                run_ids.append(read_text(run_id_file).strip())
            run_ids = [*opened["run_ids"], *run_ids, opened.get("checkpoint_run_id")]
        opened["existing_run_only"] |= self._existing_run_only
        run = find_or_create_run(self._client, opened, run_ids, self.journal.token)
        self._continue_run(run, upload if run.info.run_id == upload.get("run_id") else {})
        if is_own_store:
            with contextlib.suppress(OSError):
                replace_text(run_id_file, self.run_id)

    def _continue_run(self, run: Run, upload: dict[str, Any]) -> None:
        """Restore the state after the last recorded upload to this run, empty for the first."""
        steps: dict[str, int] | None = None
        if run.data.tags.get(TOKEN_TAG) != self.journal.token:
            steps = {metric.key: metric.step for metric in run.data._metric_objs}
        self._earlier_steps, self._offset = steps, upload.get("offset", 0)
        self._reader, self.deferred = None, []
        for offset in upload.get("deferred", []):
            first = islice(self.journal.entries(offset), 1)
            self.deferred += [(offset, e) for e, _ in first if e["op"] in EntryWriter.FILE_OPS]
        system = (step for key, step in (steps or {}).items() if key.startswith(SYSTEM))
        self._system_step_offset = upload.get("system_step_offset", 1 + max(system, default=-1))
        self._writer = EntryWriter(self._client, self.store_uri, run, self.journal)
        self.run_id = run.info.run_id
        self._record_progress()

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
            earlier = None if entry.get("system") else (self._earlier_steps or {}).get(key)
            if earlier is None or step > earlier:
                is_new = True
            elif entry.get("evaluation"):
                history = self._client.get_metric_history(self.run_id, key)
                is_new = not any((p.step, p.value) == (step, float(value)) for p in history)
            else:
                is_new = False
                self._report_earlier_points(earlier)
            if is_new:
                yield Metric(key, float(value), entry["t"], step)

    def _report_earlier_points(self, last_step: int) -> None:
        if not self._reported_earlier_points:
            self._reported_earlier_points = True
            rank_zero_info(
                f"MLflow run {self.run_id} already has points up to step {last_step}; they are not "
                "logged again"
            )

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
            if error.error_code in (NOT_FOUND, INVALID_VALUE):
                self._check_run()
            if error.error_code != INVALID_VALUE:
                raise
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
            removed = entry["path"]
            self.deferred = [item for item in self.deferred if item[1].get("file") != removed]
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
        rank_zero_warn(
            f"MLflow at {mask_secrets(self.store_uri)} cannot store the file "
            f"{entry.get('file') or entry.get('path')} ({short_message(error)}); it is kept in "
            f"{self.journal.folder} and uploaded later, training continues"
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
        if not self.deferred:
            rank_zero_info("MLflow stores files again; all deferred files are uploaded")
        return succeeded
