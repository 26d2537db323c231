"""Checkpoints that a thread writes while the training goes on."""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.checkpoints.test_checkpoints import TinyModule, fit, last_checkpoint, saved_step
from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint
from yolo_lightning.checkpoints import io as checkpoint_io
from yolo_lightning.checkpoints.io import load_file, snapshot, write_checkpoint
from yolo_lightning.errors import InputError


class Gate:
    """Lets `write_checkpoint` wait; records what is written, one file at a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.started = threading.Event(), threading.Event()
        self.steps: list[tuple[str, int]] = []
        self._alone = threading.Lock()
        monkeypatch.setattr(checkpoint_io, "write_checkpoint", self.write)

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        assert self._alone.acquire(blocking=False), "two at once"
        self.started.set()
        assert self.opened.wait(60), "the training waits for the thread"
        write_checkpoint(checkpoint, path)
        self.steps.append((Path(path).name, checkpoint["global_step"]))
        self._alone.release()


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def test_the_training_goes_on_and_the_file_has_the_state_of_its_step(tmp_path, gate):
    states: dict[int, dict[str, torch.Tensor]] = {}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module: Any, *_: object) -> None:
            step = trainer.global_step
            states[step] = {k: v.clone() for k, v in module.state_dict().items()}
            momentum = trainer.optimizers[0].state.values()
            states[step]["momentum"] = next(iter(momentum))["momentum_buffer"].clone()
            if step == 4:  # two steps after the checkpoint
                assert gate.started.wait(60)
                assert not last_checkpoint(tmp_path).exists()
                gate.opened.set()

    fit(tmp_path, 5, Watch(), LastCheckpoint(every_n_steps=2))
    assert gate.steps == [("last.ckpt.part", 2), ("last.ckpt.part", 4), ("last.ckpt.part", 5)]
    folder = last_checkpoint(tmp_path).parent
    for name, step in (("previous.ckpt", 4), ("last.ckpt", 5)):
        found = load_file(folder / name)
        assert found["global_step"] == step
        for key, tensor in found["state_dict"].items():
            assert torch.equal(tensor, states[step][key])
        momentum = found["optimizer_states"][0]["state"][0]["momentum_buffer"]
        assert torch.equal(momentum, states[step]["momentum"])
    assert not torch.equal(states[4]["linear.weight"], states[5]["linear.weight"])


def test_files_are_written_one_after_the_other(tmp_path, gate):
    gate.opened.set()
    best = ModelCheckpoint(tmp_path, "{step}", monitor="score", mode="max", every_n_train_steps=1)
    fit(tmp_path, 4, best, LastCheckpoint(every_n_steps=1))
    assert [step for name, step in gate.steps if name == "last.ckpt.part"] == [1, 2, 3, 4]
    assert [step for name, step in gate.steps if name != "last.ckpt.part"] == [1, 2, 3, 4]


def test_an_error_of_the_training_waits_for_the_thread(tmp_path, gate):
    class Broken(pl.Callback):
        def on_train_batch_start(self, trainer, *_: object) -> None:
            if trainer.global_step == 3:
                threading.Timer(0.3, gate.opened.set).start()
                raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        fit(tmp_path, 5, Broken(), LastCheckpoint(every_n_steps=2))
    assert saved_step(last_checkpoint(tmp_path)) == 2


def test_an_error_of_the_thread_ends_the_training(tmp_path):
    class Unloadable(pl.Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
            checkpoint["values"] = {1, 2} if trainer.global_step == 4 else [1, 2]

    with pytest.raises(InputError, match=r"its pickle uses __builtin__.set"):
        fit(tmp_path, 9, Unloadable(), LastCheckpoint(every_n_steps=2))
    assert saved_step(last_checkpoint(tmp_path)) == 2
    assert [file.name for file in last_checkpoint(tmp_path).parent.iterdir()] == ["last.ckpt"]


def test_a_snapshot_shares_nothing_that_changes():
    module = TinyModule()
    state = module.state_dict()
    weight = state["linear.weight"]
    nested: dict[str, Any] = {"list": [1, [weight]], "tuple": (weight, "a"), "state": state}
    copied = snapshot(nested)
    with torch.no_grad():
        module.linear.weight.zero_()
    nested["list"].append(2)
    state["more"] = weight
    assert copied["list"][0] == 1
    assert len(copied["list"]) == 2
    assert type(copied["state"]) is OrderedDict
    assert list(copied["state"]) == ["linear.weight", "linear.bias"]
    assert copied["state"]._metadata == state._metadata  # type: ignore[attr-defined]
    kept = copied["state"]["linear.weight"]
    assert kept.abs().sum() > 0
    assert copied["tuple"][0] is kept  # written once
    assert copied["list"][1][0] is kept
