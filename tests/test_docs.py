"""The pages: commands parse, files and links exist, blocks of Python and YAML are sound."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers import miniatures
from tests.helpers.commands import (
    FOLDERS,
    BadCommand,
    check,
    commands_of,
    fences,
    header_commands,
    inline_code,
)
from tests.helpers.paths import REPO
from tests.helpers.trees import BACKBONE, TREE
from yolo_lightning.cli.arguments import OTHER_COMMANDS, OTHER_OPTIONS
from yolo_lightning.cli.main import COMMANDS, main
from yolo_lightning.detector import DetectorModule
from yolo_lightning.export.darknet import build_checkpoint

RECIPES = sorted((REPO / "recipes").rglob("*.yaml"))
DOCS = sorted((REPO / "docs").glob("*.md"))
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "SECURITY.md", *DOCS]
LANGUAGES = {"sh", "text", "python", "yaml", "json", "bibtex"}
DIRECTIVES = {"{eval-rst}", "{hyper-parameters}"}  # of the site


def name_of(page: Path) -> str:
    return str(page.relative_to(REPO))


def broken_links(page: Path, text: str) -> list[str]:
    """Return the links of a page to files or headings that do not exist."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            broken.append(target)
    return broken


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def missing_files(text: str) -> list[str]:
    """Return the paths of this repository that a page names and that do not exist."""
    spans = [span for span in inline_code(text) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", span)]
    ours = [span for span in spans if "/" in span and span.split("/")[0] in FOLDERS]
    return [span for span in ours if not (REPO / span).exists()]


def unknown_names(text: str) -> list[str]:
    """Return the dotted names of this package that a page names and that do not exist."""
    unknown = []
    for name in sorted(set(re.findall(r"\byolo_lightning(?:\.[A-Za-z_]\w*)+", text))):
        parts = name.split(".")
        if parts[-1] == "py":
            continue
        for depth in range(len(parts), 0, -1):
            try:
                value: Any = importlib.import_module(".".join(parts[:depth]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[depth:]:
                value = getattr(value, attribute, None)
            if value is None:
                unknown.append(name)
            break
    return unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_parses(page):
    text = page.read_text(encoding="utf-8")
    failed = []
    for command in dict.fromkeys(commands_of(text)):
        try:
            check(command)
        except BadCommand as error:
            failed.append(f"{command}\n    {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_every_command_at_the_top_of_a_recipe_parses(recipe):
    commands = header_commands(recipe.read_text(encoding="utf-8"))
    started = f" --config {name_of(recipe)}"
    first = "test" if recipe.stem.startswith("test_") else "fit"
    assert any(command.startswith(f"yolo-lightning {first}{started}") for command in commands)
    for command in commands:
        check(command)


def test_commands_at_the_top_of_a_recipe_may_take_several_lines():
    text = "# A.\n#\n#   yolo-lightning fit --a 1 \\\n#     --b 2   one GPU\n#   make x\nmodel: 1\n"
    assert header_commands(text) == ["yolo-lightning fit --a 1 --b 2", "make x"]
    end = "seed_everything: 0\n#   make y\n"
    assert header_commands(text + end) == header_commands(text)


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_a_page_with_a_table_of_recipes_lists_every_recipe(page):
    text = (REPO / page).read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(recipes/[\w/]+\.yaml)`", text, re.M)
    assert sorted(listed) == [name_of(recipe) for recipe in RECIPES]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("yolo-lightning detect best.ckpt dog.jpg --no-such-option", "no-such-option"),
        ("yolo-lightning darknet import --weights w --ouput best.ckpt", "--output"),
        ("yolo-lightning mlflow compare --metrics-of val/AP", "--metrics-of"),
        ("yolo-lightning mlflow upload outputs", "upload"),
        ("yolo-lightning describe RECIPE", "describe"),
        ("yolo-lightning quickstart --model.lerning_rate 1", "lerning_rate"),
        ("yolo-lightning explain RECIPE --checkpoint CKPT --image N --data.sed 1", "sed"),
        ("yolo-lightning fit --config RECIPE --model.no_such_value 1", "no_such_value"),
        ("yolo-lightning fit --config RECIPE --trainer.devicse 8", "devicse"),
        ("yolo-lightning fit --config RECIPE --model.loss.box_selection nearest", "box_selection"),
        ("yolo-lightning fit --config recipes/gone.yaml", "no such file"),
        ("yolo-lightning test --config RECIPE --resume auto", "resume"),
        ("sbatch recipes/cluster/slurm.sbatch recipes/quickstart.yaml --trainer.nodes 2", "nodes"),
        ("torchrun -m yolo_lightning fit --config RECIPE --traner.devices 2", "traner"),
        ("yolo-lightning detect SOMETHING dog.jpg", "unknown placeholder"),
        ("make quickstrat", "no target"),
        ("python tests/helpers/gone.py", "no such file"),
        ("python tests/helpers/tracking_outage.py --onli kill", "--onli"),
        ("python -m tests.helpers.gone", "no module"),
        ("pytest tests/gone", "no such file"),
        ("pytest -m slowest", "unknown markers"),
        ("pip install '.[video,sound]'", "sound"),
        ("yolo-lightening fit", "unknown program"),
    ],
)
def test_a_command_that_would_not_start_is_found(command, reason):
    with pytest.raises(BadCommand) as caught:
        check(command)
    assert reason in str(caught.value)


def test_commands_are_found_in_blocks_and_in_code_spans():
    text = (
        "Run `make test`, `A=1 yolo-lightning fit\n--config RECIPE`, not `fit`.\n"
        "```sh\nmake lint   # style\nyolo-lightning detect best.ckpt \\\n  dog.jpg\n```\n"
        "```text\nmake nothing\n```\n"
    )
    assert list(commands_of(text)) == [
        "make lint   # style", "yolo-lightning detect best.ckpt dog.jpg", "make test",
        "A=1 yolo-lightning fit --config RECIPE",
    ]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_files_and_names_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    assert broken_links(page, text) == []
    assert missing_files(text) == []
    assert unknown_names(text) == []


def test_links_files_and_names_that_do_not_exist_are_found():
    page = REPO / "docs/README.md"
    links = "[a](gone.md), [b](data.md#gone), [c](data.md#formats), [d](../README.md)"
    assert broken_links(page, links) == ["gone.md", "data.md#gone"]
    assert missing_files("`tests/gone.py`, `tests/test_docs.py`, `val/AP`") == ["tests/gone.py"]
    names = "`yolo_lightning.datamodules.Gone`, `yolo_lightning.datamodules.VOCFolder`"
    assert unknown_names(names) == ["yolo_lightning.datamodules.Gone"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_blocks_name_their_language_and_are_sound(page):
    text = page.read_text(encoding="utf-8")
    opened = re.findall(r"^ *```(.*)$", text, re.M)[::2]
    assert {line.split()[0] for line in opened} <= LANGUAGES | DIRECTIVES
    for block in fences(text, "python"):
        compile(block, name_of(page), "exec")
    for block in fences(text, "yaml"):
        assert yaml.safe_load(block)


def test_the_index_lists_every_page():
    index = (REPO / "docs/README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", index))
    assert linked == {page.name for page in DOCS} - {"README.md"}


def test_the_page_of_commands_lists_every_command():
    page = (REPO / "docs/commands.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `yolo-lightning ([\w-]+)", page, re.M)) == set(COMMANDS)


@pytest.fixture
def best_checkpoint(tmp_path, monkeypatch):
    """Write best.ckpt, a detector that finds objects everywhere, into the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    model = DetectorModule(
        tree=TREE, anchors_wh_cell=[(1, 1), (2, 2)], backbone=BACKBONE, head_channels=0,
        passthrough_channels=0, image_size=96,
    )  # fmt: skip
    with torch.no_grad():
        bias = model.network.box_conv.bias
        assert bias is not None
        bias[4::5] = 4.0
    torch.save(build_checkpoint(model.eval(), {}), "best.ckpt")


@pytest.mark.parametrize("page", ["README.md", "docs/prediction.md"])
def test_detection_in_python_runs_as_written(page, best_checkpoint, capsys):
    miniatures.save(Path("dog.jpg"))
    (block,) = (
        block
        for block in fences((REPO / page).read_text(encoding="utf-8"), "python")
        if "from yolo_lightning import load" in block
    )
    exec(compile(block, page, "exec"), {})
    assert any(name in capsys.readouterr().out for _, _, name in TREE)


@pytest.mark.slow
def test_onnx_without_this_package_runs_as_written(best_checkpoint, capsys):
    pytest.importorskip("onnxruntime")
    miniatures.save(Path("photo.jpg"))
    page = (REPO / "docs/prediction.md").read_text(encoding="utf-8")
    (block,) = (block for block in fences(page, "python") if "onnxruntime" in block)
    assert main(["export", "best.ckpt"]) == 0
    capsys.readouterr()
    exec(compile(block, "docs/prediction.md", "exec"), {})
    assert any(name in capsys.readouterr().out for _, _, name in TREE)


def test_the_answers_to_names_of_other_programs_are_commands_of_ours():
    options = {*OTHER_OPTIONS.values(), "--model.pretrained best.ckpt"}
    check(f"yolo-lightning fit recipe.yaml {' '.join(options)}")
    for command in {*OTHER_COMMANDS.values(), "test recipe.yaml --ckpt_path best.ckpt"}:
        check(f"yolo-lightning {command}")
