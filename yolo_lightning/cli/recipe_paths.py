"""Paths in recipes: of files to read, they are relative to the recipe's folder."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from yolo_lightning.cli.recipe_policy import URL, may_read
from yolo_lightning.errors import expand
from yolo_lightning.tree.seen_classes import COCO, IMAGENET_DET_44

INPUT_KEYS = {
    "annotations", "ckpt_path", "file", "images", "labels", "names", "only", "pretrained", "root",
    "seen_classes", "tree", "without",
}  # fmt: skip
"""Keys whose text is the path of a file or folder to read; a test compares them with the classes
that a recipe may name."""

_TABLES = (IMAGENET_DET_44, COCO)  # of seen classes
_SECTIONS = {"model", "data", "report", "ckpt_path"}
_DEFAULT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*,([^{}]*)\}")

_Change = Callable[[str, str], str]  # of a key and its text


def relative_to_recipe(values: Mapping[str, Any], recipe: str | Path) -> dict[str, Any]:
    """Return the values of a recipe with its paths relative to the working folder, or absolute.

    Unchanged are the values of variables and of references to other values. References are not
    resolved, but for variables that are not set: of these, the default is used.
    """
    folder = os.path.dirname(expand(recipe))
    return _change_paths(values, lambda key, text: _join(folder, key, text))


def absolute(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return resolved values of a recipe with paths that are valid in every folder."""
    return _change_paths(values, lambda key, text: _join(os.getcwd(), key, text))


def _change_paths(values: Mapping[str, Any], change: _Change) -> dict[str, Any]:
    return {
        key: _changed(value, str(key), change) if str(key).split(".")[0] in _SECTIONS else value
        for key, value in values.items()
    }


def _changed(value: Any, key: str, change: _Change) -> Any:
    name = key.rsplit(".", 1)[-1].removesuffix("+")
    if isinstance(value, str):
        return change(name, value) if name in INPUT_KEYS else value
    if isinstance(value, list):  # texts of a list are names
        return [_changed(item, "", change) for item in value]
    if isinstance(value, dict) and name != "mapping":  # whose keys are names of classes
        return {k: _changed(v, str(k), change) for k, v in value.items()}
    return value


def _join(folder: str, key: str, text: str) -> str:
    """Return a path below a folder, unless the text is no relative path."""
    path, match = text, _DEFAULT.match(text)
    if match and may_read(match[1]) and match[1] not in os.environ:
        default = match[2].strip()
        path = "" if default == "null" else default + text[match.end() :]
    is_other = path.startswith(("${", "~", "/")) or "\0" in path or URL.search(path)
    if not folder or not path or is_other or (key == "seen_classes" and path in _TABLES):
        return text
    # not through the target of a link, as the user sees the folders
    joined = os.path.normpath(os.path.join(folder, path))
    # names may also be a file of the dataset
    return text if key == "names" and not os.path.isfile(joined) else joined
