"""Starting from weights: Darknet's or a checkpoint's, with a report of what went where."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from yolo_lightning.checkpoints.validation import is_checkpoint, read_checkpoint
from yolo_lightning.darknet.files import WeightsReader, blocks_of, read_weights, tensors_of
from yolo_lightning.errors import InputError
from yolo_lightning.models.networks import Classifier, ConvBlock, YOLOv2
from yolo_lightning.tree.wordtree import WordTree

_CLASS_ROWS = {"class_weight": 1, "class_bias": 1, "class_conv.weight": 0, "class_conv.bias": 0}
"""Along which dimension a tensor holds a row a node."""


@dataclass
class Report:
    """What became of pretrained weights.

    Attributes:
        source: the file.
        loaded, fresh, left_over: parts of the network, and of the file, a phrase each.
        loaded_values, values: numbers that the network took from the file, and has.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    loaded_values: int = 0
    values: int = 0

    def __str__(self) -> str:
        """Return a few lines for a person."""
        lines = [f"pretrained: {self.source}"]
        share = f"{self.loaded_values:,} of the network's {self.values:,} values"
        for title, parts in (
            ("loaded", [share, *self.loaded]),
            ("fresh", self.fresh or ["nothing"]),
            ("left over", self.left_over or ["nothing"]),
        ):
            lines.append(f"  {title:<11}{'; '.join(parts)}")
        return "\n".join(lines)


def load_pretrained(
    network: YOLOv2 | Classifier, tree: WordTree, path: str | Path, backbone_length: int
) -> Report:
    """Fill a network with whatever of a file fits it.

    Layers are taken from the image on, up to the first one that differs. Class rows are taken by
    node key, so that what is known of a class outlives a new tree; they need every layer before
    them.

    Args:
        network: filled in place.
        tree: of the network.
        path: a Darknet `.weights` file, or one of our checkpoints; of a run that averaged its
            weights, the averaged ones.
        backbone_length: how many of the network's layers are its backbone.

    Raises:
        InputError: no such file, or nothing in it fits.
    """
    if not Path(path).expanduser().is_file():
        raise InputError(
            f"model.pretrained {str(path)!r} not found (working folder: {Path.cwd()}); "
            "null starts from random weights"
        )
    report = Report(str(path), values=sum(t.numel() for t in _learned(network).values()))
    if is_checkpoint(path):
        _from_checkpoint(network, tree, path, report)
    else:
        _from_darknet(network, path, backbone_length, report)
    if not report.loaded_values:
        raise InputError(f"model.pretrained {str(path)!r}: nothing in it fits; {report}")
    return report


def _learned(network: nn.Module) -> dict[str, Tensor]:
    """Return what a network learns, running statistics included."""
    state = network.state_dict()
    return {k: v for k, v in state.items() if k != "anchors_wh_cell" and v.is_floating_point()}


@torch.no_grad()
def _from_checkpoint(
    network: YOLOv2 | Classifier, tree: WordTree, path: str | Path, report: Report
) -> None:
    checkpoint = read_checkpoint(path)
    prefix = "network."
    theirs = {
        k.removeprefix(prefix): v
        for k, v in checkpoint["state_dict"].items()
        if k.startswith(prefix)
    }
    own = _learned(network)
    taken: set[str] = set()

    def take(names: Iterable[str]) -> None:
        for name in names:
            own[name].copy_(theirs[name])
            taken.add(name)
            report.loaded_values += own[name].numel()

    loaded: list[int] = []
    fresh: list[int] = []
    # a checkpoint that was imported from partial weights holds nothing learned from there on
    filled = checkpoint.get("darknet", {}).get("fresh_from", 10**6)
    theirs = {name: value for name, value in theirs.items() if _layer_of(name) < filled}
    for number, _ in blocks_of(network.body):
        names = [name for name in own if name.startswith(f"body.{number}.")]
        if not fresh and all(n in theirs and theirs[n].shape == own[n].shape for n in names):
            take(names)
            loaded.append(number)
        else:
            fresh.append(number)
    _say_layers(report, loaded, fresh)
    if isinstance(network, YOLOv2):
        boxes = ["box_conv.weight", "box_conv.bias"]
        fits = all(name in theirs and theirs[name].shape == own[name].shape for name in boxes)
        if fits and not fresh:
            take(boxes)
            report.loaded.append("boxes and objectness")
        else:
            report.fresh.append("boxes and objectness")
    their_tree = WordTree.of(checkpoint["hyper_parameters"]["tree"])
    rows = [name for name in own if name in _CLASS_ROWS]
    taken |= _take_rows(own, theirs, rows, tree, their_tree, bool(fresh), report)
    unused = [
        name
        for name, value in theirs.items()
        if name not in taken and name != "anchors_wh_cell" and value.is_floating_point()
    ]
    if unused:
        values = sum(theirs[name].numel() for name in unused)
        report.left_over.append(f"{values:,} values: {', '.join(_parts(unused))}")


