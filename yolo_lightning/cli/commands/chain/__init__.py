"""`yolo-lightning chain`: check the stages of a chain of trainings, and list those left to train.

A stage starts from the best checkpoint of the stage before. `recipes/cluster/chain.sh` runs them.
"""

import argparse
import contextlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from yolo_lightning.errors import InputError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning chain",
        allow_abbrev=False,
        description="Check the stages of a chain of trainings, each of which starts from the best "
        "checkpoint of the one before. Prints their state, and the recipe and options of fit for "
        "each stage that is not finished. recipes/cluster/chain.sh runs them. Further options are "
        "those of fit, for all stages, and follow the recipes.",
    )
    parser.add_argument("name", help="of the chain: its folder, and the MLflow tag of its runs")
    parser.add_argument("recipes", nargs="+", metavar="recipe", help="of a stage, in order")
    parser.add_argument("--folder", default="outputs/chain", help="default: %(default)s")
    return parser


def main(argv: Sequence[str]) -> None:
    """Print the state of each stage to stderr, and what is left to train to stdout.

    Raises:
        InputError: see `plan`.
    """
    options, fit_options = _parser().parse_known_args(list(argv))
    from yolo_lightning.cli.commands.chain.stages import arguments, describe, plan

    if not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9_-][A-Za-z0-9_.-]*", options.name):
        raise InputError(f"chain name {options.name!r}; allowed: letters, digits, '_', '.' and '-'")
    folder = Path(options.folder) / options.name
    with contextlib.redirect_stdout(sys.stderr):
        stages = plan(folder, options.recipes, fit_options)
    print("\n".join([f"chain {folder}", *describe(stages)]), file=sys.stderr)
    for before, stage in zip([None, *stages], stages, strict=False):
        if stage.finished_step is None:
            print(shlex.join(arguments(before, stage, options.name)))
