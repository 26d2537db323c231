"""`RunRecord`: the final model of a run."""

import os
import signal
from unittest.mock import MagicMock

import lightning.pytorch as pl
import pytest

from tests.helpers.training import train
from yolo_lightning.callbacks import LastCheckpoint, Preemption, RunRecord, run_record
from yolo_lightning.signals import Stop


class StopAtStep(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.end_to_end
def test_resuming_logs_the_model_that_a_stop_at_the_last_step_left_out(tmp_path, monkeypatch):
    logged: list[str] = []
    monkeypatch.setattr(run_record, "run_loggers", lambda _: [MagicMock(run_id=None)])
    monkeypatch.setattr(RunRecord, "_log_model", lambda self, _, path, __: logged.append(path.name))
    options = {"default_root_dir": tmp_path, "val_check_interval": 50, "enable_checkpointing": True}

    def callbacks(step: int) -> list[pl.Callback]:
        record = RunRecord(tmp_path, {}, {})
        return [record, StopAtStep(step), LastCheckpoint(100), Preemption()]

    with pytest.raises(Stop):
        train(callbacks(3), max_steps=3, **options)
    assert logged == []
    train(callbacks(0), max_steps=3, ckpt_path=tmp_path / "checkpoints/last.ckpt", **options)
    assert logged == ["last.ckpt"]
