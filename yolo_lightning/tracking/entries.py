"""The lines of a journal: their operations and fields."""

import json
from pathlib import PurePosixPath
from typing import Any

UNREADABLE = "unreadable"  # operation name of a line that cannot be parsed

STATE_OPS = ("open", "params", "tags", "name", "file", "remove")
"""Operations that a new process of the same run reads, from the beginning."""

_FIELDS: dict[str, dict[str, type]] = {
    "open": {
        "store": str, "experiment": str, "name": str, "run_ids": list, "existing_run_only": bool,
    },
    "metrics": {"t": int, "step": int, "values": dict},
    "params": {"values": dict},
    "tags": {"values": dict},
    "name": {"name": str, "key": str},
    "status": {"t": int, "status": str},
    "inputs": {"datasets": list},
    "file": {"file": str, "folder": str},
    "image": {"t": int, "file": str, "key": str, "step": int},
    "model": {"file": str, "name": str, "step": int},
    "remove": {"path": str},
}  # fmt: skip
_INT64_LIMIT = 2**63


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a line, None if it is invalid."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and _is_valid(entry) else None


def _is_valid(entry: dict[str, Any]) -> bool:
    op = entry.get("op")
    fields = _FIELDS.get(op) if isinstance(op, str) else None
    if fields is None:
        return False
    for name, type_ in fields.items():
        value = entry.get(name)
        if not isinstance(value, type_):
            return False
        if isinstance(value, int) and not -_INT64_LIMIT <= value < _INT64_LIMIT:
            return False
    if op == "metrics":
        numbers = entry["values"].values()
        return entry["t"] >= 0 and all(
            isinstance(x, float) or (isinstance(x, int) and abs(x) < _INT64_LIMIT) for x in numbers
        )
    if op in ("params", "tags"):
        return all(isinstance(text, str) for text in entry["values"].values())
    if op == "remove" and not entry["path"].startswith("checkpoints/"):
        return False  # nothing else of a run is ever removed
    if not isinstance(entry.get("mtime_ns", 0), int):
        return False
    return all(_is_relative(entry[name]) for name in ("file", "path") if name in fields)


def _is_relative(name: str) -> bool:
    path = PurePosixPath(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    )
