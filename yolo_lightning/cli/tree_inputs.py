"""Inputs for building a tree: labels of datasets, hierarchies, mappings."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import yaml

from yolo_lightning.darknet.files import read_names
from yolo_lightning.datamodules.autodetect import (
    AmbiguousLayout,
    detection_source,
    label_source,
)
from yolo_lightning.datamodules.coco import count_names
from yolo_lightning.datamodules.dataset_files import table_rows
from yolo_lightning.datamodules.files import FileSource
from yolo_lightning.datamodules.voc import read_xml
from yolo_lightning.errors import (
    InputError,
    compose_yaml,
    expand,
    printable,
    read_text,
    require_file,
    require_name,
    require_path,
    short,
)
from yolo_lightning.tree.build import build_tree, is_below
from yolo_lightning.tree.labels import find_table, load_reviewed_labels, resolve_labels
from yolo_lightning.tree.wordnet import ENTITY, is_wnid, wordnet
from yolo_lightning.tree.wordtree import WordTree

ALIAS = " | "
_MAX_SHOWN = 8  # classes of a cycle


def count_labels(dataset: str, allow_outside: bool = False) -> Counter[str]:
    """Return the number of objects or images per label of a dataset.

    Args:
        dataset: a dataset in a supported layout; or only annotations: a COCO JSON file, a folder
            with Pascal VOC XML files; or a text file with one name per line.
        allow_outside: whether the dataset may name files outside its folder.

    Raises:
        InputError: an unsupported layout, or no labels.
    """
    path = expand(dataset)
    if path.suffix == ".json":
        counts = count_names(path)
    elif path.suffix in (".yaml", ".yml", ".data"):
        counts = detection_source(dataset, allow_outside=allow_outside).name_counts()
    elif path.suffix in (".csv", ".tsv"):
        counts = label_source(dataset, allow_outside).name_counts()
    elif not path.is_dir():
        counts = Counter(read_names(path))
    else:
        counts = _count_xml_labels(path) or _count_folder_labels(dataset, allow_outside)
    if not counts:
        raise InputError(
            f"{dataset}: no labels; expected class folders with images or VOC XML files"
        )
    return counts


def _count_folder_labels(dataset: str, allow_outside: bool) -> Counter[str]:
    """Count the labels of images with boxes or, if the folder has none, of images with labels."""
    openers: tuple[Callable[..., FileSource], ...] = (detection_source, label_source)
    for open_source in openers:
        try:
            source = open_source(dataset, allow_outside=allow_outside)
        except AmbiguousLayout:
            raise
        except InputError:
            continue
        return source.name_counts()
    return Counter()


def _count_xml_labels(folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for file in folder.rglob("*.xml"):
        try:
            names = [item.findtext("name", "") for item in read_xml(file).iter("object")]
        except InputError:
            continue  # training reports and skips the file
        counts.update(name.strip() for name in names if name.strip())
    return counts


def read_hierarchy(file: str) -> dict[str, str]:
    """Return the parent of each custom class: a custom class, a word of WordNet, or ``-``.

    Args:
        file: nested YAML, or lines such as ``bengal: domestic cat``; or CSV of child and parent.

    Raises:
        InputError: missing, malformed, or a class with two parents; names the line.
    """
    path = require_file(file, "hierarchy")
    parents: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, child, parent in _read_pairs(path):
        if not child:
            raise InputError(f"{path}:{line}: expected a class and its parent")
        if child in parents and (parents[child] != parent or path.suffix != ".csv"):
            raise InputError(
                f"{path}:{line}: {child!r} has the parent {_format_parent(parent)}, but line "
                f"{lines[child]} gives it {_format_parent(parents[child])}; a class has one parent "
                "and one entry: remove one entry"
            )
        parents[child], lines[child] = parent, line
    if not parents:
        raise InputError(f"{path}: contains no classes; expected lines such as bengal: cat")
    try:
        TopologicalSorter({child: [parent] for child, parent in parents.items()}).prepare()
    except CycleError as error:
        chain = error.args[1][::-1]
        shown = " under ".join(chain if len(chain) <= _MAX_SHOWN else [*chain[:_MAX_SHOWN], "…"])
        raise InputError(
            f"{path}:{max(lines[name] for name in chain)}: a cycle of parents: "
            f"{shown}; give one of them another parent, or - for the top"
        ) from None
    return parents


def _format_parent(parent: str) -> str:
    return "the top" if parent == "-" else repr(parent)


def _read_pairs(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, child and parent of a hierarchy."""
    if path.suffix == ".csv":
        pairs = _read_csv(path, "child", "parent")
    else:
        pairs = _nested_pairs(compose_yaml(read_text(path), path), "-", path)
    for line, child, parent in pairs:
        yield line, child.strip(), parent.strip() or "-"


