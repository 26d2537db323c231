"""Uploads the files of a journal to an MLflow run."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from yolo_lightning.serving.mlflow_model import log_model
from yolo_lightning.tracking.files import check_uploadable
from yolo_lightning.tracking.journal import Journal
from yolo_lightning.tracking.store import StoreUnavailable

FILE_OPS = ("file", "image", "model")
"""Operations that use the artifact store."""


class InvalidEntry(Exception):
    """An entry that no store could accept; the message gives the reason."""


class MissingFile(InvalidEntry):
    """A file that exists neither in the journal nor at its source."""


class ArtifactWriter:
    """Uploads single files of a journal."""

    def __init__(self, client: MlflowClient, store_uri: str, run: Run, journal: Journal) -> None:
        self._client, self._store_uri, self._run_id = client, store_uri, run.info.run_id
        self._artifact_uri, self._journal = run.info.artifact_uri, journal

    def write(self, entry: dict[str, Any]) -> os.stat_result | None:
        """Write one entry; return the status of the uploaded file, None if there is none.

        Raises:
            InvalidEntry: no store could accept the file.
            StoreUnavailable: the run's files belong to another server than the store.
        """
        self._check_host()
        try:
            path = self._find_file(entry)
            # a run folder may come from a stranger
            status = check_uploadable(self._journal.folder.parent, path) if path else None
        except OSError as error:
            raise InvalidEntry(f"{entry['file']}: {error.strerror or error}") from None
        if path is None:
            return None
        if entry["op"] == "model":
            names = entry["name"], entry["step"], entry.get("registered")
            log_model(self._client, self._run_id, path, *names)
        elif path.is_dir():
            raise InvalidEntry(f"{entry['file']} is a folder")
        else:
            folder = "images" if entry["op"] == "image" else entry["folder"] or None
            self._client.log_artifact(self._run_id, str(path), folder)
        return status

    def _check_host(self) -> None:
        """Check that files go to no other server: MLflow would send it the credentials."""
        target, own = urlsplit(self._artifact_uri), urlsplit(self._store_uri)
        is_server = target.scheme in ("http", "https", "mlflow-artifacts")
        if is_server and target.hostname and target.hostname != own.hostname:
            raise StoreUnavailable(f"the run's files belong to another server, {target.hostname}")

    def _find_file(self, entry: dict[str, Any]) -> Path | None:
        """Return the file to upload, None if a newer file has replaced it."""
        path = self._journal.pending_path(entry["file"])
        if path.exists():
            return path
        if entry.get("replaced"):
            return None  # a newer file of this name is already uploaded
        # already uploaded to another run: upload its source
        source = self._journal.folder.parent / str(entry.get("source", ""))
        if entry.get("source") and source.exists():
            return source
        if entry.get("is_checkpoint"):
            return None  # a better checkpoint was saved
        raise MissingFile(f"{entry['file']} no longer exists")
