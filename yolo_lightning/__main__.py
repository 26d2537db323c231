"""Run the command line: ``yolo-lightning COMMAND …`` or ``python -m yolo_lightning COMMAND …``."""

import os
import signal
import sys

# `-m` puts the working folder before all packages, so a torch.py in it would be run
if not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]


def run() -> int:
    """Run a command and return its exit code; Ctrl-C ends the imports without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from yolo_lightning.cli.main import console

    return console()


if __name__ == "__main__":
    sys.exit(run())
