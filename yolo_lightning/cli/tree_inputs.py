"""What a tree is built from: labels of datasets, hierarchies, mappings."""

import csv
import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import yaml

from yolo_lightning.darknet.files import read_names
from yolo_lightning.datamodules.autodetect import (
    AmbiguousLayout,
    detection_source,
    label_source,
)
from yolo_lightning.errors import InputError
from yolo_lightning.tree.build import ENTITY, build, lies_below
from yolo_lightning.tree.labels import resolve
from yolo_lightning.tree.wordnet import is_wnid, wordnet
from yolo_lightning.tree.wordtree import WordTree

ALIAS = " | "


def labels_in(place: str) -> Counter[str]:
    """Return the labels of a dataset and how many objects or images have each.

    Args:
        place: any layout of images with boxes or labels that is recognised, or the annotations
            alone: a COCO JSON, a folder with Pascal VOC XML files; or a text with a name a line.

    Raises:
        InputError: none of these, or one without labels; names file and line where it can.
    """
    path = Path(place).expanduser()
    if path.suffix == ".json":
        found = _labels_of_coco(path)
    elif path.suffix in (".yaml", ".yml", ".data"):
        found = detection_source(place).name_counts()
    elif path.suffix in (".csv", ".tsv"):
        found = label_source(place).name_counts()
    elif not path.is_dir():
        found = Counter(read_names(path))
    else:
        found = _labels_of_xml(path) or _recognised(place)
    if not found:
        raise InputError(f"{place}: no labels; expected class folders with images or VOC XML files")
    return found


def _recognised(place: str) -> Counter[str]:
    """Return the labels of a folder as training reads it, with boxes or with labels alone."""
    try:
        return detection_source(place).name_counts()
    except AmbiguousLayout:
        raise
    except InputError:
        pass  # no boxes: labels alone, perhaps
    try:
        return label_source(place).name_counts()
    except InputError:
        return Counter()


