"""Being asked to stop: signals set a flag, from before the first import on.

A cluster asks a job to stop by SIGTERM, or by SIGUSR1 some time before its limit. Saving inside a
handler would save in the middle of a step, and in every loader worker that was forked; here a
handler only writes down that it was called, and training looks at it between two batches.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

STOP, STOP_AND_REQUEUE = signal.SIGTERM, signal.SIGUSR1
SIGNALS = (STOP, STOP_AND_REQUEUE)

_asked: list[int] = []
_owner: list[int] = []


def listen() -> dict[int, Any]:
    """Let the signals set the flag of this process; return the handlers that stood before."""
    _owner[:] = [os.getpid()]
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may set handlers
    return {number: signal.signal(number, _write_down) for number in SIGNALS}


def restore(handlers: dict[int, Any]) -> None:
    """Put earlier handlers back, and forget."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _asked.clear()


def ignore() -> None:
    """Let a loader worker live on: who feeds the step that is being finished must not go."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def asked() -> int:
    """Return the signal that asked for a stop, SIGUSR1 before SIGTERM; 0 where none did."""
    for number in (STOP_AND_REQUEUE, STOP):
        if number in _asked:
            return int(number)
    return 0


def _write_down(number: int, frame: FrameType | None) -> None:
    if [os.getpid()] == _owner:  # a fork has the handler, but not the task
        _asked.append(number)
