"""Recipes that would run code, exhaust memory or write elsewhere are rejected up front."""

import inspect
import re
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, ForwardRef, TypeVar, get_args, get_origin, get_type_hints

import pytest
import yaml

from tests.helpers.paths import REPO
from tests.helpers.recipes import quickstart_values
from yolo_lightning.cli.commands.quickstart import comparison
from yolo_lightning.cli.launch import check_command_line, option_values, split_allowed
from yolo_lightning.cli.main import _check_arguments, main
from yolo_lightning.cli.recipe_check import check_recipe
from yolo_lightning.cli.recipe_policy import (
    CLASSES,
    SLOTS,
    allow,
    check_values,
    may_read,
    restrict_parser,
)
from yolo_lightning.errors import InputError

TOO_MANY = "more than 100,000 values, with aliases and references expanded"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 10)
)
REFERENCE_BOMB = f"model:\n  init_args:\n    a0: {'x' * 600}\n" + "".join(
    f"    a{k}: {f'${{.a{k - 1}}}' * 10}\n" for k in range(1, 9)
)

# all of these would import `hostile`, except for the last ones, which exhaust memory
HOSTILE = {
    "tag that calls a function": (
        "data: !!python/object/apply:hostile.Class []\n",
        ":1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply",
    ),
    "custom tag": (
        "model: {a: !Class {x: 1}}\n",
        ":1: could not determine a constructor for the tag '!Class'",
    ),
    "class_path": (
        "model:\n  class_path: hostile.Class\n",
        ":2: model.class_path names 'hostile.Class'; allowed: classes of yolo_lightning,",
    ),
    "nested class_path": (
        "data: {init_args: {detection: [{init_args: {}, class_path: hostile.Class}]}}\n",
        "data.init_args.detection.0.class_path names",
    ),
    "class_path in a dotted key": ("data.class_path: hostile.Class\n", "data.class_path names"),
    "class_path from a merge key": (
        "model: {<<: {class_path: hostile.Class}}\n",
        ":1: could not determine a constructor for the tag 'tag:yaml.org,2002:merge'",
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
        "trainer:\n  callbacks+:\n    - yolo_lightning.callbacks.Preemption\n    - hostile.Class\n",
        "trainer.callbacks names 'hostile.Class'",
    ),
    "class name given by a reference": (
        "ckpt_path: hostile.Class\ntrainer: {logger: '${..ckpt_path}'}",
        "trainer.logger names 'hostile.Class'",
    ),
    "class name composed of references": (
        "ckpt_path: hostile\ntrainer: {logger: '${..ckpt_path}.Class'}\n",
        "trainer.logger names 'hostile.Class'",
    ),
    "class name as default of an environment variable": (
        "trainer: {logger: '${oc.env:NO_DATA,hostile.Class}'}\n",
        "trainer.logger names 'hostile.Class'",
    ),
    "class_path in YAML in a string": (
        "trainer: {logger: '{class_path: hostile.Class}'}\n",
        "trainer.logger names 'hostile.Class'",
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
        "trainer:\n  callbacks:\n    - class_path: lightning.pytorch.callbacks."
        "StochasticWeightAveraging\n      init_args: {swa_lrs: 0.1, avg_fn: hostile.Class}\n",
        "avg_fn names 'hostile.Class'",
    ),
    "method that loads pickles": (
        "model: {class_path: lightning.pytorch.LightningModule.load_from_checkpoint,"
        " init_args: {checkpoint_path: hostile.ckpt}}\n",
        "model.class_path names 'lightning.pytorch.LightningModule.load_from_checkpoint'",
    ),
    "method that loads pickles, in YAML in a string": (
        "model: '{class_path: yolo_lightning.DetectorModule.load_from_checkpoint}'\n",
        "model names 'lightning.pytorch.core.module.LightningModule.load_from_checkpoint'",
    ),
    "method of a class as a callback": (
        "trainer: {logger: yolo_lightning.DetectorModule.load_from_checkpoint}\n",
        "trainer.logger names 'lightning.pytorch.",
    ),
    "class that is imported by an allowed module": (
        "trainer: {logger: yolo_lightning.callbacks.run_record.RunRecord}\n",
        "trainer.logger names 'yolo_lightning.callbacks.run_record.RunRecord'",
    ),
    "inclusion of another recipe": ("config: part.yaml\n", ":1: config names another recipe"),
    "file as part of the recipe": ("data: part.yaml\n", "data names 'part.yaml'"),
    "file as arguments of a class": (
        "data: {class_path: CombinedDataModule, init_args: part.yaml}\n",
        "data",
    ),
    "URL as part of the recipe": ("data: memory://part.yaml\n", "data: Unexpected import path"),
    "alias bomb": (BOMB, TOO_MANY),
    "reference bomb": (REFERENCE_BOMB, TOO_MANY),
    "alias of itself": ("model: &a [*a]\n", "is too deep; allowed: 40 levels"),
    "too many keys": ("\n".join(f"k{k}: 1" for k in range(60_000)), TOO_MANY),
    "aliases of a long text": (f"a: &a {'x' * 99_000}\nb: [" + "*a, " * 90 + "]\n", TOO_MANY),
    "references in a circle": ("a: ${b}\nb: ${a}\n", TOO_MANY),
    "merge by a tag": (
        "model: {!!merge x: {class_path: hostile.Class}}\n",
        ":1: could not determine a constructor for the tag 'tag:yaml.org,2002:merge'",
    ),
    "reference to one of two values": ("a.b: 1\na: {b: 2}\n", ":2: duplicate key 'b'"),
    "too deep": ("a: " + "[" * 41 + "]" * 41, "is too deep; allowed: 40 levels"),
    "value that is no truth value": ("a: !!bool maybe\n", "recipe.yaml: 'maybe'"),
    "number without digits": ("a: !!int ''\n", "recipe.yaml: string index out of range"),
    "unclosed brackets": ("[" * 100_000, ":1: too large; allowed: 200,000 values, 200 levels"),
    "file that is too large": ("# " + "x" * 2**20, "1,048,578 bytes; allowed: 1,048,576"),
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


def test_the_recipe_of_quickstart_is_that_of_the_package(hostile, monkeypatch):
    Path("recipes").mkdir()
    Path("recipes/quickstart.yaml").write_text("data: {class_path: hostile.Class}\n")
    started: list[Any] = []
    monkeypatch.setattr(comparison, "compare", lambda *args: started.append(args))
    assert main(["quickstart", "--seed_everything=1"]) == 0
    recipe = str(REPO / "recipes/quickstart.yaml")
    assert started == [(recipe, ["--seed_everything=1"], Path("outputs/quickstart"))]


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
        ["--trainer.logger=${oc.env:NO_DATA,hostile.Class}"],
    ],
    ids=" ".join,
)
def test_hostile_options_are_rejected(hostile, capsys, option):
    recipe = str(REPO / "recipes/quickstart.yaml")
    assert main(["fit", "--config", recipe, *option]) == 2
    message = capsys.readouterr().err
    assert "names 'hostile.Class'" in message
    assert "--allow-module hostile" in message
    assert not hostile.exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (["--model.image_size=${oc.coerce:hostile.Class,1}"], "Unsupported interpolation type"),
        (["--data=part.yaml"], "--data: a recipe names its data"),
        (["--trainer.logger", "part.yaml"], "trainer.logger names 'part.yaml'"),
    ],
)
def test_options_run_no_resolver_and_read_no_file(hostile, capsys, option, expected):
    recipe = str(REPO / "recipes/quickstart.yaml")
    assert main(["fit", "--config", recipe, *option]) == 2
    assert expected in capsys.readouterr().err
    assert not hostile.exists()


