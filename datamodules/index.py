"""What a source knows about its images: arrays, parsed once, kept in a file, memory-mapped.

Loader workers and ranks map the same file, so a source costs each of them next to nothing however
many images it has.
"""

import hashlib
import json
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

VERSION = 2
"""Raised whenever what an index holds changes; older files are made anew."""

CACHE_VARIABLE = "YOLO_LIGHTNING_CACHE"
"""Environment variable: a folder for all indices, instead of one beside each dataset."""

CACHE_FOLDER = ".yolo_lightning"

_MAGIC = b"yolo-lightning index\n"
_ALIGNMENT = 64


class Index:
    """Arrays and plain values of a source.

    Args:
        arrays: by name.
        facts: whatever JSON holds, such as the names of classes.
        file: where it is kept; what is handed to a worker process is this path alone.
    """

    def __init__(
        self, arrays: Mapping[str, Array], facts: Mapping[str, Any], file: Path | None = None
    ) -> None:
        self.arrays, self.facts, self.file = dict(arrays), dict(facts), file

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def text(self, name: str, number: int) -> str:
        """Return one of the texts that `pack` put under this name."""
        first, last = self.arrays[f"{name}_at"][number : number + 2]
        return bytes(self.arrays[name][first:last]).decode("utf-8", "surrogateescape")

    def __getstate__(self) -> dict[str, Any]:
        if self.file is None:
            return self.__dict__
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "arrays" not in state:
            self.__dict__.update(load(state["file"]).__dict__)


@dataclass
class Parsed:
    """What parsing a dataset gave.

    Attributes:
        index: its arrays and facts.
        watched: files and folders that were read; the index is stale once one of them changes.
    """

    index: Index
    watched: list[Path] = field(default_factory=list)


def pack(name: str, texts: Iterable[str]) -> dict[str, Array]:
    """Return texts as two arrays: all bytes one after the other, and where each begins."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    at = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in encoded], out=at[1:])
    return {name: np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{name}_at": at}


def cached(root: Path, key: Mapping[str, Any], parse: Callable[[], Parsed]) -> Index:
    """Return the index of a dataset: the kept one where nothing has changed, else a fresh one.

    Args:
        root: the dataset's folder; the index is kept below it, or in the user's cache folder where
            it is read-only.
        key: all else that the index depends on, such as a split.
        parse: reads the dataset.
    """
    identity = json.dumps({"root": str(root.absolute()), **key}, sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:16] + ".index"
    folder = _cache_folder(root)
    if folder is None:
        return parse().index
    kept = _load_fresh(folder / name)
    if kept is not None:
        return kept
    started = time.time_ns()
    parsed = parse()
    watched = [str(path) for path in parsed.watched]
    arrays = {
        **parsed.index.arrays,
        **pack("watched", watched),
        "stamps": np.array([_stamp(path, started) for path in watched], np.int64).reshape(-1, 2),
    }
    try:
        save(folder / name, Index(arrays, parsed.index.facts))
    except OSError:
        return parsed.index  # no room for it: this run goes on without
    return load(folder / name)


def _cache_folder(root: Path) -> Path | None:
    """Return a folder that can be written: the one asked for, beside the data, or the user's."""
    asked = os.environ.get(CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    places = [Path(asked)] if asked else [Path(home) / "yolo-lightning"]
    # not for write permission alone: the superuser has it everywhere
    if not asked and root.stat().st_mode & 0o222 and os.access(root, os.W_OK):
        places.insert(0, root / CACHE_FOLDER)
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        return place
    return None


def _stamp(path: str, before_ns: int | None = None) -> tuple[int, int]:
    """Return size and time of the last change, -1 where there is nothing.

    What was changed after `before_ns`, while it was being read, gets a stamp that nothing has.
    """
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    if before_ns is not None and found.st_mtime_ns > before_ns:
        return -2, -2
    return found.st_size, found.st_mtime_ns


def _load_fresh(file: Path) -> Index | None:
    """Return a kept index; None where it is missing, broken, of another version, or stale."""
    try:
        index = load(file)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    stamps = index["stamps"].tolist()
    fresh = all(list(_stamp(index.text("watched", k))) == stamp for k, stamp in enumerate(stamps))
    return index if fresh else None


def save(file: Path, index: Index) -> None:
    """Write an index beside its place, then move it there: whoever reads sees all of it or none."""
    places, at = {}, 0
    for name, array in index.arrays.items():
        places[name] = [at, str(array.dtype), list(array.shape)]
        at += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    head = json.dumps({"version": VERSION, "places": places, "facts": index.facts, "end": at})
    packed = head.encode("utf-8", "surrogateescape")
    handle, fresh = tempfile.mkstemp(dir=file.parent, suffix=".fresh")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(_MAGIC + struct.pack("<q", len(packed)) + packed)
            out.write(b"\0" * (-out.tell() % _ALIGNMENT))
            for array in index.arrays.values():
                out.write(np.ascontiguousarray(array).data)
                out.write(b"\0" * (-array.nbytes % _ALIGNMENT))
        os.chmod(fresh, 0o644)
        os.replace(fresh, file)
    finally:
        Path(fresh).unlink(missing_ok=True)


def load(file: Path) -> Index:
    """Map an index.

    Raises:
        OSError: it is missing.
        ValueError: it is no index, of another version, or cut off.
    """
    with file.open("rb") as source:
        if source.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{file}: not an index")
        length = source.read(8)
        if len(length) < 8:
            raise ValueError(f"{file}: cut off")
        head_length = struct.unpack("<q", length)[0]
        if not 0 < head_length <= file.stat().st_size:
            raise ValueError(f"{file}: cut off")
        head = json.loads(source.read(head_length))
        start = -(-source.tell() // _ALIGNMENT) * _ALIGNMENT
    if head["version"] != VERSION:
        raise ValueError(f"{file}: of version {head['version']}")
    if file.stat().st_size != start + head["end"]:
        raise ValueError(f"{file}: cut off")
    arrays: dict[str, Array] = {}
    mapped: Sequence[Any] | NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r")
    for name, (at, kind, shape) in head["places"].items():
        dtype = np.dtype(kind)
        size = int(np.prod(shape)) * dtype.itemsize
        arrays[name] = np.asarray(mapped[start + at : start + at + size]).view(dtype).reshape(shape)
    return Index(arrays, head["facts"], file)
