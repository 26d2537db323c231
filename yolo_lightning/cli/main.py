"""The command line: `yolo-lightning COMMAND …`; nothing heavy is imported before it is needed."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from yolo_lightning import __version__, signals
from yolo_lightning.errors import InputError, nearest

COMMANDS = {
    "fit": ("recipe", "train what a recipe describes"),
    "validate": (
        "recipe",
        "measure a checkpoint on the recipe's validation images",
    ),
    "test": ("recipe", "measure a checkpoint on the recipe's test images"),
    "init": ("commands.init", "write a recipe for datasets of your own"),
    "check-data": ("commands.check_data", "read all of a dataset and report"),
    "anchors": (
        "commands.anchors",
        "cluster the boxes of a dataset into anchors",
    ),
    "batch": ("commands.batch", "show what a training step reads"),
    "benchmark": ("commands.benchmark", "measure how fast a dataset is read"),
    "detect": ("commands.detect", "find objects in images, video, and streams"),
    "explain": ("commands.explain", "draw what the loss sees in an image"),
    "speed": (
        "commands.speed",
        "measure speed, and accuracy, at every image size",
    ),
    "export": ("commands.export", "a graph for other runtimes, such as ONNX"),
    "classify": ("commands.classify", "name what images show"),
    "darknet": ("commands.darknet", "Darknet's files to a checkpoint and back"),
    "wordtree": ("commands.wordtree", "build a tree of classes, and look at it"),
    "quickstart": (
        "commands.quickstart",
        "train jointly and on boxes alone, and compare",
    ),
    "mlflow": (
        "commands.mlflow",
        "the dashboard, comparing runs, syncing, models",
    ),
    "doctor": ("commands.doctor", "say what this machine has, and what answers"),
}
_LIGHTNING_COMMANDS = ("fit", "validate", "test")
_RECIPE_COMMANDS = {
    *_LIGHTNING_COMMANDS, "check-data", "anchors", "batch", "explain", "speed", "quickstart",
}  # fmt: skip


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
        "  yolo-lightning COMMAND … --allow-module my_package    classes of yours in a recipe",
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
    if args[0] != "detect":  # one process, its threads always at work
        # two processes on one machine: threads that spin while they wait slow each other 30-fold
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # before the long imports: a job may be told to stop at any moment
    handlers = signals.listen() if args[0] == "fit" else {}
    try:
        if args[0] in _RECIPE_COMMANDS:
            args = _checked(args)
        module = import_module(f"yolo_lightning.cli.{COMMANDS[args[0]][0]}")
        module.main(args if args[0] in _LIGHTNING_COMMANDS else args[1:])
    except InputError as error:
        # a loader's worker puts its traceback around the message
        message = str(error).rsplit("InputError: ", 1)[-1].strip()
        print(f"yolo-lightning: error: {message}", file=sys.stderr)
        return 2
    finally:
        signals.restore(handlers)
    return 0


def _checked(args: Sequence[str]) -> list[str]:
    """Look at recipes, options and the launch before anything heavy, or of a recipe's, is imported.

    Returns:
        The arguments without those that are for this alone.

    Raises:
        InputError: see `recipe_check` and `preflight`.
    """
    from yolo_lightning.cli import launch, recipe_check

    args, allowed = launch.split_allowed(args)
    unnamed = ["recipes/quickstart.yaml"] if args[0] == "quickstart" else []
    values = launch.check_command_line([*unnamed, *args[1:]], allowed)
    if args[0] in ("fit", "quickstart"):
        launch.check_launch(values, os.environ, lambda: launch.visible_gpus(os.environ))
    recipe_check.restrict_imports(allowed)
    return args


def console() -> int:
    """Run a command for a shell; who reads its output may stop reading, as `head` does."""
    try:
        return main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
