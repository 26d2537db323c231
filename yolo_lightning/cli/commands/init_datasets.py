"""The datasets of `init`: open them, take a part for validation, list their classes."""

import argparse
import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.cli.commands.recipe_template import Source
from yolo_lightning.cli.tree_inputs import build_class_tree, read_hierarchy, read_mapping
from yolo_lightning.datamodules.autodetect import detection_source, held_out, label_source
from yolo_lightning.datamodules.box_csv import BoxCSV
from yolo_lightning.datamodules.files import AnnotatedImages
from yolo_lightning.datamodules.layout_errors import describe_unread_images
from yolo_lightning.errors import InputError, printable, short, write_atomically
from yolo_lightning.images import UnreadableSample, read_header
from yolo_lightning.tree.wordnet import ENTITY, is_wnid
from yolo_lightning.tree.wordtree import WordTree

_IMAGES_READ, _MAX_SHOWN, _MAX_FAULTS = 64, 10, 5
_SEED = 0  # of the split
_MIN_LETTERS, _MAX_COMPARED = 5, 60  # of names that may differ by a letter


def open_sources(options: argparse.Namespace, listed: Path) -> dict[str, Any]:
    """Open the datasets, and print a summary of each; return sources by their part in the data.

    Without validation images, a part of the training images is written to the file `listed`.
    """
    parts = _open_boxes(options)
    if options.classification:
        parts["classification"] = label_source(options.classification, options.allow_outside)
    faults: set[str] = set()
    for source in parts.values():
        _print_summary(source, faults)
        if isinstance(source, AnnotatedImages):
            source.exclusive_names = not options.mixed_names
    if "validation" not in parts and options.val_fraction:
        parts |= _split(parts["detection"], listed, options.val_fraction, options.group_by)
    elif "validation" not in parts:
        print("validation: none, so neither best.ckpt nor any AP while it trains")
    if not (options.classification or options.hierarchy):  # which have classes below those of boxes
        _print_missing_names(parts, read_mapping(options.mapping) if options.mapping else {})
    return parts


