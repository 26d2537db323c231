"""Writes journal entries to an MLflow run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from PIL import Image

from yolo_lightning.serving.mlflow_model import log_model
from yolo_lightning.tracking.files import check_uploadable
from yolo_lightning.tracking.journal import Journal
from yolo_lightning.tracking.names import MAX_KEY_LENGTH
from yolo_lightning.tracking.run_lookup import NOT_FOUND
from yolo_lightning.tracking.store import StoreUnavailable, short_message

WriteItems = Callable[[Sequence[Any]], Any]  # writes items to the store in one request

SplitOnError = Callable[[Sequence[Any], WriteItems], None]
"""Writes items, and leaves out those that the store rejects."""

_MAX_LISTED = 3
_MAX_UNREADABLE = 20  # warnings
_MAX_PIXELS = 2**26


class InvalidEntry(Exception):
    """An entry that no store could accept; the message gives the reason."""


class EntryWriter:
    """Writes single entries of a journal to a run."""

    FILE_OPS = ("file", "image", "model", "remove")
    """Operations that use the artifact store."""

    def __init__(self, client: MlflowClient, store_uri: str, run: Run, journal: Journal) -> None:
        self._client, self._store_uri, self._run_id = client, store_uri, run.info.run_id
        self._artifact_uri, self._journal = run.info.artifact_uri, journal
        self.may_exist = True  # after a lost response, the store may have the next entry
        self._uploaded: list[tuple[str, Any]] = []
        self._missing: list[str] = []
        self._unreadable_lines = 0

    def write(self, entry: dict[str, Any], split_on_error: SplitOnError) -> None:
        """Write one entry; raise `InvalidEntry` if no store could accept it."""
        op = entry["op"]
        if op in ("params", "tags"):
            getattr(self, f"_{op}")(entry["values"], split_on_error)
        elif op in self.FILE_OPS:
            self._check_artifact_host()
            getattr(self, f"_{op}")(entry) if op == "remove" else self._upload(entry)
        elif op not in ("open", "name"):
            getattr(self, f"_{op}")(entry)

    def write_metrics(self, points: Sequence[Metric]) -> None:
        """Write points in one request."""
        self._client.log_batch(self._run_id, metrics=points, synchronous=True)

    def remove_uploaded_files(self) -> None:
        """Remove files from the journal; call it after the upload is recorded."""
        for name, status in self._uploaded:
            self._journal.remove_file(name, status)
        self._uploaded = []

    def warn_missing_files(self) -> None:
        """Warn about files that exist neither in the journal nor at their source."""
        if self._missing:
            more = " …" if len(self._missing) > _MAX_LISTED else ""
            listed = ", ".join(self._missing[:_MAX_LISTED]) + more
            rank_zero_warn(
                f"MLflow: skipped {len(self._missing)} files that no longer exist: {listed}"
            )
        self._missing = []

    def _unreadable(self, entry: dict[str, Any]) -> None:
        self._unreadable_lines += 1
        if self._unreadable_lines <= _MAX_UNREADABLE:
            line = short_message(entry["line"])
            rank_zero_warn(f"MLflow: skipped an unreadable line in {self._journal.folder}: {line}")

    def _params(self, values: dict[str, str], split_on_error: SplitOnError) -> None:
        existing = self._client.get_run(self._run_id).data.params
        params = [Param(key, value) for key, value in values.items() if key not in existing]
        split_on_error(
            params,
            lambda items: self._client.log_batch(self._run_id, params=items, synchronous=True),
        )
        changed = {key: value for key, value in values.items() if existing.get(key, value) != value}
        # parameters are immutable in MLflow
        tags = {f"changed.{key}"[:MAX_KEY_LENGTH]: value for key, value in changed.items()}
        self._tags(tags, split_on_error)

    def _tags(self, values: dict[str, str], split_on_error: SplitOnError) -> None:
        tags = [RunTag(key, value) for key, value in values.items()]
        split_on_error(
            tags, lambda items: self._client.log_batch(self._run_id, tags=items, synchronous=True)
        )

    def _status(self, entry: dict[str, Any]) -> None:
        if entry["status"] == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.set_terminated(self._run_id, entry["status"], entry["t"])

    def _inputs(self, entry: dict[str, Any]) -> None:
        try:
            inputs = [
                DatasetInput(
                    Dataset(**item["dataset"]), [InputTag("mlflow.data.context", item["use"])]
                )
                for item in entry["datasets"]
            ]
        except (KeyError, TypeError) as error:
            raise InvalidEntry(f"{type(error).__name__}: {error}") from None
        self._client.log_inputs(self._run_id, datasets=inputs)

    # --- files

    def _check_artifact_host(self) -> None:
        """Check that files go to no other server: MLflow would send it the credentials."""
        target, own = urlsplit(self._artifact_uri), urlsplit(self._store_uri)
        is_server = target.scheme in ("http", "https", "mlflow-artifacts")
        if is_server and target.hostname and target.hostname != own.hostname:
            raise StoreUnavailable(f"the run's files belong to another server, {target.hostname}")

    def _upload(self, entry: dict[str, Any]) -> None:
        name = entry["file"]
        try:
            path = self._find_file(entry)
            if path is None:
                return
            # a run folder may come from a stranger
            status = check_uploadable(self._journal.folder.parent, path)
        except OSError as error:
            raise InvalidEntry(f"{name}: {error.strerror or error}") from None
        getattr(self, f"_{entry['op']}")(entry, path)
        self._uploaded.append((name, status))

    def _find_file(self, entry: dict[str, Any]) -> Path | None:
        """Return the file to upload, None if it is missing or a newer one has replaced it."""
        path = self._journal.pending_path(entry["file"])
        if path.exists():
            return path
        if entry.get("replaced"):
            return None  # a newer file of this name is already uploaded
        # already uploaded to another run: upload its source
        source = self._journal.folder.parent / str(entry.get("source", ""))
        if entry.get("source") and source.exists():
            return source
        if not self._is_removed_later(entry["file"]):
            self._missing.append(entry["file"])
        return None

    def _is_removed_later(self, name: str) -> bool:
        entries = self._journal.state("file", "remove")
        ops = [e["op"] for e in entries if name in (e.get("file"), e.get("path"))]
        return ops[-1:] == ["remove"]

    def _file(self, entry: dict[str, Any], path: Path) -> None:
        if path.is_dir():
            raise InvalidEntry(f"{entry['file']} is a folder")
        self._client.log_artifact(self._run_id, str(path), entry["folder"] or None)

    def _image(self, entry: dict[str, Any], path: Path) -> None:
        if self.may_exist and self._image_exists(entry):
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

    def _model(self, entry: dict[str, Any], path: Path) -> None:
        log_model(
            self._client, self._run_id, path, entry["name"], entry["step"], entry.get("registered")
        )

    def _remove(self, entry: dict[str, Any]) -> None:
        repository = get_artifact_repository(self._artifact_uri, tracking_uri=self._store_uri)
        try:
            repository.delete_artifacts(entry["path"])
        except NotImplementedError:
            rank_zero_info(f"MLflow: {entry['path']} is kept, this store cannot delete files")
        except MlflowException as error:
            if error.error_code != NOT_FOUND:
                raise
