"""`FiniteGuard`: skipped steps change nothing; too many of them end the training."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins import MixedPrecision

from tests.helpers.paths import REPO
from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.callbacks import FiniteGuard
from yolo_lightning.callbacks.finite_guard import NonFiniteError
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.errors import InputError

TREE = str(REPO / "recipes/trees/shapes.tsv")


class InjectNonFinite(pl.Callback):
    """Put NaN into images, or infinity into a gradient, and record the state after each step."""

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


def train(tmp_path, injector, guard, steps=6, accumulate=1, callbacks=(), **options):
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
        accumulate_grad_batches=accumulate, callbacks=[*callbacks, injector, guard], **options,
    )  # fmt: skip
    trainer.fit(model, data)
    return trainer


def states_equal(first, second):
    return all(
        torch.equal(first[part][key], second[part][key])
        for part in (0, 1)
        for key in first[part]
        if "num_batches_tracked" not in str(key)
    )


@pytest.mark.parametrize("gradient", [False, True])
def test_skipped_step_changes_no_weights_momentum_or_statistics(tmp_path, capsys, gradient):
    injector, guard = InjectNonFinite([2, 3], gradient), FiniteGuard(max_consecutive=2)
    train(tmp_path, injector, guard)
    assert guard.skipped == 2
    states = injector.states
    assert states_equal(states[1], states[2])
    assert states_equal(states[2], states[3])
    assert not states_equal(states[3], states[4])
    assert all(torch.isfinite(v.float()).all() for v in states[-1][0].values())
    output = capsys.readouterr().out
    assert output.count("the step is skipped") == 2
    cause = "gradient" if gradient else "loss"
    assert f"{cause} is not finite: step 2, detection samples" in output


def test_without_the_guard_weights_become_non_finite(tmp_path):
    injector = InjectNonFinite([2])
    train(tmp_path, injector, pl.Callback(), steps=4)
    assert not torch.isfinite(injector.states[-1][0]["network.box_conv.weight"]).all()


def test_too_many_consecutive_steps_end_the_training_and_save_the_batch(tmp_path):
    with pytest.raises(
        NonFiniteError, match="3 consecutive steps were not finite; allowed: 2"
    ) as caught:
        train(tmp_path, InjectNonFinite([1, 3, 4, 5]), FiniteGuard(max_consecutive=2))
    assert "step 5, classification samples" in str(caught.value)
    (file,) = tmp_path.glob("not-finite-*.pt")
    assert file.name == "not-finite-step5-rank0.pt"
    (batch,) = torch.load(file, weights_only=True)
    assert batch["step"] == 5
    assert torch.isnan(batch["images"]).any()
    assert len(batch["sample_ids"]) == len(batch["labels"]) == 4


def test_no_checkpoint_is_written_after_too_many_skipped_steps(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch.step >= 2:
                trainer.save_checkpoint(tmp_path / f"step{batch.step}.ckpt")

    with pytest.raises(NonFiniteError, match="1 consecutive steps were not finite; allowed: 0"):
        train(tmp_path, InjectNonFinite([3]), FiniteGuard(0), callbacks=[Save()])
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step2.ckpt"]


def test_nothing_of_a_skipped_step_reaches_an_average_of_the_weights(tmp_path):
    average = WeightAveraging(avg_fn=lambda averaged, new, count: (averaged + new) / 2)
    train(tmp_path, InjectNonFinite([1, 2]), FiniteGuard(), steps=4, callbacks=[average])
    assert average._average_model is not None
    assert all(v.float().isfinite().all() for v in average._average_model.state_dict().values())


def test_all_batches_of_an_accumulated_step_are_skipped(tmp_path):
    injector, guard = InjectNonFinite([3]), FiniteGuard()
    train(tmp_path, injector, guard, steps=3, accumulate=2)
    assert guard.skipped == 1
    assert states_equal(injector.states[1], injector.states[3])  # batches 2 and 3 are one step
    assert not states_equal(injector.states[3], injector.states[5])


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 1.0}])
def test_guard_works_with_mixed_precision_and_gradient_clipping(tmp_path, options):
    injector, guard = InjectNonFinite([2]), FiniteGuard()
    train(tmp_path, injector, guard, steps=4, **options)
    assert guard.skipped == 1
    assert states_equal(injector.states[1], injector.states[2])
    assert not states_equal(injector.states[2], injector.states[3])


def float16(init_scale=2.0**10):
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


@pytest.fixture
def visible_uninitialised_memory():
    """Let PyTorch fill uninitialised memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("visible_uninitialised_memory")
@pytest.mark.parametrize("steps", [[0], [0, 1]])
def test_float16_momentum_is_zero_after_a_skipped_first_step(tmp_path, steps):
    injector = InjectNonFinite(steps, gradient=True)
    dtypes = set()

    class RecordTypes(pl.Callback):
        def on_train_start(self, trainer, module):
            convolution = module.network.body[0].conv
            convolution.register_forward_hook(lambda *values: dtypes.add(values[-1].dtype))

    plugin = float16()
    callbacks = [RecordTypes()]
    train(tmp_path, injector, FiniteGuard(), steps=4, plugins=[plugin], callbacks=callbacks)
    assert dtypes == {torch.float16}
    weights, momentum = injector.states[len(steps) - 1]
    assert momentum
    assert all(not buffer.any() for buffer in momentum.values())
    weights, momentum = injector.states[-1]
    assert all(torch.isfinite(value.float()).all() for value in weights.values())
    assert any(buffer.any() for buffer in momentum.values())
    assert plugin.scaler.get_scale() == 2.0 ** (10 - len(steps))


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 1.0}], ids=["fused", "clipped"])
def test_float16_step_with_a_bad_loss_and_finite_gradients_is_skipped(
    tmp_path, monkeypatch, capsys, options
):
    loss_terms = DetectorModule.loss_terms

    def with_nan(self, batch):
        terms = loss_terms(self, batch)
        return terms | {"loss_bad": torch.tensor(torch.nan)} if batch.step == 2 else terms

    monkeypatch.setattr(DetectorModule, "loss_terms", with_nan)
    injector, guard = InjectNonFinite([]), FiniteGuard()
    train(tmp_path, injector, guard, steps=4, plugins=[float16()], **options)
    assert guard.skipped == 1
    assert states_equal(injector.states[1], injector.states[2])
    assert not states_equal(injector.states[2], injector.states[3])
    assert "loss is not finite: step 2, detection samples" in capsys.readouterr().out


def test_negative_maximum_is_rejected():
    with pytest.raises(InputError, match="max_consecutive is -1; allowed: 0 or more"):
        FiniteGuard(-1)
