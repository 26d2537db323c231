"""Predictions of any nodes, of leaves, and of the most specific nodes, with their scores."""

import pytest
import torch

from tests.helpers.golden import detection_batch
from tests.helpers.trees import absolute_by_hand, descend_by_hand
from yolo_lightning import DetectorModule, WordTree
from yolo_lightning import detections as detections_file
from yolo_lightning.batches import unit_range
from yolo_lightning.detections import BestPairs
from yolo_lightning.models import head
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
        (
            found.objectness[found.image == image],
            torch.tensor([absolute_by_hand(tree, row) for row in logits[found.image == image]]),
        )
        for _, logits in found.chunks()
        for image in range(len(images))
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
    assert looked == [sum(int((o > middle).sum()) for o in objectness)]
    assert 0 < looked[0] < sum(len(o) for o in objectness)


def all_detections(model, images) -> list[torch.Tensor]:
    """Return boxes, labels and scores of every kind of detection, and the metrics as a row."""
    with torch.no_grad():
        found = model.detect(images, SIZES, torch.arange(len(ROWS)), 0.01)
        found += model.detect_most_specific(images, SIZES, 0.01, 0.4)
        model.boxed.fill_(True)
        model.evaluation.reset(torch.tensor([2, 3, 4, 6]), model.boxed_ancestors())
        boxes = torch.tensor([[[0.3, 0.3, 0.4, 0.5]], [[0.5, 0.5, 0.9, 0.7]]])
        batch = detection_batch(boxes, torch.tensor([[3], [4]]))
        batch.images, batch.sizes_hw_orig = images, SIZES
        model.validation_step(batch, 0)
    evaluation = model.evaluation
    tables = [
        detections for level in evaluation.levels for detections in level.precision.detections
    ]
    kinds = torch.stack([evaluation.tree_accuracy.kind_counts])
    parts = [torch.cat([one.boxes_xyxy_orig_px, one.scores[:, None]], dim=1) for one in found]
    # without the last column, which numbers the images that were ever added
    return [*parts, *(table[:, :-1] for table in tables), kinds]


@pytest.mark.parametrize("max_pairs", [100, 8192])
def test_class_logits_in_chunks_give_the_same_detections(model, images, monkeypatch, max_pairs):
    monkeypatch.setattr(detections_file, "MAX_PAIRS", max_pairs)
    expected = all_detections(model, images)
    assert len(expected[0]) == min(max_pairs, 72 * len(ROWS)) or max_pairs > 100
    sizes = []
    gather = head.SparseClassLogits.gather_boxes

    def recorded(self, *index):
        sizes.append(len(index[0]))
        return gather(self, *index)

    monkeypatch.setattr(head.SparseClassLogits, "gather_boxes", recorded)
    for max_logits in (1, 5 * len(ROWS) + 1):
        monkeypatch.setattr(head, "MAX_LOGITS", max_logits)
        for one, other in zip(expected, all_detections(model, images), strict=True):
            # a matrix product of few rows may round differently
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert set(sizes) <= {1, max(1, max_logits // len(ROWS)), *range(5)}
        assert max(sizes) == max(1, max_logits // len(ROWS))
        sizes.clear()


def test_names_from_few_weights_equal_those_from_all_logits(monkeypatch):
    torch.manual_seed(2)
    # a root and its only child, with 40 children that have 40 children each
    rows = [("top", "-", "top"), ("root", "top", "root")]
    rows += [(f"{k}", "root", f"{k}") for k in range(40)]
    rows += [(f"{k}/{j}", f"{k}", f"{j}") for k in range(40) for j in (*range(39), "other")]
    module = DetectorModule(rows, [(1.0, 1.5), (3.0, 2.0)], "small", 8, 4).eval()
    bias = module.network.box_conv.bias
    assert bias is not None
    with torch.no_grad():
        module.network.box_conv.weight.mul_(60)
        module.network.class_weight.mul_(60)
        module.network.class_bias.normal_()
        bias.view(-1, 5)[:, 4] = -7
    images, labels, used = torch.rand(2, 3, 96, 96), set(), []
    node_logits = head.SparseClassLogits.node_logits

    def recorded(self, *index):
        used.append(len(index[0]))
        return node_logits(self, *index)

    monkeypatch.setattr(head.SparseClassLogits, "node_logits", recorded)
    for tree_threshold in (0.0, 0.3, 0.9):
        found = []
        for max_weights in (2**25, 0):
            monkeypatch.setattr(head, "MAX_WEIGHTS", max_weights)
            found.append(module.detect_most_specific(images, SIZES, 0.1, tree_threshold))
        for one, other in zip(*found, strict=True):
            assert one.labels.tolist() == other.labels.tolist()
            torch.testing.assert_close(one.scores, other.scores)
            labels |= set(one.labels.tolist())
    assert len(used) == 3, used
    assert min(used) > 5
    assert {int((module.tree.paths[k] >= 0).sum()) for k in labels} == {1, 3, 4}


def test_best_pairs_of_boxes_added_in_parts(monkeypatch):
    monkeypatch.setattr(detections_file, "MAX_PAIRS", 3)
    probs = torch.tensor([[0.5, 0.25, 0.5], [0.0, 0.75, 0.5], [0.5, 0.1, 1.0]])
    boxes = torch.tensor([[0.0, 0, 9, 9], [20.0, 0, 29, 9], [40.0, 0, 49, 9]])
    image = torch.zeros(3, dtype=torch.long)
    for parts in ([3], [1, 2], [1, 1, 1]):
        pairs = BestPairs(image, 1, [torch.tensor([2, 0])], threshold=0.2)
        for rows in torch.arange(3).split(parts):
            pairs.add(int(rows[0]), torch.full((len(rows),), 0.5), probs[rows][:, [2, 0]])
        ((found,),) = pairs.suppress(boxes, 0.45)
        # class 2 of the third box, then of equal scores the first ones
        assert found.scores.tolist() == [0.5, 0.25, 0.25]
        assert found.labels.tolist() == [2, 2, 0]
        assert found.boxes_xyxy_orig_px[:, 0].tolist() == [40, 0, 0]


def test_images_and_levels_do_not_take_each_others_pairs(monkeypatch):
    # box 0 in image 0, boxes 1 and 2, which overlap, in image 1; nodes 0 and 1 in one level, and
    # node 0 in another
    monkeypatch.setattr(detections_file, "MAX_PAIRS", 3)
    pairs = BestPairs(
        torch.tensor([0, 1, 1]), 3, [torch.tensor([0, 1]), torch.tensor([0])], threshold=0.2
    )
    probs = torch.tensor([[0.9, 0.8, 0.9], [0.7, 0.6, 0.5], [0.8, 0.55, 0.1]])
    for start in (0, 1):
        pairs.add(start, torch.ones(start + 1), probs[start : 2 * start + 1])
    boxes = torch.tensor([[0.0, 0, 9, 9], [0.0, 0, 9, 9], [0.0, 0, 9, 8]])
    found = [
        [(one.labels.tolist(), [round(s, 2) for s in one.scores.tolist()]) for one in level]
        for level in pairs.suppress(boxes, 0.45)
    ]
    # without the limit, 0.55 would be suppressed too; with it, it is not among three of four
    assert found == [
        [([0, 1], [0.9, 0.8]), ([0, 1], [0.8, 0.6]), ([], [])],
        [([0], [0.9]), ([0], [0.5]), ([], [])],
    ]
