"""Check the text of a recipe before the parser reads it.

The parser would import any `class_path` before it checks the type, would read strings that hold
YAML or name a file as parts of the recipe, and expands aliases; OmegaConf's resolver `oc.coerce`
imports modules. So a recipe is checked first: it must be limited in size, hold plain values, and
name classes of allowed modules only. `restrict_imports` applies the same list of modules in the
parser, for values that only their type marks as a class.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from yolo_lightning.errors import InputError, require_file

MODULES = ("yolo_lightning", "lightning.pytorch", "torch.optim")
OPTION = "--allow-module"

_BYTES, _NODES, _DEPTH, _ALIASES = 2**20, 100_000, 40, 100
_TAGS = {f"tag:yaml.org,2002:{name}" for name in "str int float bool null map seq".split()} | {"!"}
_MERGE, _STR = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"

# parameters of this package's classes whose strings may name a class
_CLASS_KEYS = {
    "class_path", "model", "data", "trainer", "init_args", "dict_kwargs", "schedule", "loss",
    "detection", "classification", "validation", "test", "detection_augmentation",
    "classification_augmentation", "logger", "callbacks", "strategy", "plugins", "profiler",
    "accelerator",
}  # fmt: skip
_FREE_FORM_KEYS = {"mapping", "metadata", "tags"}  # mappings with arbitrary keys
# many parameters of Lightning's classes take functions; these take plain strings
_TEXT_KEYS = {
    "artifact_location", "attr_name", "batch_arg_name", "checkpoint_name", "config",
    "default_root_dir", "dir", "dirpath", "entity", "exclude_batches_path", "experiment_name",
    "filename", "group", "job_type", "metadata", "monitor", "name", "notes", "nvme_path",
    "parameter_names", "prefix", "project", "root_dir", "run_id", "run_name", "save_dir",
    "sub_dir", "tags", "tracking_uri", "version", "workspace",
}  # fmt: skip
# parameters of the trainer and its parts that name output files and folders
_OUTPUT_KEYS = {
    "artifact_location", "default_root_dir", "dir", "dirpath", "filename", "folder", "name",
    "output", "root_dir", "save_dir", "sub_dir", "tracking_uri", "version",
}  # fmt: skip

# ${key}, ${..key} and ${oc.env:NAME,default}; nothing nested
_REFERENCE = re.compile(r"\$\{(?:([\w.\[\]]+)|oc\.env:\s*(\w+)\s*(?:,([^${}\[\]\\\"']*))?)\}")
_YAML = re.compile(r"^\s*[\[{&!?%#-]|:(?:\s|$)")  # strings that may be YAML collections
_URL = re.compile(r"\w+(://|::)")

_KeyPath = tuple[str, ...]


class _Position(NamedTuple):
    """Position of a value in a recipe."""

    key_path: _KeyPath  # where the value is used
    written_at: _KeyPath  # where it is written; differs for references
    owner_class: str = ""  # class_path of the object that it is a parameter of
    owner_length: int = 0  # length of that object's key path
    depth: int = 0  # nesting level, including references and aliases

    def child(self, *keys: str) -> "_Position":
        path, written_at = self.key_path + keys, self.written_at + keys
        return self._replace(key_path=path, written_at=written_at, depth=self.depth + 1)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The loader of the parser, which does not convert dates either."""

    yaml_implicit_resolvers = {
        char: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
        for char, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def restrict_imports(allowed: Sequence[str] = ()) -> None:
    """Restrict the parser to imports of `MODULES` and `allowed`, and remove OmegaConf resolvers.

    This also covers values of checkpoints, which are not checked as text.
    """
    import jsonargparse
    from omegaconf import OmegaConf

    jsonargparse.set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=[*MODULES, *allowed]
    )
    for name in ("coerce", "create", "decode", "deprecated", "select", "dict.keys", "dict.values"):
        OmegaConf.clear_resolver(f"oc.{name}")


