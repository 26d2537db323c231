"""Validation of checkpoints before a network is built from them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from yolo_lightning.checkpoints.io import LAST, PREVIOUS, load_file, verify
from yolo_lightning.errors import InputError, expand
from yolo_lightning.models.backbones import (
    checkpoint_layers,
    detector_layers,
    without_batch_norm,
)
from yolo_lightning.models.head import Location
from yolo_lightning.models.layers import CustomBackbone, Layer
from yolo_lightning.models.networks import Classifier, YOLOv2
from yolo_lightning.models.preparation import MAX_IMAGE_PX, Interpolation, Resize
from yolo_lightning.tree.wordtree import MAX_NODES

# limits of what a checkpoint may describe
MAX_LAYERS = 1000
_MAX_KERNEL = 64  # kernel size, stride and padding of a layer
_RUN_ID = re.compile(r"[A-Za-z0-9][\w-]{0,255}")


def is_checkpoint(path: str | Path) -> bool:
    """Return whether a file is a checkpoint, which is a zip archive, and not Darknet weights."""
    with expand(path).open("rb") as handle:
        return handle.read(4) == b"PK\x03\x04"


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load and validate a checkpoint.

    Its state dict must fit the network in its hyper-parameters, so that building the network needs
    no more memory than the file.

    Raises:
        InputError: the file is missing, damaged, or not a checkpoint.
    """
    checkpoint = load_file(path)
    try:
        _check_origin(checkpoint)
        state, hparams = checkpoint["state_dict"], checkpoint["hyper_parameters"]
        _check_sizes(hparams["tree"], hparams.get("image_size", 32))
        if checkpoint.get("module") in ("DetectorModule", "ClassifierModule"):
            _check_options(hparams)
            _check_state(state, hparams, expand(path).stat().st_size)
    except InputError as error:
        raise InputError(f"{path}: {str(error)[:500]}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}".splitlines()[0]
        raise InputError(f"{path}: not a checkpoint of this program ({reason})") from None
    return checkpoint


def resumable_checkpoint(path: str | Path) -> Path:
    """Verify the checkpoint to resume from; fall back from `last.ckpt` to `previous.ckpt`.

    Files of other names have no fallback.

    Raises:
        InputError: no file can be used, with the reasons.
    """
    file = expand(path)
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


def network_layers(hparams: dict[str, Any], out_channels: int = 1) -> tuple[Layer, ...]:
    """Return the layers that the hyper-parameters of a checkpoint describe.

    `out_channels` are those of a backbone whose class they name; it is not imported.
    """
    layers = checkpoint_layers(hparams["backbone"], out_channels)
    if "anchors_wh_cell" in hparams:  # a detector
        head, passthrough = hparams["head_channels"], hparams["passthrough_channels"]
        layers = detector_layers(layers, head, passthrough, hparams["reorg"])
    return layers if hparams["batch_norm"] else without_batch_norm(layers)


def _check_origin(checkpoint: dict[str, Any]) -> None:
    """Check the MLflow run, which becomes the name of a folder, and the step."""
    run_id, step = checkpoint.get("mlflow_run_id"), checkpoint.get("global_step", 0)
    if run_id is not None and not (isinstance(run_id, str) and _RUN_ID.fullmatch(run_id)):
        raise InputError(f"its mlflow_run_id is {str(run_id)[:100]!r}, no id of an MLflow run")
    if type(step) is not int or not 0 <= step < 2**63:
        raise InputError(f"its global_step is {str(step)[:100]!r}; allowed: 0 or more")


def _check_sizes(tree: Any, image_size: Any) -> None:
    if not isinstance(tree, list) or len(tree) > MAX_NODES or not all(map(_is_tree_row, tree)):
        raise InputError(f"its tree is not a list of up to {MAX_NODES:,} rows of key, parent, name")
    sides = image_size if isinstance(image_size, list | tuple) else [image_size, image_size]
    if len(sides) != 2 or not all(type(v) is int and 0 < v <= MAX_IMAGE_PX for v in sides):
        raise InputError(f"image_size is {str(image_size)[:40]}; allowed: 1 … {MAX_IMAGE_PX} px")


def _check_options(hparams: dict[str, Any]) -> None:
    for name, options in (
        ("resize", Resize),
        ("interpolation", Interpolation),
        ("location", Location),
    ):
        allowed = get_args(options)
        if hparams.get(name, allowed[0]) not in allowed:
            value = str(hparams[name])[:40]
            raise InputError(f"{name} is {value}; allowed: {', '.join(allowed)}")


def _is_tree_row(row: Any) -> bool:
    return isinstance(row, list | tuple) and [type(value) for value in row] == [str, str, str]


def _check_state(state: dict[str, Tensor], hparams: dict[str, Any], file_size: int) -> None:
    """Check that the state dict fits the network of the hyper-parameters, without building it."""
    layers = network_layers(hparams, _custom_channels(state))
    if len(layers) > MAX_LAYERS:
        raise InputError(f"its network has {len(layers):,} layers; allowed: {MAX_LAYERS:,}")
    for number, layer in enumerate(layers):
        for name in ("size", "stride", "padding"):
            value = getattr(layer, name, None)
            if isinstance(value, int) and value > _MAX_KERNEL:
                raise InputError(f"layer {number}: {name} is {value}; allowed: {_MAX_KERNEL}")
    if isinstance(layers[0], CustomBackbone):
        layers = (replace(layers[0], module=nn.Identity()), *layers[1:])
        state = {k: v for k, v in state.items() if not k.startswith("network.body.0.")}
    num_nodes, anchors = len(hparams["tree"]), hparams.get("anchors_wh_cell")
    network: nn.Module
    with torch.device("meta"):  # tensors without data
        if anchors is None:
            network = Classifier(layers, num_nodes)
        else:
            network = YOLOv2(layers, num_nodes, torch.empty(len(anchors), 2))
    expected = {f"network.{name}": value for name, value in network.state_dict().items()}
    actual = {name: value for name, value in state.items() if name.startswith("network.")}
    for name in expected | actual:
        found = _describe(actual.get(name), "missing")
        described = _describe(expected.get(name), "no such tensor")
        if described != found:
            raise InputError(
                f"{name} is {found}, but its hyper-parameters describe {described}: "
                "not a checkpoint of this version"
            )
    if sum(value.nbytes for value in actual.values()) > file_size:
        raise InputError(f"weights that share their data, in a file of {file_size:,} bytes")


def _custom_channels(state: dict[str, Tensor]) -> int:
    """Return the input channels of the first convolution after layer 0, the custom backbone."""
    names = ("body.1.conv", "box_conv", "class_conv")
    weights = (state.get(f"network.{name}.weight") for name in names)
    return next((weight.shape[1] for weight in weights if weight is not None), 1)


def _describe(tensor: Tensor | None, missing: str) -> str:
    """Return kind and shape of a tensor; floating-point types are converted to float32."""
    if tensor is None:
        return missing
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)}"


def first_difference(first: Any, second: Any, in_first: str, in_second: str) -> str:
    """Describe the first difference of two lists, or that of two values."""
    if not isinstance(first, list | tuple):
        return f"{first} in {in_first}, {second} in {in_second}"
    if len(first) != len(second):
        return f"{len(first)} entries in {in_first}, {len(second)} in {in_second}"
    number = next(k for k, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1])
    return f"entry {number + 1} is {first[number]} in {in_first}, {second[number]} in {in_second}"
