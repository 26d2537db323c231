"""The steps from YOLO to YOLOv2, as overrides of recipes/road.yaml, and their miniature."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from yolo_lightning.datamodules import ShapesDetection
from yolo_lightning.datamodules.shapes import SHAPES
from yolo_lightning.models.anchors import (
    as_yaml_values,
    cluster_anchors,
    faster_rcnn_anchors,
)
from yolo_lightning.tree.wordtree import WordTree

Values = dict[str, str]
"""Values of a recipe by dotted key, as on the command line."""

MULTI_SCALE = "yolo_lightning.callbacks.MultiScale"


@dataclass(frozen=True)
class Step:
    """A row of the paper's table: the row above with some other values."""

    name: str
    paper: float  # mAP on VOC 2007, %
    values: Values = field(default_factory=dict)
    paper_recall: float | None = None  # %


STEPS = (
    Step("YOLO, fully convolutional", 63.4),
    Step(
        "batch norm",
        65.8,
        {"model.batch_norm": "true", "model.pretrained": "${oc.env:EXTRACTION_224}"},
    ),
    Step("high-resolution classifier", 69.5, {"model.pretrained": "${oc.env:EXTRACTION_448}"}, 81),
    Step(
        "anchors",
        69.2,
        {
            "model.backbone": "extraction",
            "model.location": "offset",
            "model.anchors_wh_cell": "[[2.94, 1.47], [2.08, 2.08], [1.47, 2.94], [5.88, 2.94], "
            "[4.16, 4.16], [2.94, 5.88], [11.77, 5.88], [8.32, 8.32], [5.88, 11.77]]",
            "data.image_size": "416",
        },
        88,
    ),
    Step(
        "new network",
        69.6,
        {"model.backbone": "darknet19", "model.pretrained": "${oc.env:DARKNET19_448}"},
    ),
    Step(
        "clustered anchors, direct location",
        74.4,
        {
            "model.anchors_wh_cell": "[[1.3221, 1.73145], [3.19275, 4.00944], [5.05587, 8.09892], "
            "[9.47112, 4.84053], [11.2364, 10.0071]]",
            "model.location": "direct",
        },
    ),
    Step("passthrough", 75.4, {"model.passthrough_channels": "64"}),
    Step(
        "multi-scale",
        76.8,
        {
            "trainer.callbacks+": MULTI_SCALE,
            "trainer.callbacks.sizes": "[320, 352, 384, 416, 448, 480, 512, 544, 576, 608]",
            "trainer.callbacks.every_n_batches": "10",
            "trainer.callbacks.last_batches_at_largest": "200",
        },
    ),
    Step("larger size at test time", 78.6, {"data.image_size": "544"}),
)
"""Source: YOLO9000, table 2. Values apply to `fit`, those of the last row to `test`."""

# --- the miniature

SIZE, LARGER_SIZE = 96, 128  # px
LOW_SIZE = 64  # px, of the classifiers before the high-resolution one
NAMES = list(SHAPES)
TREE = [[SHAPES[name][0], "-", name] for name in NAMES]
BOXES = "tests.benchmarks.cached_shapes.CachedShapesDetection"
LABELS = "tests.benchmarks.cached_shapes.CachedShapesImageLabels"

OLD_NETWORK: list[list[Any]] = [
    ["conv", 16, 3, 2], ["pool"],
    ["conv", 32], ["pool"],
    ["conv", 64], ["conv", 64], ["pool"],
    ["conv", 128], ["conv", 128],
]  # fmt: skip
NEW_NETWORK: list[list[Any]] = [
    ["conv", 16, 3, 2], ["pool"],
    ["conv", 32], ["pool"],
    ["conv", 64], ["conv", 32, 1], ["conv", 64], ["pool"],
    ["conv", 128], ["conv", 64, 1], ["conv", 128], ["conv", 64, 1], ["conv", 128],
]  # fmt: skip
"""1x1 convolutions between the 3x3 ones, as in Darknet-19; `OLD_NETWORK` has 3x3 ones alone."""


def boxes_of(seed: int, images: int) -> dict[str, Any]:
    """Return images with boxes as values of a recipe."""
    options = {"length": images, "objects": [1, 5], "radii": [0.08, 0.34], "image_size": 128}
    return {"class_path": BOXES, "init_args": {**options, "seed": seed}}


