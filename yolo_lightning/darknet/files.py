"""Darknet's files: `.weights`, `.cfg`, `.data`, `.names` and `.tree`, read and written."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from yolo_lightning.errors import InputError
from yolo_lightning.models.networks import ConvBlock
from yolo_lightning.tree.wordtree import WordTree

VERSION = (0, 2, 0)
"""Of the files that are written; from 0.2 on images are counted in 64 bits."""

MAX_TEXT_BYTES = 64 * 2**20

_LONG_NAMES = {
    "network": "net",
    "conv": "convolutional",
    "max": "maxpool",
    "avg": "avgpool",
    "soft": "softmax",
}


@dataclass
class Weights:
    """A `.weights` file.

    Attributes:
        path: of the file.
        version: major, minor, revision.
        images_seen: in training.
        header_bytes: before the first value.
        values: float32 (N,), mapped from the disk.
    """

    path: Path
    version: tuple[int, int, int]
    images_seen: int
    header_bytes: int
    values: NDArray[np.float32]


def read_weights(path: str | Path) -> Weights:
    """Map a `.weights` file; nothing but the header is read yet.

    Raises:
        InputError: missing, too short, an impossible header, or bytes that are no whole values;
            names the byte.
    """
    file = _existing(path, "weights file")
    size = file.stat().st_size
    if size < 16:
        raise InputError(f"{file}: {size} bytes; expected a header of 16 or 20 bytes and values")
    with file.open("rb") as handle:
        head = handle.read(20)
    major, minor, revision = (int(n) for n in np.frombuffer(head[:12], dtype="<i4"))
    if not (0 <= major < 1000 and 0 <= minor < 1000 and revision >= 0):
        raise InputError(
            f"{file}, byte 0: version {major}.{minor}.{revision}; expected three small numbers: "
            "this is not a Darknet weights file"
        )
    wide = major * 10 + minor >= 2
    header_bytes = 20 if wide else 16
    if size < header_bytes:
        raise InputError(
            f"{file}, byte {size}: the header of version {major}.{minor} ends at byte 20"
        )
    seen = int(np.frombuffer(head[12:header_bytes], dtype="<i8" if wide else "<i4")[0])
    if seen < 0:
        raise InputError(f"{file}, byte 12: {seen} images seen; expected 0 or more")
    odd = (size - header_bytes) % 4
    if odd:
        raise InputError(
            f"{file}, byte {size - odd}: {odd} bytes after the last whole value; "
            "the file is truncated, or no weights file"
        )
    count = (size - header_bytes) // 4
    values: NDArray[np.float32] = (
        np.memmap(file, dtype="<f4", mode="r", offset=header_bytes, shape=(count,))
        if count
        else np.zeros(0, dtype=np.float32)
    )
    return Weights(file, (major, minor, revision), seen, header_bytes, values)


class WeightsReader:
    """Fill layers from a `.weights` file, in its order.

    Args:
        weights: the file.

    Attributes:
        position: number of the next value.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.position = weights, 0

    @property
    def remaining(self) -> int:
        """Return how many values are left."""
        return len(self.weights.values) - self.position

    @property
    def byte(self) -> int:
        """Return the offset of the next value in the file."""
        return self.weights.header_bytes + 4 * self.position

    def take(self, shape: Sequence[int]) -> Tensor:
        """Return the next values, float32 of this shape.

        Raises:
            InputError: the file ends before, or a value is not finite; names the byte.
        """
        count = int(np.prod(shape))
        if count > self.remaining:
            raise InputError(
                f"{self.weights.path}, byte {self.byte}: expected {count} more values, "
                f"found {self.remaining}"
            )
        part = np.array(self.weights.values[self.position : self.position + count], np.float32)
        bad = np.flatnonzero(~np.isfinite(part))
        if len(bad):
            raise InputError(
                f"{self.weights.path}, byte {self.byte + 4 * int(bad[0])}: "
                f"the value {part[bad[0]]}; expected finite numbers"
            )
        self.position += count
        return torch.from_numpy(part.reshape(tuple(shape)))

    @torch.no_grad()
    def fill(self, block: ConvBlock) -> None:
        """Fill a convolution: bias or shift, scale, running mean and variance, then kernels.

        Raises:
            InputError: as `take`, and a negative variance; names the byte.
        """
        for tensor in tensors_of(block):
            values = self.take(tensor.shape)
            if block.norm is not None and tensor is block.norm.running_var and values.min() < 0:
                place = self.byte - 4 * values.numel() + 4 * int((values < 0).int().argmax())
                raise InputError(
                    f"{self.weights.path}, byte {place}: the variance {values.min():g}; expected 0 "
                    "or more: these are the weights of another network"
                )
            tensor.copy_(values)


