"""`yolo-lightning darknet`: convert Darknet files to a checkpoint and back."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from yolo_lightning.errors import InputError, nearest, printable


def add_darknet_options(
    parser: argparse._ActionsContainer, weights_required: bool, layouts: str = ""
) -> None:
    """Add the options that name Darknet files; `layouts` is text for the help."""
    parser.add_argument("--cfg", help=".cfg file of the network")
    parser.add_argument(
        "--layout", metavar="NAME", help=f"a released network instead of a .cfg file{layouts}"
    )
    parser.add_argument(
        "--weights", required=weights_required, help=".weights file, complete or partial"
    )
    parser.add_argument("--names", help="file with one class name per line")
    parser.add_argument(
        "--labels", help="file with one unique key per line, such as a wnid (default: the names)"
    )
    parser.add_argument("--tree", help=".tree file: a key and the line number of its parent")
    parser.add_argument("--data", help=".data file with the paths of names, labels and tree")


def _import(options: argparse.Namespace) -> None:
    from yolo_lightning.checkpoints.io import write_checkpoint
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.export.darknet import build_checkpoint, import_from_options, layer_sizes
    from yolo_lightning.tree.seen_classes import seen_nodes

    module, metadata, notes = import_from_options(options)
    if options.boxed:
        if not isinstance(module, DetectorModule):
            raise InputError("--boxed: the network is a classifier, which learns without boxes")
        module.boxed.copy_(seen_nodes(module.tree, options.boxed))
        notes.append(f"classes that had boxes in training: {int(module.boxed.sum())}")
    elif isinstance(module, DetectorModule) and not module.boxed.any():
        notes.append("which classes had boxes in training is unknown; --boxed FILE names them")
    output = Path(options.output)
    if output.is_dir() or not output.name:
        raise InputError(f"--output {options.output!r} is a folder; expected a file to write")
    write_checkpoint(build_checkpoint(module, metadata), output)
    kind = "detector" if isinstance(module, DetectorModule) else "classifier"
    layers, values = len(module.network.body) + 1, sum(layer_sizes(module).values())
    print(
        f"{output}: {kind} of {len(module.tree)} classes, {layers} layers, {values:,} values, "
        f"trained on {metadata['images_seen']:,} images"
    )
    for note in notes:
        print(f"  {printable(note)}")


def _export(options: argparse.Namespace) -> None:
    from yolo_lightning.checkpoints.validation import read_checkpoint
    from yolo_lightning.export.darknet import export_model
    from yolo_lightning.inference.loading import load

    checkpoint = read_checkpoint(options.checkpoint)
    module = load(options.checkpoint)
    stem = Path(options.output)
    if stem.suffix in (".cfg", ".weights", ".names", ".tree"):
        stem = stem.with_suffix("")
    if not stem.name:
        raise InputError(f"--output {options.output!r}: expected a path without a suffix")
    for path in export_model(module, checkpoint.get("darknet", {}), stem, options.overwrite):
        print(path)
    keys_with_spaces = [key for key in module.tree.keys if len(key.split()) > 1]
    if keys_with_spaces and stem.with_name(f"{stem.name}.tree").is_file():
        print(
            f"  spaces in {len(keys_with_spaces)} keys became underscores, for example in "
            f"{keys_with_spaces[0]!r}"
        )


def _parser() -> argparse.ArgumentParser:
    from yolo_lightning.darknet.released import LAYOUTS

    parser = argparse.ArgumentParser(
        prog="yolo-lightning darknet",
        description="Convert Darknet files to a checkpoint and back.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|export")
    importer = actions.add_parser("import", help="write a checkpoint from Darknet files")
    add_darknet_options(importer, True, f": {', '.join(LAYOUTS)}")
    importer.add_argument("--output", required=True, help="path of the checkpoint")
    importer.add_argument(
        "--boxed", metavar="FILE",
        help="classes that had boxes in training: a file with one name or key per line, or `coco` "
        "(default: all classes of a flat list; unknown for a tree)",
    )  # fmt: skip
    exporter = actions.add_parser("export", help="write .cfg, .weights, .names and .tree")
    exporter.add_argument("checkpoint", help="trained or imported")
    exporter.add_argument("--output", required=True, help="path of the files without a suffix")
    exporter.add_argument("--overwrite", action="store_true", help="replace existing files")
    return parser


def main(argv: Sequence[str]) -> None:
    """Run `darknet import` or `darknet export`; after an error, nothing is written."""
    actions = ("import", "export")
    if argv and not argv[0].startswith("-") and argv[0] not in actions:
        hint = nearest(argv[0], actions) or f"allowed: {', '.join(actions)}"
        raise InputError(f"darknet {argv[0]!r}; {hint}")
    options = _parser().parse_args(list(argv))
    try:
        (_import if options.action == "import" else _export)(options)
    except OSError as error:
        raise InputError(f"--output {options.output!r}: {error.strerror}") from None
