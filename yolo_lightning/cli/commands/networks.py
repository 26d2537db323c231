"""`yolo-lightning networks`: size and operations of the built-in networks."""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

IMAGE_SIZES = (224, 416, 608)
"""px. Source: YOLO9000: sizes of the classifier, of the detector, and the largest in training."""
BOXES_AT = 416  # px


class Network(NamedTuple):
    """A network as a recipe describes it; without anchors it is a classifier."""

    settings: str  # of `model` in a recipe, as YAML
    classes: int
    anchors: int = 0


NETWORKS = {
    "`darknet19`": Network("backbone: darknet19", 1000),
    "`tiny`": Network("backbone: tiny_darknet", 1000),
    "YOLOv1's classifier": Network("backbone: extraction", 1000),
    "YOLOv2 as in the paper": Network(
        "backbone: darknet19, reorg: space_to_depth, passthrough_channels: null", 20, 5
    ),
    "`yolov2-voc`": Network("backbone: darknet19, reorg: darknet", 20, 5),
    "`yolov2`": Network("backbone: darknet19, reorg: darknet", 80, 5),
    "`yolov2-tiny-voc`": Network(
        "backbone: tiny_yolov2_voc, head_channels: 0, passthrough_channels: 0", 20, 5
    ),
    "`yolov2-tiny`": Network(
        "backbone: tiny_yolov2, head_channels: 0, passthrough_channels: 0", 80, 5
    ),
    "`yolo9000`": Network(
        "backbone: darknet19, head_channels: 0, passthrough_channels: 0", 9418, 3
    ),
}
"""By name; a name in backticks is that of a released network, see `darknet import --layout`."""


def table() -> Iterator[str]:
    """Yield the lines of the table, as Markdown, each as soon as it is computed."""
    import torch
    import yaml

    from yolo_lightning.inference.timing import billion_operations
    from yolo_lightning.models.backbones import backbone_layers, detector_layers
    from yolo_lightning.models.networks import Classifier, YOLOv2

    columns = (
        "network", "`model` in a recipe", "classes", "parameters, M",
        *(f"{size} px" for size in IMAGE_SIZES), f"boxes at {BOXES_AT} px",
    )  # fmt: skip
    yield _row(columns)
    yield _row(["---"] * len(columns))
    for name, (settings, classes, anchors) in NETWORKS.items():
        options = yaml.safe_load(f"{{{settings}}}")
        layers = backbone_layers(options.pop("backbone"))
        network: Classifier | YOLOv2
        with torch.device("meta"):
            if anchors:
                layers = detector_layers(layers, **options)
                network = YOLOv2(layers, classes, torch.empty(anchors, 2))
                boxes = f"{anchors * (BOXES_AT // network.stride) ** 2:,}"
            else:
                network, boxes = Classifier(layers, classes), ""
        parameters = sum(parameter.numel() for parameter in network.parameters()) / 1e6
        operations = [billion_operations(network, size) for size in IMAGE_SIZES]
        figures = [f"{figure:.2f}" for figure in (parameters, *operations)]
        yield _row([name, f"`{settings}`", f"{classes:,}", *figures, boxes])


def _row(cells: Sequence[str]) -> str:
    return " ".join(["|", " | ".join(cells), "|"]).replace("|  |", "| |")


def main(argv: Sequence[str]) -> None:
    """Run `networks`: print the table."""
    parser = argparse.ArgumentParser(
        prog="yolo-lightning networks",
        description="Print parameters, billions of operations and boxes of the built-in networks.",
        epilog="A multiplication and an addition count as two operations.",
        allow_abbrev=False,
    )
    parser.parse_args(list(argv))
    for line in table():
        print(line, flush=True)
