"""Train jointly and on the same boxes alone, and compare."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from yolo_lightning.callbacks import LastCheckpoint
from yolo_lightning.cli import recipe as cli
from yolo_lightning.cli.launch import command
from yolo_lightning.datamodules import CombinedDataModule
from yolo_lightning.datamodules.source import DetectionSource
from yolo_lightning.detector import DetectorModule
from yolo_lightning.images import Image, fit
from yolo_lightning.tracking.logger import run_loggers
from yolo_lightning.visualization.drawing import draw_boxes, make_grid, save_image

BOXED_COLOUR, UNBOXED_COLOUR, INNER_COLOUR = (64, 160, 255), (255, 140, 0), (200, 200, 200)
PICTURES = 12


@dataclass
class Outcome:
    """Result of one training.

    Attributes:
        boxed_ap50, unboxed_ap50: means over the classes with and without boxes, 0…1.
        seconds: training time including validation.
        detection_steps: number of batches with boxes.
        per_class: AP50 by class name, 0…1.
        checkpoint: path of the tested checkpoint.
    """

    boxed_ap50: float
    unboxed_ap50: float
    seconds: float
    detection_steps: int
    per_class: dict[str, float]
    checkpoint: str


def train_and_test(args: Sequence[str], folder: Path) -> tuple[Outcome, cli.RecipeCLI]:
    """Run `fit` with these options in `folder`, and test its last checkpoint."""
    started = time.monotonic()
    run = cli.main(["fit", *args, f"--trainer.default_root_dir={folder}"])
    seconds = time.monotonic() - started
    model, data = _model_and_data(run)
    # the last checkpoint, not the best: selecting by a metric would bias the result
    checkpoint = str(LastCheckpoint.path(run.trainer))
    logger = run.trainer.logger
    tester = pl.Trainer(
        accelerator="auto",
        devices=1,
        logger=logger,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run_folder, evaluated_step = Path(run.run_folder or folder), run.trainer.global_step - 1
    for run_logger in run_loggers(run.trainer):
        run_logger.configure_run(run_folder, "", evaluated_step=evaluated_step)
    metrics = tester.test(model, data, ckpt_path=checkpoint, weights_only=True, verbose=False)[0]
    names = {key: name for key, _, name in model.tree.rows}
    outcome = Outcome(
        metrics["test/AP50_boxed"],
        metrics["test/AP50_unboxed"],
        round(seconds, 1),
        data.order.batches_before(run.trainer.fit_loop.total_batch_idx + 1)[0],
        {names[key]: values["AP50"] for key, values in model.evaluation.per_class.items()},
        checkpoint,
    )
    return outcome, run


def _model_and_data(run: cli.RecipeCLI) -> tuple[DetectorModule, CombinedDataModule]:
    assert isinstance(run.model, DetectorModule)
    assert isinstance(run.datamodule, CombinedDataModule)
    return run.model, run.datamodule


@torch.no_grad()
def draw_predictions(model: DetectorModule, source: DetectionSource, image_size: int) -> Image:
    """Draw predicted boxes on test images; labels are inner nodes where the model is unsure."""
    model.eval()
    leaves = set(model.tree.leaves.tolist())
    drawn = []
    for index in range(min(PICTURES, len(source))):
        image = source.read(index).image
        square = torch.from_numpy(fit(image, (image_size, image_size))[0]).permute(2, 0, 1)[None]
        size = torch.tensor([image.shape[:2]])
        (detections,) = model.detect_most_specific(
            square.to(model.device), size, score_threshold=0.3
        )
        labels = detections.labels.tolist()
        colours = [
            INNER_COLOUR if k not in leaves else BOXED_COLOUR if model.boxed[k] else UNBOXED_COLOUR
            for k in labels
        ]
        captions = [
            f"{model.tree.names[k]} {score:.2f}"
            for k, score in zip(labels, detections.scores.tolist(), strict=True)
        ]
        boxes = detections.boxes_xyxy_orig_px.cpu().numpy()
        drawn.append(draw_boxes(image, boxes, captions, colours, scale=max(1, 320 // image_size)))
    legend = "blue: class had boxes    orange: never had a box    grey: stopped at an inner node"
    return make_grid(drawn, 4, legend)


def table(joint: Outcome, alone: Outcome, unboxed: Sequence[str]) -> str:
    """Return the comparison as a text table."""
    lines = [
        f"{'AP50 on the test images':<34}{'joint':>8}{'boxes only':>12}",
        f"{'classes that had boxes':<34}{joint.boxed_ap50:>8.3f}{alone.boxed_ap50:>12.3f}",
        f"{'classes without boxes':<34}{joint.unboxed_ap50:>8.3f}{alone.unboxed_ap50:>12.3f}",
        "",
    ]
    for name in sorted(joint.per_class, key=lambda name: (name in unboxed, name)):
        label = f"  {name}{' *' if name in unboxed else ''}"
        lines.append(f"{label:<34}{joint.per_class[name]:>8.3f}{alone.per_class[name]:>12.3f}")
    lines += [
        "  * image labels only",
        "",
        f"{'detection batches':<34}{joint.detection_steps:>8}{alone.detection_steps:>12}",
        f"{'training, seconds':<34}{joint.seconds:>8.0f}{alone.seconds:>12.0f}",
    ]
    return "\n".join(lines)


def new_folder(output: Path) -> Path:
    """Return the first of run-001, run-002, … that does not exist."""
    number = 1
    while (output / f"run-{number:03}").exists():
        number += 1
    return output / f"run-{number:03}"


def compare(recipe: str, overrides: Sequence[str], output: Path) -> None:
    """Run both trainings, and print the comparison and the paths of its files."""
    started = time.monotonic()
    folder = new_folder(output)
    args = ["--config", recipe, *overrides]
    print(f"joint training: yolo-lightning fit {' '.join(args)}", flush=True)
    joint, run = train_and_test(args, folder / "joint")
    model, data = _model_and_data(run)
    assert isinstance(data.test, DetectionSource), "`test` rejects other recipes"
    save_image(folder / "predictions.png", draw_predictions(model, data.test, data.image_size))
    steps = joint.detection_steps
    alone_args = [
        *args,
        "--data.classification_batches_per_detection_batch=0",
        f"--trainer.max_steps={steps}",
        f"--trainer.val_check_interval={max(1, steps // 4)}",
    ]
    print(f"boxes alone: yolo-lightning fit {' '.join(alone_args)}", flush=True)
    alone, _ = train_and_test(alone_args, folder / "detection_only")
    seconds = round(time.monotonic() - started, 1)
    summary = {
        "joint": vars(joint),
        "detection_only": vars(alone),
        "seconds": seconds,
        "seed": int(run.config.fit.seed_everything),
    }
    _write_summary(output, folder, summary)
    unboxed = [model.tree.names[k] for k in model.tree.leaves.tolist() if not model.boxed[k]]
    print("\n" + table(joint, alone, unboxed))
    print(f"\n{seconds:.0f} s in total. All files are in {folder}; copies of the newest run:")
    print(f"  pictures   {output / 'predictions.png'}")
    print(f"  figures    {output / 'summary.json'}")
    if run_loggers(run.trainer):
        print(f"  dashboard  {command(['mlflow', 'ui'])}")


def _write_summary(output: Path, folder: Path, summary: dict[str, Any]) -> None:
    """Save the figures, and copy the files of this run to `output`."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    for name in ("summary.json", "predictions.png"):
        shutil.copyfile(folder / name, output / name)
