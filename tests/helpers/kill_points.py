"""Kill this process at the n-th time that it does something to a file, by Python's audit events."""

import os
import signal
import sys
import threading
from typing import Any

_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.truncate", "sqlite3.connect"}


def kill_at(moment: str) -> None:
    """Kill the process group of this process at a moment; "" for never.

    Args:
        moment: an audit event, a part of a path, a number, and optionally seconds to wait, such as
            ``os.rename last.ckpt 3`` or ``sqlite3.connect mlflow.db 1 0.5``. ``open`` counts files
            that are opened for writing. ``print FILE`` appends all events to a file instead.
    """
    if not moment:
        return
    event, part, *numbers = moment.split()
    number, delay = int(numbers[0]) if numbers else 1, float(numbers[1]) if numbers[1:] else 0.0
    owner, count = os.getpid(), 0
    log = os.open(part, os.O_WRONLY | os.O_APPEND | os.O_CREAT) if event == "print" else -1

    def hook(name: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if name != "open" and name not in _WRITES:
            return
        if os.getpid() != owner or (name == "open" and not _is_for_writing(args)):
            return
        paths = " ".join(str(arg) for arg in args[:2] if isinstance(arg, str | bytes | os.PathLike))
        if event == "print":
            os.write(log, f"{name} {paths}\n".encode())
        elif name == event and part in paths:
            count += 1
            if count == number:
                _kill(delay)

    sys.addaudithook(hook)


def _is_for_writing(args: tuple[Any, ...]) -> bool:
    flags = args[2] if len(args) > 2 and isinstance(args[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _kill(delay: float) -> None:
    if not delay:
        os.killpg(0, signal.SIGKILL)
    threading.Timer(delay, os.killpg, (0, signal.SIGKILL)).start()
