"""Loading pretrained weights of Darknet or of a checkpoint, with a report."""

from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from yolo_lightning.checkpoints.validation import is_checkpoint, read_checkpoint
from yolo_lightning.darknet.weights import WeightsReader, conv_blocks, conv_tensors, read_weights
from yolo_lightning.errors import InputError, require_file
from yolo_lightning.models.layers import CustomBackbone
from yolo_lightning.models.networks import Classifier, ConvBlock, YOLOv2
from yolo_lightning.tree.wordtree import WordTree

# dimension of the tree nodes in each tensor of the class predictor
_CLASS_ROWS = {"class_weight": 1, "class_bias": 1, "class_conv.weight": 0, "class_conv.bias": 0}


@dataclass
class PretrainedReport:
    """Which weights were loaded."""

    source: str
    loaded: list[str] = field(default_factory=list)  # parts of the network in the file
    initialized: list[str] = field(default_factory=list)  # parts of the network not in the file
    unused: list[str] = field(default_factory=list)  # parts of the file not in the network
    loaded_values: int = 0
    total_values: int = 0  # of the network

    def __str__(self) -> str:
        """Format the report as lines of text."""
        lines = [f"pretrained: {self.source}"]
        share = f"{self.loaded_values:,} of the network's {self.total_values:,} values"
        for title, parts in (
            ("loaded", [share, *self.loaded]),
            ("initialized", self.initialized or ["nothing"]),
            ("unused", self.unused or ["nothing"]),
        ):
            lines.append(f"  {title:<13}{'; '.join(parts)}")
        return "\n".join(lines)


def load_pretrained(
    network: YOLOv2 | Classifier, tree: WordTree, path: str | Path, num_backbone_layers: int
) -> PretrainedReport:
    """Load all weights of a file that fit a network.

    Layers are loaded in order up to the first one that differs. If all layers are loaded, the rows
    of the class predictor are loaded by node key, also from a different tree.

    Args:
        network: modified in place.
        tree: of the network.
        path: a Darknet `.weights` file or a checkpoint; averaged weights are preferred.
        num_backbone_layers: number of layers of the backbone.

    Raises:
        InputError: the file does not exist, or nothing in it fits.
    """
    require_file(path, "model.pretrained", "null starts from random weights")
    total = sum(tensor.numel() for tensor in _weights(network.state_dict()).values())
    report = PretrainedReport(str(path), total_values=total)
    if is_checkpoint(path):
        _from_checkpoint(network, tree, path, report)
    else:
        _from_darknet(network, path, num_backbone_layers, report)
    if not report.loaded_values:
        raise InputError(f"model.pretrained {str(path)!r}: nothing in it fits; {report}")
    return report


def _weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != "anchors_wh_cell" and v.is_floating_point()}


@torch.no_grad()
def _from_checkpoint(
    network: YOLOv2 | Classifier, tree: WordTree, path: str | Path, report: PretrainedReport
) -> None:
    checkpoint = read_checkpoint(path)
    # a checkpoint that was imported from partial weights has no trained layers from there on
    first_missing = checkpoint.get("darknet", {}).get("first_missing_layer", 10**6)
    state, prefix = checkpoint["state_dict"], "network."
    saved = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    saved = {k: v for k, v in saved.items() if _layer_of(k) < first_missing}
    target = _weights(network.state_dict())

    def fits(names: list[str]) -> bool:
        return all(name in saved and saved[name].shape == target[name].shape for name in names)

    layers: dict[int, list[str]] = {}
    for name in target:
        if name.startswith("body."):
            layers.setdefault(_layer_of(name), []).append(name)
    numbers = sorted(layers)
    loaded = list(takewhile(lambda number: fits(layers[number]), numbers))
    if not loaded:
        _check_batch_norm(target, saved, path)
    _report_layers(report, loaded, numbers[len(loaded) :])
    used = [name for number in loaded for name in layers[number]]
    is_complete = loaded == numbers
    if isinstance(network, YOLOv2):
        boxes = ["box_conv.weight", "box_conv.bias"]
        boxes_fit = (
            is_complete
            and fits(boxes)
            and checkpoint["hyper_parameters"]["location"] == network.location
        )
        used += boxes if boxes_fit else []
        (report.loaded if boxes_fit else report.initialized).append("boxes and objectness")
    for name in used:
        target[name].copy_(saved[name])
        report.loaded_values += target[name].numel()
    saved_tree = WordTree.from_source(checkpoint["hyper_parameters"]["tree"])
    if is_complete and _copy_class_rows(target, saved, tree, saved_tree, report):
        used += _CLASS_ROWS
    else:
        report.initialized.append(f"all {len(tree)} classes")
    unused = [name for name in _weights(saved) if name not in used]
    if unused:
        values = sum(saved[name].numel() for name in unused)
        report.unused.append(f"{values:,} values: {', '.join(_layer_names(unused))}")