def check_recipe(
    path: str | Path, allowed: Sequence[str] = (), may_be_dataset: bool = False
) -> dict[str, Any]:
    """Check a recipe and return its values, with references unresolved.

    `allowed` are prefixes of modules in addition to `MODULES`, matched by whole dotted parts. With
    `may_be_dataset`, YAML without the keys model, data and trainer is only checked for its size,
    and the result is empty.

    Raises:
        InputError: the file cannot be read as YAML, is too large or too deep, has a tag, a
            duplicate key, a class of another module, a resolver other than `oc.env`, a reference to
            another file, or `..` in an output path.
    """
    text = _read_text(path)
    check = _Check(str(path), allowed, Path(path).expanduser().parent)
    try:
        root = check.document(text, may_be_dataset)
        is_recipe = root is not None and not check.sizes_only
        values = _Loader("").construct_document(root) if is_recipe else None
    except InputError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        if may_be_dataset:
            return {}  # the reader of the dataset reports the error
        raise InputError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return values if isinstance(values, dict) else {}


def check_option(key: str, value: str, allowed: Sequence[str] = ()) -> Any:
    """Check an option such as `trainer.devices` or `trainer.callbacks+`; return its parsed value.

    Raises:
        InputError: as `check_recipe`, but `..` and other files are allowed; files that are used as
            parts of a recipe are checked too.
    """
    key_path = tuple(key.replace("+", "").removesuffix(".help").split("."))
    _Check("command line", allowed, None).option(value, key_path)
    try:
        return yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return value


def is_dotted_name(text: str) -> bool:
    """Check for a name such as `package.module`."""
    return bool(text) and all(part.isidentifier() for part in text.split("."))


