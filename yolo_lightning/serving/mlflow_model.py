"""A checkpoint as an MLflow model: a folder that serves itself, and its place in a run.

The folder holds a file of code (`served_model`), this package, and the checkpoint; no pickles.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
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
from yolo_lightning.errors import InputError
from yolo_lightning.images import GREY, Image, scaled

REQUIREMENTS = (
    "torch", "lightning", "torchmetrics", "albumentations", "opencv-python-headless", "mlflow",
    "omegaconf", "jsonargparse[signatures]", "faster-coco-eval", "libstb", "numpy", "pillow",
    "psutil", "pyyaml", "scipy",
)  # fmt: skip
"""What the package needs where a model is loaded: the dependencies in `pyproject.toml`."""

IMAGE, CHECKPOINT = "image", "checkpoint"
"""The column that a model takes; what its checkpoint is called among the artifacts."""

_NAMED = {
    "image": DataType.long,
    "name": DataType.string,
    "key": DataType.string,
    "node": DataType.long,
    "score": DataType.double,
    "path": Array(DataType.string),
}
COLUMNS = {
    "DetectorModule": _NAMED | dict.fromkeys(("x1", "y1", "x2", "y2"), DataType.double),
    "ClassifierModule": _NAMED,
}
"""Of the table that a model answers with, by what its checkpoint holds."""

_KEPT = (
    "state_dict", "hyper_parameters", "module", "pytorch-lightning_version", "epoch", "global_step",
    "mlflow_run_id", "darknet",
)  # fmt: skip
_MAPPED = ("datamodules", "callbacks")
_STEP_TAG = "yolo_lightning.step"
_MLMODEL = "MLmodel"
_EXAMPLE_PX = 640


def save_model(
    checkpoint: str | Path, folder: str | Path, example_image: Image | None = None
) -> None:
    """Write a checkpoint as an MLflow model; nothing is left behind where that fails.

    It takes a table with the column `image`, a file's bytes a row (JPEG, PNG, WebP …), and answers
    with a table, `COLUMNS`: of a detector a row for each object, corners in px of the original
    image; of a classifier a row for each of the most probable names. What only a resume needs is
    left out of the checkpoint. Neither MLflow's settings nor the network are touched.

    Args:
        checkpoint: of a detector or a classifier.
        folder: to write; new or empty.
        example_image: uint8 (H, W, 3), RGB, for the model's input example, which is at
            most 640 px a side; plain grey where None.

    Raises:
        InputError: no such checkpoint, or a folder that holds files or cannot be written.
    """
    held = read_checkpoint(checkpoint)
    kind = str(held.get("module"))
    if kind not in COLUMNS:
        raise InputError(f"{checkpoint}: holds a {kind[:60]}; allowed: {', '.join(COLUMNS)}")
    target = Path(folder).expanduser()
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InputError(f"{target}: not an empty folder; name a new one")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".model-") as place:
            stage = Path(place)
            copy_package(stage / "yolo_lightning")
            slim = {key: held[key] for key in _KEPT if key in held}
            write_checkpoint(slim, stage / "model.ckpt")
            with _quiet():
                mlflow.pyfunc.save_model(
                    path=str(stage / "model"),
                    python_model=str(stage / "yolo_lightning" / "serving" / "served_model.py"),
                    artifacts={CHECKPOINT: str(stage / "model.ckpt")},
                    code_paths=[str(stage / "yolo_lightning")],
                    pip_requirements=requirements(),
                    signature=_signature(kind, held["hyper_parameters"]),
                    input_example=pd.DataFrame({IMAGE: [_encoded(example_image)]}),
                    uv_project_path=str(stage),  # else a uv.lock in the working folder counts
                )
            os.replace(stage / "model", target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's progress bars and remarks off the screen."""
    bar, logger = MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR, logging.getLogger("mlflow.pyfunc")
    shown, level = bar.get_raw(), logger.level
    bar.set(False)
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        bar.unset() if shown is None else bar.set(shown)


def copy_package(target: Path) -> None:
    """Copy this package, from a checkout or installed, with its subpackages in their places."""
    compiled = shutil.ignore_patterns("__pycache__", "*.pyc")
    source = Path(__file__).parent.parent

    def skipped(folder: str, names: list[str]) -> set[str]:
        # in a checkout these are links, or small texts where there are no links
        mapped = set(_MAPPED) if Path(folder) == source else set()
        return compiled(folder, names) | mapped

    shutil.copytree(source, target, ignore=skipped)
    for name in _MAPPED:
        spec = find_spec(f"yolo_lightning.{name}")
        assert spec is not None
        shutil.copytree(Path(spec.origin or "").parent, target / name, ignore=compiled)


def requirements() -> list[str]:
    """Return what pip has to install, in the versions that are installed here."""
    pinned = []
    for name in REQUIREMENTS:
        try:
            version = metadata.version(name.split("[")[0])
        except metadata.PackageNotFoundError:
            pinned.append(name)  # it came under another name, as opencv-python does
        else:
            pinned.append(f"{name}=={version.split('+')[0]}")  # +cpu and such are on no index
    return pinned


