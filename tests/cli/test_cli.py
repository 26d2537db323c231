"""The command line, in process: recipes, precedence, run folders, tracking, error messages."""

import json
import re
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers.paths import REPO
from tests.helpers.recipes import QUICK, TINY, quickstart_values
from yolo_lightning.callbacks import ValidationReport
from yolo_lightning.cli import recipe as cli
from yolo_lightning.cli import runs
from yolo_lightning.cli.main import main
from yolo_lightning.cli.monitors import SETTINGS
from yolo_lightning.detector import DetectorModule

pytestmark = pytest.mark.end_to_end

# without those of test data alone, which have no model
RECIPES = sorted((REPO / "recipes").rglob("[!t]*.yaml"))


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, workplace: Path) -> Any:
    """Return a function that parses a command line and builds its objects, without training."""
    monkeypatch.setattr(cli.RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda *args: cli.main(["fit", *args])


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the recipe was trained, with its run in MLflow."""
    from tests.helpers.tracked import fresh_store

    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "recipes").symlink_to(REPO / "recipes")
    fresh_store(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ValidationReport, "on_train_end", lambda *_: None)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        assert main(["fit", *QUICK, *TINY]) == 0
    return folder


@pytest.fixture
def trained(quickstart: Path, workplace: Path) -> Path:
    """A working folder with a copy of that training."""
    shutil.copytree(quickstart, workplace, dirs_exist_ok=True, ignore=lambda *_: ["recipes"])
    return workplace


def strings_in(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings_in(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in strings_in(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_and_references_follow_overrides(build, recipe):
    path = str(recipe.relative_to(REPO))
    overrides = [
        "--seed_everything=7",
        "--trainer.max_steps=123",
        "--model.tree=[apple,banana,orange]",
    ]
    if "shapes" in recipe.read_text():
        overrides[2] = "--model.tree=recipes/trees/shapes.tsv"
    run = build("--config", path, *overrides)
    resolved = run.resolved_config()
    assert not [text for text in strings_in(resolved) if "${" in text]
    assert run.datamodule.seed == 7
    assert run.datamodule.tree.rows == run.model.tree.rows
    schedule = run.model.schedule
    if hasattr(schedule, "total_steps"):
        assert schedule.total_steps == 123
    assert recipe.read_text().startswith("#")
    for text in ("yolo-lightning fit --config", "torchrun", "ffective batch"):
        assert text in recipe.read_text(), text
    assert re.search("srun yolo-lightning|sbatch recipes/cluster/", recipe.read_text())


def test_no_component_receives_an_unresolved_reference(build, monkeypatch):
    monkeypatch.setenv("FRUIT_DATA", "/some/where")
    run = build("--config", "recipes/fruit.yaml")
    assert run.datamodule.detection.root == run.datamodule.validation.root == "/some/where"
    run = build("--config", "recipes/fruit.yaml", "--data.detection.root=/else/where")
    assert run.datamodule.validation.root == "/else/where"


def test_fit_writes_a_run_folder_checkpoints_and_one_mlflow_run(workplace, reports, capsys):
    assert main(["fit", *QUICK, *TINY]) == 0
    (folder,) = (workplace / "outputs/quickstart").iterdir()
    assert capsys.readouterr().out.startswith(f"run folder  {folder.relative_to(workplace)}\n")
    written = (REPO / "recipes/quickstart.yaml").read_text()
    assert (folder / "recipe.yaml").read_text() == written
    assert "--trainer.max_steps=4" in (folder / "command.txt").read_text()
    resolved = yaml.safe_load((folder / "resolved.yaml").read_text())
    assert resolved["model"]["init_args"]["schedule"]["init_args"]["total_steps"] == 4
    assert resolved["trainer"]["max_steps"] == 4
    assert (folder / "checkpoints/best.ckpt").is_file()
    assert (folder / "checkpoints/last.ckpt").is_file()

    store = sqlite3.connect(workplace / "mlflow.db")

    def column(query: str) -> list[Any]:
        return [row[0] for row in store.execute(query)]

    assert column("select status from runs") == ["FINISHED"]
    assert column("select name from runs") == [f"quickstart/{folder.name}"]
    metrics = set(column("select distinct key from metrics"))
    for term in ("coord", "obj", "noobj", "class", "anchor_prior"):
        assert f"train/loss_{term}" in metrics
    assert {"train/cls_loss_class", "train/cls_loss_obj", "train/cls_loss_noobj"} <= metrics
    assert {
        "train/image_size",
        "train/lr",
        "val/AP50",
        "val/AP50_boxed",
        "val/AP50_unboxed",
    } <= metrics
    # each point is the value of the latest batch of its source
    points = "select step, value from metrics where key = '{}' order by step"
    coord = store.execute(points.format("train/loss_coord")).fetchall()
    assert [step for step, _ in coord] == [0, 1, 2, 3]
    assert coord[0][1] == coord[1][1] != coord[2][1] == coord[3][1]
    labelled = store.execute(points.format("train/cls_loss_class")).fetchall()
    assert [step for step, _ in labelled] == [1, 2, 3]
    params = dict(store.execute("select key, value from params"))
    assert params["trainer.max_steps"] == "4"
    assert params["model.learning_rate"] == "0.02"
    assert params["trainer.callbacks.MultiScale.every_n_batches"] == "10"
    tags = dict(store.execute("select key, value from tags"))
    assert (tags["recipe"], tags["world_size"]) == ("quickstart", "1")
    assert tags["version.torch"] == torch.__version__
    assert tags["data.training.boxes.nodes"] == "6"
    result, data, errors, *rest = tags["mlflow.note.content"].split("\n")
    assert re.fullmatch(r"\*\*AP50_boxed [\d.]+; best [\d.]+ at step \d \(AP50 .*\)\*\*  ", result)
    assert data == (
        "Recipe **quickstart**: 8 images with boxes (6 classes), 8 images with labels "
        "(12 classes)  "
    )
    assert errors.startswith("Weakest: ")
    assert any("The paper's claim in miniature" in line for line in rest)
    uses = store.execute("select count(*) from inputs where destination_type = 'RUN'")
    assert uses.fetchone() == (3,)
    artifacts = {
        file.name
        for root in column("select artifact_uri from runs")
        for file in Path(root).rglob("*")
    }
    assert {"resolved.yaml", "recipe.yaml", "command.txt", "tree.tsv", "anchors.csv"} <= artifacts
    assert {"best.ckpt", "steps.crc32", "precision_recall.png", "errors.jpg"} <= artifacts
    assert any(name.startswith("predictions+step+") for name in artifacts)
    assert column("select status from logged_models") == [2]  # ready
    store.close()


def test_checkpoints_load_with_weights_only(trained):
    (best,) = trained.glob("outputs/quickstart/*/checkpoints/best.ckpt")
    hparams = torch.load(best, weights_only=True)["hyper_parameters"]
    assert hparams["tree"][0] == ["n00027807", "-", "shape"]
    model = DetectorModule.load_from_checkpoint(best, weights_only=True)
    assert {model.tree.names[k] for k in model.boxed.nonzero().flatten().tolist()} == {
        "right triangle", "rhombus", "semicircle", "pentagram", "Greek cross", "ring",
    }  # fmt: skip
    assert model.hparams["anchors_wh_cell"] == hparams["anchors_wh_cell"]

    # test without --ckpt_path uses the best checkpoint of the newest run
    assert main(["validate", *QUICK, *TINY]) == 0
    assert main(["test", *QUICK, *TINY]) == 0
    assert main(["fit", *QUICK, *TINY]) == 0
    assert len(list((trained / "outputs/quickstart").iterdir())) == 2
    store = sqlite3.connect(trained / "mlflow.db")
    assert store.execute("select count(*) from runs").fetchone() == (2,)
    tested = store.execute("select count(*) from metrics where key = 'test/AP50'")
    assert tested.fetchone() == (1,)
    store.close()


def test_command_line_overrides_recipe_overrides_checkpoint(workplace, monkeypatch):
    assert main(["fit", *QUICK, *TINY, "--model.momentum=0.7", "--model.learning_rate=0.03"]) == 0
    (last,) = workplace.glob("outputs/quickstart/*/checkpoints/last.ckpt")
    recipe = quickstart_values()
    del recipe["model"]["init_args"]["momentum"]
    del recipe["model"]["init_args"]["head_channels"]
    (workplace / "short.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(cli.RecipeCLI, "_run_subcommand", lambda self, subcommand: None)
    tiny = [option for option in TINY if "head_channels" not in option]
    run = cli.main(["fit", "--config", "short.yaml", *tiny, f"--ckpt_path={last}"])
    hparams = run.model.hparams
    assert hparams["momentum"] == 0.7  # not in the recipe: from the checkpoint
    assert hparams["head_channels"] == 8
    assert hparams["learning_rate"] == 0.02  # from the recipe; 0.03 in the checkpoint
    more = ["--model.momentum=0.5", f"--ckpt_path={last}"]
    assert (
        cli.main(["fit", "--config", "short.yaml", *tiny, *more]).model.hparams["momentum"] == 0.5
    )


def test_resume_continues_folder_and_mlflow_run_at_the_recipe_learning_rate(trained):
    (last,) = trained.glob("outputs/quickstart/*/checkpoints/last.ckpt")
    more = ["--trainer.max_steps=6", "--model.learning_rate=0.5", "--model.schedule.power=0"]
    assert main(["fit", *QUICK, *TINY, *more, "--ckpt_path", str(last)]) == 0
    (folder,) = (trained / "outputs/quickstart").iterdir()
    assert (folder / "resumed-1-resolved.yaml").is_file()
    store = sqlite3.connect(trained / "mlflow.db")
    assert store.execute("select count(*) from runs").fetchone() == (1,)
    rates = store.execute("select step, value from metrics where key = 'train/lr' order by step")
    assert dict(rates.fetchall()) == pytest.approx(
        {0: 0.015, 1: 0.01, 2: 0.005, 3: 0.0, 4: 0.5, 5: 0.5}
    )
    store.close()
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_tree_and_anchors_must_match_the_checkpoint(trained, capsys):
    tree = (REPO / "recipes/trees/shapes.tsv").read_text().replace("\tring\n", "\thoop\n")
    (trained / "other.tsv").write_text(tree)
    assert main(["test", *QUICK, *TINY, "--model.tree=other.tsv"]) == 2
    message = capsys.readouterr().err
    assert "model.tree differs from the checkpoint's: entry 4" in message
    assert "hoop" in message
    assert main(["test", *QUICK, *TINY, "--model.anchors_wh_cell=[[1.5,1.7],[2.4,2.5]]"]) == 2
    assert "model.anchors_wh_cell differs from the checkpoint's: entry 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["--model.learnin_rate=1"],
            ["recipes/quickstart.yaml: model.learnin_rate: no such option", "'learning_rate'"],
        ),
        (["--model.schedule.milestones=[1]"], ["model.schedule.milestones: no such option"]),
        (["--trainer.precision=12"], ["trainer.precision: allowed: 64, 32, 16", "bf16-mixed"]),
        (
            ["--model.backbone=darknet20"],
            ["model.backbone is 'darknet20'", "did you mean 'darknet19'"],
        ),
        (
            ["--model.loss.box_selection=biggest"],
            [
                "model.loss.box_selection: allowed: 'label', 'boxed_ancestor', 'largest'",
                "found: biggest",
            ],
        ),
        (["--data.image_size=100"], ["data.image_size is 100", "multiples of 32"]),
        (["--model.tree=nowhere.tsv"], ["tree file 'nowhere.tsv' not found"]),
        (["--data.classes=[a]"], ["classes"]),
        (["--data.detection.classes=[sqare]"], ["'sqare'", "did you mean 'square'"]),
        (["--trainer.max_steps=many"], ["trainer.max_steps: expected int; found: many"]),
        (["--data.tree=[circle]"], ["label 'n13880551' is not in the tree", "allowed: circle"]),
        (["--data.tree=reversed.tsv"], ["data.tree differs from model.tree: entry 1 is"]),
        (
            ["--trainer.max_stepz=3"],
            ["trainer.max_stepz: no such option; did you mean 'max_steps'"],
        ),
        (["--trainer.limit_train_batches=2"], ["data.steps_per_epoch"]),
        (["--trainer.overfit_batches=2"], ["data.steps_per_epoch"]),
        (["--trainer.precision=bf16-true"], ["allowed: 32-true, 16-mixed, bf16-mixed"]),
        (["--trainer.accumulate_grad_batches=3"], ["val_check_interval is 2", "accumulate"]),
        (["--model.learning_rate=-1"], ["model.learning_rate is -1", "allowed: 0 or more"]),
        (["--model.head_channels=-1"], ["model.head_channels is -1; allowed: 0 … 65,536"]),
        (["--data.num_workers=-1"], ["data.num_workers is -1; allowed: 0 … 1,024"]),
        (["--seed_everything=-5"], ["seed_everything is '-5'; allowed: 0 … 4,294,967,295"]),
        (["--trainer.devices=9999"], ["trainer.devices is 9,999; allowed: at most 1,024"]),
        (["--ckpt_path=none.ckpt"], ["checkpoint 'none.ckpt' not found"]),
        (["--weights_only=false"], ["weights_only"]),
    ],
)
def test_bad_input_gives_one_message_without_a_traceback(workplace, capsys, args, expected):
    rows = (REPO / "recipes/trees/shapes.tsv").read_text().splitlines()
    (workplace / "reversed.tsv").write_text("\n".join(reversed(rows)))
    code = main(["fit", *QUICK, *TINY, *args])
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    message = error[error.index("yolo-lightning: error:") :]
    for text in expected:
        assert text in message, message
    assert len(message) < 500, message
    for internal_name in ("Union", "NestedArg", "Namespace", "NoneType"):
        assert internal_name not in message


def test_a_typo_in_a_recipe_names_the_file_and_the_key(workplace, capsys):
    text = (REPO / "recipes/quickstart.yaml").read_text()
    (workplace / "typo.yaml").write_text(
        text.replace("detection_batch_size:", "detection_batchsize:")
    )
    assert main(["fit", "--config", "typo.yaml", *TINY[:4]]) == 2
    message = capsys.readouterr().err
    assert "typo.yaml: data.detection_batchsize: no such option" in message
    assert "did you mean 'detection_batch_size'" in message
    (workplace / "stray.yaml").write_text(text.replace("trainer:\n", "traner:\n"))
    assert main(["fit", "--config", "stray.yaml"]) == 2
    message = capsys.readouterr().err
    assert "stray.yaml: traner: no such option; did you mean 'trainer'?" in message
    (workplace / "callback.yaml").write_text(text.replace("every_n_batches:", "every_batches:"))
    assert main(["fit", "--config", "callback.yaml"]) == 2
    assert "trainer.callbacks.every_batches: no such option; did you mean 'every_n_batches'" in (
        capsys.readouterr().err
    )
    (workplace / "class.yaml").write_text(text.replace("ShapesDetection", "ShapeDetection"))
    assert main(["fit", "--config", "class.yaml"]) == 2
    assert "'yolo_lightning.datamodules.ShapeDetection'; did you mean 'ShapesDetection'" in (
        capsys.readouterr().err
    )
    (workplace / "nothing.yaml").write_text("\n")
    assert main(["fit", "--config", "nothing.yaml"]) == 2
    assert "recipe 'nothing.yaml' is empty" in capsys.readouterr().err
    (workplace / "latin.yaml").write_bytes(b"# caf\xe9\n")
    assert main(["fit", "--config", "latin.yaml"]) == 2
    assert "latin.yaml: not readable as UTF-8 text (byte 5)" in capsys.readouterr().err
    (workplace / "lost.yaml").write_text(text.replace("trainer.max_steps}", "trainer.steps}"))
    assert main(["fit", "--config", "lost.yaml"]) == 2
    message = capsys.readouterr().err
    assert "lost.yaml: model.init_args.schedule.init_args.total_steps" in message
    assert main(["fit", "--config", "missing.yaml"]) == 2
    assert "recipe 'missing.yaml' not found" in capsys.readouterr().err
    (workplace / "broken.yaml").write_text("model: [unclosed\n")
    assert main(["fit", "--config", "broken.yaml"]) == 2
    assert "broken.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_of_broken_images_gives_one_message(workplace, capsys, write_voc, workers):
    for name in "abcd":
        write_voc(workplace / "data/train", name, [("apple", 1, 1, 30, 30)])
        write_voc(workplace / "data/test", name, [("apple", 1, 1, 30, 30)])
        (workplace / f"data/train/{name}.jpg").write_bytes(b"no image")
    options = ["--config", "recipes/fruit.yaml", "--data.detection.root=data"]
    options += ["--model.pretrained=null"]
    options += [f"--data.num_workers={workers}", "--trainer.logger=false", "--trainer.max_steps=2"]
    assert main(["fit", *options, "--data.detection_batch_size=2"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error[error.index("yolo-lightning: error:") :]
    assert error.count("\n") == 1
    assert "no readable image among 4: " in error
    assert "another image is used" not in error
    assert not list(workplace.glob("outputs/*")), "no run folder is left"


def test_precision_accumulation_and_weight_averaging_work(workplace):
    recipe = quickstart_values()
    recipe["trainer"]["callbacks"].append(
        {
            "class_path": "lightning.pytorch.callbacks.EMAWeightAveraging",
            "init_args": {"decay": 0.5},
        }
    )
    (workplace / "ema.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--trainer.precision=bf16-mixed", "--trainer.accumulate_grad_batches=2"]
    assert main(["fit", "--config", "ema.yaml", *TINY, *options]) == 0
    (last,) = workplace.glob("outputs/quickstart/*/checkpoints/last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 4
    name = "network.box_conv.weight"
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])


def test_repaired_data_is_listed_at_the_end(workplace, capfd, write_voc):
    for name in "abcd":
        write_voc(workplace / "data/train", name, [("apple", 1, 1, 30, 30)], stated=(0, 0))
        write_voc(workplace / "data/test", name, [("apple", 1, 1, 30, 30)])
    (workplace / "data/train/c.jpg").write_bytes(b"no image")
    options = ["--config", "recipes/fruit.yaml", "--data.detection.root=data"]
    options += ["--model.pretrained=null"]
    options += ["--data.num_workers=0", "--trainer.logger=false", "--trainer.max_steps=2"]
    options += ["--trainer.accelerator=cpu", "--model.head_channels=8"]
    options += ["--data.detection_batch_size=2", "--data.steps_per_epoch=2"]
    options += ["--trainer.check_val_every_n_epoch=1"]
    assert main(["fit", *options]) == 0
    output = capfd.readouterr()
    report = output.out + output.err
    assert "Annotations: 4 repaired or skipped; `check-data RECIPE` lists all:" in report
    assert report.count(".xml: gives the size as 0 x 0") == 2, "examples"
    assert "Data: 1 repaired or skipped while reading:" in report
    assert "c.jpg: not a readable image" in report


def test_last_step_is_saved_at_any_interval(workplace):
    short = [option for option in TINY if "max_steps" not in option]
    assert main(["fit", *QUICK, *short, "--trainer.max_steps=3"]) == 0
    (last,) = workplace.glob("outputs/quickstart/*/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert main(["fit", *QUICK, *short, "--trainer.max_steps=5", f"--ckpt_path={last}"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 5


def test_run_without_validation_can_be_tested(workplace, capsys):
    recipe = quickstart_values()
    callbacks = recipe["trainer"]["callbacks"]
    recipe["trainer"]["callbacks"] = [c for c in callbacks if "ModelC" not in c["class_path"]]
    (workplace / "plain.yaml").write_text(yaml.safe_dump(recipe))
    tiny = [option for option in TINY if "validation" not in option]
    plain = ["--config", "plain.yaml", *tiny]
    assert main(["fit", *plain, "--data.validation=null"]) == 0
    assert main(["test", *plain]) == 0
    note = "data.test is not set: these are the validation images\n"
    assert note not in capsys.readouterr().out
    own = [option for option in plain if "data.test" not in option]
    assert main(["test", *own, "--data.test=null", "--data.validation.length=4"]) == 0
    assert note in capsys.readouterr().out


def test_boxed_classes_follow_the_recipe_on_resume(trained):
    (last,) = trained.glob("outputs/quickstart/*/checkpoints/last.ckpt")
    more = ["--trainer.max_steps=6", "--data.detection.classes=[rhombus]", f"--ckpt_path={last}"]
    run = cli.main(["fit", *QUICK, *TINY, *more])
    boxed = {run.model.tree.names[k] for k in run.model.boxed.nonzero().flatten().tolist()}
    assert boxed == {"rhombus"}
    square = run.model.tree.find_node("square")
    assert run.model.tree.names[run.model.boxed_ancestors()[square]] == "quadrilateral"


def test_missing_mlflow_run_does_not_stop_training_or_testing(trained):
    (last,) = trained.glob("outputs/quickstart/*/checkpoints/last.ckpt")
    run_file = last.parent.parent / "mlflow_run_id"
    before = run_file.read_text()
    # as on another machine: the run folder exists, the store does not
    other = ["--trainer.logger.tracking_uri=sqlite:///other.db"]
    with pytest.warns(UserWarning, match="the run of these metrics does not exist in this store"):
        assert main(["test", *QUICK, *TINY, *other]) == 0
    more = ["--trainer.max_steps=6", f"--ckpt_path={last}"]
    with pytest.warns(
        UserWarning, match=rf"MLflow run {before} does not exist in sqlite:.*other\.db"
    ):
        assert main(["fit", *QUICK, *TINY, *other, *more]) == 0
    assert run_file.read_text() != before
    store = sqlite3.connect(trained / "other.db")
    assert store.execute("select run_uuid from runs").fetchall() == [(run_file.read_text(),)]
    store.close()


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "./mlruns", "postgresql://u@127.0.0.1:5/x"])
def test_unusable_store_does_not_stop_training(workplace, uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (workplace / "mlflow.db").write_bytes(b"this is no database" * 300)
    with pytest.warns(UserWarning, match="is not available"):
        assert main(["fit", *QUICK, *TINY]) == 0
    (journal,) = workplace.glob("outputs/quickstart/*/mlflow/journal.jsonl")
    assert '"status": "FINISHED"' in journal.read_text()
    assert main(["mlflow", "sync", "outputs", "--store", "sqlite:///whole.db"]) == 0
    store = sqlite3.connect(workplace / "whole.db")
    steps = store.execute("select step from metrics where key = 'train/lr' order by step")
    assert [step for (step,) in steps] == [0, 1, 2, 3]
    store.close()


def test_training_that_fails_in_its_first_step_is_marked_failed(workplace, monkeypatch):
    def fail(*_: object) -> None:
        raise ArithmeticError("of the test")

    monkeypatch.setattr(DetectorModule, "training_step", fail)
    with pytest.raises(ArithmeticError, match="of the test"):
        main(["fit", *QUICK, *TINY])
    store = sqlite3.connect(workplace / "mlflow.db")
    assert store.execute("select status from runs").fetchall() == [("FAILED",)]
    store.close()


def test_resume_from_an_older_checkpoint_keeps_both_metrics_and_warns(trained):
    (folder,) = (trained / "outputs/quickstart").iterdir()
    shutil.copyfile(folder / "checkpoints/last.ckpt", folder / "checkpoints/older.ckpt")
    longer = ["--trainer.max_steps=6", f"--ckpt_path={folder}/checkpoints/last.ckpt"]
    assert main(["fit", *QUICK, *TINY, *longer]) == 0
    older = ["--trainer.max_steps=6", f"--ckpt_path={folder}/checkpoints/older.ckpt"]
    with pytest.warns(UserWarning, match="steps 4 to 5 are trained again with a different result"):
        assert main(["fit", *QUICK, *TINY, *older, "--model.learning_rate=0.5"]) == 0
    store = sqlite3.connect(trained / "mlflow.db")
    rates = "select step, count(*), max(value) from metrics where key = 'train/lr' group by step"
    points = {step: (count, rate) for step, count, rate in store.execute(rates)}
    assert [count for count, _ in points.values()] == [1, 1, 1, 1, 2, 2]
    assert points[4][1] > 0.05  # 0.5 instead of 0.02, both divided by 6
    parameter = "select value from params where key = 'model.learning_rate'"
    assert store.execute(parameter).fetchone() == ("0.02",)
    logged = folder / "resumed-2-resolved.yaml"
    assert yaml.safe_load(logged.read_text())["model"]["init_args"]["learning_rate"] == 0.5
    store.close()


def test_repeated_validation_adds_no_metrics(trained):
    store = sqlite3.connect(trained / "mlflow.db")
    count = "select count(*) from metrics where key like 'val/%' or key = 'epoch'"
    before = store.execute(count).fetchone()
    for _ in range(2):
        assert main(["validate", *QUICK, *TINY]) == 0
    assert store.execute(count).fetchone() == before
    model_metrics = "select count(*) from logged_model_metrics where metric_name = 'val/AP50'"
    assert store.execute(model_metrics).fetchone() == (1,)
    store.close()


def test_rejected_value_leaves_no_folder_on_any_rank(workplace, capsys, monkeypatch):
    for rank in (0, 1):
        monkeypatch.setattr(runs, "rank", lambda rank=rank: rank)
        assert main(["fit", *QUICK, *TINY, "--model.backbone=darknet20"]) == 2
        assert "model.backbone is 'darknet20'" in capsys.readouterr().err
        assert not list(workplace.glob("outputs/quickstart/*"))


@pytest.mark.parametrize(
    "options",
    [
        ["--model.pretrained=none.weights"],
        ["--data.tree=reversed.tsv"],
        ["--trainer.accumulate_grad_batches=3"],
        ["--trainer.limit_train_batches=2"],
    ],
)
def test_a_failed_start_leaves_no_run_and_nothing_in_the_store(workplace, capsys, options):
    """These are found after the objects are built."""
    rows = (REPO / "recipes/trees/shapes.tsv").read_text().splitlines()
    (workplace / "reversed.tsv").write_text("\n".join(reversed(rows)))
    assert main(["fit", *QUICK, *TINY, *options]) == 2
    assert not list(workplace.glob("outputs/quickstart/*"))
    assert not list(workplace.glob("mlflow.db*"))


@pytest.mark.parametrize(
    ("callback", "monitor", "hint"),
    [
        ("ModelCheckpoint", "val/mAP50", "did you mean 'val/AP50'"),
        ("EarlyStopping", "val_loss", "allowed: val/AP50, val/AP, "),
    ],
)
def test_a_metric_that_is_not_logged_is_named_before_the_start(
    workplace, capsys, callback, monitor, hint
):
    recipe = quickstart_values()
    path = f"lightning.pytorch.callbacks.{callback}"
    recipe["trainer"]["callbacks"] = [{"class_path": path, "init_args": {"monitor": monitor}}]
    (workplace / "typo.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "--config", "typo.yaml", *TINY]) == 2
    output = capsys.readouterr()
    assert f"trainer.callbacks: {callback} monitors '{monitor}'; " in output.err
    assert hint in output.err
    assert "train/loss_coord" in output.err
    assert output.err.count("\n") == 1
    assert not output.out
    assert not list(workplace.glob("outputs/*/*"))


def test_all_that_a_training_logs_can_be_monitored(workplace):
    run = cli.main(["fit", *QUICK, *TINY])
    logged = {name for name in run.trainer.callback_metrics if name.startswith(("val/", "train/"))}
    assert logged <= {*run.model.metric_names(), *SETTINGS}
    assert {"val/AP50_boxed", "val/AP50_level1", "train/cls_loss"} < logged


def test_a_moved_dataset_is_all_that_is_printed(workplace, capsys):
    options = ["--data.detection.root=gone", "--model.pretrained=null"]
    assert main(["fit", "--config", "recipes/fruit.yaml", *options]) == 2
    output = capsys.readouterr()
    assert "VOC folder 'gone' not found (working folder: " in output.err
    assert not output.out
    assert not list(workplace.glob("outputs/*/*"))


def test_testing_before_training_fails(workplace, capsys):
    assert main(["test", *QUICK]) == 2
    assert "train first" in capsys.readouterr().err


def test_missing_data_and_invalid_checkpoints_are_named(workplace, capsys, monkeypatch):
    monkeypatch.delenv("FRUIT_DATA", raising=False)
    assert main(["fit", "--config", "recipes/fruit.yaml"]) == 2
    assert "VOC folder 'datasets/fruit_abo' not found" in capsys.readouterr().err
    (workplace / "odd.ckpt").write_bytes(b"not a checkpoint")
    assert main(["test", *QUICK, "--ckpt_path", "odd.ckpt"]) == 2
    assert "odd.ckpt: not a checkpoint of this program" in capsys.readouterr().err


def test_help_version_and_unknown_commands(capsys):
    assert main([]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
    assert main(["fti"]) == 2
    assert "did you mean 'fit'" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_keeps_the_results_of_every_run(workplace, capsys):
    for number in (1, 2):
        assert main(["quickstart", *TINY]) == 0
        folder = workplace / f"outputs/quickstart/run-{number:03}"
        assert (folder / "predictions.png").stat().st_size > 10_000
        summary = json.loads((workplace / "outputs/quickstart/summary.json").read_text())
        assert summary == json.loads((folder / "summary.json").read_text())
    for name in ("joint", "detection_only"):
        assert 0 <= summary[name]["boxed_ap50"] <= 1
        assert 0 <= summary[name]["unboxed_ap50"] <= 1
        assert summary[name]["detection_steps"] == 2
        assert 0 < len(summary[name]["per_class"]) <= 12
    assert summary["seconds"] > 0
    printed = capsys.readouterr().out
    assert "classes without boxes" in printed
    assert "yolo-lightning mlflow ui" in printed
