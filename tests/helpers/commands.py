"""Parse the commands of the documentation with the real parsers, without running them.

A word in capitals (`RECIPE`, `--seed_everything SEED`) stands for a value of the reader's:
`PLACEHOLDERS` gives one. `$name` stands for 1. A recipe or tree without a folder (`mine.yaml`)
is the reader's own file and replaced by one of ours; a path inside the repository must exist.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import re
import shlex
import threading
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest

from tests.helpers.paths import REPO
from yolo_lightning.cli.arguments import CommandParser
from yolo_lightning.cli.main import main
from yolo_lightning.cli.recipe import RecipeCLI
from yolo_lightning.cli.recipe_parser import ANY_MODEL, parse

RECIPE = "recipes/quickstart.yaml"
PLACEHOLDERS = {
    "RECIPE": RECIPE, "CKPT": "best.ckpt", "PATH": "data", "FILE": "file.txt", "NAME": "name",
    "N": "1", "SEED": "1", "RULE": "label", "ADDRESS": "address",
}  # fmt: skip
FOLDERS = ("yolo_lightning", "datamodules", "callbacks", "recipes", "tests", "docs", ".ci")
# known to every reader, and nothing of ours to check
SHELL = {"git", "cd", ".", "echo", "curl", "mlflow", "for", "do", "done", "export", "$EDITOR"}
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (REPO / "Makefile").read_text(encoding="utf-8")
_built: dict[str, Any] = {}  # the parser of recipes of each command
_active = threading.local()  # whether a parser is at work: it calls its own methods, and subparsers


class BadCommand(Exception):
    """A documented command that would not start."""


class Parsed(Exception):
    """A command's parser has accepted its arguments; holds those it leaves to the recipe."""

    def __init__(self, overrides: Sequence[str] = ()) -> None:
        super().__init__(overrides)
        self.overrides = list(overrides)


def fences(text: str, language: str) -> list[str]:
    """Return the code blocks of a page that name this language."""
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.S | re.M)
    return [block for name, block in blocks if name == language]