def tensors_of(block: ConvBlock) -> list[Tensor]:
    """Return a convolution's tensors in the order of the file."""
    if block.norm is None:
        assert block.conv.bias is not None
        return [block.conv.bias, block.conv.weight]
    norm = block.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [norm.bias, norm.weight, norm.running_mean, norm.running_var, block.conv.weight]


def blocks_of(body: nn.ModuleList) -> list[tuple[int, ConvBlock]]:
    """Return a body's convolutions with their layers' numbers, in the order of the file."""
    return [(k, layer) for k, layer in enumerate(body) if isinstance(layer, ConvBlock)]


def write_weights(path: Path, tensors: Iterable[Tensor], images_seen: int) -> None:
    """Write a `.weights` file of version 0.2."""
    with path.open("wb") as handle:
        np.array(VERSION, dtype="<i4").tofile(handle)
        np.array([images_seen], dtype="<i8").tofile(handle)
        for tensor in tensors:
            tensor.detach().cpu().contiguous().float().numpy().astype("<f4").tofile(handle)


@dataclass
class Section:
    """A section of a `.cfg` file.

    Attributes:
        kind: its name in brackets.
        line: where it starts, from 1.
        options: texts by name.
        lines: where each option stands.
    """

    kind: str
    line: int = 0
    options: dict[str, str] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def read_cfg(path: str | Path) -> list[Section]:
    """Read the sections of a `.cfg` file.

    Raises:
        InputError: missing, not text, empty, or a line that is neither a section nor an option;
            names the line.
    """
    file = _existing(path, ".cfg file")
    return parse_cfg(_text(file), str(file))


def parse_cfg(text: str, origin: str) -> list[Section]:
    """Read the sections of a `.cfg` file's text; `origin` names it in messages."""
    sections: list[Section] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip()
        if not words or words[0] in "#;":
            continue
        header = re.fullmatch(r"\[(\w+)\]", words)  # as Darknet's shorter names have it, too
        name, equals, value = words.partition("=")
        if header:
            kind = header.group(1).lower()
            sections.append(Section(_LONG_NAMES.get(kind, kind), number))
        elif equals and name.strip() and sections:
            name, value = name.strip(), re.split(r"[#;]", value, maxsplit=1)[0].strip()
            if name in sections[-1].options:
                raise InputError(
                    f"{origin}:{number}: {name} stands in line {sections[-1].lines[name]} already"
                )
            sections[-1].options[name], sections[-1].lines[name] = value, number
        else:
            raise InputError(f"{origin}:{number}: expected [section] or name=value, found {line!r}")
    if not sections:
        raise InputError(f"{origin}: holds no sections")
    return sections


def write_cfg(path: Path, sections: Iterable[Section]) -> None:
    """Write a `.cfg` file."""
    blocks = [
        "\n".join([f"[{s.kind}]", *(f"{name}={value}" for name, value in s.options.items())])
        for s in sections
    ]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def read_data(path: str | Path) -> dict[str, Path]:
    """Return the files that a `.data` file names: ``names``, ``labels``, ``tree``.

    Paths are looked up in the working folder, as Darknet does, then beside the file.

    Raises:
        InputError: a file that it names is in neither place.
    """
    file = _existing(path, ".data file")
    found = {}
    for number, line in enumerate(_text(file).splitlines(), start=1):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or line.lstrip().startswith("#") or name not in ("names", "labels", "tree"):
            continue
        places = [Path(value), file.parent / value, file.parent.parent / value]
        places.append(file.parent / Path(value).name)
        existing = [place for place in places if place.is_file()]
        if not existing:
            raise InputError(f"{file}:{number}: {name} = {value}: no such file here or beside it")
        found[name] = existing[0]
    return found


def read_names(path: str | Path) -> list[str]:
    """Return a `.names` file's lines, a class each.

    Raises:
        InputError: missing, not text, or a line without a name; names the line.
    """
    file = _existing(path, "names file")
    names = [line.strip() for line in _text(file).rstrip().splitlines()]
    for number, name in enumerate(names, start=1):
        if not name:
            raise InputError(f"{file}:{number}: expected a name, found an empty line")
    return names


