"""The command line: `yolo-lightning COMMAND …`; nothing heavy is imported before it is needed."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from yolo_lightning import __version__, signals
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
    "mlflow": ("yolo_lightning.commands.mlflow", "the dashboard, comparing runs, syncing, models"),
    "doctor": ("yolo_lightning.commands.doctor", "say what this machine has, and what answers"),
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
        module = import_module(COMMANDS[args[0]][0])
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
    from yolo_lightning import preflight, recipe_check

    args, allowed = preflight.split_allowed(args)
    unnamed = ["recipes/quickstart.yaml"] if args[0] == "quickstart" else []
    values = preflight.check_command_line([*unnamed, *args[1:]], allowed)
    if args[0] in ("fit", "quickstart"):
        preflight.check_launch(values, os.environ, lambda: preflight.visible_gpus(os.environ))
    recipe_check.hold_parser_to(allowed)
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


if __name__ == "__main__":
    sys.exit(console())