@pytest.mark.parametrize(
    "args",
    [["--config=bad.yaml"], ["-c", "bad.yaml"], ["-cbad.yaml"], ["-c=bad.yaml"],
     ["--config", "good.yaml", "--config", "bad.yaml"]],
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

    restrict_parser()
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

    restrict_parser()
    for name in ("coerce:hostile.Class,1", "decode:'[1]'", "create:{a: 1}", "select:a"):
        with pytest.raises(OmegaConfBaseException, match="Unsupported interpolation type"):
            OmegaConf.to_container(OmegaConf.create({"a": f"${{oc.{name}}}"}), resolve=True)
    assert not hostile.exists()
    monkeypatch.setenv("HERE_DATA", "there")
    config = OmegaConf.create({"a": "${oc.env:HERE_DATA}", "b": "${.a}"})
    assert OmegaConf.to_container(config, resolve=True) == {"a": "there", "b": "there"}


@pytest.mark.parametrize("recipe", sorted((REPO / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_of_the_repository_pass(recipe):
    values = check_recipe(recipe)
    sources = values["data"]["init_args"]
    if "detection" in sources or "classification" in sources:  # else the checkpoint's model
        assert values["model"]["class_path"].startswith("yolo_lightning.")
    assert values["trainer"]["num_nodes"] == 1


def test_harmless_recipes_and_options_pass(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "rate: &rate 0.2\nsizes: &sizes [1, 2]\nother: *sizes\n"
        "model:\n  class_path: yolo_lightning.DetectorModule\n"
        "  init_args: {learning_rate: *rate, tree: shapes.tsv, pretrained: ../weights/best.ckpt}\n"
        "data:\n  class_path: yolo_lightning.CombinedDataModule\n"
        "  init_args:\n    test:\n      class_path: yolo_lightning.datamodules.COCOJson\n"
        "      init_args: {annotations: ../test.json, mapping: {data: toy.car}}\n"
        "    detection:\n      class_path: VOCFolder\n"
        "      init_args: {root: '${oc.env:D_DATA,../v}'}\n"
        "trainer:\n  default_root_dir: ${oc.env:O_DATA,outputs}/run-${..seed_everything}\n"
        "  devices: 1\n  strategy: ddp_find_unused_parameters_true\n"
        "  profiler: null\n  max_time: '00:01:00:00'\n"
        "  logger: {class_path: yolo_lightning.tracking.RunLogger, init_args: {"
        "experiment_name: a.b, tags: {model: v1.beta, note: 'a: b'}, tracking_uri: 'sqlite:///x.db'}}\n"
        "  callbacks:\n    - ModelCheckpoint\n"
        "    - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "      init_args: {filename: best.v2, monitor: val.ap, mode: max}\n"
        "seed_everything: 3\n"
    )
    values = check_recipe(recipe)
    assert values["model"]["init_args"]["learning_rate"] == 0.2
    logger = '{"class_path": "yolo_lightning.tracking.RunLogger", "init_args": {"x": "a://b"}}'
    options = option_values([f"--trainer.logger={logger}", "--trainer.devices", "2", "--y={"])
    assert options["trainer.logger.init_args.x"] == "a://b"
    assert (options["trainer.devices"], options["y"]) == (2, "{")


def test_duplicate_key_is_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer:\n  devices: 1\n  max_steps: 2\n  devices: 8\n")
    with pytest.raises(InputError, match=":4: duplicate key 'devices'"):
        check_recipe(recipe)


def test_allowed_modules_match_whole_dotted_parts(hostile):
    recipe = Path("recipe.yaml")
    inner = "{x: {class_path: mine.nets.A}}"
    recipe.write_text(f"model: {{class_path: mine.nets.make, init_args: {inner}}}")
    check_recipe(recipe, ["mine.nets"])
    for prefix in ("mine.net", "min", "mine.nets.makes"):
        with pytest.raises(InputError, match="names 'mine.nets.make'"):
            check_recipe(recipe, [prefix])


def test_permissions_are_removed_from_the_command_line():
    options = ["--config", "r.yaml", "--model.x", "-1", "--trainer.max_steps=3", "y"]
    rest, modules, variables = split_allowed(
        ["fit", "--allow-module", "mine", *options, "--allow-module=yours.nets",
         "--allow-env", "A", "--allow-env=B"]
    )  # fmt: skip
    assert rest == ["fit", *options]
    assert (modules, variables) == (["mine", "yours.nets"], ["A", "B"])
    for wrong in (["--allow-module="], ["--allow-module", "a b"], ["--allow-module=jsonargparse"],
                  ["--allow-env", "*"], ["--allow-env=A.B"]):  # fmt: skip
        with pytest.raises(InputError, match="expected a (module|variable) such as"):
            split_allowed(wrong)
    with pytest.raises(InputError, match="--allow-module: expected one argument"):
        split_allowed(["--allow-module"])


def test_an_allowed_module_reaches_the_parser(hostile, capsys, monkeypatch):
    """The parser imports the class, and then rejects it because it is not a model."""
    monkeypatch.delitem(sys.modules, "permitted", raising=False)
    Path("permitted.py").write_text(Path("hostile.py").read_text())
    recipe = (REPO / "recipes/quickstart.yaml").read_text()
    recipe = recipe.replace("yolo_lightning.DetectorModule", "permitted.Class")
    Path("recipe.yaml").write_text(recipe)
    assert main(["fit", "--config", "recipe.yaml", "--allow-module", "permitted"]) == 2
    assert "does not correspond to a subclass of LightningModule" in capsys.readouterr().err
    assert hostile.exists()


def test_only_the_size_of_a_dataset_yaml_is_checked(tmp_path):
    dataset = tmp_path / "data.yaml"
    dataset.write_text("path: ../coco\ntest: test.txt\nnames: {0: a, 0: b}\n")
    assert check_recipe(dataset, may_be_dataset=True) == {}
    with pytest.raises(InputError, match="duplicate key '0'"):
        check_recipe(dataset)
    dataset.write_text("names: " + "[" * 201)
    with pytest.raises(InputError, match="data.yaml:1: too large"):
        check_recipe(dataset, may_be_dataset=True)


def test_a_large_recipe_is_checked_quickly(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    lists = "\n".join(f"k{k}: [{', '.join(['class name; a-b'] * 500)}]" for k in range(96))
    recipe.write_text(f"model: {{}}\n{lists}\n")
    assert recipe.stat().st_size > 700_000
    started = time.process_time()
    check_recipe(recipe)
    assert time.process_time() - started < 4


@pytest.mark.parametrize(("item", "limit"), [("a", 500), ("[conv, 8]", 150)])
def test_a_list_is_as_long_as_the_parser_can_read_in_seconds(tmp_path, item, limit):
    recipe = tmp_path / "recipe.yaml"
    for number in (limit, limit + 1):
        recipe.write_text(f"model: {{init_args: {{tree: [{', '.join([item] * number)}]}}}}\n")
        if number == limit:
            check_recipe(recipe)
    with pytest.raises(InputError, match=rf":1: model.init_args.tree has {limit + 1} items"):
        check_recipe(recipe)


# --- slots


def own_classes() -> dict[str, type]:
    return {
        f"{module}.{name}": getattr(import_module(module), name)
        for module, names in CLASSES.items()
        if module.startswith("yolo_lightning")
        for name in names
    }


def parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all that it contains."""
    yield annotation
    for argument in get_args(annotation):
        yield from parts(argument)


def parameters(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield name and annotation of the parameters that the parser offers for a class."""
    hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    for name in inspect.signature(cls).parameters:
        yield name, hints[name]


@pytest.mark.parametrize("name", sorted(own_classes()))
def test_no_parameter_of_a_recipe_takes_any_value(name):
    """Where a value may be anything, it may be a class."""
    for parameter, annotation in parameters(own_classes()[name]):
        for part in parts(annotation):
            assert part not in (Any, object, dict, list, tuple, Callable), parameter
            assert get_origin(part) is not Callable, parameter
            assert not isinstance(part, TypeVar | ForwardRef), parameter


def test_slots_are_the_parameters_that_take_classes():
    import lightning.pytorch as pl

    def is_slot(annotation: Any) -> bool:
        plain = (str, int, float, bool, Path, type(None), timedelta)
        return any(
            inspect.isclass(part) and part not in plain and get_origin(part) is None
            for part in parts(annotation)
        )

    expected = {"model", "data"}
    for cls in own_classes().values():
        section = "data" if issubclass(cls, pl.LightningDataModule) else "model"
        if issubclass(cls, pl.LightningDataModule | pl.LightningModule):
            expected |= {f"{section}.{name}" for name, hint in parameters(cls) if is_slot(hint)}
    hints = parameters(pl.Trainer)
    expected |= {f"trainer.{name}" for name, hint in hints if is_slot(hint)}
    assert expected == SLOTS


def test_all_public_callbacks_and_sources_are_listed():
    from yolo_lightning import callbacks, datamodules

    assert set(callbacks.__all__) - {*CLASSES["yolo_lightning.callbacks"]} == {"RunRecord"}
    bases = {"DetectionSource", "ImageLabelSource"}
    assert set(datamodules.__all__) - {*CLASSES["yolo_lightning.datamodules"]} == bases


UPLOADER = "{class_path: yolo_lightning.tracking.uploader.Uploader, init_args: {}}"
NOT_A_SLOT = {
    "journal uploader in tags": ("trainer.logger.init_args.tags", f"{{x: {UPLOADER}}}"),
    "nested recipe in tags": (
        "trainer.logger.init_args.tags",
        "{x: {class_path: yolo_lightning.cli.recipe.RecipeCLI, init_args: {args: [fit]}}}",
    ),
    "class in layers": (
        "model.init_args.backbone",
        "[[{class_path: lightning.pytorch.callbacks.Timer}]]",
    ),
    "class in an unchecked mapping of Lightning": (
        "trainer.callbacks",
        "[{class_path: lightning.pytorch.callbacks.RichProgressBar, init_args: {console_kwargs: "
        "{file: {class_path: lightning.pytorch.callbacks.Timer}}}}]",
    ),
    "class in dict_kwargs": (
        "trainer.strategy",
        "{class_path: lightning.pytorch.strategies.DDPStrategy, dict_kwargs: "
        "{x: {class_path: lightning.pytorch.callbacks.Timer}}}",
    ),
}


def complete(**values: str) -> str:
    """Return the quickstart recipe with values, given as YAML, by dotted key."""
    recipe = quickstart_values()
    for key, value in values.items():
        section = recipe
        *keys, last = key.split(".")
        for part in keys:
            section = section[part]
        section[last] = yaml.safe_load(value)
    return yaml.safe_dump(recipe, sort_keys=False)


@pytest.mark.parametrize("name", NOT_A_SLOT)
def test_classes_are_built_in_slots_only(workplace, capsys, name):
    key, value = NOT_A_SLOT[name]
    Path("recipe.yaml").write_text(complete(**{key: value}))
    assert main(["fit", "--config", "recipe.yaml"]) == 2
    message = capsys.readouterr().err
    assert f"{key}." in message
    assert "class_path" in message
    assert (
        "names a class where none is built" in message
        or "--allow-module yolo_lightning." in message
    )


def test_the_parser_builds_no_class_for_a_value_of_any_type(workplace):
    """Also where the text of a recipe does not show the class, such as in an option."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch.callbacks import Timer
    from lightning.pytorch.profilers import PyTorchProfiler

    restrict_parser()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--profiler", type=PyTorchProfiler)
    timer = {"class_path": "lightning.pytorch.callbacks.Timer"}
    kwargs = {"init_args": {"table_kwargs": {"header": timer}}}
    value = {"class_path": "lightning.pytorch.profilers.PyTorchProfiler", **kwargs}
    built = parser.instantiate_classes(parser.parse_object({"profiler": value})).profiler
    assert type(built) is PyTorchProfiler
    assert not isinstance(built._table_kwargs["header"], Timer)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("trainer.accelerator", "warp", "an invalid accelerator name"),
        ("trainer.barebones", "true", "barebones"),
        ("trainer.strategy", "ddp_spawn", "trainer.strategy starts processes by spawn; allowed:"),
        ("trainer.strategy", "ddp_notebook", "trainer.strategy starts processes by fork; allowed:"),
        ("trainer.strategy", "xla", "torch_xla"),
        (
            "trainer.default_root_dir",
            '"a\\0b"',
            r"default_root_dir is 'a\x00b'; allowed: text with",
        ),
    ],
)
def test_values_that_lightning_does_not_accept_are_one_message(
    workplace, capsys, key, value, expected
):
    Path("recipe.yaml").write_text(complete(**{key: value}))
    assert main(["fit", "--config", "recipe.yaml"]) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert len(message) < 1_000


def test_a_timer_may_stop_a_training(workplace, capsys):
    """A default of it is an enumeration, which no YAML holds."""
    timer = "{class_path: lightning.pytorch.callbacks.Timer, init_args: {duration: '00:00:00:01'}}"
    Path("recipe.yaml").write_text(complete(**{"trainer.callbacks": f"[{timer}]"}))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "recipe.yaml", "--print_config"])
    assert end.value.code == 0
    callback = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"][0]
    assert callback["init_args"]["interval"] == "step"


# --- the environment


def test_only_listed_variables_are_read(workplace, capsys, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    monkeypatch.setenv("FRUIT_DATA", "oranges")
    key = "trainer.logger.init_args.tags"
    fit = ["fit", "--config", "recipe.yaml", "--print_config"]
    Path("recipe.yaml").write_text(complete(**{key: "{x: '${oc.env:AWS_SECRET_ACCESS_KEY}'}"}))
    assert main(fit) == 2
    error = capsys.readouterr()
    assert "AWS_SECRET_ACCESS_KEY; allowed: names that end in _DATA" in error.err
    assert "--allow-env AWS_SECRET_ACCESS_KEY" in error.err
    assert "hush" not in error.out + error.err
    # an option, and a string that the parser reads as YAML
    Path("recipe.yaml").write_text(complete())
    for value in ("${oc.env:AWS_SECRET_ACCESS_KEY}", "${oc.env:${oc.env:FRUIT_DATA}}"):
        assert main(["fit", "--config", "recipe.yaml", f"--{key}={{x: '{value}'}}"]) == 2
        assert "reads the environment variable" in capsys.readouterr().err


def test_a_variable_is_allowed_for_one_command(workplace, monkeypatch):
    monkeypatch.setenv("PLACE", "here")
    Path("recipe.yaml").write_text("ckpt_path: ${oc.env:PLACE}\n")
    arguments = ["fit", "--config", "recipe.yaml"]
    with pytest.raises(InputError, match="--allow-env PLACE"):
        _check_arguments(arguments)
    assert _check_arguments([*arguments, "--allow-env", "PLACE"]) == arguments
    assert may_read("PLACE")
    with pytest.raises(InputError, match="--allow-env PLACE"):
        _check_arguments(arguments)


def test_every_variable_of_the_recipes_and_docs_is_listed():
    files = [*(REPO / "recipes").rglob("*.yaml"), *(REPO / "docs").glob("*.md")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    names = {name for text in texts for name in re.findall(r"\$\{oc\.env:\s*(\w+)", text)}
    assert len(names) > 8
    assert {name for name in names if not may_read(name)} == set()


# --- stores, URLs and outputs


OUTSIDE = {
    "a store of somebody else": (
        "trainer.logger.init_args.tracking_uri", "http://127.0.0.1:1", "a store outside",
    ),
    "a store without a scheme": (
        "trainer.logger.init_args.tracking_uri", "databricks", "a store outside",
    ),
    "a database outside": (
        "trainer.logger.init_args.tracking_uri", "sqlite:////tmp/x.db", "a store outside",
    ),
    "a database above": (
        "trainer.logger.init_args.tracking_uri", "sqlite:///../x.db", "a store outside",
    ),
    "a database with parameters": (
        "trainer.logger.init_args.tracking_uri", "sqlite:///x.db?vfs=unix", "a store outside",
    ),
    "a journal elsewhere": ("trainer.logger.init_args.folder", "/tmp/x", "an output outside"),
    "a remote folder": ("trainer.default_root_dir", "s3://bucket/x", "a URL"),
    "a chained remote folder": ("trainer.default_root_dir", "memory::x", "a URL"),
    "a URL in a text": ("trainer.logger.init_args.tags", "{a: 'see http://x.org'}", "a URL"),
    "a remote checkpoint": ("model.init_args.pretrained", "https://x.org/a.ckpt", "a URL"),
    "an absolute output": ("trainer.default_root_dir", "/tmp", "an output outside"),
    "the home folder": ("trainer.default_root_dir", "~/.config", "an output outside"),
    "a model registry": ("trainer.model_registry", "me/model", "a place to upload to"),
    "an output above": ("trainer.default_root_dir", "outputs/../../elsewhere", "an output outside"),
    "an output above, from a reference": (
        "trainer.default_root_dir", "${..model.init_args.pretrained}", "an output outside",
    ),
    "an output above, composed": (
        "trainer.default_root_dir", "a/${..model.init_args.pretrained}/../..", "an output outside",
    ),
    "a file name with ..": (
        "trainer.callbacks",
        "[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: ../x}}]",
        "an output outside",
    ),
    "a profile in the home folder": (
        "trainer.profiler",
        "{class_path: AdvancedProfiler, init_args: {dirpath: '~/', filename: .bashrc}}",
        "an output outside",
    ),
    "a remote folder in YAML in a string": (
        "trainer.profiler",
        "'{class_path: AdvancedProfiler, init_args: {dirpath: \"ftp://x\"}}'",
        "a URL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_recipes_do_not_say_where_things_go(workplace, capsys, monkeypatch, name):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hush-hush")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects"))
    key, value, expected = OUTSIDE[name]
    Path("recipe.yaml").write_text(complete(**{"model.init_args.pretrained": "../up", key: value}))
    before = sorted(Path().iterdir())
    assert main(["fit", "--config", "recipe.yaml"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"yolo-lightning: error: recipe.yaml: {key}")
    assert expected in message
    assert "pass it on the command line" in message
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("command", ["check-data", "anchors", "batch", "explain", "doctor", "test"])
def test_every_command_checks_where_recipes_send_to(workplace, capsys, monkeypatch, command):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("connects"))
    Path("recipe.yaml").write_text(
        complete(**{"trainer.logger.init_args.tracking_uri": "http://127.0.0.1:1"})
    )
    option = {"doctor": ["--recipe"], "test": ["--config"]}.get(command, [])
    needed = ["--checkpoint=x.ckpt", "--image=0"] if command == "explain" else []
    assert main([command, *option, "recipe.yaml", *needed]) == 2
    assert "tracking_uri is 'http://127.0.0.1:1', a store outside" in capsys.readouterr().err


def test_the_user_says_where_things_go(workplace, monkeypatch):
    """The command line, the store of the environment, and allowed variables are the user's."""
    uri, logger = "http://127.0.0.1:1", "trainer.logger.init_args.tracking_uri"
    values = {"trainer": {"logger": {"init_args": {"tracking_uri": uri}}}}
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI"):
        check_values(values, {})
    with pytest.raises(InputError, match="a store outside"):
        check_values(values, {logger: f"{uri}0"})
    check_values(values, {logger: uri})
    check_values(values, {"trainer.logger": {"init_args": {"tracking_uri": uri}}})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    check_values(values, {})
    below = {"trainer": {"default_root_dir": "/runs/a", "callbacks": [{"dirpath": "/runs/a/b"}]}}
    with pytest.raises(InputError, match="default_root_dir is '/runs/a', an output outside"):
        check_values(below, {"trainer.max_steps": 1, "data.root": "/runs"})
    check_values(below, {"trainer.default_root_dir": "/runs/a"})
    monkeypatch.setenv("SCRATCH", "/runs")
    allow(variables=["SCRATCH"])
    try:
        check_values(below, {})
    finally:
        allow()
    inside = {"tracking_uri": "sqlite:///a/x.db", "save_dir": str(Path.cwd() / "logs")}
    check_values({"trainer": {"logger": {"init_args": inside}}}, {})
