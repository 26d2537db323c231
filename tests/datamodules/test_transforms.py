"""Augmentation."""

import colorsys
from typing import Any

import numpy as np
import pytest

from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules import (
    ClassificationAugmentation,
    DetectionAugmentation,
    transforms,
)
from yolo_lightning.datamodules.transforms import Colour, _FlipAndColour, fit_sample
from yolo_lightning.errors import InputError
from yolo_lightning.images import fit


def sample_with(boxes: list[list[int]], size: tuple[int, int] = (60, 100)) -> DetectionSample:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
    count = len(boxes)
    return DetectionSample(
        image,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.arange(count),
        np.zeros(count, dtype=np.bool_),
    )


def test_letterbox_keeps_aspect_ratio_and_maps_boxes():
    image = np.zeros((50, 100, 3), dtype=np.uint8)
    image[10:20, 30:60] = 255
    square, *_ = fit(image, (64, 64))
    assert square.shape == (64, 64, 3)
    assert (square[:16] == 127).all()
    assert (square[48:] == 127).all()
    moved = fit_sample(sample_with([[30, 10, 60, 20]], (50, 100)), 64)
    np.testing.assert_allclose(moved.boxes_xyxy_px, [[19.2, 22.4, 38.4, 28.8]], rtol=1e-6)


def test_augmentation_depends_on_its_seed_alone():
    augment = DetectionAugmentation(jitter=0.3)
    sample = fit_sample(sample_with([[10, 10, 50, 40], [60, 5, 95, 55]]), 96)
    first, other, again = (augment(sample, 96, seed) for seed in (1, 2, 1))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.boxes_xyxy_px, again.boxes_xyxy_px)
    assert not np.array_equal(first.image, other.image)
    classify = ClassificationAugmentation()
    one, two, three = (classify(sample.image, 64, seed) for seed in (1, 2, 1))
    assert one.shape == (64, 64, 3)
    assert np.array_equal(one, three)
    assert not np.array_equal(one, two)


PLAIN: dict[str, Any] = {"flip": 0, "hue": 0, "saturation": 1, "exposure": 1}


def test_classification_crops_have_the_chosen_scale_at_any_size():
    image = np.full((100, 200, 3), 255, dtype=np.uint8)
    plain = {"aspect": 1, "degrees": 0, **PLAIN}
    for size in (64, 96):
        small = ClassificationAugmentation((0.5, 0.5), **plain)(image, size, 0)
        assert (small == 255).all(axis=(1, 2)).sum() == size // 2  # grey above and below
        assert set(np.unique(small)) == {127, 255}
        assert (ClassificationAugmentation((1, 2), **plain)(image, size, 0) == 255).all()
    turned = ClassificationAugmentation((1, 1), **{**plain, "degrees": 45})(image, 64, 3)
    assert (turned == 127).any()


def test_a_classification_crop_shows_each_part_of_the_image_and_its_aspect():
    image = np.zeros((60, 100, 3), dtype=np.uint8)
    image[:, :, 0] = np.arange(0, 200, 2)
    columns = []
    for seed in range(200):
        crop = ClassificationAugmentation((1, 1), aspect=0.8, degrees=0, **PLAIN)(image, 60, seed)
        shown = crop[30, :, 0].astype(int) / 2
        columns.append((shown[0], shown[-1]))
    first, last = np.array(columns).T
    # widths of 60 px show 60 / 1.25 … 60 / 0.8 of the image's columns
    assert (last - first).min() == pytest.approx(60 / 1.25, abs=2)
    assert (last - first).max() == pytest.approx(60 / 0.8, abs=2)
    assert first.min() < 3
    assert last.max() > 96
    grey = ClassificationAugmentation((1, 1), aspect=0.8, degrees=0, **PLAIN)
    assert not (grey(np.zeros((60, 60, 3), np.uint8), 60, 0) == 127).any()


