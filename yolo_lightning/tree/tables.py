"""Index tables of a WordTree, for computing all sibling groups or levels at once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class TreeTables:
    """Index tables on one device; nodes of equal group size, and of equal level, are contiguous."""

    paths: Tensor  # (K, D + 1), as in the tree, and a column of -2
    groups_by_size: list[Tensor]  # for each group size, the nodes of these groups, (groups, size)
    size_order: Tensor  # (K,), the nodes of groups_by_size in sequence
    size_inverse: Tensor  # (K,), each node's position in size_order
    levels: list[Tensor]  # the nodes of each level of the tree
    parent_positions: list[Tensor]  # positions of the nodes' parents in the level above
    level_inverse: Tensor  # (K,), each node's position in the concatenated levels
    # (K + R,), the nodes of each group, one group after the other, and R times -1, where R is the
    # largest number of nodes in the groups along one path
    members: Tensor
    path_ends: Tensor  # (K, D), numbers of nodes in the groups along each path, added up
    # (K, D + 1), what is added to the number of a node in the groups along a path for its position
    # in members, by level of the path; last: that of a number beyond the end of the path
    path_offsets: Tensor
    group_starts: Tensor  # (G,), position of each group in members
    group_sizes: Tensor  # (G,)
    # (K + 1,), the next group of a descent from each node, -1 if there is none: its children or,
    # below an only child, the children of that one; last: the top level
    child_group: Tensor
    is_other: Tensor  # bool (K,), leaves X/other
    # (K + 1, 2), where the nodes that follow each one in a descent begin in members, and how many
    # they are, see child_group; a node without any is followed by itself
    followers: Tensor
    widths: list[int]  # the largest number of followers at each step of a descent, on the host

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
        ends = child_group < 0
        first = torch.where(ends, F.pad(members.argsort(), (0, 1)), group_starts[child_group])
        sizes = torch.where(ends, 1, group_sizes[child_group])
        size_order = torch.cat([nodes.flatten() for nodes in groups_by_size])
        path_groups = groups[paths.clamp(min=0)]
        path_sizes = group_sizes[path_groups] * (paths >= 0)
        path_ends = path_sizes.cumsum(1)
        path_offsets = group_starts[path_groups] - path_ends + path_sizes
        width = int(path_ends[:, -1].max())
        return cls(
            F.pad(paths, (0, 1), value=-2).to(device),
            [nodes.to(device) for nodes in groups_by_size],
            size_order.to(device),
            size_order.argsort().to(device),
            [level.to(device) for level in levels],
            [positions.to(device) for positions in parent_positions],
            torch.cat(levels).argsort().to(device),
            F.pad(members, (0, width), value=-1).to(device),
            path_ends.to(device),
            F.pad(path_offsets, (0, 1), value=len(members)).to(device),
            group_starts.to(device),
            group_sizes.to(device),
            child_group.to(device),
            is_other.to(device),
            torch.stack([first, sizes], dim=1).to(device),
            _descent_widths(child_group, groups, group_sizes),
        )

    def siblings(self, group: Tensor, size: int) -> Tensor:
        """Return the nodes of groups (M,), int64 (M, size), -1 as padding."""
        position = torch.arange(size, device=group.device)
        index = self.group_starts[group][:, None] + position  # members are padded
        return self.members[index].masked_fill(position >= self.group_sizes[group][:, None], -1)

    def path_siblings(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nodes of the groups along the paths of labels (M,); see `WordTree`."""
        count = len(self.members) - len(self.paths)
        number = torch.arange(count, device=labels.device).repeat(len(labels), 1)
        ends = self.path_ends.index_select(0, labels)
        levels = torch.searchsorted(ends, number, right=True)
        position = number + self.path_offsets.index_select(0, labels).gather(1, levels)
        nodes = self.members[position]
        return nodes, levels, nodes == self.paths.index_select(0, labels).gather(1, levels)


def _descent_widths(child_group: Tensor, groups: Tensor, group_sizes: Tensor) -> list[int]:
    widths, current = [], child_group[-1:]
    while len(current):
        widths.append(int(group_sizes[current].max()))
        following = child_group[:-1][torch.isin(groups, current)]
        current = following[following >= 0]
    return widths
