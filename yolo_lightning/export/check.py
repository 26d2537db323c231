"""Metadata of exported graphs, and their comparison with the module."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_lightning.detections import Detections
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.export.graph import INPUTS, OUTPUTS, SCORE_THRESHOLD, GraphSettings
from yolo_lightning.version import __version__

MAX_DIFFERENCE = 1e-3
"""Maximum relative difference of boxes (to the sides of the image) and scores. Two runtimes usually
differ by about 1e-6."""

Batch = tuple[Tensor, Tensor]
"""The inputs of a graph: images and their original sizes."""

Runner = Callable[[Path, Sequence[Batch], float | None], list[Sequence[Tensor]]]
"""Returns the outputs of a file for each batch; None stands for the file's score threshold."""


def metadata_of(
    module: DetectorModule, settings: GraphSettings, size_hw: tuple[int, int]
) -> dict[str, Any]:
    """Return the metadata of a graph's file; size_hw is the recommended network input, px."""
    return {
        "yolo_lightning": __version__,
        "names": list(module.tree.names),
        "keys": list(module.tree.keys),
        "parents": module.tree.parents.tolist(),
        "image_size_hw": list(size_hw),
        "stride": module.network.stride,
        "anchors_wh_cell": module.network.anchors_wh_cell.tolist(),
        **asdict(settings),
    }


def run_onnx(
    path: Path, batches: Sequence[Batch], score_threshold: float | None = None
) -> list[Sequence[Tensor]]:
    """Run a graph in ONNX Runtime; see `Runner`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    if score_threshold is not None:
        value = np.array(score_threshold, dtype=np.float32)
        threshold = onnxruntime.OrtValue.ortvalue_from_numpy(value)  # must outlive the session
        options.add_initializer(SCORE_THRESHOLD, threshold)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs: list[Sequence[Tensor]] = []
    for batch in batches:
        arrays = [tensor.numpy() for tensor in batch]
        found = session.run(OUTPUTS, dict(zip(INPUTS, arrays, strict=True)))
        outputs.append([torch.from_numpy(array) for array in found])
    return outputs


def run_torch(
    path: Path, batches: Sequence[Batch], score_threshold: float | None = None
) -> list[Sequence[Tensor]]:
    """Run a graph in torch; see `Runner`."""
    graph: Any = torch.export.load(path).module()
    if score_threshold is not None:
        graph.get_buffer(SCORE_THRESHOLD).fill_(score_threshold)
    return [graph(*batch) for batch in batches]


def max_difference(expected: Detections, actual: Detections, size_hw_orig: Sequence[int]) -> Tensor:
    """Return the maximum difference between each box and the most similar one of the other side.

    Differences are relative: of boxes to the sides of the image, of scores to the score. The result
    is 1 or more if a box is missing or has another node, and NaN if a value is.
    """
    if not len(expected.scores) or not len(actual.scores):
        return torch.tensor(float(len(expected.scores) != len(actual.scores)))
    sides = torch.tensor([size_hw_orig[1], size_hw_orig[0]] * 2)
    corners = [detections.boxes_xyxy_orig_px / sides for detections in (expected, actual)]
    boxes = (corners[0][:, None] - corners[1]).abs().amax(dim=2)  # (N, M)
    scores = (expected.scores[:, None] - actual.scores).abs() / expected.scores[:, None]
    pairs = torch.maximum(boxes, scores + (expected.labels[:, None] != actual.labels))
    return torch.cat([pairs.amin(dim=0), pairs.amin(dim=1)]).amax()


def generate_inputs(
    size_hw: tuple[int, int], stride: int, seed: int, dtype: torch.dtype = torch.uint8
) -> list[Batch]:
    """Return batches of generated images and original sizes: two of one size, one of another.

    Smooth colours make neighbouring cells detect overlapping boxes, as objects do.
    """
    random = torch.Generator().manual_seed(seed)
    height, width = (max(side, 2 * stride) for side in size_hw)
    batches = []
    for h, w, sizes in (
        (height, width, [[2 * height + 1, width], [height, 3 * width - 1]]),
        (height + stride, width + 2 * stride, [[width, height]]),
    ):
        grid = (h // (2 * stride) + 1, w // (2 * stride) + 1)
        colours = torch.rand(len(sizes), 3, *grid, generator=random)
        smooth = F.interpolate(colours, (h, w), mode="bicubic").clamp(0, 1)
        images = (255 * smooth).byte() if dtype == torch.uint8 else smooth
        batches.append((images, torch.tensor(sizes)))
    return batches


def find_threshold(scores: Tensor, min_count: int, max_count: int) -> float:
    """Return a threshold that `min_count` … `max_count` scores exceed, in the widest gap.

    Two runtimes then select the same boxes, although the last digits of their scores differ.
    """
    ranked = scores.sort(descending=True).values[: max_count + 1]
    if len(ranked) <= min_count:
        return 0.0
    rank = min_count + int((ranked[min_count - 1 : -1] / ranked[min_count:]).argmax())
    return float(torch.sqrt(ranked[rank - 1] * ranked[rank]))


def compare(
    module: DetectorModule,
    path: Path,
    run: Runner,
    settings: GraphSettings,
    size_hw: tuple[int, int],
    seed: int = 0,
) -> tuple[int, int, float]:
    """Compare an exported file with the module, on generated images of two sizes.

    The images contain no objects, so the file is also run with a lower score threshold that some
    boxes exceed. The module has the IoU threshold of the file.

    Returns:
        The number of boxes, of images, and the maximum of `max_difference`.

    Raises:
        InputError: no box of the module has a score above 0.
    """
    batches = generate_inputs(size_hw, module.network.stride, seed, settings.images_dtype)
    sizes = [size for _, batch_sizes in batches for size in batch_sizes.tolist()]
    all_detections = [
        detections
        for batch in batches
        for detections in module.detect_most_specific(*batch, 0.0, settings.tree_threshold)
    ]
    all_scores = torch.cat([detections.scores for detections in all_detections])
    if not len(all_scores):
        raise InputError("no box of the detector has a score above 0, so no check is possible")
    lowered = find_threshold(all_scores, min(30, settings.top), min(100, settings.top))
    num_boxes, differences = 0, []
    for threshold in (None, lowered):
        outputs = run(path, batches, threshold)
        images = [image for batch in outputs for image in zip(*batch, strict=True)]
        minimum = settings.score_threshold if threshold is None else threshold
        for detections, image, size in zip(all_detections, images, sizes, strict=True):
            selected = (detections.scores > minimum).nonzero().flatten()
            expected = detections.select(selected[: settings.top])
            boxes, scores, nodes = image
            actual = Detections(boxes, nodes, scores).select(nodes >= 0)
            differences.append(max_difference(expected, actual, size))
            num_boxes += len(expected.scores)
    return num_boxes, len(sizes), float(torch.stack(differences).amax())