def _read_text(path: str | Path) -> str:
    """Read a file, up to the size limit of a recipe."""
    with require_file(path, "recipe").open("rb") as stream:
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
    """Check one document, counting its values with aliases and references expanded.

    `folder` is None for the command line, which may name files and folders.
    """

    def __init__(self, origin: str, allowed: Sequence[str], folder: Path | None) -> None:
        self.origin, self.folder, self.allowed = origin, folder, tuple(allowed)
        self.visited = self.line = self.text_depth = 0
        self.sizes_only = False
        self.nodes: dict[_KeyPath, yaml.Node] = {}
        self.references: list[tuple[str, _Position]] = []

    def document(
        self, text: str, may_be_dataset: bool = False, key_path: _KeyPath = ()
    ) -> yaml.Node | None:
        """Check a recipe, or the part of one that is used at `key_path`; return its root node."""
        root = self._compose(text)
        is_recipe = bool({"model", "data", "trainer"} & set(_top_level_keys(root)))
        self.sizes_only = may_be_dataset and not is_recipe
        if root is not None:
            self._walk(root, _Position(key_path, ()))
        for name, position in self.references:  # grows in the loop
            target = _resolve_reference(name, position.written_at)
            if target in self.nodes:
                position = position._replace(written_at=target, depth=position.depth + 1)
                self._walk(self.nodes[target], position)
        return root

    def option(self, value: str, key_path: _KeyPath) -> None:
        """Check a value from the command line."""
        self._walk(yaml.ScalarNode(_STR, value), _Position(key_path, key_path))

    def _compose(self, text: str) -> yaml.Node | None:
        """Parse YAML; its size is checked on events first, as deep nodes overflow the stack."""
        depth = nodes = aliases = 0
        for event in yaml.parse(text, Loader=_Loader):
            self._set_line(event.start_mark)
            nodes += isinstance(event, yaml.NodeEvent)
            aliases += isinstance(event, yaml.AliasEvent)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if nodes > _NODES or aliases > _ALIASES or depth > _DEPTH:
                limits = f"{_NODES:,} values, {_ALIASES} aliases, {_DEPTH} levels"
                self._fail(f"too large for a recipe; allowed: at most {limits}")
            tag = getattr(event, "tag", None)
            if tag is not None and tag not in _TAGS and not self.text_depth:
                self._fail(f"tag {_short(tag)}; allowed: plain values without tags")
        return yaml.compose(text, Loader=_Loader)

    def _walk(self, node: yaml.Node, position: _Position) -> None:
        """Check a node and everything below it."""
        self._count_node(node, position.depth)
        self.nodes.setdefault(position.written_at, node)
        if isinstance(node, yaml.MappingNode):
            key_path = position.key_path
            entries = list(self._entries(node, position.depth))
            for key, value in entries:
                if key.split(".")[-1] == "class_path" and not self.sizes_only:
                    name = self._class_path(value, (*key_path, key))
                    if key == "class_path":
                        position = position._replace(owner_class=name, owner_length=len(key_path))
            for key, value in entries:
                self._walk(value, position.child(*key.replace("+", "").split(".")))
        elif isinstance(node, yaml.SequenceNode):
            for k, item in enumerate(node.value):
                self._walk(item, position.child(str(k)))
        elif node.tag == _STR and not self.sizes_only:
            self._check_text(node.value, position)

    def _entries(self, node: yaml.MappingNode, depth: int) -> Iterator[tuple[str, yaml.Node]]:
        """Yield keys and values of a mapping, including those merged by `<<`."""
        keys: set[str] = set()
        for key, value in node.value:
            self._count_node(key, depth)
            if key.tag == _MERGE:
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    self._count_node(part, depth)
                    if isinstance(part, yaml.MappingNode):
                        yield from self._entries(part, depth + 1)
                continue
            if not isinstance(key, yaml.ScalarNode):
                self._fail("a key that is not a scalar")
            if key.value in keys and not self.sizes_only:
                self._fail(f"duplicate key {_short(key.value)}")
            keys.add(key.value)
            yield key.value, value

    def _set_line(self, mark: Any) -> None:
        """Store the line for messages; YAML inside a string has the line of the string."""
        if mark is not None and not self.text_depth:
            self.line = mark.line + 1

    def _count_node(self, node: yaml.Node, depth: int) -> None:
        self._set_line(node.start_mark)
        self.visited += 1 + (len(node.value) >> 6 if isinstance(node, yaml.ScalarNode) else 0)
        if self.visited > _NODES:
            self._fail(f"more than {_NODES:,} values, with aliases and references expanded")
        if depth > 2 * _DEPTH:
            self._fail("an alias or a reference contains itself")

    def _check_text(self, value: str, position: _Position) -> None:
        key_path = position.key_path
        if key_path == ("config",) and self.folder is not None:
            self._fail("config: a recipe cannot name another one; pass several with --config")
        parts = self._add_references(value, position) if "${" in value else [value]
        is_output = key_path[:1] == ("trainer",) and _parameter_name(key_path) in _OUTPUT_KEYS
        if is_output and self.folder is not None and _has_parent_folder(value):
            where = _dotted(key_path)
            self._fail(f"{where} is {_short(value)}; an output path must not contain '..'")
        if self._may_name_class(position):
            for part in parts:
                self._check_class_or_file(part.strip(), key_path)
        if _YAML.search(value):
            self._check_nested_yaml(value, position)

    def _add_references(self, value: str, position: _Position) -> list[str]:
        """Queue the keys that a string refers to; return its other possible values to check."""
        matches = list(_REFERENCE.finditer(value))
        if len(matches) != value.count("${"):
            where = _dotted(position.key_path)
            forms = "${..key}, ${oc.env:NAME} and ${oc.env:NAME,default}, not nested"
            self._fail(f"{where} is {_short(value)}; allowed references: {forms}")
        parts = [] if matches[0].group() == value.strip() else [value]
        for name, variable, default in (match.groups() for match in matches):
            if name:
                self.references.append((name, position))
            else:
                parts += [default or "", os.environ.get(variable, "")]
        return parts

    def _may_name_class(self, position: _Position) -> bool:
        """Return whether the parser may read a string here as a class or a function."""
        key_path, owner = position.key_path, position.owner_class
        relative = key_path[position.owner_length :]
        if _FREE_FORM_KEYS & set(relative[:-1]):
            return False
        if _parameter_name(key_path) in _CLASS_KEYS:
            return True
        is_trusted = (
            owner.startswith("yolo_lightning.") or self._module_prefix(owner) in self.allowed
        )
        is_outside = "." not in owner and key_path[:1] != ("trainer",)
        if self.folder is None or is_trusted or is_outside:
            return False
        return not _TEXT_KEYS & set(relative)

    def _module_prefix(self, name: str) -> str | None:
        """Return the allowed module that contains a dotted name."""
        return next((m for m in (*MODULES, *self.allowed) if name.startswith(f"{m}.")), None)

    def _class_path(self, node: yaml.Node, key_path: _KeyPath) -> str:
        where, name = _dotted(key_path), node.value
        if not isinstance(node, yaml.ScalarNode) or "${" in name:
            self._fail(f"{where} is not a class name")
        if "." in name:  # without a dot, the parser only searches imported classes
            self._check_class(name, where)
        return str(name)

    def _check_class(self, name: str, where: str) -> None:
        """Reject names outside of the allowed modules, and functions of `MODULES`."""
        prefix, parts = self._module_prefix(name), name.split(".")
        if prefix is None:
            is_class_key = where.split(".")[-1] in _CLASS_KEYS
            hint = "" if is_class_key else " (write the name of a file as ./NAME)"
            modules = ", ".join((*MODULES, *self.allowed))
            self._fail(
                f"{where} names {_short(name)}; allowed: classes of {modules}, and of modules "
                f"passed with {OPTION}{hint}"
            )
        in_module = all(part.islower() and part[0] != "_" for part in parts[:-1])
        if prefix in MODULES and not (in_module and parts[-1][:1].isupper()):
            self._fail(f"{where} names {_short(name)}, which is not a class")

    def _check_class_or_file(self, text: str, key_path: _KeyPath) -> None:
        """Check a string that may name a class, or a file to read in its key_path."""
        where = _dotted(key_path)
        if "${" in text:
            self._fail(f"{where} is {_short(text)}; a class name cannot contain references")
        if _URL.match(text):
            self._fail(f"{where} is {_short(text)}; a recipe cannot use URLs here")
        file = _find_file(text, self.folder) if _parameter_name(key_path) in _CLASS_KEYS else None
        if file is not None and self.folder is not None:
            self._fail(f"{where} names the file {_short(text)}; a recipe is a single file")
        if file is not None:
            part = _Check(text, self.allowed, file.parent)
            part.document(_read_text(file), key_path=key_path)
        elif "." in text and is_dotted_name(text):
            self._check_class(text, where)

    def _check_nested_yaml(self, value: str, position: _Position) -> None:
        """Check a string that is YAML itself, as the parser would read it."""
        if self.text_depth > 3:
            self._fail(f"{_dotted(position.key_path)}: YAML in strings is nested too deeply")
        self.text_depth += 1
        try:
            node = self._compose(value)
            if isinstance(node, yaml.CollectionNode):
                self._walk(node, position._replace(depth=position.depth + 1))
        except yaml.YAMLError:
            pass  # the parser reads it as a plain string too
        finally:
            self.text_depth -= 1

    def _fail(self, problem: str) -> NoReturn:
        line = f", line {self.line}" if self.folder is not None else ""
        raise InputError(f"{self.origin}{line}: {problem}")


