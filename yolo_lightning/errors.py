"""`InputError`, which users see as a message instead of a traceback, and files that raise it."""

import contextlib
import difflib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """Invalid user input; the message names the input, the problem and the allowed values.

    The command line prints the message and exits with code 2.
    """


def nearest(word: str, allowed: Iterable[str], count: int = 3) -> str:
    """Return a hint such as ``did you mean 'apple' or 'apples'?``; empty if no word is similar."""
    matches = difflib.get_close_matches(word, list(dict.fromkeys(allowed)), n=count, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in matches)}?" if matches else ""


def not_found(path: str | Path, description: str, hint: str = "") -> InputError:
    """Return the error for a missing file or folder; `hint` says what is allowed instead."""
    message = f"{description} {str(path)!r} not found (working folder: {Path.cwd()})"
    return InputError(f"{message}; {hint}" if hint else message)


def require_file(path: str | Path, description: str, hint: str = "") -> Path:
    """Return an existing file, with ``~`` expanded; raise `InputError` if it is missing."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise not_found(path, description, hint)
    return file


def require_folder(path: str | Path, description: str) -> Path:
    """Return an existing folder, with ``~`` expanded; raise `InputError` if it is missing."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise not_found(path, description)
    return folder


def require_path(path: str | Path, description: str = "file or folder") -> Path:
    """Return an existing file or folder, with ``~`` expanded; raise `InputError` if missing."""
    existing = Path(path).expanduser()
    if not existing.exists():
        raise not_found(path, description)
    return existing


def read_text(path: str | Path, description: str = "file", hint: str = "") -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises:
        InputError: the file is missing, cannot be read, or is not UTF-8.
    """
    file = require_file(path, description, hint)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not readable as UTF-8 text ({error})") from None
    except OSError as error:
        raise InputError(f"{file}: not readable ({error.strerror or error})") from None


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file and create its folder; a reader sees the old content or all of the new one.

    Links and devices such as ``/dev/stdout`` are written directly.

    Raises:
        InputError: the file cannot be written; it is unchanged.
    """
    is_special = path.is_symlink() or (path.exists() and not path.is_file())
    target = path if is_special else path.with_name(f"{path.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data if isinstance(data, bytes) else data.encode())
        if not is_special:
            if path.is_file():
                shutil.copymode(path, target)
            os.replace(target, path)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written ({error.strerror or error})") from None
    finally:
        if not is_special:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
