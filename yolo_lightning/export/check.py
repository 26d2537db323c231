"""Metadata of an exported graph, and its comparison with the checkpoint."""

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


MAX_APART = 1e-3
"""How far a file's boxes, relative to the sides of the image, and scores may be from the module's.
Two runtimes of the same arithmetic differ by about 1e-6."""


COMPARED = (30, 100)
"""Least and most boxes, of all images, that the threshold of the check is lowered to."""


def metadata_of(
    module: "DetectorModule", settings: "GraphSettings", size_hw: tuple[int, int]
) -> dict[str, Any]:
    """Return what a graph's file says of itself, as plain values.

    Args:
        module: the detector.
        settings: of the graph.
        size_hw: height and width of the network input that images are best fitted into, px.
    """
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
"""A graph's inputs to its outputs."""


Opened = Callable[[float | None], Runner]
"""A file's graph at a score threshold; at its own for None."""


def open_onnx(path: Path) -> Opened:
    """Return a file's graph in ONNX Runtime."""
    import numpy as np
    import onnx
    import onnxruntime
    import torch

    from yolo_lightning.export.graph import INPUTS, OUTPUTS, SCORE_THRESHOLD

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised

    def at(score_threshold: float | None) -> Runner:
        source: Path | bytes = path
        if score_threshold is not None:
            model = onnx.load(path)
            (own,) = (part for part in model.graph.initializer if part.name == SCORE_THRESHOLD)
            value = np.array(score_threshold, dtype=np.float32)
            own.CopyFrom(onnx.numpy_helper.from_array(value, SCORE_THRESHOLD))
            source = model.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])

        def run(*inputs: "Tensor") -> "Sequence[Tensor]":
            arrays = [tensor.numpy() for tensor in inputs]
            outputs = session.run(OUTPUTS, dict(zip(INPUTS, arrays, strict=True)))
            return [torch.from_numpy(array) for array in outputs]

        return run

    return at


def open_torch(path: Path) -> Opened:
    """Return a file's graph in torch."""
    import torch

    from yolo_lightning.export.graph import SCORE_THRESHOLD

    graph: Any = torch.export.load(path).module()
    threshold = graph.get_buffer(SCORE_THRESHOLD)
    own = float(threshold)

    def at(score_threshold: float | None) -> Runner:
        def run(*inputs: "Tensor") -> "Sequence[Tensor]":
            threshold.fill_(own if score_threshold is None else score_threshold)
            outputs: Sequence[Tensor] = graph(*inputs)
            return outputs

        return run

    return at


@dataclass
class Comparison:
    """How far a file is from the module that it was made of.

    Attributes:
        boxes: how many of the module's boxes took part.
        images: how many images these are of.
        of_boxes: largest difference of a corner, relative to the sides of the original image.
        of_scores: largest difference of a score, relative to the score; 1 or more where a box has
            no counterpart or another node.
    """

    boxes: int
    images: int
    of_boxes: float
    of_scores: float

    @property
    def close(self) -> bool:
        """Whether both differences are allowed; what is no number is not."""
        return self.of_boxes <= MAX_APART and self.of_scores <= MAX_APART


def apart(ours: "Detections", theirs: "Detections", size_hw_orig: Sequence[int]) -> "Tensor":
    """Return the largest differences, float (2,), of boxes and of scores; see `Comparison`.

    Each detection of either is compared with the nearest one of the other, since nearly equal
    scores may stand in another order.
    """
    import torch

    if not len(ours.scores) or not len(theirs.scores):
        return torch.tensor([0.0, float(len(ours.scores) != len(theirs.scores))])
    sides = torch.tensor([size_hw_orig[1], size_hw_orig[0]] * 2)
    corners = [found.boxes_xyxy_orig_px / sides for found in (ours, theirs)]
    of_boxes = (corners[0][:, None] - corners[1]).abs().amax(dim=2)  # (N, M)
    of_scores = (ours.scores[:, None] - theirs.scores).abs() / ours.scores[:, None]
    of_scores = of_scores + (ours.labels[:, None] != theirs.labels)
    pairs = torch.stack([of_boxes, of_scores])  # (2, N, M)
    worst = []
    for dim in (0, 1):
        nearest = pairs.amax(dim=0).argmin(dim=dim, keepdim=True)
        worst.append(pairs.gather(dim + 1, nearest.expand(2, *nearest.shape)).flatten(1))
    return torch.cat(worst, dim=1).amax(dim=1)


