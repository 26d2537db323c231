"""From a run's journal into an MLflow store: every entry once, whatever happens in between."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from yolo_lightning.tracking.journal import RUN_ID_FILE, Journal
from yolo_lightning.tracking.run_finding import GONE, REFUSED, TOKEN_TAG, check_active, find_run
from yolo_lightning.tracking.shipped_entries import EntryWriter, Unsendable
from yolo_lightning.tracking.store import (
    JournalLock,
    StoreUnavailable,
    client_of,
    public,
    short,
    without_password,
)
from yolo_lightning.tracking.system_metrics import PREFIX as SYSTEM

_BATCH = 1000  # points, MLflow's limit of a request
_TRIES = 3  # of a pass over what was put off
_MAX_RETRY_S = 600.0


class Shipper:
    """Brings a journal's entries into its MLflow run, in their order.

    A run is found again by its id, else by the journal's token, so that one which was opened by a
    request without an answer is not opened twice. Points carry the time at which they were written
    down: a database that holds one already does not take it again. Files that their store does
    not take are put off, and hold nothing else up.

    Args:
        journal: its newest ``open`` entry says which store, experiment and run.
        store: another one than the journal names.
        joins: only add to a run; none is opened.

    Attributes:
        put_off: entries with files that are to be tried again, each with its offset.
    """

    RETRY_S = 60.0

    def __init__(self, journal: Journal, store: str | None = None, joins: bool = False) -> None:
        self.journal, self.store, self.run_id = journal, store or "", ""
        self._joins = joins
        self.put_off: list[tuple[int, dict[str, Any]]] = []
        self._wanted_store = store
        self._offset = 0
        self._retry_at, self._retry_s = 0.0, self.RETRY_S
        self._lock = JournalLock(journal.folder)
        self._held: dict[str, dict[int, set[float]]] | None = None
        self._said_held = False
        self._system_from = 0
        self._refused: set[str] = set()

    def ship(self) -> bool:
        """Bring the next entries into the store; tell whether there were any.

        Raises:
            StoreUnavailable: the run was deleted, or another process is shipping.
            Exception: whatever the store's client says.
        """
        if not self.run_id:
            if not self.journal.end:
                return False
            self._connect()
        entries, end = self._next()
        if not entries:
            self._telling.say_lost()
            return self._try_again()
        try:
            self._take(entries)
        except Exception:
            self._telling.doubtful = True
            raise
        self._offset, self._telling.doubtful = end, False
        self._note()
        self._telling.release()
        return True

    def hurry(self) -> None:
        """Try what was put off at once."""
        self._retry_at = 0.0

    @property
    def done(self) -> float:
        """Share of the journal that the store holds."""
        return self._offset / max(self.journal.end, 1)

    def close(self) -> None:
        """Let others ship the journal."""
        self._lock.leave()
        self.run_id = ""

    def _next(self) -> tuple[list[dict[str, Any]], int]:
        """Return entries that go together, and the offset behind them."""
        if self.journal.end < self._offset:
            self._offset = 0  # somebody removed it
        taken: list[dict[str, Any]] = []
        end, points = self._offset, 0
        for entry, after in self.journal.entries(self._offset):
            are_points = entry["op"] == "metrics"
            points += len(entry["values"]) if are_points else 0
            if taken and (not are_points or points > _BATCH):
                break
            taken.append(entry)
            end = after
            if not are_points:
                break
        return taken, end

    def _note(self) -> None:
        more = {"put_off": [at for at, _ in self.put_off], "system_from": self._system_from}
        with contextlib.suppress(OSError):  # what is told twice is taken once
            store = without_password(self.store)
            self.journal.note_shipped(store, self.run_id, self._offset, **more)

    # --- the run

    def _connect(self) -> None:
        """Find or open the run, and how far it holds the journal.

        Raises:
            StoreUnavailable: it was deleted, or another process is shipping.
        """
        self._lock.take()
        opened = [entry for entry, _ in self.journal.entries(0, "open")]
        if not opened:
            raise StoreUnavailable("the journal does not say which run it belongs to")
        # who only adds to a run, such as `validate`, opens none where a training has not yet
        opening = ([one for one in opened if not one["joins"]] or opened)[-1]
        self.store = self._wanted_store or opening["store"]
        self._client = client_of(self.store)
        store = without_password(self.store)
        noted = self.journal.shipped.get(store, {})
        ids = [noted.get("run_id")]
        at_home = store == opening["store"]
        if at_home:  # the others are of this store
            ids = [*opening["wanted"], *ids, self._named_in_folder(), opening.get("held")]
        joins = opening["joins"] or self._joins
        run = find_run(self._client, {**opening, "joins": joins}, ids, self.journal.token)
        self._go_on(run, noted if run.info.run_id == noted.get("run_id") else {})
        if at_home:
            with contextlib.suppress(OSError):
                self._run_id_file.write_text(self.run_id, encoding="utf-8")

    @property
    def _run_id_file(self) -> Path:
        return self.journal.folder.parent / RUN_ID_FILE

    def _named_in_folder(self) -> str | None:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._run_id_file.read_text(encoding="utf-8").strip()
        return None

    def _go_on(self, run: Run, noted: dict[str, Any]) -> None:
        """Go on where this run was shipped to last."""
        adopted = run.data.tags.get(TOKEN_TAG) != self.journal.token
        self._held = {} if adopted else None
        self._offset = noted.get("offset", 0)
        self.put_off = []
        for at in noted.get("put_off", []):
            self.put_off += [(at, entry) for entry, _ in self.journal.entries(at)][:1]
        self._system_from = noted.get("system_from", self._samples(run) if adopted else 0)
        self._telling = EntryWriter(self._client, self.store, run, self.journal)
        self.run_id = run.info.run_id
        self._note()

    def _samples(self, run: Run) -> int:
        """Return how many measurements of the machine a run holds already."""
        key = next((key for key in run.data.metrics if key.startswith(SYSTEM)), None)
        if key is None:
            return 0
        history = self._client.get_metric_history(run.info.run_id, key)
        return 1 + max((point.step for point in history), default=-1)

    # --- entries

    def _take(self, entries: list[dict[str, Any]]) -> None:
        if entries[0]["op"] == "metrics":
            points = [point for entry in entries for point in self._points(entry)]
            for start in range(0, len(points), _BATCH):
                self._told(points[start : start + _BATCH], self._telling.points)
        elif entries[0]["op"] in EntryWriter.FILES:
            self._take_file(entries[0])
        else:
            self._tell(entries[0])

    def _points(self, entry: dict[str, Any]) -> Iterator[Metric]:
        step = entry["step"] + (self._system_from if entry.get("system") else 0)
        for key, value in entry["values"].items():
            held = {} if entry.get("system") else self._steps_held(key)
            if step not in held or (entry.get("again") and float(value) not in held[step]):
                yield Metric(key, float(value), entry["t"], step)
            elif not entry.get("again") and not self._said_held:
                self._said_held = True
                rank_zero_info(
                    f"MLflow run {self.run_id} holds steps up to {max(held)} already: their points "
                    "are not logged again"
                )

    def _steps_held(self, key: str) -> dict[int, set[float]]:
        """Return the points by step of a metric that a run had before this journal began."""
        if self._held is None:
            return {}
        if key not in self._held:
            self._held[key] = {}
            for point in self._client.get_metric_history(self.run_id, key):
                self._held[key].setdefault(point.step, set()).add(point.value)
        return self._held[key]

    def _tell(self, entry: dict[str, Any]) -> None:
        """Do what an entry says; one that cannot be sent is left out by name."""
        try:
            self._told([entry], lambda some: self._telling(some[0], self._told))
        except Unsendable as error:
            rank_zero_warn(f"MLflow: left out {short(json.dumps(entry))} ({error})")

    def _told(self, items: Sequence[Any], tell: Callable[[Sequence[Any]], Any]) -> None:
        """Tell the store; leave out what it refuses, and say what that was."""
        if not items:
            return
        try:
            tell(items)
        except MlflowException as error:
            if error.error_code == GONE:
                self._check_run()
            if error.error_code != REFUSED:
                raise
            self._check_run()
            if len(items) == 1:
                self._say_refused(items[0], error)
                return
            half = len(items) // 2
            self._told(items[:half], tell)
            self._told(items[half:], tell)

    def _say_refused(self, item: Any, error: MlflowException) -> None:
        name = str(getattr(item, "key", item))
        if name not in self._refused:
            self._refused.add(name)
            what = f"{name}={item.value}" if hasattr(item, "value") else json.dumps(item)
            rank_zero_warn(f"MLflow refuses {short(what)}: {short(error)}")

    def _check_run(self) -> None:
        """Ask for the run.

        Raises:
            StoreUnavailable: it was deleted.
            MlflowException: of the store; where the run is gone, the next one is looked for.
        """
        try:
            run = self._client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code == GONE:
                self.run_id = ""
            raise
        check_active(self._client, run)

    # --- files, whose store may fail alone

    def _take_file(self, entry: dict[str, Any]) -> None:
        if entry["op"] == "remove":
            self.put_off = [
                (at, one) for at, one in self.put_off if one.get("file") != entry["path"]
            ]
        if not self.put_off:
            try:
                self._tell(entry)
                return
            except Exception as error:
                self._check_run()
                self._say_put_off(entry, error)
        self.put_off.append((self._offset, entry))

    def _say_put_off(self, entry: dict[str, Any], error: Exception) -> None:
        self._retry_s = self.RETRY_S
        self._retry_at = time.monotonic() + self._retry_s
        what = entry.get("file") or entry.get("path")
        rank_zero_warn(
            f"MLflow at {public(self.store)} does not take the file {what} ({short(error)}); "
            f"it is kept in {self.journal.folder} and follows, nothing waits for it"
        )

    def _try_again(self) -> bool:
        """Tell what was put off where it is time to; tell whether any of it was taken."""
        if not self.put_off or time.monotonic() < self._retry_at:
            return False
        waiting, before = list(self.put_off), len(self.put_off)
        failed: list[tuple[int, dict[str, Any]]] = []
        self._telling.doubtful = True
        try:
            while waiting and len(failed) < _TRIES:
                try:
                    self._tell(waiting[0][1])
                except Exception:
                    self._check_run()
                    failed.append(waiting[0])
                waiting.pop(0)
        finally:
            self.put_off = [*waiting, *failed]  # what fails always lets the others go first
            taken = len(self.put_off) < before
            self._retry_s = self.RETRY_S if taken else min(2 * self._retry_s, _MAX_RETRY_S)
            self._retry_at = time.monotonic() + self._retry_s
        self._note()
        self._telling.release()
        if not self.put_off:
            rank_zero_info("MLflow takes files again; those of the meantime are there")
        return taken