def _signature(kind: str, described: dict[str, Any]) -> ModelSignature:
    if kind == "DetectorModule":
        numbers = {
            "score_threshold": 0.25,
            "tree_threshold": 0.5,
            "iou_threshold": float(described.get("iou_threshold", 0.45)),
        }
        params = [ParamSpec(name, DataType.double, value) for name, value in numbers.items()]
    else:
        params = [ParamSpec("top", DataType.long, 5)]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, IMAGE)]),
        outputs=Schema([ColSpec(type_, name) for name, type_ in COLUMNS[kind].items()]),
        params=ParamSchema(params),
    )


def _encoded(image: Image | None) -> bytes:
    """Return an image as the bytes of a JPEG, a large one smaller."""
    if image is None:
        image = np.full((64, 64, 3), GREY, dtype=np.uint8)
    factor = min(1.0, _EXAMPLE_PX / max(image.shape[:2]))
    image = scaled(
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
    """Bring a model's folder into a run, once, and return the id of the logged model.

    A call that follows one which broke off half-way goes on with what that left; one that follows
    a finished one changes nothing. The figures of the validation at this step are linked with it.

    Args:
        client: of the store; its settings alone count, not MLflow's global ones.
        run_id: of the training.
        folder: as `save_model` writes it.
        name: of the model within the run.
        step: optimizer steps that it was trained for.
        registered_name: see `register`.

    Raises:
        MlflowException: of the store.
    """
    run = client.get_run(run_id)
    model = _known(client, run, name, step) or client.create_logged_model(
        run.info.experiment_id, name, run_id, tags={_STEP_TAG: str(step)}
    )
    model_id = str(model.model_id)
    if model.status != LoggedModelStatus.READY:
        linked = run.outputs.model_outputs if run.outputs else []
        if model_id not in {output.model_id for output in linked}:
            client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
        figures = _figures(client, run, step, model_id)
        if figures:
            client.log_batch(run_id, metrics=figures)
        client.log_model_artifacts(model_id, str(folder))
        _describe(client, model, Path(folder))
        client.finalize_logged_model(model_id, LoggedModelStatus.READY)
    if registered_name:
        register(client, model_id, registered_name)
    return model_id


def _known(client: MlflowClient, run: Any, name: str, step: int) -> LoggedModel | None:
    """Return what an earlier call made, a finished one first."""
    found = client.search_logged_models(
        [run.info.experiment_id],
        f"source_run_id = '{run.info.run_id}' AND name = '{name}' "
        f"AND tags.`{_STEP_TAG}` = '{step}'",
    )
    return max(found, key=lambda model: model.status == LoggedModelStatus.READY, default=None)


def _figures(client: MlflowClient, run: Any, step: int, model_id: str) -> list[Metric]:
    """Return the validation's figures at a step, without those of single classes."""
    return [
        Metric(p.key, p.value, p.timestamp, p.step, model_id=model_id, run_id=run.info.run_id)
        for key in run.data.metrics
        if re.fullmatch(r"val/[^/]+", key)
        for p in client.get_metric_history(run.info.run_id, key)
        if p.step == step - 1 and p.model_id is None  # points count steps from 0
    ]


def _describe(client: MlflowClient, model: LoggedModel, folder: Path) -> None:
    """Give the logged model the description that also names it and its run."""
    described = Model.load(str(folder / _MLMODEL))
    described.model_id = described.model_uuid = model.model_id
    described.run_id, described.artifact_path = model.source_run_id, model.artifact_location
    with tempfile.TemporaryDirectory() as place:
        path = str(Path(place) / _MLMODEL)
        described.save(path)
        client.log_model_artifact(model.model_id, path)


def register(client: MlflowClient, model_id: str, name: str) -> str:
    """Make a logged model a version of a registered one, and return the version.

    The registered model is made where there is none. A logged model that is a version already
    gets no second one.

    Args:
        client: of the store; its settings alone count, not MLflow's global ones.
        model_id: of the logged model.
        name: of the registered model.

    Raises:
        MlflowException: of the store.
    """
    model = client.get_logged_model(model_id)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # a server knows its models; a database opened directly would ask MLflow's global store
    remote = client.tracking_uri.startswith(("http", "databricks"))
    source = f"models:/{model_id}" if remote else model.artifact_location
    known = client.search_model_versions(f"name = '{name}' AND run_id = '{model.source_run_id}'")
    version = next((one for one in known if one.source == source), None)
    if version is None:
        version = client.create_model_version(
            name, source, model.source_run_id, await_creation_for=0, model_id=model_id
        )
    versions = json.loads(client.get_logged_model(model_id).tags.get(MLFLOW_MODEL_VERSIONS, "[]"))
    told = {(one["name"], str(one["version"])) for one in versions}
    if (name, str(version.version)) not in told:  # a server does that by itself
        versions.append({"name": name, "version": version.version})
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(versions)})
    return str(version.version)
