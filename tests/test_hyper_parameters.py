"""docs/hyper-parameters.md: it has every parameter that recipes give, with unit and effect."""

import importlib.util
import inspect
import re
import typing
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.helpers.paths import REPO

PAGE = (REPO / "docs/hyper-parameters.md").read_text(encoding="utf-8")
API = (REPO / "docs/api.md").read_text(encoding="utf-8")
CLASSES = re.findall(r"^```\{hyper-parameters\} (\S+)$", PAGE, re.M)
TEMPLATE = "yolo_lightning/cli/commands/recipe_template.yaml"
OWN = "yolo_lightning."

spec = importlib.util.spec_from_file_location("tables", REPO / "docs/hyper_parameters.py")
assert spec
assert spec.loader
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


def recipe_values() -> Iterator[tuple[str, str]]:
    """Yield class paths and names of their parameters, over all recipes and that of `init`."""
    texts = [path.read_text("utf-8") for path in (REPO / "recipes").rglob("*.yaml")]
    template = (REPO / TEMPLATE).read_text("utf-8").replace("{best}", "").replace(":{", ": {")
    filled = template.format_map(defaultdict(int))
    for recipe in map(yaml.safe_load, [*texts, filled]):
        yield from values_of(recipe)
        yield from (("trainer", name) for name in recipe.get("trainer", {}))
        for name in recipe["model"]["init_args"].get("loss", {}) if "model" in recipe else ():
            yield "yolo_lightning.losses.LossSettings", name


def values_of(node: Any) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and "class_path" in node:
        yield from ((node["class_path"], name) for name in node.get("init_args", {}))
    children = node.values() if isinstance(node, dict) else node
    for child in children if isinstance(node, dict | list) else ():
        yield from values_of(child)


VALUES = sorted(set(recipe_values()))


@pytest.mark.parametrize(("owner", "name"), VALUES, ids=".".join)
def test_every_parameter_of_a_recipe_is_on_the_page(owner, name):
    if owner in CLASSES:
        assert name in {parameter.name for parameter in tables.parameters(owner)}
    elif owner.startswith(OWN):  # sources and the logger
        assert f":: {owner}\n" in API
        assert name in {parameter.name for parameter in tables.parameters(owner)}
    else:
        assert re.search(rf"[`.]{name}`", PAGE), f"{owner}: {name}"


def test_the_recipes_reach_the_parameters():
    assert len(VALUES) > 90
    assert {"yolo_lightning.losses.LossSettings", "trainer"} <= {owner for owner, _ in VALUES}
    assert ("lightning.pytorch.callbacks.EMAWeightAveraging", "decay") in VALUES  # the template's


@pytest.mark.parametrize("path", CLASSES)
def test_every_parameter_has_an_effect_and_every_number_a_unit(path):
    found = tables.find(path)
    hints = typing.get_type_hints(found.__init__)
    for parameter in tables.parameters(path):
        assert parameter.effect, parameter.name
        assert not re.search(r"\bSource\b", parameter.effect), parameter.name
        if re.search(r"\b(int|float)\b", inspect.formatannotation(hints[parameter.name])):
            assert parameter.unit or parameter.name == "backbone", parameter.name


def test_a_row_by_hand():
    rows = {row.name: row for row in tables.parameters("yolo_lightning.DetectorModule")}
    assert rows["tree"].default == "required"
    rate = rows["learning_rate"]
    assert (rate.default, rate.unit) == ("`0.001`", "per optimizer step")
    assert rate.effect.startswith("of SGD, for gradients averaged over the global batch")
    assert rate.source == "YOLO9000, section 3"
    row = "| `weight_decay` | `0.0005` factor | how strongly SGD pulls weights"
    assert row in tables.table("yolo_lightning.DetectorModule")
    assert "the next one. *YOLO9000, section 3* |" in tables.table("yolo_lightning.DetectorModule")
