"""Experiment tracking: one training is one MLflow run in an embedded SQLite store."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_warn
from mlflow.exceptions import MlflowException

DEFAULT_STORE = "sqlite:///mlflow.db"
_SQLITE = "sqlite:///"


class RunLogger(MLFlowLogger):
    """Lightning's MLflow logger on a store that several trainings can open at once.

    Args:
        experiment_name: under which runs are listed together.
        tracking_uri: the environment's ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in
            the working folder.
        run_name: of the run; the command line suggests the names of its last two folders.
        run_id: the run to go on with; a new one where None.
        tags: of the run.

    Deviation from Lightning's: its default store is one that MLflow 3.17 refuses, and two
    processes that create one SQLite file at the same moment fail in its migration.
    """

    def __init__(
        self,
        experiment_name: str = "yolo-lightning",
        tracking_uri: str | None = None,
        run_name: str | None = None,
        run_id: str | None = None,
        tags: dict[str, Any] | None = None,
    ) -> None:
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
        self.store = uri
        if uri.startswith(_SQLITE):  # MLflow keeps one engine a URI, whatever the working folder
            uri = _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute())
        with _creation_lock(uri):
            super().__init__(experiment_name, run_name, uri, tags=tags, run_id=run_id)

    def suggest_name(self, name: str) -> None:
        """Name the run where the recipe does not, before it is opened."""
        self._run_name = self._run_name or name

    def resume(self, run_id: str) -> bool:
        """Go on with an earlier run instead of opening a new one; tell whether the store has it.

        Tracking may fail, training may not: where the run is gone, a warning says so.
        """
        try:
            self._mlflow_client.get_run(run_id)
        except MlflowException as error:
            rank_zero_warn(f"MLflow run {run_id} is not in {self.store}: {error.message}")
            return False
        self._run_id = run_id
        return True


@contextlib.contextmanager
def _creation_lock(uri: str) -> Iterator[None]:
    """Let one process at a time create and migrate a SQLite store."""
    if not uri.startswith(_SQLITE):
        yield
        return
    database = Path(uri.removeprefix(_SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
