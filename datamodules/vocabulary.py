"""Report what each class learns from: boxes, image labels, or labels of its descendants."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

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
    counts = {
        "boxes": len(boxed - both),
        "image labels": len(labelled - both),
        "both": len(both),
        "descendants": below,
        "nothing": classes - len(either) - below,
    }
    texts = [f"{count} from {origin}" for origin, count in counts.items() if count]
    return [
        f"Classes: {classes}; they learn {', '.join(texts)}",
        *_summary("from both", (tree.names[node] for node in sorted(both))),
    ]


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
    names, narrower, inseparable, trained = tree.names, {}, {}, set(labels)
    for nodes in exclusive:
        paths = tree.paths[list(nodes)]
        for node, parts in exclusive_parts(tree, nodes).items():
            below = torch.tensor(nodes)[(paths[:, 1:] == node).any(dim=1)].tolist()
            text = f"{names[node]} without {' and '.join(names[k] for k in below[:_MAX_NAMES])}"
            if parts:
                more = " or …" if len(parts) > 3 else ""
                narrower[node] = f"{text} is {' or '.join(names[k] for k in parts[:3])}{more}"
            else:
                inseparable[node] = text
            trained.update(parts)
    row = f"{tree.keys[min(inseparable)]}{OTHER}" if inseparable else ""
    only = [pair for pair in _only_labelled(tree, labels, trained) if pair[1] not in inseparable]
    return [
        *_summary("boxes exclude other names below theirs", narrower.values()),
        *_summary(
            "cannot be learnt, since nothing else is below the class; add a row such as "
            f"{row} to the tree",
            inseparable.values(),
            _MAX_UNLEARNT,
        ),
        *_summary(
            "cannot be learnt, since no other class below the same one has labels; add some",
            (f"{names[node]} below {names[above]}" for node, above in only),
            _MAX_UNLEARNT,
        ),
    ]


def _only_labelled(
    tree: WordTree, labels: set[int], trained: set[int]
) -> Iterable[tuple[int, int]]:
    """Yield labels that nothing tells from a label above them, and the nearest of these.

    P(node | above) tends to 1 if no other class below the same one is trained.
    """
    is_trained = tree.ancestors_or_self(torch.tensor(sorted(trained), dtype=torch.long)).tolist()
    for node in sorted(labels):
        for current, above in itertools.pairwise(tree.paths[node].tolist()):
            siblings = tree.children(above) if above >= 0 else []
            if above < 0 or any(is_trained[k] for k in siblings if k != current):
                break
            if above in labels:
                yield node, above
                break
