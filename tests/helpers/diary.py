"""A callback that writes down what every step saw, so that two trainings can be compared."""

import json
import os
from pathlib import Path

import lightning.pytorch as pl
import torch


class Diary(pl.Callback):
    """Append a line a step: number, image size, sample ids, the loss's bits.

    Args:
        folder: of the files, one a rank.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        bits = outputs["loss"].detach().float().view(torch.int32).item()
        size, ids = batch.images.shape[-1], batch.sample_ids.tolist()
        line = json.dumps([batch.step, type(batch).__name__[0], size, ids, bits])
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())


def entries(folder: Path, rank: int = 0) -> list[list[object]]:
    """Return the whole lines; the last one may have been cut off by a kill."""
    file = folder / f"rank{rank}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def mismatches(expected: list[list[object]], found: list[list[object]], steps: int) -> list[str]:
    """Return what differs: steps done twice have to be the same twice, and none may be missing."""
    reference = {entry[0]: entry for entry in expected}
    wrong = [f"{entry} instead of {reference[entry[0]]}" for entry in found
             if entry != reference.get(entry[0])]  # fmt: skip
    missing = set(range(steps)) - {entry[0] for entry in found}
    return wrong + [f"step {step} is missing" for step in sorted(missing)]