def _labels_of_xml(folder: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    for file in folder.rglob("*.xml"):
        try:
            names = [item.findtext("name", "") for item in ET.parse(file).iter("object")]
        except ET.ParseError:
            continue  # training names it and leaves it out
        found.update(name.strip() for name in names if name.strip())
    return found


def _labels_of_coco(path: Path) -> Counter[str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        names = {item["id"]: str(item["name"]) for item in data["categories"]}
        counts = Counter(names.get(item["category_id"]) for item in data.get("annotations", []))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a COCO annotation file ({error!r})") from None
    return Counter({name: counts.get(name, 0) for name in names.values()})


def read_hierarchy(place: str) -> dict[str, str]:
    """Return the parent of each class of one's own: a class, a word of WordNet, or ``-``.

    Args:
        place: YAML, where what is nested lies below, and ``bengal: domestic cat`` hangs a class
            under a word; or CSV of child and parent.

    Raises:
        InputError: missing, malformed, or a class with two parents; names the line.
    """
    path = Path(place).expanduser()
    parents: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, child, parent in _pairs(path, "hierarchy"):
        if not child:
            raise InputError(f"{path}:{line}: expected a class and its parent")
        if child in parents:
            same = parents[child] == parent
            if not same or path.suffix != ".csv":
                raise InputError(
                    f"{path}:{line}: {child!r} lies under {_shown(parents[child])} already (line "
                    f"{lines[child]}), and now under {_shown(parent)}; a class has one parent and "
                    "stands once: take one of them out"
                )
        parents[child], lines[child] = parent, line
    if not parents:
        raise InputError(f"{path}: holds no classes; expected lines such as bengal: domestic cat")
    for start in parents:
        _refuse_cycle(start, parents, lines, path)
    return parents


def _shown(parent: str) -> str:
    return "the top" if parent == "-" else repr(parent)


def _refuse_cycle(
    start: str, parents: Mapping[str, str], lines: Mapping[str, int], path: Path
) -> None:
    way = [start]
    while way[-1] in parents:
        way.append(parents[way[-1]])
        if way[-1] in way[:-1]:
            last = max(lines[name] for name in way)
            raise InputError(
                f"{path}:{last}: a cycle of parents: {' under '.join(way)}; give one of them "
                "another parent, or - for the top"
            )


def _pairs(path: Path, what: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, child and parent of a hierarchy."""
    text = _text(path, what)
    if path.suffix != ".csv":
        for line, child, parent in _nested(_composed(text, path), "-", path, 0):
            yield line, child.strip(), parent.strip() or "-"
        return
    for number, row in enumerate(csv.reader(text.splitlines()), start=1):
        if not row or row[0].startswith("#") or [c.strip() for c in row] == ["child", "parent"]:
            continue
        if len(row) != 2:
            raise InputError(f"{path}:{number}: expected child,parent; found {','.join(row)!r}")
        yield number, row[0].strip(), row[1].strip() or "-"


def _text(path: Path, what: str) -> str:
    if not path.is_file():
        raise InputError(f"{what} {str(path)!r} not found (working folder: {Path.cwd()})")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None


def _composed(text: str, path: Path) -> yaml.Node | None:
    """Return YAML as nodes, which know their lines and hide no key that stands twice."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{path}:{line}: not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None


_MAX_NESTED = 200


def _nested(
    node: yaml.Node | None, parent: str, path: Path, depth: int
) -> Iterator[tuple[int, str, str]]:
    """Yield line, child and parent of nested YAML."""
    if depth > _MAX_NESTED:
        raise InputError(f"{path}: nested more than {_MAX_NESTED} deep")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if isinstance(value, yaml.ScalarNode) and value.value not in ("", "~", "null"):
                yield line, name, str(value.value)  # bengal: domestic cat
            else:
                yield line, name, parent
                yield from _nested(value, name, path, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                yield item.start_mark.line + 1, str(item.value), parent
            else:
                yield from _nested(item, parent, path, depth + 1)
    elif isinstance(node, yaml.ScalarNode) and not depth:
        raise InputError(
            f"{path}:{node.start_mark.line + 1}: {node.value!r} stands alone; expected a list or "
            "classes below it"
        )


def read_mapping(place: str) -> dict[str, str]:
    """Return what names mean: lines of ``name: meaning`` (YAML) or ``name,meaning`` (CSV).

    Raises:
        InputError: missing, malformed, or a name with two meanings; names the line.
    """
    path = Path(place).expanduser()
    text = _text(path, "mapping")
    rows: list[tuple[int, str, str]] = []
    if path.suffix == ".csv":
        for number, row in enumerate(csv.reader(text.splitlines()), start=1):
            if row and not row[0].startswith("#"):
                if len(row) != 2:
                    raise InputError(
                        f"{path}:{number}: expected name,meaning; found {','.join(row)!r}"
                    )
                rows.append((number, row[0], row[1]))
    else:
        top = _composed(text, path)
        pairs = top.value if isinstance(top, yaml.MappingNode) else []
        if not pairs or not all(isinstance(value, yaml.ScalarNode) for _, value in pairs):
            raise InputError(f"{path}: expected lines such as mouse: n03793489")
        rows = [(key.start_mark.line + 1, str(key.value), str(v.value)) for key, v in pairs]
    found: dict[str, str] = {}
    for number, name, meaning in ((n, a.strip(), b.strip()) for n, a, b in rows):
        if found.get(name, meaning) != meaning:
            raise InputError(
                f"{path}:{number}: {name!r} means {found[name]!r} already; take one line out"
            )
        found[name] = meaning
    return found


def tree_of(
    datasets: Mapping[str, Iterable[str]],
    hierarchy: Mapping[str, str] | None = None,
    meanings: Mapping[str, str] | None = None,
    table: str | None = None,
    root: str = ENTITY,
) -> WordTree:
    """Return the tree over the labels of several datasets; equal meanings share a node.

    Args:
        datasets: labels by the name of the dataset.
        hierarchy: parents of classes of one's own: another one, a word or wnid, or ``-``.
        meanings: what names mean, where WordNet knows several things or none.
        table: of the reviewed meanings, see `resolve`.
        root: wnid above the tree.

    Raises:
        InputError: names without a meaning, all of them, and whatever `build` refuses.
    """
    own = dict(hierarchy or {})
    words = {parent for parent in own.values() if parent != "-" and parent not in own}
    found = resolve(words, meanings, where=lambda word: f"the hierarchy's parent {word!r}")
    own_parents = {child: found.get(parent, parent) for child, parent in own.items()}
    keys: dict[str, set[str]] = {}
    for dataset, labels in datasets.items():
        listed = list(labels)
        place = _places(dataset, listed)
        meant = {label: label for label in listed if label in own}
        meant |= resolve(set(listed) - set(own), meanings, table, place, own)
        for label, key in meant.items():
            keys.setdefault(key, set()).add(label)
            if is_wnid(key) and not lies_below(key, root):
                raise InputError(
                    f"{place(label)}: {label!r} ({wordnet().describe(key)}) shares no root with "
                    f"the rest: it does not lie below {wordnet().describe(root)}; choose a higher "
                    "--root, or take it out"
                )
    said = {key: labels - {key} for key, labels in keys.items()}  # keys are known as they are
    names = {key: ALIAS.join(sorted(labels)) for key, labels in said.items() if labels}
    return build([*keys, *own_parents], own_parents, names, root)


def _places(dataset: str, labels: list[str]) -> Callable[[str], str]:
    """Return what says where a label stands: with its line where the dataset is a list of them."""
    is_list = Path(dataset).suffix in ("", ".txt", ".names", ".list") and Path(dataset).is_file()
    lines = {label: k for k, label in reversed(list(enumerate(labels, start=1)))}
    return lambda label: f"{dataset}:{lines[label]}" if is_list else dataset


def top_labels(counts_path: str, number: int) -> list[str]:
    """Return the wnids with most images, of an ImageNet folder or a CSV of wnid and count.

    Raises:
        InputError: neither of these, or a line that is no wnid and count; names the line.
    """
    path = Path(counts_path).expanduser()
    if number < 1:
        raise InputError(f"--top is {number}; allowed: 1 or more")
    if path.is_dir():
        counts = label_source(counts_path).name_counts()
        bad = next((name for name in counts if not is_wnid(name)), None)
        if bad is not None:
            raise InputError(f"{path}: folder {bad!r} is no wnid")
    else:
        counts = Counter()
        for line, row in enumerate(csv.reader(_lines(path)), start=1):
            if not row or row == ["wnid", "count"]:
                continue
            if len(row) != 2 or not is_wnid(row[0].strip()) or not row[1].strip().isdigit():
                raise InputError(f"{path}:{line}: expected wnid,count; found {','.join(row)!r}")
            counts[row[0].strip()] += int(row[1])
    return sorted(counts, key=lambda wnid: (-counts[wnid], wnid))[:number]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise InputError(f"{str(path)!r}: no such file or folder (working folder: {Path.cwd()})")
    return path.read_text(encoding="utf-8").splitlines()
