"""The command line: `yolo-lightning COMMAND …`; nothing heavy is imported before it is needed."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from yolo_lightning import __version__
from yolo_lightning.errors import InputError, nearest

COMMANDS = {
    "fit": ("yolo_lightning.cli", "train what a recipe describes"),
    "validate": ("yolo_lightning.cli", "measure a checkpoint on the recipe's validation images"),
    "test": ("yolo_lightning.cli", "measure a checkpoint on the recipe's test images"),
    "init": ("yolo_lightning.commands.init", "write a recipe for datasets of your own"),
    "check-data": ("yolo_lightning.commands.check_data", "read all of a dataset and report"),
    "anchors": ("yolo_lightning.commands.anchors", "cluster the boxes of a dataset into priors"),
    "batch": ("yolo_lightning.commands.batch", "show what a training step reads"),
    "benchmark": ("yolo_lightning.commands.benchmark", "measure how fast a dataset is read"),
    "detect": ("yolo_lightning.commands.detect", "find objects in images, video, and streams"),
    "explain": ("yolo_lightning.commands.explain", "draw what the loss sees in an image"),
    "speed": ("yolo_lightning.commands.speed", "measure speed, and accuracy, at every image size"),
    "export": ("yolo_lightning.commands.export", "a graph for other runtimes, such as ONNX"),
    "classify": ("yolo_lightning.commands.classify", "name what images show"),
    "darknet": ("yolo_lightning.commands.darknet", "Darknet's files to a checkpoint and back"),
    "wordtree": ("yolo_lightning.commands.wordtree", "build a tree of classes, and look at it"),
    "quickstart": (
        "yolo_lightning.commands.quickstart",
        "train jointly and on boxes alone, and compare",
    ),
}
_RECIPE_COMMANDS = ("fit", "validate", "test")


def usage() -> str:
    """Return the overview that `yolo-lightning --help` prints."""
    lines = [
        "usage: yolo-lightning COMMAND [options]",
        "",
        "Train YOLOv2 and YOLO9000 on boxes and image labels together.",
        "",
        *(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()),
        "",
        "  yolo-lightning fit --config recipes/quickstart.yaml",
        "  yolo-lightning COMMAND --help    all options of a command",
        "  yolo-lightning --version",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, or 2 with one message for bad input."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        hint = nearest(args[0], COMMANDS) or f"allowed: {', '.join(COMMANDS)}"
        print(f"yolo-lightning: unknown command {args[0]!r}; {hint}", file=sys.stderr)
        return 2
    # two processes on one machine: threads that spin while they wait slow each other 30-fold
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    module = import_module(COMMANDS[args[0]][0])
    try:
        module.main(args if args[0] in _RECIPE_COMMANDS else args[1:])
    except InputError as error:
        # a loader's worker puts its traceback around the message
        message = str(error).rsplit("InputError: ", 1)[-1].strip()
        print(f"yolo-lightning: error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
