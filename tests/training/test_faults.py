"""Two ranks, with a failure on one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.diary import entries
from tests.helpers.paths import REPO
from tests.helpers.processes import ENVIRONMENT, rank_pids, start, wait_or_kill

pytestmark = pytest.mark.end_to_end

DDP = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=500")


def child_pids(process: int) -> list[int]:
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == process:
            pids.append(int(entry.name))
    return pids


def test_dead_loader_worker_ends_both_ranks_with_a_message(tmp_path):
    process = start(tmp_path, *DDP)
    deadline = time.monotonic() + 120
    while not entries(tmp_path, 1) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    rank = rank_pids(process.pid)[1]
    workers = [p for p in child_pids(rank) if Path(f"/proc/{p}/cmdline").read_bytes()]
    assert workers, "the rank has loader workers"
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert wait_or_kill(process, 30) != 0
    assert "a loader worker died" in (tmp_path / "log.txt").read_text()


WORKER = '''
import json, os, sys
import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.callbacks import FiniteGuard
from yolo_lightning.callbacks.finite_guard import NonFiniteError
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.errors import InputError

torch.set_num_threads(1)
tree, folder = sys.argv[1:]


def train(name, callbacks, frozen, steps, devices=2, **options):
    pl.seed_everything(0, verbose=False)
    data = CombinedDataModule(
        tree, ShapesDetection(length=32, image_size=64),
        ShapesImageLabels(length=32, image_size=64), detection_batch_size=4,
        classification_batch_size=4, image_size=64, num_workers=0, steps_per_epoch=40)
    model = DetectorModule(tree, [(1.5, 1.5)], "small", 0, 0, learning_rate=0.01,
                           backbone_lr_factor=0.0 if frozen else 1.0)
    recorder = Recorder()
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, logger=False, default_root_dir=folder,
        strategy="ddp" if devices > 1 else "auto", enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        callbacks=[recorder, *callbacks], **options)
    message = ""
    try:
        trainer.fit(model, data)
    except NonFiniteError as error:
        message = str(error)
    weights = float(sum(p.double().abs().sum() for p in model.parameters()))
    skipped = [c.skipped for c in trainer.callbacks if isinstance(c, FiniteGuard)]
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    out = {"losses": recorder.losses, "weights": weights, "skipped": skipped, "message": message,
           "step": trainer.global_step, "scale": scaler and scaler.get_scale()}
    with open(f"{folder}/{name}-rank{trainer.global_rank}.json", "w") as file:
        json.dump(out, file)


class Recorder(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        mean = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        self.losses.append(float(mean))


class InjectNaN(pl.Callback):
    """Put NaN into the images of some steps on rank 1, and of all steps from `first` on."""

    def __init__(self, steps, first=10_000):
        self.steps, self.first = steps, first

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and (batch.step in self.steps or batch.step >= self.first):
            batch.images = batch.images.float()
            batch.images[0, 0, 0, 0] = float("nan")


class BadLoss(pl.Callback):
    """Add NaN to the loss of a step on rank 1, which leaves its gradients finite."""

    def on_train_start(self, trainer, module):
        terms_of = module.loss_terms
        if trainer.global_rank == 1:
            module.loss_terms = lambda batch: terms_of(batch) | (
                {"loss_bad": torch.tensor(torch.nan)} if batch.step == 1 else {})


if "LOCAL_RANK" not in os.environ:  # before the second rank is started
    train("alone", [], True, 20, devices=1)
train("frozen", [], True, 20)
plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
train("scaled", [BadLoss(), FiniteGuard()], False, 4, plugins=[plugin])
train("skipped", [InjectNaN({1, 4}), FiniteGuard()], False, 8)
train("ended", [InjectNaN(set(), first=2), FiniteGuard(2)], False, 8)
try:
    train("synchronised", [], False, 4, sync_batchnorm=True)
except InputError as error:
    rank = os.environ.get("LOCAL_RANK", 0)
    with open(f"{folder}/rejected-rank{rank}.json", "w") as file:
        json.dump(str(error), file)
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    """What each training of WORKER left, by its name and rank."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(WORKER)
    result = subprocess.run(
        [sys.executable, "worker.py", str(REPO / "recipes/trees/shapes.tsv"), "."],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*-rank*.json")}


def test_two_ranks_have_the_losses_of_one(trained):
    """With frozen statistics, only the order of additions differs."""
    one = trained["alone-rank0"]["losses"]
    assert len(one) == 20
    assert len(set(one)) == 20
    for rank in (0, 1):
        assert trained[f"frozen-rank{rank}"]["losses"] == pytest.approx(one, rel=1e-5)


def test_non_finite_loss_on_one_rank_skips_the_step_on_both(trained):
    first, second = (trained[f"skipped-rank{k}"] for k in (0, 1))
    assert first["skipped"] == second["skipped"] == [2]
    assert first["weights"] == second["weights"]
    assert first["step"] == second["step"] == 8
    finite = [value == value for value in first["losses"]]
    assert finite == [True, False, True, True, False, True, True, True]


def test_bad_loss_on_one_rank_skips_the_float16_step_on_both(trained):
    first, second = (trained[f"scaled-rank{k}"] for k in (0, 1))
    assert first["skipped"] == second["skipped"] == [1]
    assert first["weights"] == second["weights"]
    assert first["weights"] == first["weights"]  # not NaN
    assert first["scale"] == second["scale"] == 2.0**9


def test_too_many_non_finite_steps_end_both_ranks(trained):
    first, second = (trained[f"ended-rank{k}"] for k in (0, 1))
    assert first["message"].startswith("3 consecutive steps were not finite; allowed: 2")
    assert second["message"].startswith("3 consecutive steps were not finite; allowed: 2")
    assert "rank 1, loss is not finite: step 4, detection samples" in second["message"]
    assert "not-finite-step4-rank1.pt" in second["message"]
    assert "rank 0" not in first["message"]


def test_sync_batchnorm_on_cpus_is_rejected(trained):
    for rank in (0, 1):
        message = trained[f"rejected-rank{rank}"]
        assert "trainer.sync_batchnorm is true; allowed on CPUs: false" in message
