"""Checkpoints as MLflow models: writing the model folder, logging it to a run, registering it."""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import cv2
import mlflow.pyfunc
import numpy as np
import pandas as pd
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.environment_variables import MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

from yolo_lightning.checkpoints.io import write_checkpoint
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.errors import InputError, expand
from yolo_lightning.images import GREY, Image, resize_pixels

REQUIREMENTS = (
    "torch", "lightning", "torchmetrics", "albumentations", "opencv-python-headless", "mlflow",
    "omegaconf", "jsonargparse[signatures]", "faster-coco-eval", "libstb", "numpy", "pandas",
    "pillow", "psutil", "pyyaml", "scipy",
)  # fmt: skip

IMAGE, CHECKPOINT = "image", "checkpoint"  # the input column; the name of the artifact

# Limits of a request, MLflow's `model_config`.
LIMITS = {
    "max_rows": 256,
    "max_row_bytes": 32 * 2**20,
    "max_pixels": 2_000_000_000,  # of all rows, according to the headers of the images
    "max_seconds": 60,  # as MLflow's server waits, MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
}

_CLASS_COLUMNS = {
    "image": DataType.long,
    "name": DataType.string,
    "key": DataType.string,
    "node": DataType.long,
    "score": DataType.double,
    "path": Array(DataType.string),
}
# output columns, by the module class of the checkpoint
COLUMNS = {
    "DetectorModule": _CLASS_COLUMNS | dict.fromkeys(("x1", "y1", "x2", "y2"), DataType.double),
    "ClassifierModule": _CLASS_COLUMNS,
}

_CHECKPOINT_KEYS = (
    "state_dict", "hyper_parameters", "module", "pytorch-lightning_version", "epoch", "global_step",
    "mlflow_run_id", "darknet",
)  # fmt: skip
_STEP_TAG = "yolo_lightning.step"
_MLMODEL = "MLmodel"
_MAX_EXAMPLE_PX = 640


def save_model(
    checkpoint: str | Path, folder: str | Path, example_image: Image | None = None
) -> None:
    """Write a checkpoint of a detector or classifier as an MLflow model, completely or not at all.

    The input column `image` has the bytes of image files (JPEG, PNG, WebP …). The output has the
    columns `COLUMNS`: for a detector a row per object, corners in px of the original image; for a
    classifier a row per class, best first. State that only resuming needs is not saved.

    Args:
        checkpoint: of a detector or a classifier.
        folder: to write; new or empty.
        example_image: uint8 (H, W, 3), RGB, for the input example; default: plain grey.

    Raises:
        InputError: the checkpoint does not exist, or the folder is not empty or cannot be written.
    """
    content = read_checkpoint(checkpoint)
    module = str(content.get("module"))
    if module not in COLUMNS:
        raise InputError(f"{checkpoint}: contains a {module[:60]}; allowed: {', '.join(COLUMNS)}")
    if isinstance(content["hyper_parameters"].get("backbone"), dict):
        raise InputError(f"{checkpoint}: its backbone is a class, which no model contains")
    target = expand(folder)
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target}: not an empty folder; use a new one")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".model-") as temporary:
            stage = Path(temporary)
            copy_package(stage / "yolo_lightning")
            reduced = {key: content[key] for key in _CHECKPOINT_KEYS if key in content}
            write_checkpoint(reduced, stage / "model.ckpt")
            with _silence_mlflow():
                mlflow.pyfunc.save_model(
                    path=str(stage / "model"),
                    python_model=str(stage / "yolo_lightning" / "serving" / "served_model.py"),
                    artifacts={CHECKPOINT: str(stage / "model.ckpt")},
                    code_paths=[str(stage / "yolo_lightning")],
                    pip_requirements=requirements(),
                    model_config=LIMITS,
                    signature=_signature(module, content["hyper_parameters"]),
                    input_example=pd.DataFrame({IMAGE: [_encode_jpeg(example_image)]}),
                    uv_project_path=str(stage),  # else MLflow reads a uv.lock in the working folder
                )
            os.replace(stage / "model", target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def _silence_mlflow() -> Iterator[None]:
    bar, logger = MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR, logging.getLogger("mlflow.pyfunc")
    previous, level = bar.get_raw(), logger.level
    bar.set(False)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        bar.unset() if previous is None else bar.set(previous)


def copy_package(target: Path) -> None:
    """Copy this package, installed or from a checkout, with all of its subpackages."""
    # in a checkout, these are symbolic links, or text files on systems without links
    linked = ("datamodules", "callbacks")
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", *linked)
    shutil.copytree(Path(__file__).parent.parent, target, ignore=ignore)
    for name in linked:
        folder = import_module(f"yolo_lightning.{name}").__path__[0]
        shutil.copytree(folder, target / name, ignore=ignore)


def requirements() -> list[str]:
    """Return `REQUIREMENTS`, pinned to the installed versions."""
    pinned = []
    for name in REQUIREMENTS:
        try:
            version = metadata.version(name.split("[")[0])
        except metadata.PackageNotFoundError:
            pinned.append(name)  # installed under another name, such as opencv-python
        else:
            pinned.append(f"{name}=={version.split('+')[0]}")  # PyPI has no +cpu versions
    return pinned


def _signature(module: str, hparams: dict[str, Any]) -> ModelSignature:
    if module == "DetectorModule":
        defaults = {
            "score_threshold": 0.25,
            "tree_threshold": 0.5,
            "iou_threshold": float(hparams.get("iou_threshold", 0.45)),
        }
        params = [ParamSpec(name, DataType.double, value) for name, value in defaults.items()]
    else:
        params = [ParamSpec("top", DataType.long, 5)]
    interpolation = ParamSpec("interpolation", DataType.string, hparams["interpolation"])
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, IMAGE)]),
        outputs=Schema([ColSpec(type_, name) for name, type_ in COLUMNS[module].items()]),
        params=ParamSchema([*params, interpolation]),
    )


