"""Addresses of stores, and conversion of names and values to what MLflow accepts."""

import os
import posixpath
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SQLITE = "sqlite:///"
DEFAULT_STORE = "sqlite:///mlflow.db"

# MLflow's limits, in characters
MAX_KEY_LENGTH, MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 250, 6000, 8000
MAX_EXPERIMENT_NAME_LENGTH, MAX_RUN_NAME_LENGTH = 500, 250


def absolute_uri(uri: str) -> str:
    """Return a store's address, with an absolute path if it is a SQLite file."""
    if not uri.startswith(SQLITE):
        return uri
    # MLflow caches one database engine per address
    return SQLITE + str(Path(uri.removeprefix(SQLITE)).absolute())


def own_store() -> str:
    """Return the user's store: MLFLOW_TRACKING_URI, else mlflow.db in the working folder."""
    return absolute_uri(os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE)


def valid_run_id(value: object) -> str | None:
    """Return an MLflow run id, None if it is none: it becomes a part of addresses and paths."""
    is_valid = isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][\w-]{0,255}", value, re.ASCII)
    return str(value) if is_valid else None


def valid_key(name: str) -> str:
    """Return a key that MLflow accepts: a relative path of letters, digits and ``_-. :/``.

    Where characters are replaced, a checksum of the name follows: no two names have one key.
    """
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")
    key = posixpath.join(*(part if part.strip(".") else "_" for part in parts))
    key = f"_{key}" if key.startswith("..") else key
    if key == name and len(key) <= MAX_KEY_LENGTH:
        return key
    return f"{key[: MAX_KEY_LENGTH - 9]}-{zlib.crc32(name.encode(errors='replace')):08x}"


def sanitize_text(text: str) -> str:
    """Replace characters that some databases cannot store: lone surrogates and NUL."""
    return text.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def flatten_params(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested values to dotted names, without ``init_args``.

    Components in a list are named by their classes; other lists are one value.
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        key = prefix if name == "init_args" else f"{prefix}{name}."
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = _by_class_name(value)
        if isinstance(value, Mapping) and value:
            flat |= flatten_params(value, key)
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _by_class_name(components: list[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for number, component in enumerate(components):
        path = component.get("class_path", "") if isinstance(component, dict) else ""
        name = path.rpartition(".")[2] or str(number)
        named[name if name not in named else f"{name}-{number}"] = component
    return named
