"""`yolo-lightning mlflow model`: a checkpoint as an MLflow model, to serve and to register."""

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolo_lightning.cli.commands.mlflow import check_answers, store_uri
from yolo_lightning.errors import InputError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning mlflow model",
        description="Log a checkpoint as an MLflow model into the run that it belongs to, in the "
        "store that MLFLOW_TRACKING_URI names, else mlflow.db in the working folder. "
        "A checkpoint that is logged already is found, not logged again.",
    )
    parser.add_argument("checkpoint", help="of a detector or a classifier, as training wrote it")
    parser.add_argument("--register", metavar="NAME", help="make it a version of this model too")
    parser.add_argument(
        "--output", metavar="FOLDER", help="write the model to this new folder, and log nothing"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Write or log a model, and say how to use it.

    Raises:
        InputError: no such checkpoint, a folder that holds files, or no such run or store.
    """
    options = _parser().parse_args(list(argv))
    if options.output is not None and options.register is not None:
        raise InputError("--register needs a run: leave out --output")
    if options.output is not None:
        from yolo_lightning.serving.mlflow_model import save_model

        save_model(options.checkpoint, options.output)
        folder = Path(options.output).expanduser()
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB")
        _tell(str(folder))
        return
    _log(options.checkpoint, options.register)


def _log(checkpoint: str, registered_name: str | None) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    from yolo_lightning.checkpoints.validation import read_checkpoint
    from yolo_lightning.serving.mlflow_model import log_model, register, save_model
    from yolo_lightning.tracking.logger import prepare_environment
    from yolo_lightning.tracking.store import public, short

    held = read_checkpoint(checkpoint)
    run_id = run_of(checkpoint, held)
    store = store_uri()
    check_answers(store)
    prepare_environment()
    client = MlflowClient(store)
    name = str(held.get("module")).removesuffix("Module").lower()
    try:
        client.get_run(run_id)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            save_model(checkpoint, folder)
            step = int(held.get("global_step", 0))
            model_id = log_model(client, run_id, folder, name, step)
        print(f"{name}, step {step}: models:/{model_id} in run {run_id} of {public(store)}")
        uri = f"models:/{model_id}"
        if registered_name is not None:
            version = register(client, model_id, registered_name)
            uri = f"models:/{registered_name}/{version}"
            print(f"registered as {registered_name}, version {version}")
    except MlflowException as error:
        raise InputError(
            f"run {run_id} of {checkpoint}, in {public(store)}: {short(error)}"
        ) from None
    _tell(uri)


def run_of(checkpoint: str, held: dict[str, Any]) -> str:
    """Return the MLflow run that a checkpoint belongs to.

    Args:
        checkpoint: its file; the run's folder may say which run it is.
        held: what it holds.

    Raises:
        InputError: neither knows of one.
    """
    from yolo_lightning.tracking.journal import RUN_ID_FILE

    file = Path(checkpoint).expanduser().absolute().parent.parent / RUN_ID_FILE
    noted = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    run_id = noted or held.get("mlflow_run_id")
    if not run_id:
        raise InputError(
            f"{checkpoint}: belongs to no MLflow run (no {RUN_ID_FILE} beside its folder "
            "checkpoints, none in it); --output FOLDER writes the model without one"
        )
    return str(run_id)


def _tell(uri: str) -> None:
    """Print how a model is served and loaded, where the store is this one."""
    serve = f"mlflow models serve -m {shlex.quote(uri)} --env-manager local --port 5001"
    print(f"  serve: MLFLOW_DISABLE_TELEMETRY=true {serve}")
    print(f"  load:  mlflow.pyfunc.load_model({uri!r})")
