"""Accuracy along a tree, by hand and against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.trees import reported_by_hand, trees
from yolo_lightning.evaluation.tree_accuracy import KINDS, TreeAccuracy
from yolo_lightning.tree.wordtree import WordTree


def path_of(tree: WordTree, node: int) -> list[int]:
    return [k for k in tree.paths[node].tolist() if k >= 0][::-1]


def kind_of(tree: WordTree, predicted: int, label: int) -> str:
    if label in path_of(tree, predicted):
        return "right"
    if predicted in path_of(tree, label):
        return "not_specific_enough"
    parent = int(tree.parents[label])
    under_parent = (
        parent in path_of(tree, predicted) if parent >= 0 else tree.parents[predicted] < 0
    )
    return "wrong_leaf" if under_parent else "wrong_branch"


@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(0, 1000))
def test_kinds_and_depths_equal_brute_force(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    predicted, leaves, labels = torch.randint(0, len(tree), (3, 12), generator=generator)
    labels[3] = -1
    metric = TreeAccuracy(tree)
    metric.update(predicted[:5], leaves[:5], labels[:5])
    metric.update(predicted[5:], leaves[5:], labels[5:])
    metrics = metric.compute()
    real = [k for k in range(12) if labels[k] >= 0]
    predicted, leaves, labels = (
        [reported_by_hand(tree, k) if k >= 0 else -1 for k in nodes.tolist()]
        for nodes in (predicted, leaves, labels)
    )
    kinds = [kind_of(tree, int(predicted[k]), int(labels[k])) for k in real]
    for kind in KINDS:
        assert metrics[kind] == pytest.approx(kinds.count(kind) / len(real))
    for depth in range(tree.paths.shape[1]):
        pairs = [(path_of(tree, int(labels[k])), path_of(tree, int(leaves[k]))) for k in real]
        deep = [
            (true_path, predicted_path)
            for true_path, predicted_path in pairs
            if len(true_path) > depth
        ]
        if deep:
            hits = sum(
                true_path[depth] == (predicted_path + [-2] * 30)[depth]
                for true_path, predicted_path in deep
            )
            assert metrics[f"depth{depth + 1}"] == pytest.approx(hits / len(deep))
        else:
            assert f"depth{depth + 1}" not in metrics
