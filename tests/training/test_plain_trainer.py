"""The module and the data with Lightning's own trainer: anchors and head by default."""

import sqlite3
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from yolo_lightning import CombinedDataModule, DetectorModule, load
from yolo_lightning.batches import DetectionBatch
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import VOCFolder
from yolo_lightning.errors import InputError
from yolo_lightning.models.anchors import RELEASED
from yolo_lightning.tracking import RunLogger

NAMES = ["apple", "banana"]
SIZES = [(20, 10), (10, 20), (30, 30), (8, 8), (40, 20), (16, 32)]  # px of images of 64 x 48


@pytest.fixture
def photos(workplace, write_voc):
    """A folder of six images, each with a box of another size, in the working folder."""
    for k, (width, height) in enumerate(SIZES):
        boxes = [(NAMES[k % 2], 4, 4, 3 + width, 3 + height)]
        write_voc(workplace / "photos", f"{k}", boxes)
    return VOCFolder("photos")


def datamodule(photos, **options):
    return CombinedDataModule(
        detection=photos, validation=photos, detection_batch_size=2, num_workers=0, **options
    )


def trainer(**options):
    return pl.Trainer(
        **{
            "max_steps": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        }
    )


@pytest.mark.parametrize(
    ("backbone", "channels", "millions"),
    [("darknet19", 1024, 50.6), ("tiny_darknet", 256, 3.0), ("small", 256, 3.1)],
)
def test_the_head_is_as_wide_as_the_backbone(backbone, channels, millions):
    module = DetectorModule(["a"], [(1.0, 1.0)] * 5, backbone)
    assert module.hparams["head_channels"] == channels
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)
    again = DetectorModule(**module.hparams)
    assert again.network.body.layers == module.network.body.layers


def test_released_anchors_keep_their_size_in_px():
    for name, pairs in RELEASED.items():
        coarse = DetectorModule(["a"], name, "darknet19", 8, 0)  # type: ignore[arg-type]
        fine = DetectorModule(["a"], name, "small", 8, 0)  # type: ignore[arg-type]
        assert coarse.network.anchors_wh_cell.tolist() == torch.tensor(pairs).tolist()
        assert torch.equal(fine.network.anchors_wh_cell, 2 * coarse.network.anchors_wh_cell)
        assert fine.hparams["anchors_wh_cell"][0][0] == 2 * pairs[0][0]
    with pytest.raises(InputError, match="anchors_wh_cell is 'vco'; allowed: voc, coco, tiny_voc"):
        DetectorModule(["a"], "vco")  # type: ignore[arg-type]


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
def test_anchors_are_clustered_from_the_data(photos, resize, capsys):
    model = DetectorModule(NAMES, backbone="small", image_size=128, resize=resize)
    first = model.network.anchors_wh_cell.clone()
    assert torch.equal(first, 2 * torch.tensor(RELEASED["voc"]))
    trainer().fit(model, datamodule=datamodule(photos))
    anchors = model.network.anchors_wh_cell
    assert torch.equal(anchors, torch.tensor(model.hparams["anchors_wh_cell"]))
    # 64 x 48 px become 128 x 96, or 128 x 128; cells have 16 px
    scale = torch.tensor([2.0, 2.0 if resize == "letterbox" else 128 / 48]) / 16
    boxes = (torch.tensor(SIZES) * scale).tolist()
    assert anchors.shape == (5, 2)
    for anchor in anchors.tolist():  # of six boxes, the best five clusters are five of them
        assert anchor in [pytest.approx(box, rel=1e-3) for box in boxes]
    assert "clusters of 6 boxes" in capsys.readouterr().out
    clustered = anchors.clone()
    trainer().fit(model, datamodule=datamodule(photos, image_size=64))
    assert torch.equal(model.network.anchors_wh_cell, clustered)  # of a trained model


def test_too_few_boxes_for_anchors(workplace, write_voc):
    write_voc(workplace / "photos", "a", [("apple", 5, 5, 40, 30)])
    model = DetectorModule(NAMES, backbone="small", image_size=64)
    message = "5 anchors require 5 distinct boxes; found: 1; set model.anchors_wh_cell"
    with pytest.raises(InputError, match=message):
        trainer().fit(model, datamodule=datamodule(VOCFolder("photos")))


