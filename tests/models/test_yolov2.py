"""YOLOv2: backbones, outputs, decoding of boxes."""

import numpy as np
import pytest
import torch

from yolo_lightning.models import head
from yolo_lightning.models.backbones import DARKNET19, SMALL, detector_layers
from yolo_lightning.models.head import decode_boxes, select_candidates
from yolo_lightning.models.networks import LayerStack, YOLOv2


def test_backbones_have_the_size_and_stride_of_the_paper():
    backbone = LayerStack(DARKNET19)
    assert (backbone.stride, backbone.out_channels) == (32, 1024)
    kernels = [p for p in backbone.parameters() if p.ndim == 4]
    assert len(kernels) == 18
    # table 6, in thousands of weights, after the first two layers (864 and 18,432)
    by_hand = [73.728, 8.192, 73.728, 294.912, 32.768, 294.912]
    by_hand += [1179.648, 131.072, 1179.648, 131.072, 1179.648]
    by_hand += [4718.592, 524.288, 4718.592, 524.288, 4718.592]
    assert [k.numel() for k in kernels] == [864, 18_432, *(round(1000 * n) for n in by_hand)]
    assert LayerStack(SMALL).stride == 16


@pytest.mark.parametrize("passthrough", [0, 4, None])
def test_output_shape_for_multiples_of_the_stride(passthrough):
    network = YOLOv2(detector_layers(SMALL, 8, passthrough), 3, torch.ones(2, 2)).eval()
    for height, width in ((64, 64), (96, 32)):
        output = network(torch.rand(1, 3, height, width))
        assert output.box_logits.shape == (1, 2, 5, height // 16, width // 16)
        found = output.class_logits.gather_boxes(*(torch.tensor([0, 0]),) * 2, torch.tensor([0, 1]))
        assert found.shape == (2, 3)


def test_class_logits_of_selected_anchors_and_cells():
    torch.manual_seed(0)
    network = YOLOv2(detector_layers(SMALL, 8, 4), 3, torch.ones(2, 2)).eval()
    output = network(torch.rand(2, 3, 32, 64))
    sparse = output.class_logits
    image, anchor, cell = torch.tensor([1, 0, 1]), torch.tensor([1, 0, 0]), torch.tensor([5, 0, 7])
    features = sparse.features.flatten(2)
    for k, row in enumerate(sparse.gather_boxes(image, anchor, cell)):
        expected = network.class_weight[anchor[k]] @ features[image[k], :, cell[k]]
        torch.testing.assert_close(row, expected + network.class_bias[anchor[k]])
    of_cells = sparse.gather_cells(image * features.shape[2] + cell)
    torch.testing.assert_close(
        of_cells[torch.arange(3), anchor], sparse.gather_boxes(image, anchor, cell)
    )
    assert sparse.gather_cells(cell[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize("images_at_once", [1, 2, 3])
def test_class_logits_of_selected_nodes(monkeypatch, images_at_once):
    torch.manual_seed(0)
    network = YOLOv2(detector_layers(SMALL, 8, 4), 4, torch.ones(2, 2)).eval()
    with torch.no_grad():
        network.class_bias.normal_()
    sparse = network(torch.rand(3, 3, 32, 64)).class_logits
    nodes = torch.tensor([[0, 3], [2, -1], [1, 1]])
    monkeypatch.setattr(head, "MAX_WEIGHTS", images_at_once * 2 * 2 * 8)
    logits = sparse.gather_nodes(nodes)
    dense = sparse.gather_cells(torch.arange(3 * 8)).view(3, 8, 2, 4).permute(0, 2, 3, 1)
    for image in range(3):
        expected = dense[image][:, nodes[image].clamp(min=0)]
        torch.testing.assert_close(logits[image], expected)


def test_decode_boxes_by_hand():
    logits = torch.zeros(1, 1, 5, 2, 4)
    logits[0, 0, 2, 1, 3] = np.log(2.0)
    boxes = decode_boxes(logits, torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(boxes[0, 0, :, 1, 3], torch.tensor([3.5 / 4, 1.5 / 2, 2 / 4, 0.25]))


def test_boxes_with_unbounded_locations_by_hand():
    logits = torch.zeros(1, 2, 5, 2, 4)
    logits[0, 1, :4, 1, 3] = torch.tensor([-0.75, 0.5, np.log(2.0), 0.0])
    boxes = decode_boxes(logits, torch.tensor([[3.0, 4.0], [2.0, 0.5]]), "offset")
    centre = torch.tensor([0.5 / 4, 0.5 / 2, 3 / 4, 4 / 2])
    torch.testing.assert_close(boxes[0, 0, :, 0, 0], centre)
    # 1.5 cells to the left of the centre of its cell, a quarter of a cell below
    expected = torch.tensor([2.0 / 4, 1.75 / 2, 4 / 4, 0.5 / 2])
    torch.testing.assert_close(boxes[0, 1, :, 1, 3], expected)


def test_candidates_of_a_batch_equal_those_of_single_images():
    torch.manual_seed(1)
    network = YOLOv2(detector_layers(SMALL, 8, 4), 3, torch.ones(2, 2)).eval()
    images = torch.rand(3, 3, 64, 64)
    batched = select_candidates(network(images), torch.ones(2, 2), 0.5)
    singles = [select_candidates(network(one), torch.ones(2, 2), 0.5) for one in images.split(1)]
    assert batched.image.bincount().tolist() == [len(one.image) for one in singles]
    for name in ("boxes_cxcywh_norm", "objectness", "anchor", "cell"):
        expected = torch.cat([getattr(one, name) for one in singles])
        torch.testing.assert_close(getattr(batched, name), expected)
    logits = [[part for _, part in one.chunks()] for one in (batched, *singles)]
    expected = torch.cat([part for parts in logits[1:] for part in parts])
    torch.testing.assert_close(torch.cat(logits[0]), expected, rtol=1e-4, atol=1e-5)
