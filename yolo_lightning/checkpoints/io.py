"""Durable writing and safe reading of checkpoint files."""

import contextlib
import copy
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from yolo_lightning.errors import InputError, expand, require_file

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
PARTIAL_SUFFIX = ".part"  # of a temporary file that is being written
MAX_OPERATIONS = 2_000_000  # of a pickle, and values in it; a tree of 82,115 nodes needs 820,000

_MAX_REPEATED = 300_000  # values that occur before; a tree of 100,000 nodes has 200,000
_MAX_PICKLE_BYTES = 16 << 20
_MAX_DIRECTORY_BYTES = 8 << 20
_MAX_BUILDS = 8
_MAX_LEVELS = 50

# module and name of the globals in a pickle of plain values and tensors
_ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)"
    r"|torch \w+Storage|torch.storage UntypedStorage"
)


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint durably: to a temporary file in the same folder, fsync, rename.

    After an error, the target is unchanged and the temporary file is removed.

    Raises:
        OSError: the disk is full or fails.
        InputError: a value could not be read back with ``weights_only=True``.
    """
    target = Path(path)
    temporary = target.with_name(target.name + PARTIAL_SUFFIX)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            _save(checkpoint, handle)
            handle.flush()
            os.fsync(handle.fileno())
        with zipfile.ZipFile(temporary) as archive:
            _check_pickle(_pickle_of(archive))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _save(checkpoint: dict[str, Any], handle: Any) -> None:
    """Call `torch.save`; raise the `OSError` that PyTorch hides behind a `RuntimeError`."""
    try:
        torch.save(checkpoint, handle)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None


def _sync_folder(folder: Path) -> None:
    """Fsync a folder, so that a rename in it is durable, if the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rotate(new: Path, last: Path) -> None:
    """Rotate checkpoints: last → previous, new → last; `last` exists at every moment."""
    previous = last.with_name(PREVIOUS)
    link = previous.with_name(previous.name + PARTIAL_SUFFIX)
    if last.is_file():
        try:
            link.unlink(missing_ok=True)
            os.link(last, link)
            os.replace(link, previous)
        except OSError:
            os.replace(last, previous)  # without hard links, only `previous` exists for a moment
        finally:
            with contextlib.suppress(OSError):
                link.unlink(missing_ok=True)  # replacing a hard link of the same file keeps both
    os.replace(new, last)
    _sync_folder(last.parent)


def verify(path: str | Path) -> None:
    """Read a checkpoint file to its end and check archive, CRC-32 checksums and pickle.

    Nothing is executed, and no more memory is needed than the size of the pickle.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint.
    """
    file = require_file(path, "checkpoint")
    try:
        with file.open("rb") as handle:
            if handle.read(4) != b"PK\x03\x04":
                raise InputError("not a checkpoint of this program (no archive)")
            size = handle.seek(0, os.SEEK_END)
            _check_directory(handle, size)
            with zipfile.ZipFile(handle) as archive:
                _check_records(archive, size)
                _check_pickle(_pickle_of(archive))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise InputError(f"{path}: damaged ({_reason(error)})") from None


def load_file(path: str | Path) -> dict[str, Any]:
    """Verify a checkpoint file, load it on the CPU, and check its values."""
    verify(path)
    try:
        content: dict[str, Any] = torch.load(expand(path), map_location="cpu", weights_only=True)
        _check_values(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path}: not a checkpoint of this program ({_reason(error)})") from None
    return content


def _reason(error: Exception) -> str:
    """Return the first line of an error, without PyTorch's advice on `weights_only`."""
    first = (str(error).splitlines() or [""])[0].strip()
    if not first or first.startswith("Weights only load failed"):
        return f"its pickle is malformed: {type(error).__name__}"
    return first[:200]


