"""YOLOv2's forward pass: against the machine's best convolution, and the original program."""

import ctypes
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.benchmarks.rows import Row, in_turn, spread, wall
from tests.helpers.original_program import FILES, LIBRARY
from yolo_lightning import DetectorModule
from yolo_lightning.inference.timing import billion_operations
from yolo_lightning.models.folding import FoldedConv
from yolo_lightning.models.networks import fold_for_prediction

CHANNELS = 1024


def convolutions(sides: tuple[int, ...], channels: int) -> dict[Callable[[], object], float]:
    """Return 3x3 convolutions in several sizes and layouts, with their billions of operations.

    One of the layouts is oneDNN's own, in which weights are packed once.
    """
    found: dict[Callable[[], object], float] = {}
    for side in sides:
        operations = 2 * 9 * channels**2 * side**2 / 1e9
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        for layout in (torch.contiguous_format, torch.channels_last):
            features = torch.randn(1, channels, side, side).contiguous(memory_format=layout)
            weight = conv.weight.detach().contiguous(memory_format=layout)

            def convolve(features=features, weight=weight):
                return F.conv2d(features, weight, padding=1)

            found[convolve] = operations

        def packed(features=features, conv=conv, folded=FoldedConv()):  # noqa: B008
            return folded(features, conv, None, None)

        found[packed] = operations
    return found


@torch.no_grad()
def measure(tiny: bool = False) -> list[Row]:
    """Return the rows."""
    size, rounds = (64, 1) if tiny else (416, 9)
    module = DetectorModule([f"class {k}" for k in range(20)], "voc", "small" if tiny else
                            "darknet19").eval()  # fmt: skip
    fold_for_prediction(module)  # as `detect` does
    images = torch.rand(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    candidates = convolutions((13,) if tiny else (13, 26, 52), 8 if tiny else CHANNELS)
    network, *others = in_turn(rounds, lambda: module.network(images), *candidates)
    operations = billion_operations(module.network, size)
    found = list(zip(others, candidates.values(), strict=True))
    best, best_operations = max(
        found, key=lambda pair: pair[1] / statistics.median(s.wall for s in pair[0])
    )
    scale, pairs = operations / best_operations, list(zip(network, best, strict=True))
    row = Row(
        f"YOLOv2, {size} px, one image, float32: share of the best rate, more is better",
        f"{wall(network)}, {operations / statistics.median(s.wall for s in network):.0f} GFLOP/s",
        "0.9",
        f"3x3 convolution of {CHANNELS:,} channels, best size and layout, "
        f"{best_operations / statistics.median(s.wall for s in best):.0f} GFLOP/s",
        spread([scale * b.wall / a.wall for a, b in pairs], ".2f"),
        spread([scale * b.cpu / a.cpu for a, b in pairs if a.cpu], ".2f"),
    )
    return [row, _darknet_row(module, images, 1 if tiny else 3, tiny)]


def _darknet_row(module: DetectorModule, images: torch.Tensor, rounds: int, tiny: bool) -> Row:
    size = images.shape[-1]
    against = "Debian's `darknet`, the original program in C"
    row = Row(f"YOLOv2, {size} px, one image, float32", "", against=against)
    if not LIBRARY.is_file():
        return Row(row.what, "skipped: apt-get install darknet", against=against)
    with tempfile.TemporaryDirectory() as folder:
        cfg = FILES / f"cfg/{'yolov2-tiny-voc' if tiny else 'yolov2-voc'}.cfg"
        predict = _original(cfg, images, Path(folder))
        ours, theirs = in_turn(rounds, lambda: module.network(images), predict)
    row = Row(row.what, wall(ours), against=f"{against}, {wall(theirs)}")
    return row.versus(ours, theirs)


def _original(cfg: Path, images: torch.Tensor, folder: Path) -> Callable[[], object]:
    """Return the forward pass of the original program, with its random weights."""
    text = cfg.read_text()
    for side in ("width", "height"):
        text = text.replace(f"{side}=416", f"{side}={images.shape[-1]}")
    (folder / "network.cfg").write_text(text)
    library = ctypes.CDLL(str(LIBRARY))
    torch.set_flush_denormal(False)  # loading it makes the processor flush small numbers to zero
    library.load_network.restype = ctypes.c_void_p
    library.set_batch_network.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.network_predict.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    pixels = images.contiguous()
    network = _quietly(lambda: library.load_network(os.fsencode(folder / "network.cfg"), None, 0))
    library.set_batch_network(network, 1)

    def predict():
        library.network_predict(network, pixels.data_ptr())

    return predict


def _quietly(function: Callable[[], int]) -> int:
    """Call a function of C without what it prints."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        return function()
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
