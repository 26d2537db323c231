"""Conversion between Darknet's files and LightningModules."""

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch

from yolo_lightning.checkpoints.pretrained import fill_last_conv, last_conv
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.darknet.config import (
    Description,
    Region,
    describe,
    find_beside,
    layout,
    to_sections,
)
from yolo_lightning.darknet.files import (
    Section,
    Weights,
    WeightsReader,
    blocks_of,
    darknet_order,
    read_cfg,
    read_data,
    read_names,
    read_tree,
    read_weights,
    tensors_of,
    write_cfg,
    write_names,
    write_tree,
    write_weights,
)
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.losses import LossSettings
from yolo_lightning.models.layers import Conv, extents, to_plain
from yolo_lightning.tree.wordtree import WordTree


def import_model(
    description: Description, weights_path: str | Path, tree: WordTree
) -> tuple[DetectorModule | ClassifierModule, dict[str, Any], list[str]]:
    """Return the module that Darknet's files hold, what its checkpoint says beside, and notes.

    Args:
        description: of the network.
        weights_path: of the `.weights` file; one that ends between two layers fills those before.
        tree: of the classes.

    Raises:
        InputError: weights that are too few or too many; names the byte. Nothing is built then.
    """
    weights = read_weights(weights_path)
    shapes = _shapes(description)
    total = sum(count for _, count in shapes)
    found = len(weights.values)
    if found > total:
        raise InputError(
            f"{weights.path}, byte {weights.header_bytes + 4 * total}: {found - total} values "
            f"after the last layer; expected {total} in all, found {found}"
        )
    notes, filled = [], len(shapes)
    if found < total:
        filled = _filled_layers(weights, shapes)
        notes.append(f"partial weights: {shapes[filled][0]} and all that follows is fresh")
    module = _build(description, tree)
    reader = WeightsReader(weights)
    for _, block in blocks_of(module.network.body):
        if reader.remaining:
            reader.fill(block)
    if reader.remaining:
        fill_last_conv(module.network, reader)
    beside: dict[str, Any] = {
        "images_seen": weights.images_seen,
        "options": description.options,
    }
    if filled < len(shapes):
        beside["fresh_from"] = int(shapes[filled][0].removeprefix("layer "))
    elif isinstance(module, DetectorModule):
        module.boxed.fill_(True)
    return module.eval(), beside, notes


def _filled_layers(weights: Weights, shapes: Sequence[tuple[str, int]]) -> int:
    """Return how many convolutions partial weights fill; they end between two layers."""
    found, start = len(weights.values), 0
    for number, (name, count) in enumerate(shapes):
        if found < start + count:
            if found > start or not start:
                raise InputError(
                    f"{weights.path}, byte {weights.header_bytes + 4 * start}: {name} takes "
                    f"{count} values, found {found - start}; the network has "
                    f"{sum(n for _, n in shapes)}: the file is truncated, or of another network"
                )
            return number
        start += count
    raise AssertionError("nothing is missing")


def _shapes(description: Description) -> list[tuple[str, int]]:
    """Return what each layer takes from a `.weights` file: name and number of values."""
    channels, shapes = 3, []
    for number, (layer, extent) in enumerate(
        zip(description.layers, extents(description.layers), strict=True)
    ):
        if isinstance(layer, Conv):
            each = channels * layer.size**2 + (4 if layer.batch_norm else 1)
            shapes.append((f"layer {number}", layer.filters * each))
        channels = extent.channels
    outputs = description.outputs
    return [*shapes, (f"layer {len(description.layers)}", outputs * (channels + 1))]


