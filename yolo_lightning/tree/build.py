"""Build a WordTree from WordNet synsets and classes of one's own."""

from collections.abc import Callable, Iterable, Mapping
from functools import cache

from yolo_lightning.errors import InputError
from yolo_lightning.tree.wordnet import WordNet, is_wnid, wordnet
from yolo_lightning.tree.wordtree import Row, WordTree

ENTITY = "n00001740"


def build(
    labels: Iterable[str],
    own_parents: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    root: str = ENTITY,
) -> WordTree:
    """Return the tree that holds these labels; the same for the same input in any order.

    Args:
        labels: wnids, and keys of one's own.
        own_parents: parent of each key of one's own: another one, a wnid, or ``-`` for the top.
        names: what nodes are called; WordNet's usual words otherwise.
        root: wnid above the tree, which is no node of it; labels have to lie below.

    Raises:
        InputError: a key without a place, a cycle, or a synset that does not lie below the root.

    Source: YOLO9000, section 4, "Building WordTree": synsets with one path to the root first, then
    for each other the path that adds fewest nodes. Nodes with a single child go unless they are
    labels, or parents that were named: a softmax over one class tells nothing.
    Paper is silent: on the order of the others, here ascending wnids, on equal paths, here the
    lowest wnids, and on single children.
    """
    own = dict(own_parents or {})
    wanted = set(labels)
    for key in sorted(wanted | set(own)):
        if not is_wnid(key) and key not in own:
            raise InputError(f"class {key!r} has no place: no wnid, and no parent is named for it")
    _refuse_cycles(own)
    anchors = {parent for parent in own.values() if is_wnid(parent)}
    synsets = {key for key in wanted | anchors if is_wnid(key) and key not in own}
    parents: dict[str, str] = _wordnet_parents(synsets, wordnet(), root)
    for key, parent in own.items():
        parents[key] = parent
    _collapse(parents, wanted | set(own) | anchors)
    return WordTree(_rows(parents, names or {}), "the tree")


def lies_below(wnid: str, root: str) -> bool:
    """Tell whether a synset is the root or has a path to it; true where one of them is none."""
    table, open_ends, seen = wordnet(), [wnid], set()
    while open_ends:
        at = open_ends.pop()
        if at == root or at not in table or root not in table:
            return True
        if at not in seen:
            seen.add(at)
            open_ends.extend(table.hypernyms(at))
    return False


def _refuse_cycles(own: Mapping[str, str]) -> None:
    for key in sorted(own):
        path = [key]
        while path[-1] in own:
            path.append(own[path[-1]])
            if path[-1] in path[:-1]:
                raise InputError(f"a cycle of parents: {' under '.join(path)}")
        if path[-1] != "-" and not is_wnid(path[-1]):
            raise InputError(
                f"class {path[-2]!r} hangs under {path[-1]!r}, which has no parent itself; "
                "name one, a wnid, or - for the top"
            )


def _wordnet_parents(synsets: set[str], table: WordNet, root: str) -> dict[str, str]:
    """Return the parents of synsets and of all between them and the root, by the paper's rule."""
    if root not in table:
        raise InputError(f"root {root!r} is no noun synset of WordNet 3.0")

    @cache
    def count_paths(wnid: str) -> int:
        if wnid == root:
            return 1
        return sum(count_paths(above) for above in table.hypernyms(wnid))

    parents: dict[str, str] = {}
    for wnid in sorted(synsets):
        if wnid not in table:
            raise InputError(f"{wnid!r} is no noun synset of WordNet 3.0")
        if not count_paths(wnid):
            raise InputError(
                f"{table.describe(wnid)!r} does not lie below the root {table.describe(root)!r}; "
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
    """Return the path from a synset up to the tree, or to the root, that adds fewest nodes."""

    @cache
    def best(wnid: str) -> tuple[int, tuple[str, ...]]:
        if wnid == root or wnid in parents:
            return 0, (wnid,)
        ways = (best(above) for above in table.hypernyms(wnid) if count_paths(above))
        added, path = min(ways)
        return added + 1, (wnid, *path)

    return best(start)[1]


def _collapse(parents: dict[str, str], kept: set[str]) -> None:
    """Take out nodes with a single child, but for labels."""
    children: dict[str, list[str]] = {}
    for node, parent in parents.items():
        children.setdefault(parent, []).append(node)
    for node in sorted(parents):
        below = children.get(node, [])
        if len(below) == 1 and node not in kept:
            above = parents.pop(node)
            parents[below[0]] = above
            children[above] = [below[0] if child == node else child for child in children[above]]


def _rows(parents: Mapping[str, str], names: Mapping[str, str]) -> list[Row]:
    """Return rows by level, siblings together and ascending, as Darknet's trees need them."""
    children: dict[str, list[str]] = {}
    for node in sorted(parents):
        children.setdefault(parents[node], []).append(node)
    order = list(children.get("-", []))
    for node in order:  # grows while it is walked
        order.extend(children.get(node, []))
    table = wordnet() if any(is_wnid(node) for node in order) else None

    # what a dataset calls a class is that class and no other: car is COCO's, not the railway's
    taken = {name for label in names.values() for name in label.split(" | ")}

    def name(node: str) -> str:
        if node in names or table is None or node not in table:
            return names.get(node, node)
        words = table.lemmas(node)
        return next((word for word in words if word not in taken), f"{words[0]} ({node})")

    return [(node, parents[node], name(node)) for node in order]
