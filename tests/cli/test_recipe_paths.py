"""Paths in recipes are relative to the recipe's folder, others to the working folder."""

import inspect
import os
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.paths import REPO
from tests.helpers.recipes import TINY, quickstart_values
from yolo_lightning.cli.commands.chain.stages import StageCLI
from yolo_lightning.cli.data import recipe_data
from yolo_lightning.cli.main import main
from yolo_lightning.cli.recipe_paths import INPUT_KEYS, absolute, relative_to_recipe
from yolo_lightning.cli.recipe_policy import CLASSES, allow

# texts of classes for models and data that are names, not paths
NAMES = {
    "anchors_wh_cell", "backbone", "box_selection", "challenge", "geometry", "interpolation",
    "location", "objectness_rule", "reorg", "resize", "split",
}  # fmt: skip


def test_the_keys_of_paths_are_those_of_the_classes():
    modules = ("yolo_lightning", "yolo_lightning.datamodules", "yolo_lightning.losses")
    texts = set()
    for module in modules:
        for name in CLASSES[module]:
            parameters = inspect.signature(getattr(import_module(module), name)).parameters
            texts |= {k for k, p in parameters.items() if re.search(r"\bstr\b|Lit", str(p))}
    texts -= {"mapping", "classes"}  # of names alone
    assert texts - NAMES == INPUT_KEYS - {"ckpt_path", "seen_classes"}  # of the commands
    page = (REPO / "docs/commands.md").read_text(encoding="utf-8")
    assert all(f"`{key}`" in page for key in INPUT_KEYS)


def write(path: str, **source: Any) -> str:
    """Write a recipe that tests a detector on a source of images; return its path."""
    recipe = quickstart_values()
    recipe["model"]["init_args"]["tree"] = ["apple", "banana"]
    recipe["data"]["init_args"]["detection"] = source
    for name in ("classification", "validation", "test"):
        del recipe["data"]["init_args"][name]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("photos", "work/sets/photos"),
        ("../photos", "work/photos"),
        ("../../../photos", "../photos"),
        ("photos/${..split}", "work/sets/photos/${..split}"),
        ("${oc.env:SOME_DATA,photos}/train", "work/sets/photos/train"),
        ("${oc.env: SOME_DATA , photos }", "work/sets/photos"),
        ("${oc.env:SOME_DATA,/photos}/train", None),
        ("${oc.env:SOME_DATA,null}", None),
        ("${oc.env:SOME_DATA}/train", None),
        ("${oc.env:SET_DATA,photos}/train", None),
        ("${oc.env:SECRET,photos}/train", None),
        ("${..root}/train", None),
        ("/photos", None),
        ("~/photos", None),
        ("", None),
        ("s3://photos", None),
        ("file::photos", None),
    ],
)
def test_a_path_is_joined_with_the_folder_of_the_recipe(text, expected, monkeypatch):
    monkeypatch.setenv("SET_DATA", "elsewhere")
    recipe = {"data": {"init_args": {"detection": [{"init_args": {"root": text}}]}}}
    found = relative_to_recipe(recipe, "work/sets/r.yaml")
    root = found["data"]["init_args"]["detection"][0]["init_args"]["root"]
    assert root == (text if expected is None else expected)
    assert relative_to_recipe(recipe, "r.yaml") == recipe or expected is not None


def test_only_paths_are_joined():
    recipe = {
        "seed_everything": 0,
        "model": {"init_args": {"tree": ["file", "root"], "backbone": "darknet19"}},
        "data.init_args.test": {"names": "a,b", "root": "x", "mapping": {"root": "file"}},
        "report": {"seen_classes": "coco"},
        "trainer": {"default_root_dir": "outputs", "logger": {"file": "x"}},
        "ckpt_path": "a.ckpt",
    }
    joined = {
        "data.init_args.test": {"names": "a,b", "root": "w/x", "mapping": {"root": "file"}},
        "ckpt_path": "w/a.ckpt",
    }
    assert relative_to_recipe(recipe, "w/r.yaml") == recipe | joined
    seen = {"report": {"seen_classes": "mine.txt"}}
    assert relative_to_recipe(seen, "w/r.yaml") == {"report": {"seen_classes": "w/mine.txt"}}


def test_names_may_be_a_file_of_the_dataset_or_beside_the_recipe(tmp_path):
    recipe = {"data": {"root": "photos", "names": "classes.txt"}}
    found = relative_to_recipe(recipe, tmp_path / "r.yaml")["data"]
    assert found == {"root": str(tmp_path / "photos"), "names": "classes.txt"}
    (tmp_path / "classes.txt").write_text("apple\n")
    found = relative_to_recipe(recipe, tmp_path / "r.yaml")["data"]
    assert found["names"] == str(tmp_path / "classes.txt")


@pytest.fixture
def photos(tmp_path, monkeypatch, write_voc):
    """A working folder with photographs in work/sets/photos; recipes may read SOME_DATA."""
    work = tmp_path / "work"
    write_voc(work / "sets/photos", "a", [("apple", 5, 5, 40, 30)])
    monkeypatch.chdir(work)
    allow()
    return work


VOC = "yolo_lightning.datamodules.VOCFolder"


