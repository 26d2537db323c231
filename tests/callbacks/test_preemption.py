"""A training that is told to stop saves once, leaves, and goes on as if it had not."""

import os
import signal
import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.helpers.diary import entries, mismatches
from tests.helpers.kill_and_resume import STEPS, STEPS_PER_EPOCH, arguments, write_recipe
from tests.helpers.processes import left_within, ranks_of, start
from yolo_lightning import signals
from yolo_lightning.callbacks import preemption
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError


class Alarm(pl.Callback):
    """Sends this process a signal at a step, or in the validation after it."""

    number, step, in_validation, sent = signal.SIGTERM, 3, False, False
    figures: list[tuple[int, float]] = []

    @classmethod
    def set(cls, number=signal.SIGTERM, step=3, in_validation=False):
        cls.number, cls.step, cls.in_validation, cls.sent = number, step, in_validation, False
        cls.figures = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch.step == self.step and not self.in_validation and not self.sent:
            type(self).sent = True
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        due = trainer.global_step == self.step + 1 and batch_idx == 1
        if self.in_validation and due and not self.sent:
            type(self).sent = True
            os.kill(os.getpid(), self.number)

    def on_validation_end(self, trainer, module):
        figure = float(trainer.callback_metrics["val/AP50"])
        self.figures.append((trainer.global_step, figure))


