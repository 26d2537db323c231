"""Boxes and captions in images."""

import numpy as np
import pytest

from yolo_lightning.visualization.drawing import draw_boxes, draw_captions

COLOURS = [(255, 140, 0), (64, 160, 255), (120, 200, 80), (220, 90, 160)]


def grey(height=200, width=300):
    return np.full((height, width, 3), 128, np.uint8)


def caption_areas(boxes, captions):
    """Draw the captions, and return the number of pixels of each one's background."""
    canvas = grey()
    draw_captions(canvas, np.array(boxes), captions, COLOURS[: len(boxes)])
    return [(canvas == colour).all(axis=2).sum() for colour in COLOURS[: len(boxes)]]


def test_a_caption_alone_is_above_its_box_on_the_left():
    canvas = grey()
    draw_captions(canvas, np.array([[50, 60, 150, 120]]), ["cat 0.90"], COLOURS[:1])
    rows, columns = np.nonzero((canvas != 128).any(axis=2))
    assert (columns.min(), rows.max()) == (50, 60)
    assert rows.min() < 50


@pytest.mark.parametrize(
    "boxes",
    [
        [[50, 60, 150, 120]] * 4,  # four boxes on each other
        [[50, 60, 90, 100], [50, 66, 90, 106], [56, 60, 96, 100], [60, 70, 98, 108]],
        [[0, 0, 60, 40], [0, 0, 62, 44], [4, 0, 64, 46], [0, 4, 60, 48]],  # in the corner
    ],
)
def test_captions_of_neighbours_do_not_hide_each_other(boxes):
    alone = [
        max(caption_areas([[100, 100, 140, 140]], [name]))
        for name in ("aa 1", "bb 2", "cc 3", "dd 4")
    ]
    together = caption_areas(boxes, ["aa 1", "bb 2", "cc 3", "dd 4"])
    for number, (whole, visible) in enumerate(zip(alone, together, strict=True)):
        assert visible >= 0.85 * whole, number  # smoothed letters take some pixels


def test_a_caption_leaves_a_small_neighbour_visible():
    """The small box is where the caption of the large one would be."""
    canvas = grey()
    boxes = np.array([[50, 60, 250, 180], [52, 44, 76, 58]])
    draw_captions(canvas, boxes, ["large 0.90", ""], COLOURS[:2])
    x1, y1, x2, y2 = boxes[1]
    assert (canvas[y1:y2, x1:x2] == 128).all()


def test_lines_of_small_boxes_are_thin():
    image = grey()
    box = np.array([[40, 40, 60, 60], [100, 40, 200, 140]], np.float32)
    drawn = draw_boxes(image, box, ["", ""], COLOURS[:2])
    small, large = (
        abs(drawn[y, x : x + 20].astype(int) - 128).sum() for y, x in ((50, 30), (90, 90))
    )
    assert 0 < small < 0.7 * large  # smoothed lines: what they differ from the image in all
    assert (image == 128).all()
