"""Every recipe trains on a miniature of its datasets."""

import math
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.commands import header_commands
from tests.helpers.paths import REPO
from yolo_lightning import ClassifierModule, DetectorModule
from yolo_lightning.cli import recipe
from yolo_lightning.cli.main import main
from yolo_lightning.cli.recipe import RecipeCLI
from yolo_lightning.darknet.released import LAYOUTS
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.tree.wordtree import WordTree

RECIPES = sorted(path.relative_to(REPO) for path in (REPO / "recipes").rglob("*.yaml"))
# a network of the same stride as Darknet-19, and finer features for the passthrough
BACKBONE = f"[{'[conv,4],[pool],' * 5}[conv,8]]"
SMALL = [
    f"--model.backbone={BACKBONE}", "--model.pretrained=null", "--data.num_workers=0",
    "--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.logger=false",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.num_sanity_val_steps=0",
]  # fmt: skip
BOXES, LABELS = ["--data.detection_batch_size=2"], ["--data.classification_batch_size=2"]
HEAD = ["--model.head_channels=8", "--model.passthrough_channels=4"]

# options, and how many batches of each kind: the 1st and the 6th of a joint training have boxes
TRAININGS: dict[str, tuple[list[str], dict[str, int]]] = {
    "detect_voc": ([*BOXES, *HEAD], {"DetectionBatch": 2}),
    "detect_coco": ([*BOXES, *HEAD], {"DetectionBatch": 2}),
    "classify_imagenet_224": (LABELS, {"ClassificationBatch": 2}),
    "classify_imagenet_448": (LABELS, {"ClassificationBatch": 2}),
    "classify_wordtree_1k": (LABELS, {"ClassificationBatch": 2}),
    "classify_wordtree_9k": (LABELS, {"ClassificationBatch": 2}),
    "joint_yolo9000": ([*BOXES, *LABELS], {"DetectionBatch": 2, "ClassificationBatch": 4}),
    "joint_voc_imagenet1k": ([*BOXES, *LABELS], {"DetectionBatch": 2, "ClassificationBatch": 4}),
}
TESTS = {"test_imagenet", "test_imagenet_det"}
ELSEWHERE = {"quickstart", "fruit", "pets_joint", "road"}  # trained by tests of their own


def name_of(path: Path) -> str:
    return path.stem


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The number of training batches of each kind, and of validations with a finite metric."""
    counts: Counter[str] = Counter()

    def keep_losses(module: Any, batch: Any, losses: dict[str, torch.Tensor]) -> None:
        assert all(value.isfinite() for value in losses.values())
        counts[type(batch).__name__] += 1

    monkeypatch.setattr("yolo_lightning.training_module.TrainingModule._keep_losses", keep_losses)
    for module in (DetectorModule, ClassifierModule):
        original = module._log_metrics

        def log_metrics(self: Any, stage: str, original: Any = original) -> None:
            original(self, stage)
            metrics = self.trainer.callback_metrics
            value = metrics.get(f"{stage}/AP50", metrics.get(f"{stage}/top1"))
            counts[stage] += value is not None and 0 <= value <= 1

        monkeypatch.setattr(module, "_log_metrics", log_metrics)
    return counts


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_every_recipe_has_a_training(path):
    assert path.stem in {*TRAININGS, *TESTS, *ELSEWHERE}


def read(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the options of a recipe's model, data and trainer, without resolving references."""
    values = yaml.safe_load((REPO / f"recipes/{name}.yaml").read_text(encoding="utf-8"))
    return values["model"]["init_args"], values["data"]["init_args"], values["trainer"]


@pytest.mark.parametrize(
    ("name", "images", "batch_size", "epochs"),
    [
        ("detect_voc", 16_551, 64, [60, 90, 160]),
        ("road", 16_551, 64, [60, 90, 160]),
        ("detect_coco", 118_287, 64, [60, 90, 160]),
        ("classify_imagenet_224", 1_281_167, 128, [160]),
        ("classify_imagenet_448", 1_281_167, 128, [10]),
        ("classify_wordtree_1k", 1_281_167, 128, [160]),
    ],
)
def test_the_epochs_are_those_of_the_paper(name, images, batch_size, epochs):
    model, data, trainer = read(name)
    kind = "detection" if len(epochs) > 1 else "classification"
    assert data[f"{kind}_batch_size"] == batch_size
    steps = [epoch * math.ceil(images / batch_size) for epoch in epochs]
    milestones = model["schedule"]["init_args"].get("milestones", [])
    assert [*milestones, trainer["max_steps"]] == steps
    assert (trainer["accumulate_grad_batches"], trainer["max_epochs"]) == (1, -1)


