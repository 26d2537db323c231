"""`yolo-lightning init`: write a recipe for your own datasets."""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.cli.arguments import CommandParser
from yolo_lightning.cli.commands.wordtree import MIXED_NAMES, write
from yolo_lightning.errors import InputError, nearest, require_file, write_atomically
from yolo_lightning.models.backbones import (
    BACKBONES,
    backbone_layers,
    default_head_channels,
)
from yolo_lightning.tree.labels import load_reviewed_labels
from yolo_lightning.tree.wordnet import ENTITY

if TYPE_CHECKING:
    from yolo_lightning.cli.commands.init_defaults import Machine, Settings

_NO_WEIGHTS = """\
pretrained: none, so training starts from random weights and needs many more steps; put
  tiny.weights of https://pjreddie.com/darknet/tiny-darknet/ (4 MB, trained on ImageNet) at
  datasets/tiny.weights, or name it: --pretrained FILE; what it brings: docs/photographs.md"""


def _pretrained(path: str | None) -> dict[str, Any]:
    """Return the hyper-parameters of a pretrained checkpoint, none of other weights."""
    from yolo_lightning.checkpoints.validation import is_checkpoint, read_checkpoint

    if path is not None and is_checkpoint(require_file(path, "--pretrained")):
        hparams: dict[str, Any] = read_checkpoint(path)["hyper_parameters"]
        return hparams
    return {}


