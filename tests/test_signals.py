"""Stop signals: which ones wait for a step, and how long a stop may take."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers.paths import REPO
from yolo_lightning import signals


@pytest.fixture
def exits(monkeypatch):
    """Handle stop signals; record the exit codes of the thread, which ends instead."""
    codes, left = [], threading.Event()

    def leave(code):
        codes.append(code)
        left.set()

    monkeypatch.setattr(signals, "_exit", leave)
    restore = signals.install_handlers()
    yield codes, left
    restore()


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # a handler runs between two operations


def test_interrupt_ends_the_process_at_once_unless_it_is_deferred(exits):
    with pytest.raises(signals.Stop) as caught:
        send(signal.SIGINT)
    assert caught.value.code == 130
    send(signal.SIGINT)  # of the launcher: the first one is cleaning up
    assert signals.received_signal() == signal.SIGINT


def test_interrupt_that_python_ignores_is_repeated(exits, capfd):
    class Dying:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    Dying()
    with pytest.raises(signals.Stop):
        time.sleep(5)
    assert not capfd.readouterr().err


def test_deferred_interrupt_waits(exits, capfd):
    signals.defer_interrupts(True)
    send(signal.SIGINT)
    assert signals.received_signal() == signal.SIGINT
    with pytest.raises(signals.Stop):
        signals.end_deferral()
    assert "stopping at the end of this step; press it again" in capfd.readouterr().err


def test_second_interrupt_leaves_at_once_but_not_a_repeated_one(exits, monkeypatch):
    codes, left = exits
    monkeypatch.setattr(signals, "_REPEAT_S", 0.2)
    signals.defer_interrupts(True)
    send(signal.SIGINT)
    send(signal.SIGINT)  # terminal and launcher
    assert not codes
    time.sleep(0.25)
    send(signal.SIGINT)
    assert left.wait(5)
    assert codes == [130]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_that_hangs_ends_after_the_grace_period(exits, capfd, number, code):
    codes, left = exits
    cleaned: list[int] = []
    signals.limit_stops(0.3, cleaned.append, lambda: "disk/a.jpg")
    signals.defer_interrupts(True)
    started = time.monotonic()
    send(number)
    time.sleep(0.1)
    signals.restart_grace()
    assert left.wait(5)
    assert 0.4 <= time.monotonic() - started < 3
    assert codes == [code]
    assert cleaned == [number]
    assert "no stop within 0.3 s, waiting for disk/a.jpg; leaving" in capfd.readouterr().err


def test_interrupt_while_the_main_thread_is_in_a_c_library(exits, monkeypatch, capfd):
    codes, left = exits
    monkeypatch.setattr(signals, "_HANDLER_S", 0.05)
    os.write(signals._state.writer, bytes([signal.SIGINT]))  # no handler runs
    assert left.wait(5)
    assert codes == [130]
    assert capfd.readouterr().err == "\nstopped\n"


def test_thread_ends_before_a_forked_process():
    restore = signals.install_handlers()
    (thread,) = [t for t in threading.enumerate() if t.name == "stop-signals"]
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    restore()
    thread.join(5)
    assert not thread.is_alive()
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)


def test_sigusr1_counts_before_sigterm_before_an_interrupt(exits):
    signals.defer_interrupts(True)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        send(number)
    assert signals.received_signal() == signal.SIGUSR1


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    restore = signals.install_handlers()
    signals.install_handlers()()  # of the callback: the command line handles them already
    assert signal.getsignal(signal.SIGTERM) != before[1]
    restore()
    restore()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_in_a_notebook_a_second_interrupt_is_an_exception():
    descriptor, threads = signal.set_wakeup_fd(-1), {*threading.enumerate()}
    restore = signals.install_handlers(ends_process=False)
    try:
        assert {*threading.enumerate()} <= threads, "it starts none"
        assert signal.set_wakeup_fd(-1) == descriptor == -1
        signals.defer_interrupts(True)
        send(signal.SIGINT)
        assert signals.received_signal() == signal.SIGINT
        with pytest.raises(signals.Stop):
            send(signal.SIGINT)
        with signals.leave_at_interrupts():
            assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
    finally:
        restore()


IMPORT_THAT_IGNORES_EXCEPTIONS = """
import os, signal, time
from yolo_lightning.cli import main

def import_module(name):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except BaseException:
        print("ignored")
    raise SystemExit

main.import_module = import_module
main.main(COMMAND)
"""


@pytest.mark.parametrize("command", [["fit", str(REPO / "recipes/quickstart.yaml")], ["doctor"]])
def test_interrupt_during_imports_is_not_an_exception(command):
    code = IMPORT_THAT_IGNORES_EXCEPTIONS.replace("COMMAND", repr(command))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == -signal.SIGINT
    assert process.stdout == process.stderr == ""


_EARLY = """
import builtins, signal, sys
import yolo_lightning.__main__ as program

original = builtins.__import__

def interrupt(name, *args, **kwargs):
    if name == "yolo_lightning.cli.main":
        signal.raise_signal(signal.SIGINT)
    return original(name, *args, **kwargs)

builtins.__import__ = interrupt
program.run()
"""
_IN_A_COMMAND = """
import signal, sys
import yolo_lightning.cli.main as cli
from yolo_lightning.__main__ import run

cli.main = lambda: signal.raise_signal(signal.SIGINT)
sys.exit(run())
"""


@pytest.mark.parametrize(("code", "expected", "printed"), [
    (_EARLY, -signal.SIGINT, ""),  # shells report 130
    (_IN_A_COMMAND, 130, "stopped\n"),
], ids=["imports", "command"])  # fmt: skip
def test_ctrl_c_prints_no_traceback(code, expected, printed):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (expected, printed)
