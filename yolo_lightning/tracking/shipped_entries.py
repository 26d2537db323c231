"""What each kind of a journal's entries tells an MLflow run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from PIL import Image

from yolo_lightning.serving.mlflow_model import log_model
from yolo_lightning.tracking.journal import Journal
from yolo_lightning.tracking.run_finding import GONE
from yolo_lightning.tracking.store import short

Tell = Callable[[Sequence[Any]], Any]

_KEY = 250
_NAMED = 3


class Unsendable(Exception):
    """An entry that no store could take; the message says why."""


class EntryWriter:
    """Tells a run one entry.

    Args:
        client: of the store.
        store: its address.
        run: of the store.
        journal: holds the files of the entries.

    Attributes:
        doubtful: whether the store may have taken the entry already.
    """

    FILES = ("file", "picture", "model", "remove")
    """Entries that need the store of the files."""

    def __init__(self, client: MlflowClient, store: str, run: Run, journal: Journal) -> None:
        self._client, self._store, self._run_id = client, store, run.info.run_id
        self._files, self._journal = run.info.artifact_uri, journal
        self.doubtful = True
        self._sent: list[tuple[str, Any]] = []
        self._lost: list[str] = []

    def __call__(self, entry: dict[str, Any], told: Callable[[Sequence[Any], Tell], None]) -> None:
        """Tell one.

        Args:
            entry: of the journal.
            told: tells many items and leaves out those that the store refuses.

        Raises:
            Unsendable: no store could take it.
            Exception: of the store.
        """
        if entry["op"] in ("params", "tags"):
            getattr(self, f"_{entry['op']}")(entry["values"], told)
        elif entry["op"] not in ("open", "name"):
            getattr(self, f"_{entry['op']}")(entry)

    def points(self, points: Sequence[Metric]) -> None:
        """Tell the points of metrics."""
        self._client.log_batch(self._run_id, metrics=points, synchronous=True)

    def release(self) -> None:
        """Remove the files that the run holds now and the journal says so."""
        for name, as_shipped in self._sent:
            self._journal.release(name, as_shipped)
        self._sent = []

    def say_lost(self) -> None:
        """Say which files were neither in the journal nor where they came from."""
        if self._lost:
            shown = ", ".join(self._lost[:_NAMED]) + (" …" if len(self._lost) > _NAMED else "")
            rank_zero_warn(
                f"MLflow: left out {len(self._lost)} files that are not there any more: {shown}"
            )
        self._lost = []

    def _unreadable(self, entry: dict[str, Any]) -> None:
        file = self._journal.folder
        rank_zero_warn(f"MLflow: a line in {file} makes no sense, left out: {short(entry['line'])}")

    def _params(self, values: dict[str, str], told: Callable[[Sequence[Any], Tell], None]) -> None:
        """Tell parameters that the run has not; another value of one that it has becomes a tag."""
        held = self._client.get_run(self._run_id).data.params
        params = [Param(key, value) for key, value in values.items() if key not in held]
        told(
            params, lambda some: self._client.log_batch(self._run_id, params=some, synchronous=True)
        )
        changed = {key: value for key, value in values.items() if held.get(key, value) != value}
        self._tags({f"changed.{key}"[:_KEY]: value for key, value in changed.items()}, told)

    def _tags(self, values: dict[str, str], told: Callable[[Sequence[Any], Tell], None]) -> None:
        tags = [RunTag(key, value) for key, value in values.items()]
        told(tags, lambda some: self._client.log_batch(self._run_id, tags=some, synchronous=True))

    def _status(self, entry: dict[str, Any]) -> None:
        if entry["status"] == "RUNNING":
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._client.set_terminated(self._run_id, entry["status"], entry["t"])

    def _inputs(self, entry: dict[str, Any]) -> None:
        try:
            inputs = [
                DatasetInput(
                    Dataset(**one["dataset"]), [InputTag("mlflow.data.context", one["use"])]
                )
                for one in entry["datasets"]
            ]
        except (KeyError, TypeError) as error:
            raise Unsendable(f"{type(error).__name__}: {error}") from None
        self._client.log_inputs(self._run_id, datasets=inputs)

    # --- files

    def _waiting(self, entry: dict[str, Any]) -> Path | None:
        """Return the file of an entry, None where there is none or a newer one took its place."""
        path = self._journal.pending(entry["file"])
        if path.exists():
            return path
        if entry.get("replaced"):
            return None  # a newer one of its name is shipped already
        # from before it was shipped to another run
        source = self._journal.folder.parent / str(entry.get("source", ""))
        if source.is_file():
            return source
        if not self._superseded(entry["file"]):
            self._lost.append(entry["file"])
        return None

    def _superseded(self, name: str) -> bool:
        later = [entry for entry, _ in self._journal.entries(0, "file", "remove")]
        newest = [one["op"] for one in later if name in (one.get("file"), one.get("path"))]
        return newest[-1:] == ["remove"]

    def _file(self, entry: dict[str, Any]) -> None:
        path = self._waiting(entry)
        if path is None:
            return
        as_shipped = path.stat()
        self._client.log_artifact(self._run_id, str(path), entry["folder"] or None)
        self._sent.append((entry["file"], as_shipped))

    def _picture(self, entry: dict[str, Any]) -> None:
        path = self._waiting(entry)
        if path is None:
            return
        as_shipped = path.stat()
        if not (self.doubtful and self._is_there(entry)):
            try:
                with Image.open(path) as picture:
                    picture.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise Unsendable(short(error)) from None
            self._client.log_image(
                self._run_id, picture, key=entry["key"], step=entry["step"], timestamp=entry["t"],
                synchronous=True,
            )  # fmt: skip
        self._sent.append((entry["file"], as_shipped))

    def _is_there(self, entry: dict[str, Any]) -> bool:
        """Tell whether the run holds both files that MLflow makes of a picture."""
        key = entry["key"].replace("/", "~")
        name = f"images/{key}+step+{entry['step']}+timestamp+{entry['t']}+"
        return any(
            file.path.startswith(name) and file.path.endswith("+compressed.webp")
            for file in self._client.list_artifacts(self._run_id, "images")
        )

    def _remove(self, entry: dict[str, Any]) -> None:
        repository = get_artifact_repository(self._files, tracking_uri=self._store)
        try:
            repository.delete_artifacts(entry["path"])
        except NotImplementedError:
            rank_zero_info(f"MLflow: {entry['path']} stays, this store deletes no files")
        except MlflowException as error:  # it is not there
            if error.error_code != GONE:
                raise

    def _model(self, entry: dict[str, Any]) -> None:
        path = self._waiting(entry)
        if path is None:
            return
        as_shipped = path.stat()
        log_model(
            self._client, self._run_id, path, entry["name"], entry["step"], entry.get("registered")
        )
        self._sent.append((entry["file"], as_shipped))