def _network(
    options: argparse.Namespace, pretrained: Mapping[str, Any], machine: "Machine", images: int
) -> dict[str, Any]:
    """Return the options of the network, those of the pretrained checkpoint if there is one."""
    from yolo_lightning.cli.commands.init_defaults import choose_backbone, find_weights
    from yolo_lightning.cli.commands.recipe_template import NOT_IN_TEMPLATE

    weights = None if pretrained else options.pretrained
    backbone = options.backbone or choose_backbone(weights, machine, images)
    backbone = pretrained.get("backbone", backbone)
    values = {
        "backbone": backbone,
        "pretrained": options.pretrained or find_weights(backbone),
        "head_channels": default_head_channels(backbone_layers(backbone)),
        "passthrough_channels": 64,
        "reorg": "space_to_depth",
    }
    values["anchor_prior_images"] = 0 if values["pretrained"] else 3200
    values |= {name: pretrained[name] for name in NOT_IN_TEMPLATE if name in pretrained}
    if "anchors_wh_cell" in pretrained:  # a detector keeps its head and anchors
        names = ("head_channels", "passthrough_channels", "reorg", "anchors_wh_cell")
        values |= {name: pretrained[name] for name in names} | {"anchor_prior_images": 0}
    return values


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="yolo-lightning init",
        description="Check a dataset, and write a recipe, a list of classes and anchors for it.",
        epilog="Then: yolo-lightning fit RECIPE, yolo-lightning test RECIPE.",
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="folder or file of images with boxes, in a known layout")
    add("--output", metavar="RECIPE.yaml", help="(PATH's name, in the working folder)")
    add("--images", metavar="FOLDER", help="of the images, if it is not beside the annotations")
    add("--names", help="classes of YOLO texts: a file with one a line, or a,b,c")
    add("--validation", metavar="PATH", help="images with boxes for evaluation")
    add(
        "--val-fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="of the training images for validation, if none are named (0.1; 0: none)",
    )
    add("--group-by", metavar="PATTERN", help="keep images together: a regular expression for "
        "their paths, such as 'video_\\d+', or a column of a CSV")  # fmt: skip
    add("--classification", metavar="PATH", help="images with labels, such as a folder per class")
    add("--hierarchy", metavar="FILE", help="your own classes: nested YAML, or CSV child,parent")
    add("--mapping", metavar="FILE", help="YAML or CSV: class of a name, or its meaning (a wnid or "
        "a word) with --classification or --hierarchy")  # fmt: skip
    add("--table", help=f"reviewed table of meanings: {', '.join(load_reviewed_labels())}")
    add("--root", default=ENTITY, help="wnid of the root (entity)")
    add("--flat", action="store_true", help="use all names without a hierarchy")
    add("--mixed-names", action="store_true", help=MIXED_NAMES)
    add(
        "--allow-outside", action="store_true", help="let the dataset name files outside its folder"
    )
    add("--pretrained", metavar="FILE", help="Darknet .weights or a checkpoint to start from")
    add("--minutes", type=float, help="of training on this machine (CPU: 15, GPU: as needed)")
    add(
        "--image-size",
        type=int,
        metavar="PX",
        help="a multiple of 32 (chosen by machine and boxes)",
    )
    add("--num-anchors", type=int, help="number of anchors (5)")
    add("--backbone", help=f"one of {', '.join(BACKBONES)} (chosen by machine and weights)")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line, checked, with the path of the recipe as `output`."""
    options = _parser().parse_args(list(argv))
    _check_options(options)
    path = Path(os.path.abspath(options.path))  # of a link, its own name
    is_file = path.suffix != "" and not path.is_dir()
    options.output = options.output or f"{path.parent.name if is_file else path.name}.yaml"
    if Path(options.output).suffix not in (".yaml", ".yml"):
        raise InputError(f"--output {options.output!r}; expected a name such as recipe.yaml")
    return options


def _new_files(options: argparse.Namespace) -> list[Path]:
    """Return the paths of the recipe and the files beside it, none of which exists."""
    output = Path(options.output)
    files = [output, output.with_suffix(".tsv"), output.with_suffix(".val.txt")]
    for file in files:
        if file.exists():
            raise InputError(f"{file} exists already; use another --output, or move the file")
    return files


def _check_options(options: argparse.Namespace) -> None:
    size = options.image_size
    if size is not None and (size < 96 or size % 32):
        raise InputError(f"--image-size is {size}; allowed: multiples of 32, at least 96")
    if not 0 <= options.val_fraction < 1:
        raise InputError(f"--val-fraction is {options.val_fraction}; allowed: 0 … 1, such as 0.1")
    if options.minutes is not None and not 0 < options.minutes < 10**6:
        raise InputError(f"--minutes is {options.minutes}; allowed: more than 0")
    if options.backbone is not None and options.backbone not in BACKBONES:
        hint = nearest(options.backbone, BACKBONES) or f"allowed: {', '.join(BACKBONES)}"
        raise InputError(f"--backbone {options.backbone!r}; {hint}")


def main(argv: Sequence[str]) -> None:
    """Write the tree and the recipe, and print the commands that train and test it.

    Raises:
        InputError: a dataset cannot be read, a name has no meaning, or an output file exists.
    """
    print(write_recipe(argv))


def command(argv: Sequence[str]) -> str:
    """Return the command that the recipe names as its origin."""
    return shlex.join(["yolo-lightning", "init", *argv])


def write_recipe(argv: Sequence[str]) -> str:
    """Write the tree and the recipe; return the commands that train and test it. See `main`."""
    options = parse(argv)
    files = _new_files(options)
    try:
        return _write(options, files, command(argv))
    except BaseException:
        for file in files:  # none of them existed before
            file.unlink(missing_ok=True)
        raise


def _write(options: argparse.Namespace, files: Sequence[Path], command: str) -> str:
    from yolo_lightning.cli.commands.init_datasets import build_tree_of, open_sources
    from yolo_lightning.cli.commands.init_defaults import choose_settings, find_machine
    from yolo_lightning.cli.commands.recipe_template import label_batches, recipe_text
    from yolo_lightning.datamodules.vocabulary import vocabulary_report

    recipe, tree_file, listed = files
    pretrained = _pretrained(options.pretrained)
    sources = open_sources(options, listed)
    tree = build_tree_of(options, sources.values(), pretrained)
    for source in sources.values():
        source.bind(tree)
    boxes, labels = sources["detection"], sources.get("classification")
    images = labels.node_counts() if labels else {}
    if tree.paths.shape[1] > 1:
        print(vocabulary_report(tree, boxes.node_counts(), images, [boxes.exclusive_nodes]))
    machine = find_machine()
    network = _network(options, pretrained, machine, len(boxes))
    ratio = label_batches(boxes, len(labels or ()))
    evaluated = len(sources.get("validation", ()))
    settings = choose_settings(options, machine, boxes, evaluated, network, ratio)
    text = recipe_text(options, sources, network, settings, command)
    write(tree, str(tree_file))
    write_atomically(recipe, text)
    print(f"pretrained: {network['pretrained']}" if network["pretrained"] else _NO_WEIGHTS)
    print(_estimate(settings, machine, evaluated > 0))
    classes = "1 class" if len(tree) == 1 else f"{len(tree)} classes"
    print(f"{tree_file}: {classes}")
    name = shlex.quote(str(recipe))
    launch = f"yolo-lightning fit {name}"
    if machine.gpus > 1:
        number = machine.gpus
        launch = f"torchrun --nproc-per-node={number} -m yolo_lightning fit {name}"
        launch += f" --trainer.devices {number}"
    commands = [f"{recipe}: the recipe; train and test with", f"  {launch}"]
    if "validation" in sources or "test" in sources:
        commands.append(f"  yolo-lightning test {name}")
    return "\n".join(commands)


def _estimate(settings: "Settings", machine: "Machine", has_validation: bool) -> str:
    from yolo_lightning.cli.commands.init_defaults import counted

    number, noun = (machine.gpus, "GPU") if machine.gpus else (machine.cores, "idle CPU core")
    first = f"; first validation after {settings.every} steps" if has_validation else ""
    return (
        f"about {settings.duration}: {settings.steps:,} steps of {settings.step_s:.2f} s"
        f" on {counted(number, noun)}, as measured; {settings.batch} images of "
        f"{settings.image_size} px, {settings.precision}{first}"
    )