def test_a_resumed_training_has_the_anchors_of_its_checkpoint(photos, write_voc, workplace):
    model = DetectorModule(NAMES, backbone="small", image_size=64)
    first = trainer()
    first.fit(model, datamodule=datamodule(photos))
    first.save_checkpoint("a.ckpt")
    write_voc(workplace / "photos", "new", [("apple", 1, 1, 60, 40), ("apple", 1, 1, 9, 40)])
    resumed = DetectorModule(NAMES, backbone="small", image_size=64)
    trainer(max_steps=3).fit(
        resumed, datamodule=datamodule(VOCFolder("photos")), ckpt_path="a.ckpt", weights_only=True
    )
    assert resumed.hparams["anchors_wh_cell"] == model.hparams["anchors_wh_cell"]
    assert torch.equal(resumed.network.anchors_wh_cell, model.network.anchors_wh_cell)
    evaluated = DetectorModule(NAMES, backbone="small", image_size=64)
    metrics = first.validate(
        evaluated, datamodule=datamodule(photos), ckpt_path="a.ckpt", weights_only=True
    )
    assert torch.equal(evaluated.network.anchors_wh_cell, model.network.anchors_wh_cell)
    assert metrics[0].keys() >= {"val/AP50", "val/AP"}
    assert load("a.ckpt").hparams["anchors_wh_cell"] == model.hparams["anchors_wh_cell"]
    other = DetectorModule(NAMES, [(1.0, 1.0)] * 5, backbone="small", image_size=64)
    with pytest.raises(InputError, match=r"model\.anchors_wh_cell differs from the checkpoint"):
        first.validate(other, datamodule=datamodule(photos), ckpt_path="a.ckpt", weights_only=True)


@pytest.mark.end_to_end
def test_a_recipe_without_anchors_and_head_trains_and_is_tested(photos, capsys):
    source = "yolo_lightning.datamodules.VOCFolder"
    recipe = {
        "model": {
            "class_path": "yolo_lightning.DetectorModule",
            "init_args": {"tree": NAMES, "backbone": "small", "anchors_wh_cell": None},
        },
        "data": {
            "class_path": "yolo_lightning.CombinedDataModule",
            "init_args": {
                "detection": {"class_path": source, "init_args": {"root": "photos"}},
                "validation": {"class_path": source, "init_args": {"root": "photos"}},
                "image_size": 64, "detection_batch_size": 2, "num_workers": 0,
            },
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu", "logger": False},
    }  # fmt: skip
    Path("a.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "a.yaml"]) == 0, capsys.readouterr()
    assert main(["test", "a.yaml"]) == 0, capsys.readouterr()
    (last,) = Path("outputs/a").glob("*/checkpoints/last.ckpt")
    anchors = read_checkpoint(last)["hyper_parameters"]["anchors_wh_cell"]
    assert f"anchors_wh_cell: {anchors}" in capsys.readouterr().out
    options = ["--model.anchors_wh_cell=coco", "--num=2"]
    assert main(["anchors", "a.yaml", *options]) == 0, capsys.readouterr()
    assert "in the recipe, 5" in capsys.readouterr().out


def test_the_data_works_without_a_trainer(photos):
    data = CombinedDataModule(
        NAMES, detection=photos, validation=photos, detection_batch_size=2, image_size=64,
        num_workers=0,
    )  # fmt: skip
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    for step, batch in enumerate(batches):
        assert isinstance(batch, DetectionBatch)
        assert batch.images.shape == (2, 3, 64, 64)
        assert torch.equal(batch.images, data.batch(step).images)
    assert sum(len(batch) for batch in data.val_dataloader()) == 6
    with pytest.raises(InputError, match=r"data\.tree is not set, and there is no model"):
        datamodule(photos).setup("fit")


def test_the_run_logger_works_with_a_plain_trainer(photos):
    model = DetectorModule(NAMES, backbone="small", image_size=64)
    run = trainer(logger=RunLogger(system_metrics=False), log_every_n_steps=1)
    run.fit(model, datamodule=datamodule(photos))
    with sqlite3.connect("mlflow.db") as store:
        rows = store.execute("select key, step from metrics where key in ('train/loss')").fetchall()
        (status,) = store.execute("select status from runs").fetchone()
    assert sorted(rows) == [("train/loss", 0), ("train/loss", 1)]
    assert status == "FINISHED"
