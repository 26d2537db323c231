"""Reports: files, images, options, and the command line that writes them."""

import csv
import io
import json
import math
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.helpers.detections import CAT, DOG, FAR, FLAT, HALF, PIG, THIRD, detection, table, target
from tests.helpers.miniatures import save_grey
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.cli import recipe as cli
from yolo_lightning.cli.main import main
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.coco import COCO_METRICS, evaluate_coco
from yolo_lightning.evaluation.detection import DetectionEvaluation
from yolo_lightning.evaluation.error_analysis import (
    ConfusionMatrix,
    confusion_matrix,
    find_errors,
    match_predictions,
)
from yolo_lightning.evaluation.matching import empty_table
from yolo_lightning.evaluation.plots import draw_error_grid, draw_error_tile, plot_confusion_matrix
from yolo_lightning.evaluation.report import ReportOptions, write_report
from yolo_lightning.evaluation.tables import (
    unique_names,
    write_class_table,
    write_confusion_table,
)
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.images import UnreadableSample
from yolo_lightning.tree.wordtree import WordTree

pytestmark = pytest.mark.end_to_end

IMAGES = {"precision_recall.png", "confidence.png", "confusion.png", "errors.jpg"}
TABLES = {"metrics.json", "per_class.csv", "confusion.csv", "errors.csv"}
TARGETS = table(
    target(CAT), target(CAT, FAR), target(DOG, image=1), target(DOG, FAR, 1), target(PIG, image=2)
)
DETECTIONS = table(
    detection(CAT, 0.9), detection(CAT, 0.8, HALF), detection(DOG, 0.9, FAR),
    detection(CAT, 0.9, image=1), detection(PIG, 0.4, THIRD, image=2), detection(PIG, 0.9, FAR, 3),
)  # fmt: skip


class Images:
    """Images by index."""

    def __init__(self, *images: np.ndarray, size_hw_orig: tuple[int, int]) -> None:
        self.images, self.size_hw_orig = images, size_hw_orig

    def read(self, index):
        return SimpleNamespace(image=self.images[index], size_hw_orig=self.size_hw_orig)

    def image_name(self, index):
        return f"photos/{index}.jpg"


class NoImages(Images):
    """Images that cannot be read."""

    def read(self, index):
        raise UnreadableSample("gone")


# decoded at half of their size, each of a different grey
SOURCE = Images(
    *(np.full((100, 150, 3), 40 * index, np.uint8) for index in range(4)), size_hw_orig=(200, 300)
)
METADATA = {"recipe": "r.yaml", "checkpoint": "runs/a.ckpt", "images": 4, "image_size": 96}


def evaluated(targets=TARGETS, detections=DETECTIONS, tree=FLAT):
    """Return an evaluation with the given boxes as its results."""
    evaluation, scores = DetectionEvaluation(tree), evaluate_coco(targets, detections)
    evaluation.targets, evaluation.detections = targets, detections
    evaluation.per_class = {tree.keys[node]: row for node, row in scores.per_class.items()}
    evaluation.metrics = {k: v for k, v in scores.metrics.items() if v >= 0}
    evaluation.metrics["AP50_boxed"] = math.nan
    return evaluation


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_a_report_has_metrics_tables_and_images(tmp_path):
    folder = tmp_path / "deep/report"
    lines = write_report(folder, evaluated(), METADATA, SOURCE)
    assert {file.name for file in folder.iterdir()} == IMAGES | TABLES
    assert lines == [
        "best mean F1 0.167 at confidence 0.9",
        "errors at confidence 0.25: classification 2, localization 1, duplicate 1, background 1, "
        "missed 1",
    ]
    written = json.loads((folder / "metrics.json").read_text())
    assert written["checkpoint"] == "runs/a.ckpt"
    assert written["objects"] == 5
    assert set(COCO_METRICS) <= set(written["metrics"])
    assert written["metrics"]["AP_large"] is None  # no large object
    assert written["metrics"]["AP50_boxed"] is None  # NaN
    assert written["metrics"]["AP50"] == pytest.approx(0.5 / 3, abs=0.01)
    assert written["errors"] == {
        "confidence": 0.25, "iou": 0.5, "detections": 6, "true_positives": 1,
        "classification": 2, "localization": 1, "duplicate": 1, "background": 1, "missed": 1,
    }  # fmt: skip
    assert written["best_f1"]["confidence"] == 0.9
    # one of the two cats, and a dog predicted as cat
    cat = written["per_class"]["cat"]
    assert (cat["objects"], cat["precision"], cat["recall"], cat["f1"]) == (2, 0.5, 0.5, 0.5)
    assert written["confusion"] == {"confidence": 0.25, "level": None}
    assert {"yolo-lightning", "python", "torch", "lightning"} == set(written["versions"])


