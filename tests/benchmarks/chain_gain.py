"""Compare detection from a chained classifier with detection from scratch, at equal steps.

    python tests/benchmarks/chain_gain.py --seeds 0 1 2

Trains the first three stages of `tests/helpers/chain.py` on generated shapes: a classifier on image
labels at 64 px, the same at 96 px, and a detector on few images with boxes, once from the best
checkpoint of the classifier and once from random weights, with the same samples in the same order.
Prints a table of the box AP50 of the last step on images that no stage has read.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.chain import Miniature

MINIATURE = Miniature(
    steps=(900, 200, 500, 1),
    classes=["circle", "square", "equilateral triangle", "pentagram", "Greek cross", "crescent"],
    sizes=(64, 96),
    boxed_images=300,
    labelled_images=8192,
    evaluated_images=200,
    batch_size=16,
    labels_batch_size=32,
    crops={"aspect": 1.0, "degrees": 0.0},
    head_channels=64,
    learning_rates=(0.05, 0.01, 0.02, 0.02),
    validations=1,
    logger=False,
)


def fit(recipe: Path, root: Path, seed: int, pretrained: Path | None = None) -> dict[str, float]:
    """Train a recipe below `root`; return the metrics of its last validation."""
    from yolo_lightning.cli.recipe import RecipeCLI

    options = [f"--seed_everything={seed}", f"--data.seed={seed}"]
    options += [f"--trainer.default_root_dir={root}"]
    options += [f"--model.pretrained={pretrained}"] if pretrained is not None else []
    cli = RecipeCLI(["fit", "--config", str(recipe), *options])
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def run_seed(recipes: list[Path], folder: Path, seed: int) -> dict[str, float]:
    """Train both arms; return top-1 of the classifier and box AP50 of the detectors."""
    small, large, detect, _ = recipes
    fit(small, folder / "1", seed)
    top1 = fit(large, folder / "2", seed, folder / "1")["val/top1"]
    chained = fit(detect, folder / "3", seed, folder / "2")
    scratch = fit(detect, folder / "scratch", seed)
    return {
        "top-1 of the classifier": top1,
        "AP50, chained": chained["val/AP50"],
        "AP50, from scratch": scratch["val/AP50"],
        "gain": chained["val/AP50"] - scratch["val/AP50"],
    }


def main() -> None:
    """Train all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    import torch

    from yolo_lightning.cli.recipe import silence_libraries

    silence_libraries()
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        recipes = MINIATURE.write(Path(temporary))
        for seed in options.seeds:
            started = time.monotonic()
            rows.append(run_seed(recipes, Path(temporary) / str(seed), seed))
            text = ", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items())
            print(f"seed {seed}: {text} ({time.monotonic() - started:.0f} s)", flush=True)
    print("| | " + " | ".join(f"seed {seed}" for seed in options.seeds) + " | mean ± sd |")
    print("| --- |" + " --- |" * (len(rows) + 1))
    for name in rows[0]:
        values = [row[name] for row in rows]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells = " | ".join(f"{value:.3f}" for value in values)
        print(f"| {name} | {cells} | {statistics.mean(values):.3f}{spread} |")


if __name__ == "__main__":
    main()
