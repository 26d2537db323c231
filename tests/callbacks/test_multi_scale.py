"""`MultiScale`: image sizes by step, resizing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from yolo_lightning.batches import ClassificationBatch
from yolo_lightning.callbacks.multi_scale import (
    MultiScale,
    first_batch_at_largest,
    resize,
    size_at_step,
)
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


@pytest.mark.parametrize("size", [100, 0, -32])
def test_multi_scale_rejects_sizes_that_are_no_size_of_a_network(size):
    with pytest.raises(
        InputError, match=rf"sizes is \[{size}\]; allowed: positive multiples of 32"
    ):
        MultiScale([size])


def trainer(max_steps: int = -1, max_epochs: int | None = -1, accumulate: int = 1) -> Any:
    return SimpleNamespace(
        max_steps=max_steps, max_epochs=max_epochs, accumulate_grad_batches=accumulate
    )


def test_the_last_batches_have_the_largest_size():
    sizes = [128, 160, 96]
    drawn = [size_at_step(step, sizes, 10, seed=0) for step in range(600)]
    first = first_batch_at_largest(trainer(max_steps=600), 50, 200)
    assert first == 400
    late = [size_at_step(step, sizes, 10, 0, first) for step in range(600)]
    assert late == drawn[:400] + [160] * 200
    assert first_batch_at_largest(trainer(max_steps=100), 50, 200) == -100  # all of them


@pytest.mark.parametrize(
    ("ends", "end"),
    [
        (trainer(max_epochs=4), 28),
        (trainer(max_epochs=4, accumulate=3), 28),
        (trainer(max_steps=20), 20),
        (trainer(max_steps=20, max_epochs=2), 14),
        (trainer(max_steps=10, max_epochs=2), 10),
        (trainer(max_steps=10, max_epochs=None), 10),
        # epochs of 7 batches are 3 optimizer steps of 3, 3 and 1 batches
        (trainer(max_steps=8, accumulate=3), 2 * 7 + 2 * 3),
        (trainer(max_steps=9, accumulate=3), 3 * 7),
    ],
)
def test_the_end_of_a_training_in_batches(ends, end):
    assert first_batch_at_largest(ends, 7, 2) == end - 2


def test_the_last_batches_need_a_known_end():
    message = "last_batches_at_largest is 5; allowed without trainer.max_steps"
    for endless in (trainer(), trainer(max_epochs=None)):
        assert first_batch_at_largest(endless, 7, 0) > 10**9
        with pytest.raises(InputError, match=message):
            first_batch_at_largest(endless, 7, 5)
    assert first_batch_at_largest(trainer(max_epochs=2), torch.inf, 0) > 10**9
    with pytest.raises(InputError, match="or with data of unknown length: 0"):
        first_batch_at_largest(trainer(max_epochs=2), torch.inf, 5)


def test_multi_scale_rejects_a_negative_number_of_last_batches():
    with pytest.raises(InputError, match="last_batches_at_largest is -1; allowed: 0 or more"):
        MultiScale([64], last_batches_at_largest=-1)


def test_images_of_other_loaders_are_resized():
    batch = ClassificationBatch(
        torch.full((2, 3, 64, 64), 255, dtype=torch.uint8), torch.zeros(2), torch.zeros(2)
    )
    loop: Any = trainer(max_steps=10)
    loop.datamodule, loop.num_training_batches = None, 10
    MultiScale([32]).on_train_batch_start(loop, None, batch, 0)  # type: ignore[arg-type]
    torch.testing.assert_close(batch.images, torch.ones(2, 3, 32, 32))
