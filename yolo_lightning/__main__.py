"""Run the command line: ``python -m yolo_lightning COMMAND …``."""

import sys

from yolo_lightning.cli.main import console

sys.exit(console())