def _open_boxes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sources of training, validation and test that the dataset or the user names."""
    outside, names = options.allow_outside, _names(options.names)
    training = detection_source(options.path, None, outside, options.images, names)
    parts: dict[str, Any] = {"detection": training, **held_out(options.path, training)}
    if "validation" not in parts and getattr(training, "split", None) == "trainval":
        with contextlib.suppress(InputError):  # val, if there is one, is a part of trainval
            smaller = detection_source(options.path, "train", outside, options.images)
            others = held_out(options.path, smaller)
            if "validation" in others and len(smaller):
                parts = {"detection": smaller, **others}
    if options.validation:
        parts["validation"] = detection_source(
            options.validation, "val" if options.validation == options.path else None, outside,
            names=names,
        )  # fmt: skip
    return parts


def _names(text: str | None) -> str | list[str] | None:
    """Return the file of names, or the names, that an option gives."""
    if text is None or Path(text).is_file():
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def _print_summary(source: Source, printed: set[str]) -> None:
    """Print the classes and new faults of a source; reject one without images or labels."""
    names, faults = source.name_counts(), list(source.load_index().metadata["faults"])
    if not len(source) or not sum(names.values()):
        hint = f": {faults[0]}" if faults else ""
        unread = describe_unread_images(Path(source.load_index().metadata["root"]))
        if not len(source) and unread:
            hint += f"; {unread}"
        elif not len(source) and getattr(source, "images", "") is None:
            hint += "; if the images are elsewhere: --images FOLDER"
        raise InputError(f"{source.name}: contains nothing to train on{hint}")
    indices = np.linspace(0, len(source) - 1, min(_IMAGES_READ, len(source))).astype(int)
    unreadable = []
    for index in indices.tolist():
        try:
            read_header(source.image_path(index))
        except UnreadableSample as error:
            unreadable.append(str(error))
    if len(unreadable) == len(indices):
        raise InputError(f"{source.name}: none of {len(indices)} images is one: {unreadable[0]}")
    faults += unreadable
    unit = "boxes" if isinstance(source, AnnotatedImages) else "images"
    counts = ", ".join(f"{name} {count}" for name, count in names.most_common(_MAX_SHOWN))
    more = f", … {len(names)} names in total" if len(names) > _MAX_SHOWN else ""
    print(printable(f"{source.name}: {len(source)} images; {unit}: {counts}{more}"))
    new = [fault for fault in dict.fromkeys(faults) if fault not in printed]
    printed.update(new)
    for fault in new[:_MAX_FAULTS]:
        print(f"  {printable(fault)}")
    if len(new) > _MAX_FAULTS:
        print(f"  … and {len(new) - _MAX_FAULTS} more repaired or skipped: see check-data")


def _split(
    training: AnnotatedImages, listed: Path, fraction: float, group_by: str | None
) -> dict[str, AnnotatedImages]:
    """Return training and validation: a seeded choice of whole groups, listed in a file."""
    groups, total = _groups(training, group_by), len(training)
    used = _choose_groups(groups, _classes_by_path(training), max(1, round(total * fraction)))
    chosen = [path for name in used for path in groups[name]]
    if not chosen:
        if group_by is not None:
            raise InputError(
                f"--group-by {group_by!r}: each group has most of the images, or all of a class"
            )
        print("validation: none, as each image is the only one of a class")
        return {"detection": training}
    write_atomically(listed, "".join(f"{path}\n" for path in sorted(chosen)))
    validation = training.with_list(only=str(listed))
    unit = f" ({len(used)} of {len(groups)} groups)" if group_by is not None else ""
    print(
        f"validation: no other images are named, so {len(chosen)} of the {total} training images"
        f"{unit} are chosen at random (seed {_SEED}) and listed in {listed}"
    )
    return {"detection": training.with_list(without=str(listed)), "validation": validation}


def _choose_groups(
    groups: Mapping[str, Sequence[str]], classes_by_path: Mapping[str, set[int]], wanted: int
) -> list[str]:
    """Choose groups at random until they have the wanted number of images, if they can be spared.

    No class loses its last group. Every class of at least two is among the chosen ones, the rarest
    first, unless that takes twice the wanted number of images.
    """
    names = sorted(groups)
    order = [names[k] for k in np.random.default_rng(_SEED).permutation(len(names)).tolist()]
    classes, groups_of = dict[str, set[int]](), dict[int, list[str]]()
    for name in order:
        classes[name] = set().union(*(classes_by_path[path] for path in groups[name]))
        for number in classes[name]:
            groups_of.setdefault(number, []).append(name)
    left = {number: len(members) for number, members in groups_of.items()}  # groups to train on
    rarest = sorted(groups_of, key=lambda number: (left[number], number))
    candidates: list[tuple[int | None, str, int]] = [
        *((number, name, 2 * wanted) for number in rarest for name in groups_of[number]),
        *((None, name, wanted) for name in order),
    ]
    total, images, chosen = len(classes_by_path), 0, dict[str, None]()
    for missing, name, limit in candidates:
        is_needed = missing is None or left[missing] == len(groups_of[missing])
        can_be_spared = 2 * len(groups[name]) <= total and all(left[k] > 1 for k in classes[name])
        if images < limit and is_needed and can_be_spared and name not in chosen:
            chosen[name] = None
            images += len(groups[name])
            for k in classes[name]:
                left[k] -= 1
    return list(chosen)


def _classes_by_path(training: AnnotatedImages) -> dict[str, set[int]]:
    """Return the numbers of the classes of each image."""
    index = training.load_index()
    classes, offsets = (index.arrays[name].tolist() for name in ("classes", "box_offsets"))
    return {index.path(k): set(classes[offsets[k] : offsets[k + 1]]) for k in range(len(training))}


def _print_missing_names(parts: Mapping[str, Any], meanings: Mapping[str, str]) -> None:
    """Print names that occur in training alone, or in validation or test alone."""
    used = {
        part: {meanings.get(name, name) for name in +source.name_counts()}
        for part, source in parts.items()
    }
    for part in [part for part in ("validation", "test") if part in used]:
        _print_names(f"{part}: without a box of", used["detection"] - used[part])
        _print_names(f"{part}: no training image has", used[part] - used["detection"])


def _print_names(text: str, names: Iterable[str]) -> None:
    shown = sorted(names)
    more = " …" if len(shown) > _MAX_SHOWN else ""
    if shown:
        print(printable(f"{text} {', '.join(shown[:_MAX_SHOWN])}{more}"))


def _groups(training: AnnotatedImages, group_by: str | None) -> dict[str, list[str]]:
    """Return paths of images by group: a column's value, or what a pattern finds in the path."""
    index, groups = training.load_index(), dict[str, list[str]]()
    paths = [index.path(k) for k in range(len(training))]
    # others cannot be lines of a text file
    paths = [p for p in paths if p == p.strip() and p.isprintable() and p.isascii() | _is_text(p)]
    if group_by is None:
        return {path: [path] for path in paths}
    if isinstance(training, BoxCSV) and re.fullmatch(r"\w+", group_by):
        values = training.column(group_by)
        keys = [values.get(Path(path).name, path) for path in paths]
    else:
        keys = _matches(paths, group_by)
    for path, key in zip(paths, keys, strict=True):
        groups.setdefault(key, []).append(path)
    return groups


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # a name that is not UTF-8
        return False
    return True