def hand_picked() -> list[list[float]]:
    """Return the anchors of Faster R-CNN, scaled from images of 600 px; in cells of 16 px."""
    return as_yaml_values(faster_rcnn_anchors() * SIZE / 600 / 16)


def clustered(seed: int, images: int) -> list[list[float]]:
    """Return five anchors for the training images, in cells of 16 px."""
    options = boxes_of(seed, images)["init_args"]
    source = ShapesDetection(**options)
    source.bind(WordTree([(row[0], row[1], row[2]) for row in TREE]))
    boxes = np.concatenate([source.read(k).boxes_xyxy_px for k in range(min(images, 500))])
    shapes = (boxes[:, 2:] - boxes[:, :2]) * SIZE / options["image_size"] / 16
    return as_yaml_values(cluster_anchors(shapes, 5))


def miniature_steps(seed: int, images: int) -> list[Values]:
    """Return the values of each row of the miniature: the keys of `STEPS`, other values."""
    other: Values = {
        "model.backbone": json.dumps(OLD_NETWORK),
        "model.anchors_wh_cell": json.dumps(hand_picked()),
        "data.image_size": str(SIZE),
        "model.passthrough_channels": "16",
        "trainer.callbacks.sizes": f"[{SIZE - 32}, {SIZE}, {SIZE + 32}]",
        "trainer.callbacks.last_batches_at_largest": "0",
    }
    rows = [{key: other.get(key, value) for key, value in step.values.items()} for step in STEPS]
    rows[4]["model.backbone"] = json.dumps(NEW_NETWORK)
    rows[5]["model.anchors_wh_cell"] = json.dumps(clustered(seed, images))
    rows[8]["data.image_size"] = str(LARGER_SIZE)
    return rows


def detector_values(seed: int, steps: int, images: int, test_images: int) -> Values:
    """Return the values of recipes/road.yaml that the miniature changes in every row."""
    last = "yolo_lightning.callbacks.LastCheckpoint"
    callbacks = [{"class_path": last, "init_args": {"every_n_steps": steps}}]
    return {
        "seed_everything": str(seed),
        "model.tree": json.dumps(TREE),
        "model.backbone": json.dumps(OLD_NETWORK),
        "model.anchors_wh_cell": "[[3.0, 3.0]]",  # half of 96 px, in cells of 16 px
        "model.head_channels": "64",
        "model.learning_rate": "0.02",
        "model.schedule.burn_in_steps": str(steps // 10),
        "model.schedule.milestones": f"[{6 * steps // 10}, {85 * steps // 100}]",
        "model.loss.anchor_prior_images": "1600",
        "data.detection": json.dumps(boxes_of(seed, images)),
        "data.validation": json.dumps(boxes_of(1_000_001, test_images)),
        "data.detection_augmentation": "null",
        "data.detection_batch_size": "16",
        "data.image_size": str(SIZE),
        "data.num_workers": "0",
        "trainer.gradient_clip_val": "1.0",
        "trainer.max_epochs": "-1",
        "trainer.max_steps": str(steps),
        "trainer.limit_val_batches": "0",
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.callbacks": json.dumps(callbacks),
    }


def classifier_values(seed: int, steps: int, size: int, test_images: int) -> Values:
    """Return the values of recipes/classify_imagenet_224.yaml and _448.yaml in the miniature."""
    labels = {"radii": [0.2, 0.42], "image_size": 112}
    train, test = ({"length": n, "seed": s, **labels} for n, s in ((6144, seed), (test_images, 9)))
    detector = detector_values(seed, steps, 1, 1)
    keys = [key for key in detector if key.startswith("trainer.")]
    shared = ("seed_everything", "model.tree", "data.num_workers", *keys)
    return {key: detector[key] for key in shared} | {
        "model.schedule.burn_in_steps": str(steps // 10),
        "model.schedule.power": "1.0",
        "data.classification": json.dumps({"class_path": LABELS, "init_args": train}),
        "data.validation": json.dumps({"class_path": LABELS, "init_args": test}),
        "data.classification_augmentation.shorter_side": "[1.0, 1.25]",
        "data.classification_augmentation.degrees": "0",
        "data.classification_augmentation.aspect": "1",
        "data.classification_batch_size": "32",
        "data.image_size": str(size),
        "trainer.gradient_clip_val": "0.5",
    }
