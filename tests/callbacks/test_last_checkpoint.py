"""`LastCheckpoint`: the last step and the last validation of a training that ends early."""

import os
import signal
import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from tests.helpers.training import RecordingDetector, make_datamodule, train
from yolo_lightning.callbacks import LastCheckpoint, Preemption, ValidationReport
from yolo_lightning.errors import InputError
from yolo_lightning.signals import Stop


class StopAfterThree(pl.Callback):
    """Stops the training as Lightning's Timer does for `max_time`."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step >= 3

    def on_fit_start(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.should_stop = bool(trainer.ckpt_path)


def test_a_training_that_is_stopped_saves_its_last_step(tmp_path):
    callbacks = [StopAfterThree(), LastCheckpoint(every_n_steps=100)]
    options = {"val_check_interval": 50, "default_root_dir": tmp_path, "enable_checkpointing": True}
    trainer = train(callbacks, max_steps=6, **options)
    assert trainer.global_step == 3
    last = torch.load(LastCheckpoint.path(trainer), weights_only=True)
    assert last["global_step"] == 3


class Killed(Exception):
    """Ends a training at once, as `kill -9` does: nothing more is saved."""


class Validations(pl.Callback):
    """Records the validations, and interrupts one of them or the report after the last one."""

    def __init__(self, kind: str = "", step: int = 0) -> None:
        self.kind, self.step = kind, step
        self.results: list[tuple[int, float]] = []

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, *_) -> None:
        if trainer.global_step == self.step and batch_idx == 1:
            if self.kind == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            elif self.kind == "kill":
                raise Killed

    def on_validation_epoch_end(self, trainer, module) -> None:
        weights = module._sum()  # no metric of an untrained network would be as sensitive
        module.log("val/weights", weights)
        self.results.append((trainer.global_step, weights))

    def on_train_end(self, trainer, module) -> None:
        if self.kind == "kill in the report":
            raise Killed


LIMITS = {
    "max_steps": {"max_steps": 6},
    "max_epochs": {"max_steps": -1, "max_epochs": 2},
    "max_time": {"max_steps": 100},
}


def fit(folder, limit, validations):
    """Train for a while; resume from the last checkpoint, if there is one."""
    last = folder / "checkpoints/last.ckpt"
    best = ModelCheckpoint(
        folder / "checkpoints", "best", monitor="val/weights", enable_version_counter=False
    )
    stopper = [StopAfterThree()] if limit == "max_time" else []
    patience = EarlyStopping("val/weights", patience=9)
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(**{
        "default_root_dir": folder, "check_val_every_n_epoch": None, "val_check_interval": 2,
        "max_epochs": -1, "accelerator": "cpu", "num_sanity_val_steps": 0, "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, **LIMITS[limit],
        "callbacks": [*stopper, validations, patience, ValidationReport(), best,
                      LastCheckpoint(100), Preemption()],
    })  # fmt: skip
    path = last if last.exists() else None
    trainer.fit(RecordingDetector(), make_datamodule(), ckpt_path=path, weights_only=True)
    return trainer


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Train up to a limit once; return the folder and the validations."""
    done = {}

    def run(limit):
        if limit not in done:
            done[limit] = tmp_path_factory.mktemp(limit), Validations()
            fit(done[limit][0], limit, done[limit][1])
        return done[limit][0], done[limit][1].results

    return run