def _matches(paths: list[str], pattern: str) -> list[str]:
    """Return what a regular expression finds in each path, its first group if it has one."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--group-by {pattern!r}: not a regular expression ({error})") from None
    found = [regex.search(path) for path in paths]
    if not any(found):
        raise InputError(f"--group-by {pattern!r}: found in no path such as {short(paths[0])}")
    keys = [match and (match[1] if regex.groups else match[0]) for match in found]
    return [key or path for key, path in zip(keys, paths, strict=True)]


def similar_names(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return rarer names that differ by a letter, case, space or sign from others, and these."""
    by_variant: dict[str, list[str]] = {}
    for name in sorted(counts, key=lambda name: (counts[name], name)):
        key = re.sub(r"[\W_]+", "", name).casefold()
        variants = {key}
        if _MIN_LETTERS <= len(key) <= _MAX_COMPARED:
            variants |= {key[:k] + key[k + 1 :] for k in range(len(key))}
        for variant in variants - {""}:
            by_variant.setdefault(variant, []).append(name)
    pairs = {pair for names in by_variant.values() for pair in itertools.combinations(names, 2)}
    # type 7 and type 8 are two classes
    same = [pair for pair in pairs if len({tuple(re.findall(r"\d+", n)) for n in pair}) == 1]
    most_frequent = dict(sorted(same, key=lambda pair: (counts[pair[1]], pair)))
    return sorted(most_frequent.items())


def build_tree_of(
    options: argparse.Namespace, sources: Iterable[Source], pretrained: Mapping[str, Any]
) -> WordTree:
    """Build the tree of all class names; leaves ``X/other`` of the pretrained tree are kept.

    It is flat for boxes alone. Images with labels, or a hierarchy, need the meanings of names.
    """
    names: dict[str, list[str]] = {}
    exclusive: set[str] = set()
    counts: Counter[str] = Counter()
    sources = list(sources)
    for source in sources:
        used = Counter({name: count for name, count in source.name_counts().items() if count})
        counts += used
        names.setdefault(source.name, []).extend(used)
        exclusive |= {source.name} if getattr(source, "exclusive_names", False) else set()
    meanings = read_mapping(options.mapping) if options.mapping else {}
    _ask_about_similar_names({n: count for n, count in counts.items() if n not in meanings})
    needs_tree = options.classification or options.hierarchy or options.table
    needs_tree = needs_tree or options.root != ENTITY or all(map(is_wnid, counts))
    if options.flat or not needs_tree:
        for source in sources:
            source.mapping |= {name: meanings[name] for name in counts if name in meanings}
        return WordTree.from_names(sorted({meanings.get(name, name) for name in counts}))
    hierarchy = read_hierarchy(options.hierarchy) if options.hierarchy else {}
    others = WordTree(pretrained["tree"]).others if pretrained else ()
    try:
        return build_class_tree(
            names, hierarchy, meanings, options.table, options.root, exclusive, others
        )
    except InputError as error:
        raise InputError(
            f"{error}\n  Put names with several meanings into --mapping FILE (mouse: n03793489), "
            "your own classes into --hierarchy FILE (bengal: domestic cat), or use all names "
            "without a hierarchy: --flat"
        ) from None


def _ask_about_similar_names(counts: Mapping[str, int]) -> None:
    pairs = [pair for pair in similar_names(counts) if not all(map(is_wnid, pair))]
    shown = "; ".join(f"{a!r} ({counts[a]}) and {b!r} ({counts[b]})" for a, b in pairs[:_MAX_SHOWN])
    if pairs:
        line = "{!r}: {!r}".format(*pairs[0])
        print(printable(f"one class or two? {shown}; to join them: --mapping FILE with {line}"))
