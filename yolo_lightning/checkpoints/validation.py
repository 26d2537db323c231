"""Checkpoints: plain values and tensors, read with ``weights_only=True``."""

import math
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from yolo_lightning.checkpoints.io import LAST, PREVIOUS, load_file, verify
from yolo_lightning.errors import InputError
from yolo_lightning.models.backbones import backbone_layers, detector_layers
from yolo_lightning.models.layers import Conv, Layer, ReorgKind, extents
from yolo_lightning.tree.wordtree import WordTree

MAX_NODES = 100_000
"""Of the tree in a checkpoint; WordNet has 82,115 nouns."""

MAX_LAYERS = 1000
"""Of the network in a checkpoint."""

MAX_IMAGE_PX = 8192
"""Side of the network input that a checkpoint may ask for."""

_MAX_CHANNELS = 2**31
_MAX = 64
"""Size, stride, and padding of a layer in a checkpoint; px or cells."""


def is_checkpoint(path: str | Path) -> bool:
    """Tell one of our checkpoints, a zip archive, from Darknet's weights."""
    with Path(path).expanduser().open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint of this program holds, verified.

    A file is read to its end before anything in it is used, and the network that it describes is
    the one whose values it holds: building it takes no more memory than the file. No other file
    takes its place; see `sound_checkpoint`.

    Raises:
        InputError: no such file, a damaged one, or another kind of file.
    """
    checkpoint = load_file(path)
    try:
        state, described = checkpoint["state_dict"], checkpoint["hyper_parameters"]
        described["tree"]
        if not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items()):
            raise InputError("its state_dict holds more than tensors")
        _check_described(checkpoint.get("module"), described, state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise InputError(f"{path}: not a checkpoint of this program ({reason})") from None
    return checkpoint


def sound_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint to resume from: this one, or for a broken last one the one before it.

    Args:
        path: what was asked for. A damaged or missing `last.ckpt` is replaced by the
            `previous.ckpt` beside it, and a line says so; no other file is.

    Raises:
        InputError: neither can be used; says why of both.
    """
    file = Path(path).expanduser()
    previous = file.with_name(PREVIOUS)
    try:
        verify(file)
    except InputError as error:
        if file.name != LAST or not previous.is_file():
            raise
        try:
            verify(previous)
        except InputError as other:
            raise InputError(f"{error}; {other}") from None
        rank_zero_only(print)(f"{error}; going on from {previous}")
        return previous
    return file


def _check_described(kind: Any, described: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Refuse a description of a network other than the one whose values are there."""
    tree, size = described["tree"], described.get("image_size", 32)
    if not (
        isinstance(tree, list)
        and len(tree) <= MAX_NODES
        and all(isinstance(row, list | tuple) and _are(row, str) and len(row) == 3 for row in tree)
    ):
        raise InputError(f"its tree is no list of up to {MAX_NODES:,} key, parent, name")
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(_is_count(side, MAX_IMAGE_PX) for side in sides):
        raise InputError(f"image_size is {str(size)[:40]}; allowed: 1 … {MAX_IMAGE_PX} px")
    if kind not in ("DetectorModule", "ClassifierModule"):
        return  # whoever knows what is needed refuses it
    layers = _backbone_described(described["backbone"])
    anchors = 0
    if kind == "DetectorModule":
        anchors = _anchors_described(described["anchors_wh_cell"])
        head, passed = described["head_channels"], described["passthrough_channels"]
        reorg = described["reorg"]
        counts = _is_count(head, _MAX_CHANNELS, 0) and _is_count(passed or 0, _MAX_CHANNELS, 0)
        if not counts or reorg not in get_args(ReorgKind):
            raise InputError("its head_channels, passthrough_channels or reorg is no such thing")
        layers = detector_layers(layers, head, passed, reorg)
    expected = _count_values(layers, len(tree), anchors)
    found = sum(value.numel() for name, value in state.items() if name.startswith("network."))
    if expected != found:
        raise InputError(
            f"describes a network of {expected:,} values, yet holds {found:,}: "
            "not a checkpoint of this version"
        )


def _backbone_described(backbone: Any) -> tuple[Layer, ...]:
    """Return the layers of a backbone; implausible sizes are refused first."""
    if not isinstance(backbone, str):
        if not isinstance(backbone, list | tuple) or len(backbone) > MAX_LAYERS:
            raise InputError(f"its backbone is no list of up to {MAX_LAYERS} layers")
        for number, row in enumerate(backbone):
            if not isinstance(row, list | tuple) or len(row) > 10 or len(str(row)) > 1000:
                raise InputError(f"layer {number} of its backbone is no short list of values")
    elif len(backbone) > 100:
        raise InputError("the name of its backbone is too long")
    layers = backbone_layers(backbone)
    for number, layer in enumerate(layers):
        for name in ("size", "stride", "padding"):
            value = getattr(layer, name, None)
            if value is not None and not _is_count(value, _MAX, least=0):
                raise InputError(
                    f"layer {number} of its backbone: {name} is {str(value)[:40]}; "
                    f"allowed: up to {_MAX}"
                )
    return layers


def _anchors_described(anchors: Any) -> int:
    """Return how many anchors there are."""
    for pair in anchors:
        numbers = isinstance(pair, list | tuple) and len(pair) == 2 and _are(pair, int | float)
        if not numbers or not all(math.isfinite(side) and side > 0 for side in pair):
            raise InputError("its anchors_wh_cell are no pairs of positive numbers")
    return len(anchors)


def _count_values(layers: tuple[Layer, ...], nodes: int, anchors: int) -> int:
    """Return how many values a network has: a classifier where there are no anchors."""
    channels, values = 3, 0
    for layer, extent in zip(layers, extents(layers), strict=True):
        if isinstance(layer, Conv):
            # batch norm: scale, shift, mean and variance a filter, and how many batches it saw
            beside = 4 * layer.filters + 1 if layer.batch_norm else layer.filters
            values += layer.filters * channels * layer.size**2 + beside
        channels = extent.channels
    if not anchors:
        return values + nodes * (channels + 1)
    return values + anchors * ((5 + nodes) * (channels + 1) + 2)


def _are(values: Any, kind: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


def _is_count(value: Any, most: int, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


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
            f"the recipe names a {kind}; for its backbone alone, name it in model.pretrained"
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
