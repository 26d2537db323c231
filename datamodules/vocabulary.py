"""Report what each class learns from: boxes, image labels, or labels of its descendants."""

from collections import Counter
from collections.abc import Iterable, Mapping

from yolo_lightning.tree.wordtree import WordTree

Counts = Mapping[int, Counter[str]]  # objects or images by node and label name

_MAX_NAMES = 8


def vocabulary_report(tree: WordTree, boxes: Counts, images: Counts) -> str:
    """Return a report: counts of classes by what they learn from, merged names, coarser labels."""
    both, labelled = boxes.keys() & images.keys(), boxes.keys() | images.keys()
    only_below = len(_labelled_ancestors(tree, boxes, images) - labelled)
    lines = [
        f"Classes: {len(tree)}; they learn {len(boxes.keys() - both)} from boxes, "
        f"{len(images.keys() - both)} from image labels, {len(both)} from both, {only_below} from "
        f"descendants, {len(tree) - len(labelled) - only_below} from nothing"
    ]
    lines += _summary("from both", (tree.names[node] for node in sorted(both)))
    lines += _summary("merged names", _merged_names(tree, boxes, images))
    if boxes and images:
        lines += _summary("boxes are coarser", _coarser_labels(tree, boxes, images))
        lines += _summary("image labels are coarser", _coarser_labels(tree, images, boxes))
        lines += _summary("no ancestor with boxes", _without_boxed_ancestor(tree, boxes, images))
    return "\n".join(lines)


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


def _summary(title: str, names: Iterable[str]) -> list[str]:
    listed = list(names)
    if not listed:
        return []
    more = f", … and {len(listed) - _MAX_NAMES} more" if len(listed) > _MAX_NAMES else ""
    return [f"  {title}: {', '.join(listed[:_MAX_NAMES])}{more}"]


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


def _without_boxed_ancestor(tree: WordTree, boxes: Counts, images: Counts) -> Iterable[str]:
    """Yield image labels of which neither the class nor an ancestor has boxes."""
    boxed = {node for label in boxes for node in tree.paths[label].tolist() if node >= 0}
    for node in sorted(images):
        if boxed.isdisjoint(tree.paths[node].tolist()):
            yield tree.names[node]