def read_tree(
    path: str | Path, names: Sequence[str] | None = None, count: int | None = None
) -> WordTree:
    """Return the WordTree of a `.tree` file: a key and its parent's number, or -1, a line.

    Args:
        path: of the file.
        names: a name a line; the keys where None.
        count: how many nodes it has to have; any number where None.

    Raises:
        InputError: a malformed line, a key twice, a parent that does not come before its
            children, siblings apart from each other, or names of another number; names the line.
    """
    file = _existing(path, "tree file")
    keys: dict[str, int] = {}
    parents: list[int] = []
    finished: set[int] = set()
    for number, line in enumerate(_text(file).rstrip().splitlines(), start=1):
        where = f"{file}:{number}: "
        parts = line.split()
        if len(parts) != 2 or not re.fullmatch(r"-?\d{1,9}", parts[1]):
            raise InputError(f"{where}expected a key and its parent's number, found {line!r}")
        key, parent = parts[0], int(parts[1])
        if key in keys:
            raise InputError(f"{where}key {key!r} stands in line {keys[key] + 1} already")
        if not -1 <= parent < len(parents):
            raise InputError(
                f"{where}parent {parent} of {key!r}; expected -1 or the number of a line above, "
                f"0 … {len(parents) - 1}: parents come before their children"
            )
        if parent in finished:
            raise InputError(
                f"{where}{key!r} stands apart from the other children of parent {parent}; "
                "expected siblings in lines that follow each other"
            )
        if parents and parents[-1] != parent:
            finished.add(parents[-1])
        keys[key] = len(parents)
        parents.append(parent)
    if count is not None and len(parents) != count:
        raise InputError(f"{file}: {len(parents)} nodes, yet the network has {count} classes")
    if names is not None and len(names) != len(parents):
        raise InputError(f"{file}: {len(parents)} nodes, yet {len(names)} names")
    listed = list(keys)
    rows = [
        (key, "-" if parent < 0 else listed[parent], name)
        for key, parent, name in zip(listed, parents, names or listed, strict=True)
    ]
    return WordTree(rows, str(file))


def darknet_order(tree: WordTree) -> list[int]:
    """Return the nodes in an order that a `.tree` file can hold; as they are where it can.

    Parents come before their children and siblings follow each other.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(node)
    seen: list[int] = []
    finished: set[int] = set()
    for node, parent in enumerate(tree.parents.tolist()):
        if parent >= node or parent in finished:
            break
        if seen and seen[-1] != parent:
            finished.add(seen[-1])
            if parent in finished:
                break
        seen.append(parent)
    else:
        return list(range(len(tree)))
    order = list(children[-1])
    for node in order:  # grows while it is walked
        order.extend(children.get(node, []))
    return order


def write_tree(path: Path, tree: WordTree, order: Sequence[int]) -> None:
    """Write a `.tree` file of the nodes in this order.

    Raises:
        InputError: two keys that differ in blanks alone, which the format cannot hold.
    """
    place = {node: number for number, node in enumerate(order)}
    parents = tree.parents.tolist()
    lines: list[str] = []
    keys: set[str] = set()
    for node in order:
        key = "_".join(tree.keys[node].split())
        if key in keys:
            raise InputError(f"key {tree.keys[node]!r} cannot stand in a .tree file: {key!r} does")
        keys.add(key)
        lines.append(f"{key} {place[parents[node]] if parents[node] >= 0 else -1}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_names(path: Path, names: Iterable[str]) -> None:
    """Write a `.names` file."""
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _existing(path: str | Path, what: str) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"{what} {str(path)!r} not found (working folder: {Path.cwd()})")
    return file


def _text(file: Path) -> str:
    """Return a file's text.

    Raises:
        InputError: too large, not UTF-8, or with NUL bytes; names the byte.
    """
    size = file.stat().st_size
    if size > MAX_TEXT_BYTES:
        raise InputError(f"{file}: {size} bytes; expected a text of at most {MAX_TEXT_BYTES}")
    data = file.read_bytes()
    if b"\0" in data:
        place = data.index(b"\0")
        line = data.count(b"\n", 0, place) + 1
        raise InputError(f"{file}:{line}: a NUL byte at byte {place}; expected text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}, byte {error.start}: not UTF-8 text") from None
    if not text.strip():
        raise InputError(f"{file}: empty")
    return text
