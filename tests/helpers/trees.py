"""Random trees, their probabilities by brute force, and a small tree and backbone."""

from typing import Any

import torch
from hypothesis import strategies as st

from yolo_lightning.tree.wordtree import WordTree


@st.composite
def trees(draw: st.DrawFn) -> WordTree:
    """Draw a forest of up to 25 nodes; the order of the rows is random."""
    count = draw(st.integers(1, 25))
    parents = [-1] + [draw(st.integers(-1, k - 1)) for k in range(1, count)]
    rows = [(f"n{k}", "-" if p < 0 else f"n{p}", f"name {k}") for k, p in enumerate(parents)]
    order = draw(st.permutations(range(count)))
    return WordTree([rows[k] for k in order])


def conditional_by_hand(tree: WordTree, logits: torch.Tensor) -> list[float]:
    probs = []
    for node in range(len(tree)):
        siblings = [k for k in range(len(tree)) if tree.parents[k] == tree.parents[node]]
        probs.append(float(logits[node].exp() / logits[siblings].exp().sum()))
    return probs


def absolute_by_hand(tree: WordTree, logits: torch.Tensor) -> list[float]:
    conditional = conditional_by_hand(tree, logits)
    probs = []
    for node in range(len(tree)):
        product, ancestor = 1.0, node
        while ancestor >= 0:
            product = product * conditional[ancestor]
            ancestor = int(tree.parents[ancestor])
        probs.append(product)
    return probs


TREE = [("animal", "-", "animal"), ("cat", "animal", "cat"), ("dog", "animal", "dog"),
        ("thing", "-", "thing"), ("cup", "thing", "cup"), ("jug", "thing", "jug")]  # fmt: skip


BACKBONE: list[list[Any]] = [
    ["conv", 8], ["pool"], ["conv", 8], ["pool"], ["conv", 8], ["pool"], ["conv", 8], ["pool"],
    ["conv", 16], ["pool"], ["conv", 16],
]  # fmt: skip
