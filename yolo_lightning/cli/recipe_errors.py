"""Turn error messages of jsonargparse into one readable message."""

import inspect
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from yolo_lightning.cli.recipe_policy import class_refusal
from yolo_lightning.errors import InputError, nearest

_NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Expected a path but)"
)
_KEY = re.compile(r"^\"([\w.]+)\":$")
_UNKNOWN_OPTION = re.compile(
    r"(?:does not accept option '|[Uu]nrecognized arguments: --)([\w.]+)"
    r"|Option '([\w.]+)' is not accepted"
)
_UNKNOWN_CLASS = re.compile(r"class_path '([\w.]+)'")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
_BASE_CLASS = re.compile(r"\.(LightningModule|LightningDataModule|Module)$")
_HINT_MODULES = ("yolo_lightning.", "lightning.")
_TOP_LEVEL_KEYS = ("seed_everything", "model", "data", "trainer", "ckpt_path")


def readable_message(message: str, recipes: Sequence[str]) -> str:
    """Return the key and the reasons of a parser error, without parser internals.

    Args:
        message: of the parser, nested one level for each type that it tried.
        recipes: paths of the recipes, which are read for the allowed names.
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
            reasons.append(_without_python_types(text))
    joined = " ".join(reasons)
    option = _UNKNOWN_OPTION.search(joined)
    if option:
        return _unknown_option([*path, *(option[1] or option[2]).split(".")], recipes)
    denied, unknown = _DENIED.search(joined), _UNKNOWN_CLASS.search(joined)
    if denied and not _BASE_CLASS.search(denied[1]):
        return f"{'.'.join(path)} {class_refusal(denied[1])}".strip()
    if denied:  # the parser tries the base class
        reasons = ["names no class; add a class_path"]
    elif unknown:
        reasons = [f"no class {unknown[1]!r}"]
    reason = "; ".join(dict.fromkeys(reasons)) or message.strip()
    return f"{'.'.join(path)}: {reason}" if path else reason


def _unknown_option(path: list[str], recipes: Sequence[str]) -> str:
    if path[0] in _TOP_LEVEL_KEYS:
        allowed = _allowed_options(path[:-1], path[-1], recipes)
    else:
        path, allowed = path[:1], list(_TOP_LEVEL_KEYS)
    hint = nearest(path[-1], allowed)
    if not hint and allowed:
        hint = f"allowed: {', '.join(allowed)}"
    return f"{'.'.join(path)}: no such option{'; ' + hint if hint else ''}"


def _without_python_types(text: str) -> str:
    text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"allowed: \1", text)
    text = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", text)
    return text.replace(". Got value:", "; found:")


def _allowed_options(path: Sequence[str], option: str, recipes: Sequence[str]) -> list[str]:
    """Return the parameters of the class that a recipe names at a key; empty if it names none."""
    if list(path) == ["trainer"]:
        return _parameters("lightning.pytorch.Trainer")
    for recipe in reversed(recipes):
        try:
            value: Any = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        for key in path:
            value = value.get("init_args", value) if isinstance(value, dict) else None
            value = value.get(key) if isinstance(value, dict) else None
        for item in value if isinstance(value, list) else []:
            if isinstance(item, dict) and option in (item.get("init_args") or {}):
                value = item
        name = value.get("class_path") if isinstance(value, dict) else None
        if isinstance(name, str) and name.startswith(_HINT_MODULES):
            return _parameters(name)
    return []


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    cls = getattr(import_module(module), name, None)
    if cls is None:
        return []
    return [p for p in inspect.signature(cls.__init__).parameters if p != "self"]


def find_input_error(error: BaseException | None) -> InputError | None:
    """Return the first `InputError` in the chain of causes of an error, if any."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error
