"""Defaults of `init` for this machine: network, image size, precision, batch and steps."""

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from yolo_lightning.datamodules.source import DetectionSource
from yolo_lightning.images import UnreadableSample
from yolo_lightning.models.anchors import scale_to_letterbox
from yolo_lightning.models.backbones import backbone_layers, detector_layers
from yolo_lightning.models.networks import YOLOv2

CPU_MINUTES = 15
_TRAINING_SHARE = 0.85  # of the time; the rest is for starting and validation
WEIGHTS = {
    "tiny_darknet": ("TINY_DARKNET", "datasets/tiny.weights"),
    "darknet19": ("DARKNET19_448", "datasets/darknet19_448.conv.23"),
}
"""Where pretrained backbones are looked for: an environment variable, a file."""

_PASSES, _MIN_STEPS, _MAX_STEPS = 60, 1500, 80_000
_LARGE_BYTES, _LARGE_IMAGES = 16 * 2**20, 1000  # a file of Darknet-19's weights; worth Darknet-19
_CPU_SIZES, _GPU_SIZE, _MIN_BOX_PX = (224, 320, 416), 416, 20
_TIMED_IMAGES, _TIMED_STEPS = 4, 3
_FIRST_VALIDATION_S, _VALIDATIONS = 60, 20


class Machine(NamedTuple):
    """What a training runs on."""

    gpus: int
    cores: int
    has_gpu_bf16: bool = False


@dataclass
class Settings:
    """What the recipe says about the machine."""

    image_size: int
    batch: int  # images, over all ranks
    workers: int
    precision: str
    step_s: float
    steps: int
    every: int  # steps from one validation to the next

    @property
    def duration(self) -> str:
        """The minutes as text."""
        return counted(self.minutes, "minute")

    @property
    def minutes(self) -> float:
        """How long the training takes about, with starting and validation."""
        return self.steps * self.step_s / 60 / _TRAINING_SHARE


def counted(number: float, noun: str) -> str:
    """Return a rounded number, at least 1, with its noun."""
    whole = max(1, round(number))
    return f"{whole:,} {noun}{'' if whole == 1 else 's'}"


def find_machine() -> Machine:
    """Return what this machine has."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return Machine(gpus, cores, gpus > 0 and torch.cuda.is_bf16_supported())


def choose_backbone(pretrained: str | None, machine: Machine, images: int) -> str:
    """Return the backbone of a file of weights, else one that the machine can train."""
    if pretrained is not None:
        return "darknet19" if os.path.getsize(pretrained) > _LARGE_BYTES else "tiny_darknet"
    return "darknet19" if machine.gpus and images >= _LARGE_IMAGES else "tiny_darknet"


def find_weights(backbone: str) -> str | None:
    """Return the pretrained weights of a backbone, if they are in their usual place."""
    variable, file = WEIGHTS.get(backbone, ("", ""))
    places = [os.environ.get(variable, ""), file]
    return next((place for place in places if place and Path(place).is_file()), None)


def choose_image_size(boxes: DetectionSource, machine: Machine) -> int:
    """Return a size at which most boxes are large enough, px."""
    if machine.gpus:
        return _GPU_SIZE
    shapes = boxes.shapes_wh_px()
    sides = {size: scale_to_letterbox(*shapes, size).min(axis=1) for size in _CPU_SIZES}
    fitting = (size for size in _CPU_SIZES if np.median(sides[size]) >= _MIN_BOX_PX)
    return next(fitting, _CPU_SIZES[-1])


def choose_settings(
    options: argparse.Namespace,
    machine: Machine,
    boxes: DetectionSource,
    validation_images: int,
    network: Mapping[str, Any],
    ratio: int,
) -> Settings:
    """Choose what suits the machine, by the time of a few steps."""
    size = options.image_size or choose_image_size(boxes, machine)
    batch = 16 if not machine.gpus or len(boxes) < _LARGE_IMAGES else 64
    gpus = max(1, machine.gpus)
    batch = -(-batch // gpus) * gpus
    workers = min(8, max(1, machine.cores // gpus))
    precision, step_s = _fastest(network, size, batch, machine)
    read_s = _read_seconds(boxes, size) * batch
    step_s = max(step_s, read_s / (workers * gpus)) if machine.gpus else step_s + read_s / workers
    passes = _PASSES * max(1, len(boxes) // batch) * (1 + ratio)
    steps = int(np.clip(passes, _MIN_STEPS, _MAX_STEPS))
    minutes = options.minutes or (None if machine.gpus else CPU_MINUTES)
    if minutes is not None:
        steps = max(100, min(steps, int(_TRAINING_SHARE * 60 * minutes / step_s) // 10 * 10))
    every = max(1, steps // _VALIDATIONS)
    if not machine.gpus:
        every = min(every, max(20, int(_FIRST_VALIDATION_S / step_s)))
    # all validations together take up to about a fifth of the time
    every = min(steps, max(every, round(5 / 3 * validation_images / batch)))
    return Settings(size, batch, workers, precision, step_s, steps, every)


def _fastest(
    network: Mapping[str, Any], size: int, batch: int, machine: Machine
) -> tuple[str, float]:
    """Return the precision to train with and the seconds of a step; bfloat16 is slow on some."""
    if machine.gpus:
        precision = "bf16-mixed" if machine.has_gpu_bf16 else "32-true"
        return precision, measure_step(network, size, batch // machine.gpus, "cuda", precision)
    images = min(_TIMED_IMAGES, batch)
    seconds = {
        precision: measure_step(network, size, images, "cpu", precision) * batch / images
        for precision in ("32-true", "bf16-mixed")
    }
    precision = "bf16-mixed" if seconds["bf16-mixed"] < 0.8 * seconds["32-true"] else "32-true"
    return precision, seconds[precision]


def measure_step(
    network: Mapping[str, Any], size: int, images: int, device: str, precision: str
) -> float:
    """Return the seconds of the forward and backward pass of a batch, the fastest of a few.

    On a CPU these are the seconds of idle cores: what other programs take is not counted.
    """
    layers = detector_layers(
        backbone_layers(network["backbone"]),
        network["head_channels"],
        network["passthrough_channels"],
        network["reorg"],
    )
    model = YOLOv2(layers, 1, torch.ones(5, 2)).to(device)
    batch = torch.rand(images, 3, size, size, device=device)
    clock = _gpu_clock if device == "cuda" else time.process_time
    seconds = []
    for _ in range(_TIMED_STEPS):
        started = clock()
        with torch.autocast(device, torch.bfloat16, enabled=precision != "32-true"):
            loss = model(batch).box_logits.float().square().mean()
        loss.backward()
        seconds.append(clock() - started)
    return min(seconds) / (1 if device == "cuda" else torch.get_num_threads())


def _gpu_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _read_seconds(boxes: DetectionSource, size: int) -> float:
    """Return the seconds to decode and augment an image."""
    indices = np.linspace(0, len(boxes) - 1, min(8, len(boxes))).astype(int).tolist()
    started = time.process_time()
    for index in indices:
        try:
            boxes.read(index, size)
        except UnreadableSample:
            continue
    return 1.5 * (time.process_time() - started) / len(indices)
