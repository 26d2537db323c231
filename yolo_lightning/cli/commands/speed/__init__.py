"""`yolo-lightning speed`: measure speed and accuracy at several image sizes."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from yolo_lightning.cli.commands.detect import check_output_folder
from yolo_lightning.errors import InputError, nearest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning speed",
        description="Measure speed at several image sizes, and accuracy on the images of a recipe.",
        epilog="With --recipe, other options override the recipe, such as --data.test.root PATH.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", help="a detector or a classifier, trained or imported")
    add("--recipe", help="time its test images and measure the accuracy on them")
    add(
        "--image-sizes",
        type=int,
        nargs="+",
        metavar="PX",
        help="(default: 288 352 416 480 544 608, of a classifier 224 448)",
    )
    add("--batch-size", type=int, default=8, metavar="N", help="images per batch (default: 8)")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if available)")
    add("--half", action="store_true", help="float16 on GPUs, bfloat16 on CPUs")
    add("--threads", type=int, help="CPU threads (default: PyTorch's)")
    add("--runs", type=int, default=20, help="timed runs per size (default: 20)")
    add("--output", metavar="FOLDER", help="empty or new folder (default: a new one in outputs/)")
    return parser


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the validated options, and the overrides of the recipe."""
    parser = _parser()
    options, overrides = parser.parse_known_args(list(argv))
    for name in ("batch_size", "threads", "runs"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    if options.image_sizes is not None:
        options.image_sizes = sorted(set(options.image_sizes))
        if options.image_sizes[0] < 1:
            raise InputError(f"--image-sizes contains {options.image_sizes[0]}; allowed: 32, 64 …")
    for arg in overrides:  # names of recipe options have a dot; an argument may also be a value
        if not options.recipe or (arg.startswith("--") and "." not in arg.partition("=")[0]):
            raise InputError(f"{arg}: no such option; {_hint(parser, arg)}")
    return options, overrides


def _hint(parser: argparse.ArgumentParser, arg: str) -> str:
    known = [name for action in parser._actions for name in action.option_strings]
    return nearest(arg, known) or "with --recipe, also options of the recipe: --data.test.root PATH"


def _output_folder(output: str | None, checkpoint: str) -> Path:
    """Return an empty or new folder, without creating it."""
    if output is None:
        stem = Path(checkpoint).stem
        numbered = (Path(f"outputs/speed/{stem}-{k:03}") for k in itertools.count(1))
        return next(folder for folder in numbered if not folder.exists())
    return check_output_folder(output)


def main(argv: Sequence[str]) -> None:
    """Run `speed`: print a table, and write it with a plot."""
    options, overrides = _parse(argv)
    folder = _output_folder(options.output, options.checkpoint)
    import torch

    from yolo_lightning.cli.commands.speed.measurement import measure_all

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        measure_all(options, overrides, folder)
    finally:
        torch.set_num_threads(threads)
