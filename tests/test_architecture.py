"""The way of a batch from disk to the loss, traced and compared with docs/architecture.md."""

import re
import sys
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import pytest

from tests.helpers.paths import REPO
from tests.test_packaging import LAYERS
from yolo_lightning import DetectorModule
from yolo_lightning.callbacks import MultiScale
from yolo_lightning.datamodules import CombinedDataModule, DetectionAugmentation, VOCFolder

PAGE = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
LEAVES = {f"yolo_lightning/{name}.py" for name in ("errors", "boxes", "images", "batches")}
HANDS_ON = ["datamodules/loader.py", "datamodules/combined.py"]  # as it is, or copied to a GPU
MAX_FILES = 6


@cache
def project_file(path: str) -> str | None:
    """Return a file of this project relative to the repository, None for other files."""
    file = Path(path)
    name = file.resolve() if file.is_absolute() else Path("/")  # generated code has no file
    if not name.is_relative_to(REPO) or name.relative_to(REPO).parts[0] in (".venv", "tests"):
        return None
    return str(name.relative_to(REPO))


class BatchTrace:
    """Files of this project that run between the last call of `read` and the call of the loss."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.running = False
        self.losses = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        name = project_file(frame.f_code.co_filename)
        if name is None or event not in ("call", "return"):
            return
        if event == "call" and frame.f_code.co_name == "yolo9000_loss":
            self.running = False
            self.losses += 1
        elif event == "call" and frame.f_code.co_name == "read":
            self.running = True
            self.files.clear()
        if self.running and name not in self.files:
            self.files.append(name)


@pytest.fixture
def trace(tmp_path, write_voc):
    """The trace of one training step on a VOC folder, with augmentation."""
    for name in "ab":
        write_voc(tmp_path / "data", name, [("apple", 5, 5, 40, 30), ("banana", 20, 9, 60, 44)])
    data = CombinedDataModule(
        ["apple", "banana"],
        VOCFolder(str(tmp_path / "data")),
        detection_batch_size=2,
        image_size=64,
        detection_augmentation=DetectionAugmentation(),
        num_workers=0,
    )
    module = DetectorModule(["apple", "banana"], [(1.5, 1.5), (3, 3)], "small", 8, 4, image_size=64)
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        callbacks=[MultiScale([32], every_n_batches=1)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    found = BatchTrace()
    previous = sys.getprofile()
    sys.setprofile(found)
    try:
        trainer.fit(module, datamodule=data)
    finally:
        sys.setprofile(previous)
    assert trainer.global_step == 1
    assert found.losses == 1
    return found


def test_a_batch_passes_the_six_files_that_the_page_lists(trace):
    section = PAGE[PAGE.index("## Life of a batch") :].split("\n## ")[0]
    listed = re.findall(r"^\d\. `([\w/]+\.py)`", section, re.M)
    assert "`{}` and `{}` hand batches on".format(*HANDS_ON) in section
    assert [name for name in trace.files if name not in {*LEAVES, *HANDS_ON}] == listed
    assert len(listed) <= MAX_FILES


def test_only_the_leaves_of_the_page_are_not_counted(trace):
    assert all(f"`{leaf}`" in PAGE for leaf in LEAVES)
    assert set(trace.files) & LEAVES >= {"yolo_lightning/batches.py", "yolo_lightning/images.py"}


def test_the_page_has_the_layers_that_imports_are_checked_against():
    (block,) = re.findall(r"^```text\n(errors.*?)^```$", PAGE, re.S | re.M)
    rows = [set(line.split()) for line in block.splitlines()]
    assert rows == [layer for layer in LAYERS if "__main__" not in layer]


def test_the_page_names_every_package():
    packages = {folder.name for folder in (REPO / "yolo_lightning").iterdir() if folder.is_dir()}
    table = PAGE[: PAGE.index("Imports have one direction")]
    assert all(f"`{name}/`" in table for name in packages - {"__pycache__"})
