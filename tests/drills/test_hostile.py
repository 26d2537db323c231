"""Hostile inputs: each is refused or named, within the time and memory of a sound input and more.

Each command runs in a fork of this process, in which everything is imported.
"""

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tests.drills.test_kills import IMPORTS
from tests.helpers import hostile_files
from tests.helpers.forked import Result, run_forked
from tests.helpers.hostile_inputs import (
    CASES,
    METRICS,
    SECRET,
    Place,
    fit,
    image_bytes,
    predict,
    shadowed,
    sync,
    tracked_fit,
)
from tests.helpers.images import write_image
from tests.helpers.tracked import fresh_store
from tests.helpers.tracking_outage import QUIET, start, wait_for_exit, write_recipe
from yolo_lightning.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MAX_SECONDS, MAX_MB = 2.0, 200.0  # more than the same command takes on a sound input
COMMANDS = ("check_data", "init", "anchors", "benchmark", "detect", "classify", "wordtree", "chain",
            "darknet", "export", "speed", "mlflow.sync", "mlflow.compare", "mlflow.ui")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Iterator[Path]:
    """Import all that the commands need, and train; return the run folder."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in (*IMPORTS, *(f"yolo_lightning.cli.commands.{name}" for name in COMMANDS)):
            import_module(name)
        write_recipe(folder, fresh_store(folder))
        wait_for_exit(start(folder, "--data.num_workers=0"), folder)
        (run,) = folder.glob("runs/*")
        yield run


@pytest.fixture
def place(tmp_path, trained) -> Place:
    for name in ("work", "victim/photos"):
        (tmp_path / name).mkdir(parents=True)
    fresh_store(tmp_path / "work")
    (tmp_path / "victim/secret.txt").write_text(f"{SECRET} = {SECRET}\n")
    (tmp_path / "victim/photos/one.jpg").write_bytes(b"photo")
    return Place(tmp_path / "work", tmp_path / "victim", tmp_path / "owned", trained)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return all files and folders but the indices that datasets get."""
    paths = (path for path in sorted(folder.rglob("*")) if ".yolo_lightning" not in path.parts)
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


def run(command: list[str] | Callable[[], int], folder: Path, timeout_s: float = 60) -> Result:
    function = command if callable(command) else (lambda: main(command))
    before = dict(os.environ)
    try:
        return run_forked(function, folder, folder.parent / "output.txt", timeout_s)
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- sound inputs

_limits: dict[str, tuple[float, float]] = {}


def _sound_dataset(place: Place) -> Path:
    return hostile_files.yolo(place.work)


SOUND: dict[str, Callable[[Place], list[str] | Callable[[], int]]] = {
    "fit": tracked_fit,
    "validate": lambda p: ["validate", *fit(p)[1:5], "--ckpt_path", str(p.ckpt)],
    "detect": lambda p: [
        "detect",
        str(p.ckpt),
        str(write_image(p.work / "x.jpg")),
        "--output",
        "o",
    ],
    "classify": lambda p: ["wordtree", "show", str(p.run / "tree.tsv")],
    "check-data": lambda p: ["check-data", str(_sound_dataset(p)), "--output", "o"],
    "init": lambda p: hostile_files.init(p.work, _sound_dataset(p)),
    "anchors": lambda p: ["anchors", str(_sound_dataset(p)), "--num", "1", "--output", "o"],
    "benchmark": lambda p: ["benchmark", str(_sound_dataset(p))],
    "wordtree": lambda p: ["wordtree", "show", str(p.run / "tree.tsv")],
    "mlflow": lambda p: sync(p, METRICS),
    "predict": lambda p: predict(p, [image_bytes(p)]),
    "dashboard": lambda p: shadowed(p, "notes.txt")[0],
}


def limits(
    command: list[str] | Callable[[], int], factory, trained: Path, again: bool = False
) -> tuple[float, float]:
    """Return seconds and MB of a command on a sound input, measured once, or `again`."""
    if isinstance(command, list):
        name, other = command[0], "wordtree"
    else:
        name, other = command.__name__, "predict"
    name = name if name in SOUND else other
    if again or name not in _limits:
        folder = factory.mktemp(name)
        for part in ("work", "victim"):
            (folder / part).mkdir()
        place = Place(folder / "work", folder / "victim", folder / "owned", trained)
        fresh_store(place.work)
        result = run(SOUND[name](place), place.work)
        assert result.code == 0, result.output[-3000:]
        _limits[name] = result.seconds, result.peak_mb
    return _limits[name]


# --- hostile inputs


def check(
    result: Result, sound: tuple[float, float], word: str, record_property, extra_s: float = 0
) -> None:
    seconds, peak_mb = result.seconds - sound[0] - extra_s, result.peak_mb - sound[1]
    record_property("hostile inputs: number", 1)
    record_property("hostile inputs: seconds", seconds)
    record_property("hostile inputs: MB", peak_mb)
    what = f"{seconds:+.1f} s, {peak_mb:+.0f} MB, code {result.code}: {result.output[-800:]}"
    assert result.code is not None, f"hangs: {what}"
    assert "Traceback" not in result.output, what
    assert SECRET not in result.output, f"shows a secret: {what}"
    assert not set(result.output) & {"\x1b", "\x9b", "\0"}, f"control characters: {what}"
    assert result.code in (0, 2), what
    assert word in result.output, f"does not name {word}: {what}"
    assert seconds <= MAX_SECONDS, what
    assert peak_mb <= MAX_MB, what


@pytest.mark.parametrize("name", CASES)
def test_hostile_input_is_refused(name, place, trained, tmp_path_factory, record_property):
    before = snapshot(place.victim)
    environment = dict(os.environ)
    try:
        command, word = CASES[name](place)
        sound = limits(command, tmp_path_factory, trained)
        result = run(command, place.work, sound[0] + 5 * MAX_SECONDS)
    finally:
        os.environ.clear()
        os.environ.update(environment)
    assert not place.owned.exists(), f"ran hostile code: {result.output[-800:]}"
    assert snapshot(place.victim) == before, f"changed files: {result.output[-800:]}"
    for path in (*place.work.rglob("*"), place.work.parent / "output.txt"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 100 << 20:
            assert SECRET.encode() not in path.read_bytes(), f"{path}: {result.output[-800:]}"
    if result.seconds > sound[0] + MAX_SECONDS:  # the machine may be busier now
        sound = limits(command, tmp_path_factory, trained, again=True)
    extra_s = 3 if name.startswith("server_") else 0  # the limit of an answer, see `server`
    check(result, sound, word, record_property, extra_s)


@pytest.mark.parametrize("name", hostile_files.CASES)
def test_hostile_text_file_is_refused(name, tmp_path, trained, tmp_path_factory, record_property):
    (tmp_path / "work").mkdir()
    command, word = hostile_files.CASES[name](tmp_path / "work")
    sound = limits(command, tmp_path_factory, trained)
    result = run(command, tmp_path / "work", sound[0] + 5 * MAX_SECONDS)
    if result.seconds > sound[0] + MAX_SECONDS:  # the machine may be busier now
        sound = limits(command, tmp_path_factory, trained, again=True)
    check(result, sound, word, record_property)
