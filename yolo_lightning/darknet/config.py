"""Models as Darknet's `.cfg` files describe them, and as ours do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yolo_lightning.darknet.files import Section
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.models.backbones import (
    DARKNET19,
    TINY_DARKNET,
    TINY_YOLOV2,
    TINY_YOLOV2_VOC,
    detector_layers,
)
from yolo_lightning.models.layers import (
    Conv,
    Dropout,
    Layer,
    Pool,
    Reorg,
    Route,
    check_sizes,
    extents,
)

MAX_VALUES = 200_000_000
"""Largest network that is built, in weights: four times YOLO9000."""

MAX_LAYERS, MAX_FILTERS, MAX_PX = 1000, 1_000_000, 65_536

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

_VOC_ANCHORS = [1.3221, 1.73145, 3.19275, 4.00944, 5.05587, 8.09892, 9.47112, 4.84053]
_VOC_ANCHORS += [11.2364, 10.0071]
_COCO_ANCHORS = [0.57273, 0.677385, 1.87446, 2.06253, 3.33843, 5.47434, 7.88282, 3.52778]
_COCO_ANCHORS += [9.77052, 9.16828]
_TINY_VOC_ANCHORS = [1.08, 1.19, 3.42, 4.41, 6.63, 11.38, 9.42, 5.11, 16.62, 10.52]
_YOLO9000_ANCHORS = [0.77871, 1.14074, 3.00525, 4.31277, 9.22725, 9.61974]


@dataclass(frozen=True)
class Region:
    """A `[region]` section: the detector's anchors and what its loss weighs.

    Attributes:
        anchors: widths and heights in grid cells, one after the other.
        rescore: whether objectness learns the IoU, else 1.
        thresh: overlap above which a box pays no no-object loss.
        object_scale, noobject_scale, class_scale, coord_scale: factors of the loss's terms.
    """

    anchors: tuple[float, ...]
    rescore: bool = True
    thresh: float = 0.6
    object_scale: float = 5.0
    noobject_scale: float = 1.0
    class_scale: float = 1.0
    coord_scale: float = 1.0


@dataclass
class Description:
    """A network of the YOLOv2 family.

    Attributes:
        layers: from the image to the features that the last 1x1 convolution reads.
        classes: K, of that convolution, for each anchor or for the image.
        size_hw: px of the network input.
        region: None for a classifier.
        names: of the classes where the layout knows them.
        needs_tree: whether the classes form a tree.
        tree_file: where the `.cfg` looks for it.
        training: learning_rate, momentum and weight_decay, where given.
        options: every option of `[net]` and `[region]` as written, for the way back.
        left_out: what was read and has no place here.
    """

    layers: tuple[Layer, ...]
    classes: int
    size_hw: tuple[int, int]
    region: Region | None = None
    names: Sequence[str] = ()
    needs_tree: bool = False
    tree_file: str = ""
    training: dict[str, float] = field(default_factory=dict)
    options: dict[str, dict[str, str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def outputs(self) -> int:
        """Channels of the last 1x1 convolution."""
        if self.region is None:
            return self.classes
        return len(self.region.anchors) // 2 * (5 + self.classes)


def _yolov2(anchors: list[float], names: Sequence[str], side: int) -> Description:
    layers = detector_layers(DARKNET19, 1024, 64, "darknet")
    return Description(layers, len(names), (side, side), Region(tuple(anchors)), names)


LAYOUTS: dict[str, Callable[[], Description]] = {
    "yolov2-voc": lambda: _yolov2(_VOC_ANCHORS, VOC_NAMES, 416),
    "yolov2": lambda: _yolov2(_COCO_ANCHORS, COCO_NAMES, 608),
    "yolov2-tiny-voc": lambda: Description(
        TINY_YOLOV2_VOC, 20, (416, 416), Region(tuple(_TINY_VOC_ANCHORS)), VOC_NAMES
    ),
    "yolov2-tiny": lambda: Description(
        TINY_YOLOV2, 80, (416, 416), Region(tuple(_COCO_ANCHORS), rescore=False), COCO_NAMES
    ),
    "yolo9000": lambda: Description(
        DARKNET19, 9418, (544, 544), Region(tuple(_YOLO9000_ANCHORS)), needs_tree=True
    ),
    "darknet19": lambda: Description(DARKNET19, 1000, (224, 224)),
    "darknet19_448": lambda: Description(DARKNET19, 1000, (448, 448)),
    "tiny": lambda: Description(TINY_DARKNET, 1000, (224, 224)),
}
"""The released networks. Source: the configurations of the original program."""


def layout(name: str) -> Description:
    """Return a released network.

    Raises:
        InputError: an unknown name.
    """
    if name not in LAYOUTS:
        hint = nearest(name, LAYOUTS) or f"allowed: {', '.join(LAYOUTS)}"
        raise InputError(f"--layout {name!r}; {hint}")
    return LAYOUTS[name]()


_LAYER_OPTIONS: dict[str, dict[str, str]] = {
    # options that change what a layer computes, with the one value that is built
    "convolutional": {
        "groups": "1",
        "dilation": "1",
        "binary": "0",
        "xnor": "0",
        "flipped": "0",
        "dot": "0",
        "antialiasing": "0",
        "share_index": "-1000000000",
    },
    "maxpool": {"maxpool_depth": "0", "antialiasing": "0"},
    "reorg": {"reverse": "0", "flatten": "0", "extra": "0"},
    "route": {"groups": "1", "group_id": "0"},
    "dropout": {},
    "avgpool": {},
    "softmax": {"groups": "1", "temperature": "1", "spatial": "0"},
    "cost": {},
    "region": {"coords": "4", "background": "0", "mask": "0", "bias_match": "1"},
}
_READ = {
    "convolutional": "batch_normalize filters size stride pad padding activation",
    "maxpool": "size stride padding",
    "reorg": "stride",
    "route": "layers",
    "dropout": "probability",
    "softmax": "tree",
    "cost": "type",
    "region": "anchors classes num softmax tree rescore thresh object_scale noobject_scale "
    "class_scale coord_scale",
}
_TRAINING = {"learning_rate": "learning_rate", "momentum": "momentum", "decay": "weight_decay"}


class _Reader:
    """Read options of a section with messages that name file and line."""

    def __init__(self, section: Section, origin: str) -> None:
        self.section, self.origin = section, origin

    def refuse(self, what: str, option: str = "") -> InputError:
        line = self.section.lines.get(option, self.section.line)
        return InputError(f"{self.origin}:{line}: [{self.section.kind}] {what}")

    def whole(self, option: str, default: int, low: int, high: int) -> int:
        """Return a whole number between two bounds."""
        text = self.section.options.get(option, str(default))
        try:
            value = int(text)
        except ValueError:
            raise self.refuse(f"{option}={text}; expected a whole number", option) from None
        if not low <= value <= high:
            raise self.refuse(f"{option}={value}; allowed: {low} … {high}", option)
        return value

    def number(self, option: str, default: float, low: float = 0.0, high: float = 1e9) -> float:
        """Return a number between two bounds."""
        text = self.section.options.get(option, str(default))
        try:
            value = float(text)
        except ValueError:
            raise self.refuse(f"{option}={text}; expected a number", option) from None
        if not low <= value <= high:
            raise self.refuse(f"{option}={text}; allowed: {low:g} … {high:g}", option)
        return value

    def numbers(self, option: str) -> list[float]:
        """Return numbers separated by commas."""
        text = self.section.options.get(option, "")
        try:
            return [float(part) for part in text.replace(" ", "").strip(",").split(",")]
        except ValueError:
            raise self.refuse(
                f"{option}={text}; expected numbers separated by commas", option
            ) from None

    def check_fixed(self) -> list[str]:
        """Refuse what would change the layer; return options that have no meaning here."""
        fixed = _LAYER_OPTIONS[self.section.kind]
        for option, only in fixed.items():
            value = self.section.options.get(option, only)
            if not _equal(value, only):
                raise self.refuse(f"{option}={value} is not supported; allowed: {only}", option)
        known = {*fixed, *_READ.get(self.section.kind, "").split()}
        return [f"[{self.section.kind}] {o}" for o in self.section.options if o not in known]


def describe(sections: Sequence[Section], origin: str) -> Description:
    """Return the network that a `.cfg` file describes; builds nothing.

    Args:
        sections: of the file.
        origin: names it in messages.

    Raises:
        InputError: an unknown or unsupported section or option, values that disagree, or a
            network too large to be meant; names the line.
    """
    net = _Reader(sections[0], origin)
    if sections[0].kind != "net":
        raise net.refuse("comes first; expected [net]")
    size_hw = (net.whole("height", 0, 1, MAX_PX), net.whole("width", 0, 1, MAX_PX))
    net.whole("channels", 3, 3, 3)
    training = {
        ours: net.number(theirs, 0.0)
        for theirs, ours in _TRAINING.items()
        if theirs in sections[0].options
    }
    body, tail, left_out = _split(sections[1:], origin)
    layers = [_layer(_Reader(section, origin)) for section in body]
    _check_size(layers, body, origin)
    last = layers.pop()
    if not layers:
        raise InputError(f"{origin}: holds one layer; expected some before the last convolution")
    _check_last(last, _Reader(body[-1], origin))
    assert isinstance(last, Conv)
    try:
        check_sizes(layers, size_hw)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    end = _Reader(tail[0] if tail else body[-1], origin)
    options = {"net": dict(sections[0].options)}
    if not tail or tail[0].kind != "region":
        if [section.kind for section in tail if section.kind != "cost"] != ["avgpool", "softmax"]:
            raise end.refuse("ends the file; expected [region], or [avgpool] and [softmax]")
        softmax = next(section for section in tail if section.kind == "softmax")
        tree_file = softmax.options.get("tree", "")
        return Description(
            tuple(layers), last.filters, size_hw, None, (), bool(tree_file), tree_file,
            training, options, left_out,
        )  # fmt: skip
    if len(tail) > 1:
        raise _Reader(tail[1], origin).refuse("follows [region]; expected the end of the file")
    region, classes = _region(end)
    stride = extents(layers)[-1].stride if layers else 1
    if size_hw[0] % stride or size_hw[1] % stride:
        raise net.refuse(
            f"width={size_hw[1]}, height={size_hw[0]}; allowed: multiples of {stride}", "width"
        )
    found = Description(
        tuple(layers), classes, size_hw, region, (), "tree" in tail[0].options,
        tail[0].options.get("tree", ""), training,
        {**options, "region": dict(tail[0].options)}, left_out,
    )  # fmt: skip
    if last.filters != found.outputs:
        raise _Reader(body[-1], origin).refuse(
            f"filters={last.filters} before [region]; expected {found.outputs}: "
            f"num={len(region.anchors) // 2} x (classes={classes} + 5)",
            "filters",
        )
    return found


def _split(
    sections: Sequence[Section], origin: str
) -> tuple[list[Section], list[Section], list[str]]:
    """Part the layers from what ends the network."""
    ends = ("avgpool", "softmax", "cost", "region")
    left_out: list[str] = []
    body: list[Section] = []
    tail: list[Section] = []
    for section in sections:
        reader = _Reader(section, origin)
        if section.kind not in _LAYER_OPTIONS:
            hint = nearest(section.kind, _LAYER_OPTIONS) or f"allowed: {', '.join(_LAYER_OPTIONS)}"
            raise reader.refuse(f"is not supported; {hint}")
        left_out += reader.check_fixed()
        if section.kind in ends:
            tail.append(section)
        elif tail:
            raise reader.refuse(f"follows [{tail[-1].kind}]; expected the end of the network")
        else:
            body.append(section)
    if not 0 < len(body) <= MAX_LAYERS:
        raise InputError(f"{origin}: holds {len(body)} layers; allowed: 1 … {MAX_LAYERS}")
    return body, tail, list(dict.fromkeys(left_out))


def _layer(reader: _Reader) -> Layer:
    """Return the layer that a section describes; defaults are Darknet's."""
    match reader.section.kind:
        case "convolutional":
            size = reader.whole("size", 1, 1, 1001)
            padding = reader.whole("padding", 0, 0, 1000)
            if reader.whole("pad", 0, 0, 1):
                padding = size // 2
            return Conv(
                reader.whole("filters", 1, 1, MAX_FILTERS),
                size,
                reader.whole("stride", 1, 1, 1000),
                None if padding == size // 2 else padding,
                bool(reader.whole("batch_normalize", 0, 0, 1)),
                reader.section.options.get("activation", "logistic"),  # type: ignore[arg-type]
            )
        case "maxpool":
            stride = reader.whole("stride", 1, 1, 1000)
            size = reader.whole("size", stride, 1, 1000)
            reader.whole("padding", size - 1, size - 1, size - 1)
            return Pool(size, stride)
        case "reorg":
            return Reorg(reader.whole("stride", 1, 1, 1000), "darknet")
        case "route":
            numbers = reader.numbers("layers")
            if not all(number.is_integer() for number in numbers):
                raise reader.refuse("layers; expected whole numbers", "layers")
            return Route(tuple(int(number) for number in numbers))
        case _:
            return Dropout(reader.number("probability", 0.5, 0.0, 0.999999))


