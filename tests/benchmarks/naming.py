"""Box selection over many nodes, and naming boxes with few and with many nodes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.rehearsal_data import tree_rows
from tests.benchmarks.rows import Row, in_turn, wall
from tests.benchmarks.step import SMALL_TREE
from yolo_lightning import DetectorModule, WordTree
from yolo_lightning.losses import select_boxes
from yolo_lightning.models.head import HeadOutput, SparseClassLogits

BOXES, LEVELS = 50, 4


def make_output(nodes: int, batch_size: int, channels: int, cells: int = 13) -> HeadOutput:
    """Return random logits of three anchors."""
    features = torch.randn(batch_size, channels, cells, cells)
    features = features.contiguous(memory_format=torch.channels_last)
    class_logits = SparseClassLogits(
        features, 0.05 * torch.randn(3, nodes, channels), torch.zeros(3, nodes)
    )
    return HeadOutput(torch.randn(batch_size, 3, 5, cells, cells), class_logits)


def select_naively(output: HeadOutput, labels: Tensor, tree: WordTree) -> tuple[Tensor, Tensor]:
    """Return anchor and cell of each image's box with the highest objectness x P(label).

    Computes the log-probabilities of all nodes in all boxes.
    """
    batch_size, anchors, _, height, width = output.box_logits.shape
    cells = torch.arange(batch_size * height * width)
    log_probs = tree.log_probs(output.class_logits.gather_cells(cells))
    log_probs = log_probs.unflatten(0, (batch_size, -1))  # (B, G, A, K)
    index = labels[:, None, None, None].expand(-1, height * width, anchors, 1)
    objectness = output.box_logits[:, :, 4].sigmoid().flatten(2).log()
    score = objectness + log_probs.gather(3, index).squeeze(3).transpose(1, 2)
    best = score.flatten(1).argmax(dim=1)
    return best // score.shape[2], best % score.shape[2]


def selection(tiny: bool = False) -> tuple[WordTree, Callable[[], Any], Callable[[], Any]]:
    """Return the tree, and both ways to select boxes of 8 images."""
    torch.manual_seed(0)
    tree = WordTree(SMALL_TREE if tiny else tree_rows(np.random.default_rng(0)))
    output = make_output(len(tree), 2 if tiny else 8, 8 if tiny else 1024)
    labels = torch.randint(0, len(tree), (len(output.box_logits),))
    anchors_wh_cell, everything = torch.ones(3, 2), torch.arange(len(tree))
    return (
        tree,
        lambda: select_boxes(output, labels, anchors_wh_cell, tree, everything, "label"),
        lambda: select_naively(output, labels, tree),
    )


def layered_tree(nodes: int) -> list[tuple[str, str, str]]:
    """Return a tree of four levels in which all groups have one size, but for the last one."""
    group = 1
    while sum(group**level for level in range(1, LEVELS + 1)) < nodes:
        group += 1
    if nodes < 100:  # one node of each level has children, the first one
        group = nodes // LEVELS
        parents = [-1] * group + [(k // group - 1) * group for k in range(group, nodes)]
    else:
        parents = [-1] * group + [(k - group) // group for k in range(group, nodes)]
    return [(f"n{k}", "-" if p < 0 else f"n{p}", f"name {k}") for k, p in enumerate(parents)]


def naming(nodes: int, tiny: bool = False) -> Callable[[], Any]:
    """Return a function that names 50 boxes by a descent to a leaf, without the network."""
    torch.manual_seed(0)
    channels = 8 if tiny else 1024
    module = DetectorModule(layered_tree(nodes), "yolo9000", "small", channels, 0).eval()
    output = make_output(0, 1, channels)
    output.class_logits = SparseClassLogits(
        torch.randn(1, channels, 13, 13), module.network.class_weight, module.network.class_bias
    )
    objectness = output.box_logits[:, :, 4].flatten().fill_(-60)
    objectness[torch.randperm(len(objectness))[:BOXES]] = 4
    output.box_logits[:, :, 4] = objectness.view(1, 3, 13, 13)
    module.network.forward = lambda images: output  # type: ignore[method-assign]
    image, sizes = torch.zeros(1, 3, 416, 416), torch.tensor([[416, 416]])
    return lambda: module.detect_most_specific(image, sizes, 1e-12, 0.0)


def measure(tiny: bool = False) -> list[Row]:
    """Return the rows."""
    rounds = 2 if tiny else 51
    tree, *ways = selection(tiny)
    ours, naive = in_turn(2 if tiny else 5, *ways)
    what = f"box selection over {len(tree):,} nodes, 8 images at 416 px"
    against = "log-probabilities of all nodes"
    rows = [Row(what, wall(ours, ".1f", 1e3, " ms"), "0.1", against).versus(ours, naive)]
    many = 200 if tiny else 100_000
    few, more = in_turn(rounds, naming(20, tiny), naming(many, tiny))
    what = f"naming {BOXES} boxes by descent to a leaf, {LEVELS} levels, {many:,} nodes"
    row = Row(what, wall(more, ".1f", 1e3, " ms"), "1.2", "20 nodes")
    return [*rows, row.versus(more, few)]
