"""Generated images of geometric shapes, which need no download."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource, digest
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.images import Image
from yolo_lightning.tree.wordtree import WordTree

Outline = NDArray[np.float64]  # (N, 2), closed polygon around the origin, in the unit circle

MAX_OCCLUSION = 0.2
MAX_ROTATION_DEGREES = 25.0
_COLOURS = (30, 225)
_SHIFT = 4  # fractional bits of the coordinates given to the rasteriser


def _polar(
    angles: Sequence[float] | NDArray[np.float64], radii: float | Sequence[float] = 1.0
) -> Outline:
    radians = np.deg2rad(np.asarray(angles, dtype=float))
    circle: Outline = np.stack([np.cos(radians), np.sin(radians)], axis=1)
    return circle * np.reshape(np.asarray(radii, dtype=float), (-1, 1))


def _star(points: int, inner: float) -> Outline:
    return _polar(np.arange(2 * points) * 180 / points - 90, [1.0, inner] * points)


def _cross(arm: float, low: float) -> Outline:
    """Return an upright cross with beams 2 * arm wide; the lower beam ends at `low`."""
    bar = -0.3 if low > 1 else 0.0  # height of the transverse beam
    half = 0.7 if low > 1 else 1.0
    corners = [
        (-arm, -1), (arm, -1), (arm, bar - arm), (half, bar - arm), (half, bar + arm),
        (arm, bar + arm), (arm, 1), (-arm, 1), (-arm, bar + arm), (-half, bar + arm),
        (-half, bar - arm), (-arm, bar - arm),
    ]  # fmt: skip
    return np.array(corners, dtype=float)


_ARC = np.linspace(0, 360, 48, endpoint=False)
_HALF = np.linspace(0, 180, 25)


def _crescent() -> Outline:
    outer = _polar(np.linspace(60, 300, 32))
    inner = _polar(np.linspace(285, 75, 32)) * 0.75 + [0.38, 0.0]
    return np.concatenate([outer, inner]) + [0.2, 0.0]


# WordNet 3.0 synset and outlines by class name; a point inside two outlines is outside
SHAPES: dict[str, tuple[str, list[Outline]]] = {
    "right triangle": ("n13880551", [np.array([(-0.5, -0.9), (0.6, 0.7), (-0.5, 0.7)])]),
    "equilateral triangle": ("n13879947", [_polar([-90, 30, 150])]),
    "square": ("n13878634", [_polar([45, 135, 225, 315])]),
    "rhombus": ("n13882961", [_polar([0, 90, 180, 270], [0.5, 1.0, 0.5, 1.0])]),
    "circle": ("n13873502", [_polar(_ARC, 0.9)]),
    "semicircle": ("n13874251", [_polar(_HALF + 180) + [0.0, 0.42]]),
    "pentagram": ("n13882008", [_star(5, 0.382)]),
    "hexagram": ("n13880811", [_star(6, 0.577)]),
    "Greek cross": ("n03457578", [_cross(0.3, 1.0)]),
    "Latin cross": ("n03646695", [_cross(0.2, 1.4)]),
    "ring": ("n13875392", [_polar(_ARC, 0.9), _polar(_ARC, 0.5)]),
    "crescent": ("n13896217", [_crescent()]),
}


@dataclass
class _DrawnShape:
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
    filling = _texture(rng, max(mask.shape), _contrasting_colour(rng, mean_colour))
    alpha = (mask.astype(np.float32) / 255)[:, :, None]
    background += alpha * (filling[: mask.shape[0], : mask.shape[1]] - background)


def _contrasting_colour(
    rng: np.random.Generator, other: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return a colour that differs from `other` by 50 levels or more in some channel."""
    while True:
        colour = rng.uniform(*_COLOURS, 3)
        if np.abs(colour - other).max() >= 50:
            return np.asarray(colour)


def _check_options(length: int, radii: tuple[float, float], image_size: int) -> None:
    if length < 1 or image_size < 16:
        raise InputError(
            f"shapes: length {length}, image_size {image_size}; allowed: 1, 16 or more"
        )
    if not 0.02 <= radii[0] <= radii[1] <= 0.45:
        raise InputError(f"shapes: radii are {radii}; allowed: ascending, 0.02 … 0.45")


def _check_classes(classes: Sequence[str] | None) -> list[str]:
    for name in classes or ():
        if name not in SHAPES:
            hint = nearest(name, SHAPES) or f"allowed: {', '.join(SHAPES)}"
            raise InputError(f"shapes: class {name!r} cannot be drawn; {hint}")
    return list(classes or SHAPES)


class ShapesDetection(DetectionSource):
    """Images with several shapes and their boxes, generated when read.

    Args:
        length: number of different images.
        classes: names of shapes; all by default.
        objects: minimum and maximum of shapes per image; fewer if there is no room.
        radii: minimum and maximum radius, relative to the image's side.
        image_size: side of the images, px.
        seed: image i depends on (seed, i) alone.

    Raises:
        InputError: an unknown class.
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
        _check_options(length, radii, image_size)
        if not 0 <= objects[0] <= objects[1]:
            raise InputError(f"shapes: objects are {objects}; allowed: ascending, 0 or more")
        self.length, self.classes, self.seed = length, _check_classes(classes), seed
        self.objects, self.radii, self.image_size = objects, radii, image_size
        self.faults: list[str] = []
        self.name = "shapes"

    def bind(self, tree: WordTree) -> None:
        """Map each shape's synset to its node."""
        self._nodes = {name: tree.find_node(SHAPES[name][0], "shapes") for name in self.classes}

    def __len__(self) -> int:
        """Return the number of different images."""
        return self.length

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return the expected number of objects of each class."""
        count = self.length * sum(self.objects) // 2 // len(self.classes)
        return {node: Counter({name: count}) for name, node in self._nodes.items()}

    def fingerprint(self) -> str:
        """Return a hash of the arguments."""
        return digest(
            self.length, self.classes, self.objects, self.radii, self.image_size, self.seed
        )

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


class ShapesImageLabels(ImageLabelSource):
    """Images with one shape each and its label, generated when read; see `ShapesDetection`."""

    def __init__(
        self,
        length: int = 8192,
        classes: list[str] | None = None,
        radii: tuple[float, float] = (0.13, 0.36),
        image_size: int = 128,
        seed: int = 0,
    ) -> None:
        _check_options(length, radii, image_size)
        self.length, self.classes, self.seed = length, _check_classes(classes), seed
        self.radii, self.image_size = radii, image_size
        self.faults: list[str] = []
        self.name = "shapes"

    def bind(self, tree: WordTree) -> None:
        """Map each shape's synset to its node."""
        self._nodes = [tree.find_node(SHAPES[name][0], "shapes") for name in self.classes]

    def __len__(self) -> int:
        """Return the number of different images."""
        return self.length

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return the number of images of each class."""
        count, rest = divmod(self.length, len(self.classes))
        return {
            node: Counter({name: count + (k < rest)})
            for k, (name, node) in enumerate(zip(self.classes, self._nodes, strict=True))
        }

    def fingerprint(self) -> str:
        """Return a hash of the arguments."""
        return digest(self.length, self.classes, self.radii, self.image_size, self.seed)

    def read(self, index: int, min_side: int | None = None) -> tuple[Image, int]:
        """Generate one sample."""
        rng = np.random.default_rng((self.seed, 1, index))
        number = index % len(self.classes)
        image, _ = _draw_shapes(rng, [self.classes[number]], self.image_size, self.radii)
        return image, self._nodes[number]
