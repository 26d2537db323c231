"""Checkpoint files: written whole or not at all, and verified before anything in them is used."""

import contextlib
import os
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from yolo_lightning.errors import InputError

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""The newest state of a run, and the one before it."""

PART = ".part"
"""Ends the name of a file that is being written."""

MAX_OPERATIONS = 2_000_000
"""Of the pickle in a checkpoint, and values in it; a tree of 82,115 nodes takes 820,000."""

_MAX_PICKLE_BYTES = 16 << 20
_MAX_DIRECTORY_BYTES = 8 << 20
_MAX_BUILDS = 8
_MAX_LEVELS = 50

_CALLED = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)"
    r"|torch \w+Storage|torch.storage UntypedStorage"
)
"""Module and name of what a pickle of plain values and tensors asks for."""

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint beside its target, force it to the disk, and rename it.

    Whatever goes wrong, the target is afterwards what it was, and nothing is left beside it.

    Args:
        checkpoint: plain values and tensors.
        path: the target; its folder is created.

    Raises:
        OSError: no room, or another fault of the disk.
        InputError: a value that is not plain, and could not be read back.
    """
    target = Path(path)
    part = target.with_name(target.name + PART)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as handle:
            _save(checkpoint, handle)
            handle.flush()
            os.fsync(handle.fileno())
        with zipfile.ZipFile(part) as archive:
            _check_pickle(_pickle_of(archive))
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _save(checkpoint: dict[str, Any], handle: Any) -> None:
    """Save; torch wraps what the file says about a full disk into words about positions."""
    try:
        torch.save(checkpoint, handle)
    except RuntimeError as error:
        behind: BaseException | None = error
        while behind is not None and not isinstance(behind, OSError):
            behind = behind.__context__
        raise behind or error from None


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def rotate(fresh: Path, last: Path) -> None:
    """Make a fresh checkpoint the last one, and the last one the previous one beside it.

    A checkpoint lies under the last one's name at every moment; on file systems without hard
    links there is a moment in which only the previous one does.

    Raises:
        OSError: of the disk; the last one is then where it was, or is the previous one.
    """
    previous = last.with_name(PREVIOUS)
    spare = previous.with_name(previous.name + PART)
    if last.is_file():
        try:
            spare.unlink(missing_ok=True)
            os.link(last, spare)
            os.replace(spare, previous)
        except OSError:
            os.replace(last, previous)
        finally:
            with contextlib.suppress(OSError):
                spare.unlink(missing_ok=True)  # renaming onto itself leaves both names
    os.replace(fresh, last)
    _sync_folder(last.parent)


def verify(path: str | Path) -> None:
    """Read a checkpoint's file to its end, and refuse one that is not what was written.

    The archive has to be complete, its records uncompressed and equal to their checksums
    (CRC-32), and its pickle may ask for nothing but tensors. Nothing in it is executed, and no
    more memory is taken than the pickle is long.

    Raises:
        InputError: names the file and what is wrong with it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"checkpoint {str(path)!r} not found (working folder: {Path.cwd()})")
    try:
        with file.open("rb") as handle:
            if handle.read(4) != b"PK\x03\x04":
                raise InputError("not a checkpoint of this program (no archive)")
            _check_directory(handle, file.stat().st_size)
            with zipfile.ZipFile(handle) as archive:
                _check_records(archive, file.stat().st_size)
                _check_pickle(_pickle_of(archive))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise InputError(f"{path}: damaged ({_reason(error)})") from None


def load_file(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint's file holds, verified, on the CPU.

    Raises:
        InputError: see `verify`; also a tensor larger than its data, or too many values.
    """
    verify(path)
    try:
        held: dict[str, Any] = torch.load(
            Path(path).expanduser(), map_location="cpu", weights_only=True
        )
        _check_values(held)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(f"{path}: not a checkpoint of this program ({_reason(error)})") from None
    return held


def _reason(error: Exception) -> str:
    """Return the first line of an error; what torch says about pickles is no help to anyone."""
    first = (str(error).splitlines() or [""])[0].strip()
    if not first or first.startswith("Weights only load failed"):
        return f"its pickle is malformed: {type(error).__name__}"
    return first[:200]


def _check_directory(handle: Any, size: int) -> None:
    """Refuse an archive that does not end in its directory, or with one too long to be read."""
    cut = InputError("damaged (cut short, or something follows its end)")
    if size < _END.size:
        raise cut
    handle.seek(max(0, size - _END.size - _LOCATOR.size - _END64.size))
    tail = handle.read()
    mark, _, _, _, _, length, start, comment = _END.unpack(tail[-_END.size :])
    end = size - _END.size
    if mark != b"PK\x05\x06" or comment:
        raise cut
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\x06\x07":
        end -= _LOCATOR.size + _END64.size
        place = _LOCATOR.unpack(locator)[2]
        if place != end or tail[:4] != b"PK\x06\x06":
            raise cut
        *_, length, start = _END64.unpack(tail[: _END64.size])
    if start + length != end:
        raise cut
    if length > _MAX_DIRECTORY_BYTES:
        raise InputError(f"a directory of {length:,} bytes; allowed: {_MAX_DIRECTORY_BYTES:,}")


