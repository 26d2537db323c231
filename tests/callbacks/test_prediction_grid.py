"""Pictures of predictions: drawn on the same images, by the weights that validation measures."""

from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.helpers.training import NAMES, TREE, Remembered, Watched, data_of, train
from yolo_lightning import ClassifierModule, CombinedDataModule, WordTree
from yolo_lightning.callbacks.prediction_grid import PredictionGrid, evenly, tile
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.detections import Detection
from yolo_lightning.errors import InputError
from yolo_lightning.images import UnreadableSample

GREEN, ORANGE, GREY = (24, 160, 70), (245, 110, 0), (228, 228, 228)


class Drawn(ShapesDetection):
    """Write down what is read once told to, and draw on random numbers that others use too."""

    reads: list[tuple[int, int]] | None = None

    def read(self, index, least_side=None):
        if self.reads is not None:
            self.reads.append((index, least_side))
            torch.rand(1), np.random.random()  # noqa: NPY002
        return super().read(index, least_side)


@pytest.fixture
def source() -> Drawn:
    return Drawn(5, NAMES, image_size=64, seed=5)


def found(name: str, *box: float) -> Detection:
    return Detection((box[0], box[1], box[2], box[3]), name, 0.5, 0, name)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_second_validation_gives_a_picture(precision):
    trainer = train([PredictionGrid(3, 2)], max_steps=8, precision=precision)
    ((first, one, early), (second, other, late)) = trainer.logger.pictures
    assert (first, second, early, late) == ("predictions", "predictions", 3, 7)
    assert one.shape == other.shape
    assert one.shape[2] == 3
    assert one.dtype == np.uint8


def test_the_same_images_are_drawn_each_time(source):
    source.reads = []
    train([PredictionGrid(3)], data_of(source))
    # validation itself reads images at the size of its input
    assert [index for index, least_side in source.reads if least_side > 64] == 3 * [0, 2, 4]


def test_images_lie_evenly_from_the_first_to_the_last():
    assert evenly(3, 9) == [0, 4, 8]
    assert evenly(12, 5) == [0, 1, 2, 3, 4]
    assert evenly(1, 5) == [0]


