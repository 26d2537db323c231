"""`yolo-lightning speed`: what every image size costs, and what it is worth."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from yolo_lightning.cli.commands.detect import named_folder
from yolo_lightning.errors import InputError, nearest

SIZES = (288, 352, 416, 480, 544, 608)
"""px. Source: YOLO9000, table 3 and figure 4; 608 is the largest size of its training."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning speed",
        description="Measure speed at every image size, and accuracy where a recipe has images.",
        epilog="With --recipe any other option goes to the recipe, such as --data.test.root PATH.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help="a detector, trained or imported")
    add("--recipe", help="its test images are timed, and average precision measured on them")
    add("--image-sizes", type=int, nargs="+", default=SIZES, metavar="PX", help="288, 352 … 608")
    add("--batch-size", type=int, default=8, metavar="N", help="images timed at once; 8")
    add("--device", help="cpu, cuda, cuda:1 …; a GPU where there is one")
    add("--half", action="store_true", help="float16 on GPUs, bfloat16 on CPUs")
    add("--threads", type=int, help="of the CPU; as many as PyTorch takes")
    add("--runs", type=int, default=20, help="of which the median is told; 20")
    add("--output", metavar="FOLDER", help="an empty or new folder; a fresh one under outputs/")
    return parser


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, checked, and those that are the recipe's."""
    parser = _parser()
    options, overrides = parser.parse_known_args(list(argv))
    for name in ("batch_size", "threads", "runs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    options.image_sizes = sorted(set(options.image_sizes))
    if options.image_sizes[0] < 1:
        raise InputError(f"--image-sizes holds {options.image_sizes[0]}; allowed: 32, 64 …")
    for arg in overrides:  # the recipe's have a dot in their names, and may be followed by a value
        if not options.recipe or (arg.startswith("--") and "." not in arg.partition("=")[0]):
            raise InputError(f"{arg}: no such option; {_hint(parser, arg)}")
    return options, overrides


def _hint(parser: argparse.ArgumentParser, arg: str) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    return nearest(arg, known) or "with --recipe, those of the recipe: --data.test.root PATH"


def _folder(output: str | None, checkpoint: str) -> Path:
    """Return a folder that holds nothing yet; it is not made."""
    if output is None:
        places = (Path(f"outputs/speed/{Path(checkpoint).stem}-{k:03}") for k in itertools.count(1))
        return next(place for place in places if not place.exists())
    return named_folder(output)


def main(argv: Sequence[str]) -> None:
    """Print a table, and write it and a picture.

    Raises:
        InputError: bad options, no detector, no such device, or a recipe that does not fit it.
    """
    options, overrides = _parse(argv)
    folder = _folder(options.output, options.checkpoint)
    import torch

    from yolo_lightning.cli.commands.speed.rows import measure_all

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        measure_all(options, overrides, folder)
    finally:
        torch.set_num_threads(threads)