@pytest.mark.parametrize(
    ("name", "layout", "jitter", "colour"),
    [
        ("detect_voc", "yolov2-voc", 0.3, 1.5),
        ("detect_coco", "yolov2", 0.3, 1.5),
        ("joint_yolo9000", "yolo9000", 0.2, 1.33),
        ("joint_voc_imagenet1k", "yolo9000", 0.2, 1.33),
        ("road", None, 0.3, 1.5),
    ],
)
def test_a_detector_has_the_hyperparameters_of_its_cfg_file(name, layout, jitter, colour):
    model, data, trainer = read(name)
    sgd = {"learning_rate": 0.001, "momentum": 0.9, "weight_decay": 0.0005}
    assert {key: model[key] for key in sgd} == sgd
    schedule = model["schedule"]["init_args"]
    assert (schedule["burn_in_steps"], schedule["factors"]) == (1000, [0.1, 0.1])
    loss = {"coord_scale": 1, "obj_scale": 5, "noobj_scale": 1, "class_scale": 1, "ignore_iou": 0.6}
    assert {key: model["loss"][key] for key in loss} == loss
    assert data["detection_augmentation"]["init_args"] == {
        "geometry": "crop", "jitter": jitter, "flip": 0.5,
        "hue": 0.1, "saturation": colour, "exposure": colour,
    }  # fmt: skip
    if layout is None:  # the first row of the road has one box a cell and one size
        return
    region = LAYOUTS[layout]().region
    assert region is not None
    assert sum(model["anchors_wh_cell"], []) == list(region.anchors)
    (multi_scale,) = [one for one in trainer["callbacks"] if "MultiScale" in one["class_path"]]
    assert multi_scale["init_args"] == {
        "sizes": [320, 352, 384, 416, 448, 480, 512, 544, 576, 608],
        "every_n_batches": 10, "last_batches_at_largest": 200,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "steps", "milestones"),
    [
        ("joint_yolo9000", 500_200, [400_000, 450_000]),
        ("joint_voc_imagenet1k", 80_200, [40_000, 60_000]),
    ],
)
def test_a_joint_training_has_the_length_and_the_ratio_of_its_source(name, steps, milestones):
    model, data, trainer = read(name)
    assert trainer["max_steps"] == steps
    assert model["schedule"]["init_args"]["milestones"] == milestones
    assert data["classification_batches_per_detection_batch"] == 4
    assert (data["detection_batch_size"], data["classification_batch_size"]) == (64, 64)
    assert len(model["anchors_wh_cell"]) == 3


@pytest.mark.parametrize(
    ("name", "rate", "burn_in", "shorter_side", "image_size"),
    [
        ("classify_imagenet_224", 0.1, 1000, [0.5, 1.75], 224),  # 128 … 448 px for 256 px
        ("classify_imagenet_448", 0.001, 0, [1, 1.143], 448),
        ("classify_wordtree_1k", 0.1, 1000, [0.5, 1.75], 224),
        ("classify_wordtree_9k", 0.001, 0, [1, 1.143], 448),
    ],
)
def test_a_classifier_has_the_hyperparameters_of_its_cfg_file(
    name, rate, burn_in, shorter_side, image_size
):
    model, data, _ = read(name)
    sgd = {"learning_rate": rate, "momentum": 0.9, "weight_decay": 0.0005}
    assert {key: model[key] for key in sgd} == sgd
    assert model["schedule"]["init_args"] == {
        "burn_in_steps": burn_in, "power": 4, "total_steps": "${.....trainer.max_steps}",
    }  # fmt: skip
    assert data["image_size"] == image_size
    assert data["classification_augmentation"]["init_args"] == {
        "shorter_side": shorter_side, "aspect": 0.75, "degrees": 7, "flip": 0.5,
        "hue": 0.1, "saturation": 1.33, "exposure": 1.33,
    }  # fmt: skip


