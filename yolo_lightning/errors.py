"""`InputError`, which users see as a message instead of a traceback, and what messages may show."""

import contextlib
import difflib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

# In a URL, what stands before the @ of the host. A password may contain a slash or a quotation
# mark, but a host with a port and a path with an @ is no user with a password.
_USER_INFO = re.compile(
    r"""(?:(?<=://)|(?<=https:/)|(?<=http:/)|(?<=rtsp:/))
    (?: [^/?#\s"'<>]{0,2000}
      | (?!\[)[^/?#\s"'@:]{1,500} : (?!\d{1,5}(?:[/?#\s"']|$)) (?:[^\s"'<>]{0,500}|\S{0,500}?)
    )@""",
    re.VERBOSE,
)
_SECRET_NAME = (
    r"(?:pass(?:word|wd|phrase)|pwd|psw|token|secret|(?:api|access|private|account)[_-]?key"
    r"|signature|credentials?|(?<![A-Za-z0-9])(?:pass|sig|auth))"
)
# NAME=VALUE, also with the = and ; of a connection string inside a URL
_ASSIGNMENT = re.compile(
    rf"""(?<![\w.-])([\w.-]*{_SECRET_NAME}(?:=|%3D))"""
    r"""(?:\{[^}]*\}|"[^"]*"|'[^']*'|(?:(?!%3B|%26)[^&;\s"'<>])+(?:\ [^&;\s"'<>=]+(?=;))*)""",
    re.IGNORECASE,
)
_USER = re.compile(r"""(?<=[?&;/])((?:user(?:name)?|usr|login|uid|key)=)[^&;\s"'<>]+""", re.I)
# NAME: VALUE, as a line of YAML or an entry of JSON
_ENTRY = re.compile(
    rf"""((?:^[ \t-]*|["'])[\w.-]*{_SECRET_NAME}["']?:[ \t]*)"""
    r"""("[^"\n]*"|'[^'\n]*'|[^\s,"'\[{][^,\n}]*)""",
    re.IGNORECASE | re.MULTILINE,
)
_HEADER = re.compile(r"(\bauthorization\W{1,4}\w+ |\bbearer (?=\S{16}))[\w.~+/=-]+", re.I)
# what controls a terminal or the direction of text, and lone surrogates
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class InputError(ValueError):
    """Invalid user input; the message names the input, the problem and the allowed values.

    The command line prints the message and exits with code 2.
    """


def mask_secrets(text: str) -> str:
    """Replace users, passwords, tokens and keys in the URLs of a text, and beside it, by ``***``.

    That is ``scheme://USER:PASSWORD@host``, and ``NAME=VALUE`` or ``NAME: VALUE`` where the name is
    that of a secret. Other text, such as ``/home/ann@corp``, is unchanged.
    """
    text = _USER_INFO.sub("***@", text)
    for pattern in (_ASSIGNMENT, _USER, _ENTRY, _HEADER):
        text = pattern.sub(r"\1***", text)
    return text


def printable(text: str) -> str:
    """Escape characters that control a terminal, except line breaks and tabs."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


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
