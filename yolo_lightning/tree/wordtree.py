"""WordTree: classes as a hierarchy, each group of siblings under its own softmax.

A flat list of classes is a tree of one level, so YOLOv2 and YOLO9000 share every line.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from yolo_lightning.errors import InputError, nearest

MAX_LEVELS = 200
"""The authors' tree has 17; the table of paths grows with the deepest one."""

Row = tuple[str, str, str]
"""A node as key, parent's key (``-`` at the top), name; several names with `` | `` between."""


class WordTree:
    """A forest of classes; node numbers are row numbers.

    Args:
        rows: one (key, parent's key or ``-``, name) a node. Keys are unique (wnids, or names of
            one's own); names need not be: 585 of the 9,418 in the authors' tree recur.
        origin: where the rows come from, for messages.
        lines: the line that each row stands in, where they come from a file.

    Attributes:
        keys, names: str, a node each.
        parents: int64 (K,), -1 at the top.
        groups: int64 (K,), number of the sibling group that a node belongs to.
        paths: int64 (K, D), a node and its ancestors, the node first; -1 as padding.

    Raises:
        InputError: no nodes, a key twice, an unknown parent, a cycle, more than 200 levels; names
            the row or the node.

    Source: YOLO9000, section 4, "Hierarchical classification".
    """

    def __init__(
        self,
        rows: Iterable[Sequence[str]],
        origin: str = "the tree",
        lines: Sequence[int] | None = None,
    ) -> None:
        self.rows: list[Row] = [cast(Row, tuple(str(part) for part in row)) for row in rows]
        if not self.rows:
            raise InputError(f"{origin} has no classes; expected at least one")

        def where(number: int) -> str:
            return f"{origin}:{lines[number]}" if lines else f"{origin}, row {number + 1}"

        index: dict[str, int] = {}
        for number, row in enumerate(self.rows):
            if len(row) != 3:
                raise InputError(f"{where(number)}: expected key, parent, name: {row}")
            if row[0] in index:
                raise InputError(
                    f"{where(number)}: key {row[0]!r} stands in {'line' if lines else 'row'} "
                    f"{lines[index[row[0]]] if lines else index[row[0]] + 1} already; a class has "
                    "one row and one parent: take one out, or give it another key"
                )
            index[row[0]] = number
        self.keys = tuple(row[0] for row in self.rows)
        # a node may be called several things: what each dataset calls it
        self._called = [row[2].split(" | ") for row in self.rows]
        self.names = tuple(names[0] for names in self._called)
        self._index = index
        parents = [self._parent_of(row, where(number)) for number, row in enumerate(self.rows)]
        self.parents = torch.tensor(parents)
        self.paths = _paths(parents, self.keys, where)
        _, self.groups = torch.unique(self.parents, return_inverse=True)
        self.group_count = int(self.groups.max()) + 1
        self._members: list[list[int]] = [[] for _ in range(self.group_count)]
        for node, group in enumerate(self.groups.tolist()):
            self._members[group].append(node)
        self._on_device: dict[torch.device, _Tables] = {}

    def _parent_of(self, row: Row, where: str) -> int:
        if row[1] == "-":
            return -1
        if row[1] not in self._index:
            hint = nearest(row[1], self._index)
            raise InputError(
                f"{where}: node {row[0]!r} has the unknown parent {row[1]!r}; "
                f"{hint or 'add a row for it, or - for the top'}"
            )
        return self._index[row[1]]

    @classmethod
    def flat(cls, names: Sequence[str], origin: str = "the class list") -> "WordTree":
        """Return a tree of one level, whose keys are the names."""
        return cls([(name, "-", name) for name in names], origin)

    @classmethod
    def read(cls, path: str | Path) -> "WordTree":
        """Read a file of tab-separated lines: key, parent's key or ``-``, name; ``#`` comments.

        Raises:
            InputError: the file is missing or a line is malformed; names file and line.
        """
        file = Path(path)
        if not file.is_file():
            raise InputError(f"tree file {str(path)!r} not found (working folder: {Path.cwd()})")
        rows, numbers = [], []
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 text ({error})") from None
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            parts = line.split("\t")
            if len(parts) != 3 or not all(part.strip() for part in parts):
                raise InputError(
                    f"{file}:{number}: expected three tab-separated fields "
                    f"(key, parent's key or '-', name), found {line!r}"
                )
            rows.append([part.strip() for part in parts])
            numbers.append(number)
        return cls(rows, str(path), numbers)

    @classmethod
    def of(
        cls, tree: "str | Path | Sequence[str] | Sequence[Sequence[str]] | WordTree"
    ) -> "WordTree":
        """Return a tree from whatever names one: a path, a list of names, rows, or a tree."""
        if isinstance(tree, WordTree):
            return tree
        if isinstance(tree, str | Path):
            return cls.read(tree)
        if all(isinstance(item, str) for item in tree):
            return cls.flat(cast(Sequence[str], tree))
        return cls(tree)

    def text(self) -> str:
        """Return the lines that `read` takes."""
        return "".join("\t".join(row) + "\n" for row in self.rows)

    def __len__(self) -> int:
        """Return K, the number of nodes."""
        return len(self.rows)

    @property
    def leaves(self) -> Tensor:
        """int64, the nodes without children."""
        is_parent = torch.zeros(len(self), dtype=torch.bool)
        is_parent[self.parents[self.parents >= 0]] = True
        return (~is_parent).nonzero().flatten()

    def node(self, label: str, where: str = "") -> int:
        """Return the node that a dataset's label means: an exact key, else an unambiguous name.

        Raises:
            InputError: nothing or more than one node has that name.
        """
        if label in self._index:
            return self._index[label]
        found = [number for number, names in enumerate(self._called) if label in names]
        if len(found) == 1:
            return found[0]
        place = f"{where}: " if where else ""
        if found:
            keys = ", ".join(self.keys[number] for number in found)
            raise InputError(f"{place}label {label!r} is ambiguous in the tree; use a key: {keys}")
        hint = nearest(label, (*self.names, *self.keys))
        if not hint and len(self) <= 30:
            hint = f"allowed: {', '.join(self.names)}"
        raise InputError(f"{place}label {label!r} is not in the tree; {hint}".rstrip("; "))

    def ancestors_or_self(self, nodes: Tensor) -> Tensor:
        """Return bool (K,): the nodes on the paths to `nodes`, int64 (N,)."""
        found = torch.zeros(len(self), dtype=torch.bool)
        path = self.paths[nodes.cpu()]
        found[path[path >= 0]] = True
        return found

    def deepest_ancestor_in(self, members: Tensor) -> Tensor:
        """Return int64 (K,): each node's deepest ancestor or self in `members`, -1 if none.

        Args:
            members: bool (K,).
        """
        paths = self.paths
        hit = (paths >= 0) & members.cpu()[paths.clamp(min=0)]
        first = hit.int().argmax(dim=1)
        node = paths.gather(1, first[:, None]).squeeze(1)
        return torch.where(hit.any(dim=1), node, -1)

    def _tables(self, device: torch.device) -> "_Tables":
        """Return the index tables on `device`, made there once."""
        if device not in self._on_device:
            self._on_device[device] = _Tables.of(self, device)
        return self._on_device[device]

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Return conditional log-probabilities log P(node | parent), (…, K) like `logits`.

        Each group is normalised about its own maximum, so groups whose logits lie far apart lose
        no digits. A group of one node is certain: 0, with a gradient of exactly 0.
        """
        if self.group_count == 1 and self.paths.shape[1] == 1:
            return logits.log_softmax(dim=-1)  # a flat list
        return self._conditional(logits).t().reshape(logits.shape)

    def _conditional(self, logits: Tensor) -> Tensor:
        """Return log P(node | parent) with the nodes along the rows, (K, …).

        A softmax over a few siblings then runs over whole rows of boxes.
        """
        tables = self._tables(logits.device)
        rows = logits.reshape(-1, len(self)).t().contiguous()
        parts = rows.index_select(0, tables.in_sizes).split([n.numel() for n in tables.by_size])
        done = [
            part.unflatten(0, nodes.shape).log_softmax(dim=1).flatten(0, 1)
            for part, nodes in zip(parts, tables.by_size, strict=True)
        ]
        return torch.cat(done).index_select(0, tables.from_sizes)

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return absolute log-probabilities log P(node), (…, K): sums along the paths."""
        tables = self._tables(logits.device)
        if len(tables.by_level) == 1:
            return self.log_softmax(logits)
        conditional = self._conditional(logits)
        levels = [conditional.index_select(0, tables.by_level[0])]
        for nodes, parents in zip(tables.by_level[1:], tables.parent_in_level[1:], strict=True):
            above = levels[-1].index_select(0, parents)
            levels.append(above + conditional.index_select(0, nodes))
        return torch.cat(levels).index_select(0, tables.from_levels).t().reshape(logits.shape)

    def path_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return -log P(label), float (M,): the cross-entropies summed along each label's path.

        Args:
            logits: float (M, K).
            labels: int64 (M,), nodes; nothing below a label is touched.
        """
        path = self._tables(labels.device).paths[labels]
        picked = self.log_softmax(logits).gather(1, path.clamp(min=0))
        return -(picked * (path >= 0)).sum(dim=1)

    def most_specific(self, logits: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
        """Descend by the most probable child while the absolute probability stays at `threshold`.

        Args:
            logits: float (M, K).
            threshold: 0…1; the top level is always entered.

        Returns:
            The nodes, int64 (M,), and their absolute probabilities, float (M,).

        Source: YOLO9000, section 4, "Hierarchical classification".
        """
        tables = self._tables(logits.device)
        log_threshold = math.log(threshold) if threshold > 0 else -math.inf
        node = torch.full((len(logits),), -1, device=logits.device)
        total = logits.new_zeros(len(logits))
        active = torch.arange(len(logits), device=logits.device)
        group = torch.full_like(active, int(tables.group_below[-1]))
        while len(active):
            # only the siblings that the path leads to are looked at
            siblings = tables.members[group, : int(tables.sizes[group].max())]
            picked = logits.flatten()[active[:, None] * len(self) + siblings.clamp(min=0)]
            picked = picked.masked_fill(siblings < 0, -torch.inf).log_softmax(dim=1)
            best, place = picked.max(dim=1)
            child = siblings.gather(1, place[:, None]).squeeze(1)
            below = total[active] + best
            deeper = (below >= log_threshold) | (node[active] < 0)
            active, child = active[deeper], child[deeper]
            node[active], total[active] = child, below[deeper]
            group = tables.group_below[child]
            active, group = active[group >= 0], group[group >= 0]
        return node, total.exp()

    def path_rows(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what P(label) depends on: the sibling groups along each label's path.

        Args:
            labels: int64 (B,), nodes.

        Returns:
            nodes, int64 (B, R): all siblings on the path, -1 as padding.
            levels, int64 (B, R): which group of the path a node belongs to, the label's own is 0.
            on_path, bool (B, R): whether the node lies on the path itself.
        """
        rows = []
        for label in labels.tolist():
            path = [node for node in self.paths[label].tolist() if node >= 0]
            rows.append(
                [
                    (sibling, level, sibling == node)
                    for level, node in enumerate(path)
                    for sibling in self._members[int(self.groups[node])]
                ]
            )
        width = max((len(row) for row in rows), default=0)
        table = torch.tensor([row + [(-1, 0, False)] * (width - len(row)) for row in rows])
        nodes, levels, on_path = table.reshape(len(rows), width, 3).unbind(dim=2)
        return (
            nodes.to(labels.device),
            levels.to(labels.device),
            on_path.bool().to(labels.device),
        )


