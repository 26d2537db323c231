"""`InputError`, which users see as a message instead of a traceback, and files that raise it."""

import contextlib
import difflib
import os
import re
import reprlib
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

MAX_TEXT_BYTES = 64 * 2**20
MAX_ANNOTATION_BYTES = 8 * 2**30  # of one file for a whole dataset: COCO's JSON, lists of images
MAX_YAML_VALUES, MAX_YAML_LEVELS = 200_000, 200
MAX_NAME = 4_000  # characters of a class's name, with its alternative names
MAX_LINE = 2_000  # characters of a line in a terminal
_MAX_COMPARED, _MAX_WORD = 20_000, 100  # of words in a hint, which takes time for each pair

# In a URL, what stands before the @ of the host. A password may contain a slash, a quotation mark
# or up to three spaces, but a host with a port and a path with an @ is no user with a password.
_USER_INFO = re.compile(
    r"""(?:(?<=://)|(?<=:\\/\\/)|(?<=https:/)|(?<=http:/)|(?<=rtsp:/))
    (?: [^/?#\s"'<>]{0,2000}
      | (?!\[)[^/?#\s"'@:]{1,500} : (?!\d{1,5}(?:[/?#\s"'\\]|$)) (?:[^\s"'<>]{0,500}|\S{0,500}?)
      | (?!\[)[^/?#\s"'@:]{1,500} : (?!\d{1,5}\b) [^/\s"'@<>]{1,100} (?:\ [^/\s"'@<>]{1,100}){1,3}
    )@""",
    re.VERBOSE,
)
# The same without a scheme: the host has a domain, an address, or a port and a path
_USER_AND_PASSWORD = re.compile(
    r"""(?<![\w.+/\\:@%~-]) (?!mailto:) [\w.+-]{1,100} : [^\s/\\:@"'<>,;]{1,200} @
    (?= (?:[\w-]{1,63}\.){1,9}[a-z]{2,20}\b | \d+\.\d+\.\d+\.\d+\b | localhost\b
      | [\w-]{1,63}:\d{2,5}/ )""",
    re.VERBOSE | re.IGNORECASE,
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
    rf"""((?:^[ \t]*(?:-[ \t]+)*|["'])[\w.-]*{_SECRET_NAME}["']?:[ \t]*)"""
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


class MissingFile(InputError):
    """A file or folder that the user names is not there."""


def mask_secrets(text: str) -> str:
    """Replace users, passwords, tokens and keys in the URLs of a text, and beside it, by ``***``.

    That is ``scheme://USER:PASSWORD@host``, also without the scheme, and ``NAME=VALUE`` or
    ``NAME: VALUE`` where the name is that of a secret. Other text, such as ``/home/ann@corp``, is
    unchanged.
    """
    text = _USER_AND_PASSWORD.sub("***@", _USER_INFO.sub("***@", text))
    for pattern in (_ASSIGNMENT, _USER, _ENTRY, _HEADER):
        text = pattern.sub(r"\1***", text)
    return text


def printable(text: str) -> str:
    """Escape characters that control a terminal, except line breaks and tabs; crop long lines."""
    lines = (line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} …" for line in text.split("\n"))
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], "\n".join(lines))


def short(value: object) -> str:
    """Return at most 80 characters of a value of a file, for messages."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxlong = shortener.maxother = 80
    shortener.maxlevel = shortener.maxlist = shortener.maxdict = 2
    return shortener.repr(value)[:80]


def require_name(name: str, where: str) -> str:
    """Return the name or key of a class; raise `InputError` if a terminal cannot show it."""
    if len(name) > MAX_NAME:
        problem = f"has {len(name):,} characters; allowed: {MAX_NAME:,}"
    elif _CONTROL.search(name) or "\n" in name or "\t" in name:
        problem = "holds control characters; allowed: text"
    else:
        return name
    raise InputError(f"{where}: name {short(name)} {problem}")


def csv_cell(value: Any) -> Any:
    """Return a cell of a table: text that a spreadsheet would take for a formula gets a ``'``."""
    is_text = isinstance(value, str) and len(value) > 1  # a lone - means none
    return f"'{value}" if is_text and value[0] in "=+-@\t\r" else value


def nearest(word: str, allowed: Iterable[str], count: int = 3) -> str:
    """Return a hint such as ``did you mean 'apple' or 'apples'?``; empty if no word is similar."""
    if len(word) > _MAX_WORD:
        return ""
    words = [w for w in dict.fromkeys(allowed) if len(w) <= _MAX_WORD][:_MAX_COMPARED]
    matches = difflib.get_close_matches(word, words, n=count, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in matches)}?" if matches else ""


def not_found(path: str | Path, description: str, hint: str = "") -> MissingFile:
    """Return the error for a missing file or folder; `hint` says what is allowed instead."""
    message = f"{description} {str(path)!r} not found (working folder: {Path.cwd()})"
    return MissingFile(f"{message}; {hint}" if hint else message)