def test_formulas_are_quoted_and_numbers_are_not(tmp_path):
    write_class_table(tmp_path / "a.csv", {"=1+1": {"name": "+cat", "AP": -0.5}})
    assert rows_of(tmp_path / "a.csv") == [{"key": "'=1+1", "name": "'+cat", "AP": "-0.5"}]
    matrix = ConfusionMatrix(np.array([0]), np.array([[1, 0], [2, 0]]))
    write_confusion_table(tmp_path / "b.csv", matrix, {0: "@SUM(A1)"})
    lines = (tmp_path / "b.csv").read_text().splitlines()
    assert lines == ["target,'@SUM(A1),missed", "'@SUM(A1),1,0", "background,2,0"]


def test_content_of_the_tables(tmp_path):
    write_report(tmp_path, evaluated(), METADATA, SOURCE)
    cat, dog, pig = rows_of(tmp_path / "per_class.csv")
    assert list(cat) == [
        "key", "name", "objects", "AP", "AP50", "AP75", "precision", "recall", "f1",
    ]  # fmt: skip
    assert (cat["key"], cat["objects"], cat["recall"]) == ("cat", "2", "0.5")
    assert (dog["objects"], dog["precision"], pig["recall"]) == ("2", "0", "0")
    lines = (tmp_path / "confusion.csv").read_text().splitlines()
    assert lines == [
        "target,cat,dog,pig,missed", "cat,1,1,0,0", "dog,1,0,0,1", "pig,0,0,0,1",
        "background,1,0,2,0",
    ]  # fmt: skip
    errors = rows_of(tmp_path / "errors.csv")
    assert [one["kind"] for one in errors] == [
        "classification", "classification", "localization", "duplicate", "background", "missed",
    ]  # fmt: skip
    assert (errors[0]["file"], errors[0]["predicted"], errors[0]["target"]) == (
        "photos/0.jpg", "dog", "cat",
    )  # fmt: skip
    assert (errors[2]["iou"], errors[2]["x1"], errors[2]["target_x1"]) == ("0.33333", "20", "10")
    assert (errors[4]["target"], errors[4]["target_x1"]) == ("", "")
    assert (errors[5]["score"], errors[5]["x1"], errors[5]["target"]) == ("", "", "dog")


def test_names_of_several_nodes_include_their_keys():
    tree = WordTree([("n1", "-", "crane"), ("n2", "-", "crane"), ("n3", "-", "jay")])
    assert unique_names(tree) == {0: "crane (n1)", 1: "crane (n2)", 2: "jay"}


def test_options_set_level_and_confidence(tmp_path):
    tree = WordTree([("pet", "-", "pet"), ("cat", "pet", "cat"), ("dog", "pet", "dog")])
    targets, detections = (
        table(target(1), target(2, FAR)),
        table(detection(2, 0.4), detection(2, 0.6, FAR)),
    )
    report = evaluated(targets, detections, tree), METADATA, SOURCE
    write_report(tmp_path, *report, ReportOptions(level=1, confidence=0.5))
    lines = (tmp_path / "confusion.csv").read_text().splitlines()
    assert lines == ["target,pet,missed", "pet,1,1", "background,0,0"]
    write_report(tmp_path, *report, ReportOptions(level=1))
    assert (tmp_path / "confusion.csv").read_text().splitlines()[1] == "pet,2,0"
    with pytest.raises(InputError, match="report.level is 3; allowed: 1 … 2"):
        write_report(tmp_path, *report, ReportOptions(level=3))


