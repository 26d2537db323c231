"""`yolo-lightning darknet`: Darknet's files to a checkpoint, and back."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from yolo_lightning.checkpoints.io import write_checkpoint
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.cli.commands.darknet_options import add_options
from yolo_lightning.darknet.config import (
    LAYOUTS,
)
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.export.darknet import _shapes, checkpoint_of, export_model, module_of
from yolo_lightning.inference.loading import load


def _import(options: argparse.Namespace) -> None:
    imported = module_of(options)
    module, description, beside = imported.module, imported.description, imported.beside
    output = Path(options.output)
    if output.is_dir() or not output.name:
        raise InputError(f"--output {options.output!r} is a folder; expected a file to write")
    write_checkpoint(checkpoint_of(module, beside), output)
    kind = "detector" if isinstance(module, DetectorModule) else "classifier"
    values = sum(count for _, count in _shapes(description))
    print(
        f"{output}: {kind} of {len(module.tree)} classes, {len(description.layers) + 1} layers, "
        f"{values:,} values, trained on {beside['images_seen']:,} images"
    )
    for note in imported.notes:
        print(f"  {note}")


def _export(options: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(options.checkpoint)
    module = load(options.checkpoint)
    stem = Path(options.output)
    if stem.suffix in (".cfg", ".weights", ".names", ".tree"):
        stem = stem.with_suffix("")
    if not stem.name:
        raise InputError(f"--output {options.output!r}: expected a path without its ending")
    for path in export_model(module, checkpoint.get("darknet", {}), stem, options.overwrite):
        print(path)
    blanks = [key for key in module.tree.keys if len(key.split()) > 1]
    if blanks and stem.with_name(f"{stem.name}.tree").is_file():
        print(f"  blanks in {len(blanks)} keys became underscores, such as in {blanks[0]!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning darknet", description="Darknet's files to a checkpoint and back."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="import|export")
    importer = actions.add_parser("import", help="write a checkpoint from Darknet's files")
    add_options(importer, True, f": {', '.join(LAYOUTS)}")
    importer.add_argument("--output", required=True, help="the checkpoint to write")
    exporter = actions.add_parser("export", help="write .cfg, .weights, .names and .tree")
    exporter.add_argument("checkpoint", help="trained or imported")
    exporter.add_argument("--output", required=True, help="path of the files without their endings")
    exporter.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser


def main(argv: Sequence[str]) -> None:
    """Run `darknet import` or `darknet export`.

    Raises:
        InputError: whatever is wrong with a file; nothing is written then.
    """
    actions = ("import", "export")
    if argv and not argv[0].startswith("-") and argv[0] not in actions:
        hint = nearest(argv[0], actions) or f"allowed: {', '.join(actions)}"
        raise InputError(f"darknet {argv[0]!r}; {hint}")
    options = _parser().parse_args(list(argv))
    try:
        (_import if options.action == "import" else _export)(options)
    except OSError as error:
        raise InputError(f"--output {options.output!r}: {error.strerror}") from None
