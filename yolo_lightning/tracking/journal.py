"""The journal of a run: everything that is logged, on the local disk, before it is uploaded."""

import contextlib
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

JOURNAL_FOLDER = "mlflow"  # name of the journal's folder in the run folder

RUN_ID_FILE = "mlflow_run_id"  # name of the file in the run folder that contains the MLflow run id

UNREADABLE = "unreadable"  # operation name of a line that cannot be parsed

_JOURNAL_FILE, _UPLOADS_FILE, _TOKEN_FILE = "journal.jsonl", "uploaded.json", "token"
_PENDING_FOLDER = "files"
_FIELDS: dict[str, dict[str, type]] = {
    "open": {
        "store": str, "experiment": str, "name": str, "run_ids": list, "existing_run_only": bool,
    },
    "metrics": {"t": int, "step": int, "values": dict},
    "params": {"values": dict},
    "tags": {"values": dict},
    "name": {"name": str, "key": str},
    "status": {"t": int, "status": str},
    "inputs": {"datasets": list},
    "file": {"file": str, "folder": str},
    "image": {"t": int, "file": str, "key": str, "step": int},
    "model": {"file": str, "name": str, "step": int},
    "remove": {"path": str},
}  # fmt: skip
_INT64_LIMIT = 2**63


class Journal:
    """An append-only file of JSON lines, and the files that are pending upload.

    When `append` returns, the line is on the disk, or in a file system cache that survives this
    process. If the disk is full, lines are buffered in memory, in order, and can be read, until
    they can be written. Several processes may append.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.write_error = ""  # why the newest line could not be written
        self._buffer = b""
        self._lock = threading.RLock()
        self.token = uuid.uuid4().hex  # identifies the run, in every process
        with self._store_write_error():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.token = self._load_token()

    @contextlib.contextmanager
    def _store_write_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.write_error = f"{self.folder}: {error.strerror or error}"

    def _load_token(self) -> str:
        file = self.folder / _TOKEN_FILE
        with contextlib.suppress(FileExistsError), file.open("x", encoding="utf-8") as new:
            new.write(self.token)
        if not file.read_text(encoding="utf-8").strip():  # after a full disk or a crash
            file.write_text(self.token, encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append an entry. Never raises; see `write_error`."""
        text = json.dumps(entry, ensure_ascii=False, default=str)
        with self._lock:
            self._buffer += text.encode(errors="replace") + b"\n"
            self.write_error = ""
            with self._store_write_error():
                self._flush()

    def _flush(self) -> None:
        """Write the buffer as whole lines; truncate the file again if only a part fits."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            self.folder / _JOURNAL_FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644
        )
        try:
            before = os.fstat(descriptor).st_size
            # a machine crash may have cut the last line; end it, so that this line stays readable
            incomplete = before and os.pread(descriptor, 1, before - 1) != b"\n"
            lines = b"\n" * bool(incomplete) + self._buffer
            written = os.write(descriptor, lines)
            if written < len(lines):
                if os.fstat(descriptor).st_size == before + written:
                    os.ftruncate(descriptor, before)
                raise OSError(None, "no space for a whole line")
        finally:
            os.close(descriptor)
        self._buffer = b""

    def sync(self) -> None:
        """Flush written lines to the disk, so that they survive a loss of power."""
        with contextlib.suppress(OSError), (self.folder / _JOURNAL_FILE).open("rb") as lines:
            os.fsync(lines.fileno())

    def entries(self, offset: int = 0, *ops: str) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the entries of these operations from a byte offset on, and the offset after each.

        Without `ops`, yield all, and `UNREADABLE` entries with the ``line`` that cannot be parsed.
        """
        prefixes = tuple(f'{{"op": "{op}"'.encode() for op in ops)
        for line, end in self._lines(offset):
            if not line.strip() or (prefixes and not line.startswith(prefixes)):
                continue
            entry = _parse(line)
            if entry is not None:
                yield entry, end
            elif not prefixes:
                yield {"op": UNREADABLE, "line": line.decode(errors="replace").strip()}, end

    def _lines(self, offset: int) -> Iterator[tuple[bytes, int]]:
        with self._lock:
            buffer, size = self._buffer, self._file_size()
        if offset < size:
            with (self.folder / _JOURNAL_FILE).open("rb") as lines:
                lines.seek(offset)
                # a line without an end is still being written by another process
                while offset < size and (line := lines.readline()).endswith(b"\n"):
                    offset += len(line)
                    yield line, offset
        end = size
        for line in buffer.splitlines(keepends=True):
            end += len(line)
            if end > offset:
                yield line, end

    def _file_size(self) -> int:
        try:
            return (self.folder / _JOURNAL_FILE).stat().st_size
        except OSError:
            return 0

    @property
    def end(self) -> int:
        """Byte offset after the newest entry."""
        with self._lock:
            return self._file_size() + len(self._buffer)

    # --- upload progress

    @property
    def uploads(self) -> dict[str, dict[str, Any]]:
        """The last upload to each store, as `record_upload` wrote it."""
        with contextlib.suppress(OSError, ValueError):
            uploads = json.loads((self.folder / _UPLOADS_FILE).read_text(encoding="utf-8"))
            if isinstance(uploads, dict):
                return {
                    store: upload
                    for store, upload in uploads.items()
                    if isinstance(upload, dict) and {"run_id", "offset"} <= upload.keys()
                }
        return {}

    def record_upload(self, store: str, run_id: str, offset: int, **extra: Any) -> None:
        """Record atomically which run of a store has the entries before `offset`.

        `store` is an address without a password; `extra` values are recorded too.
        """
        self.sync()
        # not more than what is on the disk: another process cannot read the buffer
        upload = {"run_id": run_id, "offset": min(offset, self._file_size()), **extra}
        temporary = self.folder / f"{_UPLOADS_FILE}.part"
        temporary.write_text(json.dumps(self.uploads | {store: upload}), encoding="utf-8")
        temporary.replace(self.folder / _UPLOADS_FILE)

    # --- files pending upload

    def pending_path(self, name: str) -> Path:
        """Return the path of a pending file or folder."""
        return self.folder / _PENDING_FOLDER / name

    def add_file(self, source: Path, name: str, link: bool = False) -> None:
        """Copy a file into the journal until it is uploaded; replaces a file of the same name.

        `link` creates a hard link if possible, for large files that are never modified in place.

        Raises:
            OSError: the file can neither be linked nor copied.
        """
        target = self.pending_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".part")
        temporary.unlink(missing_ok=True)
        try:
            if not (link and _try_link(source, temporary)):
                shutil.copyfile(source, temporary)
            with self._lock:
                temporary.replace(target)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise

    def remove_file(self, name: str, uploaded: os.stat_result | None = None) -> None:
        """Remove a pending file or folder, unless it is newer than the `uploaded` status."""
        path = self.pending_path(name)
        removed = path.with_name(path.name + ".gone")
        with contextlib.suppress(OSError):
            with self._lock:
                current = path.stat()
                unchanged = uploaded is None or (current.st_ino, current.st_mtime_ns) == (
                    uploaded.st_ino, uploaded.st_mtime_ns,
                )  # fmt: skip
                if not unchanged:
                    return
                path.replace(removed)
            shutil.rmtree(removed) if removed.is_dir() else removed.unlink()


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a line, None if it is invalid."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and _is_valid(entry) else None


def _is_valid(entry: dict[str, Any]) -> bool:
    op = entry.get("op")
    fields = _FIELDS.get(op) if isinstance(op, str) else None
    if fields is None:
        return False
    for name, type_ in fields.items():
        value = entry.get(name)
        if not isinstance(value, type_):
            return False
        if isinstance(value, int) and not -_INT64_LIMIT <= value < _INT64_LIMIT:
            return False
    if op == "metrics":
        numbers = entry["values"].values()
        return entry["t"] >= 0 and all(
            isinstance(x, float) or (isinstance(x, int) and abs(x) < _INT64_LIMIT) for x in numbers
        )
    if op in ("params", "tags"):
        return all(isinstance(text, str) for text in entry["values"].values())
    return all(_is_relative(entry[name]) for name in ("file", "path") if name in fields)


def _is_relative(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _try_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def find_journals(folder: Path) -> list[Path]:
    """Return the journal folders in a folder and its subfolders, sorted by path."""
    files = folder.rglob(_JOURNAL_FILE)
    return sorted(file.parent for file in files if file.parent.name == JOURNAL_FOLDER)
