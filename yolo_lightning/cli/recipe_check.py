"""Check the text of a recipe before the parser reads it, and before heavy imports.

It must be limited in size, also with aliases and references expanded, and name allowed classes
where classes are built. What the parser may do with it: `recipe_policy`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from yolo_lightning.cli.recipe_policy import (
    SLOTS,
    class_refusal,
    in_modules,
    is_listed,
    may_read,
    shorten,
    variable_refusal,
)
from yolo_lightning.errors import InputError, nearest, read_text, require_file

_SECTIONS = {"model", "data", "trainer"}
_BYTES, _NODES, _DEPTH, _ALIASES = 2**20, 100_000, 40, 100
_ITEMS, _ROWS = 500, 150
_TAGS = {f"tag:yaml.org,2002:{name}" for name in "str int float bool null map seq".split()} | {"!"}
_MERGE, _STR = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
# ${key}, ${..key} and ${oc.env:NAME,default}; nothing nested
_REFERENCE = re.compile(r"\$\{(?:([\w.\[\]]+)|oc\.env:\s*(\w+)\s*(?:,[^${}\[\]\\\"']*)?)\}")

_KeyPath = tuple[str, ...]


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The loader of the parser, which does not convert dates either, with unique keys."""

    yaml_implicit_resolvers = {
        char: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
        for char, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse duplicate keys, and merges of several mappings, whose size could double often."""
        if getattr(node, "is_flat", False):  # another mapping merged it
            return
        setattr(node, "is_flat", True)  # noqa: B010
        keys: set[str] = set()
        for key, value in node.value:
            if str(key.value) in keys:
                problem = f"duplicate key {shorten(str(key.value))}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(str(key.value))
            if key.tag == _MERGE and isinstance(value, yaml.SequenceNode):
                raise _Refused("several merged mappings; allowed: one", key)
        super().flatten_mapping(node)


def check_recipe(
    path: str | Path, modules: Sequence[str] = (), may_be_dataset: bool = False
) -> dict[str, Any]:
    """Check a recipe and return its values, with references unresolved.

    `modules` are those that the user allows, matched by whole dotted parts. With `may_be_dataset`,
    YAML without the keys model, data and trainer is only checked for its size, and the result is
    empty.

    Raises:
        InputError: the file cannot be read as YAML, is too large or too deep, has a tag, a
            duplicate key, a class where none is built or that is not allowed, or a reference that
            is nested or reads an environment variable that is not allowed.
    """
    if require_file(path, "recipe").stat().st_size > _BYTES:
        raise InputError(f"recipe {str(path)!r} is larger than {_BYTES >> 20} MiB")
    text = read_text(path, "recipe")
    if not text.strip():
        raise InputError(f"recipe {str(path)!r} is empty")
    try:
        _check_size(text)
        root = yaml.compose(text, Loader=_Loader) or yaml.MappingNode("", [])
        keys = root.value if isinstance(root, yaml.MappingNode) else []
        sections = {str(key.value).split(".")[0] for key, _ in keys}
        is_recipe = not may_be_dataset or not _SECTIONS.isdisjoint(sections)
        values = _Loader("").construct_document(root)
        _check_nodes(root, modules, is_recipe)
    except yaml.MarkedYAMLError as error:
        if may_be_dataset and not isinstance(error, _Refused):
            return {}  # the reader of the dataset reports the error
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: {str(error.problem)[:1000]}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return values if is_recipe and isinstance(values, dict) else {}


class _Refused(yaml.MarkedYAMLError):
    """What a recipe may not contain; the line is that of a node or an event."""

    def __init__(self, problem: str, place: Any) -> None:
        super().__init__(problem=problem, problem_mark=place.start_mark)


def _check_size(text: str) -> None:
    """Check size and tags on events, as deep nodes overflow the stack."""
    depth = nodes = aliases = 0
    for event in yaml.parse(text, Loader=_Loader):
        nodes += isinstance(event, yaml.NodeEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if nodes > _NODES or aliases > _ALIASES or depth > _DEPTH:
            limits = f"{_NODES:,} values, {_ALIASES} aliases, {_DEPTH} levels"
            raise _Refused(f"too large for a recipe; allowed: at most {limits}", event)
        tag = getattr(event, "tag", None)
        if tag is not None and tag not in _TAGS:
            raise _Refused(f"tag {shorten(tag)}; allowed: plain values without tags", event)


def _check_nodes(root: yaml.Node, modules: Sequence[str], is_recipe: bool) -> None:
    """Check all nodes, and count them with aliases and references expanded."""
    nodes: dict[_KeyPath, tuple[yaml.Node, bool]] = {}
    stack: list[tuple[_KeyPath, yaml.Node, int, bool]] = [((), root, 0, False)]
    references: list[tuple[_KeyPath, int]] = []
    visited = 0
    while stack or references:
        if not stack:  # all nodes are known
            path, depth = references.pop()
            node, is_allowed = nodes.get(path, (None, False))
            if node is not None:
                stack.append((path, node, depth + 1, is_allowed))
            continue
        path, node, depth, is_allowed = stack.pop()
        nodes.setdefault(path, (node, is_allowed))
        text = node.value if node.tag == _STR else ""
        visited += 1 + (len(text) >> 6)
        if visited > _NODES:
            raise _Refused(
                f"more than {_NODES:,} values, with aliases and references expanded", node
            )
        if depth > 2 * _DEPTH:
            raise _Refused("an alias or a reference contains itself", node)
        if is_recipe and (problem := _problem(path, text, modules, is_allowed)):
            raise _Refused(f"{'.'.join(path)[:120]} {problem}", node)
        if isinstance(node, yaml.MappingNode):
            items = [
                (str(key.value).replace("+", "").split("."), value) for key, value in node.value
            ]
            names = [str(value.value) for keys, value in items if keys == ["class_path"]]
            is_allowed |= any(in_modules(name, modules) for name in names)
        else:
            sequence = node.value if isinstance(node, yaml.SequenceNode) else ()
            is_nested = any(not isinstance(value, yaml.ScalarNode) for value in sequence)
            limit = _ROWS if is_nested else _ITEMS
            if is_recipe and len(sequence) > limit:
                problem = f"has {len(sequence):,} items; allowed: {limit}; a tree may be a file"
                raise _Refused(f"{'.'.join(path)[:120]} {problem}", node)
            items = [([str(number)], value) for number, value in enumerate(sequence)]
        stack += [((*path, *keys), value, depth + 1, is_allowed) for keys, value in reversed(items)]
        matches = _REFERENCE.finditer(text) if is_recipe else ()
        references += [(_target(match[1], path), depth) for match in matches if match[1]]


def _problem(path: _KeyPath, text: str, modules: Sequence[str], is_allowed: bool) -> str:
    """Return what is wrong with a value; in a class that the user allows, any key is a slot."""
    if path[-1:] == ("class_path",):
        slot = _slot(path[:-1])
        if not text or "${" in text:
            return "is not a class name"
        # without a dot, the parser searches imported classes
        if "." in text and not (is_listed(text) or in_modules(text, modules)):
            return class_refusal(text)
        if path[0] in _SECTIONS and slot not in SLOTS and not is_allowed:
            hint = nearest(slot, SLOTS, 1) or f"allowed in {', '.join(sorted(SLOTS))}"
            return f"names a class where none is built; {hint}"
    if text and path == ("config",):
        return "names another recipe; pass several with --config"
    if text and (path[-1:] == ("init_args",) or (len(path) == 1 and path[0] in _SECTIONS)):
        return f"is {shorten(text)}; a recipe is a single file"
    matches = list(_REFERENCE.finditer(text))
    if len(matches) != text.count("${"):
        forms = "${..key}, ${oc.env:NAME} and ${oc.env:NAME,default}, not nested"
        return f"is {shorten(text)}; allowed references: {forms}"
    unlisted = next((match[2] for match in matches if match[2] and not may_read(match[2])), None)
    return variable_refusal(unlisted) if unlisted else ""


def _slot(path: _KeyPath) -> str:
    """Return the key of `SLOTS` for a value or an item of a list."""
    path = path[:-1] if path and path[-1].isdigit() else path
    return ".".join(part for part in path if part != "init_args")


def _target(name: str, path: _KeyPath) -> _KeyPath:
    """Return the key path that a reference points to."""
    keys = name.lstrip(".")
    dots = len(name) - len(keys)
    return (path[:-dots] if dots else ()) + tuple(re.split(r"[.\[\]]+", keys.rstrip("]")))


def read_value(text: str) -> Any:
    """Return the value of an option as the parser reads it: YAML, or else text."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return text
