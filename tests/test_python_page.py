"""The code of docs/python.md, as it is, on a small folder with fewer steps."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import fences
from tests.helpers.images import write_image
from tests.helpers.paths import REPO

BLOCKS = fences((REPO / "docs/python.md").read_text(encoding="utf-8"), "python")
FEWER = {
    "max_minutes=15": "max_minutes=0.01, image_size=96, overrides=quick",
    "overrides={": "overrides={**quick, ",
    "fit(recipe, ": "fit(recipe, overrides=quick, ",
    '"trainer.max_steps": 2000, ': "",
    "max_steps=1000": 'max_steps=2, accelerator="cpu", logger=False',
    "image_size=224": "image_size=96",
}
QUICK = {
    "trainer.max_steps": 2, "trainer.val_check_interval": 1, "trainer.accelerator": "cpu",
    "trainer.logger": False, "data.num_workers": 0, "data.detection_batch_size": 2,
}  # fmt: skip


@pytest.fixture
def kangaroos(workplace, write_voc, known_step_time):
    """The folder and the photograph that the page names, in the working folder."""
    for name in "abcdef":
        boxes = [("kangaroo", 5, 5, 30 + ord(name) % 8, 30), ("kangaroo", 20, 9, 60, 44)]
        write_voc(workplace / "kangaroo", name, boxes)
    write_image(workplace / "photo.jpg")
    return workplace


@pytest.mark.end_to_end
def test_the_code_of_the_page_runs(kangaroos, capsys):
    scope: dict[str, Any] = {"quick": QUICK}
    replaced = set()
    for block in BLOCKS:
        for text, other in FEWER.items():
            replaced |= {text} if text in block else set()
            block = block.replace(text, other)
        if "import supervision" not in block:
            exec(compile(block, "docs/python.md", "exec"), scope)
    assert replaced == set(FEWER)
    run = scope["run"]
    assert run.recipe == Path("changed.yaml")
    assert len(list(Path("outputs/kangaroo").iterdir())) == 3  # one of four calls resumes
    printed = capsys.readouterr().out
    assert "resuming: outputs/kangaroo/" in printed
    assert "torch.Size([2, 3, 96, 96]) torch.Size([2, " in printed
    assert scope["results"] == scope["found"].to_coco(1)  # the only class is node 0
    assert scope["trainer"].global_step == 2


def test_the_page_lists_what_a_run_holds():
    page = (REPO / "docs/python.md").read_text(encoding="utf-8")
    from yolo_lightning import Run

    members = {name for name in vars(Run) if not name.startswith("_")} | set(Run.__annotations__)
    assert set(re.findall(r"^\| `run\.(\w+)`", page, re.M)) == members


def test_supervision_takes_the_arrays_in_the_line_of_the_page():
    pytest.importorskip("supervision")
    from yolo_lightning.detections import Detection, DetectionList

    (block,) = (block for block in BLOCKS if "import supervision" in block)
    for found in (DetectionList([Detection((1, 2, 5, 8), "cat", 0.5, 3, "n1")]), DetectionList()):
        scope: dict[str, Any] = {"found": found}
        exec(compile(block, "docs/python.md", "exec"), scope)
        detections = scope["detections"]
        assert len(detections) == len(found)
        assert detections.xyxy.tolist() == [[1, 2, 5, 8]][: len(found)]
        assert detections.class_id.tolist() == [3][: len(found)]
        assert detections.confidence.tolist() == [0.5][: len(found)]
        assert detections["class_name"].tolist() == ["cat"][: len(found)]
