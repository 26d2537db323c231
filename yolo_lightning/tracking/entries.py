"""The lines of a journal and of its index: their operations and fields."""

import json
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

UNREADABLE = "unreadable"  # operation name of lines that cannot be parsed

STATE_OPS = ("open", "params")
"""Operations that a new process of the same run reads, from the beginning."""

_Check = Callable[[Any], bool]
_Fields = dict[str, dict[str, _Check]]  # of each operation


def _is(type_: type) -> _Check:
    return lambda value: isinstance(value, type_)


def _is_dict_of(check: _Check) -> _Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_path(value: Any) -> bool:
    path = PurePosixPath(value if isinstance(value, str) else "/")
    return bool(path.name) and not path.is_absolute() and not {"..", "\0"} & {*path.parts, *value}


_text, _texts, _numbers = _is(str), _is_dict_of(_is(str)), _is_dict_of(_is_number)
_JOURNAL: _Fields = {
    "open": {"store": _text, "experiment": _text, "name": _text, "run_ids": _is(list),
             "existing_run_only": _is(bool)},
    "metrics": {"t": _is_count, "step": _is_count, "values": lambda v: bool(v) and _numbers(v)},
    "params": {"values": _texts},
    "tags": {"values": _texts},
    "status": {"t": _is_count, "status": _text},
    "inputs": {"datasets": _is(list)},
    "file": {"file": _is_path, "folder": _text},
    "image": {"file": _is_path, "key": _text, "step": _is_count},
    "model": {"file": _is_path, "name": _text, "step": _is_count},
}  # fmt: skip

INDEX: _Fields = {
    "part": {"end": _is_count, "first": _is_count, "last": _is_count,
             "state": lambda v: isinstance(v, list) and all(_is_entry(e, _JOURNAL) for e in v)},
}  # fmt: skip
"""The lines of an index, each of which describes a part of the journal."""


def _is_entry(entry: Any, fields: _Fields) -> bool:
    checks = fields.get(str(entry.get("op")), {}) if isinstance(entry, dict) else {}
    return bool(checks) and all(check(entry.get(name)) for name, check in checks.items())


def parse_line(line: bytes, fields: _Fields = _JOURNAL) -> dict[str, Any] | None:
    """Return the entry of a line, None if it is invalid."""
    if not line.startswith(b'{"op": "'):
        return None  # at once: errors of the parser take ten times as long
    try:
        entry = json.loads(line)
        return entry if _is_entry(entry, fields) else None
    except (ValueError, RecursionError):
        return None