def _check_batch_norm(
    target: dict[str, Tensor], saved: dict[str, Tensor], path: str | Path
) -> None:
    """Raise `InputError` if the first layers differ in batch norm alone."""
    weight, norm = "body.0.conv.weight", "body.0.norm.weight"
    same = weight in target and weight in saved and target[weight].shape == saved[weight].shape
    if same and (norm in target) != (norm in saved):
        without, other = ("checkpoint", "network") if norm in target else ("network", "checkpoint")
        value = str(norm in target).lower()
        raise InputError(
            f"model.pretrained {str(path)!r}: the {without} has no batch norm, the {other} has; "
            f"model.batch_norm is {value}"
        )


def _layer_of(name: str) -> int:
    """Return the layer number of a tensor; the last convolution has a large one."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "body" else 10**6 - 1


def _copy_class_rows(
    target: dict[str, Tensor],
    saved: dict[str, Tensor],
    tree: WordTree,
    saved_tree: WordTree,
    report: PretrainedReport,
) -> bool:
    """Copy the rows of the classes that both trees have; return whether there are any."""
    index = {key: number for number, key in enumerate(saved_tree.keys)}
    pairs = [(node, index[key]) for node, key in enumerate(tree.keys) if key in index]
    rows, saved_rows = _class_rows(target), _class_rows(saved)
    shapes, saved_shapes = (
        {name: values.shape[1:] for name, values in one.items()} for one in (rows, saved_rows)
    )
    if not pairs or shapes != saved_shapes:
        return False
    targets, sources = (torch.tensor(side) for side in zip(*pairs, strict=True))
    for name, values in saved_rows.items():
        rows[name][targets] = values[sources].to(rows[name].dtype)
        report.loaded_values += values[sources].numel()
    report.loaded.append(f"{len(pairs)} of {len(tree)} classes, by key")
    added = [key for key in tree.keys if key not in index]
    if added:
        report.initialized.append(f"{len(added)} classes ({_first_keys(added)})")
    removed = sorted(index.keys() - set(tree.keys), key=index.__getitem__)
    if removed:
        report.unused.append(f"{len(removed)} classes ({_first_keys(removed)})")
    return True


def _class_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return views of the tensors of the class predictor, with the nodes as first dimension."""
    return {
        name: weights[name].movedim(dim, 0) for name, dim in _CLASS_ROWS.items() if name in weights
    }


