"""Stop signals: Ctrl-C (SIGINT), SIGTERM and SIGUSR1.

Handlers set a flag that training checks between two batches: saving in the handler would save in
the middle of a step, and in every forked loader worker. Outside of the training loop, Ctrl-C ends
the process at once by an exception. A thread bounds the time of every stop: it ends the process if
the flag has no effect within the grace period, or if Ctrl-C is pressed again. It reads the signals
from a file descriptor, since a main thread that hangs in a C library does not run handlers.

Handlers are installed before the first long import.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

INTERRUPT, STOP, STOP_AND_REQUEUE = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
SIGNALS = (INTERRUPT, STOP, STOP_AND_REQUEUE)  # of several received ones, the last counts
NAMES: dict[int, str] = {INTERRUPT: "Ctrl-C", STOP: "SIGTERM", STOP_AND_REQUEUE: "SIGUSR1"}

GRACE_S = 60.0  # from a stop signal to the end of the process
_REPEAT_S = 1.0  # a terminal and a launcher may both send the same Ctrl-C
_HANDLER_S = 0.5  # from a signal to its handler, unless the main thread is in a C library
_CLEANUP_S = {True: 15.0, False: 1.0}  # by whether the grace period has passed


class Stop(SystemExit):
    """Exit by a stop signal, with code 130 after Ctrl-C, else 143, as schedulers expect.

    Attributes:
        requeued: whether the job will start again by itself.
        checkpoint: saved by this stop; None if nothing was saved, and on all ranks but 0.
    """

    def __init__(self, number: int, requeued: bool = False, checkpoint: Path | None = None) -> None:
        super().__init__(exit_code(number))
        self.requeued, self.checkpoint = requeued, checkpoint


def exit_code(number: int) -> int:
    """Return the exit code of a stop signal: 128 + SIGINT or 128 + SIGTERM."""
    return 128 + (INTERRUPT if number == INTERRUPT else STOP)


@dataclass
class _State:
    """The received signals of this process, and how it reacts."""

    pid: int = 0
    ends_process: bool = True
    writer: int = -1  # of the pipe to the thread
    received: list[int] = field(default_factory=list)
    deferred: bool = False  # Ctrl-C waits for the end of the step
    grace_s: float = GRACE_S
    grace_start: float = 0.0
    cleanup: Callable[[int], None] | None = None  # before the thread ends the process
    waiting_for: Callable[[], str] | None = None  # for the message of the thread


_state = _State()


def install_handlers(
    numbers: Sequence[int] = SIGNALS, ends_process: bool = True
) -> Callable[[], None]:
    """Handle stop signals of this process from now on; return a function that undoes it.

    Does nothing if they are handled already, or in another thread than the main one, which may not
    set handlers. Unless `ends_process`, as in a notebook, the process lives on in every case: there
    is no grace period, and a second Ctrl-C raises `Stop` within the step.
    """
    global _state
    is_main = threading.current_thread() is threading.main_thread()
    if not numbers or not is_main or _state.pid == os.getpid():
        return lambda: None
    _state = _State(os.getpid(), ends_process)
    handlers = {number: signal.signal(number, _record_signal) for number in numbers}
    end_thread = _start_thread(_state) if ends_process else lambda: None
    previous_hook, sys.unraisablehook = sys.unraisablehook, _raise_again

    def restore() -> None:
        global _state
        if _state.pid != os.getpid():
            return
        sys.unraisablehook = previous_hook
        end_thread()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _state = _State()

    return restore


def _start_thread(state: _State) -> Callable[[], None]:
    """Start the thread that bounds the time of a stop; return a function that ends it."""
    reader, state.writer = os.pipe()
    os.set_blocking(state.writer, False)
    previous = signal.set_wakeup_fd(state.writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader, state), name="stop-signals", daemon=True).start()

    def end() -> None:
        signal.set_wakeup_fd(previous)
        os.close(state.writer)

    return end


@contextlib.contextmanager
def leave_at_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process at once: imports may ignore an exception, or break by it."""
    is_main = threading.current_thread() is threading.main_thread()
    if not (is_main and _state.ends_process):
        yield
        return
    handler = signal.signal(INTERRUPT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(INTERRUPT, handler)


def ignore_stop_signals() -> None:
    """Ignore stop signals in a loader worker, which must deliver the batches of the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received_signal() -> int:
    """Return the received stop signal, SIGUSR1 before SIGTERM before SIGINT, or 0."""
    return max(_state.received, key=SIGNALS.index, default=0)


def defer_interrupts(deferred: bool) -> None:
    """Set whether Ctrl-C waits for the end of the step, or ends the process at once."""
    _state.deferred = deferred


def end_deferral() -> None:
    """Let Ctrl-C end the process at once from now on.

    Raises:
        Stop: one that waited waits no longer.
    """
    _state.deferred = False
    if INTERRUPT in _state.received:
        raise Stop(INTERRUPT)


def limit_stops(
    grace_s: float, cleanup: Callable[[int], None], waiting_for: Callable[[], str]
) -> None:
    """Set how long a stop may take, what is done when it takes longer, and what it waits for."""
    _state.grace_s, _state.cleanup, _state.waiting_for = grace_s, cleanup, waiting_for


def restart_grace() -> None:
    """Begin the grace period again: the step has ended, and its checkpoint is being saved."""
    _state.grace_start = time.monotonic()


def _record_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.pid:  # forked processes inherit the handler
        return
    is_first = number not in _state.received
    _state.received.append(number)
    at_once = not _state.deferred if is_first else not _state.ends_process
    if number == INTERRUPT and at_once:
        raise Stop(number)


def _raise_again(unraisable: Any) -> None:
    """Repeat a Ctrl-C that Python ignored, as in a weakref callback of the import system."""
    if not issubclass(unraisable.exc_type, Stop):
        sys.__unraisablehook__(unraisable)
    elif INTERRUPT in _state.received:
        _state.received.remove(INTERRUPT)
        main_thread = threading.main_thread().ident  # a real signal wakes it up
        threading.Timer(0.05, signal.pthread_kill, (main_thread, INTERRUPT)).start()


def _watch(reader: int, state: _State) -> None:
    """End the process after the grace period, or at a second Ctrl-C."""
    stop, interrupted = 0, 0.0
    while True:
        remaining = state.grace_start + state.grace_s - time.monotonic() if stop else None
        ready, _, _ = select.select([reader], [], [], remaining and max(0.0, remaining))
        now = time.monotonic()
        if not ready:
            if now < state.grace_start + state.grace_s:
                continue  # it was restarted
            return _leave(state, stop, is_late=True)
        data = os.read(reader, 1)
        if not data:
            return os.close(reader)
        number = data[0]
        if number not in SIGNALS:
            continue
        if not stop:
            stop, state.grace_start = number, now
        if number != INTERRUPT:
            continue
        if not interrupted and not state.deferred:
            time.sleep(_HANDLER_S)
            if INTERRUPT not in state.received:  # the main thread is in a C library
                _write("stopped")
                return _leave(state, number, is_late=False)
        if interrupted and now - interrupted > _REPEAT_S:
            return _leave(state, number, is_late=False)
        if not interrupted and state.deferred:
            _write("Ctrl-C: stopping at the end of this step; press it again to leave at once")
        interrupted = interrupted or now


def _leave(state: _State, number: int, is_late: bool) -> None:
    """End this process and those that it started; the last checkpoint stays as it is."""
    if is_late:
        waiting = state.waiting_for() if state.waiting_for is not None else ""
        _write(
            f"{NAMES[number]}: no stop within {state.grace_s:g} s"
            f"{f', waiting for {waiting}' if waiting else ''}; "
            "leaving, the last checkpoint stays as it is",
            any_rank=True,
        )
    if state.cleanup is not None:  # it may hang as well
        thread = threading.Thread(target=state.cleanup, args=(number,), daemon=True)
        thread.start()
        thread.join(_CLEANUP_S[is_late])
    _exit(exit_code(number))


def _exit(code: int) -> None:
    """End this process and its children: loader workers, which ignore signals, and ranks."""
    with contextlib.suppress(Exception):
        import psutil

        for process in psutil.Process().children(recursive=True):
            process.kill()
    os._exit(code)


def _write(message: str, any_rank: bool = False) -> None:
    """Write a line to standard error, without its buffer, which the main thread may hold."""
    if any_rank or is_first_rank():
        with contextlib.suppress(OSError):
            os.write(2, f"\n{message}\n".encode())


def is_first_rank() -> bool:
    """Return whether this is rank 0, as far as the environment says."""
    rank = next(
        (os.environ[n] for n in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if n in os.environ), ""
    )
    return rank in ("", "0")


def _after_fork() -> None:
    global _state
    if _state.writer >= 0:  # else another program's descriptor
        signal.set_wakeup_fd(-1)
        os.close(_state.writer)  # else the thread would not end before this process
    _state = _State()


os.register_at_fork(after_in_child=_after_fork)
