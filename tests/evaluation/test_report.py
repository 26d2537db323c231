"""What a report holds: files, pictures, options, and the command line that writes it."""

import csv
import io
import json
import math
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.helpers.detections import CAT, DOG, FAR, FLAT, HALF, PIG, THIRD, said, table, truth
from tests.helpers.miniatures import plain
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.cli import recipe as cli
from yolo_lightning.cli.main import main
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.average_precision import COCO_FIGURES, coco_evaluation
from yolo_lightning.evaluation.error_analysis import confusion, matches_at, mistakes
from yolo_lightning.evaluation.matching import no_boxes
from yolo_lightning.evaluation.plots import confusion_matrix, mistakes_grid, tile
from yolo_lightning.evaluation.report import ReportData, ReportOptions, write_report
from yolo_lightning.evaluation.tables import titles
from yolo_lightning.export.darknet import checkpoint_of
from yolo_lightning.images import UnreadableSample
from yolo_lightning.tree.wordtree import WordTree

PICTURES = {"precision_recall.png", "confidence.png", "confusion.png", "mistakes.jpg"}
TABLES = {"figures.json", "per_class.csv", "confusion.csv", "mistakes.csv"}
TRUTHS = table(
    truth(CAT), truth(CAT, FAR), truth(DOG, image=1), truth(DOG, FAR, 1), truth(PIG, image=2)
)
DETECTIONS = table(
    said(CAT, 0.9), said(CAT, 0.8, HALF), said(DOG, 0.9, FAR), said(CAT, 0.9, image=1),
    said(PIG, 0.4, THIRD, image=2), said(PIG, 0.9, FAR, 3),
)  # fmt: skip


@pytest.fixture
def no_plots(monkeypatch):
    """Be a machine without matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def read(index):
    """Return an image of half of the original's size: grey, another one for each number."""
    return np.full((100, 150, 3), 40 * index, np.uint8), (0.5, 0.5)


def evaluated(truths=TRUTHS, detections=DETECTIONS, tree=FLAT):
    found = coco_evaluation(truths, detections)
    per_class = {tree.keys[node]: row for node, row in found.per_class.items()}
    figures = {k: v for k, v in found.figures.items() if v >= 0} | {"AP50_boxed": math.nan}
    about = {"recipe": "r.yaml", "checkpoint": "runs/a.ckpt", "images": 4, "image_size": 96}
    return ReportData(tree, truths, detections, figures, per_class, {}, about)


