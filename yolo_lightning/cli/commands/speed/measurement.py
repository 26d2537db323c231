"""Measurements of `speed`: latency and accuracy at each image size."""

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

from yolo_lightning.checkpoints.validation import first_difference
from yolo_lightning.cli.commands.speed import report
from yolo_lightning.cli.commands.speed.report import SizeResult
from yolo_lightning.cli.data import recipe_data
from yolo_lightning.datamodules import CombinedDataModule
from yolo_lightning.datamodules.source import DetectionSource
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.images import Image, UnreadableSample, centre_crop, decoding_side
from yolo_lightning.inference.loading import Module, load, select_device
from yolo_lightning.inference.timing import (
    SCORE_THRESHOLD,
    WARM_UP,
    Timing,
    billion_operations,
    is_out_of_memory,
    measure_latency,
    precision_name,
)
from yolo_lightning.tracking.provenance import processor_name
from yolo_lightning.version import __version__

SIZES = (288, 352, 416, 480, 544, 608)
"""px. Source: YOLO9000, table 3 and figure 4; 608 is the largest size of its training."""
CLASSIFIER_SIZES = (224, 448)
"""px. Source: YOLO9000, section 3, "Training for classification"."""
METRICS = {True: ("AP50", "AP"), False: ("top1", "top5")}
"""Names of the two metrics, of detectors and of classifiers."""
MIN_IMAGES = 8  # number of different images for timing single images
_EVALUATION_BATCH_SIZE, _NOISE_CELLS = 8, 9


def measure_all(options: argparse.Namespace, overrides: Sequence[str], folder: Path) -> None:
    """Measure each image size, print and write the results, and plot them.

    Raises:
        InputError: an invalid checkpoint, device, size or recipe; nothing is written.
    """
    device = select_device(options.device)
    module = load(options.checkpoint, device)
    is_detector = isinstance(module, DetectorModule)
    sizes = options.image_sizes or (SIZES if is_detector else CLASSIFIER_SIZES)
    for size in sizes:
        check_size(module, size)
    data = None
    if options.recipe:
        data = load_test_data(options.recipe, overrides, module, options.checkpoint)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    dtype = half if options.half else torch.float32
    setup = measurement_setup(options, device, dtype, is_detector)
    report.write_tables(folder, setup, [])
    print(report.table_header(setup), flush=True)
    rows: list[SizeResult] = []
    for size in sizes:
        rows.append(measure_size(module, data, size, options, dtype))
        print(report.table_line(rows[-1]), flush=True)
        report.write_tables(folder, setup, rows)
    report.draw_plot(folder / "speed.png", setup, rows)
    print("\n" + ", ".join(str(folder / f"speed.{end}") for end in ("json", "csv", "png")))


def measurement_setup(
    options: argparse.Namespace, device: torch.device, dtype: torch.dtype, is_detector: bool
) -> dict[str, Any]:
    """Return the setup of the measurements: machine, versions and options."""
    until = f"detections above {SCORE_THRESHOLD}" if is_detector else "class logits"
    return {
        "checkpoint": options.checkpoint,
        "recipe": options.recipe,
        "images": f"test images of {options.recipe}" if options.recipe else "smooth noise",
        "device": str(device),
        "device_name": processor_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 1,
        "load_before": os.getloadavg()[0],
        "precision": precision_name(device, dtype),
        "yolo_lightning": __version__,
        "torch": str(torch.__version__),
        "batch_size": options.batch_size,
        "runs": options.runs,
        "warm_up_runs": WARM_UP,
        "until": until,
        "metrics": METRICS[is_detector],
    }


def check_size(module: Module, image_size: int) -> None:
    """Raise `InputError` unless an image size, px, is a multiple of the stride and of 32."""
    if isinstance(module, DetectorModule):
        module.input_size_hw(image_size)
    elif image_size % 32:  # as in the data of a recipe
        raise InputError(f"image size {image_size}: allowed are multiples of 32")


