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
from itertools import groupby
from pathlib import Path
from typing import Any

from yolo_lightning.errors import InputError
from yolo_lightning.tracking.entries import INDEX, STATE_OPS, UNREADABLE, parse_line
from yolo_lightning.tracking.files import confine, open_file, read_text, replace_text

JOURNAL_FOLDER = "mlflow"  # name of the journal's folder in the run folder

RUN_ID_FILE = "mlflow_run_id"  # name of the file in the run folder that contains the MLflow run id

_RETRY_S = 1.0  # between attempts to write to a full disk
_MAX_BUFFER_BYTES = 2**28
_MAX_LINE_BYTES, _MAX_INDEX_BYTES = 2**24, 2**28

_Line = tuple[bytes, int]  # and the offset after it


class Journal:
    """An append-only file of JSON lines, and the files that are pending upload.

    When `append` returns, the line is on the disk, or in a file system cache that survives this
    process. If the disk is full, lines are buffered in memory, in order, and can be read, until
    they can be written. Several processes may append. Offsets count bytes.

    `update_index` describes each `PART_BYTES` of the file in a line of an index, so that a resumed
    training reads only the end of the file.
    """

    PART_BYTES = 16 * 2**20

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.write_error = ""  # why the newest line could not be written
        self._file, self._index_file = self.folder / "journal.jsonl", self.folder / "index.jsonl"
        self._uploads_file = self.folder / "uploaded.json"
        self._buffer, self._retry_at, self._indexed = bytearray(), 0.0, 0
        self._lock = threading.RLock()
        self.token = uuid.uuid4().hex  # identifies the run, in every process
        with contextlib.suppress(OSError):  # `append` says why
            self.folder.mkdir(parents=True, exist_ok=True)
            self.token = self._load_token(self.folder / "token")

    def _load_token(self, file: Path) -> str:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with contextlib.suppress(FileExistsError), open(open_file(file, flags), "w") as new:
            new.write(self.token)
        if not re.fullmatch(r"[0-9a-f]{32}\s*", read_text(file)):  # after a full disk or a crash
            replace_text(file, self.token)
        return read_text(file).strip()

    # --- writing

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append an entry. Never raises; see `write_error`."""
        line = json.dumps(entry, ensure_ascii=False, default=str).encode(errors="replace") + b"\n"
        with self._lock:
            is_full = len(self._buffer) > _MAX_BUFFER_BYTES
            self._buffer += b"" if is_full else line
            if time.monotonic() >= self._retry_at:
                self._flush()
            if is_full:
                self.write_error = f"{self.folder}: disk and buffer are full; new lines are lost"

    def _flush(self) -> None:
        self._retry_at = time.monotonic() + _RETRY_S
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = open_file(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            with open(descriptor, "rb", buffering=0) as file:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    self._write_buffer(descriptor)
                finally:
                    with contextlib.suppress(OSError):  # now, also if a worker was forked meanwhile
                        fcntl.flock(file, fcntl.LOCK_UN)
            self.write_error, self._retry_at = "", 0.0
        except OSError as error:
            reason = error.strerror or error
            self.write_error = f"{self.folder}: {reason}; lines are buffered in memory"

    def _write_buffer(self, descriptor: int) -> None:
        """Write the buffer; if only a part fits, write whole lines and raise `OSError`."""
        size = os.fstat(descriptor).st_size
        # a machine crash may have cut the last line; end it, so that the next one stays readable
        is_cut = size and os.pread(descriptor, 1, size - 1) != b"\n"
        if is_cut and not self._buffer.startswith(b"\n"):
            self._buffer[:0] = b"\n"
        written = os.write(descriptor, self._buffer)
        complete = self._buffer.rfind(b"\n", 0, written) + 1
        del self._buffer[:complete]
        if self._buffer:
            os.ftruncate(descriptor, size + complete)
            raise OSError(None, "no space for a whole line")

    def sync(self) -> None:
        """Write lines to the disk, so that they survive a loss of power."""
        with self._lock:
            if self._buffer:
                self._flush()
        with contextlib.suppress(OSError), open(open_file(self._file, os.O_RDONLY)) as lines:
            os.fsync(lines.fileno())

    # --- reading

    def entries(
        self, offset: int = 0, *ops: str, end: int = 2**63
    ) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield the entries of these operations from a byte offset on, and the offset after each.

        Without `ops`, yield all, and for lines in succession that cannot be parsed one `UNREADABLE`
        entry with their ``count`` and the first ``line``.
        """
        prefixes = tuple(f'{{"op": "{op}"'.encode() for op in ops)
        parsed = (
            (parse_line(line), line, after)
            for line, after in self._lines(offset, end)
            if line.strip() and (not prefixes or line.startswith(prefixes))
        )
        for is_unreadable, group in groupby(parsed, lambda item: item[0] is None):
            if not is_unreadable:
                yield from ((entry, after) for entry, _, after in group if entry)
            elif not prefixes:
                _, line, after = next(group)
                count = 1
                for _, _, after in group:  # noqa: B007
                    count += 1
                text = line.decode(errors="replace").strip()
                yield {"op": UNREADABLE, "line": text, "count": count}, after

    def _lines(self, offset: int, end: int) -> Iterator[_Line]:
        """Yield the lines between two offsets: of the file, then of the buffer."""
        with self._lock:  # what is written from now on is read from the buffer's copy
            size = self._size
            begin = self._buffer.rfind(b"\n", 0, max(offset - size, 0)) + 1
            buffered = bytes(self._buffer[begin : max(end - size, 0)])
        if offset < min(size, end):
            yield from _read_lines(self._file, max(offset, 0), min(size, end))
        offset = size + begin
        for line in io.BytesIO(buffered):
            offset += len(line)
            yield line, offset

    @property
    def _size(self) -> int:
        """Bytes on the disk."""
        is_regular = os.path.isfile(self._file) and not os.path.islink(self._file)
        return os.path.getsize(self._file) if is_regular else 0

    @property
    def end(self) -> int:
        """Byte offset after the newest entry."""
        with self._lock:
            return self._size + len(self._buffer)

    # --- the index

    def update_index(self) -> None:
        """Add a part to the index if enough was written since the last one. Never raises."""
        with contextlib.suppress(OSError, InputError):  # a full disk: the next time
            if self._size >= self._indexed + self.PART_BYTES:
                self._add_part()

    def _add_part(self) -> None:
        parts, end = self._parts()
        state: list[dict[str, Any]] = []
        steps: list[int] = []
        for line, end in self._lines(end, min(end + self.PART_BYTES, self._size)):  # noqa: B007, B020
            entry = parse_line(line) or {"op": ""}
            if entry["op"] in STATE_OPS:
                state.append(entry)
            elif entry["op"] in ("metrics", "image") and not entry.get("system"):
                steps.append(entry["step"])
        parts.append({
            "op": "part", "end": end, "state": state,
            "first": min(steps, default=1), "last": max(steps, default=0),
        })  # fmt: skip
        replace_text(self._index_file, "".join(json.dumps(part) + "\n" for part in parts))
        self._indexed = end

    def _parts(self) -> tuple[list[dict[str, Any]], int]:
        """Return the steps and the state entries of each part, and the offset after the last."""
        parts: list[dict[str, Any]] = []
        end, size = 0, self._size
        with contextlib.suppress(OSError):
            for line, _ in _read_lines(self._index_file, 0, _MAX_INDEX_BYTES):
                part = parse_line(line, INDEX)
                # the parts of a stranger may overlap, and would be read again and again
                if part and end + self.PART_BYTES <= part["end"] <= size:
                    parts.append(part)
                    end = part["end"]
        return parts, end

    def state(self, *ops: str) -> Iterator[dict[str, Any]]:
        """Yield all entries of some of the `STATE_OPS`, from the index as far as there is one."""
        parts, end = self._parts()
        yield from (entry for part in parts for entry in part["state"] if entry["op"] in ops)
        yield from (entry for entry, _ in self.entries(end, *ops))

    def points(self, first: int, last: int = 2**63) -> Iterator[dict[str, Any]]:
        """Yield metrics and images, at least those of the steps from `first` to `last`."""
        start = 0
        for part in [*self._parts()[0], {"end": 2**63, "first": first, "last": last}]:
            if part["last"] >= first and part["first"] <= last:
                entries = self.entries(start, "metrics", "image", end=part["end"])
                yield from (entry for entry, _ in entries)
            start = part["end"]

    # --- upload progress

    @property
    def uploads(self) -> dict[str, dict[str, Any]]:
        """The last upload to each store, as `record_upload` wrote it."""
        with contextlib.suppress(OSError):
            text = read_text(self._uploads_file)
            with contextlib.suppress(ValueError, RecursionError):
                uploads = json.loads(text)
                if isinstance(uploads, dict):
                    return {name: value for name, value in uploads.items() if _is_upload(value)}
        return {}

    def record_upload(self, store: str, run_id: str, offset: int, **extra: Any) -> None:
        """Record atomically which run of a store has the entries before `offset`.

        `store` is an address without secrets; `extra` values are recorded too.
        """
        self.sync()
        # not more than what is on the disk: another process cannot read the buffer
        upload = {"run_id": run_id, "offset": min(offset, self._size), **extra}
        replace_text(self._uploads_file, json.dumps(self.uploads | {store: upload}))

    # --- files pending upload

    def pending_path(self, name: str) -> Path:
        """Return the path of a pending file; raise `OSError` if a link leads elsewhere."""
        return confine(self.folder.parent, self.folder / "files" / name)

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
            with contextlib.suppress(OSError):
                if link:
                    os.link(source, temporary)
            if not temporary.exists():
                shutil.copyfile(source, temporary)
            with self._lock:
                temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def remove_file(self, name: str, uploaded: os.stat_result | None = None) -> None:
        """Remove a pending file or folder, unless it is newer than the `uploaded` status."""
        with contextlib.suppress(OSError), self._lock:
            path = self.pending_path(name)
            versions = {(s.st_ino, s.st_mtime_ns) for s in (path.stat(), uploaded) if s}
            if len(versions) == 1:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_upload(upload: Any) -> bool:
    if not isinstance(upload, dict) or not isinstance(upload.get("pending", []), list):
        return False
    offsets = [upload.get("offset"), *upload.get("pending", [])]
    return "run_id" in upload and all(isinstance(offset, int) for offset in offsets)


def _read_lines(path: Path, offset: int, end: int) -> Iterator[_Line]:
    """Yield the complete lines of a file between two offsets; of longer ones only the end."""
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        file.seek(offset)
        while offset < end and (line := file.readline(_MAX_LINE_BYTES)):
            offset += len(line)
            if line.endswith(b"\n"):
                yield line, offset
            elif len(line) < _MAX_LINE_BYTES:
                return  # still being written by another process


def find_journals(folder: Path) -> list[Path]:
    """Return the journal folders in a folder and its subfolders, sorted by path."""
    files = folder.rglob("journal.jsonl")
    return sorted({file.parent for file in files if file.parent.name == JOURNAL_FOLDER})
