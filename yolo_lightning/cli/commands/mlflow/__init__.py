"""`yolo-lightning mlflow COMMAND`: commands for the runs in an MLflow tracking store."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from yolo_lightning.cli.commands.doctor.connections import check_tracking
from yolo_lightning.errors import InputError, nearest, require_file
from yolo_lightning.tracking.names import DEFAULT_STORE, SQLITE

COMMANDS = {
    "ui": "start the MLflow UI on the store of the recipes",
    "compare": "compare runs: metrics, different parameters, curves, batches",
    "sync": "upload what could not be uploaded during training",
    "model": "log a checkpoint as an MLflow model, to register and serve it",
}


def usage() -> str:
    """Return the text of `yolo-lightning mlflow --help`."""
    lines = [
        "usage: yolo-lightning mlflow COMMAND [options]",
        "",
        "Show, compare and upload runs in an MLflow tracking store.",
        "",
        *(f"  {name:<12}{text}" for name, text in COMMANDS.items()),
        "",
        f"  The store is MLFLOW_TRACKING_URI, by default {DEFAULT_STORE} in the working folder.",
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


def check_store(uri: str) -> str:
    """Check that a store responds, without creating it; return a description of its state.

    Raises:
        InputError: the SQLite file does not exist or is no file, or the store does not respond.
    """
    file = Path(uri.removeprefix(SQLITE))
    if uri.startswith(SQLITE) and not file.exists():
        raise InputError(
            f"no runs yet: there is no {file.name} in {file.parent}; the first training creates it."
            " Change to the folder where you started training, or set MLFLOW_TRACKING_URI"
        )
    if uri.startswith(SQLITE):
        require_file(file, "MLflow database")  # a pipe would block for ever
    result = check_tracking(uri)
    if result.state == "failed" and "not writable" not in result.text:  # reading is enough
        raise InputError(result.text)
    return result.text
