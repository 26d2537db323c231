"""`yolo-lightning explain`: explain the loss of one image."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError, printable

if TYPE_CHECKING:
    from yolo_lightning.batches import ClassificationBatch, DetectionBatch
    from yolo_lightning.datamodules.combined import CombinedDataModule
    from yolo_lightning.datamodules.source import ImageLabelSource
    from yolo_lightning.detector import DetectorModule

SOURCES = ("detection", "classification", "validation", "test")
FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning explain",
        description="Print and draw the loss of one image of a recipe: responsible boxes, path "
        "probabilities, and every term. Rows, columns and anchors count from 0.",
        epilog="Other options, after the recipe, override its values: "
        "--model.loss.box_selection label.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("recipe", help="RECIPE.yaml, or the resolved.yaml of a run")
    add("--checkpoint", required=True, metavar="CKPT", help="detector with the recipe's classes")
    add("--image", required=True, type=int, metavar="N", help="index of the image, from 0")
    defaults = "(detection, or classification without boxes)"
    add("--source", choices=SOURCES, help=f"of the image, in the data of the recipe {defaults}")
    add("--image-size", type=int, metavar="PX", help="network input (data.image_size)")
    defaults = "(those of the checkpoint, or enough to switch loss_anchor_prior off)"
    seen_help = f"training images so far: whether loss_anchor_prior applies {defaults}"
    add("--images-seen", type=int, metavar="N", help=seen_help)
    add("--output", metavar="FILE", help="figure (explain-SOURCE-N.png)")
    return parser


def read_image(
    data: "CombinedDataModule", name: str, index: int, size: int
) -> tuple["DetectionBatch | ClassificationBatch", str]:
    """Return an image as a batch, without augmentation, and its file name.

    Raises:
        InputError: no such source or image, or an unreadable image.
    """
    import torch

    from yolo_lightning.batches import ClassificationBatch, collate_detection, stack_images
    from yolo_lightning.datamodules.source import DetectionSource
    from yolo_lightning.datamodules.transforms import fit_sample
    from yolo_lightning.images import UnreadableSample, fit

    source: DetectionSource | ImageLabelSource | None = getattr(data, name)
    if source is None:
        present = [part for part in SOURCES if getattr(data, part) is not None]
        raise InputError(f"the recipe has no data.{name}; it has: {', '.join(present)}")
    source.bind(data.tree)
    if not 0 <= index < len(source):
        raise InputError(
            f"--image is {index}; data.{name} has {len(source)} images: 0 … {len(source) - 1}"
        )
    file_name = source.image_name(index)
    try:
        if isinstance(source, DetectionSource):
            sample = source.read(index, size)
            sample = sample.select(~sample.difficult)  # as in training
            batch = collate_detection([fit_sample(sample, size, data.resize)])
            batch.sample_ids = torch.tensor([index])
            return batch, file_name
        image, node = source.read(index, size)
    except UnreadableSample as error:
        raise InputError(str(error)) from None
    fitted = stack_images([fit(image, (size, size))[0]])
    return ClassificationBatch(fitted, torch.tensor([index]), torch.tensor([node])), file_name


def images_seen(checkpoint: Mapping[str, Any], data: "CombinedDataModule") -> int | None:
    """Return the number of training images of a checkpoint; None if it holds only weights."""
    from yolo_lightning.datamodules.sampler import JointOrder

    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress is None:
        return None
    sizes = (int(data.detection is not None), 1, *data.batch_sizes)
    order = JointOrder(*sizes, data.ratio, data.seed, lambda step: data.image_size)
    return order.plan(int(progress["total"]["processed"])).images_seen


def load_detector(options: argparse.Namespace, cli: Any) -> "DetectorModule":
    """Return the detector of the checkpoint, with the settings of the loss of the recipe.

    Raises:
        InputError: checkpoint or recipe are not of a detector, or differ in classes or anchors.
    """
    from yolo_lightning.checkpoints.validation import first_difference
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.loading import load

    module = load(options.checkpoint)
    if not isinstance(module, DetectorModule):
        raise InputError(f"{options.checkpoint}: contains a classifier; explain needs a detector")
    model = cli.recipe.model
    if "anchors_wh_cell" not in model.init_args:
        raise InputError(f"{options.recipe}: model is {model.class_path}; explain needs a detector")
    anchors = [[float(v) for v in pair] for pair in model.init_args.anchors_wh_cell]
    for name, value, checkpoint_value in (
        ("data.tree", cli.datamodule.tree.rows, module.tree.rows),
        ("model.anchors_wh_cell", anchors, module.hparams["anchors_wh_cell"]),
        ("model.location", model.init_args.get("location", "direct"), module.network.location),
    ):
        if value != checkpoint_value:
            difference = first_difference(value, checkpoint_value, "the recipe", "the checkpoint")
            raise InputError(f"{name} differs from the checkpoint's: {difference}")
    loss = model.init_args.get("loss")
    if loss is not None:
        module.loss = type(module.loss)(**loss.as_dict())
    return module


def main(argv: Sequence[str]) -> None:
    """Print and draw the loss of an image.

    Raises:
        InputError: invalid options, image, recipe or checkpoint.
    """
    options, overrides = _parser().parse_known_args(list(argv))
    if options.output and Path(options.output).suffix.lower() not in FORMATS:
        raise InputError(
            f"--output is {options.output!r}; allowed extensions: {', '.join(FORMATS)}"
        )
    if options.images_seen is not None and options.images_seen < 0:
        raise InputError(f"--images-seen is {options.images_seen}; allowed: 0 or more")
    import torch

    from yolo_lightning.batches import DetectionBatch, unit_range
    from yolo_lightning.checkpoints.validation import read_checkpoint
    from yolo_lightning.cli.data import DataCLI
    from yolo_lightning.explain import analysis, picture, text

    cli = DataCLI([options.recipe, *overrides], options.checkpoint)
    data = cli.datamodule
    module = load_detector(options, cli)
    tree, anchors, stride = module.tree, module.network.anchors_wh_cell, module.network.stride
    size = data.image_size if options.image_size is None else options.image_size
    if size < stride or size % stride:
        raise InputError(f"--image-size is {size}; allowed: multiples of {stride}")
    name = options.source or ("detection" if data.detection is not None else "classification")
    batch, file_name = read_image(data, name, options.image, size)
    num_images = options.images_seen
    if num_images is None:
        num_images = images_seen(read_checkpoint(options.checkpoint), data)
    batch.images_seen = module.loss.anchor_prior_images if num_images is None else num_images
    path = Path(options.output or f"explain-{name}-{options.image}.png")
    title = f"{name} {options.image}: {file_name}"
    print(f"{printable(title)}, {size} x {size} px")
    with torch.no_grad():
        output = module.network(unit_range(batch.images))
    if isinstance(batch, DetectionBatch):
        names = data.exclusive_names(getattr(data, name))
        boxes = analysis.explain_boxes(output, batch, anchors, tree, module.loss, names)
        print(text.boxes_text(boxes))
        picture.save_boxes(path, title, boxes)
    else:
        if not bool(module.boxed.any()) and data.detection is not None:
            data.detection.bind(data.tree)
            module.boxed[data.boxed_nodes] = True
        ancestors = module.boxed_ancestors()
        label = analysis.explain_label(output, batch, anchors, tree, ancestors, module.loss)
        print(text.label_text(label))
        picture.save_label(path, title, label)
    print(f"figure: {shlex.quote(str(path))}")
