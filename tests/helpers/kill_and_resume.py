"""A small joint training that can be killed, and waiting for its process."""

import os
import time
from pathlib import Path

EPOCHS, STEPS_PER_EPOCH = 4, 6
STEPS = EPOCHS * STEPS_PER_EPOCH

RECIPE = """
seed_everything: 0
model:
  class_path: yolo_lightning.DetectorModule
  init_args:
    tree: {tree}
    backbone: small
    anchors_wh_cell: [[1.5, 1.5], [3, 3]]
    head_channels: 8
    passthrough_channels: 4
    learning_rate: 0.01
data:
  class_path: yolo_lightning.CombinedDataModule
  init_args:
    tree: {tree}
    detection:
      class_path: yolo_lightning.datamodules.ShapesDetection
      init_args: {{length: 13, image_size: 64}}
    classification:
      class_path: yolo_lightning.datamodules.ShapesImageLabels
      init_args: {{length: 11, image_size: 64}}
    validation:
      class_path: yolo_lightning.datamodules.ShapesDetection
      init_args: {{length: 6, image_size: 64, seed: 5}}
    detection_augmentation: {{class_path: yolo_lightning.datamodules.DetectionAugmentation}}
    classification_augmentation:
      class_path: yolo_lightning.datamodules.ClassificationAugmentation
    detection_batch_size: 4
    classification_batch_size: 4
    image_size: 64
    steps_per_epoch: {steps_per_epoch}
    num_workers: 0
trainer:
  max_epochs: {epochs}
  accelerator: cpu
  devices: 1
  default_root_dir: {folder}/runs
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks:
    - class_path: yolo_lightning.callbacks.MultiScale
      init_args: {{sizes: [32, 64], every_n_batches: 2}}
    - class_path: yolo_lightning.callbacks.LastCheckpoint
      init_args: {{every_n_steps: 2}}
    - class_path: tests.helpers.diary.Diary
      init_args: {{folder: {folder}}}
"""


def write_recipe(folder: Path) -> Path:
    """Write a small joint recipe with all outputs in `folder`."""
    tree = Path(__file__).resolve().parents[2] / "recipes/trees/shapes.tsv"
    file = folder / "recipe.yaml"
    text = RECIPE.format(tree=tree, folder=folder, epochs=EPOCHS, steps_per_epoch=STEPS_PER_EPOCH)
    file.write_text(text, encoding="utf-8")
    return file


def arguments(folder: Path, workers: int) -> list[str]:
    """Return the command line of a training in `folder`."""
    return ["fit", "--config", str(folder / "recipe.yaml"), "--resume", "auto",
            "--allow-module", "tests.helpers.diary", f"--data.num_workers={workers}",
            f"--trainer.default_root_dir={folder}/runs"]  # fmt: skip


def wait_for_process(process: int, timeout_s: float) -> int | None:
    """Return the exit code of a process, None if it is still running after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        exited, status = os.waitpid(process, os.WNOHANG)
        if exited:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
