"""`Preemption`: a training stops on a signal, saves once, and resumes exactly."""

import os
import shlex
import signal
import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.helpers.diary import entries, mismatches
from tests.helpers.kill_and_resume import STEPS_PER_EPOCH, arguments, write_recipe
from tests.helpers.paths import REPO
from tests.helpers.processes import ENVIRONMENT, rank_pids, start, wait_or_kill
from yolo_lightning import signals
from yolo_lightning.callbacks import preemption
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import ShapesDetection
from yolo_lightning.errors import InputError

pytestmark = pytest.mark.end_to_end

EPOCHS = 2
STEPS = EPOCHS * STEPS_PER_EPOCH


class SendSignal(pl.Callback):
    """Send this process a signal at a step, or in the validation after it."""

    number, step, in_validation, sent = signal.SIGTERM, 3, False, False
    metrics: list[tuple[int, float]] = []

    @classmethod
    def set(cls, number=signal.SIGTERM, step=3, in_validation=False):
        cls.number, cls.step, cls.in_validation, cls.sent = number, step, in_validation, False
        cls.metrics = []

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
        value = float(trainer.callback_metrics["val/AP50"])
        self.metrics.append((trainer.global_step, value))


def fit(folder, *options):
    callback = "--trainer.callbacks+=tests.callbacks.test_preemption.SendSignal"
    module = ("--allow-module", "tests.callbacks.test_preemption")
    length = f"--trainer.max_epochs={EPOCHS}"
    return main([*arguments(folder, 0), *module, callback, length, *options])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_recipe(folder)
    SendSignal.set(step=10_000)
    assert fit(folder) == 0
    assert len(entries(folder)) == STEPS
    return folder, list(SendSignal.metrics)


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("runs/*/checkpoints/*"))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]
)
def test_signal_saves_the_step_and_the_training_resumes(
    uninterrupted, tmp_path, number, code, capsys
):
    write_recipe(tmp_path)
    SendSignal.set(number, step=3)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path)
    assert caught.value.code == code
    assert signal.getsignal(number) is before
    assert signals.received_signal() == 0
    assert [entry[0] for entry in entries(tmp_path)] == [0, 1, 2, 3]
    (last,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 4
    command = capsys.readouterr().err.splitlines()[-1]
    assert command.startswith("to go on: ")
    words = shlex.split(command)
    assert "--resume" not in words
    assert words[-1] == f"--ckpt_path={last}"
    assert (main(words[words.index("fit") :]) if code == 130 else fit(tmp_path)) == 0
    assert not mismatches(entries(uninterrupted[0]), entries(tmp_path), STEPS)
    assert len(entries(tmp_path)) == STEPS, "no step twice"
    assert len(list(tmp_path.glob("runs/*"))) == 1
    if code == 143:
        assert "resuming: " in capsys.readouterr().out


def test_interrupt_before_the_training_ends_at_once(tmp_path, monkeypatch, capsys):
    write_recipe(tmp_path)
    monkeypatch.setattr(
        ShapesDetection, "prepare", lambda self: os.kill(os.getpid(), signal.SIGINT)
    )
    with pytest.raises(SystemExit) as caught:
        fit(tmp_path)
    assert caught.value.code == 130
    assert capsys.readouterr().err.endswith("stopped\n")
    assert not list(tmp_path.glob("runs/*")), "no empty run folder"


def test_run_killed_before_its_first_checkpoint_is_started_again(tmp_path, monkeypatch, capsys):
    write_recipe(tmp_path)
    SendSignal.set(step=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(SendSignal, "on_train_batch_start", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path)
    (run,) = tmp_path.glob("runs/*")
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints/last.ckpt.part").touch()
    assert fit(tmp_path, "--trainer.max_epochs=1") == 0
    assert list(tmp_path.glob("runs/*")) == [run]
    assert f"starting again: {run} has no checkpoint yet" in capsys.readouterr().out
    assert [entry[0] for entry in entries(tmp_path)] == list(range(STEPS_PER_EPOCH))
    assert checkpoints(tmp_path) == ["last.ckpt", "previous.ckpt"]


def test_validation_is_repeated_after_a_stop_in_it(tmp_path):
    write_recipe(tmp_path)
    SendSignal.set(step=STEPS_PER_EPOCH - 1, in_validation=True)
    with pytest.raises(SystemExit):
        fit(tmp_path, "--data.detection_batch_size=2")  # three validation batches
    assert [entry[0] for entry in entries(tmp_path)] == list(range(STEPS_PER_EPOCH))
    SendSignal.sent, SendSignal.metrics = True, []
    assert fit(tmp_path, "--data.detection_batch_size=2") == 0
    assert [step for step, _ in SendSignal.metrics] == [6, 12]
    reference = tmp_path / "reference"
    reference.mkdir()
    write_recipe(reference)
    resumed = list(SendSignal.metrics)
    SendSignal.set(step=10_000)
    assert fit(reference, "--data.detection_batch_size=2") == 0
    assert resumed == SendSignal.metrics
    assert not mismatches(entries(reference), entries(tmp_path), STEPS)


def test_finished_run_can_be_extended(tmp_path):
    write_recipe(tmp_path)
    SendSignal.set(step=10_000)
    assert fit(tmp_path) == 0
    assert fit(tmp_path) == 0
    assert len(entries(tmp_path)) == STEPS, "nothing is left to do"
    assert fit(tmp_path, "--trainer.max_epochs=3") == 0
    assert [entry[0] for entry in entries(tmp_path)] == list(range(STEPS + STEPS_PER_EPOCH))
    assert [step for step, _ in SendSignal.metrics] == [6, 12, 18]


def test_accumulated_steps_are_completed_before_a_stop(tmp_path):
    accumulate = "--trainer.accumulate_grad_batches=2"
    reference = tmp_path / "reference"
    reference.mkdir()
    write_recipe(reference)
    SendSignal.set(step=10_000)
    assert fit(reference, accumulate) == 0
    write_recipe(tmp_path)
    for step in (2, 8):  # the first batches of their steps
        SendSignal.set(step=step)
        with pytest.raises(SystemExit):
            fit(tmp_path, accumulate)
        assert len(entries(tmp_path)) == step + 2
    SendSignal.set(step=10_000)
    assert fit(tmp_path, accumulate) == 0
    assert not mismatches(entries(reference), entries(tmp_path), STEPS)
    assert len(entries(tmp_path)) == STEPS


def test_ckpt_path_is_only_used_by_the_first_start_of_a_job(tmp_path):
    write_recipe(tmp_path)
    SendSignal.set(step=3)
    with pytest.raises(SystemExit):
        fit(tmp_path)
    (initial,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    job = tmp_path / "job"
    job.mkdir()
    write_recipe(job)
    SendSignal.set(step=5)
    ckpt_path = f"--ckpt_path={initial}"
    root_dir = f"--trainer.default_root_dir={job}/runs"
    diary = ("--trainer.callbacks+=tests.helpers.diary.Diary", f"--trainer.callbacks.folder={job}")
    with pytest.raises(SystemExit):
        fit(tmp_path, ckpt_path, root_dir, *diary)
    SendSignal.set(step=10_000)
    assert fit(tmp_path, ckpt_path, root_dir, *diary) == 0
    assert [entry[0] for entry in entries(job)] == list(range(4, STEPS))


def test_run_folder_is_locked(tmp_path):
    from yolo_lightning.cli import runs

    process = os.fork()
    if not process:
        runs.lock(tmp_path)
        (tmp_path / "locked").write_text("")
        time.sleep(60)
        os._exit(0)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "locked").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(InputError, match="another training is writing there"):
            runs.lock(tmp_path)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    runs.lock(tmp_path)


def test_only_sigusr1_requeues_the_job(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    for number, expected in ((signal.SIGTERM, None), (signal.SIGUSR1, "requeue 42\n")):
        folder = tmp_path / str(int(number))
        folder.mkdir()
        write_recipe(folder)
        SendSignal.set(number)
        with pytest.raises(SystemExit):
            fit(folder)
        assert (calls.read_text() if calls.exists() else None) == expected
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert preemption.requeue()
    assert calls.read_text() == "requeue 42\nrequeue 40_2\n"
    scontrol.write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    with pytest.warns(UserWarning, match="could not be requeued: no such job"):
        assert not preemption.requeue()


def test_forked_process_ignores_its_signals():
    restore = signals.install_handlers()
    try:
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(signals.received_signal())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert signals.received_signal() == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received_signal() == signal.SIGUSR1
    finally:
        restore()
    assert signals.received_signal() == 0


class IgnoredSignals(torch.utils.data.Dataset[list[int]]):
    def __getitem__(self, index):
        return [int(signal.getsignal(n) == signal.SIG_IGN) for n in signals.SIGNALS]


def test_loader_workers_ignore_the_signals():
    from yolo_lightning.datamodules.loader import ResumableLoader

    data: Any = IgnoredSignals()
    loader: Any = ResumableLoader(data, torch.utils.data.SequentialSampler([0, 1]), 1)
    assert [list(batch) for batch in loader] == [[1, 1, 1], [1, 1, 1]]
    (worker,) = loader._iterator._workers
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises if it is the first
    try:
        worker.terminate()  # as PyTorch and the exit of the process, which then waits for it
        worker.join(10)
        assert not worker.is_alive()
    finally:
        signal.signal(signal.SIGCHLD, handler)


class HangingShapes(ShapesDetection):
    """Shapes on a disk that answers no more, once the file HANG exists."""

    def image_name(self, index):
        return f"disk/{index}.jpg"

    def read(self, index, min_side=None):
        while os.path.exists(os.environ.get("HANG", "")):
            time.sleep(0.05)
        return super().read(index, min_side)


def test_loader_timeout_names_the_image(tmp_path, monkeypatch):
    from yolo_lightning.datamodules.batching import EvaluationDataset
    from yolo_lightning.datamodules.loader import ResumableLoader
    from yolo_lightning.tree.wordtree import WordTree

    source = HangingShapes(length=4, image_size=32)
    source.bind(WordTree.from_source(str(REPO / "recipes/trees/shapes.tsv")))
    dataset = EvaluationDataset(source, 32)
    loader = ResumableLoader(dataset, [[0], [1], [2], [3]], 1, timeout_s=1)
    assert [batch.sample_ids.tolist() for batch in loader] == [[0], [1], [2], [3]]
    assert loader.pending_images() == ""
    monkeypatch.setenv("HANG", str(tmp_path))
    with pytest.raises(InputError, match=r"no batch within 1 s, waiting for disk/1.jpg; see"):
        list(ResumableLoader(dataset, [[1]], 1, timeout_s=1))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_with_a_hanging_loader_worker(tmp_path, monkeypatch, number, code, ranks):
    """All processes receive the signal, as from a terminal or a scheduler."""
    hang = tmp_path / "hang"
    monkeypatch.setitem(ENVIRONMENT, "HANG", str(hang))
    options = [] if ranks == 1 else ["--trainer.devices=2", "--trainer.strategy=ddp"]
    process = start(
        tmp_path, "--trainer.max_epochs=500", *options, "--allow-module",
        "tests.callbacks.test_preemption", "--trainer.callbacks+=Preemption",
        "--trainer.callbacks.grace_s=2",
        "--data.detection.class_path=tests.callbacks.test_preemption.HangingShapes",
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(entries(tmp_path, ranks - 1)) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        hang.touch()
        time.sleep(3)  # for the prefetched batches
        os.killpg(process.pid, number)
        started = time.monotonic()
        assert wait_or_kill(process, 60) == code, (tmp_path / "log.txt").read_text()
    finally:
        hang.unlink()
    assert time.monotonic() - started < 20
    log = (tmp_path / "log.txt").read_text()
    assert "no stop within 2 s, waiting for disk/" in log
    assert "Traceback" not in log
    assert "last.ckpt" in checkpoints(tmp_path)


@pytest.mark.slow
def test_signal_during_imports_stops_after_one_step(tmp_path):
    process = start(tmp_path, "--trainer.max_epochs=50")
    time.sleep(1.0)
    assert not (tmp_path / "runs").exists(), "still importing"
    process.send_signal(signal.SIGTERM)
    assert wait_or_kill(process, 30) == 143, (tmp_path / "log.txt").read_text()
    assert "last.ckpt" in checkpoints(tmp_path)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_signal_to_one_of_two_ranks_stops_both(tmp_path, rank):
    options = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=500")
    process = start(tmp_path, *options)
    deadline = time.monotonic() + 120
    while not entries(tmp_path, 1) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    os.kill(rank_pids(process.pid)[rank], signal.SIGTERM)
    assert wait_or_kill(process, 30) == 143, (tmp_path / "log.txt").read_text()
    first, second = ([entry[:3] for entry in entries(tmp_path, k)] for k in (0, 1))
    assert first == second
    (last,) = tmp_path.glob("runs/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == len(first)
