"""`yolo-lightning wordtree`: build a tree of classes, and look at it."""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from yolo_lightning.cli.tree_inputs import (
    labels_in,
    read_hierarchy,
    read_mapping,
    top_labels,
    tree_of,
)
from yolo_lightning.darknet.files import (
    darknet_order,
    read_names,
    read_tree,
    write_names,
    write_tree,
)
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.tree.build import ENTITY
from yolo_lightning.tree.labels import reviewed
from yolo_lightning.tree.wordnet import is_wnid
from yolo_lightning.tree.wordtree import WordTree
from yolo_lightning.visualization.tree import MAX_NODES, depth_for, layout, save


def write(tree: WordTree, output: str) -> None:
    """Write a tree: tab-separated, or Darknet's `.tree` with its `.names`.

    Raises:
        InputError: a place that cannot be written.
    """
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tree":
            order = darknet_order(tree)
            write_tree(path, tree, order)
            write_names(path.with_suffix(".names"), (tree.names[node] for node in order))
            return
        fresh = path.with_name(path.name + ".fresh")
        head = "# Key, key of its parent or -, name."
        fresh.write_text(f"{head}\n{tree.text()}", encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise InputError(f"--output {output!r}: {error.strerror}") from None


def read(place: str) -> WordTree:
    """Return a tree from a file of ours, or from a `.tree` file with the `.names` beside it."""
    path = Path(place)
    if path.suffix != ".tree":
        return WordTree.read(place)
    names = path.with_suffix(".names")
    return read_tree(path, read_names(names) if names.is_file() else None)


def _build(options: argparse.Namespace) -> None:
    datasets: dict[str, Iterable[str]] = {}
    for place in options.wnids:
        wnids = read_names(place)
        bad = next(((k, w) for k, w in enumerate(wnids, start=1) if not is_wnid(w)), None)
        if bad is not None:
            raise InputError(f"{place}:{bad[0]}: {bad[1]!r} is no wnid, such as n02121808")
        datasets[place] = wnids
    for place in options.names:
        datasets[place] = read_names(place)
    if options.top is not None:
        if len(options.classification) != 1:
            raise InputError("--top needs one --classification: a folder, or a CSV of wnid,count")
        datasets[options.classification[0]] = top_labels(options.classification[0], options.top)
    for place in [*options.detection, *([] if options.top else options.classification)]:
        datasets[place] = labels_in(place)
    hierarchy = read_hierarchy(options.hierarchy) if options.hierarchy else {}
    if not datasets and not hierarchy:
        raise InputError(
            "nothing to build from; name --wnids, --names, --detection, --classification or "
            "--hierarchy"
        )
    meanings = read_mapping(options.mapping) if options.mapping else {}
    tree = tree_of(datasets, hierarchy, meanings, options.table, options.root)
    write(tree, options.output)
    levels = tree.paths.shape[1]
    size = f"{len(tree)} nodes, {len(tree.leaves)} leaves, {tree.group_count} groups"
    print(f"{options.output}: {size}, {levels} levels")


def render(
    tree: WordTree,
    counts: Mapping[str, Mapping[int, int]],
    node: int | None = None,
    depth: int | None = None,
    colour: bool = False,
) -> str:
    """Return an indented tree with what each node has in each dataset.

    Args:
        tree: the classes.
        counts: objects or images by node, for each dataset.
        node: where to begin; the top where None.
        depth: how many levels to show; all where None.
        colour: whether to mark nodes that a dataset labels.
    """
    children: dict[int, list[int]] = {}
    for child, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(child)
    lines: list[str] = []

    def size(at: int) -> int:
        return sum(1 + size(child) for child in children.get(at, []))

    def walk(at: int, level: int) -> None:
        own = [f"{name} {found[at]}" for name, found in counts.items() if found.get(at)]
        text = tree.names[at]
        if colour and own:
            text = f"\033[1;{32 if len(own) > 1 else 36}m{text}\033[0m"
        hidden = size(at) if depth is not None and level + 1 >= depth else 0
        notes = [*own, *([f"{hidden} below"] if hidden else [])]
        key = "" if tree.keys[at] == tree.names[at] else f" [{tree.keys[at]}]"
        lines.append(f"{'  ' * level}{text}{key}{'  ' + ', '.join(notes) if notes else ''}")
        if not hidden:
            for child in children.get(at, []):
                walk(child, level + 1)

    for top in children.get(-1, []) if node is None else [node]:
        walk(top, 0)
    return "\n".join(lines)


def _show(options: argparse.Namespace) -> None:
    tree = read(options.tree)
    if options.depth is not None and options.depth < 1:
        raise InputError(f"--depth is {options.depth}; allowed: 1 or more")
    counts: dict[str, dict[int, int]] = {}
    for place in options.data:
        found: Counter[int] = Counter()
        for label, count in labels_in(place).items():
            found[tree.node(label, place)] += count
        counts[Path(place).name] = found
    node = tree.node(options.node, "--node") if options.node else None
    print(render(tree, counts, node, options.depth, sys.stdout.isatty()))


def _plot(options: argparse.Namespace) -> None:
    tree = read(options.tree)
    depth = options.depth if options.depth is not None else depth_for(tree)
    if depth < 1:
        raise InputError(f"--depth is {options.depth}; allowed: 1 or more")
    labelled: dict[int, set[str]] = {}
    for kind in ("detection", "classification"):
        for place in getattr(options, kind):
            for label in labels_in(place):
                labelled.setdefault(tree.node(label, place), set()).add(kind)
    kinds = {node: "both" if len(k) > 1 else next(iter(k)) for node, k in labelled.items()}
    counts = Counter(kinds.values())
    counts["neither"] = len(tree) - sum(counts.values())
    words = {
        "detection": "boxes", "classification": "image labels", "both": "both",
        "neither": "neither",
    }  # fmt: skip
    legend = {kind: f"{words[kind]}: {counts[kind]}" for kind in words if counts[kind]}
    save(layout(tree, kinds, depth), legend, Path(options.output))
    print(f"{options.output}: {min(depth, tree.paths.shape[1])} of {tree.paths.shape[1]} levels")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning wordtree", description="Build a tree of classes, and look at it."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|show|plot")
    builder = actions.add_parser("build", help="write a tree over the labels of datasets")
    builder.add_argument("--output", required=True, help="tree.tsv, or Darknet's NAME.tree")
    builder.add_argument("--wnids", action="append", default=[], help="a wnid a line")
    builder.add_argument("--names", action="append", default=[], help="a word a line; .names files")
    for kind in ("detection", "classification"):
        builder.add_argument(
            f"--{kind}", action="append", default=[],
            help="COCO JSON, folder with VOC XML files, or class folders",
        )  # fmt: skip
    builder.add_argument("--hierarchy", help="your own classes: YAML nesting or CSV child,parent")
    builder.add_argument("--mapping", help="what names mean: YAML or CSV of name and wnid or word")
    builder.add_argument("--table", help=f"reviewed meanings to use: {', '.join(reviewed())}")
    builder.add_argument("--root", default=ENTITY, help="wnid above the tree (entity)")
    builder.add_argument(
        "--top", type=int, metavar="N",
        help="of --classification, a folder or a CSV of wnid,count, the N synsets with most images",
    )  # fmt: skip
    shower = actions.add_parser("show", help="print a tree")
    shower.add_argument("tree", help="tree.tsv, or Darknet's NAME.tree")
    shower.add_argument("--node", help="key or name of the branch to show")
    shower.add_argument("--depth", type=int, help="levels to show")
    shower.add_argument(
        "--data", action="append", default=[], help="a dataset whose labels are counted"
    )
    plotter = actions.add_parser("plot", help="draw a tree")
    plotter.add_argument("tree", help="tree.tsv, or Darknet's NAME.tree")
    plotter.add_argument("--output", required=True, help="NAME.svg or NAME.png")
    plotter.add_argument(
        "--depth", type=int, help=f"levels to draw; as many as {MAX_NODES} nodes have"
    )
    for kind in ("detection", "classification"):
        plotter.add_argument(
            f"--{kind}", action="append", default=[], help="a dataset whose labels are coloured"
        )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run `wordtree build`, `show` or `plot`.

    Raises:
        InputError: whatever is wrong with the input; nothing is written then.
    """
    actions = {"build": _build, "show": _show, "plot": _plot}
    if argv and not argv[0].startswith("-") and argv[0] not in actions:
        hint = nearest(argv[0], actions) or f"allowed: {', '.join(actions)}"
        raise InputError(f"wordtree {argv[0]!r}; {hint}")
    options = _parser().parse_args(list(argv))
    actions[options.action](options)