def _read_csv(path: Path, first: str, second: str) -> Iterator[tuple[int, str, str]]:
    """Yield line and both cells of a table; comments and a header with these names are skipped."""
    for line, row in table_rows(read_text(path).splitlines(), path):
        cells = [cell.strip() for cell in row]
        if not cells or cells[0].startswith("#") or cells == [first, second]:
            continue
        if len(cells) != 2:
            raise InputError(f"{path}:{line}: expected {first},{second}; found {short(row)}")
        yield line, cells[0], cells[1]


def _nested_pairs(
    node: yaml.Node | None, parent: str, path: Path, depth: int = 0
) -> Iterator[tuple[int, str, str]]:
    """Yield line, child and parent of nested YAML."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, line = short(key.value), key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise InputError(f"{path}:{line}: {name} is no class; expected text")
            name = require_name(key.value, f"{path}:{line}")
            if isinstance(value, yaml.ScalarNode) and value.value not in ("", "~", "null"):
                yield line, name, str(value.value)  # bengal: domestic cat
            else:
                yield line, name, parent
                yield from _nested_pairs(value, name, path, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                yield item.start_mark.line + 1, str(item.value), parent
            else:
                yield from _nested_pairs(item, parent, path, depth + 1)
    elif isinstance(node, yaml.ScalarNode) and not depth:
        raise InputError(
            f"{path}:{node.start_mark.line + 1}: found only {node.value!r}; expected a list or "
            "nested classes"
        )


def read_mapping(file: str) -> dict[str, str]:
    """Return meanings by name, from lines ``name: meaning`` (YAML) or ``name,meaning`` (CSV).

    Raises:
        InputError: missing, malformed, or a name with two meanings; names the line.
    """
    path = require_file(file, "mapping")
    rows: Iterable[tuple[int, str, str]] = _read_csv(path, "name", "meaning")
    if path.suffix != ".csv":
        top = compose_yaml(read_text(path), path)
        pairs = top.value if isinstance(top, yaml.MappingNode) else []
        if not pairs or not all(isinstance(value, yaml.ScalarNode) for _, value in pairs):
            raise InputError(f"{path}: expected lines such as mouse: n03793489")
        rows = ((key.start_mark.line + 1, str(key.value), value.value) for key, value in pairs)
    meanings: dict[str, str] = {}
    for line, name, meaning in ((line, a.strip(), b.strip()) for line, a, b in rows):
        if meanings.setdefault(name, meaning) != meaning:
            raise InputError(
                f"{path}:{line}: {name!r} already has the meaning {meanings[name]!r}; remove one "
                "line"
            )
    return meanings


def build_class_tree(
    datasets: Mapping[str, Iterable[str]],
    hierarchy: Mapping[str, str] | None = None,
    meanings: Mapping[str, str] | None = None,
    table: str | None = None,
    root: str = ENTITY,
    exclusive: Collection[str] = (),
    others: Collection[str] = (),
) -> WordTree:
    """Build the tree of the labels of several datasets; labels of equal meaning share a node.

    Args:
        datasets: labels by dataset.
        hierarchy: parents of custom classes: a custom class, a word or wnid, or ``-``.
        meanings: meanings of names that are ambiguous or missing in WordNet.
        table: a table of reviewed meanings, see `resolve_labels`.
        root: wnid above the tree.
        exclusive: datasets in which a label means no other label below it.
        others: keys ``X/other`` of an earlier tree; see `build_tree`.

    Raises:
        InputError: lists all names without a meaning; also see `build_tree`.
    """
    custom = dict(hierarchy or {})
    if table is None:
        answers = infer_meanings(datasets, custom, meanings or {})
        for label, (wnid, reason) in answers.items():
            print(printable(f"{label!r} is {wordnet().describe(wnid)} ({reason})"))
        meanings = {label: wnid for label, (wnid, _) in answers.items()} | dict(meanings or {})
    words = {parent for parent in custom.values() if parent != "-" and parent not in custom}
    wnids = resolve_labels(words, meanings, where=lambda word: f"the hierarchy's parent {word!r}")
    custom_parents = {child: wnids.get(parent, parent) for child, parent in custom.items()}
    labels_by_key: dict[str, set[str]] = {}
    exclusive_keys: list[set[str]] = []
    for dataset, labels in datasets.items():
        label_list = list(labels)
        where = _label_locations(dataset, label_list)
        keys = {label: label for label in label_list if label in custom}
        keys |= resolve_labels(set(label_list) - set(custom), meanings, table, where, custom)
        if dataset in exclusive:
            exclusive_keys.append(set(keys.values()))
        for label, key in keys.items():
            labels_by_key.setdefault(key, set()).add(label)
            if is_wnid(key) and not is_below(key, root):
                raise InputError(
                    f"{where(label)}: {label!r} ({wordnet().describe(key)}) is not below the root "
                    f"{wordnet().describe(root)}; choose a higher --root, or remove it"
                )
    names = {
        key: ALIAS.join(sorted(labels - {key}))
        for key, labels in labels_by_key.items()
        if labels != {key}
    }
    labels = [*labels_by_key, *custom_parents]
    return build_tree(labels, custom_parents, names, root, exclusive_keys, others)


def infer_meanings(
    datasets: Mapping[str, Iterable[str]], custom: Collection[str], meanings: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Return wnid and reason of ambiguous labels: one meaning is reviewed, or is above others.

    *dog* is the animal, as several reviewed tables have the name and agree. With the label
    *whooping crane*, *crane* is the bird.
    """
    labels = {label for one in datasets.values() for label in one} - set(custom)
    labels -= {name for one in datasets.values() if find_table(one) for name in one}
    senses = {label: wordnet().senses(meanings.get(label, label)) for label in labels}
    clear = {word for word in {*labels, *meanings.values()} if is_wnid(word)}
    clear |= {options[0] for options in senses.values() if len(options) == 1}
    above = wordnet().above(clear)
    answers: dict[str, tuple[str, str]] = {}
    for label in sorted(labels - set(meanings)):
        fitting = [wnid for wnid in senses[label] if wnid in above]
        reviewed = [table[label] for table in load_reviewed_labels().values() if label in table]
        if len(senses[label]) > 1 and len(reviewed) > 1 and len(set(reviewed)) == 1:
            answers[label] = reviewed[0], "as in COCO, Pascal VOC or ILSVRC"
        elif len(senses[label]) > 1 and len(fitting) == 1:
            answers[label] = fitting[0], "other labels are below it"
    return answers


