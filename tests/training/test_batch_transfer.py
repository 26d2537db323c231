"""Copies of batches to a device: on a GPU, on a stream of their own; here, with pretend streams."""

import contextlib

import pytest
import torch

from tests.helpers.golden import detection_batch
from yolo_lightning import CombinedDataModule
from yolo_lightning.batches import DetectionBatch
from yolo_lightning.datamodules import loader

CUDA = torch.device("cuda", 0)


@pytest.fixture
def data():
    return CombinedDataModule(["a"])


@pytest.fixture
def batch():
    return detection_batch(torch.rand(2, 8, 4), torch.zeros(2, 8, dtype=torch.long))


@pytest.fixture
def events(monkeypatch):
    """What is called, in order; streams are names."""
    found = []

    class Stream(str):
        def wait_stream(self, other):
            found.append((f"{self} waits for", str(other)))

    @contextlib.contextmanager
    def stream(name):
        found.append(("enter", str(name)))
        yield
        found.append(("leave", str(name)))

    def move(batch, device):
        found.append(("copy to", str(device)))
        return batch

    monkeypatch.setattr(loader, "_copy_stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(DetectionBatch, "to", move)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, name: found.append(("record", str(name)))
    )
    return found


def test_a_copy_to_a_gpu_has_its_own_stream_for_which_the_step_waits(data, batch, events):
    assert data.transfer_batch_to_device(batch, CUDA, 0) is batch
    tensors = sum(isinstance(value, torch.Tensor) for value in vars(batch).values())
    assert tensors == 9
    assert events == [
        ("enter", "copying"), ("copy to", "cuda:0"), ("leave", "copying"),
        ("computing waits for", "copying"), *[("record", "computing")] * tensors,
    ]  # fmt: skip


def test_a_copy_to_a_cpu_has_no_stream(data, batch, events):
    data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert events == [("copy to", "cpu")]


def test_other_batches_are_copied_as_lightning_does(data, events):
    class Other:
        def to(self, device):
            return f"moved to {device}"

    assert data.transfer_batch_to_device([Other()], CUDA, 0) == ["moved to cuda:0"]
    assert events == []