def test_training_is_the_same_bit_for_bit(source):
    kept = []
    runs: list[Any] = [[], [PredictionGrid(4)]]
    for callbacks in runs:
        source.reads = []
        pl.seed_everything(0, verbose=False)
        module = Watched()
        trainer = train(callbacks, data_of(source), module)
        assert len(trainer.logger.pictures) == 3 * len(callbacks)
        state = torch.cat([p.detach().flatten() for p in module.state_dict().values()])
        numbers = np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
        kept.append((state, torch.get_rng_state(), numbers))
    for one, other in zip(*kept, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("before", [True, False])
def test_averaged_weights_are_drawn_whichever_callback_comes_first(before):
    averaging = EMAWeightAveraging(decay=0.5)
    callbacks = [averaging, PredictionGrid(5)] if before else [PredictionGrid(5), averaging]
    module = Watched()
    train(callbacks, module=module)
    batches, parts = 3, 2  # five images, two a batch in a validation, four in a picture
    assert module.looked == [
        (weights, False) for weights in module.measured[::batches] for _ in range(parts)
    ]
    assert module._sum() not in module.measured[:batches]


def test_images_that_cannot_be_read_are_left_out(source, monkeypatch):
    def read(index, least_side=None):
        if index in broken:
            raise UnreadableSample(f"{index} is broken")
        return Drawn.read(source, index, least_side)

    monkeypatch.setattr(source, "read", read)
    heights = []
    broken: set[int] = set()
    for more in ([], [0], [1, 2, 3], [4]):
        broken |= set(more)
        pictures = train([PredictionGrid(5)], data_of(source), max_steps=2).logger.pictures
        heights.append([picture.shape[:2] for *_, picture, _ in pictures])
    edge, gap = 320, 6
    wide, high = gap + 4 * (edge + gap), 28 + edge + gap
    assert heights[0] == [(high + edge + gap, wide)]  # four and one
    assert heights[1:] == [[(high, wide)], [(high, gap + edge + gap)], []]


def test_what_goes_wrong_is_a_warning_and_training_goes_on(monkeypatch):
    def fail(*args):
        torch.rand(1)
        raise torch.OutOfMemoryError("no room")

    states = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(Watched, "describe", fail)
            with pytest.warns(UserWarning, match="no picture of predictions: .*no room"):
                trainer = train([PredictionGrid(5)])
        else:
            trainer = train([])
        assert (trainer.global_step, trainer.logger.pictures) == (6, [])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_without_a_run_logger_and_in_sanity_checks_nothing_is_drawn():
    module = Watched()
    train([PredictionGrid()], module=module, loggers=[])
    train([PredictionGrid()], module=module, max_steps=1, num_sanity_val_steps=-1)
    assert module.measured
    assert not module.looked


def test_nothing_is_drawn_of_a_classifier():
    labels = ShapesImageLabels(length=4, classes=NAMES, image_size=64)
    data = CombinedDataModule(
        TREE, classification=labels, validation=labels, classification_batch_size=2,
        image_size=64, num_workers=0,
    )  # fmt: skip
    trainer = train([PredictionGrid()], data, ClassifierModule(TREE, "small"))
    assert trainer.global_step == 6
    assert not trainer.logger.pictures


def test_other_ranks_count_and_draw_nothing(source):
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), sanity_checking=False, num_val_batches=[1],
        loggers=[Remembered()], is_global_zero=False, datamodule=data_of(source),
    )  # fmt: skip
    callback = PredictionGrid()
    source.bind(WordTree.of(TREE))
    batch = next(iter(trainer.datamodule.val_dataloader()))
    source.reads = []
    callback.on_validation_batch_end(trainer, Watched(), None, batch, 0)
    assert callback.state_dict() == {"validations": 1}
    assert not source.reads


def test_a_resumed_training_goes_on_counting():
    callback = PredictionGrid(2, every_n_validations=3)
    callback.load_state_dict({"validations": 1})
    assert [step for *_, step in train([callback]).logger.pictures] == [3]


def test_truths_are_dashed_and_predictions_solid_at_their_places():
    image = np.zeros((160, 320, 3), np.uint8)  # as wide as a tile: 80 px of paper above and below
    drawn = tile(
        image, np.array([[10, 20, 110, 90]], np.float32), [""], [found("", 200, 40, 300, 120)]
    )
    assert drawn.shape == (320, 320, 3)
    assert tuple(drawn[5, 5]) == GREY
    across, down = drawn[100, 10:110], drawn[100:165, 110]
    dashes = (across == GREEN).all(axis=1)
    assert dashes[:7].all()
    assert not dashes[7:11].any()
    assert 0.4 < dashes.mean() < 0.8
    assert 0.4 < (down == GREEN).all(axis=1).mean() < 0.8
    assert (drawn[200, 205:295] == ORANGE).all()
    assert (drawn[125:195, 300] == ORANGE).all()
    assert not drawn[160, 220:290].any()


def test_a_tall_image_is_shrunk_with_its_boxes():
    image = np.zeros((640, 320, 3), np.uint8)
    drawn = tile(image, np.zeros((0, 4), np.float32), [], [found("", 0, 320, 320, 640)])
    assert tuple(drawn[200, 40]) == GREY
    assert (drawn[170:310, 80] == ORANGE).all()
    assert (drawn[160, 100:230] == ORANGE).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": 0}, "images is 0; allowed: 1 or more"),
        ({"every_n_validations": 0}, "every_n_validations is 0; allowed: 1 or more"),
        ({"score_threshold": 1.5}, "score_threshold is 1.5; allowed: 0 … 1"),
    ],
)
def test_values_out_of_range_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        PredictionGrid(**options)
