"""Metadata of exported graphs, and their comparison with the module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from yolo_lightning.detections import Detections
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.export.graph import GraphSettings


MAX_DIFFERENCE = 1e-3
"""Maximum relative difference of boxes (to the sides of the image) and scores. Two runtimes usually
differ by about 1e-6."""


COMPARED_BOXES = (30, 100)
"""Minimum and maximum number of boxes that the lowered threshold of the check selects."""


def metadata_of(
    module: "DetectorModule", settings: "GraphSettings", size_hw: tuple[int, int]
) -> dict[str, Any]:
    """Return the metadata of a graph's file; size_hw is the recommended network input, px."""
    from yolo_lightning.version import __version__

    return {
        "yolo_lightning": __version__,
        "names": list(module.tree.names),
        "keys": list(module.tree.keys),
        "parents": module.tree.parents.tolist(),
        "resize": settings.resize,
        "image_size_hw": list(size_hw),
        "stride": module.network.stride,
        "anchors_wh_cell": module.network.anchors_wh_cell.tolist(),
        "score_threshold": settings.score_threshold,
        "tree_threshold": settings.tree_threshold,
        "iou_threshold": settings.iou_threshold,
        "top": settings.top,
    }


Runner = Callable[["Tensor", "Tensor"], "Sequence[Tensor]"]
"""Runs a graph: maps its inputs to its outputs."""


RunnerFactory = Callable[[float | None], Runner]
"""Returns a graph with another score threshold; None for the file's threshold."""


def open_onnx(path: Path) -> RunnerFactory:
    """Open a graph in ONNX Runtime."""
    import numpy as np
    import onnx
    import onnxruntime
    import torch

    from yolo_lightning.export.graph import INPUTS, OUTPUTS, SCORE_THRESHOLD

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway

    def at(score_threshold: float | None) -> Runner:
        source: Path | bytes = path
        if score_threshold is not None:
            model = onnx.load(path)
            (initializer,) = (x for x in model.graph.initializer if x.name == SCORE_THRESHOLD)
            value = np.array(score_threshold, dtype=np.float32)
            initializer.CopyFrom(onnx.numpy_helper.from_array(value, SCORE_THRESHOLD))
            source = model.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

        def run(*inputs: "Tensor") -> "Sequence[Tensor]":
            arrays = [tensor.numpy() for tensor in inputs]
            outputs = session.run(OUTPUTS, dict(zip(INPUTS, arrays, strict=True)))
            return [torch.from_numpy(array) for array in outputs]

        return run

    return at


def open_torch(path: Path) -> RunnerFactory:
    """Open a graph in torch."""
    import torch

    from yolo_lightning.export.graph import SCORE_THRESHOLD

    graph: Any = torch.export.load(path).module()
    threshold = graph.get_buffer(SCORE_THRESHOLD)
    default = float(threshold)

    def at(score_threshold: float | None) -> Runner:
        def run(*inputs: "Tensor") -> "Sequence[Tensor]":
            threshold.fill_(default if score_threshold is None else score_threshold)
            outputs: Sequence[Tensor] = graph(*inputs)
            return outputs

        return run

    return at


@dataclass
class Comparison:
    """Maximum differences between an exported file and its module.

    Differences of boxes are relative to the sides of the image, those of scores to the score; 1 or
    more if a box is missing or has another node.
    """

    boxes: int
    images: int
    box_difference: float
    score_difference: float

    @property
    def is_close(self) -> bool:
        """Whether both differences are at most `MAX_DIFFERENCE`; False for NaN."""
        return self.box_difference <= MAX_DIFFERENCE and self.score_difference <= MAX_DIFFERENCE


