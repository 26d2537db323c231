"""What happens to two ranks when something happens to one."""

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
from tests.helpers.processes import ENVIRONMENT, left_within, ranks_of, start

DDP = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=500")


def children(process: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == process:
            found.append(int(entry.name))
    return found


def test_a_dead_loader_worker_ends_both_ranks_with_its_reason(tmp_path):
    process = start(tmp_path, *DDP)
    until = time.monotonic() + 120
    while not entries(tmp_path, 1) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
    rank = ranks_of(process.pid)[1]
    workers = [p for p in children(rank) if Path(f"/proc/{p}/cmdline").read_bytes()]
    assert workers, "the rank has loader workers"
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert left_within(process, 30) != 0
    assert "a loader process died" in (tmp_path / "log.txt").read_text()


WORKER = '''
import json, os, sys
import lightning.pytorch as pl
import torch
from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.callbacks import FiniteGuard
from yolo_lightning.callbacks.finite_guard import NotFinite
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.errors import InputError

torch.set_num_threads(1)
tree, folder, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])


def train(name, callbacks, frozen, steps, **options):
    pl.seed_everything(0, verbose=False)
    data = CombinedDataModule(
        tree, ShapesDetection(length=32, image_size=64),
        ShapesImageLabels(length=32, image_size=64), detection_batch_size=4,
        classification_batch_size=4, image_size=64, num_workers=0, steps_per_epoch=40)
    model = DetectorModule(tree, [(1.5, 1.5)], "small", 0, 0, learning_rate=0.01,
                           backbone_lr_factor=0.0 if frozen else 1.0)
    diary = Diary()
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, logger=False, default_root_dir=folder,
        strategy="ddp" if devices > 1 else "auto", enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        callbacks=[diary, *callbacks], **options)
    said = ""
    try:
        trainer.fit(model, data)
    except NotFinite as error:
        said = str(error)
    weights = float(sum(p.double().abs().sum() for p in model.parameters()))
    skipped = [c.skipped for c in trainer.callbacks if isinstance(c, FiniteGuard)]
    out = {"losses": diary.losses, "weights": weights, "skipped": skipped, "said": said,
           "step": trainer.global_step}
    with open(f"{folder}/{name}-rank{trainer.global_rank}.json", "w") as file:
        json.dump(out, file)


class Diary(pl.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        mean = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        self.losses.append(float(mean))


class Poison(pl.Callback):
    """Spoils a step on rank 1 alone; from `last` on every step."""

    def __init__(self, steps, last=10_000):
        self.steps, self.last = steps, last

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and (batch.step in self.steps or batch.step >= self.last):
            batch.images = batch.images.float()
            batch.images[0, 0, 0, 0] = float("nan")


train("frozen", [], True, 20)
if devices > 1:
    train("skipped", [Poison({1, 4}), FiniteGuard()], False, 8)
    train("ended", [Poison(set(), last=2), FiniteGuard(2)], False, 8)
    try:
        train("synchronised", [], False, 4, sync_batchnorm=True)
    except InputError as error:
        rank = os.environ.get("LOCAL_RANK", 0)
        with open(f"{folder}/refused-rank{rank}.json", "w") as file:
            json.dump(str(error), file)
'''


def run(folder: Path, devices: int) -> dict[str, Any]:
    folder.mkdir()
    (folder / "worker.py").write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "worker.py", str(REPO / "recipes/trees/shapes.tsv"), ".", str(devices)],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*-rank*.json")}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks") / "two", 2), tmp_path_factory


def test_two_ranks_have_the_losses_of_one(two):
    """With frozen statistics nothing but the order of additions differs."""
    found, factory = two
    one = run(factory.mktemp("rank") / "one", 1)["frozen-rank0"]["losses"]
    assert len(one) == 20
    assert len(set(one)) == 20
    for rank in (0, 1):
        assert found[f"frozen-rank{rank}"]["losses"] == pytest.approx(one, rel=1e-5)


def test_one_bad_rank_makes_both_skip_the_step(two):
    first, second = (two[0][f"skipped-rank{k}"] for k in (0, 1))
    assert first["skipped"] == second["skipped"] == [2]
    assert first["weights"] == second["weights"]
    assert first["step"] == second["step"] == 8
    finite = [value == value for value in first["losses"]]
    assert finite == [True, False, True, True, False, True, True, True]


def test_too_many_bad_steps_end_both_and_name_the_samples(two):
    first, second = (two[0][f"ended-rank{k}"] for k in (0, 1))
    assert first["said"].startswith("3 steps in a row were not finite; allowed: 2")
    assert second["said"].startswith("3 steps in a row were not finite; allowed: 2")
    assert "rank 1, loss is not finite: step 4, detection samples" in second["said"]
    assert "not-finite-step4-rank1.pt" in second["said"]
    assert "rank 0" not in first["said"]


def test_batch_norm_that_cannot_be_synchronised_is_refused(two):
    for rank in (0, 1):
        assert "trainer.sync_batchnorm is true; on CPUs" in two[0][f"refused-rank{rank}"]