def _check_records(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse records that are compressed, outside the one folder, or unlike their checksums."""
    records = archive.infolist()
    folder = records[0].filename.split("/")[0] if records else ""
    for record in records:
        shown = repr(record.filename[:60])
        plain = record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & 1
        if not plain or record.file_size != record.compress_size:
            raise InputError(f"record {shown} is compressed; allowed: stored")
        own = record.filename == record.orig_filename and record.filename.isascii()
        if not own or not record.filename.startswith(f"{folder}/"):
            raise InputError(f"record {shown} lies outside {folder[:60]!r}")
    if len({record.filename.lower() for record in records}) < len(records):
        raise InputError("a record twice")
    total = sum(record.file_size for record in records)
    if total > size:
        raise InputError(f"records of {total:,} bytes in a file of {size:,}")
    for record in records:
        with archive.open(record) as stream:
            while stream.read(1 << 20):  # compares with the checksum at the end
                pass


def _pickle_of(archive: zipfile.ZipFile) -> bytes:
    """Return the pickle: all values but the tensors' data."""
    found = [record for record in archive.infolist() if record.filename.endswith("/data.pkl")]
    if len(found) != 1:
        raise InputError(f"not a checkpoint of this program ({len(found)} records data.pkl)")
    if found[0].file_size > _MAX_PICKLE_BYTES:
        raise InputError(
            f"a pickle of {found[0].file_size:,} bytes; allowed: {_MAX_PICKLE_BYTES:,}"
        )
    return archive.read(found[0])


def _check_pickle(pickled: bytes) -> None:
    """Refuse a pickle that asks for more than tensors and empty dicts; executes nothing.

    Operations are counted, since a byte can ask for an object of 200; calls take nothing that
    could be copied over and over.
    """
    builds, latest = 0, ("", "")
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
        name = operation.name
        if number >= MAX_OPERATIONS:
            raise InputError(f"a pickle of more than {MAX_OPERATIONS:,} operations")
        if name in ("GLOBAL", "INST") and not _CALLED.fullmatch(str(argument)):
            asked = ".".join(str(argument).split(" ", 1))[:80]
            raise InputError(f"refused: it asks for {asked}; allowed: plain values and tensors")
        arguments = latest[1] == "EMPTY_TUPLE" or (
            latest[1] in ("TUPLE", "TUPLE3") and latest[0] == "REDUCE"
        )
        builds += name == "BUILD"
        if (name == "REDUCE" and not arguments) or builds > _MAX_BUILDS:
            raise InputError("refused: its pickle does more than hold plain values and tensors")
        if name not in ("BINPUT", "LONG_BINPUT"):
            latest = (latest[1], name)


def _check_values(held: Any) -> None:
    """Refuse values that are not plain, and tensors that claim more than they hold."""
    if not isinstance(held, dict):
        raise InputError("not a checkpoint of this program (no dict)")
    todo: list[tuple[Any, int]] = [(held, 0)]
    left = MAX_OPERATIONS
    while todo:
        value, depth = todo.pop()
        if isinstance(value, Tensor):
            bytes_needed = value.numel() * value.element_size()
            if value.layout != torch.strided or bytes_needed > value.untyped_storage().nbytes():
                raise InputError(f"a tensor of shape {list(value.shape)} on less data than that")
        elif isinstance(value, dict | list | tuple):
            inside = [*value, *value.values()] if isinstance(value, dict) else value
            left -= len(inside)
            if left >= 0:  # before they are laid out: lists may hold each other
                todo.extend((part, depth + 1) for part in inside)
        elif isinstance(value, str):
            left -= len(value) // 100
        elif not isinstance(value, bool | int | float | None):
            raise InputError(f"a value of type {type(value).__name__}; allowed: plain ones")
        if left < 0 or depth > _MAX_LEVELS:
            raise InputError(
                f"more than {MAX_OPERATIONS:,} values, or more than {_MAX_LEVELS} levels of them"
            )


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's writer and reader of checkpoints, made to outlive full disks and power cuts.

    A checkpoint that the disk does not take costs no training: what lay under its name stays, a
    warning says so once, and the next one is tried in its turn. `LastCheckpoint` looks at
    `problem`, and does end a training whose last state could not be saved. A `ModelCheckpoint`
    ranks a checkpoint that could not be written as if it were there; what it would have removed
    for it stays.

    Addresses with ``://`` go Lightning's own way.

    Attributes:
        problem: why the newest checkpoint could not be written, None where it was.

    Deviation: Lightning builds the whole file in memory, writes it into the folder for temporary
    files, and moves it; where that is another file system, a full disk ends in half a file under
    the checkpoint's name.
    """

    problem: str | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint, or say why not; called on rank 0."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        known = self.problem is not None
        try:
            write_checkpoint(checkpoint, path)
        except OSError as error:
            self.problem = f"{str(path).removesuffix(PART)}: {error.strerror or error}"
            if not known:
                rank_zero_warn(
                    f"checkpoint not written, {self.problem}; training goes on, what lay there "
                    "stays, and the next one will be tried"
                )
            return
        self.problem = None

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what a checkpoint holds, verified; plain values and tensors, whatever is asked."""
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=True)
        return load_file(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, unless the one that takes its place could not be written."""
        if self.problem is None:
            super().remove_checkpoint(path)


def write_durably(trainer: pl.Trainer) -> None:
    """Let a trainer write all its checkpoints durably; a plugin that a recipe names stays."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = DurableCheckpointIO()
