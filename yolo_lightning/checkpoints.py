"""Checkpoints: plain values and tensors, read with ``weights_only=True``."""

from pathlib import Path
from typing import Any

import torch

from yolo_lightning.errors import InputError
from yolo_lightning.wordtree import WordTree


def is_checkpoint(path: str | Path) -> bool:
    """Tell one of our checkpoints, a zip archive, from Darknet's weights."""
    with Path(path).expanduser().open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint of this program holds.

    Raises:
        InputError: no such file, or another kind of file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"checkpoint {str(path)!r} not found (working folder: {Path.cwd()})")
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint["state_dict"], checkpoint["hyper_parameters"]["tree"]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a checkpoint of this program ({reason})") from None
    return checkpoint


def refuse_other_model(
    checkpoint: dict[str, Any], kind: str, parts: dict[str, tuple[list[Any], list[Any]]]
) -> None:
    """Refuse a checkpoint of another module, or of one with other parts.

    Args:
        checkpoint: to be loaded.
        kind: name of the module's class.
        parts: the module's own value and the checkpoint's, by name.

    Raises:
        InputError: names what differs.
    """
    if checkpoint.get("module") != kind:
        raise InputError(
            f"the checkpoint holds a {checkpoint.get('module', 'module of an older version')}, "
            f"the recipe names a {kind}; for its trunk alone, name it in model.pretrained"
        )
    for name, (own, theirs) in parts.items():
        if own != theirs:
            raise InputError(
                f"{name} differs from the checkpoint's: "
                f"{first_difference(own, theirs, 'the recipe', 'the checkpoint')}"
            )


def same_data_tree(trainer: Any, tree: WordTree) -> None:
    """Refuse data whose tree is not the model's.

    Raises:
        InputError: names the first difference.
    """
    theirs = getattr(getattr(trainer, "datamodule", None), "tree", None)
    if theirs is not None and theirs.rows != tree.rows:
        raise InputError(
            "data.tree differs from model.tree: "
            f"{first_difference(theirs.rows, tree.rows, 'the data', 'the model')}"
        )


def first_difference(first: list[Any], second: list[Any], in_first: str, in_second: str) -> str:
    """Return where two lists that differ do so first, in words."""
    if len(first) != len(second):
        return f"{len(first)} entries in {in_first}, {len(second)} in {in_second}"
    number = next(k for k, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
    return f"entry {number + 1} is {first[number]} in {in_first}, {second[number]} in {in_second}"
