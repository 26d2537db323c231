"""The report of the last validation, written when training ends."""

import json

import pytest
from lightning.pytorch.callbacks import Callback

from tests.helpers.training import NAMES, TREE, RecordingDetector, make_datamodule, train
from yolo_lightning import ClassifierModule, CombinedDataModule
from yolo_lightning.callbacks.validation_report import ValidationReport
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels

TABLES = {"metrics.json", "per_class.csv", "confusion.csv", "errors.csv"}
PLOTS = {"precision_recall.png", "confidence.png", "confusion.png"}


@pytest.fixture
def module() -> RecordingDetector:
    return RecordingDetector()


def test_the_metrics_of_the_last_validation_are_written_and_logged(tmp_path, module, capsys):
    trainer = train([ValidationReport()], module=module, default_root_dir=tmp_path)
    folder = tmp_path / "report"
    assert trainer.logger.folders == [(folder, "plots")]
    assert {file.name for file in folder.iterdir()} == TABLES | PLOTS | {"errors.jpg"}
    written = json.loads((folder / "metrics.json").read_text())
    assert (written["command"], written["step"]) == ("fit", 6)
    assert (written["images"], written["image_size"]) == (5, 64)
    assert written["objects"] == len(module.evaluation.targets) > 0
    assert written["metrics"]["AP50"] == module.evaluation.metrics["AP50"]
    assert set(written["per_class"]) == {key for key, *_ in TREE}
    assert "best mean F1" in capsys.readouterr().out


def test_the_step_is_that_of_the_last_validation(tmp_path):
    train([ValidationReport()], max_steps=5, default_root_dir=tmp_path)
    assert json.loads((tmp_path / "report/metrics.json").read_text())["step"] == 4


def test_the_report_is_written_without_a_run_logger(tmp_path):
    train([ValidationReport()], loggers=[], default_root_dir=tmp_path)
    assert (tmp_path / "report/metrics.json").is_file()


@pytest.mark.parametrize(
    "options", [{"limit_val_batches": 0}, {"max_steps": 1, "num_sanity_val_steps": -1}]
)
def test_without_a_validation_there_is_no_report(tmp_path, options):
    trainer = train([ValidationReport()], default_root_dir=tmp_path, **options)
    assert not (tmp_path / "report").exists()
    assert not trainer.logger.folders


def test_the_report_of_a_classifier(tmp_path):
    labels = ShapesImageLabels(length=4, classes=NAMES, image_size=64)
    data = CombinedDataModule(
        TREE, classification=labels, validation=labels, classification_batch_size=2,
        image_size=64, num_workers=0,
    )  # fmt: skip
    train([ValidationReport()], data, ClassifierModule(TREE, "small"), default_root_dir=tmp_path)
    written = json.loads((tmp_path / "report/metrics.json").read_text())
    assert (written["command"], written["images"]) == ("fit", 4)
    assert written["metrics"].keys() == {"top1", "top5"}
    assert (tmp_path / "report/per_class.csv").read_text().startswith("key,name,images,top1,top5")


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    class OtherRank(Callback):
        def on_train_end(self, trainer, pl_module) -> None:
            monkeypatch.setattr(type(trainer), "is_global_zero", False)

    train([OtherRank(), ValidationReport()], default_root_dir=tmp_path)
    assert not (tmp_path / "report").exists()


def test_an_error_becomes_a_warning(tmp_path):
    (tmp_path / "report").write_text("a file, not a folder")
    with pytest.warns(UserWarning, match="no report of the last validation: .*report"):
        trainer = train([ValidationReport()], default_root_dir=tmp_path)
    assert trainer.global_step == 6
    assert not trainer.logger.folders


def test_only_the_validated_images_count(tmp_path):
    data = make_datamodule(ShapesDetection(9, NAMES, image_size=64, seed=5))
    train([ValidationReport()], data, limit_val_batches=2, default_root_dir=tmp_path)
    assert json.loads((tmp_path / "report/metrics.json").read_text())["images"] == 4
