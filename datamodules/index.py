"""The cached index of a dataset: parsed once, then memory-mapped by all workers and ranks."""

import hashlib
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.errors import printable, short

Array = NDArray[Any]

VERSION = 6  # increase it when the content changes: files of other versions are rebuilt
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

    def path(self, row: int) -> str:
        """Return the path of an image, relative to the dataset's folder, or absolute."""
        start, end = self.arrays["paths_offsets"][row : row + 2]
        return bytes(self.arrays["paths"][start:end]).decode("utf-8", "surrogateescape")

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


def keep_images(index: Index, keep: NDArray[np.bool_]) -> Index:
    """Return the index, in memory, of some images of a dataset with boxes; `keep` is (N,)."""
    counts = np.diff(index.arrays["box_offsets"])
    boxes = np.repeat(keep, counts)
    arrays = {
        **pack_strings("paths", (index.path(row) for row in np.flatnonzero(keep).tolist())),
        "sizes_wh": index.arrays["sizes_wh"][keep],
        "box_offsets": offsets(counts[keep]),
    }
    others = index.arrays.keys() - arrays.keys()
    arrays |= {name: index.arrays[name][boxes] for name in others}
    return Index(arrays, dict(index.metadata), index.watched)


def cache_file(root: Path, options: Mapping[str, Any]) -> Path | None:
    """Return where to cache the index of a dataset; None if no folder is writable.

    That is the user's cache if the dataset cannot be written, or has an index of somebody else.
    """
    # options: everything else that the index depends on, such as a split
    identity = json.dumps({"root": str(root.absolute()), **options}, sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:16] + ".index"
    folders = []
    if configured := os.environ.get(CACHE_VARIABLE):
        folders.append(Path(configured))
    # check the mode bits too: the superuser may write everywhere
    elif root.stat().st_mode & 0o222 and os.access(root, os.W_OK):
        folders.append(root / CACHE_FOLDER)
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (*folders, user_cache / "yolo-lightning"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        # a dataset's link would lead to a folder of its author's choice
        is_link = not configured and folder.is_symlink()
        file = folder / name
        if not is_link and os.access(folder, os.W_OK) and not _is_foreign(file):
            return file
    return None


def _is_foreign(file: Path) -> bool:
    """Return whether a file exists and is somebody else's."""
    return os.path.lexists(file) and not _is_trusted(os.lstat(file))


def _is_trusted(status: os.stat_result) -> bool:
    """Return whether a file is the user's or the superuser's, and no one else may write it."""
    is_writable = stat.S_ISREG(status.st_mode) and status.st_mode & 0o022
    return status.st_uid in (0, os.geteuid()) and not is_writable


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


class StaleIndex(ValueError):
    """An index of another version, or of files that have changed since."""


def load_fresh(file: Path, has_boxes: bool) -> Index | None:
    """Load an index; return None if it is missing or stale, or if it is damaged, which is printed.

    `has_boxes` is whether it should be that of a dataset with boxes.
    """
    try:
        index = load(file, check_stamps=True)
        _check_content(index, has_boxes)
    except (FileNotFoundError, StaleIndex):
        return None
    except Exception as error:  # damaged files raise many kinds
        text = printable(f"{file}: not an index ({short(str(error))}); it is built again")
        print(text, file=sys.stderr)
        return None
    return index


def load(file: Path, check_stamps: bool = False) -> Index:
    """Memory-map an index.

    Raises:
        StaleIndex: of another version, or stale if `check_stamps` is set.
        ValueError: not an index, truncated, or somebody else's.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not (stat.S_ISREG(status.st_mode) and _is_trusted(status)):
            raise ValueError("not a regular file of this user")
        mapped = np.asarray(np.memmap(stream, np.uint8, "r"))
        stream.seek(0)
        header = json.loads(_next_array(stream, mapped).tobytes())
        if header["version"] != VERSION:
            raise StaleIndex(f"{file}: version {short(header['version'])}, expected {VERSION}")
        arrays = {name: _next_array(stream, mapped) for name in header["arrays"]}
    watched, stamps = arrays.pop("watched"), arrays.pop("stamps")
    if check_stamps:
        paths = os.fsdecode(watched.tobytes()).split("\0")
        if not np.array_equal(_stamps(paths), stamps):
            raise StaleIndex(f"{file}: stale")
    return Index(arrays, header["metadata"], file=file)


_LABEL_ARRAYS = {"paths": "u1", "paths_offsets": "i8", "classes": "i4"}
_BOX_ARRAYS = {
    "sizes_wh": "i4", "box_offsets": "i8", "boxes_xyxy": "f4", "difficult": "b1", "crowd": "b1",
    "areas_px2": "f4",
}  # fmt: skip


def _check_content(index: Index, has_boxes: bool) -> None:
    """Raise `ValueError` if arrays and metadata do not fit: others may have written the file."""
    arrays, metadata = index.arrays, index.metadata
    types = _LABEL_ARRAYS | (_BOX_ARRAYS if has_boxes else {})
    if {name: array.dtype for name, array in arrays.items()} != types:
        raise ValueError(f"arrays {list(arrays)}; expected {list(types)}")
    names, texts = metadata["names"], [metadata["root"], metadata["fingerprint"]]
    lists = [names, metadata["origins"], metadata["faults"]]
    if not all(isinstance(values, list) for values in lists) or len(lists[1]) != len(names):
        raise ValueError("names, origins or faults")
    if not all(isinstance(value, str) for values in (*lists, texts) for value in values):
        raise ValueError("metadata that is no text")
    images, objects = len(arrays["paths_offsets"]) - 1, len(arrays["classes"])
    shapes: dict[str, tuple[int, ...]] = {"classes": (objects,), "paths_offsets": (images + 1,)}
    ends = {"paths_offsets": arrays["paths"].size}
    if has_boxes:
        shapes |= dict.fromkeys(("difficult", "crowd", "areas_px2"), (objects,))
        shapes |= {"sizes_wh": (images, 2), "boxes_xyxy": (objects, 4)}
        shapes["box_offsets"] = (images + 1,)
        ends["box_offsets"] = objects
        if type(metadata["normalized"]) is not bool:
            raise ValueError("normalized")
    elif objects != images:
        raise ValueError(f"{objects} labels of {images} images")
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} of shape {arrays[name].shape}; expected {shape}")
    for name, end in ends.items():
        starts = arrays[name]
        if starts[0] != 0 or starts[-1] != end or (starts[1:] < starts[:-1]).any():
            raise ValueError(f"{name} that are no offsets")
    if objects and not 0 <= arrays["classes"].min() <= arrays["classes"].max() < len(names):
        raise ValueError("classes without names")


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