def cases(size_hw: tuple[int, int], stride: int, seed: int) -> "list[tuple[Tensor, Tensor]]":
    """Return generated images, and sizes of originals: two at a size, one at another.

    Colours that flow into each other make neighbouring cells find overlapping boxes, as objects do.
    """
    import torch
    import torch.nn.functional as F

    random = torch.Generator().manual_seed(seed)
    height, width = (max(side, 2 * stride) for side in size_hw)
    found = []
    for h, w, sizes in (
        (height, width, [[2 * height + 1, width], [height, 3 * width - 1]]),
        (height + stride, width + 2 * stride, [[width, height]]),
    ):
        blots = (h // (2 * stride) + 1, w // (2 * stride) + 1)
        colours = torch.rand(len(sizes), 3, *blots, generator=random)
        smooth = F.interpolate(colours, (h, w), mode="bicubic").clamp(0, 1)
        images = (255 * smooth).byte()
        found.append((images, torch.tensor(sizes)))
    return found


def threshold_within(scores: "Tensor", least: int, most: int) -> float:
    """Return a threshold that `least` … `most` scores pass, where they lie furthest apart.

    Two runtimes then agree about what passes, though neither about a score's last digits.
    """
    import torch

    ranked = scores.sort(descending=True).values[: most + 1]
    ratios = ranked[:-1] / ranked[1:]
    if len(ratios) < least:
        return 0.0
    rank = least - 1 + int(ratios[least - 1 :].nan_to_num(1.0).argmax())
    return float(torch.sqrt(ranked[rank] * ranked[rank + 1]))


def compare(
    module: "DetectorModule",
    opened: Opened,
    settings: "GraphSettings",
    size_hw: tuple[int, int],
    seed: int = 0,
) -> Comparison:
    """Return how far a file is from the module, on generated images of two sizes.

    Such images hold no objects: besides the file as it is, it runs with its score threshold
    lowered so far that boxes of the module pass.

    Args:
        module: the detector; its own IoU threshold is the file's.
        opened: the file's graph.
        settings: of the graph.
        size_hw: height and width of a network input, px.
        seed: of the images.

    Raises:
        InputError: no box of the module scores more than 0.
    """
    import torch

    from yolo_lightning.detections import Detections

    given = cases(size_hw, module.network.stride, seed)
    every = [
        found
        for images, sizes in given
        for found in module.describe(images, sizes, 0.0, settings.tree_threshold)
    ]
    scores = torch.cat([found.scores for found in every])
    if not len(scores):
        raise InputError("no box of the detector scores more than 0: there is nothing to compare")
    least, most = (min(count, settings.top) for count in COMPARED)
    lowered = threshold_within(scores, least, most)
    boxes, worst = 0, []
    for own in (None, lowered):
        run, left = opened(own), iter(every)
        for images, sizes in given:
            for *rows, size in zip(*run(images, sizes), sizes.tolist(), strict=True):
                ours = next(left)
                passed = ours.scores > (settings.score_threshold if own is None else own)
                ours = ours.chosen(passed.nonzero().flatten()[: settings.top])
                theirs = Detections(rows[0], rows[2], rows[1]).chosen(rows[2] >= 0)
                worst.append(apart(ours, theirs, size))
                boxes += len(ours.scores)
    of_boxes, of_scores = torch.stack(worst).amax(dim=0).tolist()
    return Comparison(boxes, len(every), of_boxes, of_scores)
