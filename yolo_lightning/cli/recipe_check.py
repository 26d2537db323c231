"""What a recipe may hold, checked on its text before anything heavy is imported.

The parser imports a `class_path` before it looks at its type, reads strings that hold YAML or name
a file as parts of the recipe, and expands aliases; OmegaConf's resolver `oc.coerce` imports
modules. So a recipe is read here first: bounded in size, of plain values, and with classes from
allowed modules alone. `restrict_imports` gives the parser the same list, for what only types tell.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from yolo_lightning.errors import InputError

MODULES = ("yolo_lightning", "lightning.pytorch", "torch.optim")
OPTION = "--allow-module"

_BYTES, _NODES, _DEPTH, _ALIASES = 2**20, 100_000, 40, 100
_TAGS = {f"tag:yaml.org,2002:{name}" for name in "str int float bool null map seq".split()} | {"!"}
_MERGE, _STR = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"

# where strings stand for classes: parameters of the command line's own classes
_CLASS_KEYS = {
    "class_path", "model", "data", "trainer", "init_args", "dict_kwargs", "schedule", "loss",
    "detection", "classification", "validation", "test", "detection_augmentation",
    "classification_augmentation", "logger", "callbacks", "strategy", "plugins", "profiler",
    "accelerator",
}  # fmt: skip
_OPEN_KEYS = {"mapping", "metadata", "tags"}  # mappings whose keys are anybody's words
# Lightning's classes take functions in many places; these parameters of theirs are texts
_TEXT_KEYS = {
    "artifact_location", "attr_name", "batch_arg_name", "checkpoint_name", "config",
    "default_root_dir", "dir", "dirpath", "entity", "exclude_batches_path", "experiment_name",
    "filename", "group", "job_type", "metadata", "monitor", "name", "notes", "nvme_path",
    "parameter_names", "prefix", "project", "root_dir", "run_id", "run_name", "save_dir",
    "sub_dir", "tags", "tracking_uri", "version", "workspace",
}  # fmt: skip
_WRITTEN_KEYS = {
    "artifact_location", "default_root_dir", "dir", "dirpath", "filename", "folder", "name",
    "output", "root_dir", "save_dir", "sub_dir", "tracking_uri", "version",
}  # fmt: skip

# ${key}, ${..key} and ${oc.env:NAME,default}; nothing nested
_REFERENCE = re.compile(r"\$\{(?:([\w.\[\]]+)|oc\.env:\s*(\w+)\s*(?:,([^${}\[\]\\\"']*))?)\}")
_YAML = re.compile(r"^\s*[\[{&!?%#-]|:(?:\s|$)")  # what a text of several values begins with or has
_FETCHED = re.compile(r"\w+(://|::)")

_Place = tuple[str, ...]
_Owner = tuple[str, int]  # the class whose parameters these are, and how long its place is


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The parser's own loader; dates stay texts there too."""

    yaml_implicit_resolvers = {
        first: [(tag, shape) for tag, shape in known if not tag.endswith(":timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def restrict_imports(allowed: Sequence[str] = ()) -> None:
    """Make the parser refuse the same, wherever types or a checkpoint's values say more than text.

    Args:
        allowed: prefixes beside `MODULES`.
    """
    import jsonargparse
    from omegaconf import OmegaConf

    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=[*MODULES, *allowed]
    )
    for name in ("coerce", "create", "decode", "deprecated", "select", "dict.keys", "dict.values"):
        OmegaConf.clear_resolver(f"oc.{name}")


def check_recipe(
    path: str | Path, allowed: Sequence[str] = (), or_dataset: bool = False
) -> dict[str, Any]:
    """Return what a recipe holds, references unresolved.

    Args:
        path: of the file.
        allowed: prefixes of modules beside `MODULES`, each of whole dotted parts.
        or_dataset: YAML that names no model, data or trainer is checked for its size alone.

    Returns:
        Nothing for a dataset.

    Raises:
        InputError: not a readable file of YAML, larger or deeper than any recipe, with other tags
            than those of plain values, a key twice, a class of another module, a resolver other
            than `oc.env`, another file for one of its parts, or `..` where training writes.
    """
    text = _text_of(path)
    check = _Check(str(path), allowed, Path(path).expanduser().parent)
    try:
        root = check.document(text, or_dataset)
        held = None if check.sizes_only or root is None else _Loader("").construct_document(root)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        if or_dataset:
            return {}  # whoever reads the dataset says more
        raise InputError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return held if isinstance(held, dict) else {}


def check_option(key: str, value: str, allowed: Sequence[str] = ()) -> Any:
    """Return what an option of the command line gives to a key of the recipe.

    Args:
        key: `trainer.devices`, `trainer.callbacks+` and so on.
        value: as written, YAML or a text.
        allowed: prefixes of modules beside `MODULES`.

    Raises:
        InputError: what `check_recipe` refuses, but for `..` and other files: people may write
            and read where they like. The files that stand for parts of a recipe are checked too.
    """
    place = tuple(key.replace("+", "").removesuffix(".help").split("."))
    _Check("command line", allowed, None).option(value, place)
    try:
        return yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return value


def is_dotted(text: str) -> bool:
    """Return whether a text is a name such as `package.module`."""
    return bool(text) and all(part.isidentifier() for part in text.split("."))


def _text_of(path: str | Path) -> str:
    """Return a file's text, of which no more is read than a recipe may have."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"recipe {str(path)!r} not found (working folder: {Path.cwd()})")
    with file.open("rb") as stream:
        content = stream.read(_BYTES + 1)
    if len(content) > _BYTES:
        raise InputError(f"recipe {str(path)!r} is larger than {_BYTES >> 20} MiB")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {str(path)!r} is not UTF-8 text ({error})") from None
    if not text.strip():
        raise InputError(f"recipe {str(path)!r} is empty")
    return text


class _Check:
    """Walks one document, and counts what it holds with aliases and references followed.

    Args:
        origin: the recipe's path, or the command line, for messages.
        allowed: prefixes of modules beside `MODULES`.
        folder: of the recipe; None for the command line, where people may name files and folders.
    """

    def __init__(self, origin: str, allowed: Sequence[str], folder: Path | None) -> None:
        self.origin, self.folder, self.trusted = origin, folder, tuple(allowed)
        self.visited = self.line = self.within = 0
        self.sizes_only = False
        self.nodes: dict[_Place, yaml.Node] = {}
        self.references: list[tuple[str, _Place, _Place, _Owner, int]] = []

    def document(self, text: str, or_dataset: bool = False, place: _Place = ()) -> yaml.Node | None:
        """Return the nodes of a recipe, or of the part of one that belongs to `place`, checked."""
        root = self._compose(text)
        recipe = {"model", "data", "trainer"} & set(_first_words(root))
        self.sizes_only = or_dataset and not recipe
        if root is not None:
            self._walk(root, place, (), ("", 0), 0)
        for name, place_of, at, owner, depth in self.references:  # grows while it is read
            target = _place_meant(name, at)
            if target in self.nodes:
                self._walk(self.nodes[target], place_of, target, owner, depth + 1)
        return root

    def option(self, value: str, place: _Place) -> None:
        """Check a value from the command line."""
        self._walk(yaml.ScalarNode(_STR, value), place, place, ("", 0), 0)

    def _compose(self, text: str) -> yaml.Node | None:
        """Return the nodes of a text, after a look at its events: deep ones overrun the stack."""
        depth = nodes = aliases = 0
        for event in yaml.parse(text, Loader=_Loader):
            self._at(event.start_mark)
            nodes += isinstance(event, yaml.NodeEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if nodes > _NODES or aliases > _ALIASES or depth > _DEPTH:
                most = f"{_NODES:,} values, {_ALIASES} aliases, {_DEPTH} levels"
                self._refuse(f"more than a recipe may hold ({most})")
            tag = getattr(event, "tag", None)
            if tag is not None and tag not in _TAGS and not self.within:
                self._refuse(f"the tag {_short(tag)}; recipes hold plain values")
        return yaml.compose(text, Loader=_Loader)

    def _walk(self, node: yaml.Node, place: _Place, at: _Place, owner: _Owner, depth: int) -> None:
        """Check a node: `place` is where its value is used, `at` where it is written."""
        self._count(node, depth)
        self.nodes.setdefault(at, node)
        if isinstance(node, yaml.MappingNode):
            entries = list(self._entries(node, depth))
            for key, value in entries:
                if key.split(".")[-1] == "class_path" and not self.sizes_only:
                    name = self._class_path(value, (*place, key))
                    owner = (name, len(place)) if key == "class_path" else owner
            for key, value in entries:
                parts = tuple(key.replace("+", "").split("."))
                self._walk(value, place + parts, at + parts, owner, depth + 1)
        elif isinstance(node, yaml.SequenceNode):
            for k, item in enumerate(node.value):
                self._walk(item, (*place, str(k)), (*at, str(k)), owner, depth + 1)
        elif node.tag == _STR and not self.sizes_only:
            self._text(node.value, place, at, owner, depth)

    def _entries(self, node: yaml.MappingNode, depth: int) -> Iterator[tuple[str, yaml.Node]]:
        """Return keys and values of a mapping, with what `<<` merges into it."""
        seen: set[str] = set()
        for key, value in node.value:
            self._count(key, depth)
            if key.tag == _MERGE:
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    self._count(part, depth)
                    if isinstance(part, yaml.MappingNode):
                        yield from self._entries(part, depth + 1)
                continue
            if not isinstance(key, yaml.ScalarNode):
                self._refuse("a key that is not one word")
            if key.value in seen and not self.sizes_only:
                self._refuse(f"the key {_short(key.value)} a second time")
            seen.add(key.value)
            yield key.value, value

    def _at(self, mark: Any) -> None:
        """Remember the line for messages; inside a text it stays the text's."""
        if mark is not None and not self.within:
            self.line = mark.line + 1

    def _count(self, node: yaml.Node, depth: int) -> None:
        self._at(node.start_mark)
        self.visited += 1 + (len(node.value) >> 6 if isinstance(node, yaml.ScalarNode) else 0)
        if self.visited > _NODES:
            self._refuse(f"more than {_NODES:,} values, with aliases and references followed")
        if depth > 2 * _DEPTH:
            self._refuse("an alias or a reference leads back to itself")

    def _text(self, value: str, place: _Place, at: _Place, owner: _Owner, depth: int) -> None:
        where = _dotted(place)
        if place == ("config",) and self.folder is not None:
            self._refuse("config: a recipe names no other; give several with --config")
        parts = self._references_in(value, place, at, owner, depth) if "${" in value else [value]
        written = place[:1] == ("trainer",) and _key(place) in _WRITTEN_KEYS
        if written and self.folder is not None and _leaves(value):
            self._refuse(f"{where} is {_short(value)}; what training writes must not climb by '..'")
        if self._takes_class(place, owner):
            for part in parts:
                self._class_or_file(part.strip(), place)
        if _YAML.search(value):
            self._yaml_within(value, place, at, owner, depth)

    def _references_in(
        self, value: str, place: _Place, at: _Place, owner: _Owner, depth: int
    ) -> list[str]:
        """Note what a text refers to; return the texts that may come of it otherwise."""
        found = list(_REFERENCE.finditer(value))
        if len(found) != value.count("${"):
            forms = "${..key}, ${oc.env:NAME} and ${oc.env:NAME,default}, not in one another"
            self._refuse(f"{_dotted(place)} is {_short(value)}; allowed references: {forms}")
        parts = [] if found[0].group() == value.strip() else [value]
        for name, variable, default in (match.groups() for match in found):
            if name:
                self.references.append((name, place, at, owner, depth))
            else:
                parts += [default or "", os.environ.get(variable, "")]
        return parts

    def _takes_class(self, place: _Place, owner: _Owner) -> bool:
        """Return whether the parser may read a text at a place as a class or a function."""
        name, length = owner
        inside = place[length:]
        if _OPEN_KEYS & set(inside[:-1]):
            return False
        if _key(place) in _CLASS_KEYS:
            return True
        ours = name.startswith("yolo_lightning.") or self._prefix(name) in self.trusted
        if self.folder is None or ours or ("." not in name and place[:1] != ("trainer",)):
            return False
        return not _TEXT_KEYS & set(inside)

    def _prefix(self, name: str) -> str | None:
        """Return the allowed module that a dotted name lies under."""
        return next((m for m in (*MODULES, *self.trusted) if name.startswith(f"{m}.")), None)

    def _class_path(self, node: yaml.Node, place: _Place) -> str:
        where, name = _dotted(place), node.value
        if not isinstance(node, yaml.ScalarNode) or "${" in name:
            self._refuse(f"{where} is not the name of a class")
        if "." in name:  # without, the parser looks among the classes that it has imported
            self._class(name, where)
        return str(name)

    def _class(self, name: str, where: str) -> None:
        """Refuse names outside the allowed modules, and what is no class in the own ones."""
        prefix, parts = self._prefix(name), name.split(".")
        if prefix is None:
            hint = "" if where.split(".")[-1] in _CLASS_KEYS else " (a file is written ./NAME)"
            known = ", ".join((*MODULES, *self.trusted))
            self._refuse(
                f"{where} names {_short(name)}; allowed: classes under {known}, and under modules "
                f"given with {OPTION}{hint}"
            )
        modules = all(part.islower() and part[0] != "_" for part in parts[:-1])
        if prefix in MODULES and not (modules and parts[-1][:1].isupper()):
            self._refuse(f"{where} names {_short(name)}, which is no class")

    def _class_or_file(self, text: str, place: _Place) -> None:
        """Check a text that may name a class, or hold the place of a file's content."""
        where = _dotted(place)
        if "${" in text:
            self._refuse(f"{where} is {_short(text)}; a class is not put together from references")
        if _FETCHED.match(text):
            self._refuse(f"{where} is {_short(text)}; nothing is fetched for a recipe")
        file = _file_meant(text, self.folder) if _key(place) in _CLASS_KEYS else None
        if file is not None and self.folder is not None:
            self._refuse(f"{where} names the file {_short(text)}; a recipe is one file")
        if file is not None:
            inner = _Check(text, self.trusted, file.parent)
            inner.document(_text_of(file), place=place)
        elif "." in text and is_dotted(text):
            self._class(text, where)

    def _yaml_within(
        self, value: str, place: _Place, at: _Place, owner: _Owner, depth: int
    ) -> None:
        """Check what the parser finds in a text that is YAML itself."""
        if self.within > 3:
            self._refuse(f"{_dotted(place)} is a text within texts")
        self.within += 1
        try:
            node = self._compose(value)
            if isinstance(node, yaml.CollectionNode):
                self._walk(node, place, at, owner, depth + 1)
        except yaml.YAMLError:
            pass  # a plain text then, for the parser too
        finally:
            self.within -= 1

    def _refuse(self, problem: str) -> NoReturn:
        line = f", line {self.line}" if self.folder is not None else ""
        raise InputError(f"{self.origin}{line}: {problem}")


def _short(value: str) -> str:
    return repr(value if len(value) <= 80 else f"{value[:80]}…")


def _first_words(root: yaml.Node | None) -> list[str]:
    """Return the keys of a document, up to the first dot."""
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return [str(key.value).split(".")[0] for key, _ in pairs]


def _dotted(place: _Place) -> str:
    return ".".join(place)[:120]


def _key(place: _Place) -> str:
    """Return the name that a value goes by; items of lists go by the list's."""
    return next((part for part in reversed(place) if not part.isdigit()), "")


def _place_meant(name: str, at: _Place) -> _Place:
    """Return the place that a reference written at a place points to."""
    path = name.lstrip(".")
    dots = len(name) - len(path)
    parts = tuple(part for part in re.split(r"[.\[\]]+", path) if part)
    return (at[:-dots] if dots else ()) + parts


def _leaves(path: str) -> bool:
    """Return whether a path climbs by `..`, whatever its references stand for."""
    known = _REFERENCE.sub(lambda found: found[3] or "$", path)
    return any(
        part == ".." or ("$" in part and part != "$" and not part.strip("$."))
        for part in re.split(r"[/\\]", known)
    )


def _file_meant(text: str, folder: Path | None) -> Path | None:
    """Return the file that the parser would read in a text's place."""
    if not text or "\0" in text or len(text) > 1000 or "\n" in text:
        return None
    written = Path(text).expanduser()
    for file in (written, (folder or Path()) / written):
        if file.is_file():
            return file
    return None
