"""Batches do not depend on the number of workers and ranks."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator

from tests.helpers.miniatures import save, set_up_data, write
from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.datamodules import (
    ClassificationAugmentation,
    CombinedDataModule,
    DetectionAugmentation,
    ImageFolder,
    YOLOText,
)
from yolo_lightning.datamodules.batching import JointDataset
from yolo_lightning.datamodules.loader import TrainingLoader
from yolo_lightning.errors import InputError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten images with boxes and eleven with labels; one of each is broken."""
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for k in range(10):
        save(root / f"boxes/images/{k}.jpg", rng.integers(0, 255, (48, 64 + k, 3), np.uint8))
        x, y = rng.uniform(0.3, 0.7, 2)
        write(root / f"boxes/labels/{k}.txt", f"{k % 2} {x} {y} 0.4 0.4\n")
    for k in range(11):
        place = root / "labels" / ("apple", "banana")[k % 2] / f"{k}.png"
        save(place, rng.integers(0, 255, (40, 40, 3), np.uint8))
    write(root / "boxes/images/3.jpg", "broken")
    write(root / "labels/apple/4.png", "broken")
    return root


def ordered_data(files: Path, **options: Any) -> CombinedDataModule:
    defaults = {
        "detection": YOLOText(str(files / "boxes"), names=["apple", "banana"]),
        "classification": ImageFolder(str(files / "labels")),
        "detection_batch_size": 4,
        "classification_batch_size": 8,
        "steps_per_epoch": 12,
        "detection_augmentation": DetectionAugmentation(),
        "classification_augmentation": ClassificationAugmentation((1, 2)),
        "seed": 5,
    }
    return set_up_data(**{**defaults, **options})


@pytest.fixture(scope="module")
def single_process_batches(files):
    """The batches of twelve steps, read without workers."""
    return list(ordered_data(files).train_dataloader())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 4])
def test_batches_are_equal_for_any_number_of_workers(files, single_process_batches, workers):
    helped = list(ordered_data(files, num_workers=workers).train_dataloader())
    assert len(helped) == len(single_process_batches) == 12
    for a, b in zip(single_process_batches, helped, strict=True):
        assert a.step == b.step
        assert a.sample_ids.tolist() == b.sample_ids.tolist()
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.faults == b.faults
        if isinstance(a, DetectionBatch):
            assert torch.equal(a.boxes_cxcywh_norm, b.boxes_cxcywh_norm)


def test_each_pass_has_every_sample_once_in_its_own_order(files, single_process_batches):
    order = ordered_data(files).order
    for kind, size, passes in ((DetectionBatch, 10, 2), (ClassificationBatch, 11, 4)):
        chosen = [batch for batch in single_process_batches if isinstance(batch, kind)]
        planned = [index for batch in chosen for index in order.plan(batch.step).indices]
        found = [planned[k * size : (k + 1) * size] for k in range(passes)]
        assert all(sorted(one) == list(range(size)) for one in found)
        # another image is read in place of the broken one, and has its own id
        ids = torch.cat([batch.sample_ids for batch in chosen]).tolist()
        replaced = {(plan, read) for plan, read in zip(planned, ids, strict=True) if plan != read}
        assert len(replaced) == 1
        assert len({tuple(one) for one in found}) == passes
        images = torch.cat([batch.images for batch in chosen])
        again = images[ids.index(0)], images[size + ids[size:].index(0)]
        assert not torch.equal(*again)  # augmentation draws anew in each pass


def test_order_depends_on_the_seed(files, single_process_batches):
    other = next(iter(ordered_data(files, seed=6).train_dataloader()))
    assert other.sample_ids.tolist() != single_process_batches[0].sample_ids.tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batches(files, single_process_batches, world_size):
    data = ordered_data(files)
    dataset = JointDataset(data.detection, data.classification, data.augmentations, data.seed)
    order = data.order
    for step, whole in enumerate(single_process_batches):
        plans = [order.plan(step, rank, world_size) for rank in range(world_size)]
        assert sum((plan.indices for plan in plans), []) == order.plan(step).indices
        assert {plan.images_seen for plan in plans} == {whole.images_seen}
        parts = [dataset[plan] for plan in plans]
        assert len({len(part) for part in parts}) == 1
        assert torch.cat([part.sample_ids for part in parts]).tolist() == whole.sample_ids.tolist()
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert [fault for part in parts for fault in part.faults] == whole.faults


