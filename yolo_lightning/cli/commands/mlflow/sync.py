"""`yolo-lightning mlflow sync`: upload what could not be uploaded during training."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_lightning.errors import InputError, require_folder

if TYPE_CHECKING:
    from yolo_lightning.tracking.journal import Journal
    from yolo_lightning.tracking.uploader import Uploader


def main(argv: Sequence[str]) -> None:
    """Upload all journals in a folder and its subfolders.

    Raises:
        InputError: there is no journal, or one cannot be uploaded.
    """
    parser = argparse.ArgumentParser(
        "yolo-lightning mlflow sync",
        description="Upload to MLflow what could not be uploaded during training. Points that are "
        "in the store already are not duplicated; a second sync changes nothing.",
    )
    parser.add_argument("folder", help="a run folder, or a folder with several of them")
    parser.add_argument("--store", help="upload to this store instead of the one of the training")
    options = parser.parse_args(argv)
    folder = require_folder(options.folder, "folder")

    from yolo_lightning.cli.recipe import silence_libraries
    from yolo_lightning.tracking.journal import find_journals

    silence_libraries()
    journals = find_journals(folder)
    if not journals:
        raise InputError(f"no MLflow journal in {options.folder!r} or its subfolders")
    problems = [problem for journal in journals if (problem := _sync(journal, options.store))]
    if problems:
        raise InputError("; ".join(problems))


def _sync(folder: Path, store: str | None) -> str:
    """Upload one journal; return an error message, empty if everything is uploaded."""
    from yolo_lightning.tracking.journal import Journal
    from yolo_lightning.tracking.logger import prepare_environment
    from yolo_lightning.tracking.store import (
        StoreUnavailable,
        absolute_uri,
        short_message,
        strip_credentials,
    )
    from yolo_lightning.tracking.uploader import Uploader

    prepare_environment()
    journal = Journal(folder)
    uploader = Uploader(journal, absolute_uri(store) if store else _uri_with_password(journal))
    try:
        result = _upload(uploader)
    except StoreUnavailable as error:
        return f"{folder.parent}: {error}"
    except Exception as error:
        uri = strip_credentials(uploader.store_uri)
        return f"{folder.parent}: upload to {uri} failed: {short_message(error)}"
    finally:
        uploader.close()
    if uploader.deferred:
        return f"{result}, except {len(uploader.deferred)} files that the store cannot accept"
    print(result)
    return ""


def _upload(uploader: "Uploader") -> str:
    changed = False
    while uploader.upload_next():
        changed = True
        if sys.stdout.isatty():
            print(f"\r{uploader.progress:.0%}", end="\r", flush=True)
    result = "synced" if changed else "was complete"
    return f"{uploader.journal.folder.parent}: run {uploader.run_id} {result}"


def _uri_with_password(journal: "Journal") -> str | None:
    """Return MLFLOW_TRACKING_URI if it is the journal's store, which is recorded without password.

    Otherwise None.
    """
    from yolo_lightning.tracking.store import strip_passwords

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    stores = [entry["store"] for entry, _ in journal.entries(0, "open")]
    return uri if uri and stores and strip_passwords(uri) == stores[-1] else None
