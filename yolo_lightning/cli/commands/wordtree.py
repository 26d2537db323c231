"""The command `yolo-lightning wordtree`: build, print or plot a tree of classes."""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_lightning.darknet.files import (
    darknet_order,
    read_names,
    read_tree,
    write_names,
    write_tree,
)
from yolo_lightning.errors import InputError, nearest, require_file, write_atomically
from yolo_lightning.tree.labels import load_reviewed_labels
from yolo_lightning.tree.wordnet import ENTITY, is_wnid

if TYPE_CHECKING:
    from yolo_lightning.tree.wordtree import WordTree

MIXED_NAMES = (
    "boxes of one dataset may have coarse and fine names, such as animal and dog for a dog; by "
    "default, the name animal means none of its other names"
)


def write(tree: "WordTree", output: str) -> None:
    """Write a tree: tab-separated, or Darknet's `.tree` with its `.names`.

    Raises:
        InputError: the output cannot be written.
    """
    path = Path(output)
    if path.suffix != ".tree":
        write_atomically(path, f"# Key, key of its parent or -, name.\n{tree.to_text()}")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        order = darknet_order(tree)
        write_tree(path, tree, order)
        write_names(path.with_suffix(".names"), (tree.names[node] for node in order))
    except OSError as error:
        raise InputError(f"--output {output!r}: {error.strerror}") from None


def read(file: str) -> "WordTree":
    """Read a tree: tab-separated, of a checkpoint, or Darknet's `.tree` with its `.names`."""
    from yolo_lightning.checkpoints.validation import is_checkpoint, read_checkpoint
    from yolo_lightning.tree.wordtree import WordTree

    path = require_file(file, "tree file")
    if is_checkpoint(path):
        return WordTree(read_checkpoint(path)["hyper_parameters"]["tree"], file)
    if path.suffix != ".tree":
        return WordTree.from_file(file)
    names = path.with_suffix(".names")
    return read_tree(path, read_names(names) if names.is_file() else None)


def _build(options: argparse.Namespace) -> None:
    from yolo_lightning.cli.tree_inputs import (
        build_class_tree,
        count_labels,
        read_hierarchy,
        read_mapping,
        top_labels,
    )

    datasets: dict[str, Iterable[str]] = {}
    for file in options.wnids:
        wnids = read_names(file)
        for line, wnid in enumerate(wnids, start=1):
            if not is_wnid(wnid):
                raise InputError(f"{file}:{line}: {wnid!r} is not a wnid such as n02121808")
        datasets[file] = wnids
    for file in options.names:
        datasets[file] = read_names(file)
    if options.top is not None:
        if len(options.classification) != 1:
            raise InputError("--top requires one --classification: a folder or a CSV of wnid,count")
        datasets[options.classification[0]] = top_labels(options.classification[0], options.top)
    for dataset in [*options.detection, *([] if options.top else options.classification)]:
        datasets[dataset] = count_labels(dataset, options.allow_outside)
    hierarchy = read_hierarchy(options.hierarchy) if options.hierarchy else {}
    if not datasets and not hierarchy:
        raise InputError(
            "no input; use --wnids, --names, --detection, --classification or --hierarchy"
        )
    meanings = read_mapping(options.mapping) if options.mapping else {}
    exclusive = [] if options.mixed_names else [*options.names, *options.detection]
    others = read(options.previous).others if options.previous else ()
    tree = build_class_tree(
        datasets, hierarchy, meanings, options.table, options.root, exclusive, others
    )
    write(tree, options.output)
    levels = tree.paths.shape[1]
    size = f"{len(tree)} nodes, {len(tree.leaves)} leaves, {tree.num_groups} groups"
    print(f"{options.output}: {size}, {levels} levels")


def render(
    tree: "WordTree",
    counts: Mapping[str, Mapping[int, int]],
    node: int | None = None,
    depth: int | None = None,
    colour: bool = False,
) -> str:
    """Return an indented tree with the number of objects or images per node.

    Args:
        tree: the classes.
        counts: objects or images by node, per dataset.
        node: root of the printed subtree; None for the whole tree.
        depth: number of levels; None for all.
        colour: whether to highlight nodes with labels, by terminal escape codes.
    """
    children: dict[int, list[int]] = {}
    for child, parent in enumerate(tree.parents.tolist()):
        children.setdefault(parent, []).append(child)
    lines: list[str] = []

    def count_descendants(parent: int) -> int:
        return sum(1 + count_descendants(child) for child in children.get(parent, []))

    def add_lines(node: int, level: int) -> None:
        notes = [f"{name} {by_node[node]}" for name, by_node in counts.items() if by_node.get(node)]
        text = tree.names[node]
        if colour and notes:
            text = f"\033[1;{32 if len(notes) > 1 else 36}m{text}\033[0m"
        hidden = count_descendants(node) if depth is not None and level + 1 >= depth else 0
        if hidden:
            notes.append(f"{hidden} below")
        key = "" if tree.keys[node] == tree.names[node] else f" [{tree.keys[node]}]"
        lines.append(f"{'  ' * level}{text}{key}{'  ' + ', '.join(notes) if notes else ''}")
        if not hidden:
            for child in children.get(node, []):
                add_lines(child, level + 1)

    for root in children.get(-1, []) if node is None else [node]:
        add_lines(root, 0)
    return "\n".join(lines)


