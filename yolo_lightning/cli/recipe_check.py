"""Check the text of a recipe before the parser reads it, and before heavy imports.

It must be limited in size, also with aliases and references expanded, and name allowed classes
where classes are built. What the parser may do with it: `recipe_policy`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from yolo_lightning.cli.packaged import copy_hint
from yolo_lightning.cli.recipe_policy import (
    SLOTS,
    class_refusal,
    may_build,
    may_read,
    variable_refusal,
)
from yolo_lightning.errors import InputError, compose_yaml, nearest, read_text, short

_SECTIONS = {"model", "data", "trainer"}
_BYTES, _NODES, _DEPTH = 2**20, 100_000, 40
_ITEMS, _ROWS = 500, 150  # of a list, and of a list of lists
_TAGS = {f"tag:yaml.org,2002:{name}" for name in "str int float bool null map seq".split()}
# ${key}, ${..key} and ${oc.env:NAME,default}; nothing nested
_REFERENCE = re.compile(r"\$\{(?:([\w.\[\]]+)|oc\.env:\s*(\w+)\s*(?:,[^${}\[\]\\\"']*)?)\}")

_KeyPath = tuple[str, ...]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The loader of the parser, which does not convert dates either, with plain values alone."""

    yaml_implicit_resolvers = {
        char: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
        for char, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag in _TAGS
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge nothing: the key ``<<`` gets no constructor."""


def check_recipe(
    path: str | Path, modules: Sequence[str] = (), may_be_dataset: bool = False
) -> dict[str, Any]:
    """Check a recipe and return its values, with references unresolved.

    `modules` are those that the user allows, matched by whole dotted parts. With `may_be_dataset`,
    YAML without the keys model, data and trainer is only checked for its size, and the result is
    empty.

    Raises:
        InputError: the file cannot be read as YAML, is too large or too deep, has a tag, a merge,
            a duplicate key, a class where none is built or that is not allowed, or a reference
            that is nested or reads an environment variable that is not allowed.
    """
    hint = copy_hint(path) or "`yolo-lightning init DATASET` writes one"
    text = read_text(path, "recipe", hint, max_bytes=_BYTES)
    if not text.strip():
        raise InputError(f"recipe {str(path)!r} is empty")
    root = compose_yaml(text, path, any_alias=True) or yaml.MappingNode("", [])
    keys = root.value if isinstance(root, yaml.MappingNode) else []
    if may_be_dataset and _SECTIONS.isdisjoint(str(key.value).split(".")[0] for key, _ in keys):
        return {}
    try:
        values = yaml.load(text, Loader=_Loader)
        _check_nodes(root, modules)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: {str(error.problem)[:1000]}") from None
    except (LookupError, ValueError) as error:  # a number that Python does not read
        raise InputError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return values if isinstance(values, dict) else {}


def _check_nodes(root: yaml.Node, modules: Sequence[str]) -> None:
    """Check all nodes, and count them with aliases and references expanded."""
    nodes: dict[_KeyPath, yaml.Node] = {}
    stack: list[tuple[_KeyPath, yaml.Node]] = [((), root)]
    references: list[_KeyPath] = []
    visited = 0
    while stack or references:
        if not stack:  # all nodes are known
            target = references.pop()
            stack += [(target, nodes[target])] if target in nodes else []
            continue
        path, node = stack.pop()
        text = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
        keys = len(node.value) if isinstance(node, yaml.MappingNode) else 0
        visited += 1 + keys + (len(text) >> 6)
        if visited > _NODES:
            problem = f"more than {_NODES:,} values, with aliases and references expanded"
        elif nodes.setdefault(path, node) is not node:
            problem = f"duplicate key {short(path[-1])}"
        elif problem := _problem(path, node, text, modules):
            problem = f"{'.'.join(path)[:120]} {problem}"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        stack += [((*path, *parts), value) for parts, value in reversed(_children(node))]
        references += [_target(match[1], path) for match in _REFERENCE.finditer(text) if match[1]]


def _children(node: yaml.Node) -> list[tuple[list[str], yaml.Node]]:
    """Return the parts of the keys in a node, and its values."""
    if isinstance(node, yaml.MappingNode):
        return [(str(key.value).replace("+", "").split("."), value) for key, value in node.value]
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    return [([str(number)], value) for number, value in enumerate(items)]


def _problem(path: _KeyPath, node: yaml.Node, text: str, modules: Sequence[str]) -> str:
    """Return what is wrong with a value."""
    if len(path) > _DEPTH:
        return f"is too deep; allowed: {_DEPTH} levels"
    if isinstance(node, yaml.SequenceNode):
        is_nested = any(not isinstance(value, yaml.ScalarNode) for value in node.value)
        limit = _ROWS if is_nested else _ITEMS
        too_long = f"has {len(node.value):,} items; allowed: {limit}; a tree may be a file"
        return too_long if len(node.value) > limit else ""
    if path[-1:] == ("class_path",):
        if not text or "${" in text:
            return "is not a class name"
        if not may_build(text, modules):
            return class_refusal(text)
        place = path[:-2] if path[-2:-1] and path[-2].isdigit() else path[:-1]
        slot = ".".join(part for part in place if part != "init_args")
        # in a class that the user allows, any key may be a slot
        if path[0] in _SECTIONS and slot not in SLOTS and not modules:
            hint = nearest(slot, SLOTS, 1) or f"allowed in {', '.join(sorted(SLOTS))}"
            return f"names a class where none is built; {hint}"
    if text and path == ("config",):
        return "names another recipe; pass several with --config"
    matches = list(_REFERENCE.finditer(text))
    if len(matches) != text.count("${"):
        forms = "${..key}, ${oc.env:NAME} and ${oc.env:NAME,default}, not nested"
        return f"is {short(text)}; allowed references: {forms}"
    unlisted = next((match[2] for match in matches if match[2] and not may_read(match[2])), None)
    return variable_refusal(unlisted) if unlisted else ""


def _target(name: str, path: _KeyPath) -> _KeyPath:
    """Return the key path that a reference points to."""
    keys = name.lstrip(".")
    dots = len(name) - len(keys)
    return (path[:-dots] if dots else ()) + tuple(re.split(r"[.\[\]]+", keys.rstrip("]")))


def read_value(text: str) -> Any:
    """Return the value of an option as the parser reads it: YAML, or else text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, LookupError, ValueError):
        return text
