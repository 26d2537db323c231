"""`make road`: a miniature of the road from YOLO to YOLOv2, on a CPU; docs/road.md."""

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.road_report import replace_table, save_figure_of, table
from tests.benchmarks.road_steps import (
    LOW_SIZE,
    NEW_NETWORK,
    OLD_NETWORK,
    SIZE,
    STEPS,
    Values,
    classifier_values,
    detector_values,
    miniature_steps,
)
from yolo_lightning.callbacks import LastCheckpoint
from yolo_lightning.cli import recipe as cli
from yolo_lightning.cli.recipe_policy import allow
from yolo_lightning.detector import DetectorModule
from yolo_lightning.evaluation.curves import compute_curves
from yolo_lightning.tracking.logger import RunLogger

ROAD = "recipes/road.yaml"
CLASSIFY_LOW = "recipes/classify_imagenet_224.yaml"
CLASSIFY_HIGH = "recipes/classify_imagenet_448.yaml"
LAST_TRAINED = len(STEPS) - 2  # the last row only tests the row above, at a larger size


def arguments(values: Values) -> list[str]:
    """Return values of a recipe as options of the command line."""
    return [f"--{key}={value}" for key, value in values.items()]


def merge(rows: Sequence[Values]) -> list[str]:
    """Return the options of a row: its own after those of the rows above, which it overrides."""
    return [option for values in rows for option in arguments(values)]


def train(recipe: str, options: Sequence[str], folder: Path, name: str) -> dict[str, Any]:
    """Train with a recipe as one MLflow run; return the checkpoint and the seconds."""
    started = time.monotonic()
    logger = [f"--trainer.logger.{key}" for key in ("experiment_name=road", f"run_name={name}")]
    root = f"--trainer.default_root_dir={folder}"
    run = cli.main(["fit", "--config", recipe, *options, *logger, root])
    seconds = round(time.monotonic() - started, 1)
    return {"checkpoint": str(LastCheckpoint.path(run.trainer)), "train_seconds": seconds}


def test(recipe: str, options: Sequence[str], checkpoint: str) -> tuple[Any, dict[str, float]]:
    """Test a checkpoint; return the module and its metrics."""
    run = cli.main(["test", "--config", recipe, *options, f"--ckpt_path={checkpoint}"])
    return run.model, {key: float(v) for key, v in run.trainer.callback_metrics.items()}


def test_detector(options: Sequence[str], checkpoint: str) -> dict[str, float]:
    """Return AP50, and the mean recall at IoU 0.5 of all detections above the lowest score, %."""
    model, metrics = test(ROAD, options, checkpoint)
    assert isinstance(model, DetectorModule)
    curves = compute_curves(model.evaluation.targets, model.evaluation.detections)
    recall = float(curves.recall[:, 0].mean()) if len(curves.nodes) else 0.0
    return {"AP50": 100 * metrics["test/AP50"], "recall": 100 * recall}


def train_classifiers(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train the backbones of all rows, and set the environment variables with their paths."""
    steps, results = options.classifier_steps, {}

    def classify(name: str, low: str, network: list[Any], **more: str) -> None:
        recipe, size = (CLASSIFY_HIGH, SIZE) if low else (CLASSIFY_LOW, LOW_SIZE)
        own = {"model.backbone": json.dumps(network), "model.learning_rate": "0.05"} | more
        if low:
            own |= {"model.pretrained": os.environ[low], "model.learning_rate": "0.01"}
        count = max(1, steps // 4) if low else steps
        values = classifier_values(options.seed, count, size, options.test_images) | own
        run_name = f"classifier {name}, seed {options.seed}"
        results[name] = train(recipe, arguments(values), folder / name, run_name)
        metrics = test(recipe, arguments(values), results[name]["checkpoint"])[1]
        results[name]["top1"] = 100 * metrics["test/top1"]
        os.environ[name] = results[name]["checkpoint"]

    classify("EXTRACTION_224_PLAIN", "", OLD_NETWORK, **{"model.batch_norm": "false"})
    classify("EXTRACTION_224", "", OLD_NETWORK)
    classify("EXTRACTION_448", "EXTRACTION_224", OLD_NETWORK)
    classify("DARKNET19_224", "", NEW_NETWORK)
    classify("DARKNET19_448", "DARKNET19_224", NEW_NETWORK)
    return results


def log_last_row(options: argparse.Namespace, folder: Path, result: dict[str, Any]) -> None:
    """Log the row that has no training as a run of its own."""
    number, name = len(STEPS) - 1, STEPS[-1].name
    run_name = f"{number} {name}, seed {options.seed}"
    logger = RunLogger("road", run_name=run_name, folder=str(folder), system_metrics=False)
    logger.log_hyperparams(vars(options) | {"checkpoint": result["checkpoint"]})
    logger.log_metrics({"test/AP50": result["AP50"] / 100}, 0)
    logger.finalize("success")


def run_road(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and test all rows with one seed."""
    started = time.monotonic()
    allow(["tests.benchmarks"])
    classifiers = train_classifiers(options, folder)
    rows = miniature_steps(options.seed, options.images)
    base = detector_values(options.seed, options.steps, options.images, options.test_images)
    results: list[dict[str, Any]] = []
    for number, step in enumerate(STEPS):
        overrides = merge([base, *rows[: number + 1]])
        name = f"{number} {step.name}, seed {options.seed}"
        result = (
            train(ROAD, overrides, folder / str(number), name)
            if number <= LAST_TRAINED
            else dict(results[-1], train_seconds=0.0)
        )
        result |= {"name": step.name, **test_detector(overrides, result["checkpoint"])}
        print(f"{number} {step.name}: AP50 {result['AP50']:.1f}, recall {result['recall']:.1f}")
        results.append(result)
    log_last_row(options, folder / str(len(STEPS) - 1), results[-1])
    settings = {name: value for name, value in vars(options).items() if isinstance(value, int)}
    seconds = round(time.monotonic() - started, 1)
    return settings | {"classifiers": classifiers, "rows": results, "seconds": seconds}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.road", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="of each detector")
    parser.add_argument("--classifier-steps", type=int, default=1000, help="at the low resolution")
    parser.add_argument("--images", type=int, default=4096, help="with boxes, in training")
    parser.add_argument("--test-images", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("outputs/road"), help="folder")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="JSON", help="only print the table of these seeds"
    )
    parser.add_argument("--figure", type=Path, help="of the table, PNG")
    parser.add_argument("--page", type=Path, help="page whose table is replaced, docs/road.md")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one seed, or print the table of several."""
    options = parser().parse_args(argv)
    files = options.report
    if files is None:
        folder = options.output / f"seed-{options.seed}"
        result = run_road(options, folder)
        files = [options.output / f"seed-{options.seed}.json"]
        files[0].write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"\n{result['seconds']:.0f} s; {files[0]}; yolo-lightning mlflow ui shows the runs\n")
    seeds = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    print(table(seeds))
    if options.figure:
        save_figure_of(seeds, options.figure)
    if options.page:
        replace_table(options.page, table(seeds))


if __name__ == "__main__":
    main()
