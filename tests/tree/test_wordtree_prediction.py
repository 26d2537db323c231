"""Predictions of any nodes, of leaves, and of the most specific nodes, with their scores."""

import pytest
import torch

from tests.helpers.trees import absolute_by_hand, descend_by_hand
from yolo_lightning import DetectorModule, WordTree
from yolo_lightning.batches import unit_range
from yolo_lightning.models.head import select_candidates

ROWS = [
    ("animal", "-", "animal"), ("tool", "-", "tool"), ("cat", "animal", "cat"),
    ("dog", "animal", "dog"), ("bengal", "cat", "Bengal"), ("manx", "cat", "Manx"),
    ("saw", "tool", "saw"),
]  # fmt: skip
SIZES = torch.tensor([[96, 96], [192, 96]])


@pytest.fixture(scope="module")
def model() -> DetectorModule:
    torch.manual_seed(0)
    anchors = [(1.0, 1.5), (3.0, 2.0)]
    module = DetectorModule(ROWS, anchors, "small", 8, 4, iou_threshold=1.0)  # nothing suppressed
    for name, parameter in module.network.named_parameters():
        if parameter.ndim == 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return module.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 96, 96), generator=generator, dtype=torch.uint8)


def decode_all_boxes(model, images):
    """Return objectness and absolute probabilities, by hand, of every box of every image."""
    with torch.no_grad():
        output = model.network(unit_range(images))
        found = select_candidates(output, model.network.anchors_wh_cell, -1.0)
    tree = WordTree(ROWS)
    return [
        (image.objectness, torch.tensor([absolute_by_hand(tree, row) for row in image.logits]))
        for image in found
    ]


@pytest.mark.parametrize("nodes", [[0, 2, 5], [4, 5, 3, 6], [1]])
def test_detect_scores_are_objectness_times_probability_for_any_nodes(model, images, nodes):
    found = model.detect(images, SIZES, torch.tensor(nodes), 0.02)
    assert sum(len(image.labels) for image in found) > 10
    for image, (objectness, probs) in zip(found, decode_all_boxes(model, images), strict=True):
        scores = objectness[:, None] * probs[:, nodes]
        expected = scores[scores > 0.02].sort(descending=True).values
        torch.testing.assert_close(image.scores, expected)
        assert set(image.labels.tolist()) <= set(nodes)
        for label in nodes:
            own = scores[:, nodes.index(label)]
            said = image.scores[image.labels == label]
            torch.testing.assert_close(said, own[own > 0.02].sort(descending=True).values)


def test_detect_with_all_leaves(model, images):
    leaves = model.tree.leaves
    assert [ROWS[k][0] for k in leaves.tolist()] == ["dog", "bengal", "manx", "saw"]
    (first, _) = model.detect(images, SIZES, leaves, 0.0)
    objectness, probs = decode_all_boxes(model, images)[0]
    # a leaf for every box, and the leaves of a box share all that it holds
    assert first.scores.sum() == pytest.approx(float(objectness.sum()), rel=1e-4)
    assert float(probs[:, leaves].sum(dim=1).sub(1).abs().max()) < 1e-5


@pytest.mark.parametrize("tree_threshold", [0.0, 0.4, 0.6, 0.95])
def test_detect_most_specific_scores_are_objectness_times_probability(
    model, images, tree_threshold
):
    tree, depths = WordTree(ROWS), set()
    found = model.detect_most_specific(
        images, SIZES, score_threshold=0.02, tree_threshold=tree_threshold
    )
    for image, (objectness, probs) in zip(found, decode_all_boxes(model, images), strict=True):
        expected = []
        for own, row in zip(objectness.tolist(), probs, strict=True):
            at = descend_by_hand(tree, row.tolist(), tree_threshold)
            if own * float(row[at]) > 0.02:
                expected.append((own * float(row[at]), at))
        expected.sort(reverse=True)
        torch.testing.assert_close(image.scores, torch.tensor([score for score, _ in expected]))
        assert image.labels.tolist() == [label for _, label in expected]
        depths |= {int((tree.paths[k] >= 0).sum()) for k in image.labels.tolist()}
    # the saw, an only child, is called a tool
    assert depths == {0.0: {1, 2, 3}, 0.95: {1}}.get(tree_threshold, depths)


def test_class_logits_are_computed_only_above_the_objectness_threshold(model, images, monkeypatch):
    looked: list[int] = []
    most_specific = model.tree.most_specific_nodes

    def recorded(logits: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        looked.append(len(logits))
        nodes, probs = most_specific(logits, threshold)
        return nodes, probs

    monkeypatch.setattr(model.tree, "most_specific_nodes", recorded)
    objectness = [o for o, _ in decode_all_boxes(model, images)]
    middle = float(torch.cat(objectness).median())
    model.detect_most_specific(images, SIZES, score_threshold=middle)
    assert looked == [int((o > middle).sum()) for o in objectness]
    assert 0 < sum(looked) < sum(len(o) for o in objectness)