def fit(folder, *options):
    alarm = "--trainer.callbacks+=tests.callbacks.test_preemption.Alarm"
    module = ("--allow-module", "tests.callbacks.test_preemption")
    return main([*arguments(folder, 0), *module, alarm, *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder)
    Alarm.set(step=10_000)
    assert fit(folder) == 0
    assert len(entries(folder)) == STEPS
    return folder, list(Alarm.figures)


def states(folder):
    return sorted(path.name for path in folder.glob("runs/*/checkpoints/*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_it_and_a_resume_goes_on(whole, tmp_path, number, capsys):
    write_recipe(tmp_path)
    Alarm.set(number, step=3)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left:
        fit(tmp_path)
    assert left.value.code == 143
    assert signal.getsignal(number) is before
    assert signals.asked() == 0
    assert [entry[0] for entry in entries(tmp_path)] == [0, 1, 2, 3]
    (last,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert fit(tmp_path) == 0
    assert not mismatches(entries(whole[0]), entries(tmp_path), STEPS)
    assert len(entries(tmp_path)) == STEPS, "no step twice"
    assert len(list(tmp_path.glob("runs/*"))) == 1
    assert "resuming: " in capsys.readouterr().out


def test_a_stop_in_a_validation_does_it_anew(whole, tmp_path):
    write_recipe(tmp_path)
    Alarm.set(step=STEPS_PER_EPOCH - 1, in_validation=True)
    with pytest.raises(SystemExit):
        fit(tmp_path, "--data.detection_batch_size=2")  # three batches of validation
    assert [entry[0] for entry in entries(tmp_path)] == list(range(STEPS_PER_EPOCH))
    Alarm.sent, Alarm.figures = True, []
    assert fit(tmp_path, "--data.detection_batch_size=2") == 0
    assert [step for step, _ in Alarm.figures] == [6, 12, 18, 24]
    reference = tmp_path / "reference"
    reference.mkdir()
    write_recipe(reference)
    resumed = list(Alarm.figures)
    Alarm.set(step=10_000)
    assert fit(reference, "--data.detection_batch_size=2") == 0
    assert resumed == Alarm.figures
    assert not mismatches(entries(reference), entries(tmp_path), STEPS)


def test_a_whole_run_can_be_made_longer(whole, tmp_path):
    write_recipe(tmp_path)
    Alarm.set(step=10_000)
    assert fit(tmp_path) == 0
    assert fit(tmp_path) == 0
    assert len(entries(tmp_path)) == STEPS, "nothing is left to do"
    assert fit(tmp_path, "--trainer.max_epochs=5") == 0
    assert [entry[0] for entry in entries(tmp_path)] == list(range(STEPS + STEPS_PER_EPOCH))
    assert [step for step, _ in Alarm.figures] == [6, 12, 18, 24, 30]


def test_accumulated_steps_are_never_cut_in_two(tmp_path):
    parts = "--trainer.accumulate_grad_batches=2"
    reference = tmp_path / "reference"
    reference.mkdir()
    write_recipe(reference)
    Alarm.set(step=10_000)
    assert fit(reference, parts) == 0
    write_recipe(tmp_path)
    for step in (2, 8):  # the first halves of steps
        Alarm.set(step=step)
        with pytest.raises(SystemExit):
            fit(tmp_path, parts)
        assert len(entries(tmp_path)) == step + 2
    Alarm.set(step=10_000)
    assert fit(tmp_path, parts) == 0
    assert not mismatches(entries(reference), entries(tmp_path), STEPS)
    assert len(entries(tmp_path)) == STEPS


def test_a_checkpoint_that_is_named_is_where_a_job_begins_the_first_time_only(tmp_path):
    write_recipe(tmp_path)
    Alarm.set(step=3)
    with pytest.raises(SystemExit):
        fit(tmp_path)
    (base,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    job = tmp_path / "job"
    job.mkdir()
    write_recipe(job)
    Alarm.set(step=5)
    named = f"--ckpt_path={base}"
    other = f"--trainer.default_root_dir={job}/runs"
    diary = ("--trainer.callbacks+=tests.helpers.diary.Diary", f"--trainer.callbacks.folder={job}")
    with pytest.raises(SystemExit):
        fit(tmp_path, named, other, *diary)
    Alarm.set(step=10_000)
    assert fit(tmp_path, named, other, *diary) == 0
    assert [entry[0] for entry in entries(job)] == list(range(4, STEPS))


def test_two_trainings_do_not_share_a_folder(tmp_path):
    from yolo_lightning.cli import runs

    process = os.fork()
    if not process:
        runs.hold(tmp_path)
        (tmp_path / "held").write_text("")
        time.sleep(60)
        os._exit(0)
    try:
        until = time.monotonic() + 20
        while not (tmp_path / "held").exists() and time.monotonic() < until:
            time.sleep(0.02)
        with pytest.raises(InputError, match="another training is writing there"):
            runs.hold(tmp_path)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    runs.hold(tmp_path)


def test_the_time_limit_puts_the_job_back_into_the_queue_once(tmp_path, monkeypatch):
    called = tmp_path / "called"
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    for number, expected in ((signal.SIGTERM, None), (signal.SIGUSR1, "requeue 42\n")):
        folder = tmp_path / str(int(number))
        folder.mkdir()
        write_recipe(folder)
        Alarm.set(number)
        with pytest.raises(SystemExit):
            fit(folder)
        assert (called.read_text() if called.exists() else None) == expected
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert preemption.requeue()
    assert called.read_text() == "requeue 42\nrequeue 40_2\n"
    scontrol.write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    with pytest.warns(UserWarning, match="could not be put back into the queue: no such job"):
        assert not preemption.requeue()


def test_a_fork_keeps_the_handler_and_not_the_task():
    handlers = signals.listen()
    try:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(signals.asked())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert signals.asked() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked() == signal.SIGUSR1
    finally:
        signals.restore(handlers)
    assert signals.asked() == 0


class Handlers(torch.utils.data.Dataset[list[int]]):
    def __getitem__(self, index):
        return [int(signal.getsignal(n) == signal.SIG_IGN) for n in signals.SIGNALS]


def test_loader_workers_ignore_the_signals():
    from yolo_lightning.datamodules.combined import ResumableLoader

    data: Any = Handlers()
    loader = ResumableLoader(data, torch.utils.data.SequentialSampler([0, 1]), 1)
    assert [list(batch) for batch in loader] == [[1, 1], [1, 1]]


def test_a_signal_during_the_imports_is_kept(tmp_path):
    process = start(tmp_path, "--trainer.max_epochs=50")
    time.sleep(1.0)
    assert not (tmp_path / "runs").exists(), "still importing"
    process.send_signal(signal.SIGTERM)
    assert left_within(process, 30) == 143, (tmp_path / "log.txt").read_text()
    assert "last.ckpt" in states(tmp_path)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_of_two_ranks_stops_both(tmp_path, rank):
    options = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=500")
    process = start(tmp_path, *options)
    until = time.monotonic() + 120
    while not entries(tmp_path, 1) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
    os.kill(ranks_of(process.pid)[rank], signal.SIGTERM)
    assert left_within(process, 30) == 143, (tmp_path / "log.txt").read_text()
    first, second = ([entry[:3] for entry in entries(tmp_path, k)] for k in (0, 1))
    assert first == second
    (last,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == len(first)