@pytest.mark.end_to_end
@pytest.mark.parametrize(("limit", "kind", "step"), [
    ("max_steps", "SIGTERM", 6),
    ("max_steps", "kill", 6),
    ("max_steps", "kill", 4),
    ("max_steps", "kill in the report", 6),
    ("max_epochs", "kill", 8),
    ("max_time", "SIGTERM", 3),
])  # fmt: skip
def test_resuming_makes_up_the_interrupted_validation(
    uninterrupted, tmp_path, monkeypatch, limit, kind, step
):
    from yolo_lightning.callbacks import validation_report

    reports: list[Any] = []

    def write(*args):
        reports.append(args)
        return []

    monkeypatch.setattr(validation_report, "write_report", write)
    whole, expected = uninterrupted(limit)
    del reports[:]
    first, second, third = Validations(kind, step), Validations(), Validations()
    with pytest.raises(Stop if kind == "SIGTERM" else Killed):
        fit(tmp_path, limit, first)
    trainer = fit(tmp_path, limit, second)
    results = dict(first.results) | dict(second.results)
    assert list(results.items()) == expected
    assert second.results[0][0] == step, "the interrupted one comes first"
    assert reports[-1][2]["step"] == expected[-1][0]
    for name in ("best.ckpt", "last.ckpt"):
        found, wanted = (
            torch.load(folder / "checkpoints" / name, weights_only=True)
            for folder in (tmp_path, whole)
        )
        for key in ("global_step", "loops", "lr_schedulers", "validation_is_due"):
            assert found[key] == wanted[key], (name, key)
        assert found["callbacks"].keys() == wanted["callbacks"].keys()
        stopping = next(key for key in wanted["callbacks"] if "EarlyStopping" in key)
        assert found["callbacks"][stopping] == wanted["callbacks"][stopping]
        assert all(torch.equal(found["state_dict"][k], v) for k, v in wanted["state_dict"].items())
    assert not list((tmp_path / "checkpoints").glob("*.part"))
    fit(tmp_path, limit, third)
    assert not third.results, "a finished training validates nothing"
    assert trainer.global_step == expected[-1][0]


class SlowSteps(pl.Callback):
    """Let a minute pass with every second step."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        self.saved: list[int] = []
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def on_train_batch_start(self, trainer, *_) -> None:
        self.now += 30.0

    def on_save_checkpoint(self, trainer, *_) -> None:
        self.saved.append(trainer.global_step)


def test_a_checkpoint_is_saved_every_few_minutes(tmp_path, monkeypatch):
    clock = SlowSteps(monkeypatch)
    options = {"val_check_interval": 50, "default_root_dir": tmp_path, "enable_checkpointing": True}
    train([clock, LastCheckpoint(100, every_minutes=1)], max_steps=5, **options)
    assert clock.saved == [2, 4, 5]
    assert LastCheckpoint().every_minutes == 5
    with pytest.raises(InputError, match="every_minutes is 0; allowed: more than 0"):
        LastCheckpoint(every_minutes=0)


class SameMetric(pl.Callback):
    """Logs a metric that never improves, and counts the training steps."""

    steps = 0

    def on_train_batch_end(self, *_: object) -> None:
        self.steps += 1

    def on_validation_epoch_end(self, trainer, module) -> None:
        module.log("val/same", 1.0)


@pytest.mark.end_to_end
@pytest.mark.parametrize(("every", "options"), [
    (2, {"check_val_every_n_epoch": None, "val_check_interval": 2}),
    (4, {}),  # Lightning would check at the end of the epoch, after the checkpoint
])  # fmt: skip
def test_a_training_that_early_stopping_ended_goes_on_with_other_settings_only(
    tmp_path, caplog, every, options
):
    def fit_with(patience: int, folder=tmp_path) -> tuple[int, int]:
        counter, last = SameMetric(), folder / "checkpoints/last.ckpt"
        pl.seed_everything(1, verbose=False)
        trainer = pl.Trainer(
            default_root_dir=folder, max_epochs=-1, max_steps=20, accelerator="cpu", logger=False,
            num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=True, **options,
            callbacks=[counter, EarlyStopping("val/same", patience=patience), LastCheckpoint(100)],
        )  # fmt: skip
        path = last if last.exists() else None
        trainer.fit(RecordingDetector(), make_datamodule(), ckpt_path=path, weights_only=True)
        return trainer.global_step, counter.steps

    assert fit_with(patience=1) == (2 * every, 2 * every)
    assert fit_with(patience=1) == (2 * every, 0)
    assert "EarlyStopping has ended this training; to go on" in caplog.text
    assert fit_with(patience=2) == (3 * every, every)
    assert fit_with(patience=2) == (3 * every, 0)
    whole = tmp_path / "whole"
    assert fit_with(2, whole) == (3 * every, 3 * every)
    found, wanted = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path, whole)
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