def _check_directory(handle: BinaryIO, size: int) -> None:
    """Check that the archive ends with its directory, where `zipfile` and PyTorch look for it."""
    handle.seek(max(0, size - 98))
    # the first two exist in Zip64 archives only, which PyTorch writes
    record, locator, end = struct.unpack("56s20s22s", handle.read().rjust(98, b"\0"))
    length, start, comment = struct.unpack_from("<LLH", end, 12)
    is_valid, directory_end = end.startswith(b"PK\x05\x06") and not comment, size - 22
    if locator.startswith(b"PK\x06\x07"):
        directory_end = size - 98
        length, start = struct.unpack_from("<QQ", record, 40)
        is_valid &= record.startswith(b"PK\x06\x06")
        is_valid &= struct.unpack_from("<Q", locator, 8) == (directory_end,)
    if not is_valid or start + length != directory_end:
        raise InputError("damaged (truncated, or followed by other data)")
    if length > _MAX_DIRECTORY_BYTES:
        raise InputError(f"a directory of {length:,} bytes; allowed: {_MAX_DIRECTORY_BYTES:,}")


def _check_records(archive: zipfile.ZipFile, size: int) -> None:
    """Check that records are uncompressed, unique, and equal to their checksums."""
    records = archive.infolist()
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise InputError(f"record {record.filename[:60]!r} is compressed; allowed: stored")
    if len({record.orig_filename.lower() for record in records}) < len(records):
        raise InputError("duplicate records")
    total = sum(record.file_size for record in records)
    if total > size:
        raise InputError(f"records of {total:,} bytes in a file of {size:,}")
    for record in records:
        with archive.open(record) as stream:
            while stream.read(1 << 20):  # the end of the stream checks the CRC-32
                pass


def _pickle_of(archive: zipfile.ZipFile) -> bytes:
    """Return the pickle, which contains everything except the data of the tensors."""
    # PyTorch ignores case, and uses the names in the directory, which `zipfile` may replace
    records = [one for one in archive.infolist() if one.orig_filename.lower().endswith("/data.pkl")]
    if len(records) != 1:
        raise InputError(f"not a checkpoint of this program ({len(records)} records data.pkl)")
    size = records[0].file_size
    if size > _MAX_PICKLE_BYTES:
        raise InputError(f"a pickle of {size:,} bytes; allowed: {_MAX_PICKLE_BYTES:,}")
    return archive.read(records[0])


def _check_pickle(pickled: bytes) -> None:
    """Check, without executing it, that a pickle only creates plain values and tensors."""
    # operations are limited, since one byte can create an object of 200 bytes; calls may not take
    # arguments that could be copied repeatedly
    builds, repeated, previous = 0, 0, ("", "")
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
        name = operation.name
        if number >= MAX_OPERATIONS:
            raise InputError(f"a pickle of more than {MAX_OPERATIONS:,} operations")
        repeated += name in ("BINGET", "LONG_BINGET")
        if repeated > _MAX_REPEATED:  # such as a million anchors in a small file
            raise InputError(f"a pickle with more than {_MAX_REPEATED:,} repeated values")
        if name in ("GLOBAL", "INST") and not _ALLOWED_GLOBALS.fullmatch(str(argument)):
            global_name = ".".join(str(argument).split(" ", 1))[:80]
            raise InputError(
                f"rejected: its pickle uses {global_name}; allowed: plain values and tensors"
            )
        arguments = previous[1] == "EMPTY_TUPLE" or (
            previous[1] in ("TUPLE", "TUPLE3") and previous[0] == "REDUCE"
        )
        builds += name == "BUILD"
        if (name == "REDUCE" and not arguments) or builds > _MAX_BUILDS:
            raise InputError("rejected: its pickle does more than store plain values and tensors")
        if name not in ("BINPUT", "LONG_BINPUT"):
            previous = (previous[1], name)


