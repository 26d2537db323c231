"""A callback that records the steps and validations of a training, to compare two of them."""

import json
import os
from pathlib import Path

import lightning.pytorch as pl
import torch


class Diary(pl.Callback):
    """Appends a line per step: step, batch type, image size, sample ids, bits of the loss.

    Rank 0 also appends a line per validation: step, metrics.

    Args:
        folder: for the files, one per rank and ``validations.jsonl``.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        bits = outputs["loss"].detach().float().view(torch.int32).item()
        size, ids = batch.images.shape[-1], batch.sample_ids.tolist()
        self._append(
            f"rank{trainer.global_rank}", [batch.step, type(batch).__name__[0], size, ids, bits]
        )

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            values = {
                name: float(value).hex() for name, value in metrics if name.startswith("val/")
            }
            self._append("validations", [trainer.global_step, values])

    def _append(self, name: str, entry: list[object]) -> None:
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(f"{json.dumps(entry)}\n")
            file.flush()
            os.fsync(file.fileno())


def entries(folder: Path, rank: int = 0, name: str = "") -> list[list[object]]:
    """Return the complete lines of steps, or of `name`; a kill may have truncated the last one."""
    file = folder / f"{name or f'rank{rank}'}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def mismatches(expected: list[list[object]], actual: list[list[object]], steps: int) -> list[str]:
    """Return differences; a step may be repeated with equal values, but none may be missing."""
    reference = {entry[0]: entry for entry in expected}
    different = [
        f"{entry} instead of {reference[entry[0]]}"
        for entry in actual
        if entry != reference.get(entry[0])
    ]
    missing = set(range(steps)) - {entry[0] for entry in actual}
    return different + [f"step {step} is missing" for step in sorted(missing)]
