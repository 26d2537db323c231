"""`Throughput`, with a fake clock."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import psutil
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader, Dataset

from yolo_lightning.callbacks import throughput
from yolo_lightning.callbacks.throughput import Throughput

FIRST_S, FETCH_S, STEP_S, PAUSE_S = 1000.0, 1.0, 3.0, 500.0


class Clock:
    """A fake `time` module."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s


class Batches(Dataset[torch.Tensor]):
    """Batches of four and two images in turn; the first one takes long."""

    def __init__(self, clock: Clock, length: int) -> None:
        self.clock, self.length, self.first = clock, length, True

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.clock.now_s += FIRST_S if self.first else FETCH_S
        self.first = False
        return torch.ones(2 if index % 2 else 4, 1)


class SlowModule(pl.LightningModule):
    """A module whose steps, validations and checkpoints take a known time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.layer = clock, torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        self.clock.now_s += STEP_S
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.clock.now_s += PAUSE_S

    def on_save_checkpoint(self, checkpoint) -> None:
        self.clock.now_s += PAUSE_S

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class RecordingLogger(CSVLogger):
    """Keeps the logged speed and memory, by step."""

    logged: dict[int, dict[str, float]]

    def log_metrics(self, metrics, step=None) -> None:
        if "speed/step_s" in metrics:
            self.logged[step + 1] = dict(metrics)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    fake_clock = Clock()
    monkeypatch.setattr(throughput, "time", fake_clock)
    return fake_clock


def train(clock: Clock, folder: Path, steps: int, ckpt: Path | None = None, **options):
    logger = RecordingLogger(str(folder))
    logger.logged = {}
    callbacks = [Throughput(), *options.pop("callbacks", [])]
    trainer = pl.Trainer(
        **{
            "max_steps": steps, "max_epochs": -1, "log_every_n_steps": 4, "logger": logger,
            "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "callbacks": callbacks, **options,
        },
    )  # fmt: skip
    train_loader = DataLoader(Batches(clock, 100), batch_size=None)
    val_loader = DataLoader(Batches(clock, 2), batch_size=None)
    trainer.fit(SlowModule(clock), train_loader, val_loader, ckpt_path=ckpt, weights_only=True)
    return logger.logged


def test_values_are_means_since_the_last_logged_step_without_the_first_step(clock, tmp_path):
    logged = train(clock, tmp_path, 12)
    assert list(logged) == [4, 8, 12]
    for step, metrics in logged.items():
        assert metrics["speed/step_s"] == FETCH_S + STEP_S
        assert metrics["speed/data_wait_share"] == 0.25
        # without the first batch, two of three batches are small; later half of them
        images = (2 + 4 + 2) / 3 if step == 4 else 3
        assert metrics["speed/images_per_s"] == pytest.approx(images / 4)


def test_validations_and_checkpoints_are_excluded(clock, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    logged = train(clock, tmp_path, 12, callbacks=[checkpoint], val_check_interval=5)
    assert clock.now_s > 6 * PAUSE_S
    assert [metrics["speed/step_s"] for metrics in logged.values()] == [4.0] * 3
    assert [metrics["speed/data_wait_share"] for metrics in logged.values()] == [0.25] * 3


def test_the_time_of_other_callbacks_is_included(clock, tmp_path):
    class SlowCallback(pl.Callback):
        def on_train_batch_end(self, *args) -> None:
            clock.now_s += 4.0

    logged = train(clock, tmp_path, 8, callbacks=[SlowCallback()])
    assert logged[8]["speed/step_s"] == 8.0
    assert logged[8]["speed/data_wait_share"] == 0.125


def test_accumulated_batches_are_one_step(clock, tmp_path):
    logged = train(clock, tmp_path, 8, accumulate_grad_batches=2)
    assert logged[8]["speed/step_s"] == 2 * (FETCH_S + STEP_S)
    assert logged[8]["speed/images_per_s"] == pytest.approx(6 / 8)


def test_a_resumed_run_starts_new_means(clock, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    train(clock, tmp_path, 6, callbacks=[checkpoint])
    logged = train(clock, tmp_path, 12, tmp_path / "step=6.ckpt")
    assert list(logged) == [8, 12]
    assert [metrics["speed/step_s"] for metrics in logged.values()] == [4.0, 4.0]


def test_the_first_step_is_not_logged(clock, tmp_path):
    assert list(train(clock, tmp_path, 3, log_every_n_steps=1)) == [2, 3]


def test_the_profiler_still_records_the_dataloader(clock, tmp_path):
    profiler = SimpleProfiler()
    train(clock, tmp_path, 5, profiler=profiler)
    waits = profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]
    assert len(waits) == 5


def test_images_of_all_ranks_are_counted():
    callback = Throughput()
    callback._images, callback._total_s, callback._steps = 10, 2.0, 1
    trainer: Any = SimpleNamespace(world_size=3)
    metrics = callback._metrics(trainer, torch.device("cpu"))
    assert metrics["speed/images_per_s"] == 15
    resident_mib = psutil.Process().memory_info().rss / 2**20
    assert metrics["memory/process_mib"] == pytest.approx(resident_mib, rel=0.1)
    assert "memory/gpu_peak_mib" not in metrics


def test_gpu_peak_memory_is_logged_and_reset(monkeypatch):
    reset_devices: list[Any] = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset_devices.append)
    callback = Throughput()
    callback._images, callback._total_s, callback._steps = 10, 2.0, 1
    device = torch.device("cuda", 1)
    trainer: Any = SimpleNamespace(world_size=1)
    metrics = callback._metrics(trainer, device)
    assert metrics["memory/gpu_peak_mib"] == 3
    assert reset_devices == [device]
