"""What the pages show in Python runs as it stands."""

import re

import torch

from tests.helpers import miniatures
from tests.helpers.paths import REPO
from tests.helpers.trees import BACKBONE, TREE
from yolo_lightning.detector import DetectorModule
from yolo_lightning.export.darknet import checkpoint_of


def python_blocks(page):
    text = (REPO / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_python_door_of_the_pages_opens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    model = DetectorModule(
        tree=TREE, anchors_wh_cell=[(1, 1), (2, 2)], backbone=BACKBONE, head_channels=0,
        passthrough_channels=0, image_size=96,
    )  # fmt: skip
    with torch.no_grad():
        bias = model.network.box_conv.bias
        assert bias is not None
        bias[4::5] = 4.0  # sure that something is there
    torch.save(checkpoint_of(model.eval(), {}), "best.ckpt")
    miniatures.save(tmp_path / "dog.jpg")
    blocks = [
        b for p in ("README.md", "docs/prediction.md") for b in python_blocks(p) if "load" in b
    ]
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "page", "exec"), {})
        said = capsys.readouterr().out
        assert any(name in said for _, _, name in TREE)
