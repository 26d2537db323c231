"""The script that kills trainings, in a short form; run by itself it kills thirty times each."""

import os
import subprocess
import sys

from tests.helpers.paths import REPO


def test_a_training_that_is_killed_again_and_again_equals_one_that_is_not():
    """At every epoch's end, then at random moments, with and without loader workers."""
    done = subprocess.run(
        [sys.executable, "tests/helpers/kill_and_resume.py", "--kills", "5", "--workers", "0", "2"],
        cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for workers in (0, 2):
        assert f"workers {workers}: 5 kills" in done.stdout
        assert done.stdout.count(" 0 mismatches") == 2
