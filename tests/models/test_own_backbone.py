"""A module as the backbone: in recipes by its class path, in Python, and in checkpoints."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.own_backbone import NoStride, PatchBackbone
from tests.helpers.training import TREE, make_datamodule, train
from yolo_lightning import ClassifierModule, DetectorModule, load
from yolo_lightning.checkpoints.pretrained import load_pretrained
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint, export_model
from yolo_lightning.inference.timing import billion_operations
from yolo_lightning.models.layers import Conv
from yolo_lightning.models.networks import YOLOv2
from yolo_lightning.serving.mlflow_model import save_model

CLASS_PATH = "tests.helpers.own_backbone.PatchBackbone"
ALLOW = ["--allow-module", "tests.helpers"]
RECIPE = f"""
model:
  class_path: yolo_lightning.DetectorModule
  init_args:
    tree: recipes/trees/shapes.tsv
    anchors_wh_cell: [[1.5, 1.5], [3, 3]]
    backbone:
      class_path: {CLASS_PATH}
      init_args: {{width: 6}}
    head_channels: 4
    passthrough_channels: 0
    image_size: 64
    backbone_lr_factor: 0.5
data:
  class_path: yolo_lightning.CombinedDataModule
  init_args:
    tree: recipes/trees/shapes.tsv
    detection: &images
      class_path: yolo_lightning.datamodules.ShapesDetection
      init_args: {{length: 8, image_size: 64, classes: [ring, circle]}}
    validation: *images
    test: *images
    detection_batch_size: 2
    image_size: 64
    num_workers: 0
trainer:
  max_steps: 2
  accelerator: cpu
  num_sanity_val_steps: 0
  enable_progress_bar: false
  default_root_dir: runs
  callbacks:
    - class_path: yolo_lightning.callbacks.LastCheckpoint
