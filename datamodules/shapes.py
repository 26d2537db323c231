"""Generated images of geometric shapes, which need no download."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules.source import (
    DetectionSource,
    ImageLabelSource,
    Source,
    check_option,
    digest,
)
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.images import Image
from yolo_lightning.models.preparation import MAX_IMAGE_PX
from yolo_lightning.tree.wordtree import WordTree

Outline = NDArray[np.float64]  # (N, 2), closed polygon around the origin, in the unit circle

MAX_OCCLUSION = 0.2
MAX_ROTATION_DEGREES = 25.0
_COLOURS = (30, 225)
_SHIFT = 4  # fractional bits of the coordinates given to the rasteriser


def _polar(angles: Sequence[float] | NDArray[np.float64], radii: Sequence[float] = (1,)) -> Outline:
    radians = np.deg2rad(np.asarray(angles, dtype=float))
    circle: Outline = np.stack([np.cos(radians), np.sin(radians)], axis=1)
    return circle * np.reshape(np.asarray(radii, dtype=float), (-1, 1))


def _star(points: int, inner: float) -> Outline:
    return _polar(np.arange(2 * points) * 180 / points - 90, [1.0, inner] * points)


def _cross(arm: float, half: float, bar: float) -> Outline:
    """Return an upright cross with beams 2 * arm wide, and a transverse beam at height `bar`."""
    corners = [
        (-arm, -1), (arm, -1), (arm, bar - arm), (half, bar - arm), (half, bar + arm),
        (arm, bar + arm), (arm, 1), (-arm, 1), (-arm, bar + arm), (-half, bar + arm),
        (-half, bar - arm), (-arm, bar - arm),
    ]  # fmt: skip
    return np.array(corners, dtype=float)


_CIRCLE = _polar(np.linspace(0, 360, 48, endpoint=False))
_CRESCENT = np.concatenate(
    [
        _polar(np.linspace(60, 300, 32)),
        _polar(np.linspace(285, 75, 32)) * 0.75 + [0.38, 0.0],
    ]
)

# WordNet 3.0 synset and outlines by class name; a point inside two outlines is outside
SHAPES: dict[str, tuple[str, list[Outline]]] = {
    "right triangle": ("n13880551", [np.array([(-0.5, -0.9), (0.6, 0.7), (-0.5, 0.7)])]),
    "equilateral triangle": ("n13879947", [_polar([-90, 30, 150])]),
    "square": ("n13878634", [_polar([45, 135, 225, 315])]),
    "rhombus": ("n13882961", [_polar([0, 90, 180, 270], [0.5, 1.0, 0.5, 1.0])]),
    "circle": ("n13873502", [_CIRCLE * 0.9]),
    "semicircle": ("n13874251", [_polar(np.linspace(0, 180, 25) + 180) + [0.0, 0.42]]),
    "pentagram": ("n13882008", [_star(5, 0.382)]),
    "hexagram": ("n13880811", [_star(6, 0.577)]),
    "Greek cross": ("n03457578", [_cross(0.3, half=1.0, bar=0.0)]),
    "Latin cross": ("n03646695", [_cross(0.2, half=0.7, bar=-0.3)]),
    "ring": ("n13875392", [_CIRCLE * 0.9, _CIRCLE * 0.5]),
    "crescent": ("n13896217", [_CRESCENT + [0.2, 0.0]]),
}


class _DrawnShape(NamedTuple):
    name: str
    mask: Image  # coverage, uint8 (H, W)
    box_xyxy_px: NDArray[np.float32]


def _texture(rng: np.random.Generator, size: int, base: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return a texture of blobs, a gradient, stripes and noise, float32 (size, size, 3)."""
    cells = int(rng.integers(2, 7))
    coarse = rng.normal(0, rng.uniform(4, 28), (cells, cells, 3)).astype(np.float32)
    image = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.08, 0.5)
    along = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    stripes = np.sin(along * np.float32(2 * np.pi / period)) * rng.uniform(0, 14)
    grain = rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(1, 7)
    plane = (stripes + grain + along * rng.uniform(-25, 25)).astype(np.float32)
    return np.asarray(image + plane[:, :, None] + base.astype(np.float32), dtype=np.float32)


