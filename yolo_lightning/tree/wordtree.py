"""WordTree: classes as a hierarchy with one softmax per group of siblings; a list has one level."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_lightning.errors import InputError, nearest, read_text, require_name, short
from yolo_lightning.tree.tables import TreeTables
from yolo_lightning.tree.wordnet import wordnet

MAX_LEVELS, MAX_NODES = 200, 100_000
"""The authors' tree has 17 levels; WordNet has 82,115 nouns. The table of paths has both sizes."""
_MAX_SHOWN = 8  # nodes of a cycle

OTHER = "/other"
"""A leaf with the key ``X/other`` below X stands for what is X and nothing else below X."""

Row = tuple[str, str, str]
"""A node as key, parent's key (``-`` at the top), name; alternative names separated by `` | ``."""


class WordTree:
    """A forest of classes; node numbers are row numbers.

    Rows are (key, parent's key or ``-``, name). Keys (wnids or custom names) are unique; names need
    not be: 585 of the 9,418 names in the authors' tree recur. Error messages name `origin` and the
    line numbers of the rows.

    Predictions never name a node that cannot be told from its parent: an only child, whose
    P(child | parent) is always 1, or the leaf ``X/other``. `reported`, int64 (K,), is the node that
    stands for each one, itself for most. Asked for by name, an only child has the probability of
    its parent.

    Raises:
        InputError: no nodes, a duplicate key, an unknown parent, a cycle, more than 100,000 nodes
            or 200 levels, a name that a terminal cannot show.

    Source: YOLO9000, section 4, "Hierarchical classification"; the paper does not mention only
    children, which the original program names.
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
        if len(self.rows) > MAX_NODES:
            raise InputError(f"{origin} has more than {MAX_NODES:,} classes")

        def where(number: int) -> str:
            return f"{origin}:{lines[number]}" if lines else f"{origin}, row {number + 1}"

        index: dict[str, int] = {}
        for number, row in enumerate(self.rows):
            if len(row) != 3:
                raise InputError(f"{where(number)}: expected key, parent, name: {short(row)}")
            require_name(row[0], where(number))
            require_name(row[2], where(number))
            if row[0] in index:
                first = index[row[0]]
                position = f"line {lines[first]}" if lines else f"row {first + 1}"
                raise InputError(
                    f"{where(number)}: key {row[0]!r} was already defined in {position}; a class "
                    "has one row and one parent: remove one row, or change its key"
                )
            index[row[0]] = number
        self.keys = tuple(row[0] for row in self.rows)
        # datasets may name the same class differently
        alternatives = [row[2].split(" | ") for row in self.rows]
        self.names = tuple(names[0] for names in alternatives)
        self._index = index
        parents = [self._parent_of(row, where(number)) for number, row in enumerate(self.rows)]
        self.parents = torch.tensor(parents)  # int64 (K,), -1 at the top
        # int64 (K, D), each node followed by its ancestors, -1 as padding
        self.paths = _build_paths(self.parents, self.keys, where)
        _, self.groups = torch.unique(self.parents, return_inverse=True)  # int64 (K,)
        self.num_groups = int(self.groups.max()) + 1
        self._members: list[list[int]] = [[] for _ in range(self.num_groups)]
        for node, group in enumerate(self.groups.tolist()):
            self._members[group].append(node)
        self._group_below = {parents[members[0]]: g for g, members in enumerate(self._members)}
        self.is_other = self._others()  # bool (K,), which nodes are leaves X/other
        self.reported = self._reported()
        self._named: dict[str, list[int]] = {}  # nodes by each of their names
        for node, names in enumerate(alternatives):
            for name in () if self.is_other[node] else dict.fromkeys(names):
                self._named.setdefault(name, []).append(node)
        self._tables: dict[torch.device, TreeTables] = {}

    def _others(self) -> Tensor:
        is_other = torch.tensor([row[0] == row[1] + OTHER for row in self.rows])
        is_other &= self.parents >= 0
        is_other[self.parents[self.parents >= 0]] = False  # a leaf has no children
        return is_other

    def _reported(self) -> Tensor:
        is_same = self.is_other | (torch.bincount(self.groups)[self.groups] == 1)
        is_same &= self.parents >= 0
        # the first node of each path that differs from its parent
        is_distinct = (self.paths >= 0) & ~is_same[self.paths.clamp(min=0)]
        return self.paths.gather(1, is_distinct.int().argmax(dim=1, keepdim=True)).squeeze(1)

    def _parent_of(self, row: Row, where: str) -> int:
        if row[1] == "-":
            return -1
        if row[1] not in self._index:
            hint = nearest(row[1], self._index)
            raise InputError(
                f"{where}: node {short(row[0])} has the unknown parent {short(row[1])}; "
                f"{hint or 'add a row for it, or - for the top'}"
            )
        return self._index[row[1]]

    @classmethod
    def from_names(cls, names: Sequence[str], origin: str = "the class list") -> "WordTree":
        """Create a tree of one level whose keys are the names."""
        return cls([(name, "-", name) for name in names], origin)

    @classmethod
    def from_file(cls, path: str | Path) -> "WordTree":
        """Read a file of tab-separated lines: key, parent's key or ``-``, name; ``#`` comments.

        A ``.names`` file has one name per line, and becomes a tree of one level; so does a
        ``.wnids`` file with one wnid per line, whose names are WordNet's first words.

        Raises:
            InputError: the file is missing or a line is malformed; names file and line.
        """
        hint = (
            "if it is lost, `yolo-lightning wordtree build` builds it, or init with another "
            "--output"
        )
        lines = read_text(path, "tree file", hint).splitlines()
        if Path(path).suffix in (".names", ".wnids"):
            keys = [line.strip() for line in lines if line.strip()]
            if Path(path).suffix == ".names":
                return cls.from_names(keys, str(path))
            words = wordnet()
            names = [words.name(key) if key in words else key for key in keys]
            return cls([(k, "-", n) for k, n in zip(keys, names, strict=True)], str(path))
        rows, numbers = [], []
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            parts = line.split("\t")
            if len(parts) != 3 or not all(part.strip() for part in parts):
                raise InputError(
                    f"{path}:{number}: expected three tab-separated fields "
                    "(key, parent's key or '-', name)"  # without a text that may be secret
                )
            rows.append([part.strip() for part in parts])
            numbers.append(number)
            if len(rows) > MAX_NODES:
                break  # refused below
        return cls(rows, str(path), numbers)

    @classmethod
    def from_source(
        cls, source: "str | Path | Sequence[str] | Sequence[Sequence[str]] | WordTree"
    ) -> "WordTree":
        """Create a tree from a file, a list of names, rows, or another tree."""
        if isinstance(source, WordTree):
            return source
        if isinstance(source, str | Path):
            return cls.from_file(source)
        if all(isinstance(item, str) for item in source):
            return cls.from_names(cast(Sequence[str], source))
        return cls(source)

    def to_text(self) -> str:
        """Return the tree in the format of `from_file`."""
        return "".join("\t".join(row) + "\n" for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_flat(self) -> bool:
        """Whether all nodes are in one group."""
        return self.num_groups == 1

    @property
    def leaves(self) -> Tensor:
        """int64, the nodes without children."""
        is_parent = torch.zeros(len(self), dtype=torch.bool)
        is_parent[self.parents[self.parents >= 0]] = True
        return (~is_parent).nonzero().flatten()

    @property
    def others(self) -> list[str]:
        """The keys of the leaves ``X/other``."""
        return [self.keys[node] for node in self.is_other.nonzero().flatten().tolist()]

    def find_node(self, label: str, where: str = "") -> int:
        """Find a node by its key, else by its name; raise `InputError` if none or several match.

        Leaves ``X/other`` are never found.
        """
        matches = self.matching_nodes(label)
        if len(matches) == 1:
            return matches[0]
        prefix = f"{where}: " if where else ""
        if matches:
            keys = ", ".join(self.keys[node] for node in matches)
            raise InputError(f"{prefix}label {label!r} is ambiguous in the tree; use a key: {keys}")
        others = set(self.others)
        hint = nearest(label, (*self._named, *(key for key in self.keys if key not in others)))
        if not hint and len(self) <= 30:
            hint = f"allowed: {', '.join(self._named)}"
        raise InputError(f"{prefix}label {label!r} is not in the tree; {hint}".rstrip("; "))

    def matching_nodes(self, label: str) -> list[int]:
        """Return the node with this key, or else all with this name; see `find_node`."""
        node = self._index.get(label)
        if node is not None and not self.is_other[node]:
            return [node]
        return self._named.get(label, [])

    def children(self, node: int) -> list[int]:
        """Return the nodes directly below a node."""
        group = self._group_below.get(node)
        return [] if group is None else self._members[group]

    def ancestors_or_self(self, nodes: Tensor) -> Tensor:
        """Return bool (K,): which nodes are on the paths to `nodes`, int64 (N,)."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        path = self.paths[nodes.cpu()]
        mask[path[path >= 0]] = True
        return mask

    def deepest_ancestor_in(self, members: Tensor) -> Tensor:
        """Return int64 (K,): each node's deepest ancestor or self in `members` (K,), -1 if none."""
        is_member = (self.paths >= 0) & members.cpu()[self.paths.clamp(min=0)]
        first = is_member.int().argmax(dim=1)
        node = self.paths.gather(1, first[:, None]).squeeze(1)
        return torch.where(is_member.any(dim=1), node, -1)

    def _tables_on(self, device: torch.device) -> TreeTables:
        if device not in self._tables:
            tables = TreeTables.build(self.parents, self.groups, self.paths, self.is_other, device)
            self._tables[device] = tables
        return self._tables[device]

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Return conditional log-probabilities log P(node | parent), (…, K) like `logits`.

        Each group is shifted by its own maximum, so groups with very different logits lose no
        precision. A group of one node has log-probability 0 and a gradient of exactly 0.
        """
        if self.is_flat:
            return logits.log_softmax(dim=-1)
        return self._conditional(logits).t().reshape(logits.shape)

    def _conditional(self, logits: Tensor) -> Tensor:
        """Return log P(node | parent) with nodes as rows, (K, …): faster for small groups."""
        tables = self._tables_on(logits.device)
        rows = logits.reshape(-1, len(self)).t().contiguous()
        sizes = [nodes.numel() for nodes in tables.groups_by_size]
        parts = rows.index_select(0, tables.size_order).split(sizes)
        log_probs = [
            part.unflatten(0, nodes.shape).log_softmax(dim=1).flatten(0, 1)
            for part, nodes in zip(parts, tables.groups_by_size, strict=True)
        ]
        return torch.cat(log_probs).index_select(0, tables.size_inverse)

    def log_probs(self, logits: Tensor) -> Tensor:
        """Return absolute log-probabilities log P(node), (…, K): sums along the paths."""
        tables = self._tables_on(logits.device)
        if len(tables.levels) == 1:
            return self.log_softmax(logits)
        conditional = self._conditional(logits)
        levels = [conditional.index_select(0, tables.levels[0])]
        for nodes, parents in zip(tables.levels[1:], tables.parent_positions[1:], strict=True):
            above = levels[-1].index_select(0, parents)
            levels.append(above + conditional.index_select(0, nodes))
        return torch.cat(levels).index_select(0, tables.level_inverse).t().reshape(logits.shape)

    def path_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return -log P(label), (M,), of logits (M, K): cross-entropies summed along the path.

        Nodes below a label get no gradient.
        """
        if self.is_flat:
            return F.cross_entropy(logits, labels, reduction="none")
        nodes, levels, on_path = self.path_siblings(labels)
        values = logits.gather(1, nodes.clamp(min=0))
        log_probs = segment_log_softmax(values, levels, self.paths.shape[1] + 1)
        return -(log_probs * on_path).sum(dim=1)

    def most_specific_nodes(self, logits: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
        """Descend to the most probable child as long as its P(node) is at least `threshold`.

        Return nodes, int64 (M,), at least of the top level, and P(node), (M,), of logits (M, K).
        They are among `reported`: an only child is passed, and X is returned instead of a most
        probable child ``X/other``.

        Source: YOLO9000, section 4, "Hierarchical classification".
        """
        if self.is_flat:
            log_probs, nodes = logits.log_softmax(dim=1).max(dim=1)
            return nodes, log_probs.exp()
        nodes, probs, _ = self.descend(logits, threshold)
        return nodes, probs

    def descend(self, logits: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return `most_specific_nodes`, and the ends of the most probable paths, int64 (M,).

        An end may be ``X/other``.
        """
        start = torch.zeros_like(logits[:, 0])
        return self.descend_gathered(lambda nodes: logits.gather(1, nodes), start, threshold)

    @property
    def descent_widths(self) -> list[int]:
        """The largest number of nodes among which each step of a descent chooses."""
        return self._tables_on(torch.device("cpu")).widths

    def descend_gathered(
        self, gather: Callable[[Tensor], Tensor], log_prob: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `descend` does, with the logits of the nodes on the way only.

        `gather` returns the logits, float (M, S), of some nodes of each row, int64 (M, S), and
        `log_prob` are M zeros on its device. The device is not waited for: there are as many steps
        as the tree has levels.
        """
        tables = self._tables_on(log_prob.device)
        log_threshold = math.log(threshold) if threshold > 0 else -math.inf
        nodes = end = torch.full_like(log_prob, len(self), dtype=torch.int64)  # above the top level
        path = log_prob  # of the nodes at the ends of the paths so far
        for step, width in enumerate(tables.widths):
            first, size = tables.followers.index_select(0, end).split(1, dim=1)
            if len(end) and end.device.type == "cpu":  # where reading a number does not wait
                width = int(size.max())
                if step and width == 1:
                    break
            position = torch.arange(width, device=log_prob.device)
            siblings = tables.members[first + position].clamp(min=0)
            logits = gather(siblings).masked_fill(position >= size, -torch.inf)
            best, column = logits.log_softmax(dim=1).max(dim=1)
            end = siblings.gather(1, column[:, None]).squeeze(1)
            path = path + best  # beyond the end of a path: plus 0
            if step == 0:
                nodes, log_prob = end, path
            else:
                is_beyond = (path < log_threshold) | tables.is_other[end]
                nodes = torch.where(is_beyond, nodes, end)
                log_prob = torch.where(is_beyond, log_prob, path)
        return nodes, log_prob.exp(), end

    def path_siblings(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nodes that P(label) depends on: the sibling groups along each label's path.

        The tensors are (B, R), where R is the largest number of such nodes in the tree: nodes,
        int64, -1 as padding; levels, int64, each group's position on the path, 0 for the label's
        own, and the number of the tree's levels for padding; on_path, bool, whether the node itself
        is on the path.
        """
        return self._tables_on(labels.device).path_siblings(labels)


def segment_log_softmax(logits: Tensor, segments: Tensor, count: int, dim: int = -1) -> Tensor:
    """Return the log-softmax of logits within segments along a dimension.

    `segments`, int64 in 0…count - 1, has the shape of `logits`.
    """
    shape = [*logits.shape]
    shape[dim] = count
    maximum = logits.detach().new_full(shape, -torch.inf)
    maximum = maximum.scatter_reduce(dim, segments, logits.detach(), "amax")
    shifted = logits - maximum.gather(dim, segments)
    total = torch.zeros_like(maximum).scatter_add(dim, segments, shifted.exp())
    # clamped because the sum of an unused segment is 0; it is never read
    return shifted - total.clamp(min=torch.finfo(total.dtype).tiny).log().gather(dim, segments)


def _build_paths(parents: Tensor, keys: Sequence[str], where: Callable[[int], str]) -> Tensor:
    """Return int64 (K, D): each node followed by its ancestors, -1 as padding."""
    above = torch.cat([parents, torch.tensor([-1])])  # index -1 has the value -1
    columns = [torch.arange(len(parents))]
    while (columns[-1] >= 0).any():
        if len(columns) > MAX_LEVELS:
            start = int((columns[-1] >= 0).nonzero()[0])
            raise _too_deep(parents.tolist(), start, keys, where(start))
        columns.append(above[columns[-1]])
    return torch.stack(columns[:-1], dim=1)


def _too_deep(parents: list[int], start: int, keys: Sequence[str], where: str) -> InputError:
    """Return the error of a node with too many ancestors, or with a cycle of them."""
    position: dict[int, int] = {}  # on the path, by node
    node = start
    while node >= 0 and node not in position:
        position[node] = len(position)
        node = parents[node]
    if node < 0:
        return InputError(
            f"{where}: node {short(keys[start])} is too deep; allowed: {MAX_LEVELS} levels"
        )
    cycle = [keys[k] for k in [*position][position[node] :] + [node]]
    if len(cycle) > _MAX_SHOWN:
        cycle[_MAX_SHOWN - 1 : -1] = ["…"]
    return InputError(
        f"{where}: node {short(keys[start])} is in a cycle of parents: {' under '.join(cycle)}; "
        "change one of the parents, or use - for the top"
    )
