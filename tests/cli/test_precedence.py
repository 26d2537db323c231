"""Values of an evaluation: the command line, then the recipe, then the checkpoint."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

from tests.helpers.paths import REPO
from tests.helpers.recipes import QUICK, TINY, quickstart_values
from yolo_lightning import ClassifierModule, CombinedDataModule, DetectorModule, WordTree, load
from yolo_lightning.cli import recipe as cli
from yolo_lightning.cli.data import recipe_data
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.models.preparation import Resize

pytestmark = pytest.mark.end_to_end

TREE = WordTree.from_file(str(REPO / "recipes/trees/shapes.tsv")).rows
ANCHORS = [(1.6, 1.7), (2.4, 2.5)]
TEST = ["test", "--config", "t.yaml", "--ckpt_path", "m.ckpt"]


def quiet_trainer() -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=1,
    )  # fmt: skip


def save(module: DetectorModule | ClassifierModule, name: str = "m.ckpt") -> None:
    torch.save(build_checkpoint(module, {}), name)


def write_recipe(
    data: dict[str, Any], model: dict[str, Any], source: str = "ShapesDetection"
) -> None:
    """Write a recipe of four test images; without a model if it has no values."""
    images = {
        "class_path": f"yolo_lightning.datamodules.{source}",
        "init_args": {"length": 4, "image_size": 96},
    }
    recipe: dict[str, Any] = {
        "data": {
            "class_path": "yolo_lightning.CombinedDataModule",
            "init_args": {"test": images, "num_workers": 0, **data},
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    if model:
        recipe["model"] = {"class_path": "yolo_lightning.DetectorModule", "init_args": model}
    Path("t.yaml").write_text(yaml.safe_dump(recipe))


@pytest.fixture
def detector(workplace: Path) -> DetectorModule:
    """A detector of 96 px that stretches images, saved as m.ckpt."""
    torch.manual_seed(0)
    module = DetectorModule(
        TREE, ANCHORS, "small", 8, image_size=96, resize="stretch", iou_threshold=0.3
    )
    save(module)
    return module


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that parses a command line and builds its objects, without running."""
    monkeypatch.setattr(cli.RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda *args: cli.main([*TEST, *args])


@pytest.mark.parametrize(
    ("data", "model", "options", "expected"),
    [
        ({}, {}, [], (96, "stretch")),
        ({"image_size": 128}, {}, [], (128, "stretch")),
        ({"image_size": 416, "resize": "letterbox"}, {}, [], (416, "letterbox")),  # the defaults
        ({}, {"image_size": 64, "resize": "letterbox"}, [], (64, "letterbox")),
        (
            {"image_size": 128, "tree": "${...model.init_args.tree}"},
            {"image_size": 64},
            [],
            (128, "stretch"),
        ),
        ({"image_size": 128}, {}, ["--data.image_size=160"], (160, "stretch")),
        ({}, {"image_size": 64}, ["--data.image_size=160"], (160, "stretch")),
        ({}, {"image_size": 64}, ["--model.image_size=160"], (160, "stretch")),
        ({}, {}, ["--model.image_size=160", "--data.resize=letterbox"], (160, "letterbox")),
    ],
)
def test_size_and_resize_of_an_evaluation(detector, build, data, model, options, expected):
    write_recipe(data, model)
    run = build(*options)
    assert (run.datamodule.image_size, run.datamodule.resize) == expected
    assert run.datamodule.tree.rows == run.model.tree.rows == TREE
    assert run.model.hparams["anchors_wh_cell"] == [list(pair) for pair in ANCHORS]
    assert run.model.hparams["head_channels"] == 8
    assert run.model.iou_threshold == 0.3
    resolved = run.resolved_config()["data"]["init_args"]
    assert (resolved["image_size"], resolved["resize"]) == expected


def test_a_threshold_of_a_command_line_needs_no_model_in_the_recipe(detector, build):
    write_recipe({}, {})
    assert build("--model.iou_threshold=0.6").model.iou_threshold == 0.6


def read_metrics(report: str) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads(Path(report, "metrics.json").read_text())
    return metrics


def test_test_data_alone_gives_the_figures_of_a_whole_recipe(detector, capsys):
    write_recipe({}, {})
    assert main([*TEST, "--report.folder=short"]) == 0
    output = capsys.readouterr().out
    line = "images: image_size 96 (the checkpoint's), resize stretch (the checkpoint's), "
    assert line in output
    whole = {"tree": [list(row) for row in TREE], "anchors_wh_cell": [list(p) for p in ANCHORS]}
    whole |= {"backbone": "small", "head_channels": 8, "iou_threshold": 0.3}
    write_recipe({"tree": whole["tree"], "image_size": 96, "resize": "stretch"}, whole)
    assert main([*TEST, "--report.folder=whole"]) == 0
    assert main([*TEST, "--report.folder=other", "--data.image_size=416"]) == 0
    line = "images: image_size 416 (not 96), resize stretch (the checkpoint's), "
    assert line in capsys.readouterr().out
    short, full, other = (read_metrics(name) for name in ("short", "whole", "other"))
    assert short["image_size"] == 96
    assert short["metrics"] == full["metrics"]
    assert short["metrics"]["AP"] != other["metrics"]["AP"]


def test_a_classifier_is_tested_at_the_size_of_its_checkpoint(workplace, capsys):
    save(ClassifierModule(TREE, "small", image_size=64))
    write_recipe({}, {}, "ShapesImageLabels")
    assert main(TEST) == 0
    assert (
        "images: image_size 64 (the checkpoint's), interpolation area (the checkpoint's)\n"
        in capsys.readouterr().out
    )
    assert main([*TEST, "--data.image_size=96"]) == 0
    assert (
        "images: image_size 96 (not 64), interpolation area (the checkpoint's)\n"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.tree=[a]", "model.tree differs from the checkpoint's: 1 entries in the recipe"),
        ("--model.anchors_wh_cell=[[1,2]]", "model.anchors_wh_cell differs from the checkpoint's"),
        (
            "--model.batch_norm=false",
            "model.batch_norm differs from the checkpoint's: False in",
        ),
        ("--model.location=offset", "model.location differs from the checkpoint's: offset in the"),
        ("--model.backbone=tiny_darknet", "the network's list of layers differs from the check"),
        ("--model.head_channels=16", "the network's list of layers differs from the checkpoint's"),
        ("--data.image_size=100", "data.image_size is 100; allowed: multiples of 32 up to 2048"),
    ],
)
def test_what_cannot_differ_from_the_checkpoint_is_refused(detector, capsys, option, message):
    write_recipe({}, {})
    assert main([*TEST, option]) == 2
    assert message in capsys.readouterr().err


