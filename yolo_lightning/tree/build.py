"""Build a WordTree from WordNet synsets and custom classes."""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache

from yolo_lightning.errors import InputError
from yolo_lightning.tree.wordnet import ENTITY, WordNet, is_wnid, wordnet
from yolo_lightning.tree.wordtree import OTHER, Row, WordTree


def build_tree(
    labels: Iterable[str],
    custom_parents: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    root: str = ENTITY,
    exclusive: Iterable[Iterable[str]] = (),
    others: Collection[str] = (),
) -> WordTree:
    """Return the tree of these labels (wnids and custom keys); it does not depend on their order.

    A custom key has a parent: another custom key, a wnid, or ``-`` for the top. The root is a wnid
    above all labels and not part of the tree. Names default to WordNet's first lemma. `exclusive`
    are sets of labels that exclude each other: a leaf ``X/other`` is added below a label X if
    otherwise every node below X were one of the other labels of the set, or below one. `others` are
    keys ``X/other`` of an earlier tree, kept where X still has children.

    Raises:
        InputError: a custom key without a parent, a cycle, or a synset that is not below the root.

    Source: YOLO9000, section 4, "Hierarchical classification": synsets with one path to the root
    are added first, then for each other synset the path that adds the fewest nodes.
    Paper is silent: the order of the others (ascending wnid), paths of equal length (lowest wnids),
    and nodes with one child, which are removed unless they are labels or explicit parents.
    Deviation: the leaves ``X/other``; without them, COCO's donut, the only child of cake, has the
    probability of cake.
    """
    custom = dict(custom_parents or {})
    label_keys = set(labels)
    for key in sorted(label_keys | set(custom)):
        if not is_wnid(key) and key not in custom:
            raise InputError(f"class {key!r} is not a wnid and has no parent")
    _check_custom_parents(custom)
    wnid_parents = {parent for parent in custom.values() if is_wnid(parent)}
    synsets = {key for key in label_keys | wnid_parents if is_wnid(key) and key not in custom}
    parents: dict[str, str] = _wordnet_parents(synsets, wordnet(), root)
    parents |= custom
    _collapse(parents, label_keys | set(custom) | wnid_parents)
    for names_of_dataset in exclusive:
        _add_others(parents, set(names_of_dataset))
    above = set(parents.values())
    parents |= {key: key.removesuffix(OTHER) for key in others if key.removesuffix(OTHER) in above}
    return WordTree(_rows(parents, names or {}), "the tree")


def is_below(wnid: str, root: str) -> bool:
    """Return whether a synset is the root or below it; true if either is not a synset."""
    table, pending, visited = wordnet(), [wnid], set()
    while pending:
        current = pending.pop()
        if current == root or current not in table or root not in table:
            return True
        if current not in visited:
            visited.add(current)
            pending.extend(table.hypernyms(current))
    return False


def _check_custom_parents(custom: Mapping[str, str]) -> None:
    checked: set[str] = set()  # classes whose ancestors are checked
    for key in sorted(custom):
        path = {key: None}  # ordered
        node = custom[key]
        while node in custom and node not in checked:
            if node in path:
                raise InputError(f"a cycle of parents: {' under '.join([*path, node])}")
            path[node] = None
            node = custom[node]
        if node not in custom and node != "-" and not is_wnid(node):
            raise InputError(
                f"class {[*path][-1]!r} has the parent {node!r}, which has no parent itself; "
                "expected one: a wnid, a custom class, or - for the top"
            )
        checked |= path.keys()


def _wordnet_parents(synsets: set[str], table: WordNet, root: str) -> dict[str, str]:
    if root not in table:
        raise InputError(f"root {root!r} is not a noun synset of WordNet 3.0")

    @cache
    def count_paths(wnid: str) -> int:
        if wnid == root:
            return 1
        return sum(count_paths(above) for above in table.hypernyms(wnid))

    parents: dict[str, str] = {}
    for wnid in sorted(synsets):
        if wnid not in table:
            raise InputError(f"{wnid!r} is not a noun synset of WordNet 3.0")
        if not count_paths(wnid):
            raise InputError(
                f"{table.describe(wnid)!r} is not below the root {table.describe(root)!r}; "
                "choose a higher root"
            )
    for wnid in sorted(synsets - {root}, key=lambda wnid: (count_paths(wnid) > 1, wnid)):
        path = _shortest_addition(wnid, parents, table, root, count_paths)
        for node, above in zip(path, path[1:], strict=False):
            parents[node] = "-" if above == root else above
    return parents


def _shortest_addition(
    start: str,
    parents: Mapping[str, str],
    table: WordNet,
    root: str,
    count_paths: Callable[[str], int],
) -> tuple[str, ...]:
    """Return the path from a synset to the tree or the root that adds the fewest nodes."""

    @cache
    def best(wnid: str) -> tuple[int, tuple[str, ...]]:
        if wnid == root or wnid in parents:
            return 0, (wnid,)
        added, path = min(best(above) for above in table.hypernyms(wnid) if count_paths(above))
        return added + 1, (wnid, *path)

    return best(start)[1]


def _collapse(parents: dict[str, str], keep: set[str]) -> None:
    """Remove nodes with a single child, except those to keep."""
    children = _children(parents)
    for node in sorted(parents):
        if len(children.get(node, [])) == 1 and node not in keep:
            (only_child,) = children[node]
            above = parents.pop(node)
            parents[only_child] = above
            children[above] = [only_child if child == node else child for child in children[above]]


def _children(parents: Mapping[str, str]) -> dict[str, list[str]]:
    children: dict[str, list[str]] = {}
    for node in sorted(parents):
        children.setdefault(parents[node], []).append(node)
    return children


def _add_others(parents: dict[str, str], labels: set[str]) -> None:
    """Add a leaf below each label that has other labels below, and nothing else."""
    children = _children(parents)
    # from the leaves: whether each node is a label, or has nothing but such nodes below
    is_covered: dict[str, bool] = {}
    pending = list(children.get("-", []))
    for node in pending:  # extended during iteration
        pending.extend(children.get(node, []))
    for node in reversed(pending):
        below = children.get(node, [])
        only_labels = bool(below) and all(is_covered[child] for child in below)
        is_covered[node] = node in labels or only_labels
        if node in labels and only_labels:
            parents[node + OTHER] = node


def _rows(parents: Mapping[str, str], names: Mapping[str, str]) -> list[Row]:
    """Return rows by level, siblings contiguous and sorted, as Darknet requires."""
    children = _children(parents)
    order = list(children.get("-", []))
    for node in order:  # extended during iteration
        order.extend(children.get(node, []))
    table = wordnet() if any(is_wnid(node) for node in order) else None

    # a dataset's name must not be used for another node: car is COCO's class, not the railway car
    used = {name for label in names.values() for name in label.split(" | ")}

    def name(node: str) -> str:
        if node == parents[node] + OTHER:
            return f"other {name(parents[node]).split(' | ')[0]}"
        if node in names or table is None or node not in table:
            return names.get(node, node)
        words = table.lemmas(node)
        return next((word for word in words if word not in used), f"{words[0]} ({node})")

    return [(node, parents[node], name(node)) for node in order]
