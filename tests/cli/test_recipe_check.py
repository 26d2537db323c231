"""Recipes that would run code, exhaust memory or write elsewhere are rejected up front."""

import inspect
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import REPO
from yolo_lightning.cli.launch import check_command_line, split_allowed_modules
from yolo_lightning.cli.main import main
from yolo_lightning.cli.recipe_check import (
    _CLASS_KEYS,
    check_option,
    check_recipe,
    restrict_imports,
)
from yolo_lightning.errors import InputError

TOO_MANY = "more than 100,000 values, with aliases and references expanded"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10)
)
REFERENCE_BOMB = f"model:\n  init_args:\n    a0: {'x' * 600}\n" + "".join(
    f"    a{k}: {f'${{.a{k - 1}}}' * 10}\n" for k in range(1, 9)
)

# all of these would import `hostile`, except for the last ones, which exhaust memory or climb out
HOSTILE = {
    "tag that calls a function": (
        "data: !!python/object/apply:hostile.Class []\n",
        "line 1: tag 'tag:yaml.org,2002:python/object/apply:hostile.Class'",
    ),
    "custom tag": ("model: {a: !Class {x: 1}}\n", "line 1: tag '!Class'"),
    "class_path": (
        "model:\n  class_path: hostile.Class\n",
        "line 2: model.class_path names 'hostile.Class'; allowed: classes of yolo_lightning,",
    ),
    "nested class_path": (
        "data: {init_args: {detection: [{init_args: {}, class_path: hostile.Class}]}}\n",
        "data.init_args.detection.0.class_path names",
    ),
    "class_path in a dotted key": ("data.class_path: hostile.Class\n", "data.class_path names"),
    "class_path from a merge key": (
        "x: &x {class_path: hostile.Class}\nmodel: {<<: *x}\n",
        "class_path names 'hostile.Class'",
    ),
    "class_path given by a reference": (
        "model: {x: hostile.Class, class_path: '${.x}'}\n",
        "model.class_path is not a class name",
    ),
    "class name without class_path": (
        "trainer: {logger: hostile.Class}\n",
        "trainer.logger names 'hostile.Class'",
    ),
    "class name in a list": (
        "trainer:\n  callbacks+:\n    - yolo_lightning.callbacks.Any\n    - hostile.Class\n",
        "line 4: trainer.callbacks.1 names 'hostile.Class'",
    ),
    "class name given by a reference": (
        "model: {init_args: {tree: hostile.Class}}\ntrainer: {logger: '${..model.init_args.tree}'}",
        "trainer.logger names 'hostile.Class'",
    ),
    "class name composed of references": (
        "model: {x: hostile}\ntrainer: {logger: '${..model.x}.Class'}\n",
        "a class name cannot contain references",
    ),
    "class name as default of an environment variable": (
        "trainer: {logger: '${oc.env:NOT_SET_ANYWHERE,hostile.Class}'}\n",
        "trainer.logger names 'hostile.Class'",
    ),
    "class_path in YAML in a string": (
        "trainer: {logger: '{class_path: hostile.Class}'}\n",
        "trainer.logger.class_path names 'hostile.Class'",
    ),
    "class_path in YAML in a free-form mapping": (
        "trainer: {logger: {init_args: {tags: {a: '[{\"class_path\": \"hostile.Class\"}]'}}}}\n",
        "tags.a.0.class_path names",
    ),
    "resolver that imports": (
        "model: {init_args: {image_size: '${oc.coerce:hostile.Class,1}'}}\n",
        "allowed references: ${..key}, ${oc.env:NAME} and ${oc.env:NAME,default}",
    ),
    "resolver written with an escape": (
        'model: {init_args: {tree: "\\x24{oc.coerce:hostile.Class,1}"}}\n',
        "allowed references",
    ),
    "resolver nested in a reference": (
        "model: {init_args: {tree: '${oc.env:X,${oc.coerce:hostile.Class,1}}'}}\n",
        "allowed references",
    ),
    "function as a callback": (
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks.LambdaCallback\n"
        "      init_args: {on_fit_start: hostile.Class}\n",
        "trainer.callbacks.0.init_args.on_fit_start names 'hostile.Class'",
    ),
    "method that loads pickles": (
        "model: {class_path: lightning.pytorch.LightningModule.load_from_checkpoint,"
        " init_args: {checkpoint_path: hostile.ckpt}}\n",
        "which is not a class",
    ),
    "inclusion of another recipe": ("config: part.yaml\n", "a recipe cannot name another one"),
    "file as part of the recipe": ("data: part.yaml\n", "data names the file 'part.yaml'"),
    "URL as part of the recipe": ("data: memory://part.yaml\n", "a recipe cannot use URLs here"),
    "alias bomb": (BOMB, TOO_MANY),
    "reference bomb": (REFERENCE_BOMB, TOO_MANY),
    "alias of itself": ("model: &a [*a]\n", "an alias or a reference contains itself"),
    "too many aliases": ("a: &a 1\nb: [" + "*a, " * 101 + "]\n", "100 aliases"),
    "unclosed brackets": ("[" * 100_000, "40 levels"),
    "file that is too large": ("# " + "x" * 2**20, "larger than 1 MiB"),
    "output path with ..": (
        "trainer: {default_root_dir: outputs/../../elsewhere}\n",
        "default_root_dir is 'outputs/../../elsewhere'; an output path must not contain '..'",
    ),
    "file name with ..": (
        "trainer: {callbacks: {class_path: lightning.pytorch.callbacks.ModelCheckpoint,"
        " init_args: {filename: ../../x}}}\n",
        "an output path must not contain '..'",
    ),
    ".. from a reference": (
        "model: {x: ../up}\ntrainer: {default_root_dir: '${..model.x}'}\n",
        "an output path must not contain '..'",
    ),
    ".. composed of references": (
        "model: {x: .}\ntrainer: {default_root_dir: 'a/${..model.x}${..model.x}/b'}\n",
        "an output path must not contain '..'",
    ),
}  # fmt: skip


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Add a module that creates a file when it is imported; return the path of that file."""
    marker = tmp_path / "imported"
    (tmp_path / "hostile.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nclass Class:\n    pass\n"
    )
    (tmp_path / "part.yaml").write_text("class_path: hostile.Class\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile", raising=False)
    return marker


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipe_gives_one_message_and_runs_nothing(hostile, capsys, name):
    text, expected = HOSTILE[name]
    Path("recipe.yaml").write_text(text)
    assert main(["fit", "--config", "recipe.yaml"]) == 2
    message = capsys.readouterr().err
    assert expected in message, message
    assert "recipe.yaml" in message
    assert len(message) < 500
    assert not hostile.exists()
    assert "hostile" not in sys.modules


@pytest.mark.parametrize("command", ["check-data", "anchors", "batch", "explain", "quickstart"])
def test_every_command_that_reads_recipes_checks_them(hostile, capsys, command):
    Path("recipe.yaml").write_text("data: {class_path: hostile.Class}\n")
    args = ["--config", "recipe.yaml"] if command == "quickstart" else ["recipe.yaml"]
    assert main([command, *args]) == 2
    assert "data.class_path names 'hostile.Class'" in capsys.readouterr().err
    assert not hostile.exists()


def test_the_default_recipe_of_quickstart_is_checked(hostile, capsys):
    Path("recipes").mkdir()
    Path("recipes/quickstart.yaml").write_text("data: {class_path: hostile.Class}\n")
    assert main(["quickstart"]) == 2
    assert "recipes/quickstart.yaml, line 1: data.class_path names" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ["--trainer.logger=hostile.Class"],
        ["--model", "hostile.Class"],
        ["--trainer.callbacks+=hostile.Class"],
        ["--trainer.callbacks+", "hostile.Class"],
        ["--data.detection.class_path=hostile.Class"],
        ["--model.help", "hostile.Class"],
        ['--trainer.callbacks=[{"class_path": "hostile.Class"}]'],
        ['--trainer={"logger": "hostile.Class"}'],
        ["--trainer.logger=${oc.env:NOT_SET_ANYWHERE,hostile.Class}"],
        ["--model.image_size=${oc.coerce:hostile.Class,1}"],
        ["--data=part.yaml"],
        ["--trainer.logger", "part.yaml"],
    ],
    ids=" ".join,
)
def test_hostile_options_are_rejected(hostile, capsys, option):
    recipe = str(REPO / "recipes/quickstart.yaml")
    assert main(["fit", "--config", recipe, *option]) == 2
    message = capsys.readouterr().err
    assert "hostile.Class" in message
    assert not hostile.exists()


@pytest.mark.parametrize(
    "args",
    [["--config=bad.yaml"], ["-c", "bad.yaml"], ["-cbad.yaml"], ["-c=bad.yaml"],
     ["--conf", "bad.yaml"], ["--config", "good.yaml", "--config", "bad.yaml"]],
    ids=" ".join,
)  # fmt: skip
def test_recipes_are_checked_however_config_is_spelled(tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    Path("good.yaml").write_text("seed_everything: 1\n")
    Path("bad.yaml").write_text("model: {class_path: os.system}\n")
    with pytest.raises(InputError, match="model.class_path names 'os.system'"):
        check_command_line(args)


def test_the_parser_rejects_classes_of_unknown_keys(hostile, workplace, capsys):
    """Only the type of such a key marks its value as a class."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch.loggers import Logger

    restrict_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--anything", type=Logger)
    with pytest.raises(Exception, match="not allowed"):
        parser.parse_args(["--anything=hostile.Class"])
    assert not hostile.exists()
    values = parser.parse_args(["--anything=yolo_lightning.tracking.RunLogger"])
    assert values.anything.class_path == "yolo_lightning.tracking.RunLogger"


