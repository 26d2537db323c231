"""Index tables of a WordTree, for computing all sibling groups or levels at once."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class TreeTables:
    """Index tables on one device; nodes of equal group size, and of equal level, are contiguous."""

    paths: Tensor  # (K, D), as in the tree
    groups_by_size: list[Tensor]  # for each group size, the nodes of these groups, (groups, size)
    size_order: Tensor  # (K,), the nodes of groups_by_size in sequence
    size_inverse: Tensor  # (K,), each node's position in size_order
    levels: list[Tensor]  # the nodes of each level of the tree
    parent_positions: list[Tensor]  # positions of the nodes' parents in the level above
    level_inverse: Tensor  # (K,), each node's position in the concatenated levels
    members: Tensor  # (K,), the nodes of each group, one group after the other
    group_starts: Tensor  # (G,), position of each group in members
    group_sizes: Tensor  # (G,)
    # (K + 1,), the next group of a descent from each node, -1 if there is none: its children or,
    # below an only child, the children of that one; last: the top level
    child_group: Tensor
    is_other: Tensor  # bool (K,), leaves X/other

    @classmethod
    def build(
        cls,
        parents: Tensor,
        groups: Tensor,
        paths: Tensor,
        is_other: Tensor,
        device: torch.device,
    ) -> "TreeTables":
        """Build the tables from the attributes of a `WordTree`."""
        group_sizes = torch.bincount(groups)
        members = groups.argsort(stable=True)
        group_starts = group_sizes.cumsum(0) - group_sizes
        groups_by_size = [
            members[group_starts[group_sizes == size][:, None] + torch.arange(size)]
            for size in group_sizes.unique().tolist()
        ]
        child_group = torch.full((len(parents) + 1,), -1)
        child_group[parents] = groups  # index -1: the top level
        levels: list[Tensor] = []
        parent_positions: list[Tensor] = []
        position = torch.zeros(len(parents), dtype=torch.long)
        above = torch.tensor([-1])
        while len(level := torch.isin(parents, above).nonzero().flatten()):
            parent_positions.append(position[parents[level]])
            position[level] = torch.arange(len(level))
            levels.append(level)
            above = level
        for level in reversed(levels[1:]):  # from the bottom, because only children may be nested
            only = level[group_sizes[groups[level]] == 1]
            child_group[parents[only]] = child_group[only]
        size_order = torch.cat([nodes.flatten() for nodes in groups_by_size])
        return cls(
            paths.to(device),
            [nodes.to(device) for nodes in groups_by_size],
            size_order.to(device),
            size_order.argsort().to(device),
            [level.to(device) for level in levels],
            [positions.to(device) for positions in parent_positions],
            torch.cat(levels).argsort().to(device),
            members.to(device),
            group_starts.to(device),
            group_sizes.to(device),
            child_group.to(device),
            is_other.to(device),
        )

    def siblings(self, group: Tensor, size: int) -> Tensor:
        """Return the nodes of groups (M,), int64 (M, size), -1 as padding."""
        position = torch.arange(size, device=group.device)
        index = (self.group_starts[group][:, None] + position).clamp(max=len(self.members) - 1)
        return self.members[index].masked_fill(position >= self.group_sizes[group][:, None], -1)