def _build(description: Description, tree: WordTree) -> DetectorModule | ClassifierModule:
    """Return a module of this architecture."""
    size: int | list[int] = list(description.size_hw)
    if description.size_hw[0] == description.size_hw[1]:
        size = description.size_hw[0]
    backbone, rows = to_plain(description.layers), [tuple(row) for row in tree.rows]
    region = description.region
    if region is None:
        return ClassifierModule(
            rows,  # type: ignore[arg-type]
            backbone,
            image_size=size,
            **description.training,  # type: ignore[arg-type]
        )
    pairs = list(zip(region.anchors[::2], region.anchors[1::2], strict=True))
    return DetectorModule(
        rows,  # type: ignore[arg-type]
        pairs,
        backbone,
        head_channels=0,
        passthrough_channels=0,
        image_size=size,
        loss=LossSettings(
            coord_scale=region.coord_scale,
            obj_scale=region.object_scale,
            noobj_scale=region.noobject_scale,
            class_scale=region.class_scale,
            ignore_iou=region.thresh,
            rescore=region.rescore,
        ),
        **description.training,  # type: ignore[arg-type]
    )


def tree_for(
    description: Description,
    names_path: str | Path | None,
    tree_path: str | Path | None,
    keys_path: str | Path | None,
) -> WordTree:
    """Return the classes of a network.

    Args:
        description: of the network.
        names_path: a name a line; those of a built-in layout, or numbers, where None.
        tree_path: needed where the classes form a tree.
        keys_path: a unique key a line, such as a wnid; names are keys where None.

    Raises:
        InputError: a file that is missing, malformed, or of another number of classes.
    """
    names = read_names(names_path) if names_path else None
    if description.needs_tree and tree_path is None:
        place = f"; {description.tree_file!r} is not here" if description.tree_file else ""
        raise InputError(f"the classes of this network form a tree{place}: name its file by --tree")
    if tree_path is not None:
        return read_tree(tree_path, names, description.classes)
    if names is None:
        names = list(description.names) or [f"class {k}" for k in range(description.classes)]
    else:
        names = _lines_for(description, names, names_path)
    if keys_path is not None:
        keys = _lines_for(description, read_names(keys_path), keys_path)
    else:
        counts = Counter(names)
        # names may recur (two kinds of crane); keys may not
        keys = [n if counts[n] == 1 else f"{n} #{k}" for k, n in enumerate(names)]
    return WordTree(
        [(key, "-", name) for key, name in zip(keys, names, strict=True)], str(keys_path)
    )


def _lines_for(description: Description, lines: list[str], path: str | Path | None) -> list[str]:
    """Return a line a class; a classifier's list may go on, since ImageNet's does."""
    count, found = description.classes, len(lines)
    if found < count or (found > count and description.region is not None):
        raise InputError(f"{path}: {found} lines, yet the network has {count} classes")
    if found > count:
        print(f"{path}: {found} lines; the first {count} name the classes")
    return lines[:count]


def checkpoint_of(
    module: DetectorModule | ClassifierModule, beside: dict[str, Any]
) -> dict[str, Any]:
    """Return a checkpoint as training writes it, without what only a resume needs."""
    checkpoint: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
        "darknet": beside,
    }
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def describe_module(
    module: DetectorModule | ClassifierModule, beside: dict[str, Any]
) -> Description:
    """Return the description of a module, trained or imported."""
    size = module.hparams["image_size"]
    region = None
    if isinstance(module, DetectorModule):
        loss = module.loss
        region = Region(
            tuple(float(v) for pair in module.hparams["anchors_wh_cell"] for v in pair),
            loss.rescore,
            loss.ignore_iou,
            loss.obj_scale,
            loss.noobj_scale,
            loss.class_scale,
            loss.coord_scale,
        )
    names = ("learning_rate", "momentum", "weight_decay")
    return Description(
        module.network.body.layers,
        len(module.tree),
        (size, size) if isinstance(size, int) else (size[0], size[1]),
        region,
        module.tree.names,
        training={name: module.hparams[name] for name in names},
        options=beside.get("options", {}),
    )


