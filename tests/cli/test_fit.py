"""`yolo_lightning.fit`: from a dataset, a recipe or a dictionary to a trained model."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import _common
from omegaconf import OmegaConf

from tests.helpers.paths import REPO
from yolo_lightning import DetectorModule, fit
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.cli.commands import init_defaults
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError

SMALL: dict[str, Any] = {"image_size": 96, "backbone": "small", "max_minutes": 0.01}
QUICK = {
    "data.detection_batch_size": 1, "data.num_workers": 0,
    "trainer.logger": False, "trainer.accelerator": "cpu", "trainer.precision": "32-true",
}  # fmt: skip
SHORT = {**QUICK, "trainer.max_steps": 4, "trainer.val_check_interval": 2}


@pytest.fixture
def photos(workplace, write_voc, known_step_time):
    """A folder with six images of two classes, in the working folder."""
    for name in "abcdef":
        boxes = [("apple", 5, 5, 40, 30), ("banana", 20, 9, 60, 44)]
        write_voc(workplace / "photos", name, boxes)
    return workplace / "photos"


def process_state():
    """Return what a call must leave as it is, for other code in the process."""
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    threads = {thread.name for thread in threading.enumerate()} & {"stop-signals"}
    parsers = [dict(_common.parsing_settings), OmegaConf.has_resolver("oc.select")]
    return [*handlers, threads, sys.unraisablehook, sys.stdout, sys.stderr, [*sys.argv], parsers]


@pytest.mark.end_to_end
def test_a_folder_becomes_a_model(photos, capsys):
    before = process_state()
    run = fit(detection="photos/", classification=None, **SMALL, overrides=SHORT)
    assert process_state() == before
    assert run.folder.parent == Path("outputs/photos")
    assert run.best == run.folder / "checkpoints/best.ckpt"
    assert read_checkpoint(run.best)["global_step"] == run.metrics["step"]
    assert 0 <= run.metrics["val/AP50"] <= 1
    assert isinstance(run.model, DetectorModule)
    assert run.model is run.model
    assert not run.model.training
    found = run.model(photos / "a.jpg", score_threshold=0.0)
    assert {detection.name for detection in found} <= {"apple", "banana"}
    assert run.recipe == Path("photos.yaml")
    text = run.recipe.read_text()
    run.recipe.rename("by_fit.yaml")
    for name in ("photos.tsv", "photos.val.txt"):
        Path(name).unlink()
    options = ["--minutes=0.01", "--image-size=96", "--backbone=small"]
    assert main(["init", "photos", *options]) == 0
    assert run.recipe.read_text() == text
    assert "photos.yaml: the recipe\nrun folder " in capsys.readouterr().out


@pytest.mark.end_to_end
def test_the_number_of_steps_is_measured_once(photos, monkeypatch):
    """Also when Ctrl-C stops the training, which then goes on."""
    step = DetectorModule.training_step

    def stop(module, batch, batch_idx):
        if module.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(module, batch, batch_idx)

    def call():
        overrides = {**QUICK, "trainer.val_check_interval": 50}
        return fit(detection="photos", **SMALL, overrides=overrides, resume="auto")

    before = process_state()
    monkeypatch.setattr(DetectorModule, "training_step", stop)
    with pytest.raises(KeyboardInterrupt, match=r"saved to outputs/.*/last\.ckpt; to go on, call"):
        call()
    assert process_state() == before
    (stopped,) = Path("outputs/photos").iterdir()
    assert read_checkpoint(stopped / "checkpoints/last.ckpt")["global_step"] == 4
    monkeypatch.setattr(DetectorModule, "training_step", step)
    monkeypatch.setattr(init_defaults, "measure_step", None)  # cannot be called
    run = call()
    steps = yaml.safe_load(run.recipe.read_text())["trainer"]["max_steps"]
    assert read_checkpoint(run.folder / "checkpoints/last.ckpt")["global_step"] == steps
    assert run.folder == stopped
    again = call()  # finished: trains nothing
    assert again.metrics == run.metrics
    assert run.metrics["step"] > 4


@pytest.mark.end_to_end
def test_a_dictionary_trains_as_its_file_does(photos):
    first = fit(detection=photos, **SMALL, output="recipe.yaml", overrides=SHORT)
    values = yaml.safe_load(first.recipe.read_text())
    second = fit(first.recipe, overrides=SHORT)
    assert second.folder != first.folder
    del first.metrics["seconds"], second.metrics["seconds"]
    assert second.metrics == first.metrics
    with pytest.raises(InputError, match=r"recipe\.yaml exists already; use another output"):
        fit(values)
    values["data"]["init_args"]["detection"]["init_args"]["root"] = photos  # a Path
    for key, value in SHORT.items():
        section, name = key.split(".")
        part = values[section]
        (part["init_args"] if section == "data" else part)[name] = value
    errors: list[BaseException] = []

    def train():
        try:
            runs.append(fit(values, output="mine.yaml"))
        except BaseException as error:
            errors.append(error)

    runs = [fit(values, output="mine.yaml")]
    thread = threading.Thread(target=train)  # may set no signal handlers
    thread.start()
    thread.join()
    assert not errors
    for run in runs:
        assert run.recipe == Path("mine.yaml")
        del run.metrics["seconds"]
        assert run.metrics == first.metrics


def test_errors_are_those_of_the_command_line(photos, capsys):
    Path("photos.yaml").write_text("model: {class_path: yolo_lightning.DetectorModule}\n")
    cases: dict[str, dict[str, Any]] = {
        "fit gone.yaml": {"recipe": "gone.yaml"},
        "fit photos.yaml --trainer.max_stepz=3": {
            "recipe": "photos.yaml",
            "overrides": {"trainer.max_stepz": 3},
        },
        "init gone": {"detection": "gone"},
        "init gone\x1b[2J": {"detection": "gone\x1b[2J"},
        "init photos": {"detection": "photos"},
        "init photos --minutes=-1": {"detection": "photos", "max_minutes": -1},
        "init photos --image-size=100": {"detection": "photos", "image_size": 100},
        "init photos --epochs=3": {"detection": "photos", "epochs": 3},
    }
    for words, arguments in cases.items():
        before = process_state()
        with pytest.raises(InputError) as caught:
            fit(**arguments)
        assert process_state() == before
        assert not capsys.readouterr().err
        assert main(words.split()) == 2
        printed = capsys.readouterr().err
        while "stop-signals" in str(threading.enumerate()):  # of the command line
            time.sleep(0.01)
        assert f"yolo-lightning: error: {caught.value}\n" == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"needs a recipe, or images with boxes: fit\(detection='photos/'\)"),
        ({"classification": "labels/"}, "needs a recipe, or images with boxes"),
        ({"recipe": "a.yaml", "max_minutes": 5}, "max_minutes: not with a recipe"),
        ({"recipe": {}, "detection": "b/", "flat": True}, "detection, flat: not with a recipe"),
        ({"recipe": "a.yaml", "output": "b.yaml"}, "output: not with a recipe"),
        ({"recipe": {"model": object()}}, "recipe: .*object; allowed in a dictionary"),
        ({"detection": "b/", "minutes": 5}, "minutes: no such argument; here it is max_minutes"),
        ({"recipe": "a.yaml", "resume": True}, "resume is True; allowed: 'auto', None"),
    ],
)
def test_arguments_that_exclude_each_other(workplace, arguments, message):
    with pytest.raises(InputError, match=message):
        fit(**arguments)
    assert not list(workplace.glob("*.yaml"))


def test_a_script_is_not_started_once_for_each_device(workplace):
    options = {**QUICK, "trainer.devices": 2}
    with pytest.raises(InputError, match=r"devices is 2.*torchrun --nproc-per-node=2 -m yolo_l"):
        fit(REPO / "recipes/quickstart.yaml", overrides=options)
    assert not list(workplace.rglob("outputs/*/*"))


def test_importing_fit_imports_nothing_heavy():
    code = (
        "import sys; from yolo_lightning import fit; "
        "print({'torch', 'lightning', 'jsonargparse', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True
    )
    assert done.stdout == "set()\n"