@dataclass
class _Tables:
    """What prediction looks up; nodes of equal group size, and of equal level, lie together.

    Attributes:
        paths: (K, D), of the tree.
        by_size: a table (groups, size) of nodes for each size that groups have.
        in_sizes, from_sizes: (K,) the nodes of those one after the other, and where each is.
        by_level: the nodes of each level of the tree.
        parent_in_level: where the parents of a level's nodes are in the level above.
        from_levels: (K,) where each node is in the levels, one after the other.
        members: (G, largest size) the nodes of each group, -1 as padding.
        sizes: (G,) how many these are.
        group_below: (K + 1,) the group of each node's children, -1 for leaves; last the top's.
    """

    paths: Tensor
    by_size: list[Tensor]
    in_sizes: Tensor
    from_sizes: Tensor
    by_level: list[Tensor]
    parent_in_level: list[Tensor]
    from_levels: Tensor
    members: Tensor
    sizes: Tensor
    group_below: Tensor

    @classmethod
    def of(cls, tree: WordTree, device: torch.device) -> "_Tables":
        parents, groups = tree.parents, tree.groups
        sizes = torch.bincount(groups)
        order = groups.argsort(stable=True)
        split = order.split(sizes.tolist())
        members = torch.nn.utils.rnn.pad_sequence(list(split), True, -1)
        by_size = [members[sizes == size, :size] for size in sizes.unique().tolist()]
        group_below = torch.full((len(parents) + 1,), -1)
        group_below[parents] = groups  # index -1: the top's
        levels: list[Tensor] = []
        places: list[Tensor] = []
        place = torch.zeros(len(parents), dtype=torch.long)
        above = torch.tensor([-1])
        while len(level := torch.isin(parents, above).nonzero().flatten()):
            places.append(place[parents[level]])
            place[level] = torch.arange(len(level))
            levels.append(level)
            above = level
        in_sizes = torch.cat([nodes.flatten() for nodes in by_size])
        return cls(
            tree.paths.to(device),
            [nodes.to(device) for nodes in by_size],
            in_sizes.to(device),
            in_sizes.argsort().to(device),
            [level.to(device) for level in levels],
            [place.to(device) for place in places],
            torch.cat(levels).argsort().to(device),
            members.to(device),
            sizes.to(device),
            group_below.to(device),
        )


