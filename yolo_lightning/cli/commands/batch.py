"""`yolo-lightning batch`: what a training step reads, drawn from the recipe alone."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.callbacks.multi_scale import resize, size_at
from yolo_lightning.cli.data import DataCLI
from yolo_lightning.datamodules.combined import CombinedDataModule
from yolo_lightning.errors import InputError
from yolo_lightning.visualization.drawing import batch_picture, save


def image_size_at(callbacks: Any, step: int, canvas: int) -> int:
    """Return the size that `MultiScale` of a recipe draws for a step, px.

    Args:
        callbacks: the recipe's, or None.
        step: number of the batch.
        canvas: side of the images as the data gives them, px.
    """
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback is not None and callback.class_path.endswith(".MultiScale"):
            given = callback.init_args
            return size_at(step, list(given.sizes), given.every_n_batches, given.seed)
    return canvas


def listing(data: CombinedDataModule, step: int, rank: int, world_size: int) -> str:
    """Return which samples a rank reads at a step, a line each."""
    plan = data.order.plan(step, rank, world_size)
    source = data.detection if plan.kind == "detection" else data.classification
    assert source is not None, "the order holds no batches of a source that is not there"
    lines = [f"step {step}, rank {rank} of {world_size}: {len(plan.indices)} images, {plan.kind}"]
    for index, number in zip(plan.indices, plan.passes, strict=True):
        lines.append(f"  {index:>8}  pass {number}  {source.image_name(index)}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning batch",
        description="List and draw what a training step reads; nothing is trained or replayed.",
        epilog="Any other option, after the recipe, overrides its values: --data.seed 1.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="RECIPE.yaml, or the resolved.yaml of a run")
    parser.add_argument("--step", type=int, default=0, help="number of the batch, from 0 (0)")
    parser.add_argument("--rank", type=int, default=0, help="which process (0)")
    parser.add_argument(
        "--world-size", type=int, help="how many processes; the recipe's devices x num_nodes"
    )
    parser.add_argument("--output", help="the picture (outputs/batch/RECIPE-STEP-RANK.png)")
    return parser


def _processes(recipe: Any) -> int:
    """Return how many processes a recipe starts.

    Raises:
        InputError: that depends on the machine.
    """
    devices = recipe.trainer.devices
    listed = devices if isinstance(devices, list) else str(devices).split(",")
    count = len(listed)
    if count == 1 and not isinstance(devices, list):
        if not listed[0].isdigit() or not int(listed[0]):
            raise InputError(
                f"trainer.devices is {devices!r}, another number on each machine; say how many "
                "processes: --world-size"
            )
        count = int(listed[0])
    return count * int(recipe.trainer.num_nodes)


def main(argv: Sequence[str]) -> None:
    """Print the samples of a step and draw them as the network is shown them.

    Raises:
        InputError: a step, a rank or a recipe that cannot be.
    """
    options, overrides = _parser().parse_known_args(list(argv))
    run = DataCLI([options.recipe, *overrides])
    data = run.datamodule
    world = _processes(run.recipe) if options.world_size is None else options.world_size
    if not 0 <= options.step < 2**48:
        raise InputError(f"--step is {options.step}; allowed: 0 or more, below 2^48")
    if world < 1 or not 0 <= options.rank < world:
        raise InputError(f"--rank is {options.rank} of {world}; allowed: 0 … {max(world, 1) - 1}")
    data.setup("fit")
    print(listing(data, options.step, options.rank, world))
    batch: DetectionBatch | ClassificationBatch = data.batch(options.step, options.rank, world)
    size = image_size_at(run.recipe.trainer.callbacks, options.step, data.canvas_size)
    print(f"image size: {size} px")
    for fault in batch.faults:
        print(f"  {fault}")
    batch.images = (resize(batch.images, size) * 255).round().byte()
    stem = f"{Path(options.recipe).stem}-{options.step}-{options.rank}"
    output = Path(options.output or f"outputs/batch/{stem}.png")
    save(output, batch_picture(batch, data.tree.names))
    print(f"picture: {shlex.quote(str(output))}")
