"""Which files there are, and which paths stay inside a dataset."""

import os
from pathlib import Path

from yolo_lightning.errors import InputError
from yolo_lightning.images import is_image


def inside(path: str, root: Path, allow_outside: bool, where: str) -> str:
    """Return an annotated path relative to its dataset where it lies in it.

    Links are not followed: what lies behind one in the dataset's folder was put there.

    Raises:
        InputError: it leaves the folder, and nobody allowed that.
    """
    if ".." not in path and not os.path.isabs(path):
        return path
    whole = os.path.normpath(os.path.join(root, path))
    if within(whole, root):
        return os.path.relpath(whole, os.path.normpath(root))
    if allow_outside:
        return whole
    raise InputError(
        f"{where}: path {path!r} leaves the dataset's folder {str(root)!r}; if that is meant, set "
        "allow_outside: true"
    )


def within(path: str | Path, root: Path) -> bool:
    """Tell whether a path lies below a folder; links are not followed."""
    return os.path.normpath(path).startswith(os.path.join(os.path.normpath(root), ""))


class Listing:
    """Which files there are, each folder listed once."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, None]] = {}
        self._images: dict[str, dict[str, str]] = {}

    def names(self, folder: Path) -> dict[str, None]:
        """Return the names of a folder's files, ascending; a set that keeps its order."""
        key = str(folder)
        if key not in self._folders:
            try:
                self._folders[key] = dict.fromkeys(sorted(os.listdir(folder)))
            except OSError:
                self._folders[key] = {}
        return self._folders[key]

    def has(self, path: Path) -> bool:
        """Tell whether there is such a file."""
        return path.name in self.names(path.parent)

    def image(self, folder: Path, stem: str) -> str | None:
        """Return the name of a folder's image by its name without the ending; .jpg comes first."""
        key = str(folder)
        if key not in self._images:
            images = [name for name in self.names(folder) if is_image(Path(name))]
            images.sort(key=lambda name: not name.endswith(".jpg"))
            self._images[key] = {os.path.splitext(name)[0]: name for name in reversed(images)}
        return self._images[key].get(stem)

    @property
    def folders(self) -> list[Path]:
        """The folders that were looked at."""
        return [Path(folder) for folder in self._folders]
