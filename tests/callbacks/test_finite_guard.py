"""Steps that are no number change nothing, and end a training that has too many of them."""

import copy

import lightning.pytorch as pl
import pytest
import torch

from tests.helpers.paths import REPO
from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.callbacks import FiniteGuard
from yolo_lightning.callbacks.finite_guard import NotFinite
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.errors import InputError

TREE = str(REPO / "recipes/trees/shapes.tsv")


class Poison(pl.Callback):
    """Spoils the images of chosen steps, or one gradient, and notes the state around each step."""

    def __init__(self, steps, gradient=False):
        self.steps, self.gradient, self.states = set(steps), gradient, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch.step in self.steps and not self.gradient:
            batch.images = batch.images.float()
            batch.images[0, 0, 0, 0] = float("nan")

    def on_after_backward(self, trainer, module):
        if self.gradient and trainer.global_step in self.steps:
            next(module.parameters()).grad.view(-1)[0] = float("inf")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        momentum = {
            k: v["momentum_buffer"].clone()
            for k, v in trainer.optimizers[0].state_dict()["state"].items()
        }
        self.states.append((copy.deepcopy(module.state_dict()), momentum))


def train(tmp_path, poison, guard, steps=6, accumulate=1, **options):
    pl.seed_everything(0, verbose=False)
    data = CombinedDataModule(
        TREE, ShapesDetection(length=16, image_size=64),
        ShapesImageLabels(length=16, image_size=64), detection_batch_size=4,
        classification_batch_size=4, image_size=64, num_workers=0, steps_per_epoch=12,
    )  # fmt: skip
    model = DetectorModule(TREE, [(1.5, 1.5)], "small", 8, 4, learning_rate=0.01)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=steps, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        accumulate_grad_batches=accumulate, callbacks=[poison, guard], **options,
    )  # fmt: skip
    trainer.fit(model, data)
    return trainer


def same(first, second):
    return all(
        torch.equal(first[part][key], second[part][key])
        for part in (0, 1)
        for key in first[part]
        if "num_batches_tracked" not in str(key)
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_a_bad_step_changes_neither_weights_nor_momentum_nor_statistics(tmp_path, capsys, gradient):
    poison, guard = Poison([2, 3], gradient), FiniteGuard(most_in_a_row=2)
    train(tmp_path, poison, guard)
    assert guard.skipped == 2
    states = poison.states
    assert same(states[1], states[2])
    assert same(states[2], states[3])
    assert not same(states[3], states[4])
    assert all(torch.isfinite(v.float()).all() for v in states[-1][0].values())
    said = capsys.readouterr().out
    assert said.count("the step is skipped") == 2
    assert (
        "gradient" if gradient else "loss"
    ) + " is not finite: step 2, detection samples" in said


def test_without_the_guard_the_same_step_spoils_everything(tmp_path):
    poison = Poison([2])
    train(tmp_path, poison, pl.Callback(), steps=4)
    assert not torch.isfinite(poison.states[-1][0]["network.box_conv.weight"]).all()


def test_too_many_in_a_row_end_the_training_with_the_batch(tmp_path):
    with pytest.raises(NotFinite, match="3 steps in a row were not finite; allowed: 2") as caught:
        train(tmp_path, Poison([1, 3, 4, 5]), FiniteGuard(most_in_a_row=2))
    assert "step 5, classification samples" in str(caught.value)
    (file,) = tmp_path.glob("not-finite-*.pt")
    assert file.name == "not-finite-step5-rank0.pt"
    (batch,) = torch.load(file, weights_only=True)
    assert batch["step"] == 5
    assert torch.isnan(batch["images"]).any()
    assert len(batch["sample_ids"]) == len(batch["labels"]) == 4


def test_all_parts_of_an_accumulated_step_are_left_out(tmp_path):
    poison, guard = Poison([3]), FiniteGuard()
    train(tmp_path, poison, guard, steps=3, accumulate=2)
    assert guard.skipped == 1
    assert same(poison.states[1], poison.states[3])  # batches 2 and 3 are one step
    assert not same(poison.states[3], poison.states[5])


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 1.0}])
def test_precision_and_clipping_change_nothing_of_that(tmp_path, options):
    poison, guard = Poison([2]), FiniteGuard()
    train(tmp_path, poison, guard, steps=4, **options)
    assert guard.skipped == 1
    assert same(poison.states[1], poison.states[2])
    assert not same(poison.states[2], poison.states[3])


def test_less_than_none_is_refused():
    with pytest.raises(InputError, match="most_in_a_row is -1; allowed: 0 or more"):
        FiniteGuard(-1)
