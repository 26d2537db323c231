"""How often training, validation and `detect` wait for a GPU, and how many kernels they start.

They run on a pretend device.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import REPO

pytestmark = pytest.mark.end_to_end

# a process of its own, because a process has one such device, under one name
WORKER = '''
import contextlib, json, sys
import lightning.pytorch as pl
import torch
from tests.helpers.pretend_device import DEVICE, PretendDevice, strategy
from yolo_lightning import ClassifierModule, CombinedDataModule, DetectorModule, WordTree
from yolo_lightning.callbacks import (
    BatchDigests, FiniteGuard, LastCheckpoint, MultiScale, Preemption, ResultsTable, Throughput,
    TrainingProgress)
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.models import head

TREE, folder = sys.argv[1:]
torch.set_num_threads(1)
found = {}


class Count(pl.Callback):
    """Counts from the end of one step to the end of the next one."""

    def __init__(self, device):
        self.device, self.steps = device, []

    def on_train_start(self, trainer, module):
        loop = trainer.fit_loop.epoch_loop
        advance = loop.advance

        def counted(fetcher):
            self.device.clear()
            advance(fetcher)
            logged = (trainer.global_step % trainer.log_every_n_steps) == 0
            self.steps.append([self.kind, logged, self.device.kernels, dict(self.device.waits)])

        loop.advance = counted

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.kind = type(batch).__name__


def data(**sources):
    return CombinedDataModule(
        TREE, classification=ShapesImageLabels(length=16, image_size=64), image_size=64,
        detection_batch_size=4, classification_batch_size=4, num_workers=0, steps_per_epoch=100,
        **sources)


def fit(device, name, module, datamodule, **options):
    pl.seed_everything(0, verbose=False)
    count = Count(device)
    trainer = pl.Trainer(
        max_steps=13, strategy=strategy(), logger=False, default_root_dir=f"{folder}/{name}",
        enable_model_summary=False, log_every_n_steps=3, limit_val_batches=0,
        callbacks=[count, FiniteGuard(), MultiScale([64]), BatchDigests(), Throughput(),
                   TrainingProgress(), ResultsTable(), LastCheckpoint(), Preemption()], **options)
    trainer.fit(module, datamodule)
    found[name] = count.steps[4:12]


def planted(device):
    """What the device is to find."""
    values = torch.arange(3.0, device=DEVICE)
    with contextlib.suppress(RuntimeError):
        values + torch.ones(3)
        found["mixed"] = True
    device.clear()
    values[values > 1].sum().item()
    torch.ones(3).to(DEVICE, non_blocking=True).add(values)
    found["planted"] = [device.kernels, list(device.waits)]


def loss(device):
    """The loss of boxes of a flat list, by the forward pass alone."""
    module = DetectorModule([str(k) for k in range(20)], [(1, 1), (2, 2), (3, 3)], "small", 8, 4)
    batch = datamodule.batch(0).to(DEVICE)
    batch.images_seen = 20_000  # without the anchor prior
    module.to(DEVICE)
    module._boxed_ancestors = torch.arange(20).to(DEVICE)
    output = module.network(batch.images / 255)
    module.network.forward = lambda images: output
    for _ in range(2):  # tables are copied to the device at first
        device.clear()
        module.loss_terms(batch)
    found["loss"] = [device.kernels, dict(device.waits)]


class CountValidation(pl.Callback):
    """Counts from the end of one validation batch to the end of the next one."""

    def __init__(self, device):
        self.device, self.batches = device, []

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx):
        found = len(module.evaluation.fine.detections[-1])
        device = self.device
        self.batches.append([len(batch), found, device.kernels, dict(device.waits)])
        device.clear()


def several_objects(tree):
    """A detector with random boxes: several in each image, of many classes."""
    torch.manual_seed(0)
    module = DetectorModule(tree, [(1.5, 1.5), (2.5, 2.5)], "small", 8, 4, learning_rate=0)
    with torch.no_grad():
        module.network.box_conv.weight.mul_(60)
        module.network.class_weight.mul_(60)
    return module


def detect(device, name, tree):
    module = several_objects(tree).eval()
    images, sizes = torch.rand(8, 3, 128, 128), torch.tensor([[128, 150]] * 8)
    calls = {
        "detect": lambda: module.detect(images, sizes, module.tree.leaves, 0.05),
        "detect_most_specific": lambda: module.detect_most_specific(images, sizes, 0.05)}
    on_cpu = {kind: call() for kind, call in calls.items()}
    module, images = module.to(DEVICE), images.to(DEVICE)
    for kind, call in calls.items():
        call()  # tables are copied to the device at first
        device.clear()
        on_device = call()
        objects = sum(len(one.labels) for one in on_device)
        found[f"{kind} {name}"] = [len(images), objects, device.kernels, dict(device.waits)]
        for one, other in zip(on_device, on_cpu[kind], strict=True):
            torch.testing.assert_close(vars(one), vars(other))


def validate(device, name, tree):
    count, shapes = CountValidation(device), ShapesDetection(length=16, image_size=128)
    data = CombinedDataModule(
        tree, detection=shapes, validation=shapes, image_size=128, detection_batch_size=8,
        num_workers=0, steps_per_epoch=1)
    pl.Trainer(
        max_steps=1, strategy=strategy(), logger=False, default_root_dir=folder,
        enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
        callbacks=[count]).fit(several_objects(tree), data)
    found[f"validation {name}"] = count.batches[-1]


def count_parts(max_logits):
    """Let a device compute few logits at once."""
    head.MAX_LOGITS_ON_GPU, chunks, found["parts"] = max_logits, head.Candidates.chunks, []

    def counted(self):
        parts = list(chunks(self))
        found["parts"].append(len(parts))
        return parts

    head.Candidates.chunks = counted


with PretendDevice() as device:
    planted(device)
    flat = [(key, "-", name) for key, _, name in WordTree.from_file(TREE).rows]
    flat += [(f"other{k}", "-", "other") for k in range(20 - len(flat))]
    for name, tree in (("flat", flat), ("tree", TREE)):
        detect(device, name, tree)
        validate(device, name, tree)
    count_parts(400 * 20)
    detect(device, "in parts", flat)
    validate(device, "in parts", TREE)
    datamodule = data(detection=ShapesDetection(length=16, image_size=64))
    detector = DetectorModule(TREE, [(1.5, 1.5), (2.5, 2.5)], "small", 8, 4, learning_rate=0.01)
    fit(device, "detector", detector, datamodule, gradient_clip_val=1.0)
    fit(device, "classifier", ClassifierModule(TREE, "small", image_size=64), data())
    loss(device)
with open(f"{folder}/found.json", "w") as file:
    json.dump(found, file)
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What WORKER counted."""
    folder: Path = tmp_path_factory.mktemp("pretend")
    script = folder / "worker.py"
    script.write_text(WORKER)
    result = subprocess.run(
        [sys.executable, str(script), str(REPO / "recipes/trees/shapes.tsv"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    counts: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return counts


def test_the_pretend_device_counts_waits_and_kernels(found):
    kernels, waits = found["planted"]
    assert "mixed" not in found, "tensors of two devices do not meet"
    assert [text.partition(" at ")[0] for text in waits] == ["index", "_local_scalar_dense"]
    assert kernels == 4  # a comparison, an index, a sum, an addition


@pytest.mark.parametrize(
    ("module", "kind", "max_kernels"),
    [
        ("detector", "DetectionBatch", 400),
        ("detector", "ClassificationBatch", 320),
        ("classifier", "ClassificationBatch", 150),
    ],
)
@pytest.mark.parametrize(("is_logged", "max_waits"), [(False, 1), (True, 4)])
def test_a_step_waits_once(found, module, kind, max_kernels, is_logged, max_waits):
    steps = [step for step in found[module] if step[:2] == [kind, is_logged]]
    assert steps
    for _, _, kernels, waits in steps:
        assert sum(waits.values()) <= max_waits, waits
        assert kernels <= max_kernels


def test_loss_of_boxes_starts_few_kernels_and_does_not_wait(found):
    kernels, waits = found["loss"]
    assert not waits
    assert kernels <= 120


@pytest.mark.parametrize("classes", ["flat", "tree", "in parts"])
@pytest.mark.parametrize("kind", ["detect", "detect_most_specific", "validation"])
def test_results_of_a_batch_are_read_with_few_waits_and_kernels(found, kind, classes):
    images, objects, kernels, waits = found[f"{kind} {classes}"]
    assert images == 8
    assert objects >= 3 * images
    assert sum(waits.values()) <= 10, waits
    assert kernels <= (60 if classes == "in parts" else 30) * images


def test_logits_were_computed_in_parts(found):
    assert max(found["parts"]) == 3