def _check_values(content: Any) -> None:
    """Check that all values are plain, and that tensors are not larger than their storage."""
    if not isinstance(content, dict):
        raise InputError("not a checkpoint of this program (no dict)")
    stack: list[tuple[Any, int]] = [(content, 0)]
    remaining = MAX_OPERATIONS
    while stack:
        value, depth = stack.pop()
        if isinstance(value, Tensor):
            bytes_needed = value.numel() * value.element_size()
            if value.layout != torch.strided or bytes_needed > value.untyped_storage().nbytes():
                raise InputError(f"a tensor of shape {list(value.shape)} with less data")
        elif isinstance(value, dict | list | tuple):
            children = [*value, *value.values()] if isinstance(value, dict) else value
            remaining -= len(children)
            if remaining >= 0:  # before adding them: nested lists can be shared many times
                stack.extend((child, depth + 1) for child in children)
        elif isinstance(value, str):
            remaining -= len(value) // 100
        elif not isinstance(value, bool | int | float | None):
            raise InputError(f"a value of type {type(value).__name__}; allowed: plain ones")
        if remaining < 0 or depth > _MAX_LEVELS:
            raise InputError(
                f"more than {MAX_OPERATIONS:,} values, or more than {_MAX_LEVELS} levels of them"
            )


def snapshot(value: Any) -> Any:
    """Copy a checkpoint: its tensors to CPU memory, and the containers, whose values are plain."""
    return _copy(value, {})


def _copy(value: Any, tensors: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):  # of a shared one, a single copy is made
        if id(value) not in tensors:
            tensors[id(value)] = value.detach().to("cpu", copy=True)
        return tensors[id(value)]
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same class, with the attributes of a state dict
        for key, item in value.items():
            copied[key] = _copy(item, tensors)
        return copied
    if isinstance(value, list | tuple):
        return type(value)([_copy(item, tensors) for item in value])
    return value


@dataclass(frozen=True)
class InBackground:
    """Storage option of `Trainer.save_checkpoint`: write while the training goes on.

    `publish` is called in the other thread after writing, and returns an error message, or "".
    """

    publish: Callable[[], str]


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin with durable writing and safe reading.

    With the storage option `InBackground`, a thread writes a copy of the checkpoint. There is at
    most one: all other operations wait for it first, and so does the end of the training.

    A write error does not end the training: the existing file stays, a warning is logged once, and
    the next checkpoint is tried. `LastCheckpoint` reads `last_error` and fails if the final state
    could not be saved. `ModelCheckpoint` ranks a checkpoint that could not be written as if it
    existed, but the checkpoint that it replaces is kept. URLs are passed to Lightning.

    Deviation: Lightning builds the file in memory, writes it to the system's temporary folder, and
    moves it; if that is another file system, a full disk leaves a truncated checkpoint.
    """

    last_error: str | None = None  # why the newest checkpoint could not be written
    _written: Future[str] | None = None  # in the background

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint on rank 0; log a warning on a write error."""
        self.wait()
        if isinstance(storage_options, InBackground):
            publish, content = storage_options.publish, snapshot(checkpoint)
            executor = ThreadPoolExecutor(1, "checkpoint")
            self._written = executor.submit(lambda: self._write(content, path) or publish())
            executor.shutdown(wait=False)
        elif "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            self._write(checkpoint, path)

    def wait(self) -> str:
        """Wait until what is written in the background is published; return the error message."""
        if self._written is None:
            return ""
        try:
            return self._written.result()
        except Exception:
            self._written = None  # raised once
            raise

    def teardown(self) -> None:
        """Wait until everything is written."""
        self.wait()

    def _write(self, checkpoint: dict[str, Any], path: str | Path) -> str:
        """Write a file; return the error message, or ""."""
        warned = self.last_error is not None
        try:
            write_checkpoint(checkpoint, path)
        except OSError as error:
            self.last_error = f"{str(path).removesuffix(PARTIAL_SUFFIX)}: {error.strerror or error}"
            if not warned:
                rank_zero_warn(
                    f"checkpoint not written, {self.last_error}; training continues, the existing "
                    "file is kept, and the next checkpoint will be tried"
                )
            return self.last_error
        self.last_error = None
        return ""

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and load a checkpoint, always with ``weights_only=True``."""
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        return load_file(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, unless its replacement could not be written."""
        self.wait()
        if self.last_error is None:
            super().remove_checkpoint(path)


def use_durable_io(trainer: pl.Trainer) -> None:
    """Install `DurableCheckpointIO`, unless the recipe sets another plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
