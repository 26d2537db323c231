"""`yolo-lightning mlflow COMMAND`: the runs that trainings leave in a tracking store."""

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from yolo_lightning.cli.commands.doctor.answers import tracking
from yolo_lightning.errors import InputError, nearest

COMMANDS = {
    "ui": "start the dashboard on the store that the recipes write to",
    "compare": "runs side by side: figures, differing parameters, curves, batches",
    "sync": "send what trainings kept back while the store did not answer",
    "model": "a checkpoint as a model of MLflow, for its registry and its servers",
}
SQLITE = "sqlite:///"
_DEFAULT = "sqlite:///mlflow.db"


def usage() -> str:
    """Return the overview that `yolo-lightning mlflow --help` prints."""
    lines = [
        "usage: yolo-lightning mlflow COMMAND [options]",
        "",
        "Look at the runs of trainings in MLflow's store.",
        "",
        *(f"  {name:<12}{text}" for name, text in COMMANDS.items()),
        "",
        f"  The store is MLFLOW_TRACKING_URI, else {_DEFAULT} in the working folder.",
        "  yolo-lightning mlflow COMMAND --help    all options of a command",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Run one of the commands.

    Raises:
        InputError: an unknown command, or what the command refuses.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    if argv[0] not in COMMANDS:
        hint = nearest(argv[0], COMMANDS) or f"allowed: {', '.join(COMMANDS)}"
        raise InputError(f"unknown command 'mlflow {argv[0]}'; {hint}")
    import_module(f"yolo_lightning.commands.mlflow_{argv[0]}").main(argv[1:])


def store_uri() -> str:
    """Return the address of the store, that of a SQLite file with its whole path."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT
    if uri.startswith(SQLITE):  # as the logger does: MLflow keeps one engine an address
        return SQLITE + str(Path(uri.removeprefix(SQLITE)).absolute())
    return uri


def check_answers(uri: str) -> str:
    """Return what a store says; nothing is created where there is none yet.

    Args:
        uri: as `store_uri` gives it.

    Raises:
        InputError: no SQLite file there, or a store that does not answer.
    """
    file = Path(uri.removeprefix(SQLITE))
    if uri.startswith(SQLITE) and not file.exists():
        raise InputError(
            f"no runs yet: there is no {file.name} in {file.parent}; the first training makes it. "
            "Go to the folder that trainings were started in, or name a store: MLFLOW_TRACKING_URI"
        )
    answer = tracking(uri)
    if answer.state == "failed" and "not writable" not in answer.text:  # reading is enough
        raise InputError(answer.text)
    return answer.text
