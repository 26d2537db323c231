"""What a run is told, written down on this machine before anything else happens to it."""

import contextlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

FOLDER = "mlflow"
"""Of a journal, in its run's folder."""

RUN_ID_FILE = "mlflow_run_id"
"""In the run's folder: the MLflow run that holds it."""

UNREADABLE = "unreadable"
"""What a line is called that says nothing."""

_LINES, _PENDING, _SHIPPED, _TOKEN = "journal.jsonl", "files", "shipped.json", "token"
_FIELDS: dict[str, dict[str, type]] = {
    "open": {"store": str, "experiment": str, "name": str, "wanted": list, "joins": bool},
    "metrics": {"t": int, "step": int, "values": dict},
    "params": {"values": dict},
    "tags": {"values": dict},
    "name": {"name": str, "key": str},
    "status": {"t": int, "status": str},
    "inputs": {"datasets": list},
    "file": {"file": str, "folder": str},
    "picture": {"t": int, "file": str, "key": str, "step": int},
    "model": {"file": str, "name": str, "step": int},
    "remove": {"path": str},
}
_INTEGERS = 2**63


class Journal:
    """An append-only file of JSON lines, and the files that wait to be shipped with them.

    A line is on the disk, or in a file system's cache that outlives this process, when `append`
    returns. Where the disk is full, lines stay in memory, in their order, until it takes them; they
    are read, and so shipped, from there as well. Several processes may append.

    Args:
        folder: of the journal; made where it does not exist.

    Attributes:
        token: what this run is called before a store has named it, the same in every process.
        problem: why the disk did not take the newest line; empty where it did.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.problem = ""
        self._waiting = b""
        self._lock = threading.RLock()
        self.token = uuid.uuid4().hex
        with self._noting_problems():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.token = self._kept_token()

    @contextlib.contextmanager
    def _noting_problems(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = f"{self.folder}: {error.strerror or error}"

    def _kept_token(self) -> str:
        file = self.folder / _TOKEN
        with contextlib.suppress(FileExistsError), file.open("x", encoding="utf-8") as fresh:
            fresh.write(self.token)
        if not file.read_text(encoding="utf-8").strip():  # from a full disk, or a crash
            file.write_text(self.token, encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry down; never raises, see `problem`."""
        text = json.dumps(entry, ensure_ascii=False, default=str)
        with self._lock:
            self._waiting += text.encode(errors="replace") + b"\n"
            self.problem = ""
            with self._noting_problems():
                self._write_waiting()

    def _write_waiting(self) -> None:
        """Write whole lines or nothing: what a full disk took of one is taken back."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _LINES, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            # a crash of the machine may have cut the last line off: it must not take this one along
            broken = before and os.pread(descriptor, 1, before - 1) != b"\n"
            lines = b"\n" * bool(broken) + self._waiting
            written = os.write(descriptor, lines)
            if written < len(lines):
                if os.fstat(descriptor).st_size == before + written:
                    os.ftruncate(descriptor, before)
                raise OSError(None, "no space for a whole line")
        finally:
            os.close(descriptor)
        self._waiting = b""

    def sync(self) -> None:
        """Have the disk hold what has been written, beyond a loss of power."""
        with contextlib.suppress(OSError), (self.folder / _LINES).open("rb") as lines:
            os.fsync(lines.fileno())

    def entries(self, offset: int = 0, *ops: str) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield entries from an offset on, each with the offset of the next one.

        Args:
            offset: to begin at.
            ops: the kinds wanted, all where none is named: then a line that makes no sense, as a
                crash of the machine leaves one, is an entry `UNREADABLE` with its ``line``.
        """
        wanted = tuple(f'{{"op": "{op}"'.encode() for op in ops)
        for line, end in self._lines(offset):
            if not line.strip() or (wanted and not line.startswith(wanted)):
                continue
            entry = _entry(line)
            if entry is not None:
                yield entry, end
            elif not wanted:
                yield {"op": UNREADABLE, "line": line.decode(errors="replace").strip()}, end

    def _lines(self, offset: int) -> Iterator[tuple[bytes, int]]:
        with self._lock:
            waiting, size = self._waiting, self._size()
        if offset < size:
            with (self.folder / _LINES).open("rb") as lines:
                lines.seek(offset)
                # what has no end yet is another process's, which is writing it
                while offset < size and (line := lines.readline()).endswith(b"\n"):
                    offset += len(line)
                    yield line, offset
        start = size
        for line in waiting.splitlines(keepends=True):
            start += len(line)
            if start > offset:
                yield line, start

    def _size(self) -> int:
        try:
            return (self.folder / _LINES).stat().st_size
        except OSError:
            return 0

    @property
    def end(self) -> int:
        """Offset behind the newest entry."""
        with self._lock:
            return self._size() + len(self._waiting)

    # --- how far it is shipped

    @property
    def shipped(self) -> dict[str, dict[str, Any]]:
        """What `note_shipped` was told last of each store."""
        with contextlib.suppress(OSError, ValueError):
            held = json.loads((self.folder / _SHIPPED).read_text(encoding="utf-8"))
            if isinstance(held, dict):
                return {
                    store: note
                    for store, note in held.items()
                    if isinstance(note, dict) and {"run_id", "offset"} <= note.keys()
                }
        return {}

    def note_shipped(self, store: str, run_id: str, offset: int, **more: Any) -> None:
        """Note how far a run of a store holds this journal; replaced whole, never half written.

        Only what the disk holds is counted: another process would not find the rest here.

        Args:
            store: without a password.
            run_id: of the store.
            offset: behind the last entry that it holds.
            more: to remember with it.

        Raises:
            OSError: the disk does not take it.
        """
        self.sync()
        noted = self.shipped | {
            store: {"run_id": run_id, "offset": min(offset, self._size()), **more}
        }
        fresh = self.folder / f"{_SHIPPED}.part"
        fresh.write_text(json.dumps(noted), encoding="utf-8")
        fresh.replace(self.folder / _SHIPPED)

    # --- files on their way

    def pending(self, name: str) -> Path:
        """Return where a file or folder waits."""
        return self.folder / _PENDING / name

    def keep(self, source: Path, name: str, link: bool = False) -> None:
        """Keep what a file holds now until it is shipped; one of the same name is replaced.

        Args:
            source: the file.
            name: of the copy, with folders.
            link: take a hard link where the file system allows one, for large files that are
                replaced as a whole and never written into.

        Raises:
            OSError: neither linked nor copied.
        """
        target = self.pending(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(target.name + ".part")
        fresh.unlink(missing_ok=True)
        try:
            if not (link and _linked(source, fresh)):
                shutil.copyfile(source, fresh)
            with self._lock:
                fresh.replace(target)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise

    def release(self, name: str, as_shipped: os.stat_result | None = None) -> None:
        """Remove what waits no more.

        Args:
            name: of the copy.
            as_shipped: of the file that was shipped: a newer one in its place stays.
        """
        path = self.pending(name)
        gone = path.with_name(path.name + ".gone")
        with contextlib.suppress(OSError):
            with self._lock:
                now = path.stat()
                same = as_shipped is None or (now.st_ino, now.st_mtime_ns) == (
                    as_shipped.st_ino, as_shipped.st_mtime_ns,
                )  # fmt: skip
                if not same:
                    return
                path.replace(gone)
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return what a line says, None where that makes no sense."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and _sound(entry) else None


def _sound(entry: dict[str, Any]) -> bool:
    op = entry.get("op")
    fields = _FIELDS.get(op) if isinstance(op, str) else None
    if fields is None:
        return False
    for name, kind in fields.items():
        value = entry.get(name)
        if not isinstance(value, kind):
            return False
        if isinstance(value, int) and not -_INTEGERS <= value < _INTEGERS:
            return False
    if op == "metrics":
        numbers = entry["values"].values()
        return entry["t"] >= 0 and all(
            isinstance(x, float) or (isinstance(x, int) and abs(x) < _INTEGERS) for x in numbers
        )
    if op in ("params", "tags"):
        return all(isinstance(text, str) for text in entry["values"].values())
    return all(_within(entry[name]) for name in ("file", "path") if name in fields)


def _within(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def journals_under(folder: Path) -> list[Path]:
    """Return the folders of the journals in a folder and below, oldest name first."""
    return sorted(file.parent for file in folder.rglob(_LINES) if file.parent.name == FOLDER)
