"""The recipes of this package, with their trees and launchers."""

import os
import re
from pathlib import Path

from yolo_lightning.errors import InputError, nearest

LAUNCHERS = "cluster"  # the folder of the scripts that start a training on several machines


def folder() -> Path:
    """Return the folder of the recipes: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Return the names of the recipes."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def recipe(name: str) -> Path:
    """Return the path of a recipe, relative to the working folder if it is below.

    Raises:
        InputError: there is no such recipe.
    """
    known = names()
    name = name.removesuffix(".yaml")
    if name not in known:
        hint = nearest(name, known) or f"allowed: {', '.join(known)}"
        raise InputError(f"no recipe {name!r} in this package; {hint}")
    path = folder() / f"{name}.yaml"
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def purpose(name: str) -> str:
    """Return the first line of a recipe's comment."""
    with recipe(name).open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def files(name: str) -> list[str]:
    """Return a recipe's file and those of the trees that it names, relative to `folder`."""
    text = recipe(name).read_text(encoding="utf-8")
    trees = sorted(set(re.findall(r"\btrees/[\w.]+", text)))
    return [f"{recipe(name).stem}.yaml", *(t for t in trees if (folder() / t).is_file())]


def launchers() -> list[str]:
    """Return the scripts that start a training on several machines, relative to `folder`."""
    return sorted(f"{LAUNCHERS}/{name}" for name in os.listdir(folder() / LAUNCHERS))


def copy_hint(missing: str | Path) -> str:
    """Return how to get a recipe that is not found; empty if this package has none of its name."""
    name = Path(missing).name.removesuffix(".yaml")
    if name not in names():
        return ""
    return f"`yolo-lightning recipes copy {name}` copies that of this package"