def _from_darknet(
    network: YOLOv2 | Classifier,
    path: str | Path,
    num_backbone_layers: int,
    report: PretrainedReport,
) -> None:
    """Load the layers that the length of the file implies, as it does not list them."""
    # it may contain the whole network, the first layers, or the body or backbone followed by
    # another 1x1 convolution to classes (and boxes)
    if isinstance(network.body.layers[0], CustomBackbone):
        raise InputError(
            f"model.pretrained {path}: Darknet weights cannot be loaded into a custom backbone"
        )
    weights = read_weights(path)
    blocks = conv_blocks(network.body)
    backbone = [(k, block) for k, block in blocks if k < num_backbone_layers]
    last = last_conv(network)
    ends = np.cumsum([_size(block) for _, block in blocks]).tolist()
    count = len(weights.values)
    parts = [blocks[: ends.index(count) + 1]] if count in ends else []
    for part in (*parts, blocks, backbone):
        wanted = sum(_size(block) for _, block in part)
        rest = len(weights.values) - wanted
        whole = len(part) == len(blocks) and rest == sum(t.numel() for t in last)
        width = part[-1][1].conv.out_channels
        if whole or (rest >= 0 and rest % (width + 1) == 0):
            break
    else:
        named = {"its body": blocks, "its backbone": backbone}
        without = "; the network has no batch norm (model.batch_norm: false)"
        cause = "" if blocks[0][1].norm else without
        sizes = [f"{name} {sum(_size(b) for _, b in p):,}" for name, p in named.items()]
        raise InputError(
            f"model.pretrained {path}: {len(weights.values):,} values; the network has "
            f"{sum(_size(b) for _, b in blocks) + sum(t.numel() for t in last):,}, "
            f"{', '.join(sizes)}, and the values after those are no 1x1 convolution; for another "
            f"network, use `yolo-lightning darknet import` with its .cfg file{cause}"
        )
    reader = WeightsReader(weights)
    for _, block in part:
        reader.fill(block)
    if whole:
        fill_last_conv(network, reader)
    report.loaded_values = reader.position
    _report_layers(report, [k for k, _ in part], [k for k, _ in blocks[len(part) :]])
    rest_name = "classes" if isinstance(network, Classifier) else "boxes, objectness and classes"
    (report.loaded if whole else report.initialized).append(rest_name)
    if reader.remaining:
        outputs = reader.remaining // (width + 1)
        report.unused.append(
            f"{reader.remaining:,} values: a 1x1 convolution from {width} to {outputs} channels"
        )


def last_conv(network: YOLOv2 | Classifier) -> tuple[Tensor, Tensor]:
    """Return weight (N, C, 1, 1) and bias (N,) of the last 1x1 convolution in Darknet's order.

    For each anchor: x, y, w, h, objectness, classes.
    """
    if isinstance(network, Classifier):
        assert network.class_conv.bias is not None
        return network.class_conv.weight, network.class_conv.bias
    anchors = len(network.class_weight)
    assert network.box_conv.bias is not None
    boxes = network.box_conv.weight.flatten(1).unflatten(0, (anchors, 5))
    weight = torch.cat([boxes, network.class_weight], dim=1).flatten(0, 1)
    box_bias = network.box_conv.bias.unflatten(0, (anchors, 5))
    return weight[:, :, None, None], torch.cat([box_bias, network.class_bias], dim=1).flatten()


@torch.no_grad()
def fill_last_conv(network: YOLOv2 | Classifier, reader: WeightsReader) -> None:
    """Load the last 1x1 convolution from a `.weights` file: bias, then weight."""
    weight, bias = (t.shape for t in last_conv(network))
    new_bias = reader.take(bias)
    new_weight = reader.take(weight)
    if isinstance(network, Classifier):
        assert network.class_conv.bias is not None
        network.class_conv.bias.copy_(new_bias)
        network.class_conv.weight.copy_(new_weight)
        return
    anchors = len(network.class_weight)
    rows = new_weight.flatten(1).unflatten(0, (anchors, -1))
    biases = new_bias.unflatten(0, (anchors, -1))
    assert network.box_conv.bias is not None
    network.box_conv.weight.copy_(rows[:, :5].flatten(0, 1)[:, :, None, None])
    network.box_conv.bias.copy_(biases[:, :5].flatten())
    network.class_weight.copy_(rows[:, 5:])
    network.class_bias.copy_(biases[:, 5:])


def _size(block: ConvBlock) -> int:
    return sum(tensor.numel() for tensor in conv_tensors(block))


def _report_layers(report: PretrainedReport, loaded: list[int], initialized: list[int]) -> None:
    if loaded:
        report.loaded.append(f"layers {loaded[0]} … {loaded[-1]}")
    if initialized:
        report.initialized.append(f"layers {initialized[0]} … {initialized[-1]}")


def _layer_names(names: list[str]) -> list[str]:
    return list(
        dict.fromkeys(
            f"layer {name.split('.')[1]}" if name.startswith("body.") else name for name in names
        )
    )


def _first_keys(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (", …" if len(keys) > 5 else "")
