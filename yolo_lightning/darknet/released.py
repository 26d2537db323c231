"""The released networks of Darknet."""

import itertools
from collections.abc import Callable, Sequence

from yolo_lightning.darknet.config import NetworkDescription, Region
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.models.anchors import RELEASED, Released
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


def _region(anchors: Released, rescore: bool = True) -> Region:
    return Region(tuple(itertools.chain.from_iterable(RELEASED[anchors])), rescore=rescore)


def _yolov2(anchors: Released, names: Sequence[str], side: int) -> NetworkDescription:
    layers = detector_layers(DARKNET19, 1024, 64, "darknet")
    return NetworkDescription(layers, len(names), (side, side), _region(anchors), names)


LAYOUTS: dict[str, Callable[[], NetworkDescription]] = {
    "yolov2-voc": lambda: _yolov2("voc", VOC_NAMES, 416),
    "yolov2": lambda: _yolov2("coco", COCO_NAMES, 608),
    "yolov2-tiny-voc": lambda: NetworkDescription(
        TINY_YOLOV2_VOC, 20, (416, 416), _region("tiny_voc"), VOC_NAMES
    ),
    "yolov2-tiny": lambda: NetworkDescription(
        TINY_YOLOV2, 80, (416, 416), _region("coco", rescore=False), COCO_NAMES
    ),
    "yolo9000": lambda: NetworkDescription(
        DARKNET19, 9418, (544, 544), _region("yolo9000"), needs_tree=True
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
