"""Names and values as MLflow takes them."""

import posixpath
import re
import zlib
from collections.abc import Mapping
from typing import Any

KEY, PARAM, TAG, EXPERIMENT, RUN = 250, 6000, 8000, 500, 250
"""MLflow's limits, in characters."""


class Names:
    """Gives each name one that MLflow takes, the same one each time, and no two names the same."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}
        self._owners: dict[str, str] = {}

    def key(self, name: str) -> str:
        """Return the name to use."""
        if name not in self._keys:
            key = allowed(name)
            if self._owners.get(key, name) != name:
                key = _numbered(key, name)
            self.recall(name, key)
        return self._keys[name]

    def recall(self, name: str, key: str) -> None:
        """Go on with a name that was given before."""
        self._keys[name] = key
        self._owners[key] = name


def allowed(name: str) -> str:
    """Return a name with what MLflow takes: letters, digits and ``_-. :/``, as a relative path."""
    parts = re.sub(r"[^\w\-. :/]", "_", name).split("/")
    key = posixpath.join(*(part if part.strip(".") else "_" for part in parts))
    key = f"_{key}" if key.startswith("..") else key
    return _numbered(key, name) if len(key) > KEY else key


def _numbered(key: str, name: str) -> str:
    return f"{key[: KEY - 9]}-{zlib.crc32(name.encode(errors='replace')):08x}"


def clean(text: str) -> str:
    """Return a text that every database stores."""
    return text.encode(errors="replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values under dotted names, without the ``init_args`` between them.

    Lists of components go by the names of their classes, other lists are one value.

    Args:
        values: of a recipe.
        prefix: of the names.
    """
    flat: dict[str, str] = {}
    for name, value in values.items():
        key = prefix if name == "init_args" else f"{prefix}{name}."
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            value = _by_class(value)
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, key)
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def _by_class(components: list[Any]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for number, one in enumerate(components):
        path = one.get("class_path", str(number)) if isinstance(one, dict) else str(number)
        name = path.rpartition(".")[2]
        named[name if name not in named else f"{name}-{number}"] = one
    return named
