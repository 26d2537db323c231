"""Classification of images: decoding, resizing, and the most probable classes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import libstb
import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_lightning.boxes import letterbox_geometry
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.errors import InputError
from yolo_lightning.images import IMAGE_SUFFIXES, UnreadableSample
from yolo_lightning.images import read_image as decode

MAX_BYTES = 2**28
"""Of a decoded image: 89 million pixels."""


MAX_SIDE = 8192
"""Of a network input, px; thin images reach it when their shorter side is fitted."""


GREY = 0.5


def read_image(path: Path) -> Tensor:
    """Return an image as float (3, H, W) in 0…1, its EXIF orientation honoured.

    Decoded by stb_image, as in the original program: other decoders round chroma differently, and
    a probability of 14.5 % moves by 0.3 points with that.

    Raises:
        UnreadableSample: the file is missing or no image.
    """
    try:
        pixels = libstb.imread(str(path), channels=3, orient=True, max_bytes=MAX_BYTES)
    except libstb.LimitError as error:
        raise UnreadableSample(f"{path}: too large ({error})") from None
    except (OSError, ValueError, libstb.Error):
        pixels, _ = decode(path)  # a format that it does not know, such as WebP
    return torch.tensor(pixels).permute(2, 0, 1).float().div_(255)


def resized(image: Tensor, size_hw: tuple[int, int], how: str) -> Tensor:
    """Return a network input (1, 3, H, W) from an image (3, H, W).

    Args:
        image: float in 0…1.
        size_hw: of the network input, px.
        how: ``letterbox`` fits the whole image into a grey frame, as the original program does;
            ``shorter-side`` scales the shorter side to the network's and keeps all of the image;
            ``crop`` takes the middle of that, as validation does.

    Raises:
        UnreadableSample: an image too thin for its shorter side to be fitted.
    """
    height, width = image.shape[1:]
    if how == "letterbox":
        new_height, new_width, top, left = letterbox_geometry((height, width), size_hw)
    else:
        scale = max(size_hw[0] / height, size_hw[1] / width)
        new_height = max(size_hw[0], int(height * scale))
        new_width = max(size_hw[1], int(width * scale))
    if max(new_height, new_width) > MAX_SIDE:
        raise UnreadableSample(f"{width} x {height} px is too thin for {how}; letterbox takes it")
    # corners on corners, as the original program interpolates
    small = F.interpolate(image[None], (new_height, new_width), mode="bilinear", align_corners=True)
    if how == "letterbox":
        frame = torch.full((1, 3, *size_hw), GREY)
        y, x = int(top), int(left)
        frame[:, :, y : y + new_height, x : x + new_width] = small
        return frame
    if how == "crop":
        y, x = (new_height - size_hw[0]) // 2, (new_width - size_hw[1]) // 2
        return small[:, :, y : y + size_hw[0], x : x + size_hw[1]]
    return small


def images_in(places: Sequence[str]) -> Iterator[Path]:
    """Yield the images that are named, and those in folders that are named, at any depth.

    Raises:
        InputError: no such file or folder, or a folder without images.
    """
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise InputError(f"{place!r}: holds no images {IMAGE_SUFFIXES}")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise InputError(f"{place!r}: no such file or folder (working folder: {Path.cwd()})")


@torch.no_grad()
def classify(
    module: ClassifierModule, image: Tensor, size_hw: tuple[int, int], how: str, top: int
) -> dict[str, Any]:
    """Return the most probable classes of an image, and the path down the tree.

    Args:
        module: in evaluation mode.
        image: float (3, H, W) in 0…1.
        size_hw: of the network input, px.
        how: see `resized`.
        top: number of classes.

    Returns:
        ``classes``: key, name and probability of the most probable leaves, descending; for a tree
        ``path``: the same from its top down, by the most probable child.
    """
    tree = module.tree
    device = module.network.class_conv.weight.device
    logits = module(resized(image, size_hw, how).to(device)).float().cpu()
    probs = tree.log_probs(logits)[0].exp()
    leaves = tree.leaves
    best = leaves[probs[leaves].topk(min(top, len(leaves))).indices].tolist()

    def row(node: int) -> dict[str, Any]:
        return {
            "key": tree.keys[node],
            "name": tree.names[node],
            "probability": float(probs[node]),
        }

    found: dict[str, Any] = {"classes": [row(node) for node in best]}
    if tree.paths.shape[1] > 1:
        deepest = int(tree.most_specific(logits, threshold=0.0)[0])
        path = [node for node in tree.paths[deepest].tolist() if node >= 0]
        found["path"] = [row(node) for node in reversed(path)]
    return found
