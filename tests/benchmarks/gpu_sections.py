"""What `gpu_check` checks and measures: each section returns rows of a name and a value."""

import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.step import Size, make_module, step_of
from tests.helpers.darknet import build_network, conv_layers
from tests.helpers.golden import detection_batch, load
from tests.helpers.golden_weights import random_image, write_random_weights
from tests.helpers.paths import REPO
from yolo_lightning import CombinedDataModule, DetectorModule
from yolo_lightning.boxes import batched_nms
from yolo_lightning.callbacks import (
    BatchDigests,
    CompileNetwork,
    FiniteGuard,
    LastCheckpoint,
    MultiScale,
    Preemption,
    ResultsTable,
    Throughput,
    TrainingProgress,
)  # fmt: skip
from yolo_lightning.checkpoints.pretrained import fill_last_conv, last_conv
from yolo_lightning.darknet.released import LAYOUTS
from yolo_lightning.darknet.weights import WeightsReader, conv_blocks, read_weights
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.inference.timing import SynchronizedClock
from yolo_lightning.losses import LossSettings, yolo9000_loss
from yolo_lightning.models.head import HeadOutput
from yolo_lightning.models.networks import YOLOv2
from yolo_lightning.tree.wordtree import WordTree

Rows = list[tuple[str, str]]
PRECISIONS = {"32-true": torch.float32, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
MAX_ERROR = {"32-true": 1e-3, "16-mixed": 2e-2, "bf16-mixed": 1e-1}  # of the range of values
NEEDS_GPU = "needs a GPU"
TREE = str(REPO / "recipes/trees/shapes.tsv")


@dataclass(frozen=True)
class Place:
    """Where the check runs, and whether in the form of a test."""

    device: str
    tiny: bool

    @property
    def has_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"


def check_near(name: str, found: torch.Tensor, expected: torch.Tensor, limit: float) -> str:
    """Return the largest difference, as a part of the range of the values.

    Raises:
        AssertionError: it is above the limit, or a value is not finite.
    """
    found, expected = found.float().cpu(), expected.float().cpu()
    assert found.isfinite().all(), f"{name}: values are not finite"
    error = float((found - expected).abs().max() / (expected.max() - expected.min()))
    assert error <= limit, f"{name}: {error:.2g} of the range, allowed: {limit:g}"
    return f"{error:.1e} of the range"


def loss(place: Place) -> Rows:
    """Compare gradients of the loss with those of the original program."""
    data = load("region_flat_after_warmup.npz")
    tree = WordTree.from_names([str(k) for k in range(20)])
    batch = detection_batch(data["boxes_cxcywh"], data["labels"], int(data["images_seen"]))
    anchors_wh_cell = data["anchors_cells"].to(place.device)
    rows = []
    for precision, dtype in PRECISIONS.items():
        raw = data["raw"].to(place.device, dtype).clone().requires_grad_()
        output = HeadOutput.from_dense(raw, len(anchors_wh_cell))
        ancestors = torch.arange(20, device=place.device)
        terms = yolo9000_loss(
            output, batch.to(place.device), anchors_wh_cell, tree, ancestors, LossSettings()
        )
        (torch.stack(list(terms.values())).sum() * len(batch)).backward()
        assert raw.grad is not None
        limit = 1e-5 if precision == "32-true" else MAX_ERROR[precision]
        name = f"gradient of the loss, {precision}"
        rows.append((name, check_near(name, raw.grad, data["grad"], limit)))
    return rows


def suppression(place: Place) -> Rows:
    """Compare non-maximum suppression with that of the CPU."""
    torch.manual_seed(0)
    count = 500 if place.tiny else 20_000
    corner = torch.rand(count, 2)
    boxes_xyxy_norm = torch.cat([corner, corner + 0.3 * torch.rand(count, 2)], dim=1)
    scores, classes = torch.rand(count), torch.randint(0, count // 100, (count,))
    expected = batched_nms(boxes_xyxy_norm, scores, classes)
    inputs = [x.to(place.device) for x in (boxes_xyxy_norm, scores, classes)]
    found = batched_nms(inputs[0], inputs[1], inputs[2])
    assert found.tolist() == expected.tolist(), "other boxes are kept than on the CPU"
    return [(f"boxes kept of {count:,}, as on the CPU", f"{len(found):,}")]


@torch.no_grad()
def network(place: Place) -> Rows:
    """Compare YOLOv2's output with that of the original program."""
    name = "yolov2-tiny-voc" if place.tiny else "yolov2-voc"
    description = LAYOUTS[name]()
    with tempfile.TemporaryDirectory() as folder:
        write_random_weights(Path(folder) / "weights", conv_layers(description))
        reader = WeightsReader(read_weights(Path(folder) / "weights"))
    built = build_network(description)
    assert isinstance(built, YOLOv2)
    for _, block in conv_blocks(built.body):
        reader.fill(block)
    fill_last_conv(built, reader)
    built.eval().to(place.device)
    golden, rows = load(f"{name}_forward.npz")["activated"], []
    images = torch.from_numpy(random_image(416))[None].to(place.device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for precision, dtype in PRECISIONS.items():
            with torch.autocast(place.device, dtype, enabled=dtype != torch.float32):
                raw = F.conv2d(built.body(images), *last_conv(built))[0].float()
            raw = raw.unflatten(0, (len(built.class_weight), -1))
            raw[:, [0, 1, 4]] = raw[:, [0, 1, 4]].sigmoid()
            raw[:, 5:] = raw[:, 5:].softmax(dim=1)
            text = f"output of {name}, {precision}"
            found = raw.flatten(0, 1)
            rows.append((text, check_near(text, found, golden, MAX_ERROR[precision])))
    return rows


class CountWaits(pl.Callback):
    """Records losses, and the waits for the device of each step, from one end to the next."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, bool, list[str]]] = []  # kind, whether it is logged, waits
        self.losses: list[torch.Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wrap each step of the loop."""
        loop: Any = trainer.fit_loop.epoch_loop
        advance = loop.advance

        def counted(fetcher: Any) -> None:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                advance(fetcher)
            waits = [f"{w.filename}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]
            is_logged = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
            self.steps.append((self.kind, is_logged, waits))

        loop.advance = counted

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the kind of the batch."""
        self.kind = type(batch).__name__

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Record the loss, on the device."""
        self.losses.append(outputs["loss"].detach())


def fit(
    place: Place, callbacks: list[pl.Callback], **options: Any
) -> tuple[list[float], CountWaits, float]:
    """Train joint steps on generated shapes; return losses, waits, and how long it took, s."""
    pl.seed_everything(0, verbose=False)
    count = CountWaits()
    boxes = ShapesDetection(length=32, image_size=96)
    labels = ShapesImageLabels(length=32, image_size=96)
    data = CombinedDataModule(
        TREE, boxes, labels, image_size=96,
        detection_batch_size=8, classification_batch_size=8, num_workers=0, steps_per_epoch=100,
    )  # fmt: skip
    module = DetectorModule(TREE, [(1.5, 1.5), (2.5, 2.5)], "small", 32, 16, learning_rate=0.01)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu" if place.has_gpu else "cpu", devices=1, logger=False,
            max_steps=6 if place.tiny else 12, use_distributed_sampler=False,
            enable_model_summary=False, log_every_n_steps=4, limit_val_batches=0,
            default_root_dir=folder, **options,
            callbacks=[count, FiniteGuard(), *callbacks, BatchDigests(), Throughput(),
                       TrainingProgress(), ResultsTable(), LastCheckpoint(), Preemption()],
        )  # fmt: skip
        started = time.perf_counter()
        trainer.fit(module, data)
        losses = torch.stack(count.losses).tolist()
        seconds = time.perf_counter() - started
    assert all(abs(value) < 1e6 for value in losses), f"losses {losses}"
    return losses, count, seconds


def training(place: Place) -> Rows:
    """Train in all precisions, and compare the losses with those of the CPU."""
    expected, *_ = fit(Place("cpu", place.tiny), [])
    rows = []
    for precision in PRECISIONS:
        losses, *_ = fit(place, [MultiScale([96])], precision=precision)
        errors = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
        assert errors[0] < 0.05, f"{precision}: first loss {losses[0]:.4g}, CPU {expected[0]:.4g}"
        rows.append((f"losses, {precision}: first and largest difference from a CPU",
                     f"{errors[0]:.1e}, {max(errors):.1e}"))  # fmt: skip
    return rows


def waits(place: Place) -> Rows:
    """Count the waits of the steps of a real training."""
    if place.has_gpu:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        _, count, _ = fit(
            place, [MultiScale([96])], precision="bf16-mixed", gradient_clip_val=1.0
        )  # fmt: skip
    finally:
        if place.has_gpu:
            torch.cuda.set_sync_debug_mode("default")
    rows = []
    for kind in ("DetectionBatch", "ClassificationBatch"):
        steps = [step for step in count.steps[2:] if step[:2] == (kind, False)]
        found = [len(step[2]) for step in steps]
        lines = sorted({line.removeprefix(f"{REPO}/") for step in steps for line in step[2]})
        text = f"{min(found)} … {max(found)}: {', '.join(lines) or 'none'}"
        name = f"waits of a step that is not logged, {kind}"
        rows.append((name, text if place.has_gpu else NEEDS_GPU))
    return rows


def ddp(place: Place) -> Rows:
    """Train with DDP, one rank, and compare the losses with those without."""
    expected, *_ = fit(place, [])
    backend = "nccl" if place.has_gpu else "gloo"
    saved = dict(os.environ)
    try:
        losses, *_ = fit(place, [], strategy=DDPStrategy(process_group_backend=backend))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(saved)  # Lightning leaves the address and the rank
    error = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    assert error < 0.02, f"losses differ by {error:.2g}"
    return [(f"DDP, one rank on {backend}: largest difference of a loss", f"{error:.1e}")]


def compiled(place: Place) -> Rows:
    """Train with `CompileNetwork` at two sizes."""
    expected, _, plain_s = fit(place, [MultiScale([64, 96])])
    compile_network = CompileNetwork("eager" if place.tiny else "inductor")
    losses, _, seconds = fit(place, [MultiScale([64, 96]), compile_network])
    error = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    assert error < 0.05, f"losses differ by {error:.2g}"
    return [
        ("compiled: largest difference of a loss", f"{error:.1e}"),
        ("small steps, compilation included", f"{seconds:.0f} s, {plain_s:.1f} s without"),
    ]  # fmt: skip


def speed(place: Place) -> Rows:
    """Measure steps in bf16: images per second, share of the matrix rate, and memory."""
    peak = _matrix_rate(place)
    rows = [("bf16 product of two matrices", f"{peak / 1e12:,.2f} TFLOP/s")]
    sizes = (64,) if place.tiny else (416, 608)
    for image_size in sizes:
        for name in ("flat", "tree"):
            size = Size("small", 8, image_size, 2) if place.tiny else Size("darknet19", 1024,
                        image_size, 64)  # fmt: skip
            rows += _speed_of(place, name, size, peak)
    return rows


def _speed_of(place: Place, name: str, size: Size, peak: float) -> Rows:
    module = make_module(name, size, place.tiny, place.device)
    rows = []
    for kind in ("boxes", "labels"):
        gc.collect()  # schedules and optimizers refer to each other
        if place.has_gpu:
            torch.cuda.reset_peak_memory_stats()
        step = step_of(module, kind, size, torch.bfloat16)
        with FlopCounterMode(display=False) as counter:
            step()
        seconds = _seconds(place, step)
        images_per_s, share = size.batch_size / seconds, counter.get_total_flops() / seconds / peak
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if place.has_gpu else (
            f"memory {NEEDS_GPU}")  # fmt: skip
        rows.append(
            (f"{size.image_size} px, {len(module.tree):,} nodes, batch {size.batch_size}, {kind}",
             f"{images_per_s:,.0f} images/s, {share:.1%} of the matrix rate, {memory}")
        )  # fmt: skip
    return rows


def _seconds(place: Place, function: Callable[[], object]) -> float:
    """Return the mean seconds of a call."""
    count, clock = (2 if place.tiny else 20), SynchronizedClock(torch.device(place.device))
    for _ in range(2 if place.tiny else 5):
        function()
    start = clock()
    for _ in range(count):
        function()
    return (clock() - start) / count


def _matrix_rate(place: Place) -> float:
    """Return operations per second of a large product in bf16."""
    side = 256 if place.tiny else 8192
    one, other = (
        torch.randn(side, side, device=place.device, dtype=torch.bfloat16) for _ in range(2)
    )
    return 2 * side**3 / _seconds(place, lambda: one @ other)


SECTIONS: dict[str, Callable[[Place], Rows]] = {
    "loss": loss,
    "suppression": suppression,
    "network": network,
    "training": training,
    "waits": waits,
    "speed": speed,
    "ddp": ddp,
    "compiled": compiled,
}
