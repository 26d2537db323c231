"""Closed parts of a journal: compressed, with an index of what resuming needs."""

import contextlib
import fcntl
import gzip
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from yolo_lightning.tracking.entries import STATE_OPS, parse_line
from yolo_lightning.tracking.files import open_file

_NAME = re.compile(r"journal-(\d{15})-(\d{15})\.jsonl(?:\.gz)?")
_MAX_LINE_BYTES = 16 * 2**20
_MAX_SEGMENT_BYTES = 2**28  # more than a journal writes: a small file may decompress to terabytes

Line = tuple[bytes, int]  # and the offset after it


@dataclass(frozen=True, order=True)
class Segment:
    """The lines from one byte offset of a journal to another, in a file with these in its name."""

    start: int
    end: int
    folder: Path

    @property
    def file(self) -> Path:
        """The file before it is compressed."""
        return self.folder / f"journal-{self.start:015}-{self.end:015}.jsonl"

    @property
    def _compressed(self) -> Path:
        return self.file.with_suffix(".jsonl.gz")

    @property
    def _index(self) -> Path:
        return self.file.with_suffix(".index")

    def lines(self, offset: int) -> Iterator[Line]:
        """Yield the lines after an offset; a damaged file ends with a line that says so."""
        try:
            with self._open() as file:
                yield from read_lines(file, self.start, max(offset, self.start), self.end)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield f"damaged: {self._compressed.name}".encode(), self.end
        yield b"", self.end

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        try:
            file = open(open_file(self.file, os.O_RDONLY), "rb")  # noqa: SIM115
        except FileNotFoundError:  # compressed, perhaps just now
            compressed = open(open_file(self._compressed, os.O_RDONLY), "rb")  # noqa: SIM115
            with compressed, gzip.GzipFile(fileobj=compressed) as lines:
                yield lines  # type: ignore[misc]
        else:
            with file:
                yield file

    def compress(self) -> None:
        """Compress the file, and write its index; does nothing if that is done.

        Raises:
            OSError: the disk is full, or another process is compressing it.
        """
        if not self.file.exists():
            return
        with self._open() as source:
            fcntl.flock(source, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.file.exists():  # not compressed meanwhile
                self._write_index()
                _write(self._compressed, lambda file: _copy_compressed(source, file))
                self.file.unlink()

    def _write_index(self) -> None:
        state: list[bytes] = []
        steps: list[int] = []
        system_step = -1
        for line, _ in self.lines(self.start):
            entry = parse_line(line) or {"op": ""}
            if entry["op"] in STATE_OPS:
                state.append(line)
            elif entry.get("system"):
                system_step = max(system_step, entry["step"])
            elif entry["op"] in ("metrics", "image"):
                steps.append(entry["step"])
        summary = {"first": min(steps, default=0), "last": max(steps, default=-1)}
        head = json.dumps(summary | {"system_step": system_step}).encode() + b"\n"
        _write(self._index, lambda file: file.writelines([head, *state]))

    def index(self) -> tuple[dict[str, int], list[dict[str, Any]]] | None:
        """Return the steps that the segment has, and its state entries; None without an index.

        The steps are ``first``, ``last``, of metrics and images, and ``system_step``, the last one.
        """
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            with open(open_file(self._index, os.O_RDONLY), "rb") as file:
                summary = json.loads(file.readline(_MAX_LINE_BYTES))
                state = [parse_line(line) for line, _ in read_lines(file, 0, file.tell())]
            if all(isinstance(summary[key], int) for key in ("first", "last", "system_step")):
                return summary, [entry for entry in state if entry is not None]
        return None


def find_segments(folder: Path) -> list[Segment]:
    """Return the closed segments of a journal in their order; not those that no journal writes."""
    segments: set[Segment] = set()
    with contextlib.suppress(OSError), os.scandir(folder) as files:
        for file in files:
            match = _NAME.fullmatch(file.name)
            if match and file.is_file(follow_symlinks=False):
                segments.add(Segment(int(match[1]), int(match[2]), folder))
    return sorted(s for s in segments if 0 < s.end - s.start <= _MAX_SEGMENT_BYTES)


def read_lines(file: IO[bytes], start: int, offset: int, end: int = 2**63) -> Iterator[Line]:
    """Yield the complete lines of a file that begins at `start`; of longer ones only the end."""
    file.seek(offset - start)
    while offset < end and (line := file.readline(_MAX_LINE_BYTES)):
        offset += len(line)
        if line.endswith(b"\n"):
            yield line, offset
        elif len(line) < _MAX_LINE_BYTES:
            return  # still being written by another process


def _write(path: Path, write: Any) -> None:
    temporary = path.with_name(f"{path.name}.part")
    try:
        with open(open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _copy_compressed(source: IO[bytes], target: IO[bytes]) -> None:
    with gzip.GzipFile(fileobj=target, mode="wb", compresslevel=1) as compressed:
        shutil.copyfileobj(source, compressed)
