"""Files of a run folder, which may come from a stranger: no links out of it, no pipes, no devices.

Also the locks beside a store, which must not write to what a link names.
"""

import errno
import os
import stat
from pathlib import Path

from yolo_lightning.errors import InputError

MAX_FILE_BYTES = 64 * 2**30  # of a file to upload
_MAX_TEXT_BYTES = 2**20


def open_file(path: Path, flags: int) -> int:
    """Open a regular file and return its descriptor.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe or a device.
        InputError: this user may not read it.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "is a link", str(path)) from None
        if error.errno == errno.EACCES and flags == os.O_RDONLY:  # never skip a part silently
            raise InputError(f"{path}: not readable ({error.strerror})") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_text(path: Path) -> str:
    """Return the text of a small regular file; raise `OSError` if it cannot be read."""
    with open(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read(_MAX_TEXT_BYTES).decode(errors="replace")


def replace_text(path: Path, text: str) -> None:
    """Write a file atomically; raise `OSError` if it cannot be written."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.unlink(missing_ok=True)
    with open(open_file(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
        file.write(text.encode())
    temporary.replace(path)


def confine(folder: Path, path: Path) -> Path:
    """Return a path; raise `OSError` if it, or a link in it, leads out of the folder."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise OSError(errno.EPERM, f"is outside of the run folder {folder}", str(path))
    return path


def check_uploadable(folder: Path, path: Path) -> os.stat_result:
    """Return the status of a file, or a folder of files, below `folder` that may be uploaded.

    Raises:
        OSError: it leads out of the folder, is too large, or is a pipe or a device; a folder also
            if it contains a link.
    """
    status = confine(folder, path).stat()
    for root, folders, files in os.walk(path):
        for name in folders + files:
            member = Path(root, name)
            _check_kind(member, member.lstat())
    if not path.is_dir():
        _check_kind(path, status)
    return status


def _check_kind(path: Path, status: os.stat_result) -> None:
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if status.st_size > MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MAX_FILE_BYTES >> 30} GiB", str(path))