@pytest.mark.parametrize("name", TRAININGS)
def test_a_recipe_trains_on_a_miniature(paper, batches, name, capsys):
    options, expected = TRAININGS[name]
    steps = sum(expected.values())
    ends = [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    ends.append(f"--data.steps_per_epoch={steps}")
    assert main(["fit", "--config", f"recipes/{name}.yaml", *SMALL, *options, *ends]) == 0
    assert batches == {**expected, "val": 1}
    assert (paper / f"outputs/{name}").is_dir()
    left_out = "1 images of 1 labels that are not in the tree, left out: n02084732"
    assert (left_out in capsys.readouterr().out) == (
        name in ("classify_wordtree_9k", "joint_yolo9000")
    )


def overrides_of(name: str) -> list[list[str]]:
    """Return the options of `fit` in each command at the top of a recipe that has some."""
    commands = header_commands((REPO / f"recipes/{name}.yaml").read_text(encoding="utf-8"))
    words = [shlex.split(c) for c in commands if c.startswith(("yolo-lightning fit", "sbatch"))]
    options = [line[4 if line[0] == "yolo-lightning" else 3 :] for line in words]
    return [line for line in options if line]


@pytest.fixture
def build(paper, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that builds model, data and trainer of a recipe, without training."""
    monkeypatch.setattr(RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda name, *options: recipe.main(["fit", "--config", f"recipes/{name}.yaml", *options])


@pytest.mark.parametrize(
    ("name", "layout"), [("detect_voc", "yolov2-tiny-voc"), ("detect_coco", "yolov2-tiny")]
)
def test_the_tiny_variants_are_the_released_networks(build, name, layout):
    (options,) = [line for line in overrides_of(name) if "--model.backbone" in line]
    run, released = build(name, *options), LAYOUTS[layout]()
    assert run.model.network.body.layers == tuple(released.layers)
    assert released.region is not None
    anchors = torch.tensor(released.region.anchors).view(-1, 2)
    assert torch.equal(run.model.network.anchors_wh_cell, anchors)
    assert run.model.loss.rescore == released.region.rescore
    assert list(run.model.tree.names) == list(released.names) or name == "detect_coco"
    rates = [run.model.hparams.learning_rate * run.model.schedule(step) for step in (50, 10_000)]
    assert rates == pytest.approx([1e-4, 1e-3] if name == "detect_voc" else [1e-3 * 0.051**4, 1e-3])


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_the_overrides_at_the_top_of_a_recipe_build(build, name):
    large = 0
    for options in overrides_of(name):
        run = build(name, *options)
        large += max(run.datamodule.batch_sizes) >= 512
        schedule, steps = run.model.schedule, run.trainer.max_steps
        assert max(getattr(schedule, "milestones", [0])) < steps
        assert getattr(schedule, "total_steps", steps) == steps
    assert large == 1


@pytest.mark.parametrize("name", sorted(TESTS))
def test_a_recipe_of_test_data_alone_tests_a_checkpoint(paper, batches, name, capsys):
    torch.manual_seed(0)
    layers: list[Any] = [["conv", 4, 3], ["pool"], ["conv", 4, 3], ["pool"]]
    if name == "test_imagenet":
        tree = WordTree.from_source("recipes/trees/imagenet1k.wnids")
        assert tree.rows[0] == ("n02119789", "-", "kit fox")
        module: Any = ClassifierModule(tree=tree.rows, backbone=layers, image_size=32)
    else:
        module = DetectorModule(
            "datasets/trees/yolo9000.tsv", [(1, 1), (4, 4)], layers, 0, 0, image_size=32
        )
    torch.save(build_checkpoint(module.eval(), {}), "best.ckpt")
    fast = ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    config = f"recipes/{name}.yaml"
    assert main(["test", "--config", config, "--ckpt_path", "best.ckpt", *fast]) == 0
    assert batches == {"test": 1}
    if name == "test_imagenet_det":  # two of the four classes are shared with COCO
        output = capsys.readouterr().out
        assert "test/AP50_boxed" in output
        assert "test/AP50_unboxed" in output


@pytest.mark.parametrize("name", ["joint_yolo9000", "classify_wordtree_1k"])
def test_a_tree_that_was_not_built_is_named_with_the_command(workplace, name, capsys):
    assert main(["fit", "--config", f"recipes/{name}.yaml"]) == 2
    error = capsys.readouterr().err
    assert "tree file 'datasets/trees/" in error
    assert "yolo-lightning wordtree build" in error


@pytest.mark.parametrize(
    ("name", "variable", "message"),
    [
        ("joint_yolo9000", "IMAGENET22K", "image folder 'nowhere' not found"),
        ("joint_yolo9000", "COCO_DATA", "'nowhere/annotations/instances_train2017.json' not found"),
        ("detect_voc", "VOC_DATA", "VOC folder 'nowhere' not found"),
    ],
)
def test_a_missing_dataset_is_named_before_training(
    paper, monkeypatch, name, variable, message, capsys
):
    monkeypatch.setenv(variable, "nowhere")
    assert main(["fit", "--config", f"recipes/{name}.yaml", *SMALL, *TRAININGS[name][0]]) == 2
    assert message in capsys.readouterr().err


def test_the_tree_of_another_dataset_is_named_before_training(paper, capsys):
    options = [*SMALL, *LABELS, "--model.tree=recipes/trees/voc.names"]
    assert main(["fit", "--config", "recipes/classify_wordtree_9k.yaml", *options]) == 2
    assert "none of its 5 labels is in the tree" in capsys.readouterr().err
    assert main(["fit", "--config", "recipes/classify_wordtree_1k.yaml", *options]) == 2
    assert "label 'n02119789' is not in the tree" in capsys.readouterr().err
