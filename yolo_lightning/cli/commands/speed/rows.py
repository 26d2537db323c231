"""Measuring for `speed`: timed images, average precision, one row an image size."""

import argparse
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_lightning import __version__
from yolo_lightning.checkpoints.validation import first_difference
from yolo_lightning.cli.commands.speed import outputs as speed_outputs
from yolo_lightning.cli.commands.speed.outputs import Row
from yolo_lightning.cli.data import recipe_data
from yolo_lightning.datamodules import CombinedDataModule
from yolo_lightning.datamodules.source import DetectionSource
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.images import UnreadableSample
from yolo_lightning.inference.loading import load
from yolo_lightning.inference.timing import (
    SCORE_THRESHOLD,
    WARM_UP,
    Timing,
    device_name,
    measure,
    operations,
    out_of_memory,
    precision_name,
    usable_device,
)

MIN_IMAGES = 8
"""Single images are timed over so many different ones."""

_EVALUATED_AT_ONCE, _NOISE_CELLS = 8, 9


def measure_all(options: argparse.Namespace, overrides: Sequence[str], folder: Path) -> None:
    """Print and write a row an image size, then draw them.

    Args:
        options: of the command line, image sizes ascending.
        overrides: options of the recipe.
        folder: what is written goes there.

    Raises:
        InputError: no detector, no such device, sizes or a recipe that do not fit it, no
            matplotlib; all before anything is written.
    """
    figure = speed_outputs.empty_figure()
    device = usable_device(options.device)
    module = load(options.checkpoint, device)
    if not isinstance(module, DetectorModule):
        raise InputError(f"{options.checkpoint}: holds a classifier; speed takes a detector")
    for size in options.image_sizes:
        module.size_hw(size)
    data = test_data(options.recipe, overrides, module) if options.recipe else None
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    dtype = half if options.half else torch.float32
    said = about(options, device, dtype)
    speed_outputs.write(folder, said, [])
    print(speed_outputs.header(said), flush=True)
    rows: list[Row] = []
    for size in options.image_sizes:
        rows.append(row_of(module, data, size, options, dtype))
        print(speed_outputs.table_line(rows[-1]), flush=True)
        speed_outputs.write(folder, said, rows)
    speed_outputs.draw(figure, folder / "speed.png", said, rows)
    print("\n" + ", ".join(str(folder / f"speed.{end}") for end in ("json", "csv", "png")))


def about(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what the figures depend on, by name."""
    return {
        "checkpoint": options.checkpoint,
        "recipe": options.recipe,
        "images": f"test images of {options.recipe}" if options.recipe else "smooth noise",
        "device": str(device),
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "load_before": os.getloadavg()[0],
        "precision": precision_name(device, dtype),
        "yolo_lightning": __version__,
        "torch": str(torch.__version__),
        "batch_size": options.batch_size,
        "runs": options.runs,
        "warm_up_runs": WARM_UP,
        "score_threshold": SCORE_THRESHOLD,
    }


def test_data(recipe: str, overrides: Sequence[str], module: DetectorModule) -> CombinedDataModule:
    """Return a recipe's data, its test images read.

    Raises:
        InputError: none with boxes, or a tree that is not the checkpoint's.
    """
    # small batches: average precision is the same, and the memory is that of the timing
    small = f"--data.detection_batch_size={_EVALUATED_AT_ONCE}"
    data = recipe_data([recipe, *overrides, small])
    if data.tree.rows != module.tree.rows:
        rows = (data.tree.rows, module.tree.rows)
        where = first_difference(*rows, "the recipe", "the checkpoint")
        raise InputError(f"{recipe}: data.tree differs from the checkpoint's tree: {where}")
    if data.test is None:
        raise InputError(f"{recipe}: names neither data.test nor data.validation to measure on")
    if not isinstance(data.test, DetectionSource):
        raise InputError(f"{recipe}: data.test has no boxes; a detector is measured on boxes")
    data.setup("test")
    return data


def row_of(
    module: DetectorModule,
    data: CombinedDataModule | None,
    image_size: int,
    options: argparse.Namespace,
    dtype: torch.dtype,
) -> Row:
    """Measure one image size.

    Raises:
        InputError: too little memory for one image.
    """
    count = max(options.batch_size, MIN_IMAGES)
    if data is None:
        images, sizes = noise(image_size, count)
    else:
        images, sizes = images_of(data, module, image_size, count)
    images = images.to(module.device)
    one = _timing(module, images, sizes, 1, options.runs, dtype)
    if one is None:
        raise InputError(f"{image_size} px: too little memory for one image")
    many = _timing(module, images, sizes, options.batch_size, options.runs, dtype)
    figures = (None, None) if data is None else accuracy(module, data, image_size, options.half)
    return Row(image_size, operations(module.network, image_size), one, many, *figures)


def _timing(
    module: DetectorModule,
    images: Tensor,
    sizes_hw_orig: Tensor,
    batch_size: int,
    runs: int,
    dtype: torch.dtype,
) -> Timing | None:
    """Return how long batches take, None where the memory holds none."""
    try:
        return measure(module, images, sizes_hw_orig, batch_size, runs, dtype)
    except RuntimeError as error:
        if out_of_memory(error):
            return None
        raise


def images_of(
    data: CombinedDataModule, module: DetectorModule, image_size: int, count: int
) -> tuple[Tensor, Tensor]:
    """Return test images, spread over the source, as the network takes them.

    Args:
        data: set up.
        module: fits them.
        image_size: side of the network input, px.
        count: most of them.

    Returns:
        uint8 (N, 3, H, W), and int64 (N, 2), height and width of the originals, px.

    Raises:
        InputError: none of them can be read.
    """
    source = data.test
    assert isinstance(source, DetectionSource)
    images, sizes, reason = [], [], "it has none"
    for index in sorted({k * len(source) // count for k in range(count)} if len(source) else ()):
        try:
            image = source.read(index, image_size).image
        except UnreadableSample as error:
            reason = str(error)
            continue
        fitted, size_hw_orig = module.fitted(image, image_size)
        images.append(fitted)
        sizes.append(size_hw_orig)
    if not images:
        raise InputError(f"{source.name}: no test image can be read: {reason}")
    return torch.stack(images), torch.tensor(sizes)


def noise(image_size: int, count: int) -> tuple[Tensor, Tensor]:
    """Return smooth random images, the same every time.

    Returns:
        uint8 (N, 3, H, W), and int64 (N, 2), their heights and widths, px.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, _NOISE_CELLS, _NOISE_CELLS, generator=generator)
    smooth = F.interpolate(coarse, (image_size, image_size), mode="bilinear")
    return (255 * smooth).round().byte(), torch.full((count, 2), image_size)


def accuracy(
    module: DetectorModule, data: CombinedDataModule, image_size: int, half: bool
) -> tuple[float | None, float | None]:
    """Return AP50 and AP over a recipe's test images, the same ones at every size.

    Args:
        module: comes back to its device.
        data: set up; measures at this size from then on.
        image_size: side of the network input, px.
        half: whether the network computes in half of the precision.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    device = module.device
    on_gpu = device.type == "cuda"
    data.image_size = image_size
    tester = pl.Trainer(
        accelerator="cuda" if on_gpu else "cpu",
        devices=[device.index or 0] if on_gpu else 1,
        precision=("16-mixed" if on_gpu else "bf16-mixed") if half else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    figures = tester.test(module, data, verbose=False)[0]
    module.eval().to(device)
    ap50, ap = figures["test/AP50"], figures["test/AP"]
    return (None, None) if math.isnan(ap50) else (ap50, ap)
