"""`yolo-lightning recipes`: list, show and copy the recipes of this package."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from yolo_lightning.cli import packaged
from yolo_lightning.errors import InputError, read_bytes, write_atomically

ALL = "all"
_LAUNCHERS = "scripts that start a training on several machines, or one training after another"


def main(argv: Sequence[str]) -> None:
    """List the recipes, print one, or copy one with the files that it names.

    Raises:
        InputError: an unknown name, or another file is in the place of a copy.
    """
    parser = argparse.ArgumentParser(
        prog="yolo-lightning recipes",
        description="List the recipes of this package; show or copy one. Paths in a recipe are "
        "relative to the recipe's folder, so a recipe is copied with the trees that it names.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name", metavar="NAME", help="of a recipe")
    copy = actions.add_parser("copy", help="copy a recipe with the trees that it names")
    copy.add_argument(
        "name", metavar="NAME", help=f"of a recipe; {packaged.LAUNCHERS}: {_LAUNCHERS}; {ALL}"
    )
    copy.add_argument(
        "to", metavar="TO", nargs="?", default="recipes", type=Path,
        help="folder (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(list(argv))
    if options.action == "show":
        print(packaged.recipe(options.name).read_text(encoding="utf-8"), end="")
    elif options.action == "copy":
        _copy(options.name, options.to)
    else:
        _print_list()


def _print_list() -> None:
    rows = {name: packaged.purpose(name) for name in packaged.names()}
    rows[packaged.LAUNCHERS] = _LAUNCHERS
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {text}" for name, text in rows.items()))
    print("\nyolo-lightning recipes copy NAME    copy one to the folder recipes, to train with it")


def _copy(name: str, to: Path) -> None:
    if to.suffix in (".yaml", ".yml"):
        raise InputError(f"TO is {str(to)!r}; allowed: a folder")
    recipes = packaged.names() if name == ALL else [] if name == packaged.LAUNCHERS else [name]
    files = [file for recipe in recipes for file in packaged.files(recipe)]
    files += packaged.launchers() if name in (ALL, packaged.LAUNCHERS) else []
    contents = {to / f: read_bytes(packaged.folder() / f) for f in dict.fromkeys(files)}
    for path, content in contents.items():
        if path.exists() and (not path.is_file() or path.read_bytes() != content):
            raise InputError(f"{path} exists already, with other content; use another TO")
    for path, content in contents.items():
        write_atomically(path, content)
        if path.suffix == ".sh":
            path.chmod(path.stat().st_mode | 0o111)
        print(path)
    if len(recipes) == 1:
        recipe = next(path for path in contents if path.suffix == ".yaml")
        is_test = recipe.name.startswith("test_")
        command = f"test {shlex.quote(str(recipe))} --ckpt_path CKPT" if is_test else None
        print(f"\nyolo-lightning {command or f'fit {shlex.quote(str(recipe))}'}")
