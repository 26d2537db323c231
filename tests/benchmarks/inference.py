"""Measure YOLOv2's prediction on CPUs as a share of the machine's best convolution rate.

    python tests/benchmarks/inference.py --threads 1

One image of 416 px through Darknet-19 and the detector's head, without and with folded batch norm,
in float32. The best rate is that of a 3x3 convolution with 1,024 channels at 13x13 to 52x52 cells,
in any layout of memory. All run in turn. Wall clock, and processor time, which other programs
disturb less; operations are those of `billion_operations`.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from yolo_lightning import DetectorModule
from yolo_lightning.inference.timing import billion_operations
from yolo_lightning.models.folding import FoldedConv
from yolo_lightning.models.networks import YOLOv2, fold_for_prediction

SIDES, CHANNELS = (13, 26, 52), 1024
Rates = dict[str, tuple[float, float, float]]  # GFLOP/s: median, minimum, maximum


def convolutions(channels: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Return convolutions by name, with their billions of operations."""
    found: dict[str, tuple[Callable[[], object], float]] = {}
    for side in SIDES:
        operations = 2 * 9 * channels**2 * side**2 / 1e9
        features = torch.randn(1, channels, side, side)
        conv = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        for layout in (torch.contiguous_format, torch.channels_last):
            inputs = features.contiguous(memory_format=layout)
            weight = conv.weight.detach().contiguous(memory_format=layout)

            def convolve(inputs=inputs, weight=weight):
                return F.conv2d(inputs, weight, padding=1)

            found[f"{side}x{side} cells, {layout}"] = convolve, operations
        inputs = features.contiguous(memory_format=torch.channels_last)

        def packed(inputs=inputs, conv=conv, folded=FoldedConv()):  # noqa: B008
            return folded(inputs, conv, None, None)

        found[f"{side}x{side} cells, packed"] = packed, operations
    return found


def measure(rounds: int = 15, tiny: bool = False, clock: Callable[[], float] = time.process_time
            ) -> tuple[Rates, str]:  # fmt: skip
    """Return the rates of both networks and of all convolutions, and the name of the fastest."""
    size, backbone = (64, "small") if tiny else (416, "darknet19")
    module = DetectorModule([f"class {k}" for k in range(20)], "voc", backbone).eval()
    plain, operations = module.network, billion_operations(module.network, size)
    folded: YOLOv2 = copy.deepcopy(plain)
    fold_for_prediction(folded)
    images = torch.rand(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    others = convolutions(8 if tiny else CHANNELS)
    functions: dict[str, tuple[Callable[[], object], float]] = {
        "network": (lambda: plain(images), operations),
        "network, folded": (lambda: folded(images), operations),
        **others,
    }
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with torch.inference_mode():
        for function, _ in functions.values():
            function()
            function()
        for _ in range(rounds):
            for name, (function, _) in functions.items():
                start = clock()
                function()
                seconds[name].append(clock() - start)
    rates = {}
    for name, (_, count) in functions.items():
        values = [count / max(one, 1e-9) for one in seconds[name]]
        rates[name] = (statistics.median(values), min(values), max(values))
    return rates, max(others, key=lambda name: rates[name][0])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--wall", action="store_true", help="wall clock, for several threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.wall else time.process_time
    rates, best = measure(options.rounds, clock=clock)
    for name, (median, low, high) in rates.items():
        share = median / rates[best][0]
        print(f"{name:<45}{median:>7.0f} ({low:.0f} to {high:.0f}) GFLOP/s  {share:.2f}")


if __name__ == "__main__":
    main()
