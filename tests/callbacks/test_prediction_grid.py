"""PredictionGrid: the same images, drawn with the weights of the validation."""

from types import SimpleNamespace
from typing import Any

import cv2
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.helpers.training import (
    NAMES,
    TREE,
    RecordingDetector,
    RecordingLogger,
    make_datamodule,
    train,
)
from yolo_lightning import ClassifierModule, CombinedDataModule, WordTree
from yolo_lightning.callbacks.prediction_grid import PredictionGrid, draw_tile, evenly_spaced
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.detections import Detection
from yolo_lightning.errors import InputError
from yolo_lightning.images import UnreadableSample

GREEN, ORANGE, GREY = (24, 160, 70), (245, 110, 0), (127, 127, 127)


class RecordingSource(ShapesDetection):
    """Records reads while `reads` is a list, and uses the global random number generators."""

    reads: list[tuple[int, int]] | None = None

    def read(self, index, min_side=None):
        if self.reads is not None:
            self.reads.append((index, min_side))
            torch.rand(1), np.random.random()  # noqa: NPY002
        return super().read(index, min_side)


@pytest.fixture
def source() -> RecordingSource:
    return RecordingSource(5, NAMES, image_size=64, seed=5)


def detection(name: str, *box: float) -> Detection:
    return Detection((box[0], box[1], box[2], box[3]), name, 0.5, 0, name)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_grid_every_second_validation(precision):
    trainer = train([PredictionGrid(3, 2)], max_steps=8, precision=precision)
    ((name, image, step), (next_name, next_image, next_step)) = trainer.logger.images
    assert (name, next_name, step, next_step) == ("predictions", "predictions", 3, 7)
    assert image.shape == next_image.shape
    assert image.shape[2] == 3
    assert image.dtype == np.uint8


def test_the_same_images_are_drawn_each_time(source):
    source.reads = []
    train([PredictionGrid(3)], make_datamodule(source))
    # validation reads images at the size of the network input
    assert [index for index, min_side in source.reads if min_side > 64] == 3 * [0, 2, 4]


def test_evenly_spaced():
    assert evenly_spaced(3, 9) == [0, 4, 8]
    assert evenly_spaced(12, 5) == [0, 1, 2, 3, 4]
    assert evenly_spaced(1, 5) == [0]


