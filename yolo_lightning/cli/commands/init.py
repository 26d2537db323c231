"""`yolo-lightning init`: write a recipe for your own datasets."""

import argparse
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.cli.commands.wordtree import MIXED_NAMES, write
from yolo_lightning.errors import InputError, nearest, printable, require_file, write_atomically
from yolo_lightning.models.backbones import BACKBONES
from yolo_lightning.tree.labels import load_reviewed_labels
from yolo_lightning.tree.wordnet import ENTITY

if TYPE_CHECKING:
    from yolo_lightning.cli.commands.recipe_template import Source
    from yolo_lightning.tree.wordtree import WordTree

_IMAGES_READ, _MAX_SHOWN = 64, 10


def _open_sources(options: argparse.Namespace) -> dict[str, Any]:
    """Open the datasets, and print a summary of each; return sources by their part in the data."""
    from yolo_lightning.datamodules.autodetect import detection_source, held_out, label_source
    from yolo_lightning.datamodules.files import AnnotatedImages

    outside = options.allow_outside
    training = detection_source(options.detection, allow_outside=outside)
    parts: dict[str, Any] = {"detection": training, "classification": None, "validation": None}
    parts |= held_out(options.detection, training)
    if options.classification:
        parts["classification"] = label_source(options.classification, outside)
    if options.validation:
        parts["validation"] = detection_source(options.validation, allow_outside=outside)
    sources = {part: source for part, source in parts.items() if source is not None}
    for source in sources.values():
        _print_summary(source)
        if isinstance(source, AnnotatedImages):
            source.exclusive_names = not options.mixed_names
    return sources


def _print_summary(source: "Source") -> None:
    """Print the classes and faults of a source; reject one without images or labels."""
    import numpy as np

    from yolo_lightning.datamodules.files import AnnotatedImages
    from yolo_lightning.images import UnreadableSample, read_header

    names, faults = source.name_counts(), list(source.load_index().metadata["faults"])
    if not len(source) or not sum(names.values()):
        hint = f": {faults[0]}" if faults else ""
        raise InputError(f"{source.name}: contains nothing to train on{hint}")
    indices = np.linspace(0, len(source) - 1, min(_IMAGES_READ, len(source))).astype(int)
    for index in indices.tolist():
        try:
            read_header(source.image_path(index))
        except UnreadableSample as error:
            faults.append(str(error))
    unit = "boxes" if isinstance(source, AnnotatedImages) else "images"
    counts = ", ".join(f"{name} {count}" for name, count in names.most_common(_MAX_SHOWN))
    more = f", … {len(names)} names in total" if len(names) > _MAX_SHOWN else ""
    print(printable(f"{source.name}: {len(source)} images; {unit}: {counts}{more}"))
    for fault in faults[:_MAX_SHOWN]:
        print(f"  {printable(fault)}")
    if len(faults) > _MAX_SHOWN:
        print(f"  … and {len(faults) - _MAX_SHOWN} more repaired or skipped")


def _tree(
    options: argparse.Namespace, sources: "Iterable[Source]", pretrained: Mapping[str, Any]
) -> "WordTree":
    """Build the tree of all class names; leaves ``X/other`` of the pretrained tree are kept."""
    from yolo_lightning.cli.tree_inputs import build_class_tree, read_hierarchy, read_mapping
    from yolo_lightning.tree.wordtree import WordTree

    names: dict[str, list[str]] = {}
    exclusive: set[str] = set()
    for source in sources:
        used = [name for name, count in source.name_counts().items() if count]
        names.setdefault(source.name, []).extend(used)
        exclusive |= {source.name} if getattr(source, "exclusive_names", False) else set()
    if options.flat:
        return WordTree.from_names(sorted({name for listed in names.values() for name in listed}))
    hierarchy = read_hierarchy(options.hierarchy) if options.hierarchy else {}
    meanings = read_mapping(options.mapping) if options.mapping else {}
    try:
        return build_class_tree(
            names,
            hierarchy,
            meanings,
            options.table,
            options.root,
            exclusive,
            WordTree(pretrained["tree"]).others if pretrained else (),
        )
    except InputError as error:
        raise InputError(
            f"{error}\n  Put names with several meanings into --mapping FILE (mouse: n03793489), "
            "your own classes into --hierarchy FILE (bengal: domestic cat), or use all names "
            "without a hierarchy: --flat"
        ) from None