def _check_size(layers: Sequence[Layer], sections: Sequence[Section], origin: str) -> None:
    """Refuse layers that do not fit together, and networks that no memory holds."""
    found = extents([])
    values = 0
    for number, (layer, section) in enumerate(zip(layers, sections, strict=True)):
        reader = _Reader(section, origin)
        before = found[-1].channels if found else 3
        try:
            found = extents(layers[: number + 1])
        except InputError as error:
            raise reader.refuse(str(error)) from None
        if found[-1].channels > MAX_FILTERS:
            raise reader.refuse(
                f"gives {found[-1].channels} channels; allowed: up to {MAX_FILTERS}"
            )
        if isinstance(layer, Conv):
            values += layer.filters * (before * layer.size**2 + 4)
        if values > MAX_VALUES:
            raise reader.refuse(
                f"brings the network to {values:,} weights; allowed: up to {MAX_VALUES:,}"
            )


def _check_last(last: Layer, reader: _Reader) -> None:
    """Refuse any last layer but the 1x1 convolution that the head is."""
    if not isinstance(last, Conv):
        raise reader.refuse("is the last layer; expected [convolutional]")
    if (last.size, last.stride, last.batch_norm, last.activation) != (1, 1, False, "linear"):
        raise reader.refuse(
            "is the last layer; expected size=1, stride=1, activation=linear and no batch_normalize"
        )


