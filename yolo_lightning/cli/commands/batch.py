"""`yolo-lightning batch`: list and draw the samples of a training step."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.errors import InputError, printable

if TYPE_CHECKING:
    from yolo_lightning.datamodules.combined import CombinedDataModule


def image_size_at_step(recipe: Any, data: "CombinedDataModule", step: int) -> int:
    """Return the image size, px, that the recipe's `MultiScale` selects; else `image_size`."""
    from yolo_lightning.callbacks.multi_scale import first_batch_at_largest, size_at_step

    callbacks = recipe.trainer.callbacks
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        if callback is not None and callback.class_path.endswith(".MultiScale"):
            values = callback.init_args
            first_at_largest = first_batch_at_largest(
                recipe.trainer,
                data.batches_per_epoch,
                values.last_batches_at_largest,
            )
            sizes = list(values.sizes)
            return size_at_step(step, sizes, values.every_n_batches, data.seed, first_at_largest)
    return data.image_size


def format_samples(data: "CombinedDataModule", step: int, rank: int, world_size: int) -> str:
    """Return the samples of a rank at a step, one per line."""
    plan = data.order.plan(step, rank, world_size)
    source = data.detection if plan.kind == "detection" else data.classification
    assert source is not None, "the sampler plans no batches of a missing source"
    lines = [f"step {step}, rank {rank} of {world_size}: {len(plan.indices)} images, {plan.kind}"]
    for index, number in zip(plan.indices, plan.passes, strict=True):
        lines.append(f"  {index:>8}  pass {number}  {source.image_name(index)}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning batch",
        description="List and draw the samples of a training step, without training.",
        epilog="Other options after the recipe override its values, such as --data.seed 1.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("recipe", help="path of a recipe, or of a run's resolved.yaml")
    add("--step", type=int, default=0, help="number of the batch, from 0 (default: 0)")
    add("--rank", type=int, default=0, help="rank of the process (default: 0)")
    processes = "number of processes (default: the recipe's devices x num_nodes)"
    add("--world-size", type=int, help=processes)
    add("--output", help="image file to write (default: outputs/batch/RECIPE-STEP-RANK.png)")
    return parser


def _world_size(recipe: Any) -> int:
    """Return the number of processes of a recipe.

    Raises:
        InputError: it depends on the machine.
    """
    devices = recipe.trainer.devices
    indices = devices if isinstance(devices, list) else str(devices).split(",")
    count = len(indices)
    if count == 1 and not isinstance(devices, list):
        if not indices[0].isdigit() or not int(indices[0]):
            raise InputError(
                f"trainer.devices is {devices!r}, which depends on the machine; pass the number "
                "of processes as --world-size"
            )
        count = int(indices[0])
    return count * int(recipe.trainer.num_nodes)


def main(argv: Sequence[str]) -> None:
    """Print the samples of a step, and draw them as the network receives them.

    Raises:
        InputError: an invalid recipe, step or rank.
    """
    options, overrides = _parser().parse_known_args(list(argv))
    from yolo_lightning.cli.data import DataCLI
    from yolo_lightning.visualization.drawing import draw_batch, save_image

    run = DataCLI([options.recipe, *overrides])
    data = run.datamodule
    world_size = _world_size(run.recipe) if options.world_size is None else options.world_size
    if not 0 <= options.step < 2**48:
        raise InputError(f"--step is {options.step}; allowed: 0 or more, below 2^48")
    if world_size < 1 or not 0 <= options.rank < world_size:
        raise InputError(
            f"--rank is {options.rank} of {world_size}; allowed: 0 … {max(world_size, 1) - 1}"
        )
    data.setup("fit")
    print(printable(format_samples(data, options.step, options.rank, world_size)))
    size = image_size_at_step(run.recipe, data, options.step)
    batch = data.batch(options.step, options.rank, world_size, size)
    print(f"image size: {size} px")
    for fault in batch.faults:
        print(f"  {printable(fault)}")
    stem = f"{Path(options.recipe).stem}-{options.step}-{options.rank}"
    output = Path(options.output or f"outputs/batch/{stem}.png")
    save_image(output, draw_batch(batch, data.tree.names))
    print(f"picture: {shlex.quote(str(output))}")
