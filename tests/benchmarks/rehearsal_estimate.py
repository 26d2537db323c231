"""What the chain of trainings would need on GPUs: computed, not measured."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from yolo_lightning.models.backbones import backbone_layers, detector_layers
from yolo_lightning.models.networks import YOLOv2

IMAGENET_1K, COCO = 1_281_167, 118_287  # images
SHARE = 0.2  # of the peak, that a training reaches: assumed
EFFICIENCY = 0.9  # of several GPUs against one: assumed
# dense bfloat16, operations per second, by the data sheets
PEAKS = {"A100": 312e12, "H200": 989e12}
LINK_BYTES_S = 100e9 / 8  # 100 Gbit/s
DETECTOR_SIZES = range(320, 609, 32)  # px


@dataclass(frozen=True)
class Stage:
    """A training of the chain."""

    name: str
    images: int
    operations: float  # of a forward pass, for one image


def stages() -> list[Stage]:
    """Return the four trainings of YOLO9000, at the lengths of their sources."""
    return [
        Stage("classify, 224 px: 160 epochs of ImageNet-1k", 160 * IMAGENET_1K, operations([224])),
        Stage("classify, 448 px: 10 epochs", 10 * IMAGENET_1K, operations([448])),
        Stage("detect COCO: 500,200 batches of 64", 500_200 * 64,
              operations(DETECTOR_SIZES, head_channels=1024, passthrough_channels=64)),
        Stage("joint: 500,200 batches of 64", 500_200 * 64, operations(DETECTOR_SIZES)),
    ]  # fmt: skip


def operations(
    sizes: Sequence[int], head_channels: int = 0, passthrough_channels: int = 0
) -> float:
    """Return the mean over image sizes of the operations of a forward pass of Darknet-19.

    The class scores are left out: a training computes those of few boxes only.
    """
    layers = detector_layers(
        backbone_layers("darknet19"), head_channels, passthrough_channels, "darknet"
    )
    with torch.device("meta"):
        body: nn.Module = YOLOv2(layers, 1, torch.empty(3, 2)).body
        total = 0
        for size in sizes:
            with FlopCounterMode(display=False) as counter:
                body(torch.empty(1, 3, size, size))
            total += counter.get_total_flops()
    return total / len(sizes)


def hours(stage: Stage, peak: float, gpus: int) -> float:
    """Return the estimated hours of a training; backward passes take twice a forward pass."""
    speed = SHARE * peak * gpus * (EFFICIENCY if gpus > 1 else 1.0)
    return 3 * stage.operations * stage.images / speed / 3600


def estimate(
    gradient_bytes: int,
    checkpoint_bytes: int,
    index_mib: dict[str, float],
    images_per_core_s: float,
) -> str:
    """Return what 1, 8 and 16 GPUs would need, as Markdown."""
    chain, counts = stages(), (1, 8, 16)
    columns = [(name, gpus) for name in PEAKS for gpus in counts]
    rows = [
        (
            stage.name, f"{stage.operations / 1e9:.1f}", f"{stage.images / 1e6:,.0f}",
            *(f"{hours(stage, PEAKS[name], gpus):,.1f}" for name, gpus in columns),
        )
        for stage in chain
    ]  # fmt: skip
    total = (sum(hours(s, PEAKS[name], gpus) for s in chain) for name, gpus in columns)
    rows.append(("**all**", "", "", *(f"**{value:,.0f}**" for value in total)))
    head = ["training", "billion operations", "million images",
            *(f"{gpus} x {name}, h" for name, gpus in columns)]  # fmt: skip
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    text = textwrap.fill(" ".join(_ASSUMPTIONS.split()), 130)
    rows = [
        ("images of the joint training", _speeds(chain[-1], images_per_core_s)),
        ("gradients that a rank sends in a step (ring, computed), and the time at 100 Gbit/s if "
         "nothing hides it", _traffic(gradient_bytes)),
        ("disk: COCO 2017 (published)", "19 GB of images, 0.8 GB of annotations"),
        ("disk: ImageNet-1k (published)", "145 GB"),
        ("disk: ImageNet-22k (published)", "about 1.3 TB"),
        ("disk: indices (measured)",
         ", ".join(f"{name} {mib:,.0f} MiB" for name, mib in index_mib.items())),
        ("disk: checkpoints of the joint training (`last`, `previous`, `best`)",
         f"3 x {checkpoint_bytes / 1e6:,.0f} MB"),
    ]  # fmt: skip
    needs = "\n".join(f"| {what} | {how_much} |" for what, how_much in rows)
    heading = "### What GPUs would need: an estimate"
    return f"{heading}\n\n{text}\n\n{table}\n\n| what | how much |\n| --- | --- |\n{needs}"


_ASSUMPTIONS = f"""No GPU was available, and nothing here is measured except sizes of files and of
gradients, and the speed of loading. Hours are **estimated** from operations: three forward passes
for each image, {SHARE:.0%} of the peak of dense bfloat16 by the data sheet (A100 312, H200 989
teraflops) reached, several GPUs at {EFFICIENCY:.0%} of their sum, detectors at the mean of 320 to
608 px, data that is ready in time, no validation. COCO is counted at the length of the `.cfg`; the
160 epochs of the paper are {160 * COCO / 1e6:.0f} million images."""


def _speeds(stage: Stage, images_per_core_s: float) -> str:
    """Return images a second of one GPU, and the cores that prepare them."""
    parts = []
    for name, peak in PEAKS.items():
        images_per_s = SHARE * peak / (3 * stage.operations)
        cores = math.ceil(images_per_s / images_per_core_s)
        parts.append(f"{images_per_s:,.0f} a second on one {name}, which {cores} cores prepare")
    return "; ".join(parts)


def _traffic(gradient_bytes: int) -> str:
    parts = []
    for ranks in (2, 8, 16):
        sent = 2 * (ranks - 1) / ranks * gradient_bytes
        parts.append(f"{ranks} ranks {sent / 1e6:,.0f} MB, {sent / LINK_BYTES_S * 1e3:.0f} ms")
    return "; ".join(parts)
