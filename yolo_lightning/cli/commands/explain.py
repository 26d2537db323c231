"""`yolo-lightning explain`: one picture of what the loss sees in an image."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError

if TYPE_CHECKING:
    from yolo_lightning.batches import ClassificationBatch, DetectionBatch
    from yolo_lightning.datamodules.combined import CombinedDataModule
    from yolo_lightning.datamodules.source import ImageLabelSource
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.explain.picture import View
    from yolo_lightning.losses import LossSettings
    from yolo_lightning.models.head import HeadOutput

SOURCES = ("detection", "classification", "validation", "test")
FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning explain",
        description="Draw what the loss sees in one image of a recipe: who answers for what, "
        "path probabilities, and every term. Rows, columns and anchors count from 0.",
        epilog="Any other option, after the recipe, overrides its values: "
        "--model.loss.box_selection label.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("recipe", help="RECIPE.yaml, or the resolved.yaml of a run")
    add("--checkpoint", required=True, metavar="CKPT", help="a detector of the recipe's classes")
    add("--image", required=True, type=int, metavar="N", help="number of the image, from 0")
    add(
        "--source",
        choices=SOURCES,
        help="of the recipe's data; detection, or classification where the recipe has no boxes",
    )
    add("--image-size", type=int, metavar="PX", help="network input; the recipe's data.image_size")
    add(
        "--images-seen",
        type=int,
        metavar="N",
        help="images seen so far, which decide whether loss_anchor_prior counts (the checkpoint's, "
        "else all of the training)",
    )
    add("--output", metavar="FILE", help="the picture (explain-SOURCE-N.png)")
    return parser


def read_image(
    data: "CombinedDataModule", name: str, index: int, size: int
) -> tuple["DetectionBatch | ClassificationBatch", str]:
    """Return an image as the loss is given it where nothing is augmented, and what it is called.

    Args:
        data: of the recipe.
        name: which of its sources.
        index: number of the image.
        size: side of the network input, px.

    Raises:
        InputError: no such source or image, or an image that cannot be read.
    """
    import torch

    from yolo_lightning.batches import ClassificationBatch
    from yolo_lightning.datamodules.batching import collate_detection
    from yolo_lightning.datamodules.source import DetectionSource
    from yolo_lightning.datamodules.transforms import fit_sample
    from yolo_lightning.images import UnreadableSample, fit

    source: DetectionSource | ImageLabelSource | None = getattr(data, name)
    if source is None:
        there = [part for part in SOURCES if getattr(data, part) is not None]
        raise InputError(f"the recipe names no data.{name}; it has: {', '.join(there)}")
    source.bind(data.tree)
    if not 0 <= index < len(source):
        raise InputError(
            f"--image is {index}; data.{name} has {len(source)} images: 0 … {len(source) - 1}"
        )
    try:
        if isinstance(source, DetectionSource):
            sample = source.read(index, size)
            sample = sample.chosen(~sample.difficult)  # training leaves them out
            batch = collate_detection([fit_sample(sample, size, data.resize)])
            return batch, source.image_name(index)
        image, node = source.read(index, size)
    except UnreadableSample as error:
        raise InputError(str(error)) from None
    fitted = torch.from_numpy(fit(image, (size, size))[0]).permute(2, 0, 1)[None]
    label = torch.tensor([node])
    return ClassificationBatch(fitted, torch.tensor([index]), label), source.image_name(index)


def images_seen(checkpoint: Mapping[str, Any], data: "CombinedDataModule") -> int | None:
    """Return how many images the training of a checkpoint had seen; None for weights alone."""
    from yolo_lightning.datamodules.sampler import JointOrder

    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
    if progress is None:
        return None
    order = JointOrder(int(data.detection is not None), 1, *data.batch_sizes, data.ratio, data.seed)
    return order.plan(int(progress["total"]["processed"])).images_seen


def network(options: argparse.Namespace, run: Any) -> "tuple[DetectorModule, LossSettings]":
    """Return the checkpoint's detector, and the loss that the recipe computes with it.

    Args:
        options: of the command line.
        run: the recipe, as `DataCLI` reads it.

    Raises:
        InputError: a classifier, or one with other classes or anchors than the recipe's.
    """
    from yolo_lightning.checkpoints.validation import first_difference
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.loading import load
    from yolo_lightning.losses import LossSettings

    module = load(options.checkpoint)
    if not isinstance(module, DetectorModule):
        raise InputError(f"{options.checkpoint}: holds a classifier; explain takes a detector")
    model = run.recipe.model
    if "anchors_wh_cell" not in model.init_args:
        raise InputError(f"{options.recipe}: model is {model.class_path}; explain takes a detector")
    anchors = [[float(v) for v in pair] for pair in model.init_args.anchors_wh_cell]
    for name, own, theirs in (
        ("data.tree", run.datamodule.tree.rows, module.tree.rows),
        ("model.anchors_wh_cell", anchors, module.hparams["anchors_wh_cell"]),
    ):
        if own != theirs:
            difference = first_difference(own, theirs, "the recipe", "the checkpoint")
            raise InputError(f"{name} differs from the checkpoint's: {difference}")
    given = model.init_args.get("loss")
    return module, module.loss if given is None else LossSettings(**given.as_dict())


def _boxed_ancestors(module: "DetectorModule", data: "CombinedDataModule") -> Any:
    """Return what boxes taught: the checkpoint knows, else the recipe's boxes tell."""
    if not bool(module.boxed.any()) and data.detection is not None:
        data.detection.bind(data.tree)
        module.boxed[data.boxed_nodes] = True
    return module.boxed_ancestors()


