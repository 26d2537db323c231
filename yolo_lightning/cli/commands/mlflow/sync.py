"""`yolo-lightning mlflow sync`: what a store did not take while a training ran."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_lightning.errors import InputError

if TYPE_CHECKING:
    from yolo_lightning.tracking.shipper import Shipper


def main(argv: Sequence[str]) -> None:
    """Ship all journals in a folder and below.

    Raises:
        InputError: no journal there, or a store that does not take one.
    """
    parser = argparse.ArgumentParser(
        "yolo-lightning mlflow sync",
        description="Bring what MLflow did not take while a training ran into its store. Points "
        "that are there already stay single; syncing twice changes nothing.",
    )
    parser.add_argument("folder", help="a run's folder, or one that holds several")
    parser.add_argument("--store", help="another store than the one that the training wrote to")
    options = parser.parse_args(argv)
    folder = Path(options.folder)
    if not folder.is_dir():
        raise InputError(f"folder {options.folder!r} not found (working folder: {Path.cwd()})")

    from yolo_lightning.cli.recipe import quiet
    from yolo_lightning.tracking.journal import journals_under

    quiet()
    found = journals_under(folder)
    if not found:
        raise InputError(f"no run under {options.folder!r} has a journal for MLflow")
    problems = [problem for journal in found if (problem := _sync(journal, options.store))]
    if problems:
        raise InputError("; ".join(problems))


def _sync(folder: Path, store: str | None) -> str:
    """Ship one journal; return why that did not work, or nothing."""
    from yolo_lightning.tracking.journal import Journal
    from yolo_lightning.tracking.logger import prepare_environment
    from yolo_lightning.tracking.shipper import Shipper
    from yolo_lightning.tracking.store import StoreUnavailable, absolute, public, short

    prepare_environment()
    journal = Journal(folder)
    shipper = Shipper(journal, absolute(store) if store else _with_password(journal))
    try:
        said = _ship(shipper)
    except StoreUnavailable as error:
        return f"{folder.parent}: {error}"
    except Exception as error:
        return f"{folder.parent}: {public(shipper.store)} does not take it: {short(error)}"
    finally:
        shipper.close()
    if shipper.put_off:
        return f"{said}, but for {len(shipper.put_off)} files that their store does not take"
    print(said)
    return ""


def _ship(shipper: "Shipper") -> str:
    changed = False
    while shipper.ship():
        changed = True
        if sys.stdout.isatty():
            print(f"\r{shipper.done:.0%}", end="\r", flush=True)
    what = "synced" if changed else "was complete"
    return f"{shipper.journal.folder.parent}: run {shipper.run_id} {what}"


def _with_password(journal: object) -> str | None:
    """Return the environment's store where it is the journal's, which holds no password."""
    from yolo_lightning.tracking.journal import Journal
    from yolo_lightning.tracking.store import without_password

    assert isinstance(journal, Journal)
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    opened = [entry["store"] for entry, _ in journal.entries(0, "open")]
    return uri if uri and opened and without_password(uri) == opened[-1] else None