@pytest.mark.parametrize(("turns", "scale"), [(1, 1.0), (2, 1.0), (3, 2.0), (2, 0.5)])
def test_rotation_is_around_the_centre(turns, scale):
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
    image = blocks.repeat(4, axis=0).repeat(4, axis=1)
    size = round(64 * scale)
    augment = ClassificationAugmentation()
    scale_wh, centred = np.full(2, scale), np.zeros(2)
    turned = augment._rotate(image, scale_wh, centred, turns * np.pi / 2, size)
    side = round(4 * scale)
    middles = np.rot90(turned, -turns)[side // 2 :: side, side // 2 :: side]
    assert np.abs(middles.astype(int) - blocks).max() <= 1
    right = augment._rotate(image, scale_wh, np.array([side, 0]), 0.0, size)
    assert (
        np.abs(
            right[side // 2 :: side, side // 2 :: side].astype(int)[:, :-1] - blocks[:, 1:]
        ).max()
        <= 1
    )


def test_classification_augmentation_checks_its_options():
    with pytest.raises(InputError, match=r"shorter_side is \[2, 1\]; allowed: two factors"):
        ClassificationAugmentation((2, 1))
    with pytest.raises(InputError, match=r"shorter_side is \[128, 448\]; allowed: two factors"):
        ClassificationAugmentation((128, 448))
    with pytest.raises(InputError, match="aspect is 0; allowed: above 0"):
        ClassificationAugmentation(aspect=0)


def reference_colour(rgb: tuple[int, int, int], colour: Colour) -> list[float]:
    """The original program's arithmetic, in floats."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in rgb))
    changed = colorsys.hsv_to_rgb(
        (hue + colour.hue) % 1, min(1, saturation * colour.saturation), value
    )
    return [min(255, 255 * c * colour.exposure) for c in changed]


@pytest.mark.parametrize(
    "colour",
    [
        Colour(0, 1, 1), Colour(0, 1, 1.4), Colour(0, 1, 0.7), Colour(0, 1.5, 1), Colour(0, 0.6, 1),
        Colour(0.1, 1, 1), Colour(-0.1, 1, 1), Colour(0.08, 1.4, 1.3), Colour(-0.5, 0.7, 0.8),
    ],
)  # fmt: skip
def test_colours_change_as_in_the_original_program(colour):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    before = image.copy()
    changed = colour(image)
    expected = np.array([reference_colour(tuple(rgb), colour) for rgb in image.reshape(-1, 3)])
    errors = np.abs(changed.reshape(-1, 3) - expected)
    # hue and shift are rounded, each by up to half a step of 6 levels; saturation, by 2 levels
    assert errors.max() <= (10 if colour.hue or colour.saturation != 1 else 0.501)
    assert errors.mean() < 1.5
    assert np.array_equal(image, before)


def test_flips_and_factors_are_drawn_as_in_the_original_program():
    drawn = _FlipAndColour(0.3, 0.1, 1.5, 2.0)
    flips, colours = zip(*(drawn.draw(np.random.default_rng(k)) for k in range(4000)), strict=True)
    assert np.mean(flips) == pytest.approx(0.3, abs=0.03)
    hues = np.array([colour.hue for colour in colours])
    assert np.abs(hues).max() == pytest.approx(0.1, abs=0.001)
    assert hues.std() == pytest.approx(0.2 / 12**0.5, abs=0.002)
    for name, largest in (("saturation", 1.5), ("exposure", 2.0)):
        factors = np.array([getattr(colour, name) for colour in colours])
        assert (factors > 1).mean() == pytest.approx(0.5, abs=0.03)
        for above in (factors[factors > 1], 1 / factors[factors < 1]):
            # uniform from 1 to the largest
            assert above.max() == pytest.approx(largest, abs=0.01)
            assert above.mean() == pytest.approx((1 + largest) / 2, abs=0.02)


def test_a_flip_mirrors_image_and_boxes():
    sample = sample_with([[10, 10, 50, 40], [60, 5, 95, 55]])
    for seed in range(10):
        straight = DetectionAugmentation(0.2, flip=0)(sample, 96, seed)
        flipped = DetectionAugmentation(0.2, flip=1)(sample, 96, seed)
        assert np.array_equal(flipped.image, straight.image[:, ::-1])
        mirrored = 96 - straight.boxes_xyxy_px[:, [2, 1, 0, 3]]
        np.testing.assert_allclose(flipped.boxes_xyxy_px[:, [0, 2]], mirrored[:, [0, 2]])
        assert np.array_equal(flipped.boxes_xyxy_px[:, 1::2], straight.boxes_xyxy_px[:, 1::2])
        assert flipped.labels.tolist() == straight.labels.tolist()


def test_grey_around_an_image_keeps_its_colour():
    image = np.full((48, 96, 3), 255, dtype=np.uint8)
    boxes, labels = np.array([[0, 0, 96, 48]], np.float32), np.zeros(1, np.int64)
    sample = DetectionSample(image, boxes, labels, np.zeros(1, np.bool_))
    for seed in range(20):
        out = DetectionAugmentation(0.1, exposure=2)(sample, 96, seed).image
        assert (out[[0, -1]] == 127).all()


@pytest.mark.parametrize("width_height", [(1.0, 1.0), (1.6, 1.0), (1.0, 2.5)])
@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
@pytest.mark.parametrize("geometry", ["crop", "place"])
def test_an_image_of_the_required_side_is_not_enlarged(geometry, resize, width_height):
    augment, factors = DetectionAugmentation(0.3, geometry=geometry), []
    for seed in range(50):
        side = augment.required_side(416, seed, resize)
        width, height = (round(side * factor) for factor in width_height)
        window = augment._window(np.random.default_rng(seed), width, height, resize)
        factors.append(416 / (window[2:] - window[:2]).min())
    assert max(factors) <= 1.01
    assert width_height != (1, 1) or min(factors) > 0.99  # no larger than is needed


def test_a_label_image_of_the_required_side_is_not_enlarged(monkeypatch):
    augment = ClassificationAugmentation((0.5, 2), degrees=0)
    factors = []

    def record(image, window, size, colour):
        factors.append((size / (window[2:] - window[:2])).max())
        return [image]

    monkeypatch.setattr(transforms, "crop_window", record)
    for seed in range(100):
        side = augment.required_side(64, seed)
        for size_wh in ((side, side), (2 * side, side), (side, 2 * side)):
            augment(np.zeros((*size_wh[::-1], 3), np.uint8), 64, seed)
    assert max(factors) <= 1.000001


@pytest.mark.parametrize("geometry", ["crop", "place"])
@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
def test_augmented_boxes_follow_their_object_and_stay_inside(geometry, resize):
    image = np.zeros((96, 144, 3), dtype=np.uint8)
    image[30:60, 40:80] = 255
    box = np.array([[40, 30, 80, 60]], dtype=np.float32)
    sample = DetectionSample(image, box, np.array([4]), np.array([False]))
    augment = DetectionAugmentation(0.3, **{**PLAIN, "flip": 0.5}, geometry=geometry)
    moved = 0
    for seed in range(60):
        out = augment(sample, 96, seed, resize)
        assert out.image.shape == (96, 96, 3)
        if not len(out.labels):
            continue
        x1, y1, x2, y2 = out.boxes_xyxy_px[0]
        rows, columns = np.nonzero(out.image[:, :, 0] > 190)
        drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(drawn - out.boxes_xyxy_px[0]).max() < 2
        assert 0 <= x1 < x2 <= 96
        assert 0 <= y1 < y2 <= 96
        assert out.labels.tolist() == [4]
        moved += abs(x1 - 40) > 2
    assert moved > 20


def test_augmentation_handles_degenerate_boxes():
    augment = DetectionAugmentation(jitter=0.3)
    boxes = [[10, 10, 10, 30], [-20, -20, 500, 500], [95, 58, 140, 90], [5, 5, 30, 30]]
    for seed in range(40):
        out = augment(sample_with(boxes), 96, seed)
        assert len(out.boxes_xyxy_px) == len(out.labels) == len(out.difficult)
        assert 0 not in out.labels
    nothing = augment(sample_with([]), 96, 0)
    assert nothing.boxes_xyxy_px.shape == (0, 4)


@pytest.mark.parametrize(
    "options",
    [{"jitter": 1.5}, {"jitter": 0.5}, {"saturation": 0.5}, {"hue": 0.9}, {"geometry": "turn"}],
)
def test_augmentation_options_out_of_range_raise(options):
    with pytest.raises(InputError, match="allowed"):
        DetectionAugmentation(**options)
