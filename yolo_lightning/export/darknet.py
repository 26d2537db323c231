"""Convert Darknet's files to LightningModules and back."""

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch

from yolo_lightning.checkpoints.pretrained import fill_last_conv, last_conv
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.darknet.cfg_writer import to_sections
from yolo_lightning.darknet.config import (
    TRAINING_OPTIONS,
    NetworkDescription,
    Region,
    parse_network,
)
from yolo_lightning.darknet.files import (
    darknet_order,
    find_referenced_file,
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
from yolo_lightning.models.layers import layers_to_rows
from yolo_lightning.tree.wordtree import WordTree

# settings of the loss, and Darknet's options of the same meaning
_LOSS_NAMES = {
    "coord_scale": "coord_scale",
    "obj_scale": "object_scale",
    "noobj_scale": "noobject_scale",
    "class_scale": "class_scale",
    "ignore_iou": "thresh",
    "rescore": "rescore",
}


class ImportedModel(NamedTuple):
    """A model imported from Darknet's files, in evaluation mode."""

    module: DetectorModule | ClassifierModule
    metadata: dict[str, Any]  # for its checkpoint
    notes: list[str]  # for the user


def import_model(
    description: NetworkDescription, weights_path: str | Path, tree: WordTree
) -> ImportedModel:
    """Import a network.

    Partial weights must end between two layers.

    Raises:
        InputError: too few or too many weights; names the byte.
    """
    weights = read_weights(weights_path)
    module = _build_module(description, tree)
    blocks = conv_blocks(module.network.body)
    first_missing = _first_missing_layer(weights, layer_sizes(module))
    reader = WeightsReader(weights)
    for number, block in blocks:
        if first_missing is None or number < first_missing:
            reader.fill(block)
    metadata: dict[str, Any] = {
        "images_seen": weights.images_seen,
        "options": description.options,
    }
    if first_missing is not None:
        metadata["first_missing_layer"] = first_missing
        notes = [f"partial weights: layer {first_missing} and later layers are initialised"]
        return ImportedModel(module.eval(), metadata, notes)
    fill_last_conv(module.network, reader)
    if isinstance(module, DetectorModule) and module.tree.num_groups == 1:
        # of the classes of a tree, the files do not say which had boxes
        module.boxed.fill_(True)
    return ImportedModel(module.eval(), metadata, [])


def layer_sizes(module: DetectorModule | ClassifierModule) -> dict[int, int]:
    """Return the number of weights of each convolution, by layer, in the order of the file."""
    network = module.network
    tensors = {number: conv_tensors(block) for number, block in conv_blocks(network.body)}
    tensors[len(network.body)] = list(last_conv(network))
    return {number: sum(t.numel() for t in parts) for number, parts in tensors.items()}


def _first_missing_layer(weights: Weights, sizes: Mapping[int, int]) -> int | None:
    """Return the first layer without weights in the file, None if it is complete."""
    total, remaining = sum(sizes.values()), len(weights.values)
    if remaining > total:
        raise InputError(
            f"{weights.path}, byte {weights.header_bytes + 4 * total}: {remaining - total} values "
            f"after the last layer; expected {total} in total, found {remaining}"
        )
    start = 0
    for number, size in sizes.items():
        if remaining < size:
            if remaining or not start:
                raise InputError(
                    f"{weights.path}, byte {weights.header_bytes + 4 * start}: layer {number} has "
                    f"{size} values, found {remaining}; the network has {total}: the file is "
                    "truncated, or of another network"
                )
            return number
        start, remaining = start + size, remaining - size
    return None


def _build_module(
    description: NetworkDescription, tree: WordTree
) -> DetectorModule | ClassifierModule:
    height, width = description.size_hw
    options: dict[str, Any] = {
        "tree": [tuple(row) for row in tree.rows],
        "backbone": layers_to_rows(description.layers),
        "image_size": height if height == width else [height, width],
        "interpolation": description.interpolation,
        **description.training,
    }
    region = description.region
    if region is None:
        return ClassifierModule(**options)
    loss = LossSettings(**{ours: getattr(region, name) for ours, name in _LOSS_NAMES.items()})
    anchors = list(zip(region.anchors[::2], region.anchors[1::2], strict=True))
    return DetectorModule(
        anchors_wh_cell=anchors, head_channels=0, passthrough_channels=0, loss=loss, **options
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
    if description.needs_tree and tree_path is None:
        missing = f"; {description.tree_file!r} not found" if description.tree_file else ""
        raise InputError(f"the classes of this network form a tree{missing}: use --tree FILE")
    if tree_path is not None:
        names = read_names(names_path) if names_path else None
        return read_tree(tree_path, names, description.classes)
    if names_path is not None:
        names = _read_class_lines(description, names_path)
    else:
        names = list(description.names) or [f"class {k}" for k in range(description.classes)]
    if keys_path is not None:
        keys = _read_class_lines(description, keys_path)
    else:
        counts = Counter(names)
        # names need not be unique (two kinds of crane), but keys must be
        keys = [n if counts[n] == 1 else f"{n} #{k}" for k, n in enumerate(names)]
    return WordTree(
        [(key, "-", name) for key, name in zip(keys, names, strict=True)], str(keys_path)
    )


def _read_class_lines(description: NetworkDescription, path: str | Path) -> list[str]:
    """Return one line per class; lists of a classifier may be longer, as ImageNet's is."""
    lines, count = read_names(path), description.classes
    if len(lines) < count or (len(lines) > count and description.region is not None):
        raise InputError(f"{path}: {len(lines)} lines, but the network has {count} classes")
    if len(lines) > count:
        print(f"{path}: {len(lines)} lines; using the first {count}")
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
        if module.network.location != "direct":
            raise InputError(
                f"model.location is {module.network.location}; Darknet only supports direct"
            )
        region = Region(
            tuple(float(v) for pair in module.hparams["anchors_wh_cell"] for v in pair),
            **{name: getattr(module.loss, ours) for ours, name in _LOSS_NAMES.items()},
        )
    return NetworkDescription(
        module.network.body.layers,
        len(module.tree),
        (size, size) if isinstance(size, int) else (size[0], size[1]),
        region,
        module.tree.names,
        training={name: module.hparams[name] for name in TRAINING_OPTIONS.values()},
        options=metadata.get("options", {}),
        interpolation=module.hparams["interpolation"],
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
    description, tree = describe_network(module, metadata), module.tree
    order = darknet_order(tree)
    names, keys = ([texts[node] for node in order] for texts in (tree.names, tree.keys))
    flat = bool((tree.parents < 0).all())
    if not flat:
        description.tree_file = f"{stem.name}.tree"
    sections = to_sections(description)
    weight, bias = _reorder_classes(last_conv(module.network), order, description)
    tensors = [t for _, block in conv_blocks(module.network.body) for t in conv_tensors(block)]
    images_seen = int(metadata.get("images_seen", 0))
    writers: dict[str, Callable[[Path], None]] = {
        ".cfg": lambda path: write_cfg(path, sections),
        ".weights": lambda path: write_weights(path, [*tensors, bias, weight], images_seen),
        ".names": lambda path: write_names(path, names),
    }
    if not flat:
        writers[".tree"] = lambda path: write_tree(path, tree, order)
    elif keys != names:
        writers[".labels"] = lambda path: write_names(path, keys)
    targets = {suffix: stem.with_name(stem.name + suffix) for suffix in writers}
    existing = [path for path in targets.values() if path.exists()]
    if existing and not overwrite:
        raise InputError(f"{existing[0]} exists; --overwrite replaces it")
    stem.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stem.parent) as folder:
        # all files are written completely before the first one is renamed
        for suffix, write in writers.items():
            write(Path(folder) / f"new{suffix}")
        for suffix, target in targets.items():
            os.replace(Path(folder) / f"new{suffix}", target)
    return list(targets.values())


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


def import_from_options(options: argparse.Namespace) -> ImportedModel:
    """Import a model from the files in the command line, see `add_darknet_options`."""
    if (options.cfg is None) == (options.layout is None):
        raise InputError("use one of --cfg FILE and --layout NAME")
    description = (
        parse_network(read_cfg(options.cfg)) if options.cfg else released_network(options.layout)
    )
    data_paths = read_data(options.data) if options.data else {}
    tree_path = options.tree or data_paths.get("tree")
    if tree_path is None and description.tree_file and options.cfg:
        tree_path = find_referenced_file(description.tree_file, options.cfg)
    names_path = options.names or data_paths.get("names")
    labels_path = options.labels or data_paths.get("labels")
    tree = load_classes(description, names_path, tree_path, labels_path)
    imported = import_model(description, options.weights, tree)
    notes = imported.notes
    if tree_path is not None and not description.needs_tree:
        notes.append("the .cfg has no tree: its softmax was over all classes, now over siblings")
    if description.ignored:
        notes.append(f"ignored options: {', '.join(description.ignored)}")
    if not (names_path or tree_path or description.names):
        notes.append("the classes have numbers as names; use --names FILE")
    return imported
