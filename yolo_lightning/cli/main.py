"""The entry point `yolo-lightning COMMAND …`; heavy modules are imported only when needed."""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from yolo_lightning import signals
from yolo_lightning.errors import InputError, MissingFile, mask_secrets, nearest, printable
from yolo_lightning.version import __version__

COMMANDS = {
    "fit": ("recipe", "train a model from a recipe"),
    "validate": ("recipe", "evaluate a checkpoint on the validation images of a recipe"),
    "test": ("recipe", "evaluate a checkpoint on the test images of a recipe"),
    "recipes": ("commands.recipes", "list, show and copy the recipes of this package"),
    "chain": ("commands.chain", "check trainings that start from each other, list what is left"),
    "init": ("commands.init", "write a recipe for your own datasets"),
    "check-data": ("commands.check_data", "read all of a dataset and report errors"),
    "anchors": ("commands.anchors", "cluster the boxes of a dataset into anchors"),
    "batch": ("commands.batch", "list and draw the samples of a training step"),
    "benchmark": ("commands.benchmark", "measure how fast a dataset is read"),
    "detect": ("commands.detect", "detect objects in images, videos and streams"),
    "explain": ("commands.explain", "draw every term of the loss on one image"),
    "speed": ("commands.speed", "measure speed, and accuracy, at every image size"),
    "networks": ("commands.networks", "list the built-in networks with their size and operations"),
    "export": ("commands.export", "export a detector to ONNX or torch.export"),
    "classify": ("commands.classify", "classify images"),
    "darknet": ("commands.darknet", "convert Darknet files to a checkpoint and back"),
    "wordtree": ("commands.wordtree", "build, print or draw a tree of classes"),
    "quickstart": ("commands.quickstart", "train with and without image labels, and compare"),
    "mlflow": ("commands.mlflow", "open the dashboard, compare runs, sync, log models"),
    "doctor": ("commands.doctor", "check this machine and its connections"),
}
_PATHS = "a path in a recipe is relative to the recipe's folder, others to the working folder"
_MAX_MESSAGE = 100_000  # characters of an error
_LIGHTNING_COMMANDS = ("fit", "validate", "test")
_TRAINING_COMMANDS = ("fit", "quickstart")
# commands that Lightning runs, which would hide Ctrl-C behind an exit code of its own
_STOP_SIGNALS = {
    **dict.fromkeys(_TRAINING_COMMANDS, signals.SIGNALS),
    **dict.fromkeys(("validate", "test"), (signals.INTERRUPT,)),
}
_POSITIONAL_RECIPES = ("chain", "check-data", "anchors", "batch", "explain")
_RECIPE_COMMANDS = {*_LIGHTNING_COMMANDS, *_POSITIONAL_RECIPES, "speed", "quickstart"}