class Epochs:
    """Epochs of a loader, without a trainer; `trained` is its number of trained steps."""

    def __init__(self, data: CombinedDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loader, self.data, self.trained, self.starts = data.train_dataloader(), data, 0, 0
        self.loader.sampler.first_step = lambda: self.trained
        start = TrainingLoader._start

        def counted(loader: TrainingLoader) -> Any:
            self.starts += 1
            return start(loader)

        monkeypatch.setattr(TrainingLoader, "_start", counted)

    def steps(self, trained: int, count: int | None = None) -> list[int]:
        """Read `count` batches, by default an epoch, compare them, and return their steps."""
        self.trained = trained
        batches = list(itertools.islice(iter(self.loader), count))
        for batch in batches:
            assert torch.equal(batch.images, self.data.batch(batch.step).images)
        return [batch.step for batch in batches]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_are_parts_of_one_order(files, monkeypatch, workers):
    data = ordered_data(files, steps_per_epoch=5, num_workers=workers)
    epochs = Epochs(data, monkeypatch)
    assert [epochs.steps(first) for first in (0, 5, 10)] == [
        [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14],
    ]  # fmt: skip
    assert epochs.starts == 1
    # a resumed training, and an epoch that is read again
    assert epochs.steps(7) == [7, 8, 9]
    assert epochs.steps(10) == [10, 11, 12, 13, 14]
    assert epochs.starts == 2
    assert epochs.steps(10) == [10, 11, 12, 13, 14]
    # an epoch that ends early
    assert epochs.steps(15, count=2) == [15, 16]
    assert epochs.steps(17) == [17, 18, 19]
    assert epochs.steps(20, count=0) == []
    assert epochs.steps(20) == [20, 21, 22, 23, 24]
    assert epochs.starts == 5


def test_two_iterations_of_a_loader_do_not_share_batches(files):
    loader = ordered_data(files, steps_per_epoch=3).train_dataloader()
    pairs = [(a.step, b.step) for a, b in zip(loader, loader, strict=True)]
    assert pairs == [(0, 0), (1, 1), (2, 2)]
    assert [batch.step for batch in loader] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_read_on_into_the_next_epoch(files, monkeypatch):
    read = torch.zeros(1, dtype=torch.int64).share_memory_()
    get = JointDataset.__getitem__

    def counted(dataset: JointDataset, plan: Any) -> Any:
        read[0] = plan.step
        return get(dataset, plan)

    monkeypatch.setattr(JointDataset, "__getitem__", counted)
    data = ordered_data(files, steps_per_epoch=3, num_workers=1)
    epochs = Epochs(data, monkeypatch)
    steps = [batch.step for batch in epochs.loader]
    assert steps == [0, 1, 2]
    deadline = time.monotonic() + 60
    while read[0] < 4 and time.monotonic() < deadline:  # two batches are prefetched by a worker
        time.sleep(0.01)
    assert read[0] == 4
    _shutdown_workers_and_reset_iterator(epochs.loader)  # as at the end of a training
    monkeypatch.undo()
    epochs.loader.sampler.first_step = lambda: 3
    assert [batch.step for batch in epochs.loader] == [3, 4, 5]


def test_an_error_of_a_batch_ahead_is_raised_at_its_step(files, monkeypatch):
    get = JointDataset.__getitem__

    def failing(dataset: JointDataset, plan: Any) -> Any:
        if plan.step == 4:
            raise InputError("step 4")
        return get(dataset, plan)

    monkeypatch.setattr(JointDataset, "__getitem__", failing)
    epochs = Epochs(ordered_data(files, steps_per_epoch=3, num_workers=1), monkeypatch)
    assert [batch.step for batch in epochs.loader] == [0, 1, 2]
    epochs.trained = 3
    read: list[int] = []
    with pytest.raises(InputError, match="step 4"):
        read.extend(batch.step for batch in epochs.loader)
    assert [batch.step for batch in itertools.islice(epochs.loader, 1)] == [3]