def inline_code(text: str) -> list[str]:
    """Return the code spans of a page, outside of code blocks, on one line each."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands_of(text: str) -> Iterator[str]:
    """Yield the command lines of a page: lines of `sh` blocks, and code spans of our programs."""
    for block in fences(text, "sh"):
        script = re.sub(r"\\\n\s*", "", block)
        script = re.sub(r"\|\n\s*", "| ", script)
        yield from filter(None, (line.strip() for line in script.splitlines()))
    for span in inline_code(text):
        if re.match(r"(\w+=\S+ )*(\.venv/bin/)?(yolo-lightning|make|python3?|pytest|pip) ", span):
            yield span


def header_commands(recipe: str) -> list[str]:
    """Return the commands in the comment at the top of a recipe, without the words beside them."""
    header = recipe.partition("\nseed_everything")[0]
    lines = re.sub(r"\\\n#\s*", "", header)
    return [re.split(r"\s{2,}", line)[0] for line in re.findall(r"^#   (\S.*)$", lines, re.M)]


def check(command: str) -> None:
    """Parse a command line.

    Raises:
        BadCommand: an unknown program, file, option, value or placeholder.
    """
    words = [_own_value(word) for word in shlex.split(command, comments=True)]
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    if not words or words[0] in SHELL:
        return
    program, args = words[0].removeprefix(".venv/bin/"), words[1:]
    missing = [w for w in words if w.split("/")[0] in FOLDERS and not (REPO / w).exists()]
    if missing:
        raise BadCommand(f"no such file: {', '.join(missing)}")
    if program in ("torchrun", "srun"):
        start = next(k for k, word in enumerate(words) if word.startswith("yolo"))
        program, args = "yolo-lightning", words[start + 1 :]
    if program.endswith(("torchrun.sh", "sbatch")):
        recipe, *options = args if program.endswith(".sh") else args[1:]
        program, args = "yolo-lightning", ["fit", "--config", recipe, *options]
    if program.endswith("chain.sh"):
        name, *rest = [word for word in args if word not in ("--slurm", "--dry-run")]
        program, args = "yolo-lightning", ["chain", name, RECIPE, *rest]
    checks = {
        "yolo-lightning": _check_ours, "make": _check_make, "pip": _check_pip,
        "pytest": _check_pytest, "python": _check_python, "python3": _check_python,
    }  # fmt: skip
    if program not in checks:
        raise BadCommand(f"unknown program {program!r}")
    checks[program](args)


def _own_value(word: str) -> str:
    """Return a word with a value for its placeholder."""
    option, equals, value = word.rpartition("=")
    if value.startswith("$") and value != "$EDITOR":
        value = "1"
    elif re.fullmatch(r"[A-Z]+", value) and not (equals and option.isupper()):
        if value not in PLACEHOLDERS:
            raise BadCommand(f"unknown placeholder {value!r}; known: {', '.join(PLACEHOLDERS)}")
        value = PLACEHOLDERS[value]
    return option + equals + value


def _check_make(args: Sequence[str]) -> None:
    for target in args:
        if not re.search(rf"^{re.escape(target)}:", MAKEFILE, re.M):
            raise BadCommand(f"no target {target!r} in the Makefile")


def _check_pip(args: Sequence[str]) -> None:
    extras = {name for word in args for part in re.findall(r"\[(.*)\]", word)
              for name in part.split(",")}  # fmt: skip
    unknown = extras - set(PYPROJECT["project"]["optional-dependencies"])
    pinned = [args[k + 1] for k, word in enumerate(args[:-1]) if word == "-c"]
    if args[0] != "install" or unknown or not all((REPO / file).is_file() for file in pinned):
        raise BadCommand(f"pip {shlex.join(args)}: unknown extras {unknown or 'none'}")


def _check_pytest(args: Sequence[str]) -> None:
    markers = {text.split(":")[0] for text in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    selected = [args[k + 1] for k, word in enumerate(args[:-1]) if word == "-m"]
    words = {word for expression in selected for word in expression.split()}
    unknown = words - markers - {"not", "and", "or"}
    if unknown:
        raise BadCommand(f"unknown markers {unknown}")


def _check_python(args: Sequence[str]) -> None:
    if args[0] == "-m":
        if importlib.util.find_spec(args[1]) is None:
            raise BadCommand(f"no module {args[1]!r}")
        return
    script = REPO / args[0]
    if not script.is_file():
        raise BadCommand(f"no script {args[0]!r}")
    text = script.read_text(encoding="utf-8")
    unknown = [w for w in args if w.startswith("--") and f'"{w}"' not in text]
    if unknown:
        raise BadCommand(f"{args[0]} has no {', '.join(unknown)}")


def _check_ours(args: Sequence[str]) -> None:
    with_actions = {"mlflow", "wordtree", "darknet"}
    if len(args) == 1 or (len(args) == 2 and args[0] in with_actions):
        args = [*args, "--help"]  # the name of a command alone: `yolo-lightning detect`
    args = [RECIPE if "/" not in word and word.endswith(".yaml") else word for word in args]
    overrides = parse_only(*args)
    if overrides:
        parse_only("fit", "--config", RECIPE, *overrides)


@cache
def parse_only(*args: str) -> Sequence[str]:
    """Run `yolo-lightning` up to the end of the command's parser.

    Returns:
        The arguments that the command passes on to its recipe.

    Raises:
        BadCommand: the command would refuse its arguments.
    """
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as errors:
        patch.chdir(REPO)
        # eight GPUs, and a launcher for several nodes
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
        patch.setenv("MASTER_ADDR", "localhost")
        patch.setattr(RecipeCLI, "setup_parser", _set_up_once)
        patch.setattr(RecipeCLI, "parse_arguments", _parse_recipe)
        for name in ("args", "known_args", "intermixed_args", "known_intermixed_args"):
            original = getattr(argparse.ArgumentParser, f"parse_{name}")
            patch.setattr(argparse.ArgumentParser, f"parse_{name}", _stopping(original))
        try:
            code: Any = main(list(args))
        except Parsed as parsed:
            return parsed.overrides
        except SystemExit as error:
            code = error.code
        except Exception as error:
            raise BadCommand(f"{shlex.join(args)}: {error}") from error
    if code:
        raise BadCommand(f"{shlex.join(args)}: {errors.getvalue()}")
    return ()


def _set_up_once(cli: RecipeCLI, *args: Any, original: Any = RecipeCLI.setup_parser) -> None:
    command = cli.command_line[0]
    if command not in _built:
        original(cli, *args)
        _built[command] = cli.parser
    cli.parser = _built[command]


def _parse_recipe(cli: RecipeCLI, parser: Any, args: Sequence[str]) -> None:
    parse(parser, args, cli.recipes, None if args[0] == "fit" else ANY_MODEL)
    raise Parsed


def _stopping(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of `ArgumentParser`: its outermost call raises `Parsed`."""

    def parse(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        is_command = type(self) in (argparse.ArgumentParser, CommandParser)
        if not is_command or getattr(_active, "value", False):
            return original(self, *args, **options)
        _active.value = True
        try:
            result = original(self, *args, **options)
        finally:
            _active.value = False
        raise Parsed(result[1] if isinstance(result, tuple) else ())

    return parse
