"""Turn error messages of jsonargparse into one readable message."""

import inspect
import re
from collections.abc import Sequence
from importlib import import_module

from yolo_lightning.cli.recipe_policy import CLASSES, class_refusal
from yolo_lightning.errors import InputError, nearest

_NOISE = re.compile(
    r"^(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Expected a path but)"
)
_KEY = re.compile(r"^\"([\w.]+)\":$")
_UNKNOWN_OPTION = re.compile(
    r"(?:does not accept option '|[Uu]nrecognized arguments: --|Option ')([\w.]+)"
)
_UNKNOWN_CLASS = re.compile(r"class_path '([\w.]+)'")
_DENIED = re.compile(r"Importing '([\w.]+)' is not allowed")
_BASE_CLASS = re.compile(r"\.(LightningModule|LightningDataModule|Module)$")
_TOP_LEVEL_KEYS = ("seed_everything", "model", "data", "trainer", "ckpt_path")


def readable_message(message: str, recipes: Sequence[str]) -> str:
    """Return the key and the reasons of a parser error, without parser internals.

    Args:
        message: of the parser, nested one level for each type that it tried.
        recipes: paths of the recipes, which the parser names too.
    """
    path: list[str] = []
    reasons: list[str] = []
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        for recipe in recipes:
            text = text.removeprefix(f"{recipe}: ")
        text = text.removeprefix("Parser key ").strip()
        if key := _KEY.match(text):
            path += key[1].split(".")
        elif text and not _NOISE.match(text):
            text = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"allowed: \1", text)
            text = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", text)
            reasons.append(text.replace(". Got value:", "; found:"))
    joined = " ".join(reasons)
    if option := _UNKNOWN_OPTION.search(joined):
        return _unknown_option([*path, *option[1].split(".")])
    denied, unknown = _DENIED.search(joined), _UNKNOWN_CLASS.search(joined)
    if denied and not _BASE_CLASS.search(denied[1]):
        return f"{'.'.join(path)} {class_refusal(denied[1])}".strip()
    if denied:  # the parser tries the base class
        reasons = ["names no class; add a class_path"]
    elif unknown:
        reasons = [f"no class {unknown[1]!r}"]
    reason = "; ".join(dict.fromkeys(reasons)) or message.strip()
    return f"{'.'.join(path)}: {reason}" if path else reason


def _unknown_option(path: list[str]) -> str:
    """Return that there is no such option, with similar ones of the trainer and all classes."""
    allowed: set[str] = set()
    if path[0] not in _TOP_LEVEL_KEYS:
        path, allowed = path[:1], set(_TOP_LEVEL_KEYS)
    else:
        for module, names in {"lightning.pytorch": ["Trainer"], **CLASSES}.items():
            for name in names:
                allowed |= {*inspect.signature(getattr(import_module(module), name)).parameters}
    hint = nearest(path[-1], sorted(allowed - {path[-1]}))
    return f"{'.'.join(path)}: no such option{'; ' + hint if hint else ''}"


def find_input_error(error: BaseException | None) -> InputError | None:
    """Return the first `InputError` in the chain of causes of an error, if any."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error
