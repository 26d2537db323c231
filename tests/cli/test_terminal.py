"""What a training shows: in a terminal, in a log file, after a resume, and at Ctrl-C."""

import csv
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.data import has_len_all_ranks

from tests.helpers.processes import ENVIRONMENT
from tests.helpers.recipes import QUICK, TINY
from tests.helpers.terminal import open_terminal, terminal, visible_lines
from yolo_lightning.cli.main import main

pytestmark = pytest.mark.end_to_end

ROW = re.compile(
    r"step +(\d+)  loss \d+\.\d+ +AP50 0\.\d{3}  unboxed 0\.\d{3}  AP 0\.\d{3}  00:\d\d"
    r"(  best boxed)?"
)
NEEDLESS = (
    "available: ", "Epoch", "FLOPs", "Trainer.fit", "Tip", "LeafSpec", "Seed set", "it/s", "v_num",
    "Restored all", "logging interval", "Test metric",
)  # fmt: skip


class Messages(pl.Callback):
    """Write in each of the ways in which libraries write."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        print("a print")
        print("an error", file=sys.stderr)
        rank_zero_info("a log message")


class Stop(pl.Callback):
    """Send SIGTERM, once, after three steps."""

    sent = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3 and not self.sent:
            type(self).sent = True
            os.kill(os.getpid(), signal.SIGTERM)


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row.pop("seconds")) > 0
    return rows


def run_folder(workplace: Path) -> Path:
    (folder,) = workplace.glob("outputs/quickstart/*")
    return folder.relative_to(workplace)


def fields(lines: list[str]) -> dict[str, str]:
    """Return lines of a name and a text."""
    return {line[:12].strip(): line[12:] for line in lines if re.match(r"\w[\w ]{10} ", line)}


def test_a_training_in_a_terminal_and_resumed(workplace, monkeypatch, reports, capsys):
    with terminal(monkeypatch) as output:
        assert main(["fit", *QUICK, *TINY, "--trainer.max_steps=2"]) == 0
    with terminal(monkeypatch, 60) as resumed_output:
        assert main(["fit", *QUICK, *TINY, "--resume=auto"]) == 0
    folder = run_folder(workplace)
    lines, resumed = visible_lines(output[0]), visible_lines(resumed_output[0])
    assert lines[0] == f"run folder  {folder}"
    start = fields(lines)
    assert "mlflow ui   (sqlite:///" in start["dashboard"]
    assert re.fullmatch(
        r"\d\.\d million parameters, 0\.\d\d billion operations for an image of 96 px",
        start["network"],
    )
    bars = [line for line in lines if "|" in line]
    assert len(bars) == 1, "one bar, and nothing of the validations"
    assert re.fullmatch(
        r"100%\|█+\| 2/2 \[00:\d\d<00:00, loss [\d.]+, labels [\d.]+, [\d.]+ images/s\]", bars[0]
    )
    assert 70 < len(bars[0]) <= 80
    assert "validation 1/" in output[0]
    assert "| 2/4 [" in resumed_output[0].split("3/4")[0], "it begins at the resumed step"
    assert "| 1/4 [" not in resumed_output[0]
    assert len([line for line in resumed if "|" in line]) == 1
    rows = [match for match in map(ROW.fullmatch, [*lines, *resumed]) if match]
    assert [match[1] for match in rows] == ["2", "4"]
    assert rows[0][2], "the first is the best so far"
    for text in NEEDLESS:
        assert text not in output[0] + resumed_output[0]

    end = fields(resumed)
    assert re.fullmatch(r"AP50_boxed 0\.\d{3}; best 0\.\d{3} at step [24]", end["result"])
    assert end["checkpoint"] == f"{folder}/checkpoints/best.ckpt"
    for name in ("report", "pictures", "figures"):
        assert all(Path(path).exists() for path in shlex.split(end[name])), name
    assert [row["step"] for row in results(folder)] == ["2", "4"]
    command = shlex.split(end["test it"])
    assert main(command[command.index("test") :]) == 0
    tested = capsys.readouterr().out
    assert "pentagram" in tested
    assert not re.search(r"\d\.\d{7}", tested)
    assert "Test metric" not in tested
    assert shlex.split(end["use it"])[-3:] == ["detect", end["checkpoint"], "IMAGE"]


def test_a_resumed_table_equals_that_of_one_training(workplace, capsys):
    args = ["fit", *QUICK, *TINY, "--trainer.log_every_n_steps=2"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "\r" not in printed
    lines = printed.splitlines()
    progress = [line for line in lines if re.match(r"step \d/4, 00:\d\d left", line)]
    assert len(progress) == 4
    assert re.search(r"left, loss [\d.]+, labels [\d.]+, [\d.]+ images/s$", progress[-1])
    assert [match[1] for match in map(ROW.fullmatch, lines) if match] == ["2", "4"]
    expected = results(run_folder(workplace))
    run_folder(workplace).rename("first")

    stop = ["--allow-module", __name__, f"--trainer.callbacks+={__name__}.Stop"]
    with pytest.raises(SystemExit):
        main([*args, *stop])
    folder = run_folder(workplace)
    assert [row["step"] for row in results(folder)] == ["2"]
    with (folder / "results.csv").open("a") as file:  # of steps that a kill has cut off
        file.write("4,9,1\n5,9,1\n")
    assert main([*args, *stop, "--resume=auto"]) == 0
    assert results(folder) == expected


def test_other_output_stands_above_the_bar(workplace, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    name = f"{__name__}.Messages"
    module = ["--allow-module", __name__]
    handler = logging.StreamHandler()
    logger = logging.getLogger("lightning.pytorch")
    before = sys.stdout, sys.stderr
    with terminal(monkeypatch) as output:
        handler.setStream(sys.stderr)
        monkeypatch.setattr(logger, "handlers", [handler])
        assert main(["fit", *QUICK, *TINY, *module, f"--trainer.callbacks+={name}"]) == 0
    assert (sys.stdout, sys.stderr) == before
    lines = visible_lines(output[0])
    for text in ("a print", "an error", "a log message"):
        assert lines.count(text) == 4
    assert len([line for line in lines if ROW.fullmatch(line)]) == 2
    assert len([line for line in lines if "|" in line]) == 1


def test_the_recipe_decides_on_progress_bar_and_summary(build_trainer):
    def kinds(*options: str) -> list[str]:
        names = [type(callback).__name__ for callback in build_trainer(*options).callbacks]
        return [name for name in names if name.endswith(("Progress", "ProgressBar", "Summary"))]

    assert kinds() == ["TrainingProgress"]
    assert kinds("--trainer.enable_progress_bar=false") == []
    own = ("TQDMProgressBar", "ModelSummary")
    options = [f"--trainer.callbacks+=lightning.pytorch.callbacks.{name}" for name in own]
    assert sorted(kinds(*options)) == sorted(own)


def test_evaluation_does_not_repeat_what_the_recipe_says(build_trainer, recwarn):
    trainer = build_trainer("--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging")
    (averaging,) = [c for c in trainer.callbacks if type(c).__name__ == "EMAWeightAveraging"]
    averaging.on_load_checkpoint(trainer, None, {})  # as in `test`
    has_len_all_ranks([], trainer.strategy)  # no validation images
    assert not [w for w in recwarn if "WeightAveraging" in str(w.message) or "zero" in str(w)]


@pytest.fixture
def build_trainer(monkeypatch, workplace):
    from yolo_lightning.cli import recipe

    monkeypatch.setattr(recipe.RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda *options: recipe.main(["fit", *QUICK, *TINY, *options]).trainer


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(workplace):
    screen, program = open_terminal(80)
    process = subprocess.Popen(
        [sys.executable, "-m", "yolo_lightning", "fit", *QUICK, *TINY, "--trainer.max_steps=2000"],
        env=ENVIRONMENT, cwd=workplace, stdin=program, stdout=program, stderr=program,
        start_new_session=True, preexec_fn=lambda: _set_controlling_terminal(),
    )  # fmt: skip
    os.close(program)
    output = b""
    while chunk := _read(screen):
        has_row = b"step     2" in output
        output += chunk
        if not has_row and b"step     2" in output:
            os.write(screen, b"\x03")
    assert process.wait(60) == 128 + signal.SIGINT
    os.close(screen)
    lines = visible_lines(output.decode())
    assert "Ctrl-C: stopping at the end of this step; press it again to leave at once" in lines
    (stopped,) = [line for line in lines if line.startswith("Ctrl-C: stopped at step ")]
    (folder,) = workplace.glob("outputs/quickstart/*")
    assert stopped.endswith(f", saved to {folder.relative_to(workplace)}/checkpoints/last.ckpt")
    *_, last = [line for line in lines if line]
    assert last.startswith("to go on: ")
    words = shlex.split(last.removeprefix("to go on: "))
    step = int(stopped.split()[4].rstrip(","))
    arguments = [*words[words.index("fit") :], f"--trainer.max_steps={step + 1}"]
    assert main(arguments) == 0


def _set_controlling_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read(screen: int) -> bytes:
    try:
        return os.read(screen, 65536)
    except OSError:  # EIO: closed
        return b""