def main(argv: Sequence[str]) -> None:
    """Print what the loss sees in an image, and draw it.

    Raises:
        InputError: an image, a recipe or a checkpoint that cannot be, or that do not go together.
    """
    options, overrides = _parser().parse_known_args(list(argv))
    if options.output and Path(options.output).suffix.lower() not in FORMATS:
        raise InputError(f"--output is {options.output!r}; allowed endings: {', '.join(FORMATS)}")
    if options.images_seen is not None and options.images_seen < 0:
        raise InputError(f"--images-seen is {options.images_seen}; allowed: 0 or more")
    _run(options, overrides)


def _run(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    import torch

    from yolo_lightning.batches import DetectionBatch, unit_range
    from yolo_lightning.checkpoints.validation import read_checkpoint
    from yolo_lightning.cli.data import DataCLI
    from yolo_lightning.explain.picture import View

    run = DataCLI([options.recipe, *overrides])
    data = run.datamodule
    module, settings = network(options, run)
    size = data.image_size if options.image_size is None else options.image_size
    stride = module.network.stride
    if size < stride or size % stride:
        raise InputError(f"--image-size is {size}; allowed: multiples of {stride}")
    name = options.source or ("detection" if data.detection is not None else "classification")
    batch, called = read_image(data, name, options.image, size)
    seen = options.images_seen
    if seen is None:
        seen = images_seen(read_checkpoint(options.checkpoint), data)
    batch.images_seen = settings.anchor_prior_images if seen is None else seen
    path = Path(options.output or f"explain-{name}-{options.image}.png")
    view = View(batch.images[0].permute(1, 2, 0).numpy(), f"{name} {options.image}: {called}", path)
    print(f"{view.title}, {size} x {size} px")
    with torch.no_grad():
        output = module.network(unit_range(batch.images))
    if isinstance(batch, DetectionBatch):
        _tell_boxes(view, output, batch, module, settings)
    else:
        _tell_label(view, output, batch, module, _boxed_ancestors(module, data), settings)
    print(f"picture: {shlex.quote(str(path))}")


def _tell_boxes(
    view: "View",
    output: "HeadOutput",
    batch: "DetectionBatch",
    module: "DetectorModule",
    settings: "LossSettings",
) -> None:
    from yolo_lightning.explain.analysis import explain_boxes
    from yolo_lightning.explain.picture import save_boxes
    from yolo_lightning.explain.text import boxes_summary, object_lines, warm_up

    anchors = module.network.anchors_wh_cell
    explained = explain_boxes(output, batch, anchors, module.tree, settings)
    size = len(view.image)
    anchors_wh_px = [(w * size, h * size) for w, h in explained.anchors_wh_norm]
    told = [
        object_lines(k + 1, item, anchors_wh_px[item.box.anchor])
        for k, item in enumerate(explained.objects)
    ]
    note = warm_up(batch.images_seen, settings)
    for first, *rest in told:
        print("\n".join([first, *(f"   {line}" for line in rest)]))
    print("\n".join([note, *boxes_summary(explained, settings, each=True)]))
    save_boxes(view, explained, told, [note, *boxes_summary(explained, settings, each=False)])


def _tell_label(
    view: "View",
    output: "HeadOutput",
    batch: "ClassificationBatch",
    module: "DetectorModule",
    boxed_ancestors: Any,
    settings: "LossSettings",
) -> None:
    from yolo_lightning.explain.analysis import explain_label
    from yolo_lightning.explain.picture import save_label
    from yolo_lightning.explain.text import candidates_table, label_lines, label_summary

    anchors = module.network.anchors_wh_cell
    explained = explain_label(output, batch, anchors, module.tree, boxed_ancestors, settings)
    lines, table = label_lines(explained), candidates_table(explained, len(view.image))
    summary = label_summary(explained)
    print("\n".join([*lines, "", *table, "", *summary]))
    save_label(view, explained, lines, table, summary)
