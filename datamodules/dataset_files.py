"""Files of a dataset while it is parsed: paths, folder listings, texts, and what went wrong."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from yolo_lightning.errors import InputError, read_text
from yolo_lightning.images import is_image


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder that are not hidden, by name; none if it does not exist."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in entries if entry.is_dir() and entry.name[:1] != ".")


def missing_split(name: str, split: str, choices: Iterable[str], where: str = "") -> InputError:
    """Return the error that a source has no such split."""
    return InputError(f"{name}: no split {split!r}{where}; found: {', '.join(choices)}")


def is_below(path: str | Path, folder: Path) -> bool:
    """Return whether a path lies below a folder; symbolic links are not followed."""
    return os.path.normpath(path).startswith(os.path.join(os.path.normpath(folder), ""))


def resolve_inside(path: str, root: Path, allow_outside: bool, location: str) -> str:
    """Return an annotated path relative to the dataset's folder, or absolute if outside it.

    Raises:
        InputError: the path leads out of the folder and `allow_outside` is false.
    """
    # symbolic links are not followed: those in the dataset's folder belong to the dataset
    if ".." not in path and not os.path.isabs(path):
        return path
    absolute = os.path.normpath(os.path.join(root, path))
    if is_below(absolute, root):
        return os.path.relpath(absolute, os.path.normpath(root))
    if allow_outside:
        return absolute
    raise InputError(
        f"{location}: path {path!r} leaves the dataset's folder {str(root)!r}; to allow this, set "
        "allow_outside: true"
    )


class DatasetFiles:
    """The files of a dataset; each folder is listed once, and all that is read is watched."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: list[str] = []  # what was repaired or skipped, one sentence each
        self.watched: list[Path] = []  # files and folders that the result depends on
        self._names: dict[Path, dict[str, None]] = {}
        self._images: dict[Path, dict[str, str]] = {}

    def names(self, folder: Path) -> dict[str, None]:
        """Return the names in a folder, ascending, as keys; none if it cannot be listed."""
        if folder not in self._names:
            self.watched.append(folder)
            try:
                self._names[folder] = dict.fromkeys(sorted(os.listdir(folder)))
            except OSError:
                self._names[folder] = {}
        return self._names[folder]

    def exists(self, path: Path) -> bool:
        """Return whether a file exists."""
        return path.name in self.names(path.parent)

    def find_image(self, folder: Path, stem: str) -> str | None:
        """Return the name of an image given without its suffix; .jpg is preferred."""
        if folder not in self._images:
            images = [name for name in self.names(folder) if is_image(name)]
            images.sort(key=lambda name: not name.endswith(".jpg"))
            self._images[folder] = {os.path.splitext(name)[0]: name for name in reversed(images)}
        return self._images[folder].get(stem)

    def walk(self, folder: Path) -> Iterator[Path]:
        """Yield the files in a folder and below it, without hidden files and folders."""
        for parent, names in self.walk_folders(folder):
            yield from (Path(parent) / name for name in names)

    def walk_folders(self, folder: Path) -> Iterator[tuple[str, list[str]]]:
        """Yield a folder and each one below it, and the names of the files in it."""
        # links to folders are followed, but no folder is visited twice
        visited: set[str] = set()
        start = os.path.realpath(folder)
        for parent, subfolders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in visited or (real != start and start.startswith(os.path.join(real, ""))):
                subfolders.clear()
                continue
            visited.add(real)
            subfolders[:] = sorted(name for name in subfolders if name[:1] != ".")
            self.watched.append(Path(parent))
            yield parent, sorted(name for name in names if name[:1] != ".")

    def read_lines(self, file: Path) -> list[str]:
        """Return the lines of a text; see `read_text`."""
        self.watched.append(file)
        return read_text(file).splitlines()
