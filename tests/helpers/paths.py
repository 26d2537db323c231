"""Folders of the repository."""

from pathlib import Path

REPO = Path(__file__).parents[2]
SHARED_DATA = REPO.parent / "shared" / "data"
