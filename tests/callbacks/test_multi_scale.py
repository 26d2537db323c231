"""`MultiScale`: image sizes by step, resizing."""

import pytest
import torch

from yolo_lightning.callbacks.multi_scale import MultiScale, resize, size_at_step
from yolo_lightning.errors import InputError


def test_image_size_changes_every_ten_batches_and_takes_all_values():
    sizes = [96, 128, 160]
    drawn = [size_at_step(step, sizes, 10, seed=0) for step in range(600)]
    for block in range(60):
        assert len(set(drawn[10 * block : 10 * block + 10])) == 1
    assert {s: drawn.count(s) > 100 for s in sizes} == dict.fromkeys(sizes, True)
    assert drawn != [size_at_step(step, sizes, 10, seed=1) for step in range(600)]


def test_resize_converts_to_floats_in_0_to_1():
    images = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    out = resize(images, 32)
    assert out.shape == (2, 3, 32, 32)
    torch.testing.assert_close(out, torch.ones_like(out))
    assert resize(images, 64).max() == 1


def test_multi_scale_rejects_sizes_that_are_not_multiples_of_32():
    with pytest.raises(InputError, match=r"sizes is \[100\]; allowed: positive multiples of 32"):
        MultiScale([100])