def segment_log_softmax(logits: Tensor, segments: Tensor, count: int) -> Tensor:
    """Return the log-softmax within segments of the last dimension.

    Args:
        logits: float (…, K).
        segments: int64, the shape of `logits`: each entry's segment, 0…count - 1.
        count: number of segments.
    """
    top = logits.detach().new_full((*logits.shape[:-1], count), -torch.inf)
    top = top.scatter_reduce(-1, segments, logits.detach(), "amax")
    shifted = logits - top.gather(-1, segments)
    total = torch.zeros_like(top).scatter_add(-1, segments, shifted.exp())
    # an unused segment sums to zero and is never read back
    return shifted - total.clamp(min=torch.finfo(total.dtype).tiny).log().gather(-1, segments)


def _is_cycle(parents: list[int], start: int) -> bool:
    seen, node = set(), start
    while node >= 0 and node not in seen:
        seen.add(node)
        node = parents[node]
    return node >= 0


def _ring(parents: list[int], start: int, keys: Sequence[str]) -> str:
    path = [start]
    while parents[path[-1]] not in path:
        path.append(parents[path[-1]])
    ring = [*path[path.index(parents[path[-1]]) :], parents[path[-1]]]
    return " under ".join(keys[node] for node in ring)


def _paths(parents: list[int], keys: Sequence[str], where: Callable[[int], str]) -> Tensor:
    """Return the table of ancestors, refusing cycles."""
    paths: list[list[int]] = []
    for start in range(len(parents)):
        path = [start]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
            if len(path) > MAX_LEVELS:
                if _is_cycle(parents, start):
                    raise InputError(
                        f"{where(start)}: node {keys[start]!r} hangs in a cycle of parents: "
                        f"{_ring(parents, start, keys)}; give one of them another parent, or -"
                    )
                raise InputError(
                    f"{where(start)}: node {keys[start]!r} hangs too deep; allowed: "
                    f"{MAX_LEVELS} levels"
                )
        paths.append(path)
    depth = max(len(path) for path in paths)
    return torch.tensor([path + [-1] * (depth - len(path)) for path in paths])
