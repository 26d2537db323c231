"""The journal of a run: everything that is logged, on the local disk, before it is uploaded."""

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from yolo_lightning.tracking.entries import STATE_OPS, UNREADABLE, parse_line
from yolo_lightning.tracking.files import confine, open_file, read_text, replace_text
from yolo_lightning.tracking.segments import Line, Segment, find_segments, read_lines

JOURNAL_FOLDER = "mlflow"  # name of the journal's folder in the run folder

RUN_ID_FILE = "mlflow_run_id"  # name of the file in the run folder that contains the MLflow run id

_JOURNAL_FILE, _UPLOADS_FILE, _TOKEN_FILE = "journal.jsonl", "uploaded.json", "token"
_PENDING_FOLDER = "files"
_RETRY_S = 1.0  # between attempts to write a buffer of more than one chunk
_CHUNK_BYTES = 2**16  # written, or copied from the buffer, at once
_MAX_BUFFER_BYTES = 2**29
_MAX_OPEN_ATTEMPTS = 20


class Journal:
    """An append-only file of JSON lines, and the files that are pending upload.

    When `append` returns, the line is on the disk, or in a file system cache that survives this
    process. If the disk is full, lines are buffered in memory, in order, and can be read, until
    they can be written. Several processes may append. Offsets count bytes from the first line.

    After `SEGMENT_BYTES` the file is closed and a new one begins; `compress` compresses the closed
    ones. With their indices, a resumed training reads only the last lines.
    """

    SEGMENT_BYTES = 16 * 2**20

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.write_error = ""  # why the newest line could not be written
        self._file = self.folder / _JOURNAL_FILE
        self._buffer, self._retry_at = bytearray(), 0.0
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
            self.write_error = (
                f"{self.folder}: {error.strerror or error}; lines are buffered in memory"
            )

    def _load_token(self) -> str:
        file = self.folder / _TOKEN_FILE
        with contextlib.suppress(FileExistsError):
            descriptor = open_file(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            with open(descriptor, "w", encoding="utf-8") as new:
                new.write(self.token)
        if not _is_token(read_text(file)):  # after a full disk or a crash
            replace_text(file, self.token)
        return read_text(file).strip()

    # --- writing

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append an entry. Never raises; see `write_error`."""
        line = json.dumps(entry, ensure_ascii=False, default=str).encode(errors="replace") + b"\n"
        with self._lock:
            if len(self._buffer) + len(line) > _MAX_BUFFER_BYTES:
                self.write_error = f"{self.folder}: disk and buffer are full; new lines are lost"
                return
            self._buffer += line
            if len(self._buffer) > _CHUNK_BYTES and time.monotonic() < self._retry_at:
                return
            self.write_error = ""
            with self._store_write_error():
                while self._buffer:
                    self._write_chunk()
            self._retry_at = time.monotonic() + _RETRY_S if self._buffer else 0.0

    def _write_chunk(self) -> None:
        """Write whole lines of the buffer; truncate the file again if only a part fits."""
        end = self._buffer.rfind(b"\n", 0, _CHUNK_BYTES) + 1 or self._buffer.find(b"\n") + 1
        descriptor = self._open_locked()
        try:
            before = os.fstat(descriptor).st_size
            # a machine crash may have cut the last line; end it, so that this line stays readable
            incomplete = before and os.pread(descriptor, 1, before - 1) != b"\n"
            lines = b"\n" * bool(incomplete) + bytes(self._buffer[:end])
            written = os.write(descriptor, lines)
            if written < len(lines):
                if os.fstat(descriptor).st_size == before + written:
                    os.ftruncate(descriptor, before)
                raise OSError(None, "no space for a whole line")
            del self._buffer[:end]
            if before + written > self.SEGMENT_BYTES:
                self._close_segment(descriptor)
        finally:
            with contextlib.suppress(OSError):  # now, also if a worker was forked meanwhile
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _open_locked(self) -> int:
        """Open the journal, locked: its holder alone may truncate it or close the segment."""
        for _ in range(_MAX_OPEN_ATTEMPTS):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = open_file(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if self._is_current(descriptor):
                return descriptor
            os.close(descriptor)
        raise OSError(None, "replaced again and again")

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._file))
        except OSError:
            return False

    def _close_segment(self, descriptor: int) -> None:
        with contextlib.suppress(OSError):  # a file system without locks: never
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_current(descriptor):
                start = self._closed_bytes
                segment = Segment(start, start + os.fstat(descriptor).st_size, self.folder)
                self._file.rename(segment.file)

    def compress(self) -> None:
        """Compress the closed segments; does nothing on a full disk."""
        with contextlib.suppress(OSError):
            for segment in find_segments(self.folder):
                segment.compress()

    def sync(self) -> None:
        """Flush written lines to the disk, so that they survive a loss of power."""
        for file in (self._file, *(segment.file for segment in find_segments(self.folder))):
            with contextlib.suppress(OSError), open(open_file(file, os.O_RDONLY), "rb") as lines:
                os.fsync(lines.fileno())

    # --- reading

    def entries(
        self, offset: int = 0, *ops: str, end: int | None = None
    ) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the entries of these operations from a byte offset on, and the offset after each.

        Without `ops`, yield all, and `UNREADABLE` entries with the ``line`` that cannot be parsed.
        """
        prefixes = tuple(f'{{"op": "{op}"'.encode() for op in ops)
        for line, after in self._lines(offset, self.end if end is None else end):
            if not line.strip() or (prefixes and not line.startswith(prefixes)):
                continue
            entry = parse_line(line)
            if entry is not None:
                yield entry, after
            elif not prefixes:
                yield {"op": UNREADABLE, "line": line.decode(errors="replace").strip()}, after

    def state(self, *ops: str) -> Iterator[dict[str, Any]]:
        """Yield all entries of some of the `STATE_OPS`, from the indices where there are some."""
        assert set(ops) <= set(STATE_OPS)
        end = 0
        for segment in find_segments(self.folder):
            if index := segment.index():
                yield from (entry for entry in index[1] if entry["op"] in ops)
            else:
                yield from (
                    entry for entry, _ in self.entries(segment.start, *ops, end=segment.end)
                )
            end = segment.end
        yield from (entry for entry, _ in self.entries(end, *ops))

    def points(self, first: int, last: int = 2**63) -> Iterator[dict[str, Any]]:
        """Yield metrics and images, at least those of the steps from `first` to `last`.

        Of the rest there is one entry for the last of the ``system`` metrics.
        """
        ops, end = ("metrics", "image"), 0
        for segment in find_segments(self.folder):
            steps = (segment.index() or ({},))[0]
            if steps and (steps["last"] < first or steps["first"] > last):
                yield {"op": "metrics", "system": True, "step": steps["system_step"], "values": {}}
            else:
                yield from (
                    entry for entry, _ in self.entries(segment.start, *ops, end=segment.end)
                )
            end = segment.end
        yield from (entry for entry, _ in self.entries(end, *ops))

    def _lines(self, offset: int, end: int) -> Iterator[Line]:
        """Yield the lines between two offsets; one file, or a part of the buffer, at a time."""
        before = -1
        while before < offset < end:
            before = offset
            for line, offset in self._part(offset):  # noqa: B020
                yield line, offset
                if offset >= end:
                    return

    def _part(self, offset: int) -> Iterator[Line]:
        with self._lock:
            file, start = self._open_current()
            size = file.seek(0, os.SEEK_END)
            begin = self._buffer.rfind(b"\n", 0, max(offset - start - size, 0)) + 1
            end = self._buffer.find(b"\n", begin + _CHUNK_BYTES) + 1 or len(self._buffer)
            buffered = bytes(self._buffer[begin:end])
        with file:
            if offset < start:
                segment = next(s for s in find_segments(self.folder) if s.end > offset)
                yield from segment.lines(offset)
                return
            if offset < start + size:
                yield from read_lines(file, start, offset, start + size)
        offset = start + size + begin
        for line in buffered.splitlines(keepends=True):
            offset += len(line)
            yield line, offset

    def _open_current(self) -> tuple[IO[bytes], int]:
        """Return the newest file and the offset of its first byte; an empty file without one."""
        while True:
            start = self._closed_bytes
            file: IO[bytes] = io.BytesIO()
            with contextlib.suppress(OSError):
                file = open(open_file(self._file, os.O_RDONLY), "rb")  # noqa: SIM115
            if self._closed_bytes == start:  # else another process closed the segment meanwhile
                return file, start
            file.close()

    @property
    def _closed_bytes(self) -> int:
        return max((segment.end for segment in find_segments(self.folder)), default=0)

    @property
    def _bytes_on_disk(self) -> int:
        file, start = self._open_current()
        with file:
            return start + file.seek(0, os.SEEK_END)

    @property
    def end(self) -> int:
        """Byte offset after the newest entry."""
        with self._lock:
            return self._bytes_on_disk + len(self._buffer)

    # --- upload progress

    @property
    def uploads(self) -> dict[str, dict[str, Any]]:
        """The last upload to each store, as `record_upload` wrote it."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            uploads = json.loads(read_text(self.folder / _UPLOADS_FILE))
            if isinstance(uploads, dict):
                return {store: upload for store, upload in uploads.items() if _is_upload(upload)}
        return {}

    def record_upload(self, store: str, run_id: str, offset: int, **extra: Any) -> None:
        """Record atomically which run of a store has the entries before `offset`.

        `store` is an address without secrets; `extra` values are recorded too.
        """
        self.sync()
        # not more than what is on the disk: another process cannot read the buffer
        upload = {"run_id": run_id, "offset": min(offset, self._bytes_on_disk), **extra}
        replace_text(self.folder / _UPLOADS_FILE, json.dumps(self.uploads | {store: upload}))

    # --- files pending upload

    def pending_path(self, name: str) -> Path:
        """Return the path of a pending file; raise `OSError` if a link leads elsewhere."""
        return confine(self.folder.parent, self.folder / _PENDING_FOLDER / name)

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
        with contextlib.suppress(OSError):
            path = self.pending_path(name)
            removed = path.with_name(path.name + ".gone")
            with self._lock:
                current = path.stat()
                if uploaded is not None and (current.st_ino, current.st_mtime_ns) != (
                    uploaded.st_ino, uploaded.st_mtime_ns,
                ):  # fmt: skip
                    return
                path.replace(removed)
            shutil.rmtree(removed) if removed.is_dir() else removed.unlink()


def _is_token(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{32}\s*", text))


def _is_upload(upload: Any) -> bool:
    return (
        isinstance(upload, dict)
        and {"run_id", "offset"} <= upload.keys()
        and isinstance(upload["offset"], int)
        and isinstance(upload.get("deferred", []), list)
        and all(isinstance(offset, int) for offset in upload.get("deferred", []))
        and isinstance(upload.get("system_step_offset", 0), int)
    )


def _try_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def find_journals(folder: Path) -> list[Path]:
    """Return the journal folders in a folder and its subfolders, sorted by path."""
    files = folder.rglob("journal*.jsonl*")
    return sorted({file.parent for file in files if file.parent.name == JOURNAL_FOLDER})