def max_differences(
    expected: "Detections", actual: "Detections", size_hw_orig: Sequence[int]
) -> "Tensor":
    """Return the maximum differences, float (2,), of boxes and of scores; see `Comparison`.

    Detections are matched by similarity, because the order of nearly equal scores may differ.
    """
    import torch

    if not len(expected.scores) or not len(actual.scores):
        return torch.tensor([0.0, float(len(expected.scores) != len(actual.scores))])
    sides = torch.tensor([size_hw_orig[1], size_hw_orig[0]] * 2)
    corners = [detections.boxes_xyxy_orig_px / sides for detections in (expected, actual)]
    boxes = (corners[0][:, None] - corners[1]).abs().amax(dim=2)  # (N, M)
    scores = (expected.scores[:, None] - actual.scores).abs() / expected.scores[:, None]
    scores = scores + (expected.labels[:, None] != actual.labels)
    pairs = torch.stack([boxes, scores])  # (2, N, M)
    worst = []
    for dim in (0, 1):
        nearest = pairs.amax(dim=0).argmin(dim=dim, keepdim=True)
        worst.append(pairs.gather(dim + 1, nearest.expand(2, *nearest.shape)).flatten(1))
    return torch.cat(worst, dim=1).amax(dim=1)


def generate_inputs(
    size_hw: tuple[int, int], stride: int, seed: int
) -> "list[tuple[Tensor, Tensor]]":
    """Return batches of generated images and original sizes: two of one size, one of another.

    Smooth colours make neighbouring cells detect overlapping boxes, as objects do.
    """
    import torch
    import torch.nn.functional as F

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
        images = (255 * smooth).byte()
        batches.append((images, torch.tensor(sizes)))
    return batches


def find_threshold(scores: "Tensor", min_count: int, max_count: int) -> float:
    """Return a threshold that `min_count` … `max_count` scores exceed, in the widest gap.

    Two runtimes then select the same boxes, although the last digits of their scores differ.
    """
    import torch

    ranked = scores.sort(descending=True).values[: max_count + 1]
    ratios = ranked[:-1] / ranked[1:]
    if len(ratios) < min_count:
        return 0.0
    rank = min_count - 1 + int(ratios[min_count - 1 :].nan_to_num(1.0).argmax())
    return float(torch.sqrt(ranked[rank] * ranked[rank + 1]))


def compare(
    module: "DetectorModule",
    open_runner: RunnerFactory,
    settings: "GraphSettings",
    size_hw: tuple[int, int],
    seed: int = 0,
) -> Comparison:
    """Compare an exported file with the module, on generated images of two sizes.

    The images contain no objects, so the file is also run with a lower score threshold that some
    boxes exceed. The module has the IoU threshold of the file.

    Raises:
        InputError: no box of the module has a score above 0.
    """
    import torch

    from yolo_lightning.detections import Detections

    inputs = generate_inputs(size_hw, module.network.stride, seed)
    all_detections = [
        detections
        for images, sizes in inputs
        for detections in module.detect_most_specific(images, sizes, 0.0, settings.tree_threshold)
    ]
    scores = torch.cat([detections.scores for detections in all_detections])
    if not len(scores):
        raise InputError("no box of the detector has a score above 0, so no check is possible")
    min_count, max_count = (min(count, settings.top) for count in COMPARED_BOXES)
    lowered = find_threshold(scores, min_count, max_count)
    num_boxes, differences = 0, []
    for threshold in (None, lowered):
        run, remaining = open_runner(threshold), iter(all_detections)
        score_threshold = settings.score_threshold if threshold is None else threshold
        for images, sizes in inputs:
            for *rows, size in zip(*run(images, sizes), sizes.tolist(), strict=True):
                expected = next(remaining)
                selected = (expected.scores > score_threshold).nonzero().flatten()
                expected = expected.select(selected[: settings.top])
                actual = Detections(rows[0], rows[2], rows[1]).select(rows[2] >= 0)
                differences.append(max_differences(expected, actual, size))
                num_boxes += len(expected.scores)
    box_difference, score_difference = torch.stack(differences).amax(dim=0).tolist()
    return Comparison(num_boxes, len(all_detections), box_difference, score_difference)
