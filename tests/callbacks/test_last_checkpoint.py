"""`LastCheckpoint`: the last step of a training that ends early."""

import lightning.pytorch as pl
import torch

from tests.helpers.training import train
from yolo_lightning.callbacks import LastCheckpoint


class StopAfterThree(pl.Callback):
    """Stops the training as Lightning's Timer does for `max_time`."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step >= 3


def test_a_training_that_is_stopped_saves_its_last_step(tmp_path):
    callbacks = [StopAfterThree(), LastCheckpoint(every_n_steps=100)]
    options = {"val_check_interval": 50, "default_root_dir": tmp_path, "enable_checkpointing": True}
    trainer = train(callbacks, max_steps=6, **options)
    assert trainer.global_step == 3
    last = torch.load(LastCheckpoint.path(trainer), weights_only=True)
    assert last["global_step"] == 3