def _show(options: argparse.Namespace) -> None:
    from yolo_lightning.cli.tree_inputs import count_labels

    tree = read(options.tree)
    if options.depth is not None and options.depth < 1:
        raise InputError(f"--depth is {options.depth}; allowed: 1 or more")
    if options.output is not None:
        write(tree, options.output)
        print(f"{options.output}: {len(tree)} nodes")
        return
    counts: dict[str, dict[int, int]] = {}
    for dataset in options.data:
        by_node: Counter[int] = Counter()
        for label, count in count_labels(dataset, options.allow_outside).items():
            by_node[tree.find_node(label, dataset)] += count
        counts[Path(dataset).name] = by_node
    node = tree.find_node(options.node, "--node") if options.node else None
    print(render(tree, counts, node, options.depth, sys.stdout.isatty()))


def _plot(options: argparse.Namespace) -> None:
    from yolo_lightning.cli.tree_inputs import count_labels
    from yolo_lightning.visualization.tree import layout_tree, plot_tree, save_tree, visible_depth

    tree = read(options.tree)
    depth = options.depth if options.depth is not None else visible_depth(tree)
    if depth < 1:
        raise InputError(f"--depth is {options.depth}; allowed: 1 or more")
    labelled: dict[int, set[str]] = {}
    for kind in ("detection", "classification"):
        for dataset in getattr(options, kind):
            for label in count_labels(dataset, options.allow_outside):
                labelled.setdefault(tree.find_node(label, dataset), set()).add(kind)
    kinds = {node: "both" if len(k) > 1 else next(iter(k)) for node, k in labelled.items()}
    counts = Counter(kinds.values())
    counts["neither"] = len(tree) - sum(counts.values())
    words = {
        "detection": "boxes", "classification": "image labels", "both": "both",
        "neither": "neither",
    }  # fmt: skip
    legend = {kind: f"{words[kind]}: {counts[kind]}" for kind in words if counts[kind] and labelled}
    save_tree(plot_tree(layout_tree(tree, depth), kinds, legend), Path(options.output))
    print(f"{options.output}: {min(depth, tree.paths.shape[1])} of {tree.paths.shape[1]} levels")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning wordtree", description="Build, print or plot a tree of classes."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="build|show|plot")
    builder = actions.add_parser("build", help="build a tree from the labels of datasets")
    builder.add_argument("--output", required=True, help="tree.tsv, or Darknet's NAME.tree")
    builder.add_argument("--wnids", action="append", default=[], help="file with one wnid per line")
    builder.add_argument("--names", action="append", default=[], help="file with one name per line")
    for kind in ("detection", "classification"):
        builder.add_argument(
            f"--{kind}", action="append", default=[],
            help="COCO JSON, folder with VOC XML files, or class folders",
        )  # fmt: skip
    builder.add_argument("--hierarchy", help="custom classes: nested YAML, or CSV child,parent")
    builder.add_argument("--mapping", help="meanings of names: YAML or CSV of name, wnid or word")
    builder.add_argument(
        "--table", help=f"table of reviewed meanings: {', '.join(load_reviewed_labels())}"
    )
    builder.add_argument("--root", default=ENTITY, help="wnid above the tree; default: entity")
    builder.add_argument(
        "--top", type=int, metavar="N",
        help="the N synsets with the most images in --classification: a folder, or a CSV of "
        "wnid,count",
    )  # fmt: skip
    builder.add_argument(
        "--previous", metavar="TREE", help="earlier tree or checkpoint, whose leaves X/other stay"
    )
    builder.add_argument("--mixed-names", action="store_true", help=MIXED_NAMES)
    shower = actions.add_parser("show", help="print a tree")
    shower.add_argument("tree", help="tree.tsv, a checkpoint, or Darknet's NAME.tree")
    shower.add_argument("--output", help="write the whole tree instead: tree.tsv or NAME.tree")
    shower.add_argument("--node", help="key or name of the root of the printed subtree")
    shower.add_argument("--depth", type=int, help="number of levels; default: all")
    shower.add_argument("--data", action="append", default=[], help="dataset to count labels of")
    plotter = actions.add_parser("plot", help="plot a tree")
    plotter.add_argument("tree", help="tree.tsv, a checkpoint, or Darknet's NAME.tree")
    plotter.add_argument("--output", required=True, help="NAME.svg or NAME.png")
    plotter.add_argument("--depth", type=int, help="number of levels; default: 1,500 nodes at most")
    for kind in ("detection", "classification"):
        plotter.add_argument(
            f"--{kind}", action="append", default=[], help="dataset whose labels are coloured"
        )
    for command in (builder, shower, plotter):
        command.add_argument(
            "--allow-outside",
            action="store_true",
            help="let the dataset name files outside its folder",
        )
    return parser


def main(argv: Sequence[str]) -> None:
    """Run `wordtree build`, `show` or `plot`.

    Raises:
        InputError: invalid input; nothing is written.
    """
    actions = {"build": _build, "show": _show, "plot": _plot}
    if argv and not argv[0].startswith("-") and argv[0] not in actions:
        hint = nearest(argv[0], actions) or f"allowed: {', '.join(actions)}"
        raise InputError(f"wordtree {argv[0]!r}; {hint}")
    options = _parser().parse_args(list(argv))
    actions[options.action](options)
