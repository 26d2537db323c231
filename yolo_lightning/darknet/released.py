"""The released networks of Darknet."""

from collections.abc import Callable, Sequence

from yolo_lightning.darknet.config import NetworkDescription, Region
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.models.backbones import (
    DARKNET19,
    TINY_DARKNET,
    TINY_YOLOV2,
    TINY_YOLOV2_VOC,
    detector_layers,
)

VOC_NAMES = (
    "aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,"
    "person,pottedplant,sheep,sofa,train,tvmonitor"
).split(",")


COCO_NAMES = (
    "person,bicycle,car,motorbike,aeroplane,bus,train,truck,boat,traffic light,fire hydrant,"
    "stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,"
    "backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,"
    "baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,"
    "banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,sofa,pottedplant,"
    "bed,diningtable,toilet,tvmonitor,laptop,mouse,remote,keyboard,cell phone,microwave,oven,"
    "toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")


_VOC_ANCHORS = [
    1.3221, 1.73145, 3.19275, 4.00944, 5.05587, 8.09892, 9.47112, 4.84053, 11.2364, 10.0071,
]  # fmt: skip


_COCO_ANCHORS = [
    0.57273, 0.677385, 1.87446, 2.06253, 3.33843, 5.47434, 7.88282, 3.52778, 9.77052, 9.16828,
]  # fmt: skip


_TINY_VOC_ANCHORS = [1.08, 1.19, 3.42, 4.41, 6.63, 11.38, 9.42, 5.11, 16.62, 10.52]


_YOLO9000_ANCHORS = [0.77871, 1.14074, 3.00525, 4.31277, 9.22725, 9.61974]


def _yolov2(anchors: list[float], names: Sequence[str], side: int) -> NetworkDescription:
    layers = detector_layers(DARKNET19, 1024, 64, "darknet")
    return NetworkDescription(layers, len(names), (side, side), Region(tuple(anchors)), names)


LAYOUTS: dict[str, Callable[[], NetworkDescription]] = {
    "yolov2-voc": lambda: _yolov2(_VOC_ANCHORS, VOC_NAMES, 416),
    "yolov2": lambda: _yolov2(_COCO_ANCHORS, COCO_NAMES, 608),
    "yolov2-tiny-voc": lambda: NetworkDescription(
        TINY_YOLOV2_VOC, 20, (416, 416), Region(tuple(_TINY_VOC_ANCHORS)), VOC_NAMES
    ),
    "yolov2-tiny": lambda: NetworkDescription(
        TINY_YOLOV2, 80, (416, 416), Region(tuple(_COCO_ANCHORS), rescore=False), COCO_NAMES
    ),
    "yolo9000": lambda: NetworkDescription(
        DARKNET19, 9418, (544, 544), Region(tuple(_YOLO9000_ANCHORS)), needs_tree=True
    ),
    "darknet19": lambda: NetworkDescription(DARKNET19, 1000, (224, 224)),
    "darknet19_448": lambda: NetworkDescription(DARKNET19, 1000, (448, 448)),
    "tiny": lambda: NetworkDescription(TINY_DARKNET, 1000, (224, 224)),
}
"""The released networks. Source: the configurations of the original program."""


def released_network(name: str) -> NetworkDescription:
    """Return the description of a released network.

    Raises:
        InputError: an unknown name.
    """
    if name not in LAYOUTS:
        hint = nearest(name, LAYOUTS) or f"allowed: {', '.join(LAYOUTS)}"
        raise InputError(f"--layout {name!r}; {hint}")
    return LAYOUTS[name]()