def export_model(
    module: DetectorModule | ClassifierModule,
    beside: dict[str, Any],
    stem: Path,
    overwrite: bool = False,
) -> list[Path]:
    """Write `.cfg`, `.weights`, `.names` and, for a tree, `.tree`; return what was written.

    Class rows follow the order of the `.tree` file, parents first and siblings together, where
    the model's own differs.

    Raises:
        InputError: something that Darknet has no word for, or a file that exists already; nothing
            is written then.
    """
    description = describe_module(module, beside)
    order = darknet_order(module.tree)
    flat = bool((module.tree.parents < 0).all())
    if not flat:
        description.tree_file = stem.with_name(f"{stem.name}.tree").name
    weight, bias = _in_order(last_conv(module.network), order, description)
    tensors = [t for _, block in blocks_of(module.network.body) for t in tensors_of(block)]
    sections: list[Section] = to_sections(description)
    names = [module.tree.names[node] for node in order]
    # one file each; all are complete before the first one gets its name
    writers: dict[str, Callable[[Path], None]] = {
        ".cfg": lambda path: write_cfg(path, sections),
        ".weights": lambda path: write_weights(
            path, [*tensors, bias, weight], int(beside.get("images_seen", 0))
        ),
        ".names": lambda path: write_names(path, names),
    }
    if flat:
        keys = [module.tree.keys[node] for node in order]
        if keys != names:
            writers[".labels"] = lambda path: write_names(path, keys)
    else:
        writers[".tree"] = lambda path: write_tree(path, module.tree, order)
    existing = [path for path in (stem.with_name(stem.name + x) for x in writers) if path.exists()]
    if existing and not overwrite:
        raise InputError(f"{existing[0]} exists; --overwrite replaces it")
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory(dir=stem.parent) as folder:
        for suffix, write in writers.items():
            write(Path(folder) / f"new{suffix}")
        for suffix in writers:
            target = stem.with_name(stem.name + suffix)
            os.replace(Path(folder) / f"new{suffix}", target)
            written.append(target)
    return written


def _in_order(
    last: tuple[torch.Tensor, torch.Tensor], order: Sequence[int], description: Description
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last convolution with its class rows in this order."""
    weight, bias = last
    if description.region is None:
        rows = torch.tensor(order)
    else:
        anchors = len(description.region.anchors) // 2
        each = torch.tensor([0, 1, 2, 3, 4, *(5 + node for node in order)])
        rows = (torch.arange(anchors)[:, None] * (5 + len(order)) + each).flatten()
    return weight[rows], bias[rows]


@dataclass
class Imported:
    """What Darknet's files hold.

    Attributes:
        module: in evaluation mode.
        description: of the network.
        beside: what its checkpoint says beside.
        notes: what is worth telling, a sentence each.
    """

    module: DetectorModule | ClassifierModule
    description: Description
    beside: dict[str, Any]
    notes: list[str]


def module_of(options: argparse.Namespace) -> Imported:
    """Return what the files hold that `add_options` lets a command line name.

    Raises:
        InputError: whatever is wrong with a file.
    """
    if (options.cfg is None) == (options.layout is None):
        raise InputError("name one of --cfg FILE and --layout NAME")
    description = (
        describe(read_cfg(options.cfg), str(options.cfg)) if options.cfg else layout(options.layout)
    )
    given = read_data(options.data) if options.data else {}
    tree_path = options.tree or given.get("tree")
    if tree_path is None and description.tree_file and options.cfg:
        tree_path = find_beside(description.tree_file, options.cfg)
    names_path = options.names or given.get("names")
    labels_path = options.labels or given.get("labels")
    tree = tree_for(description, names_path, tree_path, labels_path)
    module, beside, notes = import_model(description, options.weights, tree)
    if tree_path is not None and not description.needs_tree:
        notes.append("the .cfg names no tree: its softmax was over all classes, now over siblings")
    if description.left_out:
        notes.append(f"not used here: {', '.join(description.left_out)}")
    if not (names_path or tree_path or description.names):
        notes.append("classes are numbered; --names gives them names")
    return Imported(module, description, beside, notes)
