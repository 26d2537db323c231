"""Speed of a network: latency percentiles, time per stage, operation counts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from yolo_lightning.checkpoints.pretrained import last_conv
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.detector import DetectorModule
from yolo_lightning.models.head import HeadOutput, select_candidates
from yolo_lightning.models.layers import check_sizes
from yolo_lightning.models.networks import Classifier, YOLOv2

SCORE_THRESHOLD = 0.25  # the default of `detect`
WARM_UP = 3  # runs before the timed ones, for memory allocation and kernel selection


@dataclass(frozen=True)
class Timing:
    """Latency percentiles of a batch, from images on the device to detections or class logits."""

    batch_size: int
    median_ms: float
    p10_ms: float
    p90_ms: float
    network_share: float  # of the time, 0…1; the three shares add up to one
    decode_share: float
    suppression_share: float

    @property
    def images_per_second(self) -> float:
        """Return the throughput at the median latency."""
        return 1000 * self.batch_size / self.median_ms

    @classmethod
    def from_runs(cls, batch_size: int, runs: Sequence[tuple[float, float, float]]) -> "Timing":
        """Summarise runs, each given in seconds as (total, network, decoding)."""
        total, network, decode = np.array(runs).T
        p10, median, p90 = np.percentile(1000 * total, [10, 50, 90]).tolist()
        rest = (total - network - decode).clip(min=0)
        parts = np.median([network, decode, rest], axis=1)
        return cls(batch_size, median, p10, p90, *(parts / parts.sum()).tolist())


class SynchronizedClock:
    """Clock that waits for the work of a GPU before it returns the time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        """Synchronize and return `time.perf_counter`, seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure_latency(
    module: DetectorModule | ClassifierModule,
    images: Tensor,
    sizes_hw_orig: Tensor,
    batch_size: int,
    runs: int,
    dtype: torch.dtype = torch.float32,
) -> Timing:
    """Time batches, drawn in turn from the images, after `WARM_UP` runs that are not counted.

    A GPU is also synchronized after the network, to separate the stages of a detector. Decoding is
    timed again after each run; the rest, including the class prediction along the tree, counts as
    suppression. All of a classifier's time is the network's.
    The module is in evaluation mode, images are (N, 3, H, W) on its device, sizes int64 (N, 2), px;
    the network uses autocast unless `dtype` is float32.
    """
    clock = SynchronizedClock(images.device)
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
    seconds = []
    with torch.inference_mode(), autocast:
        for run in range(WARM_UP + runs):
            rows = (run * batch_size + torch.arange(batch_size)) % len(images)
            batch = images[rows.to(images.device)]
            if isinstance(module, ClassifierModule):
                start = clock()
                module(batch)
                total = clock() - start
                seconds.append((total, total, 0.0))
            else:
                seconds.append(_time_detection(module, batch, sizes_hw_orig[rows], clock))
    return Timing.from_runs(batch_size, seconds[WARM_UP:])


def _time_detection(
    detector: DetectorModule, images: Tensor, sizes_hw_orig: Tensor, clock: SynchronizedClock
) -> tuple[float, float, float]:
    """Return the seconds of one detection: in total, of the network, and of decoding again."""
    after_network: list[float] = []
    outputs: list[HeadOutput] = []

    def record(_module: nn.Module, _images: object, output: HeadOutput) -> None:
        after_network[:], outputs[:] = [clock()], [output]

    handle = detector.network.register_forward_hook(record)
    try:
        start = clock()
        detector.detect_most_specific(images, sizes_hw_orig, SCORE_THRESHOLD)
        total = clock() - start
    finally:
        handle.remove()
    start_decode = clock()
    anchors = detector.network.anchors_wh_cell
    for _ in select_candidates(outputs[0], anchors, SCORE_THRESHOLD).chunks():
        pass  # computes the class logits
    return total, after_network[0] - start, clock() - start_decode


def billion_operations(network: YOLOv2 | Classifier, image_size: int) -> float:
    """Count the operations for one image; a multiplication and an addition count as two.

    Includes the class scores of all boxes or cells, as other programs compute them, although these
    networks compute fewer. Only convolutions are counted, as in the original program. Runs on the
    meta device.
    """
    layers = network.body.layers
    check_sizes(layers, (image_size, image_size))
    with torch.device("meta"):
        shapes: YOLOv2 | Classifier
        if isinstance(network, Classifier):
            shapes = Classifier(layers, network.class_conv.out_channels)
        else:
            anchors = torch.empty(network.anchors_wh_cell.shape)
            shapes = YOLOv2(layers, network.class_weight.shape[1], anchors)
        with FlopCounterMode(display=False) as counter:
            features = shapes.body(torch.empty(1, 3, image_size, image_size))
            nn.functional.conv2d(features, *last_conv(shapes))
    return float(counter.get_total_flops()) / 1e9


def precision_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return a description of the network's precision."""
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float32:
        return f"{name} with autocast"
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    return f"{name}, convolutions in TF32 if supported" if tf32 else name


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means too little memory; CPUs have no error class for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