def load_test_data(
    recipe: str, overrides: Sequence[str], module: Module, checkpoint: str | None = None
) -> CombinedDataModule:
    """Set up the test images of a recipe: of the module's tree, with boxes for a detector."""
    # accuracy is independent of the batch size; a small one needs little memory
    kinds = ("detection", "classification")
    small = [f"--data.{kind}_batch_size={_EVALUATION_BATCH_SIZE}" for kind in kinds]
    data = recipe_data([recipe, *overrides, *small], checkpoint)
    if data.tree.rows != module.tree.rows:
        rows = (data.tree.rows, module.tree.rows)
        difference = first_difference(*rows, "the recipe", "the checkpoint")
        raise InputError(f"{recipe}: data.tree differs from the checkpoint's tree: {difference}")
    if data.test is None:
        raise InputError(f"{recipe}: defines neither data.test nor data.validation")
    is_detector = isinstance(module, DetectorModule)
    if is_detector and not isinstance(data.test, DetectionSource):
        raise InputError(f"{recipe}: data.test has no boxes; a detector needs boxes")
    if not is_detector and isinstance(data.test, DetectionSource):
        raise InputError(f"{recipe}: data.test has boxes; a classifier needs image labels")
    data.setup("test")
    return data


def measure_size(
    module: Module,
    data: CombinedDataModule | None,
    image_size: int,
    options: argparse.Namespace,
    dtype: torch.dtype,
) -> SizeResult:
    """Measure one image size."""

    def latency(batch_size: int) -> Timing | None:
        try:
            return measure_latency(module, images, sizes, batch_size, options.runs, dtype)
        except RuntimeError as error:
            if is_out_of_memory(error):
                return None
            raise

    count = max(options.batch_size, MIN_IMAGES)
    if data is None:
        images, sizes = smooth_noise(image_size, count)
    else:
        images, sizes = load_images(data, module, image_size, count)
    images = images.to(module.device)
    single = latency(1)
    if single is None:
        raise InputError(f"{image_size} px: too little memory for one image")
    batch = latency(options.batch_size)
    accuracy: dict[str, float | None] = dict.fromkeys(METRICS[isinstance(module, DetectorModule)])
    if data is not None:
        accuracy = measure_accuracy(module, data, image_size, options.half)
    operations = billion_operations(module.network, image_size)
    return SizeResult(image_size, operations, single, batch, accuracy)


def load_images(
    data: CombinedDataModule, module: Module, image_size: int, count: int
) -> tuple[Tensor, Tensor]:
    """Read up to `count` test images, spread evenly over the source.

    Returns:
        Network inputs (N, 3, H, W), and int64 (N, 2), height and width of the original images, px.
    """
    source = data.test
    assert source is not None
    min_side = decoding_side(image_size, module.hparams["interpolation"])
    images, sizes, reason = [], [], "it has none"
    for index in sorted({k * len(source) // count for k in range(count)} if len(source) else ()):
        try:
            sample = source.read(index, min_side)
        except UnreadableSample as error:
            reason = str(error)
            continue
        if isinstance(module, DetectorModule):
            fitted, size_hw_orig = module.preprocess(sample.image, image_size)
        else:
            fitted, size_hw_orig = _centre_crop(module, sample[0], image_size)
        images.append(fitted)
        sizes.append(size_hw_orig)
    if not images:
        raise InputError(f"{source.name}: no test image can be read: {reason}")
    return torch.stack(images), torch.tensor(sizes)


def _centre_crop(module: Module, image: Image, image_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Return the network input of a classifier as in `test`, and the image's height and width."""
    crop = centre_crop(image, (image_size, image_size), module.hparams["interpolation"])
    return torch.from_numpy(crop).permute(2, 0, 1), (image.shape[0], image.shape[1])


def smooth_noise(image_size: int, count: int) -> tuple[Tensor, Tensor]:
    """Generate smooth random images from a fixed seed, as `load_images` does."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, _NOISE_CELLS, _NOISE_CELLS, generator=generator)
    smooth = F.interpolate(coarse, (image_size, image_size), mode="bilinear")
    return (255 * smooth).round().byte(), torch.full((count, 2), image_size)


def measure_accuracy(
    module: Module, data: CombinedDataModule, image_size: int, half: bool
) -> dict[str, float | None]:
    """Return `METRICS` on the test images, None without any of the classes; set the data's size."""
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
    metrics = tester.test(module, data, verbose=False)[0]
    module.eval().to(device)
    values = {name: metrics[f"test/{name}"] for name in METRICS[isinstance(module, DetectorModule)]}
    return {name: None if math.isnan(value) else value for name, value in values.items()}