def test_an_input_that_is_not_square_needs_a_size_of_the_data(workplace, capsys):
    save(DetectorModule(TREE, ANCHORS, "small", 8, image_size=[64, 96]))
    write_recipe({}, {})
    assert main(TEST) == 2
    message = "the model's input is 96 x 64 px, but that of the data is square: set data.image_size"
    assert message in capsys.readouterr().err
    assert main([*TEST, "--data.image_size=96"]) == 0


def test_the_checkpoint_that_is_found_fills_a_recipe_of_test_data(detector, workplace, capsys):
    write_recipe({}, {})
    folder = workplace / "runs/one/checkpoints"
    folder.mkdir(parents=True)
    Path("m.ckpt").rename(folder / "best.ckpt")
    assert main([*TEST[:3], "--trainer.default_root_dir=runs"]) == 0
    output = capsys.readouterr().out
    assert "checkpoint: runs/one/checkpoints/best.ckpt" in output
    assert "images: image_size 96 (the checkpoint's)" in output


def test_the_printed_values_are_those_of_the_checkpoint(detector, capsys):
    write_recipe({}, {})
    with pytest.raises(SystemExit):
        main([*TEST, "--print_config"])
    values = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert list(map(tuple, values["tree"])) == TREE
    assert (values["head_channels"], values["iou_threshold"]) == (8, 0.3)


def test_speed_and_explain_take_a_recipe_of_test_data(detector, capsys):
    write_recipe({}, {})
    argv = ["speed", "m.ckpt", "--recipe", "t.yaml", "--image-sizes", "64", "--runs", "1"]
    assert main([*argv, "--batch-size", "1", "--output", "speed"]) == 0
    argv = ["explain", "t.yaml", "--checkpoint", "m.ckpt", "--source", "test", "--image", "0"]
    assert main(argv) == 0
    assert "shapes 0, 96 x 96 px" in capsys.readouterr().out


