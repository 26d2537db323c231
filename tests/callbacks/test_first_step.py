"""Dry run of the largest image size, and the sizes of multi-scale training."""

import copy

import lightning.pytorch as pl
import pytest
import torch

from tests.helpers.paths import REPO
from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.batches import DetectionBatch
from yolo_lightning.callbacks import MultiScale, multi_scale
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.errors import InputError

TREE = str(REPO / "recipes/trees/shapes.tsv")


def make_module_and_data(num_workers=0, **options):
    data = CombinedDataModule(
        TREE,
        ShapesDetection(length=16, image_size=64),
        ShapesImageLabels(length=16, image_size=64),
        classification_batch_size=2,
        image_size=64,
        num_workers=num_workers,
        steps_per_epoch=8,
        **{"detection_batch_size": 4, **options},
    )
    torch.manual_seed(0)
    return DetectorModule(TREE, [(1.5, 1.5)], "small", 8, 4, learning_rate=0.01), data


def fit(tmp_path, callbacks, steps=8, accumulate_grad_batches=1, **options):
    model, data = make_module_and_data(**options)
    trainer = pl.Trainer(
        accumulate_grad_batches=accumulate_grad_batches,
        default_root_dir=tmp_path, max_steps=steps, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(model, data)
    return model, trainer


class Recorder(pl.Callback):
    def __init__(self):
        self.sizes, self.losses = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.sizes.append(batch.images.shape[-1])
        self.losses.append(float(outputs["loss"]))


def test_dry_run_of_each_batch_type_at_the_largest_size_changes_nothing(tmp_path, monkeypatch):
    runs = []
    dry_run = multi_scale.dry_run

    def checked_dry_run(module, batch):
        state, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
        dry_run(module, batch)
        runs.append((isinstance(batch, DetectionBatch), tuple(batch.images.shape)))
        for name, value in module.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert all(p.grad is None for p in module.parameters())
        assert torch.equal(torch.get_rng_state(), random)

    monkeypatch.setattr(multi_scale, "dry_run", checked_dry_run)
    fit(tmp_path, [MultiScale([32, 64, 96])], steps=1)
    assert not runs, "a CPU"
    monkeypatch.setattr(multi_scale, "has_own_memory", lambda device: True)
    recorder = Recorder()
    fit(tmp_path, [MultiScale([32, 64, 96], every_n_batches=2), recorder])
    assert runs == [(True, (4, 3, 96, 96)), (False, (2, 3, 96, 96))]
    assert len(set(recorder.sizes)) > 1


def test_sizes_follow_the_seed_of_the_data_and_end_with_the_largest(tmp_path):
    """8 optimizer steps of 2 batches each: the last 4 of 16 batches have 96 px."""
    drawn = {}
    for seed in (0, 1):
        recorder = Recorder()
        callbacks = [MultiScale([32, 64, 96], 1, last_batches_at_largest=4), recorder]
        fit(tmp_path, callbacks, seed=seed, accumulate_grad_batches=2)
        assert (
            recorder.sizes
            == [multi_scale.size_at_step(step, [32, 64, 96], 1, seed) for step in range(12)]
            + [96] * 4
        )
        drawn[seed] = recorder.sizes
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_read_at_the_size_of_their_step(tmp_path, num_workers):
    """Over the end of an epoch, and in the last batches, at the largest size."""
    read = []

    class Reader(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            read.append((batch.step, batch.images))

    callbacks = [Reader(), MultiScale([32, 64, 96], 1, last_batches_at_largest=2)]
    _, trainer = fit(tmp_path, callbacks, steps=12, num_workers=num_workers)
    data = trainer.datamodule
    assert [step for step, _ in read] == list(range(12))
    sizes = [images.shape[-1] for _, images in read]
    drawn = [multi_scale.size_at_step(step, [32, 64, 96], 1, 0) for step in range(10)]
    assert sizes == [*drawn, 96, 96]
    for step, images in read:
        assert torch.equal(images, data.batch(step).images)
        assert data.order.plan(step).image_size == sizes[step]
    assert data.batch(3, image_size=160).images.shape[-1] == 160
    data.setup("fit")  # another training, without MultiScale
    assert data.batch(0).images.shape[-1] == 64


def test_too_little_memory_is_reported_before_the_first_step(tmp_path, monkeypatch):
    def out_of_memory(module, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    monkeypatch.setattr(multi_scale, "dry_run", out_of_memory)
    monkeypatch.setattr(multi_scale, "has_own_memory", lambda device: True)
    recorder = Recorder()
    with pytest.raises(InputError, match="4 images of 96 px, the largest size of MultiScale"):
        fit(tmp_path, [MultiScale([32, 96]), recorder])
    assert not recorder.sizes


def test_sizes_that_no_image_can_have_are_rejected(tmp_path):
    with pytest.raises(InputError, match="MultiScale: sizes is 3200; allowed: .* up to 2048"):
        fit(tmp_path, [MultiScale([32, 3200])])