def test_only_the_environment_resolver_remains(hostile, monkeypatch):
    """Values of checkpoints reach the parser without a check of their text."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    restrict_imports()
    for name in ("coerce:hostile.Class,1", "decode:'[1]'", "create:{a: 1}", "select:a"):
        with pytest.raises(OmegaConfBaseException, match="Unsupported interpolation type"):
            OmegaConf.to_container(OmegaConf.create({"a": f"${{oc.{name}}}"}), resolve=True)
    assert not hostile.exists()
    monkeypatch.setenv("HERE", "there")
    config = OmegaConf.create({"a": "${oc.env:HERE}", "b": "${.a}"})
    assert OmegaConf.to_container(config, resolve=True) == {"a": "there", "b": "there"}


@pytest.mark.parametrize("recipe", sorted((REPO / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_repository_pass(recipe):
    values = check_recipe(recipe)
    sources = values["data"]["init_args"]
    if "detection" in sources or "classification" in sources:  # else the checkpoint's model
        assert values["model"]["class_path"].startswith("yolo_lightning.")
    assert values["trainer"]["num_nodes"] == 1


def test_harmless_recipes_and_options_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", "runs")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "wide: &wide {learning_rate: 0.1}\n"
        "model:\n  class_path: yolo_lightning.DetectorModule\n"
        "  init_args: {<<: *wide, tree: shapes.tsv, pretrained: ../weights/best.ckpt}\n"
        "data:\n  class_path: yolo_lightning.CombinedDataModule\n"
        "  init_args:\n    test:\n      class_path: yolo_lightning.datamodules.COCOJson\n"
        "      init_args: {annotations: ../test.json, mapping: {data: toy.car}}\n"
        "    detection:\n      class_path: VOCFolder\n      init_args: {root: '${oc.env:D,../v}'}\n"
        "trainer:\n  default_root_dir: ${oc.env:OUT,outputs}/run-${..seed_everything}\n"
        "  devices: ${oc.env:DEVICES,1}\n  strategy: ddp_find_unused_parameters_true\n"
        "  profiler: null\n  max_time: '00:01:00:00'\n"
        "  logger: {class_path: yolo_lightning.tracking.RunLogger, init_args: {"
        "experiment_name: a.b, tags: {model: v1.beta, note: 'a: b'}, tracking_uri: 'sqlite:///x.db'}}\n"
        "  callbacks:\n    - ModelCheckpoint\n"
        "    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "      init_args: {filename: best.v2, monitor: val.ap, mode: max}\n"
        "seed_everything: 3\n"
    )
    values = check_recipe(recipe)
    assert values["model"]["init_args"]["learning_rate"] == 0.1
    check_option("trainer.default_root_dir", "../outputs")
    check_option("data.detection.annotations", "train.json")
    check_option("trainer.callbacks+", "lightning.pytorch.callbacks.TQDMProgressBar")
    logger = '{"class_path": "yolo_lightning.tracking.RunLogger", "init_args": {"x": "a://b"}}'
    assert check_option("trainer.logger", logger)["init_args"] == {"x": "a://b"}


def test_duplicate_key_is_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer:\n  devices: 1\n  max_steps: 2\n  devices: 8\n")
    with pytest.raises(InputError, match="line 4: duplicate key 'devices'"):
        check_recipe(recipe)


def test_allowed_modules_match_whole_dotted_parts(hostile):
    recipe = Path("recipe.yaml")
    recipe.write_text("model: {class_path: mine.nets.make, init_args: {act: mine.f.relu}}\n")
    check_recipe(recipe, ["mine.nets"])
    for prefix in ("mine.net", "min", "mine.nets.makes"):
        with pytest.raises(InputError, match="names 'mine.nets.make'"):
            check_recipe(recipe, [prefix])
    recipe.write_text("model: {class_path: hostile.Class, init_args: {loss: os.system}}\n")
    with pytest.raises(InputError, match="init_args.loss names 'os.system'"):
        check_recipe(recipe, ["hostile"])


def test_allow_module_is_removed_from_the_command_line():
    rest, allowed = split_allowed_modules(
        ["fit", "--allow-module", "mine", "--config", "r.yaml", "--allow-module=yours.nets"]
    )
    assert rest == ["fit", "--config", "r.yaml"]
    assert allowed == ("mine", "yours.nets")
    for wrong in (["--allow-module"], ["--allow-module="], ["--allow-module", "a b"],
                  ["--allow-module=jsonargparse"]):  # fmt: skip
        with pytest.raises(InputError, match="expected a module such as"):
            split_allowed_modules(wrong)


def test_an_allowed_module_reaches_the_parser(hostile, capsys):
    """The parser imports the class, and then rejects it because it is not a model."""
    recipe = (REPO / "recipes/quickstart.yaml").read_text()
    Path("recipe.yaml").write_text(recipe.replace("yolo_lightning.DetectorModule", "hostile.Class"))
    assert main(["fit", "--config", "recipe.yaml", "--allow-module", "hostile"]) == 2
    assert "does not correspond to a subclass of LightningModule" in capsys.readouterr().err
    assert hostile.exists()


def test_only_the_size_of_a_dataset_yaml_is_checked(tmp_path):
    dataset = tmp_path / "data.yaml"
    dataset.write_text("path: ../coco\ntest: test.txt\nnames: {0: a, 0: b}\n")
    assert check_recipe(dataset, may_be_dataset=True) == {}
    with pytest.raises(InputError, match="test names 'test.txt'"):
        check_recipe(dataset)
    dataset.write_text(BOMB)
    with pytest.raises(InputError, match="100,000 values"):
        check_recipe(dataset, may_be_dataset=True)


def test_a_large_recipe_is_checked_quickly(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    names = ", ".join(f"[class-{k}, 'class {k}; a-b']" for k in range(24_000))
    recipe.write_text(f"model: {{init_args: {{tree: [{names}]}}}}\n")
    assert recipe.stat().st_size > 700_000
    started = time.process_time()
    check_recipe(recipe)
    assert time.process_time() - started < 4


def test_class_keys_contain_every_parameter_that_takes_a_class():
    from yolo_lightning import callbacks, datamodules, schedules
    from yolo_lightning.classifier import ClassifierModule
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.tracking.logger import RunLogger

    def is_own(value: object) -> bool:
        return inspect.isclass(value) and value.__module__ == schedules.__name__

    classes: list[Any] = [ClassifierModule, DetectorModule, RunLogger]
    classes += [getattr(datamodules, name) for name in datamodules.__all__]
    classes += [getattr(callbacks, name) for name in callbacks.__all__]
    classes += [value for value in vars(schedules).values() if is_own(value)]
    class_parameters = {
        name
        for cls in classes
        for name, parameter in inspect.signature(cls).parameters.items()
        if "yolo_lightning." in str(parameter.annotation) or "Callable" in str(parameter.annotation)
    }
    assert {
        "detection",
        "validation",
        "schedule",
        "loss",
        "detection_augmentation",
    } <= class_parameters
    assert class_parameters <= _CLASS_KEYS
