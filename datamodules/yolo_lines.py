"""Lines of YOLO texts: boxes and polygons, and what objects of another format look like."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from yolo_lightning.datamodules.annotations import Annotations
from yolo_lightning.datamodules.dataset_files import UnsafePath
from yolo_lightning.errors import InputError, short

_MAX_OBJECTS, _MAX_COLUMNS_LENGTH = 100_000, 2**20  # lines of an image; characters of a line
_MAX_RELATIVE = 2.0  # a coordinate beyond the edge of the image may be this large, one in px more


class LineChecks:
    """Counts, over a dataset, lines that are objects of another format."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}  # where each kind occurs first

    def _add(self, kind: str, location: str) -> None:
        self._counts[kind] += 1
        self._first.setdefault(kind, location)

    def add(self, columns: list[str], values: list[float], location: str) -> bool:
        """Count a line; return whether its coordinates are relative, or not finite."""
        self._add("line", location)
        if len(values) == 5:
            self._add("sixth column", location)
        is_relative = not any(_MAX_RELATIVE < abs(value) < math.inf for value in values[:4])
        if not is_relative:
            self._add("px", f"{location}: {' '.join(columns)[:60]!r}")
        return is_relative

    def add_class(self, label: int, names: list[str], location: str) -> None:
        """Count the first class, and the one after the last."""
        if label in (0, len(names)):
            self._add("class 0" if label == 0 else "one class more", location)

    def report(self, name: str, names: list[str], faults: list[str]) -> None:
        """Report a sixth column once.

        Raises:
            InputError: most lines are in px, or classes are numbered from 1.
        """
        lines, pixels = self._counts["line"], self._counts["px"]
        if 2 * pixels > lines:
            raise InputError(
                f"{name}: {pixels:,} of {lines:,} boxes are in px, such as {self._first['px']}; "
                "wanted: class centre_x centre_y width height, each from 0 to 1 of the image: "
                "divide by its width and height"
            )
        if self._counts["one class more"] and not self._counts["class 0"]:
            raise InputError(
                f"{name}: classes seem to be numbered from 1: no box has class 0, and "
                f"{self._counts['one class more']:,} have {len(names)}, such as "
                f"{self._first['one class more']}; {short(names[0])} is class 0, so subtract 1 in "
                "the texts, or put another name before it (init: --names)"
            )
        if self._counts["sixth column"]:
            faults.append(
                f"{self._first['sixth column']}: a sixth column, as on "
                f"{self._counts['sixth column']:,} of {lines:,} lines; it is not used (detections "
                "of a model have their confidence there)"
            )


def add_lines(
    annotations: Annotations, row: int, file: Path, names: list[str], checks: LineChecks
) -> None:
    """Add the objects of an image, whose number is `row`; faults are reported."""
    faults, count = annotations.faults, 0
    try:
        lines = annotations.read_lines(file)
    except UnsafePath:
        raise
    except InputError as error:
        faults.append(f"{error}, its image is treated as having no objects")
        return
    for number, columns in _split_lines(file, lines, faults):
        count += 1
        try:
            label = int(float(columns[0]))
            values = [float(column) for column in columns[1:]]
        except (ValueError, OverflowError):
            faults.append(f"{file}:{number}: {' '.join(columns)[:60]!r} is not an object, skipped")
            continue
        if not checks.add(columns, values, f"{file}:{number}"):
            faults.append(f"{file}:{number}: outside the image (in px?), skipped")
            continue
        checks.add_class(label, names, f"{file}:{number}")
        if 0 <= label < len(names):
            annotations.add_box(row, _parse_box(values), names[label], number)
        else:
            allowed = f"allowed: 0 … {len(names) - 1}"
            faults.append(f"{file}:{number}: class {short(label)}, {allowed}, skipped")
    if not count:
        faults.append(f"{file}: empty, its image is treated as having no objects")


def _split_lines(
    file: Path, lines: list[str], faults: list[str]
) -> Iterator[tuple[int, list[str]]]:
    """Yield number and columns of each line that is not empty."""
    for number, line in enumerate(lines, start=1):
        if number > _MAX_OBJECTS:
            count = f"{len(lines):,} lines; allowed: {_MAX_OBJECTS:,}"
            faults.append(f"{file}:{number}: one of {count}, the rest is skipped")
            return
        if len(line) > _MAX_COLUMNS_LENGTH:
            faults.append(f"{file}:{number}: {len(line):,} characters are not an object, skipped")
        elif line.strip():
            yield number, line.split()


def _parse_box(values: list[float]) -> list[float]:
    """Return corners, 0 … 1; NaN if the numbers are not a box."""
    if len(values) >= 6 and len(values) % 2 == 0:  # a polygon
        box = [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
    elif len(values) in (4, 5):
        x, y, width, height = values[:4]
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    else:
        box = []
    return box if box and all(map(math.isfinite, values)) else [math.nan] * 4