def _short(value: str) -> str:
    return repr(value if len(value) <= 80 else f"{value[:80]}…")


def _top_level_keys(root: yaml.Node | None) -> list[str]:
    """Return the keys of a document, each up to its first dot."""
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    return [str(key.value).split(".")[0] for key, _ in pairs]


def _dotted(key_path: _KeyPath) -> str:
    return ".".join(key_path)[:120]


def _parameter_name(key_path: _KeyPath) -> str:
    """Return the last key; for items of a list, the key of the list."""
    return next((part for part in reversed(key_path) if not part.isdigit()), "")


def _resolve_reference(name: str, written_at: _KeyPath) -> _KeyPath:
    """Return the key path that a reference points to."""
    path = name.lstrip(".")
    dots = len(name) - len(path)
    parts = tuple(part for part in re.split(r"[.\[\]]+", path) if part)
    return (written_at[:-dots] if dots else ()) + parts


def _has_parent_folder(path: str) -> bool:
    """Return whether a path contains `..`, or could with some values of its references."""
    template = _REFERENCE.sub(lambda match: match[3] or "$", path)
    return any(
        part == ".." or ("$" in part and part != "$" and not part.strip("$."))
        for part in re.split(r"[/\\]", template)
    )


def _find_file(text: str, folder: Path | None) -> Path | None:
    """Return the file that the parser would read in key_path of a string."""
    if not text or "\0" in text or len(text) > 1000 or "\n" in text:
        return None
    path = Path(text).expanduser()
    for file in (path, (folder or Path()) / path):
        if file.is_file():
            return file
    return None