def test_training_needs_training_data(workplace, capsys):
    parts = "detection", "classification", "test"
    options = [f"--data.{part}=null" for part in parts]
    assert main(["fit", *QUICK, *options]) == 2
    message = "data.detection and data.classification: training needs one of them"
    assert message in capsys.readouterr().err
    assert not list(Path("outputs/quickstart").glob("*"))  # no run folder is left


def test_training_uses_the_size_of_the_model_if_the_data_has_none(workplace):
    recipe = quickstart_values()
    for name in ("tree", "image_size"):
        recipe["data"]["init_args"].pop(name, None)
    recipe["model"]["init_args"] |= {"image_size": 128, "resize": "stretch"}
    recipe["trainer"]["callbacks"] = []
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    fit = ["fit", "--config", "r.yaml", *TINY, "--trainer.max_steps=1", "--trainer.logger=false"]
    assert main([*fit, "--trainer.default_root_dir=first"]) == 0
    (last,) = workplace.glob("first/*/checkpoints/last.ckpt")
    model = load(last)
    assert (model.hparams["image_size"], model.hparams["resize"]) == (128, "stretch")
    resolved = yaml.safe_load((last.parent.parent / "resolved.yaml").read_text())
    values = resolved["data"]["init_args"]
    assert (values["image_size"], values["resize"]) == (128, "stretch")
    # the commands that read the training data, without a checkpoint
    data = recipe_data(["r.yaml"])
    assert (data.image_size, data.resize) == (128, "stretch")
    assert data.tree.rows == TREE
    # what the data says is what the model is trained for, and a resumed training keeps it
    other = ["--data.image_size=64", "--trainer.default_root_dir=second"]
    assert main([*fit, *other]) == 0
    (last,) = workplace.glob("second/*/checkpoints/last.ckpt")
    assert load(last).hparams["image_size"] == 64
    del recipe["model"]["init_args"]["image_size"]
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    assert main([*fit, "--trainer.max_steps=2", "--ckpt_path", str(last)]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 2
    assert load(last).hparams["image_size"] == 64


def test_in_python_data_takes_missing_values_from_each_model(tmp_path):
    data = CombinedDataModule(test=ShapesDetection(4), num_workers=0)
    sizes = []
    choices: list[tuple[int, Resize]] = [(64, "stretch"), (96, "letterbox")]
    for size, resize in choices:
        model = DetectorModule(TREE, ANCHORS, "small", 8, image_size=size, resize=resize)
        quiet_trainer().test(model, data, verbose=False)
        assert (data.image_size, data.resize) == (size, resize)
        assert data.tree is model.tree
        sizes.append(next(iter(data.test_dataloader())).images.shape[-1])
    assert sizes == [64, 96]
    labels = CombinedDataModule(test=ShapesImageLabels(4), num_workers=0)
    quiet_trainer().test(ClassifierModule(TREE, "small"), labels, verbose=False)
    assert labels.image_size == 224


def test_an_evaluation_leaves_the_model_as_it_was(tmp_path):
    model = DetectorModule(TREE, ANCHORS, "small", 8, image_size=64)
    data = CombinedDataModule(
        test=ShapesDetection(4), num_workers=0, image_size=96, resize="stretch"
    )
    used = []
    model.network.register_forward_hook(lambda *_: used.append(model.hparams["resize"]))
    quiet_trainer().test(model, data, verbose=False)
    assert used == ["stretch"]
    assert (model.hparams["image_size"], model.hparams["resize"]) == (64, "letterbox")


def test_in_python_training_needs_training_data_and_data_needs_a_tree():
    model = DetectorModule(TREE, ANCHORS, "small", 8)
    data = CombinedDataModule(test=ShapesDetection(4), num_workers=0)
    with pytest.raises(InputError, match=r"data\.detection and data\.classification: training"):
        quiet_trainer().fit(model, data)
    with pytest.raises(InputError, match="data.tree is not set, and there is no model"):
        CombinedDataModule(test=ShapesDetection(4)).setup("test")
