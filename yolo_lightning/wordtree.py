"""WordTree: classes as a hierarchy, each group of siblings under its own softmax.

A flat list of classes is a tree of one level, so YOLOv2 and YOLO9000 share every line.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from yolo_lightning.errors import InputError, nearest

MOST_LEVELS = 200
"""The authors' tree has 17; the table of paths grows with the deepest one."""

Row = tuple[str, str, str]
"""A node as key, parent's key (``-`` at the top), name."""


class WordTree:
    """A forest of classes; node numbers are row numbers.

    Args:
        rows: one (key, parent's key or ``-``, name) a node. Keys are unique (wnids, or names of
            one's own); names need not be: 585 of the 9,418 in the authors' tree recur.
        origin: where the rows come from, for messages.

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

    def __init__(self, rows: Iterable[Sequence[str]], origin: str = "the tree") -> None:
        self.rows: list[Row] = [cast(Row, tuple(str(part) for part in row)) for row in rows]
        if not self.rows:
            raise InputError(f"{origin} has no classes")
        index: dict[str, int] = {}
        for number, row in enumerate(self.rows):
            if len(row) != 3:
                raise InputError(f"{origin}, row {number + 1}: expected key, parent, name: {row}")
            if row[0] in index:
                raise InputError(
                    f"{origin}, row {number + 1}: key {row[0]!r} stands in row "
                    f"{index[row[0]] + 1} already"
                )
            index[row[0]] = number
        self.keys = tuple(row[0] for row in self.rows)
        self.names = tuple(row[2] for row in self.rows)
        self._index = index
        parents = [self._parent_of(row, number, origin) for number, row in enumerate(self.rows)]
        self.parents = torch.tensor(parents)
        self.paths = _paths(parents, self.keys, origin)
        _, self.groups = torch.unique(self.parents, return_inverse=True)
        self.group_count = int(self.groups.max()) + 1
        self._members: list[list[int]] = [[] for _ in range(self.group_count)]
        for node, group in enumerate(self.groups.tolist()):
            self._members[group].append(node)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def _parent_of(self, row: Row, number: int, origin: str) -> int:
        if row[1] == "-":
            return -1
        if row[1] not in self._index:
            hint = nearest(row[1], self._index)
            raise InputError(
                f"{origin}, row {number + 1}: node {row[0]!r} "
                f"has the unknown parent {row[1]!r} {hint}"
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
        rows = []
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
        return cls(rows, origin=str(path))

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
        found = [number for number, name in enumerate(self.names) if name == label]
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

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (groups, paths) on `device`, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = (self.groups.to(device), self.paths.to(device))
        return self._on_device[device]

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Return conditional log-probabilities log P(node | parent), (…, K) like `logits`.

        Each group is normalised about its own maximum, so groups whose logits lie far apart lose
        no digits.
        """
        groups, _ = self._tensors(logits.device)
        return segment_log_softmax(logits, groups.expand_as(logits), self.group_count)

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return absolute log-probabilities log P(node), (…, K): sums along the paths."""
        _, paths = self._tensors(logits.device)
        conditional = self.log_softmax(logits)
        padded = torch.cat([conditional, conditional.new_zeros(*conditional.shape[:-1], 1)], dim=-1)
        total = conditional
        for ancestor in paths.unbind(dim=1)[1:]:  # index -1 reads the appended zero
            total = total + padded[..., ancestor]
        return total

    def path_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return -log P(label), float (M,): the cross-entropies summed along each label's path.

        Args:
            logits: float (M, K).
            labels: int64 (M,), nodes; nothing below a label is touched.
        """
        _, paths = self._tensors(logits.device)
        path = paths[labels]
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
        probs = self.log_probs(logits).exp()
        groups, _ = self._tensors(logits.device)
        best = probs.new_full((len(probs), self.group_count), -1.0)
        index = groups.expand_as(probs)
        best = best.scatter_reduce(1, index, probs, "amax")
        # a node leads its group where it reaches the group's maximum; the first such node counts
        parents = self.parents.to(logits.device)
        order = torch.arange(len(self), device=logits.device).expand_as(probs)
        leads = probs == best.gather(1, index)
        leader = torch.full_like(best, len(self), dtype=torch.long).scatter_reduce(
            1, index, order.masked_fill(~leads, len(self)), "amin"
        )
        child_group = torch.full((len(self) + 1,), -1, dtype=torch.long, device=logits.device)
        child_group[parents] = groups  # index -1: the top level's group
        node = leader[:, child_group[-1]]
        for _ in range(self.paths.shape[1] - 1):
            group = child_group[node]
            child = leader.gather(1, group.clamp(min=0)[:, None]).squeeze(1)
            deeper = (group >= 0) & (probs.gather(1, child[:, None]).squeeze(1) >= threshold)
            node = torch.where(deeper, child, node)
        return node, probs.gather(1, node[:, None]).squeeze(1)

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


def _paths(parents: list[int], keys: Sequence[str], origin: str) -> Tensor:
    """Return the table of ancestors, refusing cycles."""
    paths: list[list[int]] = []
    for start in range(len(parents)):
        path = [start]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
            if len(path) > MOST_LEVELS:
                what = "in a cycle of parents" if _is_cycle(parents, start) else "too deep"
                raise InputError(
                    f"{origin}: node {keys[start]!r} hangs {what}; allowed: {MOST_LEVELS} levels"
                )
        paths.append(path)
    depth = max(len(path) for path in paths)
    return torch.tensor([path + [-1] * (depth - len(path)) for path in paths])