def _region(reader: _Reader) -> tuple[Region, int]:
    """Return the region and its number of classes."""
    options = reader.section.options
    classes = reader.whole("classes", 20, 1, MAX_FILTERS)
    num = reader.whole("num", 1, 1, 1000)
    anchors = reader.numbers("anchors") if "anchors" in options else []
    if len(anchors) != 2 * num:
        raise reader.refuse(
            f"anchors holds {len(anchors)} numbers; expected {2 * num}, two for each of num={num}",
            "anchors",
        )
    if not all(0 < value < 1e6 for value in anchors):
        raise reader.refuse("anchors; expected positive numbers", "anchors")
    if not reader.whole("softmax", 0, 0, 1) and "tree" not in options:
        raise reader.refuse("softmax=0 is not supported; allowed: 1, or a tree", "softmax")
    region = Region(
        tuple(anchors),
        bool(reader.whole("rescore", 0, 0, 1)),
        reader.number("thresh", 0.5, 0.0, 1.0),
        reader.number("object_scale", 1.0),
        reader.number("noobject_scale", 1.0),
        reader.number("class_scale", 1.0),
        reader.number("coord_scale", 1.0),
    )
    return region, classes


def to_sections(description: Description) -> list[Section]:
    """Return the sections of a `.cfg` file that describes a network.

    Raises:
        InputError: a layer that Darknet does not have.
    """
    net = {"batch": "1", "subdivisions": "1", **description.options.get("net", {})}
    height, width = description.size_hw
    net |= {"width": str(width), "height": str(height), "channels": "3"}
    for theirs, ours in _TRAINING.items():
        if ours in description.training:
            net[theirs] = _plain_number(description.training[ours])
    sections = [Section("net", options=net)]
    sections += [_section(number, layer) for number, layer in enumerate(description.layers)]
    last = Conv(description.outputs, 1, batch_norm=False, activation="linear")
    sections.append(_section(len(description.layers), last))
    if description.region is None:
        softmax = {"groups": "1"}
        if description.tree_file:
            softmax["tree"] = description.tree_file
        return [*sections, Section("avgpool"), Section("softmax", options=softmax)]
    region = {"bias_match": "1", "coords": "4", "softmax": "1"}
    region |= description.options.get("region", {})
    region.pop("tree", None)
    region.pop("map", None)  # of another tree's nodes
    values = description.region
    region |= {
        "anchors": ", ".join(_plain_number(value) for value in values.anchors),
        "num": str(len(values.anchors) // 2),
        "classes": str(description.classes),
        "rescore": str(int(values.rescore)),
        **{
            name: _plain_number(getattr(values, name))
            for name in ("thresh", "object_scale", "noobject_scale", "class_scale", "coord_scale")
        },
    }
    if description.tree_file:
        region["tree"] = description.tree_file
    return [*sections, Section("region", options=region)]


def _plain_number(value: float) -> str:
    """Return the shortest text that reads back as the same number."""
    return str(int(value)) if value == int(value) else repr(float(value))


def _section(number: int, layer: Layer) -> Section:
    options: dict[str, Any]
    match layer:
        case Conv():
            half = layer.padding is None or layer.padding == layer.size // 2
            options = {"batch_normalize": 1} if layer.batch_norm else {}
            options |= {"filters": layer.filters, "size": layer.size, "stride": layer.stride}
            options |= {"pad": 1} if half else {"padding": layer.padding}
            options["activation"] = layer.activation
            kind = "convolutional"
        case Pool():
            kind, options = "maxpool", {"size": layer.size, "stride": layer.stride}
        case Reorg():
            if layer.kind != "darknet":
                raise InputError(
                    f"layer {number} is a reorg of kind {layer.kind}, which Darknet does not "
                    "have; it has model.reorg: darknet"
                )
            kind, options = "reorg", {"stride": layer.stride}
        case Route():
            kind, options = "route", {"layers": ",".join(map(str, layer.layers))}
        case Dropout():
            kind, options = "dropout", {"probability": _plain_number(layer.probability)}
    return Section(kind, options={name: str(value) for name, value in options.items()})


def _equal(first: str, second: str) -> bool:
    """Compare two options as numbers where they are such."""
    try:
        return float(first) == float(second)
    except ValueError:
        return first == second


def find_beside(path: str, cfg: str | Path) -> Path | None:
    """Return a file that a `.cfg` names: in the working folder, or beside it."""
    folder = Path(cfg).parent
    places = (Path(path), folder / path, folder.parent / path, folder / Path(path).name)
    return next((place for place in places if place.is_file()), None)
