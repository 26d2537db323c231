"""How often a training step waits for its device, and its kernels: counted on a pretend device."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks.rows import Row
from tests.helpers.paths import REPO
from tests.training.test_waits import WORKER


def measure(tiny: bool = False) -> list[Row]:
    """Return the rows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        script = folder / "worker.py"
        script.write_text(WORKER)
        subprocess.run(
            [sys.executable, str(script), str(REPO / "recipes/trees/shapes.tsv"), str(folder)],
            env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, timeout=240, check=True,
        )  # fmt: skip
        return to_rows(json.loads((folder / "found.json").read_text()))


def to_rows(found: dict[str, Any]) -> list[Row]:
    """Return the rows of what WORKER found."""
    rows = []
    for kind, name in (("DetectionBatch", "boxes"), ("ClassificationBatch", "labels")):
        steps = [step for step in found["detector"] if step[:2] == [kind, False]]
        waits, kernels = ({f(step) for step in steps} for f in (_waits, _kernels))
        ours = f"{_range(waits)}; {_range(kernels)} kernels"
        rows.append(Row(f"host synchronisations of a step that is not logged, {name}", ours, "1"))
    kernels, waits = found["loss"]
    ours = f"{kernels} kernels, {sum(waits.values())} synchronisations"
    rows.append(Row("loss and head, forward, boxes, 20 classes", ours, "120 kernels"))
    return rows


def _waits(step: list[Any]) -> int:
    return int(sum(step[3].values()))


def _kernels(step: list[Any]) -> int:
    return int(step[2])


def _range(values: set[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} … {high}"
