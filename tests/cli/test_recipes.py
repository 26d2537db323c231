"""`yolo-lightning recipes`: list, show and copy the recipes of this package."""

import os
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import REPO
from yolo_lightning.cli import packaged
from yolo_lightning.cli.main import main

NAMES = sorted(path.stem for path in (REPO / "recipes").glob("*.yaml"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_list_has_a_line_for_each_recipe(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == [*NAMES, "cluster"]
    assert max(map(len, lines)) <= 130
    (quickstart,) = (line for line in lines if line.startswith("quickstart "))
    assert quickstart.endswith("boxes for half of the classes, image labels for all of them.")


def test_show_prints_a_recipe_as_it_is(capsys):
    assert main(["recipes", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == (REPO / "recipes/quickstart.yaml").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_the_trees_that_the_recipe_names(empty, name, capsys):
    assert main(["recipes", "copy", name, "my recipes"]) == 0
    copied = files_of(empty / "my recipes")
    assert copied == {file: (REPO / "recipes" / file).read_bytes() for file in copied}
    values = yaml.safe_load(copied[f"{name}.yaml"])
    tree = values.get("model", {"init_args": {}})["init_args"].get("tree")
    if isinstance(tree, str) and not tree.startswith("../datasets/"):
        assert tree in copied
    command = capsys.readouterr().out.splitlines()[-1]
    verb = "test" if name.startswith("test_") else "fit"
    assert command.startswith(f"yolo-lightning {verb} 'my recipes/{name}.yaml'")


def test_copies_are_those_of_a_checkout(empty, capsys):
    assert main(["recipes", "copy", "quickstart"]) == 0
    assert set(files_of(empty)) == {"recipes/quickstart.yaml", "recipes/trees/shapes.tsv"}
    assert main(["recipes", "copy", "cluster"]) == 0
    assert os.access("recipes/cluster/chain.sh", os.X_OK)
    assert main(["recipes", "copy", "all"]) == 0  # equal files may be there
    assert files_of(empty / "recipes") == files_of(REPO / "recipes")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["copy", "quikstart"], "no recipe 'quikstart' in this package; did you mean 'quickstart'"),
        (["show", "cluster"], "no recipe 'cluster' in this package; allowed: classify_imagenet"),
        (["copy", "quickstart", "mine.yaml"], "TO is 'mine.yaml'; allowed: a folder"),
        (["copy", "../quickstart"], "no recipe '../quickstart'"),
        (["copy", "quickstart", "changed"], "changed/trees/shapes.tsv exists already, with other"),
    ],
)
def test_nothing_is_written_for_a_wrong_name_or_over_other_files(empty, args, message, capsys):
    Path("changed/trees").mkdir(parents=True)
    Path("changed/trees/shapes.tsv").write_text("mine")
    before = files_of(empty)
    assert main(["recipes", *args]) == 2
    assert message in capsys.readouterr().err
    assert files_of(empty) == before


def test_a_missing_recipe_of_the_package_is_answered_with_the_copy(empty, capsys):
    assert main(["fit", "recipes/quickstart.yaml"]) == 2
    assert "`yolo-lightning recipes copy quickstart`" in capsys.readouterr().err
    assert main(["fit", "recipes/mine.yaml"]) == 2
    assert "`yolo-lightning init DATASET` writes one" in capsys.readouterr().err


def test_a_recipe_below_the_working_folder_has_a_short_path(monkeypatch):
    monkeypatch.chdir(REPO)
    assert str(packaged.recipe("quickstart")) == "recipes/quickstart.yaml"
    monkeypatch.chdir(REPO / "tests")
    assert packaged.recipe("quickstart") == REPO / "recipes/quickstart.yaml"
