"""`yolo-lightning quickstart`: compare joint training with training on the same boxes alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from yolo_lightning.cli import packaged


def main(argv: Sequence[str]) -> None:
    """Run both trainings, and print the comparison and the paths of its files."""
    parser = argparse.ArgumentParser(
        prog="yolo-lightning quickstart",
        description="Train with and without image labels on the same boxes, and compare.",
        epilog="Other options are passed to both trainings, such as --seed_everything 1.",
    )
    default = str(packaged.recipe("quickstart"))
    parser.add_argument("--config", default=default, help="recipe (default: %(default)s)")
    parser.add_argument(
        "--output", default="outputs/quickstart", type=Path, help="folder (default: %(default)s)"
    )
    options, overrides = parser.parse_known_args(list(argv))
    from yolo_lightning.cli.commands.quickstart.comparison import compare

    compare(options.config, overrides, options.output)
