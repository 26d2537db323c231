"""What each class will learn from, told before training."""

from collections import Counter
from collections.abc import Iterable, Mapping

from yolo_lightning.tree.wordtree import WordTree

Counts = Mapping[int, Counter[str]]
"""By node: how many objects or images each of the sources' own names gives it."""

_MAX = 8


def vocabulary_report(tree: WordTree, boxes: Counts, images: Counts) -> str:
    """Say which names met in one class, which labels are coarser, and who learns from what.

    Args:
        tree: the classes.
        boxes: objects by node and name.
        images: labelled images by node and name.
    """
    both = boxes.keys() & images.keys()
    labelled = boxes.keys() | images.keys()
    through = len(_labelled_below(tree, boxes, images) - labelled)
    rest = len(tree) - len(labelled) - through
    counts = [
        f"{len(boxes.keys() - both)} from boxes",
        f"{len(images.keys() - both)} from image labels",
        f"{len(both)} from both",
        f"{through} from below",
        f"{rest} from nothing",
    ]
    lines = [f"Classes: {len(tree)}; they learn {', '.join(counts)}"]
    lines += _about("from both", (tree.names[node] for node in sorted(both)))
    lines += _about("names that met", _met(tree, boxes, images))
    if boxes and images:
        lines += _about("boxes are coarser", _above(tree, boxes, images))
        lines += _about("image labels are coarser", _above(tree, images, boxes))
        lines += _about("no box on the way up", _unguided(tree, boxes, images))
    return "\n".join(lines)


def vocabulary_table(tree: WordTree, boxes: Counts, images: Counts) -> list[dict[str, object]]:
    """Return a row for every class: what labels it with boxes and with images, and what lies below.

    Args:
        tree: the classes.
        boxes: objects by node and name.
        images: labelled images by node and name.
    """
    below = _labelled_below(tree, boxes, images)
    return [
        {
            "key": tree.keys[node],
            "name": tree.names[node],
            "boxes": dict(boxes.get(node, {})),
            "images": dict(images.get(node, {})),
            "labelled_below": node in below,
        }
        for node in range(len(tree))
    ]


def _labelled_below(tree: WordTree, boxes: Counts, images: Counts) -> set[int]:
    """Return the nodes that lie on the way to a label; its loss trains them too."""
    return {at for node in (*boxes, *images) for at in tree.paths[node].tolist()[1:] if at >= 0}


def _about(what: str, found: Iterable[str]) -> list[str]:
    """Return one line, the first few of what was found in it."""
    listed = list(found)
    if not listed:
        return []
    more = f", … and {len(listed) - _MAX} more" if len(listed) > _MAX else ""
    return [f"  {what}: {', '.join(listed[:_MAX])}{more}"]


def _met(tree: WordTree, boxes: Counts, images: Counts) -> Iterable[str]:
    for node in sorted(boxes.keys() | images.keys()):
        names = sorted({*boxes.get(node, ()), *images.get(node, ())})
        if len(names) > 1:
            yield f"{' = '.join(names)} ({tree.keys[node]})"


def _above(tree: WordTree, upper: Counts, lower: Counts) -> Iterable[str]:
    """Yield labels of one kind with those of the other kind that lie below them."""
    below: dict[int, list[int]] = {}
    for node in sorted(lower):
        path = tree.paths[node].tolist()
        top = next((at for at in path[1:] if at in upper), None)
        if top is not None and node not in upper:
            below.setdefault(top, []).append(node)
    for node, nodes in sorted(below.items()):
        names = [tree.names[k] for k in nodes[:3]]
        more = f" … {len(nodes)} in all" if len(nodes) > 3 else ""
        yield f"{tree.names[node]} over {', '.join(names)}{more}"


def _unguided(tree: WordTree, boxes: Counts, images: Counts) -> Iterable[str]:
    """Yield image labels that boxes say nothing about, not even through an ancestor."""
    known = {at for node in boxes for at in tree.paths[node].tolist()}
    for node in sorted(images):
        if not known & {at for at in tree.paths[node].tolist() if at >= 0}:
            yield tree.names[node]
