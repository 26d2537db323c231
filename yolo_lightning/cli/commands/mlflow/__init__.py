"""`yolo-lightning mlflow COMMAND`: commands for the runs in an MLflow tracking store."""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from yolo_lightning.cli.commands.doctor.connections import check_tracking
from yolo_lightning.errors import InputError, nearest

COMMANDS = {
    "ui": "start the MLflow UI on the store of the recipes",
    "compare": "compare runs: metrics, different parameters, curves, batches",
    "sync": "upload what could not be uploaded during training",
    "model": "log a checkpoint as an MLflow model, to register and serve it",
}
SQLITE = "sqlite:///"
_DEFAULT = "sqlite:///mlflow.db"


def usage() -> str:
    """Return the text of `yolo-lightning mlflow --help`."""
    lines = [
        "usage: yolo-lightning mlflow COMMAND [options]",
        "",
        "Show, compare and upload runs in an MLflow tracking store.",
        "",
        *(f"  {name:<12}{text}" for name, text in COMMANDS.items()),
        "",
        f"  The store is MLFLOW_TRACKING_URI, by default {_DEFAULT} in the working folder.",
        "  yolo-lightning mlflow COMMAND --help    show all options of a command",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Run one of the commands."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] not in COMMANDS:
        hint = nearest(argv[0], COMMANDS) or f"allowed: {', '.join(COMMANDS)}"
        raise InputError(f"unknown command 'mlflow {argv[0]}'; {hint}")
    import_module(f"yolo_lightning.cli.commands.mlflow.{argv[0]}").main(argv[1:])


def store_uri() -> str:
    """Return the address of the store, with an absolute path if it is a SQLite file."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT
    if uri.startswith(SQLITE):  # as in the logger: MLflow caches one engine per address
        return SQLITE + str(Path(uri.removeprefix(SQLITE)).absolute())
    return uri


def check_store(uri: str) -> str:
    """Check that a store responds, without creating it; return a description of its state.

    Raises:
        InputError: the SQLite file does not exist, or the store does not respond.
    """
    file = Path(uri.removeprefix(SQLITE))
    if uri.startswith(SQLITE) and not file.exists():
        raise InputError(
            f"no runs yet: there is no {file.name} in {file.parent}; the first training creates it."
            " Change to the folder where you started training, or set MLFLOW_TRACKING_URI"
        )
    result = check_tracking(uri)
    if result.state == "failed" and "not writable" not in result.text:  # reading is enough
        raise InputError(result.text)
    return result.text
