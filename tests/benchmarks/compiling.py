"""Compiling a training step at several image sizes: once for each, or once for all of them."""

from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.rows import Row, in_turn, wall
from tests.benchmarks.step import FLAT
from yolo_lightning import DetectorModule

SIZES = (64, 96, 128)


def compiling(dynamic: bool, tiny: bool = False) -> Callable[[], Any]:
    """Return a function that compiles and runs the layers, forward and backward, at `SIZES`.

    Without code generation, which depends on the device.
    """
    backbone, channels = ("small", 8) if tiny else ("darknet19", 1024)
    backend = "eager" if tiny else "aot_eager"
    body: Any = DetectorModule(FLAT, "voc", backbone, channels).train().network.body
    batches = [torch.rand(2, 3, size, size) for size in SIZES[: 1 if tiny else None]]

    def run() -> None:
        torch._dynamo.reset()
        body.compile(backend=backend, dynamic=dynamic, fullgraph=True)
        for images in batches:
            body(images).sum().backward()

    return run


def measure(tiny: bool = False) -> list[Row]:
    """Return the row."""
    static, dynamic = in_turn(1 if tiny else 2, compiling(False, tiny), compiling(True, tiny))
    torch._dynamo.reset()
    row = Row(
        f"torch.compile of YOLOv2 for training, {len(SIZES)} sizes, a graph for each, without code "
        "generation",
        wall(static),
        against=f"one dynamic graph, {wall(dynamic)}",
    )
    return [row.versus(static, dynamic)]