def _layer_of(name: str) -> int:
    """Return the number of the layer that a tensor belongs to; the last convolution comes last."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "body" else 10**6 - 1


def _take_rows(
    own: dict[str, Tensor],
    theirs: dict[str, Tensor],
    names: list[str],
    tree: WordTree,
    their_tree: WordTree,
    broken: bool,
    report: Report,
) -> set[str]:
    """Carry class rows over by node key."""
    index = {key: number for number, key in enumerate(their_tree.keys)}
    pairs = [(node, index[key]) for node, key in enumerate(tree.keys) if key in index]
    fits = all(
        name in theirs
        and theirs[name].movedim(_CLASS_ROWS[name], 0).shape[1:]
        == own[name].movedim(_CLASS_ROWS[name], 0).shape[1:]
        for name in names
    )
    if broken or not fits or not pairs:
        report.fresh.append(f"all {len(tree)} classes")
        return set()
    to, source = (torch.tensor(side) for side in zip(*pairs, strict=True))
    for name in names:
        rows = own[name].movedim(_CLASS_ROWS[name], 0)
        picked = theirs[name].movedim(_CLASS_ROWS[name], 0)[source]
        rows[to] = picked
        report.loaded_values += picked.numel()
    report.loaded.append(f"{len(pairs)} of {len(tree)} classes, by key")
    known = set(index)
    new = [key for key in tree.keys if key not in known]
    if new:
        report.fresh.append(f"{len(new)} classes ({_some(new)})")
    own_keys = set(tree.keys)
    gone = [key for key in their_tree.keys if key not in own_keys]
    if gone:
        report.left_over.append(f"{len(gone)} classes ({_some(gone)})")
    return set(names)


def _from_darknet(
    network: YOLOv2 | Classifier, path: str | Path, backbone_length: int, report: Report
) -> None:
    """Fill as much as the file's length proves to be there.

    A file says nothing about its layers. It may hold the whole network, end between two layers, or
    hold a body or a backbone and the 1x1 convolution to classes (and boxes) that stood on it.
    """
    weights = read_weights(path)
    blocks = blocks_of(network.body)
    backbone = [(k, block) for k, block in blocks if k < backbone_length]
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
        sizes = [f"{name} {sum(_size(b) for _, b in p):,}" for name, p in named.items()]
        raise InputError(
            f"model.pretrained {path}: {len(weights.values):,} values; the network has "
            f"{sum(_size(b) for _, b in blocks) + sum(t.numel() for t in last):,}, "
            f"{', '.join(sizes)}, and what follows those is no 1x1 convolution; for another "
            "network, `yolo-lightning darknet import` takes its .cfg"
        )
    reader = WeightsReader(weights)
    for _, block in part:
        reader.fill(block)
    if whole:
        fill_last_conv(network, reader)
    report.loaded_values = reader.position
    _say_layers(report, [k for k, _ in part], [k for k, _ in blocks[len(part) :]])
    rest_name = "classes" if isinstance(network, Classifier) else "boxes, objectness and classes"
    (report.loaded if whole else report.fresh).append(rest_name)
    if reader.remaining:
        outputs = reader.remaining // (width + 1)
        report.left_over.append(
            f"{reader.remaining:,} values: a 1x1 convolution from {width} to {outputs} channels"
        )


def last_conv(network: YOLOv2 | Classifier) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the last 1x1 convolution as Darknet has them, (N, C, 1, 1), (N,).

    Anchor by anchor: x, y, w, h, objectness, classes.
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
    """Fill the last 1x1 convolution from a `.weights` file: bias, then kernels."""
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
    return sum(tensor.numel() for tensor in tensors_of(block))


def _say_layers(report: Report, loaded: list[int], fresh: list[int]) -> None:
    if loaded:
        report.loaded.append(f"layers {loaded[0]} … {loaded[-1]}")
    if fresh:
        report.fresh.append(f"layers {fresh[0]} … {fresh[-1]}")


def _parts(names: list[str]) -> list[str]:
    """Return the parts of a network that tensors belong to."""
    return list(
        dict.fromkeys(
            f"layer {name.split('.')[1]}" if name.startswith("body.") else name for name in names
        )
    )


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (", …" if len(keys) > 5 else "")
