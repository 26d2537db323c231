"""Names of a dataset that exclude each other, though one is above another in the tree."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from yolo_lightning.tree.wordtree import WordTree, segment_log_softmax

Parts = dict[int, list[int]]
"""By node, the nodes whose probabilities add up to that of the node without others below it."""


def exclusive_parts(tree: WordTree, nodes: Iterable[int]) -> Parts:
    """Return the parts of those of `nodes` that have others of them below.

    Where a dataset labels sandwich and hot dog, a box labelled sandwich holds no hot dog. It holds
    one of the nodes beside the path from sandwich to hot dog: these are the parts of sandwich, and
    the sum of their probabilities is P(sandwich) - P(hot dog). An empty list means that no node is
    left which could be meant.
    """
    labels = torch.tensor(sorted(set(nodes)), dtype=torch.long)
    is_label = torch.zeros(len(tree) + 1, dtype=torch.bool)  # the last one is padding
    is_label[labels] = True
    ancestors = tree.paths[labels][:, 1:]
    above = ancestors[is_label[ancestors]].unique().tolist()
    return {node: _parts(tree, node, labels, is_label) for node in above}


def _parts(tree: WordTree, top: int, labels: Tensor, is_label: Tensor) -> list[int]:
    below = labels[(tree.paths[labels] == top).any(dim=1)]
    leads_to_label = tree.ancestors_or_self(below)
    parts, pending = [], [top]
    for node in pending:  # extended during iteration
        for child in tree.children(node):
            if not leads_to_label[child]:
                parts.append(child)
            elif not is_label[child]:
                pending.append(child)
    return parts


class ExclusiveNames:
    """What the labels of boxes mean, in sources that are joined one after the other.

    Args:
        tree: the classes.
        lengths: images of each source.
        nodes: of each source, the nodes of names that exclude each other; none if they do not.
        device: of the tensors that are passed to the methods.
    """

    def __init__(
        self,
        tree: WordTree,
        lengths: Sequence[int],
        nodes: Sequence[Iterable[int]],
        device: torch.device | str = "cpu",
    ) -> None:
        self.tree, self.nodes = tree, [sorted(set(labels)) for labels in nodes]
        self._ends = torch.tensor(lengths, device=device).cumsum(0)
        parts = [exclusive_parts(tree, labels) for labels in self.nodes]
        table: list[list[int]] = []  # parts of one label each
        # int64 (sources, K), the number of the label in the table, from 1; 0 if it means its node
        rows = torch.zeros(len(parts), len(tree), dtype=torch.long)
        for number, of_source in enumerate(parts):
            for node, part in of_source.items():
                if part:
                    table.append(part)
                    rows[number, node] = len(table)
        self._rows, self._has_parts = rows.to(device), bool(table)
        if table:
            self._build_tables([table[0], *table], device)

    def _build_tables(self, table: list[list[int]], device: torch.device | str) -> None:
        """Build tables of the nodes that parts depend on; the first row stands for no parts."""
        padded = pad_sequence([torch.tensor(part) for part in table], True, -1)
        paths = self.tree.paths[padded.clamp(min=0)].masked_fill(padded[..., None] < 0, -1)
        needed = self.tree.groups[paths[paths >= 0]]
        columns = torch.isin(self.tree.groups, needed).nonzero().flatten()
        position = torch.full((len(self.tree) + 1,), -1)  # the last one is padding
        position[columns] = torch.arange(len(columns))
        groups, segments = self.tree.groups[columns].unique(return_inverse=True)
        self._num_segments = len(groups)
        self._columns, self._segments = columns.to(device), segments.to(device)
        # int64 (T, P, D), the paths of the parts as indices into the columns, -1 as padding
        self._part_paths = position[paths].to(device)

    def source_numbers(self, sample_ids: Tensor) -> Tensor:
        """Return int64 (B,), the number of the source of each image."""
        return torch.bucketize(sample_ids, self._ends, right=True)

    def excluded(self, label: int, sample_id: int) -> list[int]:
        """Return the nodes that a label of an image does not mean, though they are below it."""
        source = int(self.source_numbers(torch.tensor(sample_id, device=self._ends.device)))
        if not self._rows[source, label]:
            return []
        nodes = [node for node in self.nodes[source] if node != label]
        return [node for node in nodes if label in self.tree.paths[node].tolist()]

    def path_loss(self, logits: Tensor, labels: Tensor, sample_ids: Tensor) -> Tensor:
        """Return -log P(label), (M,), of logits (M, K); of a label with parts, -log of their sum.

        `labels` are nodes and `sample_ids` those of their images, int64 (M,).
        """
        losses = self.tree.path_loss(logits, labels)
        if not self._has_parts:
            return losses
        rows = self._rows[self.source_numbers(sample_ids), labels]
        values = logits.index_select(1, self._columns)
        segments = self._segments.expand_as(values)
        conditional = segment_log_softmax(values, segments, self._num_segments)
        paths = self._part_paths.index_select(0, rows)  # (M, P, D)
        on_path = conditional.gather(1, paths.clamp(min=0).flatten(1)).view(paths.shape)
        log_probs = (on_path * (paths >= 0)).sum(dim=2)
        of_parts = log_probs.masked_fill(paths[:, :, 0] < 0, -torch.inf).logsumexp(dim=1)
        return torch.where(rows > 0, -of_parts, losses)
