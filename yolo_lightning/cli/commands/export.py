"""`yolo-lightning export`: a detector as one graph, for other runtimes."""

import argparse
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from yolo_lightning.detections import Detections
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.export.graph import GraphSettings

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2"}

MOST_APART = 1e-3
"""How far a file's boxes, relative to the sides of the image, and scores may be from the module's.
Two runtimes of the same arithmetic differ by about 1e-6."""

COMPARED = (30, 100)
"""Least and most boxes, of all images, that the threshold of the check is lowered to."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning export",
        description="Write a detector as one graph, from pixels to boxes, scores and nodes, "
        "suppression included, and check it against the checkpoint.",
        epilog="The graph takes images (uint8 B x 3 x H x W, RGB, fitted) and sizes_hw_orig "
        "(int64 B x 2, px of the originals) and gives boxes_xyxy_orig_px (B x top x 4), scores "
        "(B x top, descending) and nodes (B x top, -1 where there are no more boxes). Names of "
        "the nodes and all settings travel in its metadata.",
    )
    parser.add_argument(
        "checkpoint",
        help="a detector; where training averaged its weights, the averages are exported",
    )
    parser.add_argument(
        "--format",
        choices=tuple(SUFFIXES),
        default="onnx",
        help="onnx, for ONNX Runtime and others (needs the extra `export`); torch-export, a .pt2 "
        "for torch.export.load, which needs torch alone where it runs (onnx)",
    )
    parser.add_argument("--output", help="the file; CHECKPOINT.onnx or .pt2 in the working folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PX",
        help="what the metadata tells and the check uses; the model's own. The graph takes any",
    )
    parser.add_argument("--top", type=int, default=100, help="rows given for each image (100)")
    parser.add_argument(
        "--score-threshold", type=float, default=0.25, help="least score of a box (0.25)"
    )
    parser.add_argument(
        "--tree-threshold",
        type=float,
        default=0.5,
        help="how probable a node is down to which the tree is descended (0.5)",
    )
    parser.add_argument(
        "--iou-threshold", type=float, help="of non-maximum suppression; the checkpoint's"
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("score_threshold", "tree_threshold", "iou_threshold"):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; allowed: 0 … 1")
    for name in ("top", "image_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    for package in ("onnx", "onnxscript", "onnxruntime") if options.format == "onnx" else ():
        try:
            import_module(package)
        except ImportError as error:
            raise InputError(
                f"--format onnx needs {package} ({error}): pip install 'yolo-lightning[export]'"
            ) from None


def _output(options: argparse.Namespace) -> Path:
    """Return the file to write; a file that exists only where it may be replaced."""
    name = Path(options.checkpoint).stem + SUFFIXES[options.format]
    output = Path(options.output or name).expanduser()
    if output.is_dir() or not output.name:
        raise InputError(f"--output {options.output!r} is a folder; expected a file to write")
    if output.exists() and not options.overwrite:
        raise InputError(f"{output} exists; --overwrite replaces it, --output names another")
    return output


def _folder_beside(output: Path) -> "tempfile.TemporaryDirectory[str]":
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{output} cannot be written: {error.filename}: {reason}") from None


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
        return self.of_boxes <= MOST_APART and self.of_scores <= MOST_APART


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


def main(argv: Sequence[str]) -> None:
    """Write a detector's graph and check it.

    Raises:
        InputError: a bad option, no detector, a file that cannot be written, or one that does
            not do what the checkpoint does, which is not kept.
    """
    options = _parser().parse_args(list(argv))
    _check(options)
    output = _output(options)
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.loading import load

    module = load(options.checkpoint)
    if not isinstance(module, DetectorModule):
        raise InputError(f"{options.checkpoint}: holds a classifier; export takes a detector")
    with _folder_beside(output) as folder:
        fresh = Path(folder) / output.name
        _write_checked(module, options, fresh, output)
        os.replace(fresh, output)


def _write_checked(
    module: "DetectorModule", options: argparse.Namespace, fresh: Path, output: Path
) -> None:
    from yolo_lightning.export import graph

    size_hw = module.size_hw(options.image_size)
    if options.iou_threshold is not None:
        module.iou_threshold = options.iou_threshold
    settings = graph.GraphSettings(
        module.hparams["resize"],
        options.score_threshold,
        options.tree_threshold,
        module.iou_threshold,
        options.top,
    )
    to_onnx = options.format == "onnx"
    write = graph.write_onnx if to_onnx else graph.write_torch
    start = time.perf_counter()
    write(module.network, module.tree, settings, fresh, metadata_of(module, settings, size_hw))
    seconds = time.perf_counter() - start
    # two boxes may be so nearly equal that rounding decides which suppresses the other: ask twice
    opened = (open_onnx if to_onnx else open_torch)(fresh)
    for seed in range(2):
        found = compare(module, opened, settings, size_hw, seed)
        if found.close:
            break
    differs = (
        f"maximum difference {max(found.of_boxes, found.of_scores):.1e} (boxes "
        f"{found.of_boxes:.1e} of the image's sides, scores {found.of_scores:.1e} of the score)"
    )
    if not found.close:
        raise InputError(
            f"{output}: differs from the checkpoint, {differs}; allowed: {MOST_APART}. Not kept"
        )
    stride = module.network.stride
    print(
        f"{shlex.quote(str(output))}: {fresh.stat().st_size / 2**20:.1f} MiB, written in "
        f"{seconds:.0f} s; up to {settings.top} boxes an image, any number of images, of sizes in "
        f"multiples of {stride} px from {stride if to_onnx else 2 * stride} px on"
    )
    print(f"  checked: {found.boxes} boxes of {found.images} images, {differs}")
