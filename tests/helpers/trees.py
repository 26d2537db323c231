"""Random trees, their probabilities by brute force, and a small tree and backbone."""

from typing import Any

import torch
from hypothesis import strategies as st

from yolo_lightning.tree.wordtree import WordTree


@st.composite
def trees(draw: st.DrawFn) -> WordTree:
    """Draw a forest of up to 25 nodes, some leaves ``X/other``; the order of rows is random."""
    count = draw(st.integers(1, 25))
    parents = [-1] + [draw(st.integers(-1, k - 1)) for k in range(1, count)]
    # the last child of a node, if it is a leaf, may be its other
    last = {parent: k for k, parent in enumerate(parents)}
    others = {k for p, k in last.items() if p >= 0 and k not in parents and draw(st.booleans())}
    keys = [f"n{p}/other" if k in others else f"n{k}" for k, p in enumerate(parents)]
    rows = [(keys[k], "-" if p < 0 else keys[p], f"name {k}") for k, p in enumerate(parents)]
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


def reported_by_hand(tree: WordTree, node: int) -> int:
    """Return the node that stands for a node in predictions."""
    parent = int(tree.parents[node])
    siblings = [k for k in range(len(tree)) if tree.parents[k] == parent]
    if parent >= 0 and (len(siblings) == 1 or tree.keys[node] == f"{tree.keys[parent]}/other"):
        return reported_by_hand(tree, parent)
    return node


def descend_by_hand(tree: WordTree, probs: list[float], threshold: float) -> int:
    """Return the node at which a descent with probabilities P(node) ends."""
    at = named = -1
    while True:
        below = [k for k in range(len(tree)) if tree.parents[k] == at]
        if at >= 0 and len(below) == 1:  # an only child is passed without a name
            (at,) = below
            continue
        best = max(below, key=lambda k: probs[k], default=None)
        if best is None or (named >= 0 and probs[best] < threshold):
            return named
        if tree.keys[best] == f"{tree.keys[at]}/other":
            return named
        at = named = best


TREE = [("animal", "-", "animal"), ("cat", "animal", "cat"), ("dog", "animal", "dog"),
        ("thing", "-", "thing"), ("cup", "thing", "cup"), ("jug", "thing", "jug")]  # fmt: skip


BACKBONE: list[list[Any]] = [
    ["conv", 8], ["pool"], ["conv", 8], ["pool"], ["conv", 8], ["pool"], ["conv", 8], ["pool"],
    ["conv", 16], ["pool"], ["conv", 16],
]  # fmt: skip
