"""Run the command line: ``python -m yolo_lightning COMMAND …``."""

import os
import sys

# `-m` puts the working folder before all packages, so a torch.py in it would be run
if not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]

from yolo_lightning.cli.main import console

sys.exit(console())
