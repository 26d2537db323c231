"""Report what each class learns from: boxes, image labels, or labels of its descendants."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from yolo_lightning.tree.exclusive import exclusive_parts
from yolo_lightning.tree.wordtree import OTHER, WordTree

Counts = Mapping[int, Counter[str]]  # objects or images by node and label name

_MAX_NAMES, _MAX_UNLEARNT = 8, 40


def vocabulary_report(
    tree: WordTree, boxes: Counts, images: Counts, exclusive: Sequence[Sequence[int]] = ()
) -> str:
    """Return a report: counts of classes by what they learn from, merged names, coarser labels.

    `exclusive` are, of each source of boxes, the nodes of names that exclude each other. Classes
    that cannot be told from the class above are not counted.
    """
    lines = _counts(tree, boxes, images)
    lines += _summary("merged names", _merged_names(tree, boxes, images))
    if boxes and images:
        lines += _summary("boxes are coarser", _coarser_labels(tree, boxes, images))
        lines += _summary("image labels are coarser", _coarser_labels(tree, images, boxes))
        lines += _summary(
            "no class with boxes above, learn by themselves where they are",
            (tree.names[node] for node in _without_boxed_ancestor(tree, boxes, images)),
            _MAX_UNLEARNT,
        )
    lines += _exclusions(tree, {*boxes, *images}, exclusive)
    return "\n".join(lines)


def _counts(tree: WordTree, boxes: Counts, images: Counts) -> list[str]:
    """Return the number of classes by what they learn from, and the names of those of both."""

    def reported(nodes: Iterable[int]) -> set[int]:
        return {int(tree.reported[node]) for node in nodes}

    boxed, labelled = reported(boxes), reported(images)
    both, either = boxed & labelled, boxed | labelled
    classes = len(reported(range(len(tree))))
    below = len(reported(_labelled_ancestors(tree, boxes, images)) - either)
    line = (
        f"Classes: {classes}; they learn {len(boxed - both)} from boxes, "
        f"{len(labelled - both)} from image labels, {len(both)} from both, {below} from "
        f"descendants, {classes - len(either) - below} from nothing"
    )
    return [line, *_summary("from both", (tree.names[node] for node in sorted(both)))]


def vocabulary_table(tree: WordTree, boxes: Counts, images: Counts) -> list[dict[str, object]]:
    """Return one row per class: its labels, and whether a descendant has labels."""
    ancestors = _labelled_ancestors(tree, boxes, images)
    return [
        {
            "key": tree.keys[node],
            "name": tree.names[node],
            "boxes": dict(boxes.get(node, {})),
            "images": dict(images.get(node, {})),
            "labelled_below": node in ancestors,
        }
        for node in range(len(tree))
    ]


def _labelled_ancestors(tree: WordTree, boxes: Counts, images: Counts) -> set[int]:
    """Return the ancestors of labels, which the loss of a label trains too."""
    return {
        ancestor
        for node in (*boxes, *images)
        for ancestor in tree.paths[node].tolist()[1:]
        if ancestor >= 0
    }


def _summary(title: str, names: Iterable[str], shown: int = _MAX_NAMES) -> list[str]:
    listed = list(names)
    if not listed:
        return []
    more = f", … and {len(listed) - shown} more" if len(listed) > shown else ""
    return [f"  {title}: {', '.join(listed[:shown])}{more}"]


def _merged_names(tree: WordTree, boxes: Counts, images: Counts) -> Iterable[str]:
    for node in sorted(boxes.keys() | images.keys()):
        names = sorted({*boxes.get(node, ()), *images.get(node, ())})
        if len(names) > 1:
            yield f"{' = '.join(names)} ({tree.keys[node]})"


def _coarser_labels(tree: WordTree, coarse: Counts, fine: Counts) -> Iterable[str]:
    """Yield labels of one kind with their descendants among the labels of the other kind."""
    descendants: dict[int, list[int]] = {}
    for node in sorted(fine):
        ancestors = tree.paths[node].tolist()[1:]
        nearest = next((ancestor for ancestor in ancestors if ancestor in coarse), None)
        if nearest is not None and node not in coarse:
            descendants.setdefault(nearest, []).append(node)
    for node, nodes in sorted(descendants.items()):
        names = [tree.names[k] for k in nodes[:3]]
        more = f" … {len(nodes)} in all" if len(nodes) > 3 else ""
        yield f"{tree.names[node]} over {', '.join(names)}{more}"


def _without_boxed_ancestor(tree: WordTree, boxes: Counts, images: Counts) -> Iterable[int]:
    """Yield image labels without boxes of the class, of one below it, or of an ancestor itself.

    A box of a dog does not say where a dingo is, though both are below canine.
    """
    or_above = {node for label in boxes for node in tree.paths[label].tolist()}
    for node in sorted(images.keys() - or_above):
        if boxes.keys().isdisjoint(tree.paths[node].tolist()):
            yield node


def _exclusions(tree: WordTree, labels: set[int], exclusive: Sequence[Sequence[int]]) -> list[str]:
    """Return which names mean less than their class, and which classes cannot be learnt."""
    narrower: dict[int, str] = {}
    inseparable: dict[int, str] = {}
    for nodes in exclusive:
        for node, parts in exclusive_parts(tree, nodes).items():
            (narrower if parts else inseparable)[node] = _names_below(tree, node, nodes)
    names = tree.names
    lines = _summary(
        "boxes exclude other names below theirs",
        (f"{names[node]} without {below}" for node, below in narrower.items()),
    )
    lines += _summary(
        "cannot be learnt, since nothing else is below the class; add a row such as "
        f"{next((tree.keys[node] for node in inseparable), '')}{OTHER} to the tree",
        (f"{names[node]} without {below}" for node, below in inseparable.items()),
        _MAX_UNLEARNT,
    )
    only = [pair for pair in _only_children(tree, labels) if pair[1] not in inseparable]
    lines += _summary(
        "cannot be learnt, since it is the only class below another; add labels of a second one",
        (f"{names[node]} below {names[above]}" for node, above in only),
        _MAX_UNLEARNT,
    )
    return lines


def _names_below(tree: WordTree, top: int, nodes: Sequence[int]) -> str:
    below = [node for node in nodes if node != top and top in tree.paths[node].tolist()]
    return " and ".join(tree.names[node] for node in below[:_MAX_NAMES])


def _only_children(tree: WordTree, labels: set[int]) -> Iterable[tuple[int, int]]:
    """Yield labels that cannot be told from a label above them, and the node they are named."""
    for node in sorted(labels):
        path, above = tree.paths[node].tolist(), int(tree.reported[node])
        if not labels.isdisjoint(path[1 : path.index(above) + 1]):
            yield node, above