def usage() -> str:
    """Return the text of `yolo-lightning --help`."""
    lines = [
        "usage: yolo-lightning COMMAND [options]",
        "",
        "Train YOLOv2 and YOLO9000 on boxes and image labels together.",
        "",
        *(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items()),
        "",
        "  yolo-lightning recipes copy quickstart",
        "  yolo-lightning fit recipes/quickstart.yaml",
        "  yolo-lightning COMMAND --help    all options of a command",
        "  yolo-lightning COMMAND … --allow-module my_package    allow your classes in a recipe",
        "  yolo-lightning COMMAND … --allow-env NAME    let a recipe read a variable",
        "  yolo-lightning --version",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 with one message for bad input.

    Raises:
        Stop: a stop signal ended `fit`, `quickstart`, `validate` or `test`.
    """
    args = command_line = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        from yolo_lightning.cli import arguments

        other = arguments.OTHER_COMMANDS.get(args[0])
        hint = f"here: yolo-lightning {other}" if other else nearest(args[0], COMMANDS)
        hint = hint or f"allowed: {', '.join(COMMANDS)}"
        print(f"yolo-lightning: unknown command {args[0]!r}; {hint}", file=sys.stderr)
        return 2
    if args[0] != "detect":  # detect runs as one process
        # with several processes on one machine, spinning threads slow each other down 30-fold
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # before the long imports, because a cluster may stop the job at any moment
    restore_handlers = signals.install_handlers(_STOP_SIGNALS.get(args[0], ()))
    try:
        run(args)
    except InputError as error:
        print(f"yolo-lightning: error: {error}", file=sys.stderr)
        return 2
    except signals.Stop as stop:
        if signals.is_first_rank():
            print(_describe_stop(command_line, stop), file=sys.stderr)
        raise
    finally:
        restore_handlers()
    return 0


def run(args: Sequence[str]) -> Any:
    """Run a command of `COMMANDS`, and return what its module returns.

    Raises:
        InputError: bad input; the message may be printed as it is.
        Stop: see `main`.
    """
    hint = ""
    try:
        if args[0] in _RECIPE_COMMANDS:
            args = _check_arguments(args)
            hint = f"; {_PATHS}"
        with signals.leave_at_interrupts(), _without_collection():
            module = import_module(f"yolo_lightning.cli.{COMMANDS[args[0]][0]}")
        return module.main(args if args[0] in _LIGHTNING_COMMANDS else args[1:])
    except InputError as error:
        raise printable_error(error, hint if isinstance(error, MissingFile) else "") from None


def printable_error(error: InputError, hint: str = "") -> InputError:
    """Return an error whose message, with a hint at its end, may be printed as it is."""
    # errors of a loader worker contain its traceback
    message = str(error).rsplit("InputError: ", 1)[-1].strip()[:_MAX_MESSAGE]
    return InputError(printable(mask_secrets(message + hint)))


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Do not collect garbage: a fifth of the time of long imports, which leave almost none."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _describe_stop(args: Sequence[str], stop: signals.Stop) -> str:
    """Return how a stopped training goes on, or just that it stopped."""
    from yolo_lightning.cli import launch

    if stop.requeued:
        return "the job was requeued, and goes on by itself"
    if stop.checkpoint is None:
        return "stopped"
    if launch.has_launcher(os.environ):
        return "to go on, start the job again with --resume auto"
    if args[0] == "fit":
        return f"to go on: {launch.with_checkpoint(args, stop.checkpoint)}"
    return f"stopped; the training is in {stop.checkpoint.parent.parent}"


def _check_arguments(args: Sequence[str]) -> list[str]:
    """Check recipes, options and launch before heavy imports; return args for the command.

    Raises:
        InputError: see `arguments`, `recipe_check`, `recipe_policy` and `launch`.
    """
    from yolo_lightning.cli import arguments, launch, packaged, recipe_policy

    if args[0] in _POSITIONAL_RECIPES:
        args = [word.removeprefix("--config=") for word in args if word != "--config"]
    elif args[0] != "speed":
        args = arguments.expand_recipes(args)
    args, modules, variables = launch.split_allowed(args)
    recipe_policy.allow(modules, variables)
    default_recipe = [str(packaged.recipe(args[0]))] if args[0] == "quickstart" else []
    values = launch.check_command_line([*default_recipe, *args[1:]], modules)
    if args[0] in _TRAINING_COMMANDS:
        launch.check_launch(values, os.environ, launch.visible_gpu_count(os.environ))
    return args


def console() -> int:
    """Run a command from a shell; exit quietly on Ctrl-C and when the output pipe closes.

    If the output cannot be written, training goes on, and other commands fail in the end.
    """
    from yolo_lightning.cli.streams import tolerate_full_disk

    files = tolerate_full_disk()
    try:
        if signal.getsignal(signals.INTERRUPT) is signal.SIG_DFL:  # set while this was imported
            signal.signal(signals.INTERRUPT, signal.default_int_handler)
        code = main()
        if code:  # nothing is left to do, and collecting at exit takes a second
            gc.freeze()
        sys.stdout.flush()
        is_training = sys.argv[1:2] and sys.argv[1] in _TRAINING_COMMANDS
        return code or int(any(file.error for file in files) and not is_training)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signals.INTERRUPT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
