"""Standard output on a full disk, for which /dev/full is a real test."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from tests.helpers.diary import entries
from tests.helpers.kill_and_resume import STEPS_PER_EPOCH, arguments, write_recipe
from tests.helpers.processes import ENVIRONMENT
from yolo_lightning.cli.streams import LossyFile

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


class Writes(pl.Callback):
    """Write to both streams."""

    def on_train_start(self, trainer, pl_module):
        print("a line")
        print("a line", file=sys.stderr)


def test_text_is_dropped_where_the_disk_is_full(tmp_path):
    with FULL.open("wb", buffering=0) as full:
        file = LossyFile(full.fileno(), "output")
        assert file.write(b"abc") == 3
        assert file.error == "No space left on device"


def test_text_is_written_and_a_closed_pipe_still_raises(tmp_path):
    reader, writer = os.pipe()
    file = LossyFile(writer, "output")
    assert file.write(b"abc") == 3
    assert os.read(reader, 9) == b"abc"
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        file.write(b"abc")
    os.close(writer)
    assert not file.error


def run(folder, args, stream):
    with FULL.open("wb") as full:
        other = {"stdout": "stderr", "stderr": "stdout"}[stream]
        streams: dict[str, Any] = {stream: full, other: subprocess.PIPE}
        done = subprocess.run(
            [sys.executable, "-m", "yolo_lightning", *args], cwd=folder, env=ENVIRONMENT,
            **streams, text=True, timeout=120, check=False,
        )  # fmt: skip
    return done.returncode, getattr(done, other)


def test_a_command_whose_output_is_lost_fails(tmp_path):
    code, errors = run(tmp_path, ["--help"], "stdout")
    assert code == 1
    message = "standard output cannot be written (No space left on device); its text is lost\n"
    assert errors == f"yolo-lightning: {message}"


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_training_goes_on(tmp_path, stream):
    write_recipe(tmp_path)
    callback = ["--allow-module", __name__, f"--trainer.callbacks+={__name__}.Writes"]
    options = [*arguments(tmp_path, 1), "--trainer.max_epochs=1", *callback]
    code, text = run(tmp_path, options, stream)
    assert code == 0
    name = {"stdout": "output", "stderr": "error"}[stream]
    assert f"standard {name} cannot be written" in text
    assert len(entries(tmp_path)) == STEPS_PER_EPOCH
    assert list(tmp_path.glob("runs/*/checkpoints/last.ckpt"))