def expand(path: str | Path) -> Path:
    """Return a path with ``~`` expanded; that of an unknown user is unchanged."""
    if str(path)[:1] == "~":
        return Path(os.path.expanduser(path))
    return path if isinstance(path, Path) else Path(path)


def _without_parents(path: Path) -> Path:
    """Return an existing path without ``..``, for messages, if that is the same file."""
    if ".." not in path.parts:
        return path
    shorter = Path(os.path.abspath(path))  # after a link, `..` is elsewhere
    return shorter if shorter.exists() and shorter.samefile(path) else path


def require_file(path: str | Path, description: str, hint: str = "") -> Path:
    """Return an existing file, with ``~`` expanded; raise `InputError` if there is none."""
    file = expand(path)
    if not os.path.isfile(file):
        if os.path.exists(file):
            kind = "a folder, not a" if os.path.isdir(file) else "no regular"
            more = f"; {hint}" if hint else ""
            raise InputError(f"{description} {str(path)!r} is {kind} file{more}")
        raise not_found(path, description, hint)
    return _without_parents(file)


def require_folder(path: str | Path, description: str) -> Path:
    """Return an existing folder, with ``~`` expanded; raise `InputError` if it is missing."""
    folder = expand(path)
    if not os.path.isdir(folder):
        raise not_found(path, description)
    return _without_parents(folder)


def require_path(path: str | Path, description: str = "file or folder") -> Path:
    """Return an existing file or folder, with ``~`` expanded; raise `InputError` if missing."""
    existing = expand(path)
    if not os.path.exists(existing):
        raise not_found(path, description)
    return _without_parents(existing)


def read_bytes(
    path: str | Path,
    description: str = "file",
    hint: str = "",
    max_bytes: int = MAX_TEXT_BYTES,
    is_text: bool = True,
) -> bytes:
    """Return the content of a file.

    Raises:
        InputError: the file is missing, no regular file, too large, or cannot be read; or it should
            be text and begins with binary data.
    """
    file = require_file(path, description, hint)
    try:
        # without waiting, if a FIFO has taken the place of the file
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{file}: no regular file")
            if status.st_size > max_bytes:
                raise InputError(f"{file}: {status.st_size:,} bytes; allowed: {max_bytes:,}")
            if is_text:
                _require_text(file, stream.peek())
            return stream.read(max(status.st_size, 2**16))
    except OSError as error:
        raise InputError(f"{file}: not readable ({error.strerror or error})") from None


def _require_text(file: str | Path, content: bytes) -> None:
    offset = content.find(b"\0")
    if offset >= 0:
        line = content.count(b"\n", 0, offset) + 1
        raise InputError(f"{file}:{line}: a NUL byte at byte {offset}, not readable as text")


def read_text(
    path: str | Path, description: str = "file", hint: str = "", max_bytes: int = MAX_TEXT_BYTES
) -> str:
    """Return the text of a UTF-8 file, without a byte order mark, its line ends as in Python.

    Raises:
        InputError: see `read_bytes`; or the file is not UTF-8, or has a NUL byte.
    """
    content = read_bytes(path, description, hint, max_bytes)
    _require_text(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not readable as UTF-8 text (byte {error.start})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def compose_yaml(text: str, origin: str | Path, any_alias: bool = False) -> "yaml.Node | None":
    """Parse YAML to nodes, which have line numbers; their values are text, and tags have no effect.

    Raises:
        InputError: not YAML; too many values or levels; or, unless `any_alias`, an alias of a list
            or a mapping, whose content could grow without end. Names the line.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    values = levels = line = 0
    scalars: set[str | None] = set()  # anchors of plain values
    try:
        # nodes are built by recursion, so the levels are counted before
        for event in yaml.parse(text, Loader=loader):
            line = event.start_mark.line + 1 if event.start_mark else line
            values += isinstance(event, yaml.NodeEvent)
            levels += isinstance(event, yaml.CollectionStartEvent)
            levels -= isinstance(event, yaml.CollectionEndEvent)
            if values > MAX_YAML_VALUES or levels > MAX_YAML_LEVELS:
                raise InputError(
                    f"{origin}:{line}: too large; allowed: {MAX_YAML_VALUES:,} values, "
                    f"{MAX_YAML_LEVELS} levels"
                )
            anchor = getattr(event, "anchor", None)
            if isinstance(event, yaml.AliasEvent) and anchor not in scalars and not any_alias:
                raise InputError(
                    f"{origin}:{line}: alias *{short(anchor)[1:-1]}; allowed: aliases of values "
                    "that are no lists or mappings"
                )
            if isinstance(event, yaml.ScalarEvent) and anchor is not None:
                scalars.add(anchor)
            elif isinstance(event, yaml.CollectionStartEvent):
                scalars.discard(anchor)
        return yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else line
        raise InputError(f"{origin}:{line}: not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{origin}: not YAML ({str(error).splitlines()[0]})") from None


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