def rows_of(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_a_report_holds_figures_tables_and_pictures(tmp_path):
    folder = tmp_path / "deep/report"
    lines = write_report(folder, evaluated(), read, lambda k: f"photos/{k}.jpg")
    assert {file.name for file in folder.iterdir()} == PICTURES | TABLES
    assert lines == [
        "best mean F1 0.167 at confidence 0.9",
        "mistakes at confidence 0.25: wrong class 2, badly placed 1, duplicate 1, background 1, "
        "missed 1",
    ]
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["checkpoint"] == "runs/a.ckpt"
    assert figures["objects"] == 5
    assert set(COCO_FIGURES) <= set(figures["figures"])
    assert figures["figures"]["AP_large"] is None  # no large object
    assert figures["figures"]["AP50_boxed"] is None  # NaN
    assert figures["figures"]["AP50"] == pytest.approx(0.5 / 3, abs=0.01)
    assert figures["mistakes"] == {
        "confidence": 0.25, "iou": 0.5, "detections": 6, "hits": 1,
        "wrong_class": 2, "badly_placed": 1, "duplicate": 1, "background": 1, "missed": 1,
    }  # fmt: skip
    assert figures["best_f1"]["confidence"] == 0.9
    # one of the two cats, and a dog called cat
    cat = figures["per_class"]["cat"]
    assert (cat["objects"], cat["precision"], cat["recall"], cat["f1"]) == (2, 0.5, 0.5, 0.5)
    assert figures["confusion"] == {"confidence": 0.25, "level": None}
    assert {"yolo-lightning", "python", "torch", "lightning"} == set(figures["versions"])


def test_tables_name_classes_and_images(tmp_path, no_plots):
    write_report(tmp_path, evaluated(), read, lambda k: f"photos/{k}.jpg")
    cat, dog, pig = rows_of(tmp_path / "per_class.csv")
    assert list(cat) == [
        "key", "name", "objects", "AP", "AP50", "AP75", "precision", "recall", "f1",
    ]  # fmt: skip
    assert (cat["key"], cat["objects"], cat["recall"]) == ("cat", "2", "0.5")
    assert (dog["objects"], dog["precision"], pig["recall"]) == ("2", "0", "0")
    lines = (tmp_path / "confusion.csv").read_text().splitlines()
    assert lines == [
        "truth,cat,dog,pig,missed", "cat,1,1,0,0", "dog,1,0,0,1", "pig,0,0,0,1",
        "background,1,0,2,0",
    ]  # fmt: skip
    wrong = rows_of(tmp_path / "mistakes.csv")
    assert [one["kind"] for one in wrong] == [
        "wrong class", "wrong class", "badly placed", "duplicate", "background", "missed",
    ]  # fmt: skip
    assert (wrong[0]["file"], wrong[0]["predicted"], wrong[0]["truth"]) == (
        "photos/0.jpg", "dog", "cat",
    )  # fmt: skip
    assert (wrong[2]["iou"], wrong[2]["x1"], wrong[2]["truth_x1"]) == ("0.33333", "20", "10")
    assert (wrong[4]["truth"], wrong[4]["truth_x1"]) == ("", "")
    assert (wrong[5]["score"], wrong[5]["x1"], wrong[5]["truth"]) == ("", "", "dog")


def test_names_that_several_nodes_have_get_their_keys():
    tree = WordTree([("n1", "-", "crane"), ("n2", "-", "crane"), ("n3", "-", "jay")])
    assert titles(tree) == {0: "crane (n1)", 1: "crane (n2)", 2: "jay"}


def test_options_choose_level_and_confidence(tmp_path, no_plots):
    tree = WordTree([("pet", "-", "pet"), ("cat", "pet", "cat"), ("dog", "pet", "dog")])
    truths, detections = table(truth(1), truth(2, FAR)), table(said(2, 0.4), said(2, 0.6, FAR))
    found = evaluated(truths, detections, tree)
    write_report(tmp_path, found, read, options=ReportOptions(level=1, confidence=0.5))
    lines = (tmp_path / "confusion.csv").read_text().splitlines()
    assert lines == ["truth,pet,missed", "pet,1,1", "background,0,0"]
    write_report(tmp_path, found, read, options=ReportOptions(level=1))
    assert (tmp_path / "confusion.csv").read_text().splitlines()[1] == "pet,2,0"
    with pytest.raises(InputError, match="report.level is 3; allowed: 1 … 2"):
        write_report(tmp_path, found, read, options=ReportOptions(level=3))


def test_without_matplotlib_all_else_is_written_and_what_is_missing_said(tmp_path, no_plots):
    lines = write_report(tmp_path, evaluated(), read)
    assert {file.name for file in tmp_path.iterdir()} == TABLES | {"mistakes.jpg"}
    assert lines[-1] == (
        "left out precision_recall.png, confidence.png, confusion.png: "
        "pictures need matplotlib: pip install 'yolo-lightning[plots]'"
    )


@pytest.mark.parametrize(
    ("truths", "detections", "written"),
    [
        (no_boxes(), no_boxes(), TABLES),
        (no_boxes(), DETECTIONS, TABLES | {"confusion.png", "mistakes.jpg"}),
        (TRUTHS, no_boxes(), TABLES | PICTURES),
    ],
    ids=["nothing", "no truths", "no detections"],
)
def test_an_evaluation_of_nothing_invents_no_figures(tmp_path, truths, detections, written):
    lines = write_report(tmp_path, evaluated(truths, detections), read)
    assert {file.name for file in tmp_path.iterdir()} == written
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["best_f1"] is None
    assert figures["mistakes"]["hits"] == 0
    assert ("no objects to find: no curves" in lines) == (len(truths) == 0)
    if not len(truths):
        assert figures["per_class"] == {}
        assert set(figures["figures"].values()) == {None}
        assert (tmp_path / "per_class.csv").read_text() == "key,name,objects\n"


def test_tiles_show_the_place_enlarged_with_both_boxes():
    box = (20, 20, 60, 60)
    pair = table(truth(DOG, box, image=1)), table(said(CAT, 0.9, box, image=1))
    (one,) = mistakes(matches_at(*pair, FLAT))["wrong class"]
    picture = np.full((120, 160, 3), 90, np.uint8)
    picture[20:60, 20:60] = 200, 30, 30
    shown = np.array(tile(one, lambda k: (picture, (1.0, 1.0))))
    # a window of one and a half of the box, so that the box fills two thirds
    side = shown.shape[0]
    first = round((20 - 10) / 60 * side)
    assert shown[side // 2, side // 2].tolist() == [200, 30, 30]
    assert shown[5, 5].tolist() == [90, 90, 90]
    green, orange = (24, 160, 70), (245, 110, 0)
    assert tuple(shown[side // 2, first]) == orange
    assert tuple(shown[side // 2, first + 3]) == green  # the truth's line is wider
    # an image that was decoded at a half of its size shows the same place
    halved = np.array(tile(one, lambda k: (picture[::2, ::2].copy(), (0.5, 0.5))))
    assert tuple(halved[side // 2, first]) == orange
    assert np.abs(halved.astype(int) - shown).mean() < 2


def test_a_tile_stays_inside_small_images_and_grey_where_there_is_none():
    (one,) = mistakes(matches_at(table(truth(CAT, (0, 0, 40, 10))), no_boxes(), FLAT))["missed"]
    shown = np.array(tile(one, lambda k: (np.full((10, 40, 3), 7, np.uint8), (1.0, 1.0))))
    middle = shown.shape[0] // 2
    assert shown[middle, middle].tolist() == [7, 7, 7]
    assert shown[5, middle].tolist() == shown[-5, middle].tolist() == [228, 228, 228]

    def broken(index):
        raise UnreadableSample("gone")

    assert set(np.array(tile(one, broken)).reshape(-1).tolist()) == {228}


def test_the_grid_has_a_row_for_each_kind_that_happened():
    sizes = []
    for truths, detections in ((TRUTHS, DETECTIONS), (table(truth(CAT)), no_boxes())):
        found = mistakes(matches_at(truths, detections, FLAT))
        picture = Image.open(io.BytesIO(mistakes_grid(found, titles(FLAT), read, 0.25)))
        sizes.append(picture.size)
    (width, tall), (same_width, low) = sizes
    assert width == same_width
    assert tall - low == 4 * 220  # tile, caption and gap


@pytest.mark.parametrize("count", [1, 40])
def test_the_matrix_grows_with_its_classes(count):
    tree = WordTree.flat([f"class {k}" for k in range(count)])
    rows = [truth(k, image=k) for k in range(count)]
    matrix = confusion(matches_at(table(*rows), no_boxes(), tree), tree)
    picture = Image.open(io.BytesIO(confusion_matrix(matrix, titles(tree), "Confusion")))
    pixels = np.array(picture.convert("RGB"))
    dark = (pixels[..., 2] > 90) & (pixels[..., 0] < 40)  # the missed: a full column
    assert 300 < picture.size[1] < 3000
    assert dark.any(axis=1).sum() > 0.3 * picture.size[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"confidence": 1.5}, "report.confidence is 1.5; allowed: 0 … 1"),
        ({"confidence": -0.1}, "report.confidence is -0.1"),
        ({"folder": "full"}, "report.folder 'full' is not empty"),
        ({"folder": "full/file"}, "report.folder 'full/file' is not empty"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").write_text("mine")
    with pytest.raises(InputError, match=said):
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


def report_in(folder):
    return json.loads((folder / "figures.json").read_text())


def test_the_command_line_reports_beside_the_checkpoint_and_in_the_mlflow_run(
    workplace, capsys, monkeypatch, no_plots
):
    assert main(["fit", *TINY]) == 0
    (run,) = (workplace / "outputs/quickstart").iterdir()
    kept = set(run.iterdir())
    assert main(["test", *TINY, "--report.level=1", "--report.confidence=0.01"]) == 0
    assert f"report: {(run / 'test-001').relative_to(workplace)}" in capsys.readouterr().out
    store = sqlite3.connect(workplace / "mlflow.db")
    ((logged,),) = store.execute("select value from metrics where key = 'test/AP50'").fetchall()
    ((place,),) = store.execute("select artifact_uri from runs")
    store.close()
    assert {file.name for file in (Path(place) / "test-001").iterdir()} == TABLES | {"mistakes.jpg"}

    def fail(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr("mlflow.tracking.MlflowClient.log_artifact", fail)
    (workplace / "seen.txt").write_text("ring\nsquare\n")
    with pytest.warns(UserWarning, match=r"not all of this run is in MLflow .* mlflow sync"):
        assert main(["test", *TINY, "--report.seen=seen.txt"]) == 0
    assert main(["validate", *TINY, "--report.folder=mine/here"]) == 0
    assert set(run.iterdir()) - kept == {run / "test-001", run / "test-002"}

    figures = report_in(run / "test-001")
    assert figures["command"] == "test"
    assert figures["recipe"] == "quickstart.yaml"
    assert figures["checkpoint"] == str((run / "checkpoints/best.ckpt").relative_to(workplace))
    assert (figures["images"], figures["image_size"], figures["seen"]) == (5, 96, None)
    assert figures["mistakes"]["confidence"] == 0.01
    names = (run / "test-001/confusion.csv").read_text().splitlines()[0]
    assert names == "truth,shape,cross,missed"
    assert {"found", "named"} & {key for row in figures["per_class"].values() for key in row}
    assert report_in(run / "test-002")["seen"] == "seen.txt"
    validated = report_in(workplace / "mine/here")
    assert (validated["command"], validated["images"]) == ("validate", 3)

    assert figures["figures"]["AP50"] == pytest.approx(logged, abs=1e-6)


def test_what_the_command_line_refuses_costs_no_evaluation(workplace, capsys, monkeypatch):
    monkeypatch.setattr(cli.RecipeCLI, "after_test", lambda self: pytest.fail("it was measured"))
    test = ["test", *TINY, "--ckpt_path", str(untrained(workplace))]
    (workplace / "mine").mkdir()
    (workplace / "mine/file").write_text("")
    for args, message in (
        ([*test, "--report.confidence=2"], "report.confidence is 2; allowed: 0 … 1"),
        ([*test, "--report.level=6"], "report.level is 6; allowed: 1 … 5"),
        ([*test, "--report.folder=mine"], "report.folder 'mine' is not empty"),
        ([*test, "--report.seen=gone.txt"], "'gone.txt'"),
        ([*test, "--report.lvl=2"], "report.lvl: no such option; did you mean 'level'?"),
        (["fit", *TINY, "--report.level=2"], "report.level: an option of validate and test"),
    ):
        assert main(args) == 2
        assert message in capsys.readouterr().err
    assert not (workplace / "outputs").exists()


def untrained(workplace):
    """Save a detector of shapes beside no run."""
    module = DetectorModule(
        "recipes/trees/shapes.tsv", [(1.6, 1.7), (2.4, 2.5)], "small", 8, 64, "space_to_depth"
    )
    torch.save(checkpoint_of(module, {}), workplace / "elsewhere.ckpt")
    return workplace / "elsewhere.ckpt"


def test_a_checkpoint_from_elsewhere_is_reported_under_the_recipe_s_folder(workplace):
    before = {*workplace.iterdir(), untrained(workplace)}
    assert main(["test", *TINY, "--ckpt_path", "elsewhere.ckpt"]) == 0
    assert {*workplace.iterdir()} - before == {workplace / "outputs"}
    (folder,) = (workplace / "outputs/quickstart").iterdir()
    assert folder.name == "test-001"
    assert report_in(folder)["checkpoint"] == "elsewhere.ckpt"
    # two images read of five, one batch of three
    options = ["--ckpt_path=elsewhere.ckpt", "--trainer.limit_test_batches=0.4"]
    assert main(["test", *TINY, *options]) == 0
    assert report_in(folder.with_name("test-002"))["images"] == 2


def test_other_ranks_write_nothing(workplace, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.is_global_zero", False)
    assert main(["test", *TINY, "--ckpt_path", str(untrained(workplace))]) == 0
    assert not (workplace / "outputs").exists()


def test_a_classifier_is_measured_without_a_report_of_boxes(workplace, capsys):
    for label in ("cat", "dog"):
        plain(workplace / f"val/{label}/1.jpg")
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
    torch.save(checkpoint_of(ClassifierModule(**init), {}), "c.ckpt")
    before = {*workplace.iterdir()}
    test = ["test", "--config=c.yaml", "--ckpt_path=c.ckpt"]
    assert main(test) == 0
    assert "top-1" in capsys.readouterr().out
    assert {*workplace.iterdir()} == before
    assert main([*test, "--report.level=1"]) == 2
    assert "report: its options are for detectors, and this is none" in capsys.readouterr().err
