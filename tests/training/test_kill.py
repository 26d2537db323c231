"""Short run of the script that kills and resumes trainings; on its own it kills 30 times each."""

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import REPO

pytestmark = pytest.mark.slow


def test_repeatedly_killed_training_equals_an_uninterrupted_one():
    """Kill at the end of each epoch, then at random times, with and without loader workers."""
    result = subprocess.run(
        [sys.executable, "tests/helpers/kill_and_resume.py", "--kills", "5", "--workers", "0", "2"],
        cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    for workers in (0, 2):
        assert f"workers {workers}: 5 kills" in result.stdout
        assert result.stdout.count(" 0 mismatches") == 2
