"""What `fit` prints before and after a training."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI

from yolo_lightning.callbacks import ResultsTable
from yolo_lightning.checkpoints.io import LAST
from yolo_lightning.cli import launch, runs
from yolo_lightning.errors import mask_secrets, printable
from yolo_lightning.tracking.logger import run_loggers
from yolo_lightning.tracking.names import own_store
from yolo_lightning.tracking.provenance import processor_name
from yolo_lightning.training_module import TrainingModule

_BYTES, _MIB = 4, 2**20  # of a parameter: mixed precision keeps weights in float32
_PICTURES = ("predictions.jpg", "results.png")


def describe_start(cli: LightningCLI, folder: Path) -> str:
    """Return the run folder, the dashboard, the network and the processor of a training."""
    lines = {"run folder": str(folder)}
    for logger in run_loggers(cli.trainer):
        lines["dashboard"] = _dashboard(logger.store)
    if isinstance(cli.model, TrainingModule):
        lines |= _describe_network(cli.model, cli.datamodule, cli.trainer)
    device, ranks = cli.trainer.strategy.root_device, cli.trainer.world_size
    cores = f", {os.cpu_count()} cores" if device.type == "cpu" else ""
    count = f"{ranks} x " if ranks > 1 else ""
    seed = cli.config.fit.seed_everything
    lines["processor"] = (
        f"{count}{processor_name(device)}{cores}; {cli.trainer.precision}, seed {seed}"
    )
    return printable(_table(lines))


def _dashboard(store: str) -> str:
    """Return how to open the dashboard of a store, whose secrets are masked."""
    if store.startswith(("http://", "https://")):
        return store
    variable = "" if store == mask_secrets(own_store()) else f"MLFLOW_TRACKING_URI={store} "
    return f"{variable}{launch.command(['mlflow', 'ui'])}   ({store})"


def _describe_network(model: TrainingModule, data: Any, trainer: Any) -> dict[str, str]:
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    trained = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    network = f"{parameters / 1e6:,.1f} million parameters"
    image_size, layers = getattr(data, "image_size", None), model.network.body.layers
    is_counted = not any(getattr(layer, "module", None) for layer in layers)
    if isinstance(image_size, int) and is_counted:
        from yolo_lightning.inference.timing import billion_operations

        operations = billion_operations(model.network, image_size)
        network += f", {operations:,.2f} billion operations for an image of {image_size} px"
    averaged = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)
    # a gradient and a momentum for each trained weight
    mib = [_BYTES * n / _MIB for n in (parameters, (1 + averaged) * parameters + 2 * trained)]
    copies = "gradients, momentum and averages" if averaged else "gradients and momentum"
    return {
        "network": network,
        "memory": f"weights {mib[0]:,.0f} MiB, with {copies} {mib[1]:,.0f} MiB; activations not "
        "counted",
    }


def describe_end(cli: LightningCLI, folder: Path, args: Sequence[str]) -> str:
    """Return the last and the best result, the paths of the run's files, and the next commands.

    `args` are those of the training.
    """
    lines = {}
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ResultsTable):
            lines["result"] = callback.summary(cli.trainer)
    checkpoints = [folder / "checkpoints" / name for name in (runs.BEST, LAST)]
    checkpoint = next((path for path in checkpoints if path.is_file()), None)
    files = {
        "checkpoint": [checkpoint] if checkpoint else [],
        "report": [folder / "report"],
        "pictures": [folder / name for name in _PICTURES],
        "figures": [folder / "results.csv"],
    }
    for name, paths in files.items():
        lines[name] = " ".join(shlex.quote(str(path)) for path in paths if path.exists())
    if checkpoint is not None:
        use = "detect" if hasattr(cli.model, "detect") else "classify"
        lines["test it"] = launch.with_checkpoint(["test", *args[1:]], checkpoint)
        lines["use it"] = launch.command([use, str(checkpoint), _example_image(cli.datamodule)])
    return printable(_table({name: text for name, text in lines.items() if text}))


def _example_image(data: Any) -> str:
    """Return the path of a validation image, or a word in its place if images are no files."""
    source = getattr(data, "validation", None)
    path = source.image_name(0) if source is not None and len(source) else ""
    return path if path and Path(path).is_file() else "IMAGE"


def _table(lines: dict[str, str]) -> str:
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())
