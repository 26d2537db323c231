"""The cached index of a dataset: parsed once, then memory-mapped by all workers and ranks."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

VERSION = 5  # increase it when the content changes: files of other versions are rebuilt
# environment variable: one folder for all indices, instead of a folder in each dataset
CACHE_VARIABLE = "YOLO_LIGHTNING_CACHE"
CACHE_FOLDER = ".yolo_lightning"

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
    encoded = [encode(string) for string in strings]
    lengths = np.array([len(string) for string in encoded], np.int64)
    packed = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    return {name: packed, f"{name}_offsets": offsets(lengths)}


def encode(string: str) -> bytes:
    """Return a string, such as the name of a file that is not UTF-8, as bytes."""
    return string.encode("utf-8", "surrogateescape")


def offsets(lengths: Array) -> NDArray[np.int64]:
    """Return where each of N parts starts, and the end, (N + 1)."""
    result = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=result[1:])
    return result


def cache_file(root: Path, options: Mapping[str, Any]) -> Path | None:
    """Return where to cache the index of a dataset; None if no folder is writable."""
    # options: everything else that the index depends on, such as a split
    identity = json.dumps({"root": str(root.absolute()), **options}, sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:16] + ".index"
    if configured := os.environ.get(CACHE_VARIABLE):
        folder = Path(configured)
    # check the mode bits too: the superuser may write everywhere
    elif root.stat().st_mode & 0o222 and os.access(root, os.W_OK):
        folder = root / CACHE_FOLDER
    else:
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = user_cache / "yolo-lightning"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / name


def save(index: Index, file: Path, parsing_since_ns: int) -> Index:
    """Save a new index and return it memory-mapped, or unchanged if it cannot be written."""
    watched = [str(path) for path in index.watched]
    stamps = _stamps(watched)
    stamps[stamps[:, 1] > parsing_since_ns] = -2  # changed while it was parsed: never matches
    paths = np.frombuffer(os.fsencode("\0".join(watched)), np.uint8)
    try:
        _write(file, {**index.arrays, "watched": paths, "stamps": stamps}, index.metadata)
    except OSError:
        return index
    return load(file)


def load_fresh(file: Path) -> Index | None:
    """Load an index; return None if it is missing, damaged, of another version, or stale."""
    try:
        return load(file, check_stamps=True)
    except Exception:  # damaged files raise many kinds
        return None


def load(file: Path, check_stamps: bool = False) -> Index:
    """Memory-map an index.

    Raises:
        ValueError: not an index, of another version, truncated, or stale if `check_stamps` is set.
    """
    mapped = np.asarray(np.memmap(file, np.uint8, "r"))
    with file.open("rb") as stream:
        header = json.loads(_next_array(stream, mapped).tobytes())
        if header["version"] != VERSION:
            raise ValueError(f"{file}: version {header['version']}, expected {VERSION}")
        arrays = {name: _next_array(stream, mapped) for name in header["arrays"]}
    watched, stamps = arrays.pop("watched"), arrays.pop("stamps")
    if check_stamps:
        paths = os.fsdecode(watched.tobytes()).split("\0")
        if not np.array_equal(_stamps(paths), stamps):
            raise ValueError(f"{file}: stale")
    return Index(arrays, header["metadata"], file=file)


def _stamps(paths: Sequence[str]) -> NDArray[np.int64]:
    """Return size and modification time (ns) of each path, (N, 2); -1 if it is missing."""
    stamps = np.full((len(paths), 2), -1, np.int64)
    for row, path in enumerate(paths):
        with suppress(OSError):
            status = os.stat(path)
            stamps[row] = status.st_size, status.st_mtime_ns
    return stamps


def _write(file: Path, arrays: Mapping[str, Array], metadata: Mapping[str, Any]) -> None:
    """Write a JSON header and the arrays, each in the format of `.npy` files, to one file."""
    values = {"version": VERSION, "arrays": list(arrays), "metadata": metadata}
    header = np.frombuffer(json.dumps(values).encode(), np.uint8)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            for array in (header, *arrays.values()):
                stream.write(bytes(-stream.tell() % _ALIGNMENT))
                np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)  # other ranks may write the same index
    finally:
        Path(temporary).unlink(missing_ok=True)


def _next_array(stream: IO[bytes], mapped: Array) -> Array:
    """Return the array at the position of the stream in the mapped file; move to its end."""
    stream.seek(-stream.tell() % _ALIGNMENT, os.SEEK_CUR)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:  # would be read as addresses
        raise ValueError("contains Python objects")
    start = stream.tell()
    stream.seek(dtype.itemsize * math.prod(shape), os.SEEK_CUR)
    return mapped[start : stream.tell()].view(dtype).reshape(shape)