@pytest.mark.parametrize(
    ("targets", "detections", "files"),
    [
        (empty_table(), empty_table(), TABLES),
        (empty_table(), DETECTIONS, TABLES | {"confusion.png", "errors.jpg"}),
        (TARGETS, empty_table(), TABLES | IMAGES),
    ],
    ids=["nothing", "no targets", "no detections"],
)
def test_metrics_of_empty_tables_are_undefined(tmp_path, targets, detections, files):
    lines = write_report(tmp_path, evaluated(targets, detections), METADATA, SOURCE)
    assert {file.name for file in tmp_path.iterdir()} == files
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["best_f1"] is None
    assert written["errors"]["true_positives"] == 0
    assert ("no targets: no curves" in lines) == (len(targets) == 0)
    if not len(targets):
        assert written["per_class"] == {}
        assert set(written["metrics"].values()) == {None}
        assert (tmp_path / "per_class.csv").read_text() == "key,name,objects\n"


def test_tiles_show_the_enlarged_crop_with_both_boxes():
    box = (20, 20, 60, 60)
    pair = table(target(DOG, box, image=1)), table(detection(CAT, 0.9, box, image=1))
    (one,) = find_errors(match_predictions(*pair, FLAT))["classification"]
    image = np.full((120, 160, 3), 90, np.uint8)
    image[20:60, 20:60] = 200, 30, 30
    shown = np.array(draw_error_tile(one, Images(image, image, size_hw_orig=(120, 160))))
    # the crop is 1.5 times as large as the box
    side = shown.shape[0]
    first = round((20 - 10) / 60 * side)
    assert shown[side // 2, side // 2].tolist() == [200, 30, 30]
    assert shown[5, 5].tolist() == [90, 90, 90]
    green, orange = (24, 160, 70), (245, 110, 0)
    assert tuple(shown[side // 2, first]) == orange
    assert tuple(shown[side // 2, first + 3]) == green  # the line of the target is wider
    # an image decoded at half of its size gives the same crop
    half = image[::2, ::2].copy()
    halved = np.array(draw_error_tile(one, Images(half, half, size_hw_orig=(120, 160))))
    assert tuple(halved[side // 2, first]) == orange
    assert np.abs(halved.astype(int) - shown).mean() < 2


def test_tiles_of_small_and_unreadable_images_are_padded_with_grey():
    (one,) = find_errors(
        match_predictions(table(target(CAT, (0, 0, 40, 10))), empty_table(), FLAT)
    )["missed"]
    source = Images(np.full((10, 40, 3), 7, np.uint8), size_hw_orig=(10, 40))
    shown = np.array(draw_error_tile(one, source))
    middle = shown.shape[0] // 2
    assert shown[middle, middle].tolist() == [7, 7, 7]
    assert shown[5, middle].tolist() == shown[-5, middle].tolist() == [228, 228, 228]
    unread = draw_error_tile(one, NoImages(size_hw_orig=(10, 40)))
    assert set(np.array(unread).reshape(-1).tolist()) == {228}


def test_the_grid_has_a_row_of_tiles_for_each_kind_that_occurs():
    sizes = []
    for targets, detections in ((TARGETS, DETECTIONS), (table(target(CAT)), empty_table())):
        found = find_errors(match_predictions(targets, detections, FLAT))
        sizes.append(draw_error_grid(found, unique_names(FLAT), SOURCE, 0.25).size)
    (width, tall), (same_width, low) = sizes
    assert width == same_width
    assert tall - low == 4 * 220  # tile, caption and gap


def test_the_plot_of_the_matrix_shows_counts_and_of_one_class_no_background():
    def texts(classes, counts):
        matrix = ConfusionMatrix(np.arange(classes), np.array(counts))
        axes = plot_confusion_matrix(matrix, {0: "cat", 1: "dog"}, "Confusion").axes[0]
        rows = [label.get_text() for label in axes.get_yticklabels()]
        return {text.get_text() for text in axes.texts}, rows, axes.get_xlabel()

    shown, rows, label = texts(2, [[112, 5, 3], [0, 90, 0], [23, 0, 0]])
    assert shown == {"112", "5", "3", "90", "23"}
    assert rows == ["cat  120", "dog  90", "background  23"]
    assert label == "predicted class"
    shown, rows, label = texts(1, [[112, 5], [23, 0]])
    assert (shown, rows) == ({"112", "5"}, ["cat  117"])
    assert label == "predicted class; 23 predictions match no target"


@pytest.mark.parametrize("count", [1, 40])
def test_the_plot_of_the_matrix_grows_with_the_number_of_classes(count):
    tree = WordTree.from_names([f"class {k}" for k in range(count)])
    rows = [target(k, image=k) for k in range(count)]
    matrix = confusion_matrix(match_predictions(table(*rows), empty_table(), tree), tree)
    file = io.BytesIO()
    plot_confusion_matrix(matrix, unique_names(tree), "Confusion").savefig(
        file, bbox_inches="tight"
    )
    image = Image.open(file)
    pixels = np.array(image.convert("RGB"))
    dark = (pixels[..., 2] > 90) & (pixels[..., 0] < 40)  # the column of missed targets
    assert 300 < image.size[1] < 3000
    assert dark.any(axis=1).sum() > 0.3 * image.size[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 1.5}, "report.confidence is 1.5; allowed: 0 … 1"),
        ({"confidence": -0.1}, "report.confidence is -0.1"),
        ({"folder": "full"}, "report.folder 'full' is not empty"),
        ({"folder": "full/file"}, "report.folder 'full/file' is not empty"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    with pytest.raises(InputError, match=message):
        ReportOptions(**options)
    Path("empty").mkdir()
    ReportOptions(folder="empty")
    ReportOptions(folder="new")


# --- the command line

TINY = [
    "--config=recipes/quickstart.yaml", "--trainer.max_steps=2", "--trainer.val_check_interval=2",
    "--trainer.accelerator=cpu", "--data.detection.length=8", "--data.classification.length=8",
    "--data.validation.length=3", "--data.test.length=5", "--data.detection_batch_size=2",
    "--data.classification_batch_size=2", "--data.num_workers=0", "--model.head_channels=8",
]  # fmt: skip


def read_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_the_command_writes_the_report_to_the_run_folder_and_to_mlflow(
    workplace, capsys, monkeypatch
):
    assert main(["fit", *TINY]) == 0
    (run,) = (workplace / "outputs/quickstart").iterdir()
    before = set(run.iterdir())
    assert main(["test", *TINY, "--report.level=1", "--report.confidence=0.01"]) == 0
    assert f"report: {(run / 'test-001').relative_to(workplace)}" in capsys.readouterr().out
    store = sqlite3.connect(workplace / "mlflow.db")
    ((logged,),) = store.execute("select value from metrics where key = 'test/AP50'").fetchall()
    ((artifact_uri,),) = store.execute("select artifact_uri from runs")
    store.close()
    assert {file.name for file in (Path(artifact_uri) / "test-001").iterdir()} == IMAGES | TABLES

    def fail(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr("mlflow.tracking.MlflowClient.log_artifact", fail)
    (workplace / "seen.txt").write_text("ring\nsquare\n")
    with pytest.warns(UserWarning, match=r"upload to MLflow .* mlflow sync"):
        assert main(["test", *TINY, "--report.seen_classes=seen.txt"]) == 0
    assert main(["validate", *TINY, "--report.folder=my/report"]) == 0
    assert set(run.iterdir()) - before == {run / "test-001", run / "test-002"}

    written = read_metrics(run / "test-001")
    assert written["command"] == "test"
    assert written["recipe"] == "quickstart.yaml"
    assert written["checkpoint"] == str((run / "checkpoints/best.ckpt").relative_to(workplace))
    assert (written["images"], written["image_size"], written["seen_classes"]) == (5, 96, None)
    assert written["errors"]["confidence"] == 0.01
    names = (run / "test-001/confusion.csv").read_text().splitlines()[0]
    assert names == "target,shape,cross,missed"
    assert {"detected", "correct"} & {key for row in written["per_class"].values() for key in row}
    assert read_metrics(run / "test-002")["seen_classes"] == "seen.txt"
    validated = read_metrics(workplace / "my/report")
    assert (validated["command"], validated["images"]) == ("validate", 3)

    assert written["metrics"]["AP50"] == pytest.approx(logged, abs=1e-6)


def test_invalid_options_are_refused_before_the_evaluation(workplace, capsys, monkeypatch):
    monkeypatch.setattr(cli.RecipeCLI, "after_test", lambda self: pytest.fail("evaluated"))
    test = ["test", *TINY, "--ckpt_path", str(save_untrained(workplace))]
    (workplace / "mine").mkdir()
    (workplace / "mine/file").write_text("")
    for args, message in (
        ([*test, "--report.confidence=2"], "report.confidence is 2; allowed: 0 … 1"),
        ([*test, "--report.level=6"], "report.level is 6; allowed: 1 … 5"),
        ([*test, "--report.folder=mine"], "report.folder 'mine' is not empty"),
        ([*test, "--report.seen_classes=gone.txt"], "'gone.txt'"),
        ([*test, "--report.lvl=2"], "report.lvl: no such option; did you mean 'level'?"),
        (["fit", *TINY, "--report.level=2"], "report.level: an option of validate and test"),
    ):
        assert main(args) == 2
        assert message in capsys.readouterr().err
    assert not (workplace / "outputs").exists()


def save_untrained(workplace):
    """Save a detector outside of any run folder."""
    module = DetectorModule(
        "recipes/trees/shapes.tsv", [(1.6, 1.7), (2.4, 2.5)], "small", 8, 64, "space_to_depth"
    )
    torch.save(build_checkpoint(module, {}), workplace / "elsewhere.ckpt")
    return workplace / "elsewhere.ckpt"


def test_the_report_of_a_checkpoint_without_a_run_goes_to_the_folder_of_the_recipe(workplace):
    before = {*workplace.iterdir(), save_untrained(workplace)}
    assert main(["test", *TINY, "--ckpt_path", "elsewhere.ckpt"]) == 0
    assert {*workplace.iterdir()} - before == {workplace / "outputs"}
    (folder,) = (workplace / "outputs/quickstart").iterdir()
    assert folder.name == "test-001"
    assert read_metrics(folder)["checkpoint"] == "elsewhere.ckpt"
    # one batch of two, of five images in three batches
    options = ["--ckpt_path=elsewhere.ckpt", "--trainer.limit_test_batches=0.4"]
    assert main(["test", *TINY, *options]) == 0
    assert read_metrics(folder.with_name("test-002"))["images"] == 2


def test_other_ranks_write_nothing(workplace, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.is_global_zero", False)
    assert main(["test", *TINY, "--ckpt_path", str(save_untrained(workplace))]) == 0
    assert not (workplace / "outputs").exists()


def test_the_report_of_a_classifier(workplace, capsys):
    for label in ("cat", "dog"):
        save_grey(workplace / f"val/{label}/1.jpg")
    folder = {"class_path": "yolo_lightning.datamodules.ImageFolder", "init_args": {"root": "val"}}
    init: dict[str, Any] = {"tree": ["cat", "dog"], "backbone": [["conv", 4], ["pool"]]}
    data: dict[str, Any] = {"tree": ["cat", "dog"], "validation": folder}
    data |= {"classification": folder, "image_size": 32, "num_workers": 0}
    recipe = {
        "model": {"class_path": "yolo_lightning.ClassifierModule", "init_args": init},
        "data": {"class_path": "yolo_lightning.CombinedDataModule", "init_args": data},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    Path("c.yaml").write_text(yaml.safe_dump(recipe))
    torch.save(build_checkpoint(ClassifierModule(**init), {}), "c.ckpt")
    test = ["test", "--config=c.yaml", "--ckpt_path=c.ckpt"]
    for options, report in (([], "outputs/c/test-001"), (["--report.folder=mine"], "mine")):
        assert main([*test, *options]) == 0
        output = capsys.readouterr().out
        assert "top-1" in output
        assert f"report: {report}" in output
        assert {file.name for file in Path(report).iterdir()} == {"metrics.json", "per_class.csv"}
    assert json.loads(Path("mine/metrics.json").read_text())["images"] == 2
    for option in ("level=1", "confidence=0.5", "seen_classes=imagenet_det_44"):
        assert main([*test, f"--report.{option}"]) == 2
        assert "report: level, confidence and seen_classes need a" in capsys.readouterr().err
