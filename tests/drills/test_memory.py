"""Resident memory of a training over thousands of steps and hundreds of validations."""

import os
import signal
import statistics
import time
from importlib import import_module
from pathlib import Path

import pytest

from tests.drills.test_kills import IMPORTS
from tests.helpers.kill_and_resume import wait_for_process
from tests.helpers.tracked import fresh_store
from tests.helpers.tracking_outage import QUIET, current_step, query_database, start, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, STEPS_PER_VALIDATION = 5_000, 16
OPTIONS = (
    f"--trainer.max_steps={STEPS}", "--trainer.max_epochs=-1", "--data.steps_per_epoch=1000",
    f"--trainer.val_check_interval={STEPS_PER_VALIDATION}",
    "--trainer.check_val_every_n_epoch=null", "--data.num_workers=2",
)  # fmt: skip
MAX_GROWTH = 0.03  # of the median of a later tenth, over that of the second one
PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20


def resident_mb(process: int) -> float:
    """Return the resident memory of a process; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE_MB
    except (OSError, IndexError):
        return 0


def children(process: int) -> list[int]:
    """Return the loader workers of a training."""
    try:
        return [
            int(x) for x in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:
        return []


def growth(samples: list[tuple[int, float]]) -> float:
    """Return the growth of the median by tenths of the steps, from the second to the largest."""
    tenths: list[list[float]] = [[] for _ in range(10)]
    for step, value in samples:
        tenths[min(9, step * 10 // STEPS)].append(value)
    medians = [statistics.median(values) for values in tenths[1:]]
    return max(medians[1:]) / medians[0] - 1


def test_memory_does_not_grow(tmp_path, monkeypatch, record_property):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in IMPORTS:
        import_module(name)
    write_recipe(tmp_path, fresh_store(tmp_path), save_every=100)
    process = start(tmp_path, *OPTIONS)
    own: list[tuple[int, float]] = []
    workers: list[tuple[int, float]] = []
    code = None
    try:
        while (code := wait_for_process(process, 0.5)) is None:
            step, pids = current_step(tmp_path), children(process)
            if 0 < step < STEPS:
                own.append((step, resident_mb(process)))
                if len(pids) >= 2:
                    workers.append((step, sum(map(resident_mb, pids)) / len(pids)))
            time.sleep(0.1)
    finally:
        if code is None:
            os.killpg(process, signal.SIGKILL)
    assert code == 0, (tmp_path / "log.txt").read_text()[-3000:]
    query = "select count(*) from metrics where key = 'val/AP50'"
    ((validations,),) = query_database(tmp_path / "mlflow.db", query)
    assert validations >= 300
    for name, samples in (("training", own), ("workers", workers)):
        record_property(f"memory of the {name}: growth %", 100 * growth(samples))
        by_tenth = {step * 10 // STEPS: round(value) for step, value in samples}
        assert growth(samples) <= MAX_GROWTH, f"{name}: MB by tenth of the steps {by_tenth}"