"""


def detector(backbone: Any = None, **options: Any) -> DetectorModule:
    module = PatchBackbone() if backbone is None else backbone
    options = {"head_channels": 4, "passthrough_channels": 0, "image_size": 64, **options}
    return DetectorModule(TREE, [(1.0, 1.0)], module, **options)


@pytest.fixture
def saved(workplace: Path) -> tuple[DetectorModule, Path]:
    """A detector with random weights, and its checkpoint."""
    module = detector(PatchBackbone(6))
    torch.save(build_checkpoint(module, {}), "m.ckpt")
    return module.eval(), workplace / "m.ckpt"


def test_recipe_names_the_class_and_trains_resumes_and_tests(workplace, capsys):
    Path("r.yaml").write_text(RECIPE)
    run = ["--config", "r.yaml", *ALLOW]
    assert main(["fit", *run]) == 0, capsys.readouterr()
    (last,) = workplace.glob("runs/*/checkpoints/last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["hyper_parameters"]["backbone"] == {
        "class_path": CLASS_PATH, "init_args": {"width": 6},
    }  # fmt: skip
    assert checkpoint["global_step"] == 2
    assert main(["fit", *run, "--ckpt_path", str(last), "--trainer.max_steps=4"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 4
    assert main(["validate", *run]) == 0
    assert main(["test", *run]) == 0
    trained = load(last, backbone=PatchBackbone(6)).network.state_dict()
    weight = trained["body.0.embed.weight"]
    assert not torch.equal(weight, checkpoint["state_dict"]["network.body.0.embed.weight"])


def test_class_may_be_named_by_a_shorter_path(workplace, monkeypatch, capsys):
    import tests.helpers

    monkeypatch.setattr(tests.helpers, "PatchBackbone", PatchBackbone, raising=False)
    Path("r.yaml").write_text(RECIPE.replace(CLASS_PATH, "tests.helpers.PatchBackbone"))
    run = ["--config", "r.yaml", *ALLOW]
    assert main(["fit", *run]) == 0, capsys.readouterr()
    (last,) = workplace.glob("runs/*/checkpoints/last.ckpt")
    saved_path = torch.load(last, weights_only=True)["hyper_parameters"]["backbone"]["class_path"]
    assert saved_path == CLASS_PATH
    assert main(["fit", *run, "--ckpt_path", str(last), "--trainer.max_steps=4"]) == 0
    assert main(["test", *run]) == 0
    load(last, backbone=PatchBackbone(6))


def test_class_of_a_checkpoint_is_not_imported(workplace, capsys):
    Path("r.yaml").write_text(RECIPE)
    assert main(["fit", "--config", "r.yaml", *ALLOW]) == 0
    (last,) = workplace.glob("runs/*/checkpoints/last.ckpt")
    with pytest.raises(InputError, match=re.escape("load(path, backbone=PatchBackbone(...))")):
        load(last)
    with pytest.raises(InputError, match=f"backbone names the class {CLASS_PATH}"):
        DetectorModule.load_from_checkpoint(last)
    # the recipe is silent about the backbone
    block = RECIPE[RECIPE.index("    backbone:") : RECIPE.index("    head_channels")]
    Path("r.yaml").write_text(RECIPE.replace(block, ""))
    capsys.readouterr()
    assert main(["test", "--config", "r.yaml", "--ckpt_path", str(last), *ALLOW]) == 2
    assert f"the checkpoint's backbone is the class {CLASS_PATH}; name it" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "values",
    [
        {"backbone.class_path": "hostile_module.Class"},
        {5: "a key that is not a name"},
        {"schedule": {"class_path": "hostile_module.Class"}},
        {"loss": {"box_selection": [{"class_path": "hostile_module.Class"}]}},
        {"learning_rate": "${oc.env:HOME}"},
    ],
)
def test_no_other_value_of_a_checkpoint_names_a_class(workplace, capsys, monkeypatch, values):
    Path("hostile_module.py").write_text("open('imported', 'w')\nclass Class: pass\n")
    monkeypatch.syspath_prepend(str(workplace))
    checkpoint = build_checkpoint(detector("small"), {})
    checkpoint["hyper_parameters"] |= values
    torch.save(checkpoint, "m.ckpt")
    Path("r.yaml").write_text(RECIPE)
    run = ["--config", "r.yaml", *ALLOW, "--allow-module", "hostile_module"]
    for command in ("fit", "test"):
        assert main([command, *run, "--ckpt_path", "m.ckpt"]) == 2
        assert "may not name a class" in capsys.readouterr().err
    assert not Path("imported").exists()


def test_module_with_a_backbone_parameter_of_its_own_trains(workplace, capsys):
    class_path = "tests.helpers.own_backbone.OwnDetector"
    Path("r.yaml").write_text(RECIPE.replace("yolo_lightning.DetectorModule", class_path))
    assert main(["fit", "--config", "r.yaml", *ALLOW]) == 0, capsys.readouterr()


def test_mlflow_model_refuses_a_class_as_backbone(saved, tmp_path):
    with pytest.raises(InputError, match="its backbone is a class"):
        save_model(saved[1], tmp_path / "model")


def test_recipe_class_needs_an_allowed_module(workplace, capsys):
    Path("r.yaml").write_text(RECIPE)
    assert main(["fit", "--config", "r.yaml"]) == 2
    assert f"backbone.class_path names '{CLASS_PATH}'" in capsys.readouterr().err


def test_null_gets_the_allowed_values(workplace, capsys):
    Path("r.yaml").write_text(RECIPE)
    assert main(["fit", "--config", "r.yaml", *ALLOW, "--model.backbone=null"]) == 2
    assert "allowed: darknet19" in capsys.readouterr().err


def test_text_is_never_read_as_a_class(workplace, capsys):
    block = RECIPE[RECIPE.index("    backbone:") : RECIPE.index("    head_channels")]
    Path("r.yaml").write_text(RECIPE.replace(block, f"    backbone: {CLASS_PATH}\n"))
    assert main(["fit", "--config", "r.yaml", *ALLOW]) == 2
    assert f"model.backbone is '{CLASS_PATH}'; allowed: darknet19" in capsys.readouterr().err


def test_loaded_module_predicts_as_the_saved_one(saved):
    module, path = saved
    images = torch.rand(2, 3, 64, 96)
    for loaded in (
        load(path, backbone=PatchBackbone(6)),
        DetectorModule.load_from_checkpoint(path, backbone=PatchBackbone(6)).eval(),
    ):
        ours, theirs = loaded.network(images), module.network(images)
        assert ours.box_logits.shape == (2, 1, 5, 4, 6)
        assert torch.equal(ours.box_logits, theirs.box_logits)
    with pytest.raises(InputError, match="not a checkpoint of this version"):
        load(path, backbone=PatchBackbone(7))


@pytest.mark.parametrize("changes", [{"head_channels": 5}, {"anchors_wh_cell": [[1.0, 1.0]] * 9}])
def test_checkpoint_describes_the_values_that_it_holds(saved, changes):
    module, path = saved
    checkpoint = build_checkpoint(module, {})
    checkpoint["hyper_parameters"] |= changes
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match=r"is float .*, but its hyper-parameters describe float"):
        read_checkpoint(path)


def test_module_keeps_its_initial_values_and_trains_at_its_own_rate():
    backbone = PatchBackbone()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    module = detector(backbone, backbone_lr_factor=0.0)
    for name, value in module.network.body[0].state_dict().items():
        assert torch.equal(value, before[name])
    assert module.network.body[1].get_submodule("conv").weight.shape == (4, 8, 3, 3)
    train([], make_datamodule(), module, max_steps=2, limit_val_batches=0)
    for name, value in module.network.body[0].state_dict().items():
        assert torch.equal(value, before[name])


def test_head_can_be_left_out():
    network = detector(head_channels=0).network
    assert len(network.body) == 1
    assert network(torch.rand(1, 3, 64, 64)).box_logits.shape == (1, 1, 5, 4, 4)


def test_detector_starts_from_a_classifier_with_the_same_module(workplace):
    classifier = ClassifierModule(TREE, PatchBackbone(), image_size=64)
    assert classifier(torch.rand(2, 3, 64, 64)).shape == (2, 2)
    torch.save(build_checkpoint(classifier, {}), "c.ckpt")
    assert load("c.ckpt", backbone=PatchBackbone()).hparams["image_size"] == 64
    module = detector()
    report = load_pretrained(module.network, module.tree, "c.ckpt", 1)
    assert "layers 0 … 0" in report.loaded
    for name, value in classifier.network.body[0].state_dict().items():
        assert torch.equal(value, module.network.body[0].state_dict()[name])


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        (PatchBackbone(), {"passthrough_channels": 64}, "allowed for a backbone that is a module"),
        (NoStride(), {}, "NoStride.stride is 0; allowed: 1 or more"),
        ({"class_path": CLASS_PATH}, {}, "In Python, pass the module"),
    ],
)
def test_unsuitable_backbones_are_refused(backbone, options, message):
    with pytest.raises(InputError, match=message):
        detector(backbone, **options)


def test_darknet_and_operation_counts_refuse_a_module(workplace):
    module = detector()
    with pytest.raises(InputError, match=f"the backbone is {CLASS_PATH}"):
        export_model(module, {}, Path("out"))
    with pytest.raises(InputError, match=f"the layers of {CLASS_PATH} are unknown"):
        billion_operations(module.network, 64)
    Path("w.weights").write_bytes(b"\0" * 200)
    with pytest.raises(InputError, match="cannot be loaded into a custom backbone"):
        load_pretrained(module.network, module.tree, "w.weights", 1)


def test_network_of_known_layers_stays_a_list_of_layers():
    network = YOLOv2([Conv(4)], 2, torch.ones(1, 2))
    assert network.body.layers == (Conv(4),)
