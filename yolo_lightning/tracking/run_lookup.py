"""Search for the MLflow run of a journal, and its creation if there is none."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning.pytorch.utilities import rank_zero_warn
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from yolo_lightning.errors import mask_secrets, printable
from yolo_lightning.tracking.names import SQLITE, valid_run_id
from yolo_lightning.tracking.store import StoreUnavailable, creation_lock

TOKEN_TAG = "yolo_lightning.token"
SWEEP_TAG = "yolo_lightning.sweep"

NOT_FOUND, INVALID_VALUE = "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"
_ALREADY_EXISTS = "RESOURCE_ALREADY_EXISTS"
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages then open in the view for model training, not for language models."""


def find_or_create_run(
    client: MlflowClient, open_entry: Mapping[str, Any], run_ids: Iterable[Any], token: str
) -> Run:
    """Return the run of a journal; create it if there is none.

    `run_ids` are tried in this order; `token`, a tag of the run, finds a run whose creation had no
    response.

    Raises:
        StoreUnavailable: the run or its experiment is deleted, or the run must not be created.
    """
    run = _run_by_id(client, run_ids)
    if run is None:
        experiment_id = _get_or_create_experiment(client, open_entry["experiment"])
        query = f"tags.`{TOKEN_TAG}` = '{token}'"
        run = next(iter(client.search_runs([experiment_id], query, ViewType.ALL, 1)), None)
        if run is not None:
            check_active(client, run)
        elif open_entry["existing_run_only"]:
            raise StoreUnavailable("the run of these metrics does not exist in this store")
        run = run or _create_run(client, experiment_id, open_entry, token)
    if not run.info.run_id:
        raise StoreUnavailable("the response contains no run id")
    return run


def check_active(client: MlflowClient, run: Run) -> None:
    """Raise `StoreUnavailable`, with the command that restores it, if a run is deleted."""
    if run.info.lifecycle_stage == "deleted":
        _check_experiment(client.get_experiment(run.info.experiment_id))
        command = f"mlflow runs restore --run-id {run.info.run_id}"
        raise StoreUnavailable(f"run {run.info.run_id} is deleted; restore it with `{command}`")


def _check_experiment(experiment: Any) -> str:
    """Return the id of an experiment; raise `StoreUnavailable` if it is deleted."""
    if experiment.lifecycle_stage == "deleted":
        command = f"mlflow experiments restore --experiment-id {experiment.experiment_id}"
        name = experiment.name
        raise StoreUnavailable(f"experiment {name!r} is deleted; restore it with `{command}`")
    if not experiment.experiment_id:
        raise StoreUnavailable("the response contains no experiment id")
    return str(experiment.experiment_id)


def _run_by_id(client: MlflowClient, run_ids: Iterable[Any]) -> Run | None:
    """Return the first run that exists; warn about each one that does not."""
    for name, run_id in {str(run_id): run_id for run_id in run_ids if run_id}.items():
        try:
            run = client.get_run(name) if valid_run_id(run_id) else None
        except MlflowException as error:
            if error.error_code not in (NOT_FOUND, INVALID_VALUE):
                raise
            run = None
        if run is not None:
            check_active(client, run)
            return run
        store = mask_secrets(client.tracking_uri)
        rank_zero_warn(f"MLflow run {printable(name)[:300]} does not exist in {store}")
    return None


def _get_or_create_experiment(client: MlflowClient, name: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            location = _artifact_location(client.tracking_uri, name)
            return str(client.create_experiment(name, location, tags=_EXPERIMENT_TAGS))
        except MlflowException as error:  # another training has just created it
            experiment = client.get_experiment_by_name(name)
            if error.error_code != _ALREADY_EXISTS or experiment is None:
                raise
    return _check_experiment(experiment)


def _artifact_location(uri: str, experiment: str) -> str | None:
    """Return a folder next to the SQLite file; None for a server."""
    if not uri.startswith(SQLITE):
        return None
    # MLflow's default depends on the working folder of the process that creates the experiment
    folder = Path(uri.removeprefix(SQLITE)).absolute().parent / "mlruns"
    name = quote(experiment, safe=" ")[:200]  # no file system has names longer than 255
    return (folder / (name if name.strip(".") else f"_{name}")).as_posix()


def _create_run(
    client: MlflowClient, experiment_id: str, open_entry: Mapping[str, Any], token: str
) -> Run:
    tags = {TOKEN_TAG: token, MLFLOW_RUN_NAME: open_entry["name"]}
    if open_entry.get("parent"):
        with creation_lock(client.tracking_uri):  # two trials that start at once share a parent
            parent = _get_or_create_parent(client, experiment_id, str(open_entry["parent"]))
        tags[MLFLOW_PARENT_RUN_ID] = parent
    return client.create_run(experiment_id, tags=_with_context_tags(tags))


def _get_or_create_parent(client: MlflowClient, experiment_id: str, name: str) -> str:
    sweep = name.translate(str.maketrans("'\"\\`", "____"))  # MLflow's filters have no escapes
    query = f"tags.`{SWEEP_TAG}` = '{sweep}'"
    runs = client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"])
    if runs:
        return str(runs[0].info.run_id)
    tags = _with_context_tags({SWEEP_TAG: sweep, MLFLOW_RUN_NAME: name})
    run_id = str(client.create_run(experiment_id, tags=tags).info.run_id)
    client.set_terminated(run_id)
    return run_id


def _with_context_tags(tags: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in resolve_tags(tags).items() if value is not None}
