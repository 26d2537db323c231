"""Run a function in a fork, with limits; measure its seconds and its memory."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.helpers.tracking_outage import redirect_output


class Result(NamedTuple):
    """How a function ended.

    Args:
        code: that it returned, minus a signal's number, or None if it did not end in time.
        seconds: wall-clock time.
        peak_mb: largest resident memory of its process, in MB; that of the fork is part of it.
        output: of stdout and stderr.
    """

    code: int | None
    seconds: float
    peak_mb: float
    output: str


def run_forked(
    function: Callable[[], int], folder: Path, log: Path, timeout_s: float = 30
) -> Result:
    """Run a function in a fork whose working folder is `folder` and whose output goes to `log`."""
    started = time.monotonic()
    process = os.fork()
    if not process:
        _run(function, folder, log)
    while True:
        exited, status, usage = os.wait4(process, os.WNOHANG)
        seconds = time.monotonic() - started
        if exited:
            break
        if seconds > timeout_s:
            os.killpg(process, signal.SIGKILL)
            _, status, usage = os.wait4(process, 0)
            break
        time.sleep(0.005)
    code = os.waitstatus_to_exitcode(status) if exited else None
    output = log.read_text(errors="replace") if log.exists() else ""
    return Result(code, seconds, usage.ru_maxrss / 1024, output)


def _run(function: Callable[[], int], folder: Path, log: Path) -> None:
    code = 1
    try:
        os.setsid()
        redirect_output(log)
        os.chdir(folder)
        code = function()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
