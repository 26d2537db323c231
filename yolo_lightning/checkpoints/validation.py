"""Validation of checkpoints before a network is built from them."""

import math
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from yolo_lightning.checkpoints.io import LAST, PREVIOUS, load_file, verify
from yolo_lightning.errors import InputError
from yolo_lightning.models.backbones import backbone_layers, checkpoint_layers, detector_layers
from yolo_lightning.models.layers import Conv, CustomBackbone, Layer, ReorgKind, layer_outputs
from yolo_lightning.tree.wordtree import WordTree

# limits of what a checkpoint may describe
MAX_NODES = 100_000  # WordNet has 82,115 nouns
MAX_LAYERS = 1000
MAX_IMAGE_PX = 8192  # side of the network input
_MAX_CHANNELS = 2**31
_MAX_KERNEL = 64  # kernel size, stride and padding of a layer


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a file is a checkpoint, which is a zip archive, and not Darknet weights."""
    with Path(path).expanduser().open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load and validate a checkpoint.

    The network in its hyper-parameters must have as many values as its state dict, so that building
    it needs no more memory than the file.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint.
    """
    checkpoint = load_file(path)
    try:
        state, hparams = checkpoint["state_dict"], checkpoint["hyper_parameters"]
        hparams["tree"]
        if not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in state.items()):
            raise InputError("its state_dict contains other values than tensors")
        _check_hyper_parameters(checkpoint.get("module"), hparams, state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        raise InputError(f"{path}: not a checkpoint of this program ({reason})") from None
    return checkpoint


def resumable_checkpoint(path: str | Path) -> Path:
    """Verify the checkpoint to resume from; fall back from `last.ckpt` to `previous.ckpt`.

    Files of other names have no fallback.

    Raises:
        InputError: no file can be used, with the reasons.
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
        rank_zero_only(print)(f"{error}; resuming from {previous}")
        return previous
    return file


def _check_hyper_parameters(module: Any, hparams: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Check that the hyper-parameters describe the network of the state dict."""
    tree, size = hparams["tree"], hparams.get("image_size", 32)
    if not (
        isinstance(tree, list)
        and len(tree) <= MAX_NODES
        and all(
            isinstance(row, list | tuple) and _all_instances(row, str) and len(row) == 3
            for row in tree
        )
    ):
        raise InputError(f"its tree is not a list of up to {MAX_NODES:,} rows of key, parent, name")
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(_is_int_between(side, 1, MAX_IMAGE_PX) for side in sides):
        raise InputError(f"image_size is {str(size)[:40]}; allowed: 1 … {MAX_IMAGE_PX} px")
    if module not in ("DetectorModule", "ClassifierModule"):
        return  # the caller checks the class of the module
    layers = _check_backbone(hparams["backbone"], hparams.get("head_channels"), state)
    anchors = 0
    if module == "DetectorModule":
        anchors = _check_anchors(hparams["anchors_wh_cell"])
        head, passthrough = hparams["head_channels"], hparams["passthrough_channels"]
        reorg = hparams["reorg"]
        channels = (head, passthrough or 0)
        valid = all(_is_int_between(value, 0, _MAX_CHANNELS) for value in channels)
        if not valid or reorg not in get_args(ReorgKind):
            raise InputError("its head_channels, passthrough_channels or reorg is invalid")
        layers = detector_layers(layers, head, passthrough, reorg)
    expected = _count_values(layers, len(tree), anchors)
    if isinstance(layers[0], CustomBackbone):  # its layers are unknown
        prefix = "network.body.0."
        expected += sum(v.numel() for name, v in state.items() if name.startswith(prefix))
    actual = sum(value.numel() for name, value in state.items() if name.startswith("network."))
    if expected != actual:
        raise InputError(
            f"describes a network of {expected:,} values, but has {actual:,}: "
            "not a checkpoint of this version"
        )


def _check_backbone(
    backbone: Any, head_channels: Any, state: dict[str, Tensor]
) -> tuple[Layer, ...]:
    """Return the layers of a backbone after a check of their sizes."""
    if isinstance(backbone, dict):
        if not isinstance(backbone.get("class_path"), str):
            raise InputError("its backbone is a dict without a class_path")
        next_conv = "box_conv" if head_channels == 0 else "body.1.conv"
        if head_channels is None:
            next_conv = "class_conv"
        return checkpoint_layers(backbone, state[f"network.{next_conv}.weight"].shape[1])
    if not isinstance(backbone, str):
        if not isinstance(backbone, list | tuple) or len(backbone) > MAX_LAYERS:
            raise InputError(f"its backbone is not a list of up to {MAX_LAYERS} layers")
        for number, row in enumerate(backbone):
            if not isinstance(row, list | tuple) or len(row) > 10 or len(str(row)) > 1000:
                raise InputError(f"layer {number} of its backbone is not a short list of values")
    elif len(backbone) > 100:
        raise InputError("the name of its backbone is too long")
    layers = backbone_layers(backbone)
    for number, layer in enumerate(layers):
        for name in ("size", "stride", "padding"):
            value = getattr(layer, name, None)
            if value is not None and not _is_int_between(value, 0, _MAX_KERNEL):
                raise InputError(
                    f"layer {number} of its backbone: {name} is {str(value)[:40]}; "
                    f"allowed: up to {_MAX_KERNEL}"
                )
    return layers


def _check_anchors(anchors: Any) -> int:
    """Return the number of anchors after a check of their values."""
    for pair in anchors:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        numbers = is_pair and _all_instances(pair, int | float)
        if not numbers or not all(math.isfinite(side) and side > 0 for side in pair):
            raise InputError("its anchors_wh_cell are not pairs of positive numbers")
    return len(anchors)


def _count_values(layers: tuple[Layer, ...], nodes: int, anchors: int) -> int:
    """Return the number of values of a network; of a classifier if there are no anchors."""
    channels, values = 3, 0
    for layer, extent in zip(layers, layer_outputs(layers), strict=True):
        if isinstance(layer, Conv):
            # batch norm: scale, shift, mean and variance per filter, and num_batches_tracked
            others = 4 * layer.filters + 1 if layer.batch_norm else layer.filters
            values += layer.filters * channels * layer.size**2 + others
        channels = extent.channels
    if not anchors:
        return values + nodes * (channels + 1)
    return values + anchors * ((5 + nodes) * (channels + 1) + 2)


def _all_instances(values: Any, types: Any) -> bool:
    return all(isinstance(value, types) for value in values)


def _is_int_between(value: Any, minimum: int, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def check_same_model(
    checkpoint: dict[str, Any], module: str, parts: dict[str, tuple[list[Any], list[Any]]]
) -> None:
    """Check that a checkpoint is of the class `module`, and that each pair of `parts` is equal."""
    if checkpoint.get("module") != module:
        raise InputError(
            f"the checkpoint holds a {checkpoint.get('module', 'module of an older version')}, "
            f"the recipe names a {module}; to load only its backbone, use model.pretrained"
        )
    for name, (expected, saved) in parts.items():
        if expected != saved:
            raise InputError(
                f"{name} differs from the checkpoint's: "
                f"{first_difference(expected, saved, 'the recipe', 'the checkpoint')}"
            )


def check_same_tree(trainer: Any, tree: WordTree) -> None:
    """Check that the data module has the tree of the model."""
    data_tree = getattr(getattr(trainer, "datamodule", None), "tree", None)
    if data_tree is not None and data_tree.rows != tree.rows:
        raise InputError(
            "data.tree differs from model.tree: "
            f"{first_difference(data_tree.rows, tree.rows, 'the data', 'the model')}"
        )


def first_difference(first: list[Any], second: list[Any], in_first: str, in_second: str) -> str:
    """Describe the first difference of two lists."""
    if len(first) != len(second):
        return f"{len(first)} entries in {in_first}, {len(second)} in {in_second}"
    number = next(k for k, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
    return f"entry {number + 1} is {first[number]} in {in_first}, {second[number]} in {in_second}"
