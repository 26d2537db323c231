"""Kill a training repeatedly, and compare its steps with those of an uninterrupted training.

    python tests/helpers/kill_and_resume.py --kills 30 --workers 0 1 2

Everything is imported once, and each start is a fork, so a kill takes a second instead of ten.
Kills are at the end of each epoch, then at random times. Exits with 1 if a step differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.diary import entries, mismatches

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


def start(folder: Path, workers: int) -> int:
    """Fork a training in a new process group; return its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from yolo_lightning.cli.main import main

        code = main(arguments(folder, workers))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


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


def kill_at_end_of_epoch(epoch: int, process: int, folder: Path) -> None:
    """Kill a training after the last step of an epoch."""
    last = (epoch + 1) * STEPS_PER_EPOCH - 1
    while (code := wait_for_process(process, 0.02)) is None:
        if any(entry[0] == last for entry in entries(folder)):
            os.killpg(process, signal.SIGKILL)
            wait_for_process(process, 10)
            return
    assert code == 0, f"exit code {code}; see {folder / 'log.txt'}"


def kill_many(folder: Path, workers: int, kills: int, seconds: float, seed: int) -> int:
    """Kill a training after each epoch, then at random times; return the number of kills."""
    rng, kills_done = random.Random(seed), 0
    for epoch in range(min(EPOCHS - 1, kills)):
        kill_at_end_of_epoch(epoch, start(folder, workers), folder)
        kills_done += 1
    while kills_done < kills:
        process = start(folder, workers)
        code = wait_for_process(process, rng.uniform(0.05, seconds))
        if code is None:
            os.killpg(process, signal.SIGKILL)
            wait_for_process(process, 10)
            kills_done += 1
        else:  # the training is complete, another one is needed
            assert code == 0, f"exit code {code}; see {folder / 'log.txt'}"
            break
    code = wait_for_process(start(folder, workers), 300)
    assert code == 0, f"exit code {code}; see {folder / 'log.txt'}"
    return kills_done


def main() -> int:
    """Run the trainings and compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="kills for each number of workers")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import torch

    import_module("yolo_lightning.cli.recipe")
    torch.set_num_threads(1)
    failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        uninterrupted = Path(temporary) / "whole"
        uninterrupted.mkdir()
        write_recipe(uninterrupted)
        started = time.monotonic()
        code = wait_for_process(start(uninterrupted, 0), 300)
        assert code == 0, (uninterrupted / "log.txt").read_text()
        seconds = time.monotonic() - started
        expected = entries(uninterrupted)
        assert [entry[0] for entry in expected] == list(range(STEPS)), expected
        for workers in options.workers:
            total, number = 0, 0
            mismatched: list[str] = []
            while total < options.kills:
                folder = Path(temporary) / f"killed-{workers}-{number}"
                folder.mkdir()
                write_recipe(folder)
                seed = options.seed + 1000 * workers + number
                total += kill_many(folder, workers, options.kills - total, 0.7 * seconds, seed)
                mismatched += mismatches(expected, entries(folder), STEPS)
                number += 1
            count = len(mismatched)
            failures += count
            print(f"workers {workers}: {total} kills, {number} trainings, {count} mismatches")
            for line in mismatched[:5]:
                print(f"  {line}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
