"""Classes that count as trained with boxes, given as a list."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from yolo_lightning.errors import InputError, nearest, read_text
from yolo_lightning.tree.wordtree import WordTree

IMAGENET_DET_44 = "imagenet_det_44"
"""The classes of ImageNet detection that COCO has boxes for; see the comments in the table."""

_TABLE = Path(__file__).parent / "data/imagenet_det_seen.tsv"


@cache
def imagenet_det_seen() -> dict[str, str]:
    """Return the names of the 44 classes of ImageNet detection shared with COCO, by wnid."""
    lines = _TABLE.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return {row[0]: row[1] for row in rows}


def seen_nodes(tree: WordTree, classes: str | Sequence[str]) -> Tensor:
    """Return bool (K,), the listed classes.

    Classes are keys or names, a text file with one per line (`#` before comments, text after a tab
    ignored), or `imagenet_det_44` for those of the 44 that the tree contains.

    Raises:
        InputError: no classes, a missing file, or a class that is ambiguous or not in the tree.
    """
    mask = torch.zeros(len(tree), dtype=torch.bool)
    if classes == IMAGENET_DET_44:
        keys = {key: node for node, key in enumerate(tree.keys)}
        pairs = imagenet_det_seen().items()
        nodes = [keys[key] for pair in pairs for key in pair if key in keys]
        if not nodes:
            raise InputError(f"{classes}: none of its wnids and names is a key of the tree")
        mask[nodes] = True
        return mask
    if isinstance(classes, str):
        entries = _read_classes(classes)
    else:
        entries = [(name, "seen_classes") for name in classes]
    errors: list[str] = []
    for name, where in entries:
        try:
            mask[tree.find_node(name, where)] = True
        except InputError as error:
            errors.append(str(error))
    if errors:
        raise InputError("\n  ".join(errors))
    return mask


def _read_classes(path: str) -> list[tuple[str, str]]:
    allowed = f"allowed: a file with one class per line, or {IMAGENET_DET_44}"
    text = read_text(path, "list of seen classes", nearest(path, [IMAGENET_DET_44]) or allowed)
    entries = [
        (line.partition("\t")[0].strip(), f"{path}:{number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.startswith("#")
    ]
    if not entries:
        raise InputError(f"{path}: contains no classes; expected one per line")
    return entries
