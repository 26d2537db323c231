"""The commands of docs/from-darknet.md."""

import shlex

import pytest
import torch

from tests.helpers import miniatures
from tests.helpers.paths import REPO
from tests.helpers.trees import BACKBONE
from yolo_lightning.cli.main import main
from yolo_lightning.detector import DetectorModule
from yolo_lightning.export.darknet import export_model

PAGE = (REPO / "docs/from-darknet.md").read_text(encoding="utf-8")


def commands():
    steps = PAGE.partition("## Old and new names")[0]
    blocks = steps.split("```")[1::2]
    return [line for block in blocks for line in block.strip().splitlines()]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = DetectorModule(
        tree=["dog", "bicycle"], anchors_wh_cell=[(1, 1), (2, 2)], backbone=BACKBONE,
        head_channels=0, passthrough_channels=0, image_size=64, reorg="darknet",
    )  # fmt: skip
    with torch.no_grad():
        model.network.box_conv.weight.mul_(40)
    export_model(model, {}, tmp_path / "yolov2-voc", False)
    (tmp_path / "yolov2-voc.names").rename(tmp_path / "voc.names")
    (tmp_path / "voc.data").write_text("classes = 2\nnames = voc.names\n")
    miniatures.save(tmp_path / "dog.jpg")
    miniatures.save(tmp_path / "photos/cat.jpg")
    return tmp_path


def test_every_command_runs_and_writes_the_documented_files(files):
    av = pytest.importorskip("av")
    from yolo_lightning.inference.video_writer import VideoWriter

    # 92 seconds at one frame a second: a minute to skip, thirty to do
    with VideoWriter(files / "street.mp4", (48, 64), 1) as writer:
        for second in range(92):
            writer.write(miniatures.quarters(), float(second))
    ours = [line for line in commands() if line.startswith("yolo-lightning ")]
    assert len(ours) == 7
    for line in ours:
        assert main(shlex.split(line)[1:]) == 0, line
    assert (files / "one/dog.jpg").is_file()
    assert (files / "many/cat.jpg").is_file()
    assert (files / "many/detections.csv").is_file()
    for name, count in (
        ("cut/street.webm", 30),
        ("film/street.webm", 92),
        ("plain/street.mp4", 92),
    ):
        with av.open(str(files / name)) as container:
            assert sum(1 for _ in container.decode(video=0)) == count, name


def test_every_documented_option_exists(capsys):
    with pytest.raises(SystemExit):
        main(["detect", "--help"])
    said = capsys.readouterr().out
    table = PAGE.partition("## Old and new names")[2]
    rows = [row.split("|")[2] for row in table.splitlines() if row.count("|") == 3]
    options = {word for row in rows if "detect" in row or row.startswith(" `--") for word in
               row.replace("`", " ").split() if word.startswith("--")}  # fmt: skip
    assert len(options) > 8
    known = {word.strip("[],") for word in said.split()}
    assert options <= known, options - known
