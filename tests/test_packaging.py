"""Layout, imports, and what a wheel holds."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import yolo_lightning
from tests.helpers.paths import REPO

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
MAPPED = PYPROJECT["tool"]["setuptools"]["package-dir"]


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
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])
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
        "constraints.txt",
    }  # fmt: skip


def test_a_wheel_installs_elsewhere_under_one_name(tmp_path):
    source = copy_without_links(tmp_path)
    build = (
        "from setuptools import build_meta; import sys; sys.argv = ['setup.py'];"
        f"print(build_meta.build_wheel({str(tmp_path)!r}))"
    )
    done = run(build, source)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"yolo_lightning"}
    assert "yolo_lightning/datamodules/combined.py" in names
    assert "yolo_lightning/callbacks/multi_scale.py" in names
    assert "yolo_lightning/py.typed" in names
    assert "yolo_lightning/tree/data/wordnet_nouns.xz" in names
    assert "yolo_lightning/tree/data/wordnet_licence.txt" in names
    assert "yolo_lightning/tree/data/reviewed_labels.tsv" in names
    assert "yolo_lightning/tree/data/imagenet_det_seen.tsv" in names
    code = (
        "import yolo_lightning.datamodules as d, yolo_lightning.callbacks as c; "
        "from yolo_lightning import CombinedDataModule, DetectorModule, WordTree; print(d.__file__)"
    )
    (tmp_path / "elsewhere").mkdir()
    done = run(code, tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().startswith(str(tmp_path / "site"))


@pytest.mark.parametrize("name", ["datamodules", "callbacks"])
def test_the_folders_refuse_to_be_imported_by_their_bare_names(name):
    done = run(f"import {name}", REPO)
    assert done.returncode != 0
    assert f"import it as 'yolo_lightning.{name}'" in done.stderr


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
import yolo_lightning.cli.recipe, yolo_lightning.cli.commands.quickstart, mlflow
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


def test_the_command_line_starts_light():
    code = """
import sys
from yolo_lightning.cli.main import main
main(["--help"])
for command in ("detect", "explain", "export", "speed"):
    try:
        main([command, "--help"])
    except SystemExit as leaving:
        assert leaving.code == 0
print(sorted({"torch", "lightning", "mlflow", "cv2", "numpy"} & set(sys.modules)))
"""
    done = run(code, REPO)
    assert done.stdout.strip().endswith("[]"), done.stdout[-500:] + done.stderr[-500:]


def imports_of(file: Path) -> set[str]:
    """Return what a file imports from the package; ``from package.module import name`` once."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "yolo_lightning":
            found |= {f"yolo_lightning.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "yolo_lightning"}


LEAVES = {
    "errors", "version", "batches", "boxes", "wordtree", "wordnet", "treebuild", "labels",
    "anchors", "images", "detections", "signals",
}  # fmt: skip
CORE = {
    "layers", "darknet19", "yolov2", "losses", "metrics", "evaluation", "schedules", "optimization",
    "pictures", "tracking", "checkpoints", "treemetrics", "treeplot", "darknet_files",
    "darknet_models", "pretrained", "plots", "mistakes", "report", "report_plots", "video", "graph",
    "boxtables", "cocometrics", "vocmetrics", "seen", "explanation", "timing", "curves",
    "report_tables", "checkpoint_io", "journal", "shipping", "shipper", "shipped_entries",
    "system_metrics", "mlflow_model", "provenance", "run_finding", "stores", "mlflow_names",
}  # fmt: skip
MODULES = {"detector", "classifier"}
ALLOWED = dict.fromkeys(LEAVES, LEAVES) | dict.fromkeys(CORE, LEAVES | CORE)
ALLOWED |= {
    "detector": LEAVES | CORE,
    "classifier": LEAVES | CORE,
    "loading": LEAVES | CORE | MODULES,
    "recipe_errors": {"errors"},
    "recipe_check": {"errors"},
    "preflight": {"errors", "recipe_check"},
    "__init__": {"version", "errors", "wordtree", "loading", "datamodules", *MODULES},
    "__main__": {"errors", "signals", "recipe_check", "preflight", "__init__"},
    "runs": {"errors", "checkpoints", "checkpoint_io", "journal"},
    "cli": LEAVES | CORE | {"recipe_errors", "preflight", "callbacks", "datamodules", "runs"},
    "datamodules": LEAVES | {"datamodules"},
    "served_model": LEAVES | CORE | MODULES | {"loading", "commands"},
    "callbacks": {
        "batches",
        "checkpoint_io",
        "checkpoints",
        "detections",
        "errors",
        "evaluation",
        "images",
        "journal",
        "mlflow_model",
        "pictures",
        "provenance",
        "report",
        "signals",
        "stores",
        "tracking",
        "callbacks",
    },
    "commands": LEAVES
    | CORE
    | MODULES
    | {"cli", "runs", "callbacks", "datamodules", "loading", "preflight"},
}


def module_of(name: str) -> str:
    """Return the part of the package that an import reaches; a public name counts as its module."""
    part = (name.split(".") + ["__init__"])[1]
    return yolo_lightning._HOME[part].split(".")[1] if part in yolo_lightning._HOME else part


def test_imports_point_one_way():
    places = {file: file.stem for file in (REPO / "yolo_lightning").glob("*.py")}
    for folder in ("datamodules", "callbacks"):
        places |= dict.fromkeys((REPO / folder).glob("*.py"), folder)
    places |= dict.fromkeys((REPO / "yolo_lightning/commands").glob("*.py"), "commands")
    for file, place in places.items():
        assert place in ALLOWED, f"say in this test what {file.name} may import"
        used = {module_of(name) for name in imports_of(file)} - {place}
        names = used - {"__init__", "__version__"}
        assert names <= ALLOWED[place], f"{file} imports {names - ALLOWED[place]}"


def test_albumentations_is_used_in_one_file_only():
    users = [
        file.name
        for folder in ("yolo_lightning", "datamodules", "callbacks")
        for file in (REPO / folder).glob("*.py")
        if "import albumentations" in file.read_text() or "from albumentations" in file.read_text()
    ]
    assert users == ["transforms.py"]