def _label_locations(dataset: str, labels: list[str]) -> Callable[[str], str]:
    """Return a function from a label to its location, with a line number in lists of names."""
    is_list = Path(dataset).suffix in ("", ".txt", ".names", ".list") and Path(dataset).is_file()
    lines = {label: k for k, label in reversed(list(enumerate(labels, start=1)))}
    return lambda label: f"{dataset}:{lines[label]}" if is_list else dataset


def top_labels(counts_path: str, number: int) -> list[str]:
    """Return the wnids with the most images in an ImageNet folder or a CSV of wnid and count.

    Raises:
        InputError: neither of these, or an invalid line; names the line.
    """
    if number < 1:
        raise InputError(f"--top is {number}; allowed: 1 or more")
    path = require_path(counts_path, "counts of images")
    if path.is_dir():
        counts = label_source(counts_path).name_counts()
        bad = next((name for name in counts if not is_wnid(name)), None)
        if bad is not None:
            raise InputError(f"{path}: folder {bad!r} is not a wnid")
    else:
        counts = Counter()
        for line, wnid, count in _read_csv(path, "wnid", "count"):
            if not is_wnid(wnid) or not count.isdigit():
                raise InputError(f"{path}:{line}: expected wnid,count; found '{wnid},{count}'")
            counts[wnid] += int(count)
    return sorted(counts, key=lambda wnid: (-counts[wnid], wnid))[:number]
