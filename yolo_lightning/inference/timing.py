"""How fast a detector is: medians of timed runs, their parts, operations, and on what machine."""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from yolo_lightning.checkpoints.pretrained import last_conv
from yolo_lightning.detections import Detections
from yolo_lightning.errors import InputError
from yolo_lightning.models.head import HeadOutput, candidates
from yolo_lightning.models.layers import check_sizes
from yolo_lightning.models.networks import YOLOv2

SCORE_THRESHOLD = 0.25
"""The least score of what is described while the time is taken: what `detect` shows."""

WARM_UP = 3
"""Runs before those that count: memory is allocated, kernels are chosen."""


class Detector(Protocol):
    """What is timed; `DetectorModule` is one."""

    network: YOLOv2

    def describe(
        self, images: Tensor, sizes_hw_orig: Tensor, score_threshold: float = ...
    ) -> list[Detections]:
        """Return what is in a batch of images."""


@dataclass(frozen=True)
class Timing:
    """How long batches of one size take, from uint8 images on the device to detections.

    Attributes:
        images: in a batch.
        median_ms, low_ms, high_ms: of a batch: the median, and what 10 % and 90 % of the runs
            stayed below.
        network, decode, suppression: shares of the time, 0…1, which add up to one.
    """

    images: int
    median_ms: float
    low_ms: float
    high_ms: float
    network: float
    decode: float
    suppression: float

    @property
    def images_per_second(self) -> float:
        """Images that a second has time for."""
        return 1000 * self.images / self.median_ms

    @classmethod
    def of(cls, images: int, runs: Sequence[tuple[float, float, float]]) -> "Timing":
        """Return what the runs amount to.

        Args:
            images: in a batch.
            runs: of each the seconds in all, in the network, and in decoding.
        """
        total, network, decode = np.array(runs).T
        low, median, high = np.percentile(1000 * total, [10, 50, 90]).tolist()
        rest = (total - network - decode).clip(min=0)
        parts = np.median([network, decode, rest], axis=1)
        return cls(images, median, low, high, *(parts / parts.sum()).tolist())


class Clock:
    """Tells seconds once the device has done all that it was given.

    Args:
        device: GPUs work beside the program, and are waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        """Return seconds since an arbitrary moment."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(
    detector: Detector,
    images: Tensor,
    sizes_hw_orig: Tensor,
    batch_size: int,
    runs: int,
    dtype: torch.dtype = torch.float32,
) -> Timing:
    """Time batches that are drawn from these images in turn; some runs more come first, uncounted.

    A run is a batch's whole way: to floats, through the network, decoded, suppressed. A GPU is
    waited for after the network too, which tells the parts apart. Decoding is timed once more
    after each run, and the rest of the run counts as suppression; naming boxes along the tree
    belongs to it.

    Args:
        detector: in evaluation mode.
        images: uint8 (N, 3, H, W), on the detector's device.
        sizes_hw_orig: int64 (N, 2), px of the original images.
        batch_size: images in a batch.
        runs: that count.
        dtype: of the network's arithmetic, by autocast unless float32.
    """
    clock = Clock(images.device)
    after_network: list[float] = []
    outputs: list[HeadOutput] = []

    def note(_module: nn.Module, _images: object, output: HeadOutput) -> None:
        after_network[:], outputs[:] = [clock()], [output]

    found = []
    handle = detector.network.register_forward_hook(note)
    half = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
    try:
        with torch.inference_mode(), half:
            for run in range(WARM_UP + runs):
                rows = (run * batch_size + torch.arange(batch_size)) % len(images)
                batch, sizes = images[rows.to(images.device)], sizes_hw_orig[rows]
                start = clock()
                detector.describe(batch, sizes, SCORE_THRESHOLD)
                total = clock() - start
                start_decode = clock()
                candidates(outputs[0], detector.network.anchors_wh_cell, SCORE_THRESHOLD)
                found.append((total, after_network[0] - start, clock() - start_decode))
    finally:
        handle.remove()
    return Timing.of(batch_size, found[WARM_UP:])


def operations(network: YOLOv2, image_size: int) -> float:
    """Return billions of operations for one image, multiplications and additions one each.

    Counted with the class scores of every box, as other programs compute them; here they are
    computed for the boxes above the threshold alone. Builds the network's shapes, not its values.

    Args:
        network: any YOLOv2.
        image_size: side of the network input, px.

    Raises:
        InputError: layers that do not fit together at this size.
    """
    layers, nodes = network.body.layers, network.class_weight.shape[1]
    check_sizes(layers, (image_size, image_size))
    with torch.device("meta"):
        shapes = YOLOv2(layers, nodes, torch.empty(network.anchors_wh_cell.shape))
        with FlopCounterMode(display=False) as counter:
            features = shapes.body(torch.empty(1, 3, image_size, image_size))
            nn.functional.conv2d(features, *last_conv(shapes))
    return float(counter.get_total_flops()) / 1e9


def usable_device(name: str | None) -> torch.device:
    """Return the device of that name; without one a GPU where there is one, else the CPU.

    Raises:
        InputError: a kind whose work cannot be waited for here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device is {name!r}; allowed: cpu, cuda, cuda:1 …")
    return device


def device_name(device: torch.device) -> str:
    """Return what the processor or the graphics card calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def precision_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return the arithmetic of the network in words."""
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float32:
        return f"{name} by autocast"
    fast = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return f"{name}, convolutions in TF32 where the GPU has it" if fast else name


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether there was too little memory; CPUs have no class of errors for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
