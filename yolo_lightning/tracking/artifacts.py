"""Uploads the files of a journal to an MLflow run."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.utilities import rank_zero_info
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from PIL import Image

from yolo_lightning.serving.mlflow_model import log_model
from yolo_lightning.tracking.files import check_uploadable
from yolo_lightning.tracking.journal import Journal
from yolo_lightning.tracking.run_lookup import NOT_FOUND
from yolo_lightning.tracking.store import StoreUnavailable, short_message

FILE_OPS = ("file", "image", "model", "remove")
"""Operations that use the artifact store."""

_MAX_PIXELS = 2**26


class InvalidEntry(Exception):
    """An entry that no store could accept; the message gives the reason."""


class MissingFile(InvalidEntry):
    """A file that exists neither in the journal nor at its source."""


class ArtifactWriter:
    """Uploads single files of a journal, and removes checkpoints of a run."""

    def __init__(self, client: MlflowClient, store_uri: str, run: Run, journal: Journal) -> None:
        self._client, self._store_uri, self._run_id = client, store_uri, run.info.run_id
        self._artifact_uri, self._journal = run.info.artifact_uri, journal

    def write(self, entry: dict[str, Any], may_exist: bool) -> os.stat_result | None:
        """Write one entry; return the status of the uploaded file, None if there is none.

        `may_exist` says that an earlier upload of this entry may have had no response.

        Raises:
            InvalidEntry: no store could accept the file.
            StoreUnavailable: the run's files belong to another server than the store.
        """
        self._check_host()
        if entry["op"] == "remove":
            self._remove(entry["path"])
            return None
        try:
            path = self._find_file(entry)
            # a run folder may come from a stranger
            status = check_uploadable(self._journal.folder.parent, path) if path else None
        except OSError as error:
            raise InvalidEntry(f"{entry['file']}: {error.strerror or error}") from None
        if path is None:
            return None
        if entry["op"] == "image":
            self._log_image(entry, path, may_exist)
        elif entry["op"] == "model":
            names = entry["name"], entry["step"], entry.get("registered")
            log_model(self._client, self._run_id, path, *names)
        elif path.is_dir():
            raise InvalidEntry(f"{entry['file']} is a folder")
        else:
            self._client.log_artifact(self._run_id, str(path), entry["folder"] or None)
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
        if "callback" in entry:
            return None  # a better checkpoint was saved
        raise MissingFile(f"{entry['file']} no longer exists")

    def _log_image(self, entry: dict[str, Any], path: Path, may_exist: bool) -> None:
        if may_exist and self._image_exists(entry):
            return
        try:
            with Image.open(path, formats=["PNG"]) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels")
                image.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InvalidEntry(short_message(error)) from None
        self._client.log_image(
            self._run_id, image, key=entry["key"], step=entry["step"], timestamp=entry["t"],
            synchronous=True,
        )  # fmt: skip

    def _image_exists(self, entry: dict[str, Any]) -> bool:
        """Return whether the run has the second of the two files that MLflow writes per image."""
        key = entry["key"].replace("/", "~")
        name = f"images/{key}+step+{entry['step']}+timestamp+{entry['t']}+"
        return any(
            file.path.startswith(name) and file.path.endswith("+compressed.webp")
            for file in self._client.list_artifacts(self._run_id, "images")
        )

    def _remove(self, path: str) -> None:
        repository = get_artifact_repository(self._artifact_uri, tracking_uri=self._store_uri)
        try:
            repository.delete_artifacts(path)
        except NotImplementedError:
            rank_zero_info(f"MLflow: {path} is kept, this store cannot delete files")
        except MlflowException as error:
            if error.error_code != NOT_FOUND:
                raise
