"""Stop signals: handlers set a flag that training checks between two batches.

Saving in the handler would save in the middle of a step, and in every forked loader worker.
Handlers are installed before the first long import.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

STOP, STOP_AND_REQUEUE = signal.SIGTERM, signal.SIGUSR1
SIGNALS = (STOP, STOP_AND_REQUEUE)

_received: list[int] = []
_owner_pid: list[int] = []


def install_handlers() -> dict[int, Any]:
    """Record stop signals of this process from now on; return the previous handlers."""
    _owner_pid[:] = [os.getpid()]
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may set handlers
    return {number: signal.signal(number, _record_signal) for number in SIGNALS}


def restore_handlers(handlers: dict[int, Any]) -> None:
    """Restore the previous handlers and forget received signals."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    _received.clear()


def ignore_stop_signals() -> None:
    """Ignore stop signals in a loader worker, which must deliver the batches of the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def received_signal() -> int:
    """Return the received stop signal, SIGUSR1 before SIGTERM, or 0."""
    for number in (STOP_AND_REQUEUE, STOP):
        if number in _received:
            return int(number)
    return 0


def _record_signal(number: int, frame: FrameType | None) -> None:
    if [os.getpid()] == _owner_pid:  # forked processes inherit the handler
        _received.append(number)