def test_training_is_bitwise_equal_with_and_without_the_callback(source):
    results = []
    runs: list[Any] = [[], [PredictionGrid(4)]]
    for callbacks in runs:
        source.reads = []
        pl.seed_everything(0, verbose=False)
        module = RecordingDetector()
        trainer = train(callbacks, make_datamodule(source), module)
        assert len(trainer.logger.images) == 3 * len(callbacks)
        state = torch.cat([p.detach().flatten() for p in module.state_dict().values()])
        numbers = np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
        results.append((state, torch.get_rng_state(), numbers))
    for one, other in zip(*results, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("averaging_first", [True, False])
def test_averaged_weights_are_used_in_either_order_of_callbacks(averaging_first):
    averaging = EMAWeightAveraging(decay=0.5)
    callbacks = (
        [averaging, PredictionGrid(5)] if averaging_first else [PredictionGrid(5), averaging]
    )
    module = RecordingDetector()
    train(callbacks, module=module)
    batches, predict_batches = 3, 2  # of five images, in batches of two and four
    assert module.predict_weights == [
        (weights, False)
        for weights in module.validation_weights[::batches]
        for _ in range(predict_batches)
    ]
    assert module._sum() not in module.validation_weights[:batches]


def test_unreadable_images_are_left_out(source, monkeypatch):
    def read(index, min_side=None):
        if index in broken:
            raise UnreadableSample(f"{index} is broken")
        return RecordingSource.read(source, index, min_side)

    monkeypatch.setattr(source, "read", read)
    sizes = []
    broken: set[int] = set()
    for more in ([], [0], [1, 2, 3], [4]):
        broken |= set(more)
        images = train([PredictionGrid(5)], make_datamodule(source), max_steps=2).logger.images
        sizes.append([image.shape[:2] for _, image, _ in images])
    tile, gap = 320, 6
    width, height = gap + 4 * (tile + gap), 28 + tile + gap
    assert sizes[0] == [(height + tile + gap, width)]  # four and one
    assert sizes[1:] == [[(height, width)], [(height, gap + tile + gap)], []]


def test_an_error_becomes_a_warning_and_training_continues(monkeypatch):
    def fail(*args):
        torch.rand(1)
        raise torch.OutOfMemoryError("no room")

    states = []
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(RecordingDetector, "detect_most_specific", fail)
            with pytest.warns(UserWarning, match="cannot draw predictions: .*no room"):
                trainer = train([PredictionGrid(5)])
        else:
            trainer = train([])
        assert (trainer.global_step, trainer.logger.images) == (6, [])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_the_newest_grid_is_a_file_of_the_run_folder(tmp_path):
    for loggers in ([], [RecordingLogger()]):
        train([PredictionGrid(3)], loggers=loggers, default_root_dir=tmp_path / "run")
        picture: Any = cv2.imread(str(tmp_path / "run/predictions.jpg"))
        assert picture is not None
        (tmp_path / "run/predictions.jpg").unlink()
    drawn = loggers[0].images[-1][1]
    assert drawn.shape == picture.shape
    assert abs(drawn.mean() - picture.mean()) < 1


def test_a_full_disk_is_a_warning(tmp_path):
    (tmp_path / "predictions.jpg").mkdir()
    with pytest.warns(UserWarning, match="cannot draw predictions: .*predictions.jpg"):
        trainer = train([PredictionGrid()])
    assert trainer.global_step == 6
    assert len(trainer.logger.images) == 3


def test_nothing_is_drawn_in_sanity_checks():
    module = RecordingDetector()
    train([PredictionGrid()], module=module, max_steps=1, num_sanity_val_steps=-1)
    assert module.validation_weights
    assert not module.predict_weights


def test_nothing_is_drawn_for_a_classifier():
    labels = ShapesImageLabels(length=4, classes=NAMES, image_size=64)
    data = CombinedDataModule(
        TREE, classification=labels, validation=labels, classification_batch_size=2,
        image_size=64, num_workers=0,
    )  # fmt: skip
    trainer = train([PredictionGrid()], data, ClassifierModule(TREE, "small"))
    assert trainer.global_step == 6
    assert not trainer.logger.images


def test_other_ranks_count_validations_and_draw_nothing(source):
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), sanity_checking=False, num_val_batches=[1],
        loggers=[RecordingLogger()], is_global_zero=False, datamodule=make_datamodule(source),
    )  # fmt: skip
    callback = PredictionGrid()
    source.bind(WordTree.from_source(TREE))
    batch = next(iter(trainer.datamodule.val_dataloader()))
    source.reads = []
    callback.on_validation_batch_end(trainer, RecordingDetector(), None, batch, 0)
    assert callback.state_dict() == {"validations": 1}
    assert not source.reads


def test_a_resumed_training_continues_counting():
    callback = PredictionGrid(2, every_n_validations=3)
    callback.load_state_dict({"validations": 1})
    assert [step for *_, step in train([callback]).logger.images] == [3]


def test_targets_are_dashed_and_predictions_solid():
    image = np.zeros((160, 320, 3), np.uint8)  # as wide as a tile: 80 px of grey above and below
    drawn = draw_tile(
        image, np.array([[10, 20, 110, 90]], np.float32), [""], [detection("", 200, 40, 300, 120)]
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


def test_a_tall_image_is_resized_with_its_boxes():
    image = np.zeros((640, 320, 3), np.uint8)
    drawn = draw_tile(image, np.zeros((0, 4), np.float32), [], [detection("", 0, 320, 320, 640)])
    assert tuple(drawn[200, 40]) == GREY
    assert (drawn[170:310, 80] == ORANGE).all()
    assert (drawn[160, 100:230] == ORANGE).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images is 0; allowed: 1 or more"),
        ({"every_n_validations": 0}, "every_n_validations is 0; allowed: 1 or more"),
        ({"score_threshold": 1.5}, "score_threshold is 1.5; allowed: 0 … 1"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PredictionGrid(**options)
