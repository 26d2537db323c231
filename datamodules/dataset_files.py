"""Files of a dataset while it is parsed: paths, folder listings, texts, and what went wrong."""

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from yolo_lightning.errors import (
    MAX_ANNOTATION_BYTES,
    MAX_TEXT_BYTES,
    InputError,
    read_text,
    short,
)
from yolo_lightning.images import is_image

ALLOW_OUTSIDE = (
    "to allow this, set allow_outside: true on the source, or --allow-outside where a command is "
    "given the dataset"
)
SPLITS = ("train", "val", "valid", "validation", "test")  # usual names of folders
_MAX_PATH = 4096  # characters; the longest of Linux


class UnsafePath(InputError):
    """A dataset names or links to what lies outside its folder, or what cannot be a path."""


def visible_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder that are not hidden, by name; none if it does not exist."""
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(entry for entry in entries if entry.is_dir() and entry.name[:1] != ".")


def missing_split(name: str, split: str, choices: Iterable[str], where: str = "") -> InputError:
    """Return the error that a source has no such split."""
    return InputError(f"{name}: no split {split!r}{where}; found: {', '.join(choices)}")


def is_below(path: str | Path, folder: str | Path) -> bool:
    """Return whether a path lies below a folder; symbolic links are not followed."""
    return os.path.normpath(path).startswith(os.path.join(os.path.normpath(folder), ""))


def resolve_inside(path: str, root: Path, allow_outside: bool, location: str) -> str:
    """Return an annotated path relative to the dataset's folder, or absolute if outside it.

    Raises:
        UnsafePath: the path leads out of the folder and `allow_outside` is false, or no file can
            have it.
    """
    if len(path) > _MAX_PATH or "\0" in path or not _is_encodable(path):
        raise UnsafePath(f"{location}: {short(path)} cannot be the path of a file")
    # symbolic links are not followed: those in the dataset's folder belong to the dataset
    if ".." not in path and not os.path.isabs(path):
        return path
    absolute = os.path.normpath(os.path.join(root, path))
    if is_below(absolute, root):
        return os.path.relpath(absolute, os.path.normpath(root))
    if allow_outside:
        return absolute
    raise UnsafePath(
        f"{location}: path {path!r} leaves the dataset's folder {str(root)!r}; {ALLOW_OUTSIDE}"
    )


def base_name(name: str) -> str:
    """Return the last part of a path, which tools on other machines wrote in full."""
    return name.replace("\\", "/").rpartition("/")[2]


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:  # a lone surrogate, from JSON
        return False
    return True


def table_rows(
    lines: Iterable[str], file: Path, delimiter: str = ","
) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of each row of a table.

    Raises:
        InputError: a cell is too large, such as by a quotation mark that is not closed.
    """
    number = 0
    try:
        for number, row in enumerate(csv.reader(lines, delimiter=delimiter), start=1):
            yield number, row
    except csv.Error as error:
        raise InputError(f"{file}:{number + 1}: not a table ({error})") from None


class DatasetFiles:
    """The files of a dataset; each folder is listed once, and all that is read is watched.

    Texts outside its folder are not read unless `allow_outside`: a dataset of strangers may name a
    file with secrets, or contain a link to one, whose lines would become names of classes.
    """

    def __init__(self, root: Path, allow_outside: bool = False) -> None:
        self.root, self.allow_outside = root, allow_outside
        self._readable = [os.path.realpath(root)]  # texts, and folders of texts
        self._inside: set[str] = set()  # folders whose files may be read, if they are no links
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
            except (OSError, ValueError):  # ValueError: a NUL in the path
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

    def allow(self, real_path: str) -> None:
        """Allow to read a text, or the texts below a folder, whose path contains no links."""
        self._readable.append(real_path)

    def require_inside(self, file: Path) -> None:
        """Raise `UnsafePath` if a text, or what it links to, lies outside the dataset's folder."""
        if self.allow_outside:
            return
        folder, is_link = os.path.dirname(file), os.path.islink(file)
        if folder in self._inside and not is_link and file.name != "..":
            return
        real = os.path.realpath(file)
        if not is_link and any(is_below(real, path) for path in self._readable):
            self._inside.add(folder)
        if not any(real == path or is_below(real, path) for path in self._readable):
            path = os.path.abspath(file)
            target = "" if real == path else f" leads to {real}, which"
            raise UnsafePath(
                f"{path}{target} is outside the dataset's folder {str(self.root)!r}; "
                f"{ALLOW_OUTSIDE}"
            )

    def read_lines(self, file: Path, max_bytes: int = MAX_TEXT_BYTES) -> list[str]:
        """Return the lines of a text of the dataset; see `read_text` and `require_inside`."""
        self.watched.append(file)
        self.require_inside(file)
        return read_text(file, max_bytes=max_bytes).splitlines()

    def read_table(self, file: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
        """Yield number and cells of each row of a text; see `read_list` and `table_rows`."""
        return table_rows(self.read_list(file), file, delimiter)

    def read_list(self, file: Path) -> list[str]:
        """Return the lines of a text that may list all images; see `read_lines`."""
        return self.read_lines(file, MAX_ANNOTATION_BYTES)
