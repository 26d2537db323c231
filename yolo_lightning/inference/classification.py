"""Naming whole images, with a classifier or a detector."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import libstb
import torch
from torch import Tensor

from yolo_lightning.batches import stack_images, unit_range
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError, require_path
from yolo_lightning.images import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    Image,
    UnreadableSample,
    centre_crop,
    check_image,
    decode_image,
    decoding_side,
    fit,
    read_file,
    resize_image,
)

Preparation = Literal["crop", "letterbox", "stretch", "shorter-side"]

MAX_SIDE = 8192  # of the network input, px; thin images reach it with `shorter-side`


def find_images(locations: Sequence[str]) -> Iterator[Path]:
    """Yield image files; folders are searched recursively, and must hold an image."""
    for location in locations:
        path = require_path(location)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise InputError(f"{location!r}: holds no images {IMAGE_SUFFIXES}")
            yield from files
        else:
            yield path


def prepare(
    file: Path | bytes,
    module: ClassifierModule | DetectorModule,
    size_hw: tuple[int, int],
    resize: Preparation,
) -> Tensor:
    """Return an image file as network input (1, 3, H, W), with the module's interpolation.

    Args:
        file: path of the image, or its encoded bytes.
        module: that the input is for.
        size_hw: height and width of the network input, px.
        resize: `crop` is the central window, as in validation on image labels; `letterbox` is the
            whole image on grey; `stretch` changes its aspect ratio; `shorter-side` makes the
            network input larger than `size_hw`, so that it shows the whole image.

    Raises:
        UnreadableSample: missing, not an image, damaged, beyond a limit, or too thin.

    Source: the original program's `classifier predict`, for `letterbox` and `darknet`.
    """
    interpolation = module.hparams["interpolation"]
    data, name = (file, "image") if isinstance(file, bytes) else (read_file(file), str(file))
    is_darknets_way = resize == "letterbox" and interpolation == "darknet"
    if is_darknets_way and isinstance(module, ClassifierModule):  # a detector reads as `detect`
        image, size_hw_orig = _decode_as_darknet(data, name)
    else:
        min_side = decoding_side(max(size_hw), interpolation)
        image, size_hw_orig = decode_image(data, name, min_side)
    if resize == "crop":
        return stack_images([centre_crop(image, size_hw, interpolation)])
    if resize == "shorter-side":
        (height, width), (net_height, net_width) = size_hw_orig, size_hw
        scale = max(net_height / height, net_width / width)
        larger_hw = max(net_height, int(height * scale)), max(net_width, int(width * scale))
        if max(larger_hw) > MAX_SIDE:
            raise UnreadableSample(
                f"{name}: {width} x {height} px is too thin for shorter-side; use letterbox"
            )
        return stack_images([resize_image(image, larger_hw, interpolation)])
    fitted, *_ = fit(image, size_hw, resize, size_hw_orig, interpolation)
    return stack_images([fitted])


def _decode_as_darknet(data: bytes, name: str) -> tuple[Image, tuple[int, int]]:
    """Decode with stb_image, which rounds chroma differently from libjpeg-turbo."""
    check_image(data, name)
    try:
        image = libstb.imread(data, channels=3, orient=True, max_bytes=3 * MAX_PIXELS)
    except (OSError, ValueError, libstb.Error):
        return decode_image(data, name)  # damaged, or a format that stb_image does not support
    return image, (image.shape[0], image.shape[1])


def class_logits(module: ClassifierModule | DetectorModule, images: Tensor) -> Tensor:
    """Return class logits, float (B, K), of network inputs (B, 3, H, W).

    A detector returns those of the box with the highest objectness, the first of equal ones.

    Source: YOLO9000, section 4, "Joint classification and detection", trains image labels at the
    box with the highest P(label); here the label is not known, so objectness alone chooses the box.
    """
    if isinstance(module, ClassifierModule):
        return torch.as_tensor(module(images)).float()
    output = module.network(unit_range(images))
    objectness = output.box_logits[:, :, 4].float().flatten(2)  # (B, A, G)
    best, num_cells = objectness.flatten(1).argmax(dim=1).cpu(), objectness.shape[2]
    image = torch.arange(len(best))
    logits: Tensor = output.class_logits.gather_boxes(image, best // num_cells, best % num_cells)
    return logits.float()


@torch.no_grad()
def classify(
    module: ClassifierModule | DetectorModule, network_input: Tensor, top_k: int
) -> dict[str, Any]:
    """Return the `top_k` classes of a network input (1, 3, H, W); see `prepare`, `class_logits`.

    ``classes``: key, name and probability of the most probable leaves, in descending order; for a
    tree of several levels also ``path``: the most probable child of each level, root first. Nodes
    that cannot be told from their parents have the names of these, see `WordTree.reported`.
    """
    tree = module.tree
    logits = class_logits(module, network_input.to(module.device)).cpu()
    probs = tree.log_probs(logits)[0].exp()
    leaves = tree.leaves
    best = leaves[probs[leaves].topk(min(top_k, len(leaves))).indices].tolist()

    def row(node: int) -> dict[str, Any]:
        named = int(tree.reported[node])
        return {
            "key": tree.keys[named],
            "name": tree.names[named],
            "probability": float(probs[node]),
        }

    result: dict[str, Any] = {"classes": [row(node) for node in best]}
    if tree.paths.shape[1] > 1:
        deepest = int(tree.most_specific_nodes(logits, threshold=0.0)[0])
        path = tree.reported[tree.paths[deepest]][tree.paths[deepest] >= 0].unique_consecutive()
        result["path"] = [row(node) for node in reversed(path.tolist())]
    return result
