"""Names that exclude each other though one is above another, and only children; by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.trees import absolute_by_hand, trees
from yolo_lightning.errors import InputError
from yolo_lightning.tree.exclusive import ExclusiveNames, exclusive_parts
from yolo_lightning.tree.wordtree import WordTree

FOOD = WordTree(
    [
        ("food", "-", "food"), ("thing", "-", "thing"),
        ("cake", "food", "cake"), ("sandwich", "food", "sandwich"),
        ("donut", "cake", "donut"), ("cake/other", "cake", "other cake"),
        ("hot dog", "sandwich", "hot dog"), ("club", "sandwich", "club sandwich"),
        ("bun", "sandwich", "bun"), ("chili dog", "bun", "chili dog"), ("slider", "bun", "slider"),
        ("only", "thing", "only thing"), ("a", "only", "a"), ("b", "only", "b"),
    ]
)  # fmt: skip
NODE = {key: k for k, key in enumerate(FOOD.keys)}


def nodes(*keys: str) -> list[int]:
    return [NODE[key] for key in keys]


def parts(*keys: str) -> dict[str, list[str]]:
    found = exclusive_parts(FOOD, nodes(*keys))
    return {FOOD.keys[k]: [FOOD.keys[j] for j in part] for k, part in found.items()}


def test_parts_of_a_label_leave_out_the_topmost_labels_below_it():
    assert parts("sandwich", "hot dog", "donut") == {"sandwich": ["club", "bun"]}
    # chili dog is below hot dog's sibling: the path to it is left, its own siblings are parts
    assert parts("sandwich", "chili dog") == {"sandwich": ["hot dog", "club", "slider"]}
    # bun is above chili dog: what is below bun is no part of sandwich
    assert parts("sandwich", "bun", "chili dog") == {
        "sandwich": ["hot dog", "club"],
        "bun": ["slider"],
    }
    assert parts("cake", "donut") == {"cake": ["cake/other"]}
    assert parts("thing", "only") == {"thing": []}  # nothing else is below it
    assert parts("cake", "hot dog") == {}
    assert parts() == {}


def test_loss_and_gradient_by_hand():
    names = ExclusiveNames(FOOD, [2, 3], [nodes("cake", "donut"), nodes("cake")])
    logits = torch.zeros(3, len(FOOD), dtype=torch.float64)
    logits[:, NODE["donut"]] = math.log(3)  # P(donut | cake) = 3/4
    logits.requires_grad_()
    labels = torch.tensor(nodes("cake", "cake", "donut"))
    # P(cake) = 1/2 * 1/2; in the first source without the donuts: a quarter of it
    losses = names.path_loss(logits, labels, torch.tensor([1, 2, 0]))
    expected = [-math.log(1 / 16), -math.log(1 / 4), -math.log(3 / 16)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    losses[:2].sum().backward()
    assert logits.grad is not None
    donut, other = logits.grad[:, NODE["donut"]], logits.grad[:, NODE["cake/other"]]
    torch.testing.assert_close(donut, torch.tensor([0.75, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(other, torch.tensor([-0.75, 0, 0], dtype=torch.float64))


def test_loss_is_exact_where_the_difference_of_probabilities_would_be_zero():
    names = ExclusiveNames(FOOD, [1], [nodes("cake", "donut")])
    logits = torch.zeros(1, len(FOOD))
    logits[0, NODE["donut"]] = 60.0  # in float32, P(cake) - P(donut) is 0
    loss = names.path_loss(logits, torch.tensor(nodes("cake")), torch.tensor([0]))
    assert float(loss) == pytest.approx(60 - math.log(1 / 4))


def test_a_label_without_parts_keeps_its_node():
    names = ExclusiveNames(FOOD, [1], [nodes("thing", "only")])
    logits = torch.randn(2, len(FOOD))
    labels = torch.tensor(nodes("thing", "only"))
    expected = FOOD.path_loss(logits, labels)
    torch.testing.assert_close(names.path_loss(logits, labels, torch.zeros(2).long()), expected)


@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(0, 1000))
def test_parts_sum_to_the_difference_of_probabilities(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(tree), generator=generator, dtype=torch.float64)
    labels = torch.randperm(len(tree), generator=generator)[: 1 + seed % 6].tolist()
    probs = absolute_by_hand(tree, logits)
    found = exclusive_parts(tree, labels)
    paths = {k: [j for j in tree.paths[k].tolist() if j >= 0] for k in range(len(tree))}
    for label in labels:
        topmost = [
            k
            for k in labels
            if k != label
            and label in paths[k]
            and not any(j in labels for j in paths[k][1 : paths[k].index(label)])
        ]
        assert (label in found) == bool(topmost)
        if topmost:
            expected = probs[label] - sum(probs[k] for k in topmost)
            assert sum(probs[k] for k in found[label]) == pytest.approx(expected, abs=1e-12)


def test_source_numbers_follow_the_order_of_the_sources():
    names = ExclusiveNames(FOOD, [2, 3, 1], [[], [], []])
    ids = torch.tensor([0, 1, 2, 4, 5])
    assert names.source_numbers(ids).tolist() == [0, 0, 1, 1, 2]


def test_only_children_and_others_are_reported_as_the_class_above():
    reported = {FOOD.keys[k]: FOOD.keys[int(FOOD.reported[k])] for k in range(len(FOOD))}
    assert {key: name for key, name in reported.items() if key != name} == {
        "cake/other": "cake",
        "only": "thing",
    }


def test_descent_passes_only_children_and_stops_above_others():
    logits = torch.zeros(4, len(FOOD))
    logits[0, nodes("food", "cake", "donut")] = 9.0
    logits[1, nodes("food", "cake", "cake/other")] = 9.0
    logits[2, nodes("thing", "a")] = 9.0
    logits[3, nodes("thing")] = 9.0
    found, probs = FOOD.most_specific_nodes(logits, 0.9)
    assert [FOOD.keys[k] for k in found.tolist()] == ["donut", "cake", "a", "thing"]
    absolute = FOOD.log_probs(logits).exp()
    torch.testing.assert_close(probs, absolute[torch.arange(4), found])
    # asked for by name, the only child has the probability of its parent
    assert torch.equal(absolute[:, NODE["only"]], absolute[:, NODE["thing"]])


def test_others_are_never_found_by_label():
    assert FOOD.find_node("cake") == NODE["cake"]
    for label in ("cake/other", "other cake"):
        with pytest.raises(InputError, match="is not in the tree"):
            FOOD.find_node(label)
    assert WordTree([("-/other", "-", "a"), ("b", "-", "b")]).find_node("-/other") == 0
    # with children it is a class like any other
    tree = WordTree([("x", "-", "x"), ("x/other", "x", "x/other"), ("y", "x/other", "y")])
    assert tree.find_node("x/other") == 1
