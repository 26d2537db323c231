"""Layout, imports, and what a wheel holds."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import yolo_lightning
from tests.helpers import miniatures, structure
from tests.helpers.paths import REPO
from tests.helpers.recipes import TINY

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
MAPPED = PYPROJECT["tool"]["setuptools"]["package-dir"]
RECIPES = "yolo_lightning.recipes"  # data alone


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def copy_without_links(folder: Path) -> Path:
    """Copy the project as git lays it out where core.symlinks is false: links are small texts."""
    source = folder / "source"
    names = (".git", ".venv", "outputs", "*.egg-info", "build", "mlruns", ".*_cache")
    shutil.copytree(REPO, source, ignore=shutil.ignore_patterns(*names), symlinks=True)
    for name in ("datamodules", "callbacks"):
        link = source / "yolo_lightning" / name
        if link.is_symlink():
            link.unlink()
            link.write_text(f"../{name}")
    return source


def test_the_package_list_is_what_the_disk_holds():
    roots = {"yolo_lightning": REPO / "yolo_lightning"}
    roots |= {name: REPO / folder for name, folder in MAPPED.items() if name != "yolo_lightning"}
    found = set()
    for name, root in roots.items():
        for init in root.rglob("__init__.py"):
            parts = init.parent.relative_to(root).parts
            if not any((root / Path(*parts[: k + 1])).is_symlink() for k in range(len(parts))):
                found.add(".".join((name, *parts)))
    assert found | {RECIPES} == set(PYPROJECT["tool"]["setuptools"]["packages"])
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"][RECIPES]
    packed = {path for pattern in patterns for path in (REPO / MAPPED[RECIPES]).glob(pattern)}
    assert packed == {path for path in (REPO / "recipes").rglob("*") if path.is_file()}
    for folder in ("datamodules", "callbacks"):
        assert not [p for p in (REPO / folder).iterdir() if p.is_dir() and p.name != "__pycache__"]
        link = REPO / "yolo_lightning" / folder
        target = os.readlink(link) if link.is_symlink() else link.read_text()
        assert target == f"../{folder}"


def test_the_top_level_is_the_agreed_one():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=False
    ).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked if not name.startswith(".")}
    assert top <= {
        "yolo_lightning", "recipes", "datamodules", "callbacks", "tests", "pyproject.toml",
        "README.md", "Makefile", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "docs",
        "SECURITY.md", "constraints.txt",
    }  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the source distribution as for a release."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    source = copy_without_links(folder)
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A folder with the wheel installed, without network."""
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    folder = wheel.parent / "site"
    done = subprocess.run(
        [*install, str(folder), str(wheel)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def run_installed(site: Path, *args: str) -> str:
    """Run the installed command in the working folder, and return its output."""
    done = subprocess.run(
        [str(site / "bin/yolo-lightning"), *args],
        env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_wheel_installs_elsewhere_under_one_name(wheel, site, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"yolo_lightning"}
    assert "yolo_lightning/datamodules/combined.py" in names
    assert "yolo_lightning/callbacks/multi_scale.py" in names
    assert "yolo_lightning/py.typed" in names
    assert "yolo_lightning/tree/data/wordnet_nouns.xz" in names
    assert "yolo_lightning/tree/data/wordnet_licence.txt" in names
    assert "yolo_lightning/tree/data/reviewed_labels.tsv" in names
    assert "yolo_lightning/tree/data/imagenet_det_seen.tsv" in names
    assert "yolo_lightning/cli/commands/recipe_template.yaml" in names
    packed = {name.removeprefix("yolo_lightning/") for name in names if "/recipes/" in name}
    files = {str(path.relative_to(REPO)) for path in (REPO / "recipes").rglob("*.*")}
    assert packed == files
    code = (
        "import yolo_lightning.datamodules as d, yolo_lightning.callbacks as c; "
        "from yolo_lightning import CombinedDataModule, DetectorModule, WordTree; print(d.__file__)"
    )
    done = run(code, tmp_path, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().startswith(str(site))


@pytest.mark.slow
def test_an_installed_wheel_trains_and_detects_in_an_empty_folder(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search("^quickstart +The paper's claim", run_installed(site, "recipes"), re.M)
    run_installed(site, "recipes", "copy", "quickstart")
    recipe = "recipes/quickstart.yaml"
    assert Path(recipe).read_text() == (REPO / recipe).read_text()
    run_installed(site, "fit", recipe, *TINY)
    (last,) = tmp_path.glob("outputs/quickstart/*/checkpoints/last.ckpt")
    miniatures.save(Path("photo.jpg"))
    run_installed(site, "detect", str(last), "photo.jpg", "--output", "found")
    (image,) = json.loads(Path("found/detections.json").read_text())["images"]
    assert image["file_name"] == "photo.jpg"
    run_installed(site, "recipes", "copy", "cluster", "mine")
    assert os.access("mine/cluster/torchrun.sh", os.X_OK)


@pytest.mark.slow
def test_an_installed_wheel_trains_both_ways_in_an_empty_folder(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run_installed(site, "quickstart", *TINY)
    recipe = site / "yolo_lightning/recipes/quickstart.yaml"
    assert f"joint training: yolo-lightning fit --config {recipe} " in output
    assert f"dashboard  {site}/bin/yolo-lightning mlflow ui\n" in output
    assert (tmp_path / "outputs/quickstart/predictions.png").is_file()


def test_no_module_of_the_working_folder_is_imported(tmp_path):
    """As `python -m` would; `torchrun -m` and `srun python -m` too."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('a stranger')\n")
    (tmp_path / "a.yaml").write_text("model: {class_path: os.system}\n")
    done = subprocess.run(
        [sys.executable, "-m", "yolo_lightning", "fit", "--config", "a.yaml"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "model.class_path names 'os.system'" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("name", ["datamodules", "callbacks"])
def test_the_folders_refuse_to_be_imported_by_their_bare_names(name):
    done = run(f"import {name}", REPO)
    assert done.returncode != 0
    assert f"import it as 'yolo_lightning.{name}'" in done.stderr


@pytest.mark.end_to_end
def test_a_checkout_without_symbolic_links_works_once_installed(tmp_path):
    source = copy_without_links(tmp_path)
    build = (
        "from setuptools import build_meta; import sys; sys.argv = ['setup.py'];"
        f"print(build_meta.build_editable({str(tmp_path)!r}))"
    )
    done = run(build, source)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import site; site.addsitedir({str(tmp_path / 'site')!r}); import importlib.util as u; "
        "print(u.find_spec('yolo_lightning.datamodules').origin)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == str(source / "datamodules/__init__.py"), done.stderr[-2000:]


@pytest.mark.end_to_end
def test_importing_reaches_no_network_and_sets_the_switches(tmp_path):
    code = """
import socket, os
reached = []
def refuse(*args, **kwargs):
    reached.append(args)  # an exception alone would die unseen in a thread
    raise OSError("no network here")
socket.socket.connect = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
import yolo_lightning
from yolo_lightning import CombinedDataModule, DetectorModule, WordTree
import yolo_lightning.cli.recipe, yolo_lightning.cli.commands.quickstart, mlflow, albumentations
from yolo_lightning.tracking.logger import RunLogger
RunLogger("x").log_metrics({"a": 1.0}, 0)
import time; time.sleep(2.0)
assert not reached, reached
assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
print("quiet")
"""
    environment = {"NO_ALBUMENTATIONS_UPDATE": "", "MLFLOW_DISABLE_TELEMETRY": ""}
    clean = {k: v for k, v in os.environ.items() if k not in environment}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**clean, "PYTHONPATH": str(REPO)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.stdout.strip().endswith("quiet"), done.stdout + done.stderr[-2000:]


def test_help_imports_nothing_heavy():
    code = """
import sys
from yolo_lightning.cli.main import COMMANDS, main
from yolo_lightning.cli.commands import mlflow
heavy = {"torch", "lightning", "jsonargparse", "mlflow", "cv2", "pandas"}
# fit shows the options of Lightning's own parser
commands = [[name] for name in COMMANDS if name != "fit"]
commands += [["mlflow", name] for name in mlflow.COMMANDS]
commands += [["wordtree", "build"], ["darknet", "import"]]
for command in commands:
    try:
        main([*command, "--help"])
    except SystemExit as leaving:
        assert leaving.code == 0
    assert not heavy & set(sys.modules), (command, heavy & set(sys.modules))
print(len(commands), "light")
"""
    done = run(code, REPO)
    assert done.stdout.strip().endswith(" light"), done.stdout[-500:] + done.stderr[-500:]


def test_a_wrong_recipe_is_refused_before_what_only_a_training_needs(tmp_path):
    text = (REPO / "recipes" / "quickstart.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("learning_rate:", "learnin_rate:"))
    code = """
import gc, sys
from yolo_lightning.cli.main import main
assert main(["fit", "wrong.yaml"]) == 2
print(sorted({"albumentations", "mlflow", "pandas"} & set(sys.modules)), gc.isenabled())
"""
    done = run(code, tmp_path, PYTHONPATH=str(REPO))
    assert done.stdout.strip() == "[] True", done.stdout[-500:] + done.stderr[-500:]
    assert "did you mean 'learning_rate'" in done.stderr


# each part of the library may import the parts of the rows above its own, and no others
LAYERS = [
    {"errors", "version", "batches", "boxes", "signals", "memory"},
    {"tree", "models", "schedules"},
    {"images"},
    {"losses", "detections", "darknet", "datamodules"},
    {"checkpoints", "visualization"},
    {"evaluation", "explain", "training_module"},
    {"detector", "classifier"},
    {"inference", "export"},
    {"serving"},
    {"tracking"},
    {"callbacks"},
    {"cli"},
    {"__init__", "__main__"},
]


def test_imports_point_one_way():
    modules = structure.modules_of(REPO)
    public = {f"yolo_lightning.{name}": home for name, home in yolo_lightning._MODULES.items()}
    public["yolo_lightning.__version__"] = "yolo_lightning.version"
    edges = structure.file_edges(modules, public)
    found = structure.part_edges(edges)
    assert set(found) == set().union(*LAYERS), "say in this test what the new part may import"
    below: set[str] = set()
    for layer in LAYERS:
        for part in layer:
            assert found[part] <= below, f"{part} imports {sorted(found[part] - below)}"
        below |= layer
    assert len(modules) > 100
    # what __init__ imports are public names, on their first use
    assert sum(len(parts) for part, parts in found.items() if part != "__init__") <= 130


def test_files_import_each_other_in_no_cycle():
    edges = structure.file_edges(structure.modules_of(REPO))
    inner = {name: targets - {"yolo_lightning"} for name, targets in edges.items()}
    del inner["yolo_lightning"]
    assert min(structure.levels_of(inner).values()) == 0
    with pytest.raises(ValueError, match="cycle: a -> b -> a"):
        structure.levels_of({"a": {"b"}, "b": {"a"}, "c": {"a"}})


def test_albumentations_is_used_in_one_file_only():
    users = [
        name
        for name, file in structure.modules_of(REPO).items()
        if "import albumentations" in file.read_text() or "from albumentations" in file.read_text()
    ]
    assert users == ["yolo_lightning.datamodules.transforms"]
