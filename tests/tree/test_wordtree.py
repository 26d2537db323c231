from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.paths import REPO
from tests.helpers.trees import absolute_by_hand, conditional_by_hand, descend_by_hand, trees
from yolo_lightning.errors import InputError
from yolo_lightning.tree.wordtree import WordTree


@settings(max_examples=40, deadline=None)
@given(trees(), st.integers(0, 1000))
def test_probabilities_equal_brute_force(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, len(tree), generator=generator, dtype=torch.float64)
    for row in logits:
        conditional = torch.tensor(conditional_by_hand(tree, row), dtype=torch.float64)
        torch.testing.assert_close(tree.log_softmax(row).exp(), conditional)
        absolute = torch.tensor(absolute_by_hand(tree, row), dtype=torch.float64)
        torch.testing.assert_close(tree.log_probs(row).exp(), absolute)
    labels = torch.randint(0, len(tree), (4,), generator=generator)
    expected = -tree.log_probs(logits)[torch.arange(4), labels]
    torch.testing.assert_close(tree.path_loss(logits, labels), expected)


@settings(max_examples=40, deadline=None)
@given(trees(), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 0.5, 0.9]))
def test_descent_equals_brute_force(tree, seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, len(tree), generator=generator, dtype=torch.float64)
    nodes, probs = tree.most_specific_nodes(logits, threshold)
    for k, row in enumerate(logits):
        absolute = absolute_by_hand(tree, row)
        at = descend_by_hand(tree, absolute, threshold)
        assert nodes[k] == at
        assert probs[k] == pytest.approx(absolute[at])
    if not tree.is_flat:
        # the end of a path may be X/other, or an only child
        ends = tree.reported[tree.descend(logits, threshold)[2]]
        assert ends.tolist() == tree.most_specific_nodes(logits, 0.0)[0].tolist()
    assert len(tree.most_specific_nodes(logits[:0], threshold)[0]) == 0


def test_groups_with_very_different_logits_lose_no_precision():
    tree = WordTree([("a", "-", "a"), ("b", "-", "b"), ("c", "a", "c"), ("d", "a", "d")])
    logits = torch.tensor([200.0, 199.0, -200.0, -201.0])
    same = torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(tree.log_softmax(logits), tree.log_softmax(same))


def test_a_group_of_one_node_has_probability_one_and_no_gradient():
    tree = WordTree([("a", "-", "a"), ("b", "a", "b"), ("c", "-", "c")])
    logits = torch.tensor([[0.3, 5.0, -1.0]], requires_grad=True)
    tree.path_loss(logits, torch.tensor([1])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert logits.grad[0, 0] < 0 < logits.grad[0, 2]


def test_flat_list_is_a_softmax():
    tree = WordTree.from_names(["apple", "banana", "orange"])
    logits = torch.randn(5, 3)
    torch.testing.assert_close(tree.log_probs(logits), logits.log_softmax(1))


def test_ancestors_and_the_deepest_ancestor_with_boxes():
    tree = WordTree.from_file(REPO / "recipes/trees/shapes.tsv")
    boxed = torch.tensor([tree.find_node("right triangle"), tree.find_node("ring")])
    supervised = tree.ancestors_or_self(boxed)
    names = {tree.names[k] for k in supervised.nonzero().flatten().tolist()}
    assert names == {"right triangle", "triangle", "polygon", "plane figure", "shape", "ring"}
    deepest = tree.deepest_ancestor_in(supervised)
    expected = {
        "equilateral triangle": "triangle",
        "rhombus": "polygon",
        "crescent": "shape",
        "right triangle": "right triangle",
    }
    for name, ancestor in expected.items():
        assert tree.names[deepest[tree.find_node(name)]] == ancestor
    assert deepest[tree.find_node("Latin cross")] == -1


def test_shapes_tree_has_wordnet_keys_and_depth():
    tree = WordTree.from_file(REPO / "recipes/trees/shapes.tsv")
    assert len(tree.leaves) == 12
    assert tree.paths.shape[1] >= 3
    assert all(key[0] == "n" and len(key) == 9 and key[1:].isdigit() for key in tree.keys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\t-\tx\na\t-\ty\n", "tree.tsv:2: key 'a' was already defined in line 1"),
        ("# x\na\tb\tx\nb\ta\ty\n", "tree.tsv:2: node 'a' is in a cycle of parents: a under b"),
        ("apple\t-\tx\nb\taple\ty\n", "tree.tsv:2: node 'b' has the unknown parent 'aple'; did"),
        ("a\t-\n", "tree.tsv:1: expected three tab-separated fields"),
        ("# only a comment\n", "has no classes"),
    ],
)
def test_invalid_tree_files_are_named(tmp_path: Path, text, message):
    file = tmp_path / "tree.tsv"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        WordTree.from_file(file)


def test_unknown_and_ambiguous_labels():
    tree = WordTree([("n1", "-", "crane"), ("n2", "-", "crane"), ("n3", "-", "heron")])
    assert tree.find_node("n2") == 1
    assert tree.find_node("heron") == 2
    with pytest.raises(InputError, match="ambiguous in the tree; use a key: n1, n2"):
        tree.find_node("crane")
    with pytest.raises(InputError, match=r"a.xml: label 'herron' is not in the tree; did you mean"):
        tree.find_node("herron", "a.xml")
    with pytest.raises(InputError, match="tree file 'nowhere.tsv' not found"):
        WordTree.from_file("nowhere.tsv")


def test_a_file_of_names_is_a_tree_of_one_level(tmp_path):
    file = tmp_path / "coco.names"
    file.write_text("person\nhot dog\r\n\n")
    tree = WordTree.from_source(str(file))
    assert tree.rows == [("person", "-", "person"), ("hot dog", "-", "hot dog")]


def test_path_siblings():
    tree = WordTree([("a", "-", ""), ("b", "-", ""), ("c", "a", ""), ("d", "a", "")])
    nodes, levels, on_path = tree.path_siblings(torch.tensor([1, 3]))
    assert nodes.tolist() == [[0, 1, -1, -1], [2, 3, 0, 1]]
    assert levels[1].tolist() == [0, 0, 1, 1]
    assert on_path.tolist() == [[False, True, False, False], [False, True, True, False]]


@settings(max_examples=40, deadline=None)
@given(trees())
def test_path_siblings_of_all_nodes(tree):
    nodes, levels, on_path = tree.path_siblings(torch.arange(len(tree)))
    for label in range(len(tree)):
        path = [node for node in tree.paths[label].tolist() if node >= 0]
        expected = [
            (sibling, level, sibling == node)
            for level, node in enumerate(path)
            for sibling in range(len(tree))
            if tree.parents[sibling] == tree.parents[node]
        ]
        rows = list(zip(*(t[label].tolist() for t in (nodes, levels, on_path)), strict=True))
        assert rows[: len(expected)] == expected
        assert set(rows[len(expected) :]) <= {(-1, tree.paths.shape[1], False)}


def test_a_too_deep_tree_is_rejected_before_it_uses_memory():
    rows = [("k0", "-", "x"), *((f"k{k}", f"k{k - 1}", "x") for k in range(1, 20_000))]
    with pytest.raises(InputError, match="node 'k200' is too deep; allowed: 200 levels"):
        WordTree(rows)
    WordTree(rows[:200])