def _draw_shape(rng: np.random.Generator, name: str, size: int, radius_px: float) -> _DrawnShape:
    """Draw one shape at a random place, slightly rotated, entirely inside the image."""
    stretch = np.diag(np.exp(rng.uniform(-0.1, 0.1, 2)))
    angle = np.deg2rad(rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    outlines = [outline @ (stretch @ rotation) * radius_px for outline in SHAPES[name][1]]
    low, high = outlines[0].min(axis=0), outlines[0].max(axis=0)
    corner = rng.uniform(1, np.maximum(size - 1 - (high - low), 1.001))
    mask: Image = np.zeros((size, size), dtype=np.uint8)
    fixed = [
        np.round((outline - low + corner) * 2**_SHIFT).astype(np.int32) for outline in outlines
    ]
    cv2.fillPoly(mask, fixed, 255, lineType=cv2.LINE_AA, shift=_SHIFT)
    # in the rasteriser, pixel centres have whole coordinates: edges are half a pixel away
    box = np.concatenate([corner, corner + high - low]) + 0.5
    return _DrawnShape(name, mask, np.clip(box, 0, size).astype(np.float32))


def _occludes(new: _DrawnShape, drawn: list[_DrawnShape]) -> bool:
    """Return whether `new` would leave an earlier shape covered by more than 20 %."""
    covering = new.mask > 127
    for earlier in reversed(drawn):
        mask = earlier.mask > 127
        if (mask & covering).sum() > MAX_OCCLUSION * mask.sum():
            return True
        covering |= mask
    return False


def _draw_shapes(
    rng: np.random.Generator, names: Sequence[str], size: int, radii: tuple[float, float]
) -> tuple[Image, list[_DrawnShape]]:
    image = _texture(rng, size, rng.uniform(*_COLOURS, 3))
    drawn: list[_DrawnShape] = []
    for name in names:
        for _ in range(8):
            radius = size * np.exp(rng.uniform(*np.log(radii)))
            new = _draw_shape(rng, name, size, float(radius))
            if not _occludes(new, drawn):
                break
        else:
            continue
        _fill(rng, image, new)
        drawn.append(new)
    return np.clip(image, 0, 255).astype(np.uint8), drawn


def _fill(rng: np.random.Generator, image: NDArray[np.float32], new: _DrawnShape) -> None:
    x1, y1 = np.floor(new.box_xyxy_px[:2]).astype(int) - 1
    x2, y2 = np.ceil(new.box_xyxy_px[2:]).astype(int) + 1
    region = (slice(max(0, y1), y2), slice(max(0, x1), x2))
    mask, background = new.mask[region], image[region]
    mean_colour = np.array(cv2.mean(background, mask)[:3])
    colour = rng.uniform(*_COLOURS, 3)
    while np.abs(colour - mean_colour).max() < 50:  # levels, in at least one channel
        colour = rng.uniform(*_COLOURS, 3)
    filling = _texture(rng, max(mask.shape), colour)
    alpha = (mask.astype(np.float32) / 255)[:, :, None]
    background += alpha * (filling[: mask.shape[0], : mask.shape[1]] - background)


class _Shapes(Source):
    """Options and labels of both sources of shapes."""

    name = "shapes"

    def __init__(
        self,
        length: int,
        classes: list[str] | None,
        radii: tuple[float, float],
        image_size: int,
        seed: int,
    ) -> None:
        check_option("shapes: length", length, length >= 1, "1 or more")
        valid = 16 <= image_size <= MAX_IMAGE_PX
        check_option("shapes: image_size", image_size, valid, f"16 … {MAX_IMAGE_PX}")
        valid = 0.02 <= radii[0] <= radii[1] <= 0.45
        check_option("shapes: radii", radii, valid, "ascending, 0.02 … 0.45")
        for name in classes or ():
            if name not in SHAPES:
                hint = nearest(name, SHAPES) or f"allowed: {', '.join(SHAPES)}"
                raise InputError(f"shapes: class {name!r} cannot be drawn; {hint}")
        self.length, self.classes, self.seed = length, list(classes or SHAPES), seed
        self.radii, self.image_size = radii, image_size
        self._arguments: tuple[object, ...] = (length, self.classes, radii, image_size, seed)

    def bind(self, tree: WordTree) -> None:
        """Map each shape's synset to its node."""
        self._nodes = {name: tree.find_node(SHAPES[name][0], "shapes") for name in self.classes}

    def __len__(self) -> int:
        """Return the number of different images."""
        return self.length

    def fingerprint(self) -> str:
        """Return a hash of the arguments."""
        return digest(*self._arguments)


class ShapesDetection(_Shapes, DetectionSource):
    """Images with several shapes and their boxes, generated when read.

    Args:
        length: number of different images.
        classes: names of shapes; all by default.
        objects: minimum and maximum of shapes per image; fewer if there is no room.
        radii: minimum and maximum radius, relative to the image's side.
        image_size: side of the images, px.
        seed: image i depends on (seed, i) alone.

    Raises:
        InputError: an unknown class, or a value out of range.
    """

    def __init__(
        self,
        length: int = 8192,
        classes: list[str] | None = None,
        objects: tuple[int, int] = (1, 4),
        radii: tuple[float, float] = (0.13, 0.28),
        image_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(length, classes, radii, image_size, seed)
        valid = 0 <= objects[0] <= objects[1]
        check_option("shapes: objects", objects, valid, "ascending, 0 or more")
        self.objects = objects
        self._arguments = (length, self.classes, objects, radii, image_size, seed)

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return the expected number of objects of each class."""
        count = self.length * sum(self.objects) // 2 // len(self.classes)
        return {node: Counter({name: count}) for name, node in self._nodes.items()}

    def read(self, index: int, min_side: int | None = None) -> DetectionSample:
        """Generate one sample."""
        rng = np.random.default_rng((self.seed, 0, index))
        count = int(rng.integers(self.objects[0], self.objects[1] + 1))
        names = [str(name) for name in rng.choice(self.classes, count)]
        image, drawn = _draw_shapes(rng, names, self.image_size, self.radii)
        return DetectionSample(
            image,
            np.array([shape.box_xyxy_px for shape in drawn], dtype=np.float32).reshape(-1, 4),
            np.array([self._nodes[shape.name] for shape in drawn], dtype=np.int64),
            np.zeros(len(drawn), dtype=np.bool_),
        )


class ShapesImageLabels(_Shapes, ImageLabelSource):
    """Images with one shape each and its label, generated when read; see `ShapesDetection`."""

    def __init__(
        self,
        length: int = 8192,
        classes: list[str] | None = None,
        radii: tuple[float, float] = (0.13, 0.36),
        image_size: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__(length, classes, radii, image_size, seed)

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return the number of images of each class."""
        count, rest = divmod(self.length, len(self.classes))
        return {
            node: Counter({name: count + (k < rest)})
            for k, (name, node) in enumerate(self._nodes.items())
        }

    def read(self, index: int, min_side: int | None = None) -> tuple[Image, int]:
        """Generate one sample."""
        rng = np.random.default_rng((self.seed, 1, index))
        name = self.classes[index % len(self.classes)]
        image, _ = _draw_shapes(rng, [name], self.image_size, self.radii)
        return image, self._nodes[name]