@pytest.mark.parametrize("folder", [".", "..", "elsewhere"])
def test_a_recipe_reads_the_same_files_from_every_folder(photos, folder, monkeypatch):
    recipe = photos / write("sets/r.yaml", class_path=VOC, init_args={"root": "photos"})
    (photos / "elsewhere").mkdir()
    monkeypatch.chdir(photos / folder)
    for path in (recipe, Path(recipe).relative_to(photos) if folder == "." else recipe):
        data = recipe_data([str(path)])
        data.setup("fit")
        assert len(data.detection) == 1


def test_options_and_variables_are_relative_to_the_working_folder(photos, monkeypatch):
    root = "${oc.env:SOME_DATA,missing}/photos"
    recipe = write("recipes/r.yaml", class_path=VOC, init_args={"root": root})
    monkeypatch.setenv("SOME_DATA", "sets")
    assert recipe_data([recipe]).detection.root == "sets/photos"
    monkeypatch.delenv("SOME_DATA")
    assert recipe_data([recipe]).detection.root == "recipes/missing/photos"
    option = "--data.detection.root=sets/photos"
    assert recipe_data([recipe, option]).detection.root == "sets/photos"


def test_each_of_several_recipes_has_its_own_folder(photos):
    write("a/r.yaml", class_path=VOC, init_args={"root": "photos"})
    Path("b").mkdir()
    Path("b/r.yaml").write_text("model: {init_args: {pretrained: w.ckpt}}\n")
    values = StageCLI(["a/r.yaml", "--config=b/r.yaml"]).resolved_config()
    assert values["data"]["init_args"]["detection"]["init_args"]["root"] == f"{photos}/a/photos"
    assert values["model"]["init_args"]["pretrained"] == f"{photos}/b/w.ckpt"


def test_quoted_names_that_look_like_numbers_stay_names(photos):
    names = '["1e3", "0x1", "null"]'
    text = f"class_path: yolo_lightning.DetectorModule\n  init_args: {{tree: {names}, " + (
        "anchors_wh_cell: [[1, 1]]}\ndata: {class_path: yolo_lightning.CombinedDataModule}\n"
    )
    Path("r.yaml").write_text(f"model:\n  {text}")
    assert StageCLI(["r.yaml"]).recipe.model.init_args.tree == ["1e3", "0x1", "null"]


def test_a_missing_file_is_answered_with_the_rule(photos, capsys):
    rule = "a path in a recipe is relative to the recipe's folder, others to the working folder"
    recipe = write("recipes/r.yaml", class_path=VOC, init_args={"root": "gone"})
    for command in (["fit", recipe], ["check-data", recipe], ["batch", recipe, "--step", "1"]):
        assert main(command) != 0
        output = capsys.readouterr()
        assert "'recipes/gone' not found (working folder: " in output.out + output.err
        assert (rule in output.err) == (command[0] != "check-data")  # which lists the faults
    assert main(["fit", "gone.yaml"]) == 2
    error = capsys.readouterr().err
    assert "recipe 'gone.yaml' not found" in error
    assert rule not in error


@pytest.mark.end_to_end
def test_a_run_resumes_and_is_tested_from_another_folder(tmp_path, monkeypatch, capsys):
    shutil.copytree(REPO / "recipes", tmp_path / "work/recipes")
    monkeypatch.chdir(tmp_path / "work")
    quiet = [*TINY, "--trainer.logger=false"]
    assert main(["fit", "recipes/quickstart.yaml", *quiet, "--trainer.max_steps=2"]) == 0
    (run,) = Path.cwd().glob("outputs/quickstart/*")
    tree = yaml.safe_load((run / "resolved.yaml").read_text())["model"]["init_args"]["tree"]
    assert tree == str(tmp_path / "work/recipes/trees/shapes.tsv")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    last = os.path.relpath(run / "checkpoints/last.ckpt")
    resume = ["fit", str(run / "resolved.yaml"), "--ckpt_path", last, "--trainer.max_steps=4"]
    assert main(resume) == 0
    record = run / "resumed-1-resolved.yaml"
    assert yaml.safe_load(record.read_text())["ckpt_path"] == str(run / "checkpoints/last.ckpt")
    monkeypatch.chdir("/")
    assert main(["test", str(record)]) == 0
    assert str(run / "test-001") in capsys.readouterr().out
    assert not (tmp_path / "elsewhere/outputs").exists()


def test_resolved_values_are_valid_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = {"model": {"tree": "a/t.tsv", "pretrained": None}, "data": {"root": "~/x"}}
    found = absolute(recipe)
    assert found == {**recipe, "model": {"tree": str(tmp_path / "a/t.tsv"), "pretrained": None}}
    assert absolute(found) == relative_to_recipe(found, "w/r.yaml") == found


@pytest.mark.parametrize("output", ["mine.yaml", "sets/mine.yaml", "new/folder/mine.yaml"])
def test_init_writes_paths_that_the_recipe_finds(photos, known_step_time, output, monkeypatch):
    assert main(["init", "sets/photos", "--output", output, "--val-fraction", "0"]) == 0
    recipe = (photos / output).resolve()
    values = yaml.safe_load(recipe.read_text())
    assert values["model"]["init_args"]["tree"] == "mine.tsv"
    root = values["data"]["init_args"]["detection"]["init_args"]["root"]
    assert not Path(root).is_absolute()
    assert (recipe.parent / root).resolve() == photos / "sets/photos"
    monkeypatch.chdir("/")
    data = recipe_data([str(recipe)])
    data.setup("fit")
    assert len(data.detection) == 1
