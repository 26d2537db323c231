"""A training step with the tree of 9,418 nodes: against 20 classes, and against a dense head.

As a program, it prints the peak memory of such a training: `python -m tests.benchmarks.step NAME`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.rehearsal_data import tree_rows
from tests.benchmarks.rows import Row, in_turn, wall
from tests.helpers.paths import REPO
from yolo_lightning import DetectorModule
from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.models.head import DenseClassLogits, HeadOutput
from yolo_lightning.models.networks import YOLOv2

FLAT = [f"class {k}" for k in range(20)]
SMALL_TREE = [("a", "-", "a"), ("b", "-", "b"), ("c", "a", "c"), ("d", "a", "d")]
OBJECTS = 7  # of an image, as in COCO


@dataclass(frozen=True)
class Size:
    """How large the training is."""

    backbone: str = "darknet19"
    head_channels: int = 1024
    image_size: int = 416
    batch_size: int = 8
    rounds: int = 5

    @classmethod
    def of(cls, tiny: bool) -> "Size":
        """Return the true size, or that of a test."""
        return cls("small", 8, 64, 2, 1) if tiny else cls()


class NaiveYOLOv2(YOLOv2):
    """All class logits, and a softmax over all nodes, at every cell; its losses are the same."""

    def forward(self, images: Tensor) -> HeadOutput:
        """Return the same output as `YOLOv2`: a shift of all logits of a box changes no loss."""
        features = self.body(images)
        box_logits = self.box_conv(features).unflatten(1, (-1, 5))
        weight, bias = self.class_weight.flatten(0, 1)[..., None, None], self.class_bias.flatten()
        logits = F.conv2d(features, weight, bias).unflatten(1, self.class_bias.shape)
        return HeadOutput(box_logits, DenseClassLogits(logits.log_softmax(dim=2)), self.location)


def make_module(name: str, size: Size, tiny: bool, device: str = "cpu") -> DetectorModule:
    """Return a detector in training mode: `flat`, `tree`, or `naive`."""
    tree: Any = SMALL_TREE if tiny else tree_rows(np.random.default_rng(0))
    module = DetectorModule(
        FLAT if name == "flat" else tree, "yolo9000", size.backbone, size.head_channels
    )
    if name == "naive":
        module.network.__class__ = NaiveYOLOv2
    module.to(device)
    module.boxed[:: max(1, len(module.tree) // 80)] = True
    module._boxed_ancestors = module.boxed_ancestors()
    return module.train()


def make_batch(kind: str, size: Size, nodes: int) -> DetectionBatch | ClassificationBatch:
    """Return a batch of `boxes` or of `labels`, from the time after the anchor prior."""
    torch.manual_seed(0)
    count, side = size.batch_size, size.image_size
    images = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
    ids, seen = torch.arange(count), 20_000
    if kind == "labels":
        labels = torch.randint(0, nodes, (count,))
        return ClassificationBatch(images, ids, labels, images_seen=seen)
    labels = torch.full((count, 8), -1)
    labels[:, :OBJECTS] = torch.randint(0, nodes, (count, OBJECTS))
    boxes_cxcywh_norm = torch.rand(count, 8, 4) * 0.4 + 0.1
    boxes_cxcywh_norm[:, OBJECTS:] = 0
    none = torch.zeros(count, 8, dtype=torch.bool)
    sizes = torch.tensor([[side, side]] * count)
    return DetectionBatch(
        images, ids, boxes_cxcywh_norm, labels, none, none, sizes, images_seen=seen
    )


def step_of(
    module: DetectorModule, kind: str, size: Size, dtype: torch.dtype = torch.float32
) -> Callable[[], None]:
    """Return a function that trains one step, always on the same batch, on the module's device.

    It uses autocast unless `dtype` is float32.
    """
    optimizer: Any = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    batch, device = make_batch(kind, size, len(module.tree)).to(module.device), module.device.type

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = torch.stack(list(module.loss_terms(batch).values())).sum()
        loss.backward()
        optimizer.step()

    return step


def measure(tiny: bool = False) -> list[Row]:
    """Return the rows."""
    size = Size.of(tiny)
    modules = {name: make_module(name, size, tiny) for name in ("tree", "flat", "naive")}
    what = f"training step, {len(modules['tree'].tree):,} nodes, three anchors, "
    what += f"{size.image_size} px, batch {size.batch_size}"
    naive = "all class logits and a softmax over all nodes at every cell"
    rows = []
    for kind, goal in (("boxes", "1.10"), ("labels", "1.15")):
        steps = [step_of(module, kind, size) for module in modules.values()]
        tree, flat, dense = in_turn(size.rounds, *steps)
        row = Row(f"{what}, {kind}", wall(tree), goal, "the same network with 20 classes")
        rows.append(row.versus(tree, flat))
        rows.append(Row(row.what, row.ours, "0.6", naive).versus(tree, dense))
    return [*rows, _memory_row(what, tiny)]


def _memory_row(what: str, tiny: bool) -> Row:
    def peak(name: str) -> float:
        if tiny:
            return peak_megabytes(name, tiny)
        command = [sys.executable, "-m", "tests.benchmarks.step", name]
        # freed memory is returned at once: what the C library keeps differs from run to run
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, cwd=REPO, env=environment
        )
        return float(done.stdout)

    tree, flat = peak("tree"), peak("flat")
    ours = f"{tree - flat:,.0f} MB more: {tree:,.0f} MB"
    against = f"the same network with 20 classes, {flat:,.0f} MB"
    what = f"peak memory in use by the process of that {what}, boxes"
    return Row(what, ours, "400 MB more", against, f"{tree / flat:.2f} of memory")


def peak_megabytes(name: str, tiny: bool = False) -> float:
    """Train three steps with boxes; return the peak memory of this process, MB."""
    size = Size.of(tiny)
    step = step_of(make_module(name, size, tiny), "boxes", size)
    for _ in range(3):
        step()
    # not `ru_maxrss`, which is at least that of the parent process
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) * 1024 / 1e6


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(peak_megabytes(sys.argv[1]))
