"""The recipe parser's complaints, told in one readable message."""

import inspect
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from yolo_lightning.errors import InputError, nearest

_NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Expected a path but)"
)
_KEY = re.compile(r"^\"([\w.]+)\":$")
_STRAY = re.compile(r"(?:does not accept option '|[Uu]nrecognized arguments: --)([\w.]+)")
_CLASS = re.compile(r"class_path '([\w.]+)\.(\w+)'")
_OURS = ("yolo_lightning.", "lightning.")
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
    said = " ".join(reasons)
    stray = _STRAY.search(said)
    option = _OPTION.search(said)
    if stray or option:
        path += (stray or option).group(1).split(".")  # type: ignore[union-attr]
        allowed = _options_at(path[:-1], path[-1], recipes) if path[0] in _TOP else list(_TOP)
        if path[0] not in _TOP:
            path = path[:1]
        hint = nearest(path[-1], allowed)
        if not hint and allowed:
            hint = f"allowed: {', '.join(allowed)}"
        return f"{'.'.join(path)}: no such option{'; ' + hint if hint else ''}"
    unknown = _CLASS.search(said)
    if unknown:
        reasons = [f"no class {'.'.join(unknown.groups())!r}", _classes_near(*unknown.groups())]
        reasons = [reason for reason in reasons if reason]
    reason = "; ".join(dict.fromkeys(reasons)) or message.strip()
    return f"{'.'.join(path)}: {reason}" if path else reason


def _plain(text: str) -> str:
    """Return a reason in the words of YAML instead of Python's types."""
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"allowed: \1", text)
    text = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", text)
    return text.replace(". Got value:", "; found:")


def _classes_near(module: str, name: str) -> str:
    """Return a hint at the classes that a module of ours or Lightning's has."""
    if not module.startswith(_OURS):
        return ""
    try:
        return nearest(name, dir(import_module(module)))
    except ImportError:
        return ""


def _options_at(path: Sequence[str], option: str, recipes: Sequence[str]) -> list[str]:
    """Return the parameters of the class that a recipe names at a key; none where it names none."""
    if list(path) == ["trainer"]:
        return _parameters("lightning.pytorch.Trainer")
    for recipe in reversed(recipes):
        try:
            at: Any = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        for key in path:
            at = at.get("init_args", at) if isinstance(at, dict) else None
            at = at.get(key) if isinstance(at, dict) else None
        for item in at if isinstance(at, list) else []:
            if isinstance(item, dict) and option in (item.get("init_args") or {}):
                at = item
        name = at.get("class_path") if isinstance(at, dict) else None
        if isinstance(name, str) and name.startswith(_OURS):
            return _parameters(name)
    return []


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    found = getattr(import_module(module), name, None)
    if found is None:
        return []
    return [p for p in inspect.signature(found.__init__).parameters if p != "self"]


def input_error_behind(error: BaseException | None) -> InputError | None:
    """Return the `InputError` among the causes of an error, if any."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error
