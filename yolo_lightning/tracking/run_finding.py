"""The MLflow run that a journal belongs to: found again, else opened once."""

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

from yolo_lightning.tracking.store import SQLITE, StoreUnavailable, creation_lock, public

TOKEN_TAG = "yolo_lightning.token"
SWEEP_TAG = "yolo_lightning.sweep"

GONE, REFUSED = "RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"
_TAKEN = "RESOURCE_ALREADY_EXISTS"
_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Has MLflow's pages open as those of a training, not of a language model."""


def find_run(
    client: MlflowClient, opening: Mapping[str, Any], ids: Iterable[str | None], token: str
) -> Run:
    """Return the run of a journal, opened where there is none.

    Args:
        client: of the store.
        opening: the journal's ``open`` entry.
        ids: that the run may have, the one that counts most first.
        token: of the journal: a run that was opened by a request without an answer has it.

    Raises:
        StoreUnavailable: the run or its experiment was deleted, or may not be opened.
        MlflowException: of the store.
    """
    run = _known_run(client, ids)
    if run is None:
        experiment_id = _experiment(client, opening["experiment"])
        run = _run_of_token(client, experiment_id, token)
        if run is None and opening["joins"]:
            raise StoreUnavailable("the run that these figures belong to is not there")
        run = run or _new_run(client, experiment_id, opening, token)
    if not run.info.run_id:
        raise StoreUnavailable("the answer names no run")
    return run


def check_active(client: MlflowClient, run: Run) -> None:
    """Refuse a deleted run.

    Raises:
        StoreUnavailable: how it is brought back.
        MlflowException: of the store.
    """
    if run.info.lifecycle_stage != "deleted":
        return
    experiment = client.get_experiment(run.info.experiment_id)
    if experiment.lifecycle_stage == "deleted":
        raise StoreUnavailable(_deleted_experiment(experiment))
    run_id = run.info.run_id
    raise StoreUnavailable(
        f"run {run_id} was deleted; `mlflow runs restore --run-id {run_id}` brings it back"
    )


def _deleted_experiment(experiment: Any) -> str:
    return (
        f"experiment {experiment.name!r} was deleted; `mlflow experiments restore "
        f"--experiment-id {experiment.experiment_id}` brings it back"
    )


def _known_run(client: MlflowClient, ids: Iterable[str | None]) -> Run | None:
    """Return the first run that the store has; say which ones it has not."""
    for run_id in dict.fromkeys(one for one in ids if one):
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code not in (GONE, REFUSED):
                raise
            rank_zero_warn(f"MLflow run {run_id} is not in {public(client.tracking_uri)}")
            continue
        check_active(client, run)
        return run
    return None


def _experiment(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            place = _files_of(client.tracking_uri, name)
            return str(client.create_experiment(name, place, tags=_KIND))
        except MlflowException as error:  # another training was faster
            found = client.get_experiment_by_name(name)
            if error.error_code != _TAKEN or found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise StoreUnavailable(_deleted_experiment(found))
    if not found.experiment_id:
        raise StoreUnavailable("the answer names no experiment")
    return str(found.experiment_id)


def _files_of(store: str, experiment: str) -> str | None:
    """Return where the files of an experiment lie: beside a database, wherever training runs.

    MLflow's own default is in the working folder of whoever creates the experiment.
    """
    if not store.startswith(SQLITE):
        return None
    folder = Path(store.removeprefix(SQLITE)).absolute().parent / "mlruns"
    return (folder / quote(experiment, safe=" ")).as_posix()


def _run_of_token(client: MlflowClient, experiment_id: str, token: str) -> Run | None:
    wanted = f"tags.`{TOKEN_TAG}` = '{token}'"
    found = client.search_runs([experiment_id], wanted, ViewType.ALL, max_results=1)
    if not found:
        return None
    check_active(client, found[0])
    return found[0]


def _new_run(
    client: MlflowClient, experiment_id: str, opening: Mapping[str, Any], token: str
) -> Run:
    own = {TOKEN_TAG: token, MLFLOW_RUN_NAME: opening["name"]}
    if opening.get("parent"):
        with creation_lock(client.tracking_uri):  # two trials that begin at once share a parent
            own[MLFLOW_PARENT_RUN_ID] = _parent(client, experiment_id, str(opening["parent"]))
    return client.create_run(experiment_id, tags=_with_context(own))


def _parent(client: MlflowClient, experiment_id: str, name: str) -> str:
    """Return the run that holds the trials of a sweep, opened by the first of them."""
    sweep = name.translate(str.maketrans("'\"\\`", "____"))  # MLflow's filters escape nothing
    found = client.search_runs(
        [experiment_id],
        f"tags.`{SWEEP_TAG}` = '{sweep}'",
        order_by=["attributes.start_time ASC"],
    )
    if found:
        return str(found[0].info.run_id)
    made = client.create_run(
        experiment_id, tags=_with_context({SWEEP_TAG: sweep, MLFLOW_RUN_NAME: name})
    )
    client.set_terminated(made.info.run_id)
    return str(made.info.run_id)


def _with_context(tags: dict[str, str]) -> dict[str, str]:
    """Add who runs what from where, as MLflow's own runs say."""
    return {key: value for key, value in resolve_tags(tags).items() if value is not None}
