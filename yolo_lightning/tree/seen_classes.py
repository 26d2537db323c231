"""Classes that count as trained with boxes, given as a list."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from yolo_lightning.errors import InputError, nearest, read_text
from yolo_lightning.tree.labels import load_reviewed_labels
from yolo_lightning.tree.wordtree import WordTree

IMAGENET_DET_44 = "imagenet_det_44"
"""The classes of ImageNet detection that COCO has boxes for; see the comments in the table."""

COCO = "coco"
"""The classes of COCO, by the reviewed table of their names."""

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
    ignored), or the name of a table, of whose classes the tree need not contain all:
    `imagenet_det_44`, or `coco` for COCO's 80.

    Raises:
        InputError: no classes, a missing file, or a class that is ambiguous or not in the tree.
    """
    mask = torch.zeros(len(tree), dtype=torch.bool)
    if classes in (IMAGENET_DET_44, COCO):
        keys = {key: node for node, key in enumerate(tree.keys)}
        table = imagenet_det_seen() if classes == IMAGENET_DET_44 else load_reviewed_labels()[COCO]
        pairs = table.items()
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
    allowed = f"allowed: a file with one class per line, {IMAGENET_DET_44} or {COCO}"
    hint = nearest(path, [IMAGENET_DET_44, COCO]) or allowed
    text = read_text(path, "list of seen classes", hint)
    entries = [
        (line.partition("\t")[0].strip(), f"{path}:{number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.startswith("#")
    ]
    if not entries:
        raise InputError(f"{path}: contains no classes; expected one per line")
    return entries
