"""The cached index of a dataset: parsed once, then memory-mapped by all workers and ranks."""

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

VERSION = 3  # increase it when the content changes: files of other versions are rebuilt
# environment variable: one folder for all indices, instead of a folder in each dataset
CACHE_VARIABLE = "YOLO_LIGHTNING_CACHE"
CACHE_FOLDER = ".yolo_lightning"

_MAGIC = b"yolo-lightning index\n"
_ALIGNMENT = 64


@dataclass(eq=False)
class Index:
    """Arrays and metadata of a parsed dataset."""

    arrays: dict[str, Array]
    metadata: dict[str, Any]  # values that JSON can store, such as class names
    # files and folders that were parsed: the index is stale when one of them changes
    watched: list[Path] = field(default_factory=list)
    file: Path | None = None

    def __getstate__(self) -> dict[str, Any]:
        # loaded arrays are read-only views of the cache file: its path is enough
        return self.__dict__ if self.file is None else {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state if "arrays" in state else load(state["file"]).__dict__)


def pack_strings(name: str, strings: Iterable[str]) -> dict[str, Array]:
    """Return strings as two arrays: their UTF-8 bytes, and the offset of each (N + 1)."""
    encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(string) for string in encoded], out=offsets[1:])
    return {name: np.frombuffer(b"".join(encoded), dtype=np.uint8), f"{name}_offsets": offsets}


def cache_file(root: Path, options: Mapping[str, Any]) -> Path | None:
    """Return where to cache the index of a dataset; None if no folder is writable."""
    # options: everything else that the index depends on, such as a split
    identity = json.dumps({"root": str(root.absolute()), **options}, sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:16] + ".index"
    folder = _cache_folder(root)
    return None if folder is None else folder / name


def _cache_folder(root: Path) -> Path | None:
    configured = os.environ.get(CACHE_VARIABLE)
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folders = [Path(configured)] if configured else [user_cache / "yolo-lightning"]
    # check the mode bits too: the superuser may write everywhere
    if not configured and root.stat().st_mode & 0o222 and os.access(root, os.W_OK):
        folders.insert(0, root / CACHE_FOLDER)
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        return folder
    return None


def _stamp(path: str, parsing_since_ns: int | None = None) -> tuple[int, int]:
    """Return size and modification time; (-1, -1) if the path is missing."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    if parsing_since_ns is not None and status.st_mtime_ns > parsing_since_ns:
        return -2, -2  # changed while it was parsed: never matches
    return status.st_size, status.st_mtime_ns


def load_fresh(file: Path) -> Index | None:
    """Load an index; return None if it is missing, damaged, of another version, or stale."""
    try:
        index = load(file)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    data = bytes(index.arrays["watched"])
    spans = pairwise(index.arrays["watched_offsets"].tolist())
    watched = (data[start:end].decode("utf-8", "surrogateescape") for start, end in spans)
    stamps = index.arrays["stamps"].tolist()
    fresh = all(list(_stamp(path)) == stamp for path, stamp in zip(watched, stamps, strict=True))
    return index if fresh else None


def save(index: Index, file: Path, parsing_since_ns: int) -> Index:
    """Save a new index and return it memory-mapped, or unchanged if it cannot be written."""
    # paths that changed after `parsing_since_ns` make the index stale
    watched = [str(path) for path in index.watched]
    stamps = np.array([_stamp(path, parsing_since_ns) for path in watched], np.int64)
    arrays = {**index.arrays, **pack_strings("watched", watched), "stamps": stamps.reshape(-1, 2)}
    try:
        _write(file, arrays, index.metadata)
    except OSError:
        return index
    return load(file)


def _write(file: Path, arrays: Mapping[str, Array], metadata: Mapping[str, Any]) -> None:
    """Write a JSON header and the arrays, each at a multiple of 64 bytes."""
    layout: dict[str, list[Any]] = {}
    end = 0
    for name, array in arrays.items():
        layout[name] = [end, str(array.dtype), list(array.shape)]
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    values = {"version": VERSION, "layout": layout, "metadata": metadata, "end": end}
    header = json.dumps(values).encode("utf-8", "surrogateescape")
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(_MAGIC + struct.pack("<q", len(header)) + header)
            out.write(b"\0" * (-out.tell() % _ALIGNMENT))
            for array in arrays.values():
                out.write(np.ascontiguousarray(array).data)
                out.write(b"\0" * (-array.nbytes % _ALIGNMENT))
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(file: Path) -> Index:
    """Memory-map an index.

    Raises:
        ValueError: not an index, of another version, or truncated.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{file}: not an index")
        length = stream.read(8)
        header_length = struct.unpack("<q", length)[0] if len(length) == 8 else 0
        if not 0 < header_length <= size:
            raise ValueError(f"{file}: truncated")
        header = json.loads(stream.read(header_length))
        start = -(-stream.tell() // _ALIGNMENT) * _ALIGNMENT
    if header["version"] != VERSION:
        raise ValueError(f"{file}: version {header['version']}, expected {VERSION}")
    if size != start + header["end"]:
        raise ValueError(f"{file}: truncated")
    mapped = np.memmap(file, dtype=np.uint8, mode="r")
    arrays: dict[str, Array] = {}
    for name, (offset, dtype, shape) in header["layout"].items():
        length_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = mapped[start + offset : start + offset + length_bytes]
        arrays[name] = np.asarray(data).view(dtype).reshape(shape)
    return Index(arrays, header["metadata"], file=file)
