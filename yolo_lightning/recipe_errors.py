"""The recipe parser's complaints, told in one readable message."""

import inspect
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from yolo_lightning.errors import nearest

_NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>)"
)
_KEY = re.compile(r"^\"([\w.]+)\":$")
_STRAY = re.compile(r"Subcommand '\w+' does not accept option '(\w+)")
_TOP = ("seed_everything", "model", "data", "trainer", "ckpt_path")
_OPTION = re.compile(r"Option '([\w.]+)' is not accepted")


def readable(message: str, recipes: Sequence[str]) -> str:
    """Return the key and the reasons, without what the parser says about its own insides.

    Args:
        message: the parser's text, nested one level for each type that it tried.
        recipes: the files that were read, for the names that are allowed.
    """
    path: list[str] = []
    reasons: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        for recipe in recipes:
            text = text.removeprefix(f"{recipe}: ")
        text = text.removeprefix("Parser key ").strip()
        key = _KEY.match(text)
        if key:
            path += key.group(1).split(".")
        elif text and not _NOISE.match(text):
            reasons.append(_plain(text))
    stray = _STRAY.search(" ".join(reasons))
    if stray:
        return f"{stray.group(1)}: no such key; allowed: {', '.join(_TOP)}"
    option = _OPTION.search(" ".join(reasons))
    if option:
        allowed = _options_at(path, recipes)
        key_path = ".".join([*path, option.group(1)])
        hint = nearest(option.group(1), allowed)
        if not hint and allowed:
            hint = f"allowed: {', '.join(allowed)}"
        return f"{key_path}: no such option{'; ' + hint if hint else ''}"
    reason = "; ".join(dict.fromkeys(reasons)) or message.strip()
    return f"{'.'.join(path)}: {reason}" if path else reason


def _plain(text: str) -> str:
    """Return a reason in the words of YAML instead of Python's types."""
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"allowed: \1", text)
    text = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", text)
    return text.replace(". Got value:", "; found:")


def _options_at(path: Sequence[str], recipes: Sequence[str]) -> list[str]:
    """Return the parameters of the class that a recipe names at a key; none where it names none."""
    for recipe in reversed(recipes):
        try:
            at: Any = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        for key in path:
            at = at.get("init_args", at) if isinstance(at, dict) else None
            at = at.get(key) if isinstance(at, dict) else None
        name = at.get("class_path") if isinstance(at, dict) else None
        if isinstance(name, str) and name.startswith("yolo_lightning."):
            module, _, member = name.rpartition(".")
            found = getattr(import_module(module), member, None)
            if found is not None:
                return [p for p in inspect.signature(found.__init__).parameters if p != "self"]
    return []
