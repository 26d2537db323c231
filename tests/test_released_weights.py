"""The commands of docs/released-weights.md run on miniatures, with random weights."""

import re
import shlex
from pathlib import Path

import pytest

from tests.helpers.commands import commands_of
from tests.helpers.darknet import conv_layers
from tests.helpers.golden_weights import write_random_weights
from tests.helpers.paths import REPO
from yolo_lightning.cli.main import main
from yolo_lightning.darknet.released import LAYOUTS

PAGE = (REPO / "docs/released-weights.md").read_text(encoding="utf-8")
DATA = Path("/usr/share/darknet/data")
COMMANDS = [c for c in commands_of(PAGE) if re.search(r"--weights|--ckpt_path \w+\.ckpt", c)]
NETWORKS = ["voc", "coco", "darknet19", "darknet19_448", "9k"]


def commands_for(network: str) -> list[str]:
    """Return the import of a network, and its tests."""
    return [c for c in COMMANDS if re.search(rf" {network}\.ckpt\b", c)]


def test_the_page_imports_and_tests_every_network():
    for network in NETWORKS:
        imported, *tested = commands_for(network)
        assert "darknet import" in imported
        assert tested
        assert all(command.startswith("yolo-lightning test ") for command in tested)
    assert sum(len(commands_for(network)) for network in NETWORKS) == len(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_the_commands_of_the_page_run(paper, network, capsys):
    if not DATA.is_dir():
        pytest.skip("Debian's package darknet, which has the authors' tree, is not installed")
    for name in ("9k.tree", "9k.names", "imagenet.shortnames.list"):
        (paper / name).symlink_to(DATA / name)
    imported, *tested = commands_for(network)
    layout = shlex.split(imported)[shlex.split(imported).index("--layout") + 1]
    write_random_weights(f"{layout}.weights", conv_layers(LAYOUTS[layout]()))
    for command in (imported, *tested):
        fast = ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.logger=false"]
        options = fast if " test " in command else []
        assert main([*shlex.split(command)[1:], *options]) == 0, command
        output = capsys.readouterr().out
    compared = {"voc": ["VOC07_AP50"], "coco": ["AP50", "AP"], "9k": ["AP50", "AP50_unboxed"]}
    for metric in compared.get(network, ["top1", "top5"]):
        assert re.search(rf"\btest/{metric}\b", output), metric
