"""`yolo-lightning mlflow model`: log a checkpoint as an MLflow model, to serve or register it."""

import argparse
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolo_lightning.cli.commands.mlflow import check_store
from yolo_lightning.errors import InputError, expand, mask_secrets
from yolo_lightning.tracking.names import own_store, valid_run_id


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning mlflow model",
        description="Log a checkpoint as an MLflow model to its run, in the store named by "
        "MLFLOW_TRACKING_URI, by default mlflow.db in the working folder. "
        "A checkpoint that is already logged is not logged again.",
    )
    parser.add_argument("checkpoint", help="checkpoint of a detector or a classifier")
    parser.add_argument("--register", metavar="NAME", help="also register the model as NAME")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="write the model to this new folder instead of logging it",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Write or log a model, and print how to use it.

    Raises:
        InputError: the checkpoint, the run or the store does not exist, or the folder is not empty.
    """
    options = _parser().parse_args(list(argv))
    if options.output is None:
        model_uri = _log(options.checkpoint, options.register)
    elif options.register is not None:
        raise InputError("--register needs a run: remove --output")
    else:
        from yolo_lightning.serving.mlflow_model import save_model

        folder = expand(options.output)
        save_model(options.checkpoint, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{folder}: {size / 2**20:.1f} MiB")
        model_uri = str(folder)
    serve = f"mlflow models serve -m {shlex.quote(model_uri)} --env-manager local --port 5001"
    print(f"  serve: MLFLOW_DISABLE_TELEMETRY=true {serve}")
    print(f"  load:  mlflow.pyfunc.load_model({model_uri!r})")


def _log(checkpoint: str, registered_name: str | None) -> str:
    """Log a model to its run, and register it if it has a name; return its address."""
    from mlflow.exceptions import MlflowException

    from yolo_lightning.checkpoints.validation import read_checkpoint
    from yolo_lightning.serving.mlflow_model import log_model, register, save_model
    from yolo_lightning.tracking.store import create_client, short_message

    content = read_checkpoint(checkpoint)
    run_id = run_id_of(checkpoint, content)
    uri = own_store()
    check_store(uri)
    client, store = create_client(uri), mask_secrets(uri)
    name = str(content.get("module")).removesuffix("Module").lower()
    try:
        client.get_run(run_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            save_model(checkpoint, folder)
            step = int(content.get("global_step", 0))
            model_id = log_model(client, run_id, folder, name, step)
        print(f"{name}, step {step}: models:/{model_id} in run {run_id} of {store}")
        model_uri = f"models:/{model_id}"
        if registered_name is not None:
            version = register(client, model_id, registered_name)
            model_uri = f"models:/{registered_name}/{version}"
            print(f"registered as {registered_name}, version {version}")
    except MlflowException as error:
        raise InputError(
            f"run {run_id} of {checkpoint}, in {store}: {short_message(error)}"
        ) from None
    return model_uri


def run_id_of(checkpoint: str, content: dict[str, Any]) -> str:
    """Return the MLflow run id of a checkpoint, from its run folder or its content.

    Raises:
        InputError: neither has a run id.
    """
    from yolo_lightning.tracking.files import read_text
    from yolo_lightning.tracking.journal import RUN_ID_FILE

    file = expand(checkpoint).absolute().parent.parent / RUN_ID_FILE
    from_folder = read_text(file).strip() if file.is_file() else ""
    run_id = valid_run_id(from_folder or content.get("mlflow_run_id"))
    if run_id is None:
        raise InputError(
            f"{checkpoint}: has no MLflow run (no file {RUN_ID_FILE} in its run folder, no run id "
            "in the checkpoint); use --output FOLDER to write the model without a run"
        )
    return run_id