def _encode_jpeg(image: Image | None) -> bytes:
    if image is None:
        image = np.full((64, 64, 3), GREY, dtype=np.uint8)
    factor = min(1.0, _MAX_EXAMPLE_PX / max(image.shape[:2]))
    image = resize_pixels(
        image, max(1, int(image.shape[1] * factor)), max(1, int(image.shape[0] * factor))
    )
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return data.tobytes()


def log_model(
    client: MlflowClient,
    run_id: str,
    folder: str | Path,
    name: str,
    step: int,
    registered_name: str | None = None,
) -> str:
    """Log a folder written by `save_model` to a run; return the id of the logged model.

    A call after an interrupted one completes it; a call after a completed one changes nothing. The
    validation metrics of this step are linked to the model.
    """
    run = client.get_run(run_id)
    model = _find_logged_model(client, run, name, step) or client.create_logged_model(
        run.info.experiment_id, name, run_id, tags={_STEP_TAG: str(step)}
    )
    model_id = str(model.model_id)
    if model.status != LoggedModelStatus.READY:
        outputs = run.outputs.model_outputs if run.outputs else []
        if model_id not in {output.model_id for output in outputs}:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
        metrics = _validation_metrics(client, run, step, model_id)
        if metrics:
            client.log_batch(run_id, metrics=metrics)
        client.log_model_artifacts(model_id, str(folder))
        _log_description(client, model, Path(folder))
        client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    if registered_name:
        register(client, model_id, registered_name)
    return model_id


def _find_logged_model(client: MlflowClient, run: Any, name: str, step: int) -> LoggedModel | None:
    """Return the model of an earlier call, preferably a completed one."""
    models = client.search_logged_models(
        [run.info.experiment_id],
        f"source_run_id = '{run.info.run_id}' AND name = '{name}' "
        f"AND tags.`{_STEP_TAG}` = '{step}'",
    )
    return max(models, key=lambda model: model.status == LoggedModelStatus.READY, default=None)


def _validation_metrics(client: MlflowClient, run: Any, step: int, model_id: str) -> list[Metric]:
    """Return the validation metrics of a step, except those of single classes."""
    return [
        Metric(p.key, p.value, p.timestamp, p.step, model_id=model_id, run_id=run.info.run_id)
        for key in run.data.metrics
        if re.fullmatch(r"val/[^/]+", key)
        for p in client.get_metric_history(run.info.run_id, key)
        if p.step == step - 1 and p.model_id is None  # metrics count steps from 0
    ]


def _log_description(client: MlflowClient, model: LoggedModel, folder: Path) -> None:
    description = Model.load(str(folder / _MLMODEL))
    description.model_id = description.model_uuid = model.model_id
    description.run_id, description.artifact_path = model.source_run_id, model.artifact_location
    with tempfile.TemporaryDirectory() as temporary:
        path = str(Path(temporary) / _MLMODEL)
        description.save(path)
        client.log_model_artifact(model.model_id, path)


def register(client: MlflowClient, model_id: str, name: str) -> str:
    """Register a logged model as a new version, once, and return the version."""
    model = client.get_logged_model(model_id)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # only a server resolves models:/; a local database would use MLflow's global store
    remote = client.tracking_uri.startswith(("http", "databricks"))
    source = f"models:/{model_id}" if remote else model.artifact_location
    existing = client.search_model_versions(f"name = '{name}' AND run_id = '{model.source_run_id}'")
    version = next((candidate for candidate in existing if candidate.source == source), None)
    if version is None:
        version = client.create_model_version(
            name, source, model.source_run_id, await_creation_for=0, model_id=model_id
        )
    versions = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    tagged = {(item["name"], str(item["version"])) for item in versions}
    if (name, str(version.version)) not in tagged:  # a server sets the tag itself
        versions.append({"name": name, "version": version.version})
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(versions)})
    return str(version.version)
