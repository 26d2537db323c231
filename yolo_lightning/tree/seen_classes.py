"""Which classes count as seen with boxes, where a list says so instead of the training."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from yolo_lightning.errors import InputError, nearest
from yolo_lightning.tree.wordtree import WordTree

IMAGENET_DET_44 = "imagenet_det_44"
"""The classes of ImageNet detection that COCO has boxes of; the table says why these."""

_TABLE = Path(__file__).parent / "data/imagenet_det_seen.tsv"


@cache
def imagenet_det_seen() -> dict[str, str]:
    """Return the names of the 44 classes of ImageNet detection shared with COCO, by wnid."""
    lines = _TABLE.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if not line.startswith("#")]
    return {row[0]: row[1] for row in rows}


def seen_nodes(tree: WordTree, which: str | Sequence[str]) -> Tensor:
    """Return bool (K,), the classes that a list names as seen with boxes.

    Args:
        tree: the classes.
        which: keys or names of classes; or a text file with one of them a line, `#` before
            comments, nothing after a tab read; or `imagenet_det_44`, of which those count that the
            tree has.

    Raises:
        InputError: no such file, or nothing in it; a class that is not in the tree, or ambiguous;
            none of the 44.
    """
    seen = torch.zeros(len(tree), dtype=torch.bool)
    if which == IMAGENET_DET_44:
        keys = {key: node for node, key in enumerate(tree.keys)}
        pairs = imagenet_det_seen().items()
        found = [keys[key] for pair in pairs for key in pair if key in keys]
        if not found:
            raise InputError(f"{which}: none of its wnids and names is a key of the tree")
        seen[found] = True
        return seen
    named = _lines(which) if isinstance(which, str) else [(name, "seen") for name in which]
    trouble: list[str] = []
    for name, where in named:
        try:
            seen[tree.node(name, where)] = True
        except InputError as error:
            trouble.append(str(error))
    if trouble:
        raise InputError("\n  ".join(trouble))
    return seen


def _lines(path: str) -> list[tuple[str, str]]:
    """Return the classes that a file names, and where each stands."""
    file = Path(path).expanduser()
    if not file.is_file():
        hint = nearest(path, [IMAGENET_DET_44])
        raise InputError(
            f"file {path!r} of classes seen with boxes not found (working folder: {Path.cwd()}); "
            f"{hint or f'allowed: a file with a class a line, or {IMAGENET_DET_44}'}"
        )
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable as UTF-8 text ({error})") from None
    named = [
        (line.partition("\t")[0].strip(), f"{file}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.startswith("#")
    ]
    if not named:
        raise InputError(f"{file}: names no class; expected one a line")
    return named
