import pytest
import torch

from yolo_lightning.boxes import (
    batched_nms,
    cxcywh_to_xyxy,
    letterbox_geometry,
    pairwise_iou,
    shape_iou,
    unletterbox,
    xyxy_to_cxcywh,
)


def random_boxes(count: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = spread * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + 0.05 + 0.4 * torch.rand(count, 2, generator=generator)], 1)


def test_box_formats_are_inverse():
    boxes = random_boxes(50, 0)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    assert xyxy_to_cxcywh(torch.tensor([[1.0, 2.0, 5.0, 10.0]])).tolist() == [[3, 6, 4, 8]]


def test_iou_by_hand_symmetric_and_zero_for_empty_boxes():
    first = torch.tensor([[0.0, 0, 2, 2], [1, 1, 1, 1]])
    second = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2]])
    iou = pairwise_iou(first, second)
    torch.testing.assert_close(iou, torch.tensor([[1 / 7, 1.0], [0.0, 0.0]]))
    torch.testing.assert_close(pairwise_iou(second, first), iou.T)
    line = torch.tensor([[-torch.inf, 1, torch.inf, 1]])  # overflow and underflow of a size
    assert pairwise_iou(line, second).tolist() == [[0, 0]]


def test_shape_iou_by_hand():
    iou = shape_iou(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0], [4.0, 1.0]]))
    torch.testing.assert_close(iou, torch.tensor([[1 / 3, 1 / 2]]))


def test_letterbox_geometry_by_hand():
    assert letterbox_geometry((375, 500), (416, 416)) == (312, 416, 52.0, 0.0)
    assert letterbox_geometry((500, 333), (416, 416)) == (416, 277, 0.0, 69.5)
    assert letterbox_geometry((1, 5000), (416, 416))[:2] == (1, 416)  # never vanishes


@pytest.mark.parametrize("whole", [True, False])
def test_unletterbox_inverts_the_letterbox(whole):
    new_height, new_width, top, left = letterbox_geometry((300, 200), (416, 416))
    box = torch.tensor([[0.3, 0.6, 0.2, 0.4]])  # of the original
    if whole:
        assert (top, left) == (0, 69.5)
        left = 69
    placed = box * torch.tensor([new_width, new_height] * 2) / 416
    placed[:, :2] += torch.tensor([left, top]) / 416
    # in the second image of a batch
    image, sizes = torch.tensor([1]), torch.tensor([[50, 70], [300, 200]])
    torch.testing.assert_close(unletterbox(placed, image, sizes, (416, 416), whole), box)


def greedy_nms(boxes, scores, classes, threshold):
    kept: list[int] = []
    for k in scores.argsort(descending=True, stable=True).tolist():
        rivals = [j for j in kept if classes[j] == classes[k]]
        if all(pairwise_iou(boxes[k : k + 1], boxes[j : j + 1]) <= threshold for j in rivals):
            kept.append(k)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_nms_equals_the_greedy_algorithm(seed):
    boxes = random_boxes(120, seed, spread=0.4)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 40, (120,), generator=generator) / 40  # many ties
    classes = torch.randint(0, 3, (120,), generator=generator)
    expected = greedy_nms(boxes, scores, classes, 0.45)
    assert batched_nms(boxes, scores, classes, 0.45).tolist() == expected
    assert 5 < len(expected) < 110


def test_nms_is_independent_of_order_and_handles_no_boxes():
    boxes, scores, classes = random_boxes(40, 1), torch.linspace(0, 1, 40), torch.zeros(40).long()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    kept = batched_nms(boxes, scores, classes)
    assert order[batched_nms(boxes[order], scores[order], classes[order])].tolist() == kept.tolist()
    assert batched_nms(boxes[:0], scores[:0], classes[:0]).tolist() == []


def test_suppressed_box_suppresses_no_other_box():
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])
    kept = batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3).long(), 0.3)
    assert kept.tolist() == [0, 2]
