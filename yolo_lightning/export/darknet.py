"""Convert Darknet's files to LightningModules and back."""

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
from yolo_lightning.darknet.cfg_writer import to_sections
from yolo_lightning.darknet.config import (
    NetworkDescription,
    Region,
    find_referenced_file,
    parse_network,
)
from yolo_lightning.darknet.files import (
    Section,
    darknet_order,
    read_cfg,
    read_data,
    read_names,
    read_tree,
    write_cfg,
    write_names,
    write_tree,
)
from yolo_lightning.darknet.released import released_network
from yolo_lightning.darknet.weights import (
    Weights,
    WeightsReader,
    conv_blocks,
    conv_tensors,
    read_weights,
    write_weights,
)
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.losses import LossSettings
from yolo_lightning.models.layers import Conv, layer_outputs, layers_to_rows
from yolo_lightning.tree.wordtree import WordTree


def import_model(
    description: NetworkDescription, weights_path: str | Path, tree: WordTree
) -> tuple[DetectorModule | ClassifierModule, dict[str, Any], list[str]]:
    """Import a network; return the module, metadata for its checkpoint, and notes for the user.

    Partial weights must end between two layers.

    Raises:
        InputError: too few or too many weights; names the byte.
    """
    weights = read_weights(weights_path)
    sizes = layer_sizes(description)
    total = sum(size for _, size in sizes)
    count = len(weights.values)
    if count > total:
        raise InputError(
            f"{weights.path}, byte {weights.header_bytes + 4 * total}: {count - total} values "
            f"after the last layer; expected {total} in total, found {count}"
        )
    notes, num_filled = [], len(sizes)
    if count < total:
        num_filled = _count_filled_layers(weights, sizes)
        notes.append(f"partial weights: {sizes[num_filled][0]} and later layers are initialised")
    module = _build_module(description, tree)
    reader = WeightsReader(weights)
    for _, block in conv_blocks(module.network.body):
        if reader.remaining:
            reader.fill(block)
    if reader.remaining:
        fill_last_conv(module.network, reader)
    metadata: dict[str, Any] = {
        "images_seen": weights.images_seen,
        "options": description.options,
    }
    if num_filled < len(sizes):
        metadata["first_missing_layer"] = int(sizes[num_filled][0].removeprefix("layer "))
    elif isinstance(module, DetectorModule):
        module.boxed.fill_(True)
    return module.eval(), metadata, notes


def _count_filled_layers(weights: Weights, sizes: Sequence[tuple[str, int]]) -> int:
    count, start = len(weights.values), 0
    for number, (name, size) in enumerate(sizes):
        if count < start + size:
            if count > start or not start:
                raise InputError(
                    f"{weights.path}, byte {weights.header_bytes + 4 * start}: {name} has "
                    f"{size} values, found {count - start}; the network has "
                    f"{sum(n for _, n in sizes)}: the file is truncated, or of another network"
                )
            return number
        start += size
    raise AssertionError("the weights are complete")


def layer_sizes(description: NetworkDescription) -> list[tuple[str, int]]:
    """Return name and number of weights of each convolution, in the order of the file."""
    channels, sizes = 3, []
    for number, (layer, output) in enumerate(
        zip(description.layers, layer_outputs(description.layers), strict=True)
    ):
        if isinstance(layer, Conv):
            per_filter = channels * layer.size**2 + (4 if layer.batch_norm else 1)
            sizes.append((f"layer {number}", layer.filters * per_filter))
        channels = output.channels
    return [*sizes, (f"layer {len(description.layers)}", description.outputs * (channels + 1))]


def _build_module(
    description: NetworkDescription, tree: WordTree
) -> DetectorModule | ClassifierModule:
    size: int | list[int] = list(description.size_hw)
    if description.size_hw[0] == description.size_hw[1]:
        size = description.size_hw[0]
    backbone, rows = layers_to_rows(description.layers), [tuple(row) for row in tree.rows]
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


def load_classes(
    description: NetworkDescription,
    names_path: str | Path | None,
    tree_path: str | Path | None,
    keys_path: str | Path | None,
) -> WordTree:
    """Return the classes of a network; a tree file is required if they form a tree.

    Default names are those of a released network, or numbers; default keys are the names.

    Raises:
        InputError: a missing or invalid file, or another number of classes.
    """
    names = read_names(names_path) if names_path else None
    if description.needs_tree and tree_path is None:
        missing = f"; {description.tree_file!r} not found" if description.tree_file else ""
        raise InputError(f"the classes of this network form a tree{missing}: use --tree FILE")
    if tree_path is not None:
        return read_tree(tree_path, names, description.classes)
    if names is None:
        names = list(description.names) or [f"class {k}" for k in range(description.classes)]
    else:
        names = _class_lines(description, names, names_path)
    if keys_path is not None:
        keys = _class_lines(description, read_names(keys_path), keys_path)
    else:
        counts = Counter(names)
        # names need not be unique (two kinds of crane), but keys must be
        keys = [n if counts[n] == 1 else f"{n} #{k}" for k, n in enumerate(names)]
    return WordTree(
        [(key, "-", name) for key, name in zip(keys, names, strict=True)], str(keys_path)
    )