def _pretrained(path: str | None) -> dict[str, Any]:
    """Return the hyper-parameters of a pretrained checkpoint, none of other weights."""
    from yolo_lightning.checkpoints.validation import is_checkpoint, read_checkpoint

    if path is not None and is_checkpoint(require_file(path, "--pretrained")):
        hparams: dict[str, Any] = read_checkpoint(path)["hyper_parameters"]
        return hparams
    return {}


def _network(options: argparse.Namespace, pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the network, those of the pretrained checkpoint if there is one."""
    from yolo_lightning.cli.commands.recipe_template import NOT_IN_TEMPLATE

    backbone = pretrained.get("backbone", options.backbone)
    values = {
        "backbone": backbone,
        "head_channels": 1024 if backbone == "darknet19" else 128,
        "passthrough_channels": 64,
        "reorg": "space_to_depth",
        "anchor_prior_images": 3200,
    }
    values |= {name: pretrained[name] for name in NOT_IN_TEMPLATE if name in pretrained}
    if "anchors_wh_cell" in pretrained:  # a detector keeps its head and anchors
        names = ("head_channels", "passthrough_channels", "reorg", "anchors_wh_cell")
        values |= {name: pretrained[name] for name in names} | {"anchor_prior_images": 0}
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning init",
        description="Check datasets, and write a recipe, a tree of classes and anchors for them.",
    )
    parser.add_argument(
        "--detection", required=True, help="images with boxes, in a supported layout"
    )
    parser.add_argument("--classification", help="images with labels, such as one folder per class")
    parser.add_argument("--validation", help="images with boxes for evaluation")
    parser.add_argument(
        "--output", required=True, help="RECIPE.yaml; the tree is written to RECIPE.tsv"
    )
    parser.add_argument("--hierarchy", help="your own classes: nested YAML, or CSV of child,parent")
    parser.add_argument("--mapping", help="meanings of names: YAML or CSV of name and wnid or word")
    parser.add_argument(
        "--table", help=f"reviewed table of meanings: {', '.join(load_reviewed_labels())}"
    )
    parser.add_argument("--root", default=ENTITY, help="wnid of the root (default: entity)")
    parser.add_argument(
        "--allow-outside", action="store_true", help="let the dataset name files outside its folder"
    )
    parser.add_argument("--flat", action="store_true", help="use all names without a hierarchy")
    parser.add_argument("--mixed-names", action="store_true", help=MIXED_NAMES)
    parser.add_argument(
        "--image-size", type=int, default=416, help="px, a multiple of 32 (default: 416)"
    )
    parser.add_argument("--num-anchors", type=int, help="number of anchors (default: 5)")
    parser.add_argument("--backbone", default="tiny_darknet", help=f"one of {', '.join(BACKBONES)}")
    parser.add_argument("--pretrained", help="Darknet .weights or a checkpoint to start from")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if output.suffix not in (".yaml", ".yml"):
        raise InputError(f"--output {options.output!r}; expected a name such as recipe.yaml")
    for file in (output, output.with_suffix(".tsv")):
        if file.exists():
            raise InputError(f"{file} exists already; use another --output, or move the file")
    if options.image_size < 96 or options.image_size % 32:
        raise InputError(
            f"--image-size is {options.image_size}; allowed: multiples of 32, at least 96"
        )
    if options.backbone not in BACKBONES:
        hint = nearest(options.backbone, BACKBONES) or f"allowed: {', '.join(BACKBONES)}"
        raise InputError(f"--backbone {options.backbone!r}; {hint}")


def main(argv: Sequence[str]) -> None:
    """Write the tree and the recipe, and print the command that trains it.

    Raises:
        InputError: a dataset cannot be read, a name has no meaning, or an output file exists.
    """
    options = _parser().parse_args(list(argv))
    _check_options(options)
    from yolo_lightning.cli.commands.recipe_template import recipe_text
    from yolo_lightning.datamodules.vocabulary import vocabulary_report

    sources = _open_sources(options)
    pretrained = _pretrained(options.pretrained)
    tree = _tree(options, sources.values(), pretrained)
    for source in sources.values():
        source.bind(tree)
    boxes, labels = sources["detection"], sources.get("classification")
    images = labels.node_counts() if labels else {}
    print(vocabulary_report(tree, boxes.node_counts(), images, [boxes.exclusive_nodes]))
    command = shlex.join(["yolo-lightning", "init", *argv])
    text = recipe_text(options, sources, _network(options, pretrained), command)
    output = Path(options.output)
    write(tree, str(output.with_suffix(".tsv")))
    write_atomically(output, text)
    print(f"{output.with_suffix('.tsv')}: {len(tree)} classes")
    print(f"{output}: train with: yolo-lightning fit --config {shlex.quote(str(output))}")
