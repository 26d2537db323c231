"""Read and write Darknet's text files: `.cfg`, `.data`, `.names` and `.tree`."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_lightning.errors import InputError, expand, read_text

if TYPE_CHECKING:
    from yolo_lightning.tree.wordtree import WordTree

_LONG_NAMES = {
    "network": "net",
    "conv": "convolutional",
    "max": "maxpool",
    "avg": "avgpool",
    "soft": "softmax",
}


@dataclass
class Section:
    """A section of a `.cfg` file; error messages name file and line."""

    kind: str
    line: int = 0  # of the header
    origin: str = ""  # the file
    options: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)  # of the options

    def error(self, message: str, option: str = "") -> InputError:
        """Return an error at the line of an option, or of the header."""
        line = self.lines.get(option, self.line)
        return InputError(f"{self.origin}:{line}: [{self.kind}] {message}")

    def integer(self, option: str, default: int, low: int, high: int) -> int:
        """Return an integer between two bounds; raise `InputError` otherwise."""
        text = self.options.get(option, str(default))
        if not re.fullmatch(r"[+-]?\d{1,12}", text):
            raise self.error(f"{option}={text}; expected an integer", option)
        return int(self.number(option, default, low, high))

    def number(self, option: str, default: float, low: float = 0.0, high: float = 1e9) -> float:
        """Return a number between two bounds; raise `InputError` otherwise."""
        text = self.options.get(option, str(default))
        try:
            value = float(text)
        except ValueError:
            raise self.error(f"{option}={text}; expected a number", option) from None
        if not low <= value <= high:
            raise self.error(f"{option}={text}; allowed: {low:.9g} … {high:.9g}", option)
        return value

    def numbers(self, option: str) -> list[float]:
        """Return numbers separated by commas; raise `InputError` otherwise."""
        text = self.options.get(option, "")
        try:
            return [float(part) for part in text.replace(" ", "").strip(",").split(",")]
        except ValueError:
            raise self.error(
                f"{option}={text}; expected numbers separated by commas", option
            ) from None


def read_cfg(path: str | Path) -> list[Section]:
    """Read the sections of a `.cfg` file.

    Raises:
        InputError: missing, not text, empty, or an invalid line; names the line.
    """
    return parse_cfg("\n".join(_read_lines(path, ".cfg file")), str(path))


def parse_cfg(text: str, origin: str) -> list[Section]:
    """Parse the text of a `.cfg` file; `origin` is used in error messages."""
    sections: list[Section] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip()
        if not words or words[0] in "#;":
            continue
        header = re.fullmatch(r"\[(\w+)\]", words)
        name, equals, value = words.partition("=")
        if header:
            kind = header.group(1).lower()
            sections.append(Section(_LONG_NAMES.get(kind, kind), number, origin))
        elif equals and name.strip() and sections:
            name, value = name.strip(), re.split(r"[#;]", value, maxsplit=1)[0].strip()
            if name in sections[-1].options:
                raise InputError(
                    f"{origin}:{number}: {name} is already set in line {sections[-1].lines[name]}"
                )
            sections[-1].options[name], sections[-1].lines[name] = value, number
        else:
            raise InputError(f"{origin}:{number}: expected [section] or name=value, found {line!r}")
    if not sections:
        raise InputError(f"{origin}: contains no sections")
    return sections


def write_cfg(path: Path, sections: Iterable[Section]) -> None:
    """Write a `.cfg` file."""
    blocks = [
        "\n".join([f"[{s.kind}]", *(f"{name}={value}" for name, value in s.options.items())])
        for s in sections
    ]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def read_data(path: str | Path) -> dict[str, Path]:
    """Return the paths in a `.data` file: ``names``, ``labels``, ``tree``.

    Raises:
        InputError: a path does not exist.
    """
    paths = {}
    for number, line in enumerate(_read_lines(path, ".data file"), start=1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or line.lstrip().startswith("#") or name not in ("names", "labels", "tree"):
            continue
        found = find_referenced_file(value, path)
        if found is None:
            raise InputError(
                f"{path}:{number}: {name} = {value}: not found in the working folder or next to "
                "the .data file"
            )
        paths[name] = found
    return paths


def find_referenced_file(path: str, source: str | Path) -> Path | None:
    """Find a file that a `.cfg` or `.data` file names.

    The path is relative to the working folder, as in Darknet, or to the file.
    """
    folder = expand(source).parent
    candidates = (Path(path), folder / path, folder.parent / path, folder / Path(path).name)
    return next((file for file in candidates if file.is_file()), None)


def read_names(path: str | Path) -> list[str]:
    """Return the lines of a `.names` file, one per class.

    Raises:
        InputError: missing, not text, or an empty line; names the line.
    """
    names = [line.strip() for line in _read_lines(path, "names file")]
    for number, name in enumerate(names, start=1):
        if not name:
            raise InputError(f"{path}:{number}: expected a name, found an empty line")
    return names


def read_tree(
    path: str | Path, names: Sequence[str] | None = None, count: int | None = None
) -> "WordTree":
    """Read a `.tree` file, whose lines are a key and the number of its parent, or -1.

    Names default to the keys. If `count` is given, the file must have that number of nodes.

    Raises:
        InputError: an invalid line, a duplicate key, a parent after its children, siblings that are
            not contiguous, or another number of nodes or names; names the line.
    """
    from yolo_lightning.tree.wordtree import WordTree

    keys: list[str] = []
    parents: list[int] = []
    groups: set[int] = set()
    for number, line in enumerate(_read_lines(path, "tree file"), start=1):
        where = f"{path}:{number}: "
        parts = line.split()
        if len(parts) != 2 or not re.fullmatch(r"-?\d{1,9}", parts[1]):
            raise InputError(f"{where}expected a key and its parent's number, found {line!r}")
        key, parent = parts[0], int(parts[1])
        if not -1 <= parent < len(parents):
            raise InputError(
                f"{where}parent {parent} of {key!r}; expected -1 or the number of a line above, "
                f"0 … {len(parents) - 1}: parents come before their children"
            )
        if parent in groups and parent != parents[-1]:
            raise InputError(
                f"{where}{key!r} is separated from the other children of parent {parent}; "
                "expected siblings in consecutive lines"
            )
        keys.append(key)
        parents.append(parent)
        groups.add(parent)
    if count is not None and len(keys) != count:
        raise InputError(f"{path}: {len(keys)} nodes, but the network has {count} classes")
    if names is not None and len(names) != len(keys):
        raise InputError(f"{path}: {len(keys)} nodes, but {len(names)} names")
    rows = [
        (key, "-" if parent < 0 else keys[parent], name)
        for key, parent, name in zip(keys, parents, names or keys, strict=True)
    ]
    return WordTree(rows, str(path), range(1, len(rows) + 1))


def darknet_order(tree: "WordTree") -> list[int]:
    """Return the nodes in an order that is valid in a `.tree` file; unchanged if already valid.

    Parents come before their children, and siblings are contiguous.
    """
    parents = tree.parents.tolist()
    groups = [parent for parent, _ in groupby(parents)]
    if len(groups) == tree.num_groups and all(parent < k for k, parent in enumerate(parents)):
        return list(range(len(tree)))
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    order = list(children[-1])
    for node in order:  # extended during iteration
        order.extend(children.get(node, []))
    return order


def write_tree(path: Path, tree: "WordTree", order: Sequence[int]) -> None:
    """Write a `.tree` file with the nodes in this order.

    Raises:
        InputError: two keys that differ only in white space, which becomes `_`.
    """
    position = {node: number for number, node in enumerate(order)}
    parents = tree.parents.tolist()
    lines: list[str] = []
    keys: set[str] = set()
    for node in order:
        key = "_".join(tree.keys[node].split())
        if key in keys:
            raise InputError(f"key {tree.keys[node]!r}: a .tree file already has the key {key!r}")
        keys.add(key)
        lines.append(f"{key} {position[parents[node]] if parents[node] >= 0 else -1}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_names(path: Path, names: Iterable[str]) -> None:
    """Write a `.names` file."""
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _read_lines(path: str | Path, description: str) -> list[str]:
    """Return the lines of a text without empty ones at its end; raise `InputError` if empty."""
    lines = read_text(path, description).rstrip().splitlines()
    if not lines:
        raise InputError(f"{path}: empty")
    return lines