def _class_lines(
    description: NetworkDescription, lines: list[str], path: str | Path | None
) -> list[str]:
    """Return one line per class; lists of a classifier may be longer, as ImageNet's is."""
    count, num_lines = description.classes, len(lines)
    if num_lines < count or (num_lines > count and description.region is not None):
        raise InputError(f"{path}: {num_lines} lines, but the network has {count} classes")
    if num_lines > count:
        print(f"{path}: {num_lines} lines; using the first {count}")
    return lines[:count]


def build_checkpoint(
    module: DetectorModule | ClassifierModule, metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return a checkpoint without the state that only resuming needs."""
    checkpoint: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": lightning.__version__,
        "epoch": 0,
        "global_step": 0,
        "darknet": metadata,
    }
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def describe_network(
    module: DetectorModule | ClassifierModule, metadata: dict[str, Any]
) -> NetworkDescription:
    """Return the description of a module's network."""
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
    return NetworkDescription(
        module.network.body.layers,
        len(module.tree),
        (size, size) if isinstance(size, int) else (size[0], size[1]),
        region,
        module.tree.names,
        training={name: module.hparams[name] for name in names},
        options=metadata.get("options", {}),
    )


def export_model(
    module: DetectorModule | ClassifierModule,
    metadata: dict[str, Any],
    stem: Path,
    overwrite: bool = False,
) -> list[Path]:
    """Write `.cfg`, `.weights`, `.names` and, for a tree, `.tree`; return the paths.

    Classes are reordered if the order of the tree is invalid in Darknet, see `darknet_order`.

    Raises:
        InputError: an unsupported network or an existing file; nothing is written.
    """
    description = describe_network(module, metadata)
    order = darknet_order(module.tree)
    flat = bool((module.tree.parents < 0).all())
    if not flat:
        description.tree_file = stem.with_name(f"{stem.name}.tree").name
    weight, bias = _reorder_classes(last_conv(module.network), order, description)
    tensors = [t for _, block in conv_blocks(module.network.body) for t in conv_tensors(block)]
    sections: list[Section] = to_sections(description)
    names = [module.tree.names[node] for node in order]
    # all files are written completely before the first one is renamed
    writers: dict[str, Callable[[Path], None]] = {
        ".cfg": lambda path: write_cfg(path, sections),
        ".weights": lambda path: write_weights(
            path, [*tensors, bias, weight], int(metadata.get("images_seen", 0))
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


def _reorder_classes(
    last: tuple[torch.Tensor, torch.Tensor], order: Sequence[int], description: NetworkDescription
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = last
    if description.region is None:
        rows = torch.tensor(order)
    else:
        anchors = len(description.region.anchors) // 2
        offsets = torch.tensor([0, 1, 2, 3, 4, *(5 + node for node in order)])
        rows = (torch.arange(anchors)[:, None] * (5 + len(order)) + offsets).flatten()
    return weight[rows], bias[rows]


@dataclass
class ImportedModel:
    """A model imported from Darknet's files, in evaluation mode, with notes for the user."""

    module: DetectorModule | ClassifierModule
    description: NetworkDescription
    metadata: dict[str, Any]
    notes: list[str]


def import_from_options(options: argparse.Namespace) -> ImportedModel:
    """Import a model from the files in the command line, see `add_darknet_options`."""
    if (options.cfg is None) == (options.layout is None):
        raise InputError("use one of --cfg FILE and --layout NAME")
    description = (
        parse_network(read_cfg(options.cfg), str(options.cfg))
        if options.cfg
        else released_network(options.layout)
    )
    data_paths = read_data(options.data) if options.data else {}
    tree_path = options.tree or data_paths.get("tree")
    if tree_path is None and description.tree_file and options.cfg:
        tree_path = find_referenced_file(description.tree_file, options.cfg)
    names_path = options.names or data_paths.get("names")
    labels_path = options.labels or data_paths.get("labels")
    tree = load_classes(description, names_path, tree_path, labels_path)
    module, metadata, notes = import_model(description, options.weights, tree)
    if tree_path is not None and not description.needs_tree:
        notes.append("the .cfg has no tree: its softmax was over all classes, now over siblings")
    if description.ignored:
        notes.append(f"ignored options: {', '.join(description.ignored)}")
    if not (names_path or tree_path or description.names):
        notes.append("the classes have numbers as names; use --names FILE")
    return ImportedModel(module, description, metadata, notes)
