"""`yolo-lightning mlflow sync`: upload what could not be uploaded during training."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from yolo_lightning.errors import InputError, mask_secrets, require_folder
from yolo_lightning.tracking.names import absolute_uri, own_store


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
    parser.add_argument(
        "--store",
        metavar="URI",
        help="upload to this store; without it, only runs of your own store are uploaded: "
        "MLFLOW_TRACKING_URI, by default mlflow.db in the working folder",
    )
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


def _sync(folder: Path, requested_store: str | None) -> str:
    """Upload one journal; return an error message, empty if everything is uploaded."""
    from yolo_lightning.tracking.journal import Journal
    from yolo_lightning.tracking.store import StoreUnavailable, short_message
    from yolo_lightning.tracking.uploader import Uploader

    store = absolute_uri(requested_store) if requested_store else own_store()
    state = "was complete"
    try:
        uploader = Uploader(Journal(folder), store)
    except InputError as error:
        return str(error)
    try:
        if not uploader.journal.end:
            raise StoreUnavailable("the journal is empty or cannot be read")
        *_, opened = {"store": store}, *uploader.journal.state("open")
        if not requested_store and mask_secrets(opened["store"]) != mask_secrets(store):
            raise StoreUnavailable(
                f"the run names the store {mask_secrets(opened['store'])[:300]}, not yours, "
                f"{mask_secrets(store)}; if you trust it, name it with --store URI"
            )
        while uploader.upload_next():
            state = "synced"
            if sys.stdout.isatty():
                print(f"\r{uploader.progress:.0%}", end="\r", flush=True)
        result = f"{folder.parent}: run {uploader.run_id} {state}"
    except StoreUnavailable as error:
        return f"{folder.parent}: {error}"
    except Exception as error:
        return f"{folder.parent}: upload to {mask_secrets(store)} failed: {short_message(error)}"
    finally:
        uploader.close()
    if uploader.pending:
        return f"{result}, except {len(uploader.pending)} files that the store cannot accept"
    print(result)
    return ""
