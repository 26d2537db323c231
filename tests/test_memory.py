"""Freed memory that is kept."""

import os
import platform
import subprocess
import sys

import pytest

from tests.helpers.paths import REPO

SCRIPT = """
import resource, sys
import numpy as np
from yolo_lightning.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        [np.ones(3 * 2**20, np.uint8) for _ in range(4)]  # each too small for huge pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory(2**26)
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("setting", "is_kept"), [("", True), ("MALLOC_ARENA_MAX", False), ("GLIBC_TUNABLES", False)]
)
def test_freed_memory_is_used_again_unless_the_user_has_settings(setting, is_kept):
    presets = {"MALLOC_ARENA_MAX": "1", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}
    names = [name for name in os.environ if name not in presets]
    environment = {name: os.environ[name] for name in names if not name.startswith("MALLOC_")}
    environment |= {name: value for name, value in presets.items() if name == setting}
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
        env={**environment, "PYTHONPATH": str(REPO)},
    ).stdout  # fmt: skip
    before, after = map(int, out.split())
    assert before > 10_000, "12 MB are given back 20 times, and cleared again"
    assert (after < before / 10) == is_kept
