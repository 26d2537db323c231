"""Network descriptions, and their conversion from Darknet's `.cfg` files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from yolo_lightning.darknet.files import Section
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.models.layers import (
    Conv,
    Dropout,
    Layer,
    Pool,
    Reorg,
    Route,
    check_sizes,
    layer_outputs,
)
from yolo_lightning.models.preparation import Interpolation

MAX_VALUES = 200_000_000
"""Maximum number of weights: four times those of YOLO9000."""

MAX_LAYERS, MAX_FILTERS, MAX_PX = 1000, 1_000_000, 65_536


@dataclass(frozen=True)
class Region:
    """A `[region]` section: anchors and loss settings of a detector, see `LossSettings`."""

    anchors: tuple[float, ...]  # alternating widths and heights in grid cells
    rescore: bool = True
    thresh: float = 0.6
    object_scale: float = 5.0
    noobject_scale: float = 1.0
    class_scale: float = 1.0
    coord_scale: float = 1.0


@dataclass
class NetworkDescription:
    """A network of the YOLOv2 family."""

    layers: tuple[Layer, ...]  # without the last 1x1 convolution
    classes: int
    size_hw: tuple[int, int]  # network input, px
    region: Region | None = None  # None for a classifier
    names: Sequence[str] = ()
    needs_tree: bool = False  # whether the classes form a tree
    tree_file: str = ""  # path of the tree in the .cfg file
    training: dict[str, float] = field(default_factory=dict)  # learning_rate and others, if set
    options: dict[str, dict[str, str]] = field(default_factory=dict)  # of [net] and [region]
    ignored: list[str] = field(default_factory=list)  # options without an effect here
    interpolation: Interpolation = "darknet"  # of images; our own option of [net]

    @property
    def outputs(self) -> int:
        """Channels of the last 1x1 convolution."""
        if self.region is None:
            return self.classes
        return len(self.region.anchors) // 2 * (5 + self.classes)


# for each section: the options that are read, and those that change the result of a layer in ways
# that are not supported, with the only supported value
_OPTIONS: dict[str, tuple[str, dict[str, int]]] = {
    "convolutional": (
        "batch_normalize filters size stride pad padding activation",
        {
            "groups": 1,
            "dilation": 1,
            "binary": 0,
            "xnor": 0,
            "flipped": 0,
            "dot": 0,
            "antialiasing": 0,
            "share_index": -1000000000,
        },
    ),
    "maxpool": ("size stride padding", {"maxpool_depth": 0, "antialiasing": 0}),
    "reorg": ("stride", {"reverse": 0, "flatten": 0, "extra": 0}),
    "route": ("layers", {"groups": 1, "group_id": 0}),
    "dropout": ("probability", {}),
    "avgpool": ("", {}),
    "softmax": ("tree", {"groups": 1, "temperature": 1, "spatial": 0}),
    "cost": ("type", {}),
    "region": (
        "anchors classes num softmax tree rescore thresh object_scale noobject_scale class_scale "
        "coord_scale",
        {"coords": 4, "background": 0, "mask": 0, "bias_match": 1},
    ),
}
TRAINING_OPTIONS = {
    "learning_rate": "learning_rate",
    "momentum": "momentum",
    "decay": "weight_decay",
}
SCALES = ("object_scale", "noobject_scale", "class_scale", "coord_scale")


def parse_network(sections: Sequence[Section]) -> NetworkDescription:
    """Convert the sections of a `.cfg` file to a network description.

    Raises:
        InputError: an unsupported section or option, inconsistent values, or too large a network;
            names the line.
    """
    net, origin = sections[0], sections[0].origin
    if net.kind != "net":
        raise net.error("is the first section; expected [net]")
    size_hw = (net.integer("height", 0, 1, MAX_PX), net.integer("width", 0, 1, MAX_PX))
    net.integer("channels", 3, 3, 3)
    body, tail, ignored = _split_sections(sections[1:], origin)
    *layers, last = _read_layers(body)
    if not layers:
        raise InputError(f"{origin}: contains one layer; expected more before the last convolution")
    if not isinstance(last, Conv):
        raise body[-1].error("is the last layer; expected [convolutional]")
    if (last.size, last.stride, last.batch_norm, last.activation) != (1, 1, False, "linear"):
        raise body[-1].error(
            "is the last layer; expected size=1, stride=1, activation=linear and no batch_normalize"
        )
    try:
        check_sizes(layers, size_hw)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    end = _last_section(tail or body[-1:])
    options = {"net": dict(net.options)}
    interpolation: Any = net.options.get("interpolation", "darknet")
    if interpolation not in get_args(Interpolation):
        allowed = ", ".join(get_args(Interpolation))
        raise net.error(f"interpolation={interpolation}; allowed: {allowed}", "interpolation")
    region, classes = None, last.filters
    if end.kind == "region":
        region, classes = _read_region(end)
        options["region"] = dict(end.options)
        stride = layer_outputs(layers)[-1].stride
        if size_hw[0] % stride or size_hw[1] % stride:
            raise net.error(
                f"width={size_hw[1]}, height={size_hw[0]}; allowed: multiples of {stride}", "width"
            )
    description = NetworkDescription(
        tuple(layers),
        classes,
        size_hw,
        region,
        needs_tree="tree" in end.options,
        tree_file=end.options.get("tree", ""),
        training={
            name: net.number(option, 0.0)
            for option, name in TRAINING_OPTIONS.items()
            if option in net.options
        },
        options=options,
        ignored=ignored,
        interpolation=interpolation,
    )
    if region is not None and last.filters != description.outputs:
        raise body[-1].error(
            f"filters={last.filters} before [region]; expected {description.outputs}: "
            f"num={len(region.anchors) // 2} x (classes={classes} + 5)",
            "filters",
        )
    return description


def _split_sections(
    sections: Sequence[Section], origin: str
) -> tuple[list[Section], list[Section], list[str]]:
    """Return the sections of the layers, the final sections, and ignored options."""
    ignored: list[str] = []
    body: list[Section] = []
    tail: list[Section] = []
    for section in sections:
        if section.kind not in _OPTIONS:
            hint = nearest(section.kind, _OPTIONS) or f"allowed: {', '.join(_OPTIONS)}"
            raise section.error(f"is not supported; {hint}")
        read, fixed = _OPTIONS[section.kind]
        for option, supported in fixed.items():
            if section.number(option, supported, -1e9) != supported:
                value = section.options[option]
                raise section.error(
                    f"{option}={value} is not supported; allowed: {supported}", option
                )
        known = {*fixed, *read.split()}
        ignored += [f"[{section.kind}] {name}" for name in section.options if name not in known]
        if section.kind in ("avgpool", "softmax", "cost", "region"):
            tail.append(section)
        elif tail:
            raise section.error(f"follows [{tail[-1].kind}]; expected the end of the network")
        else:
            body.append(section)
    if not 0 < len(body) <= MAX_LAYERS:
        raise InputError(f"{origin}: contains {len(body)} layers; allowed: 1 … {MAX_LAYERS}")
    return body, tail, list(dict.fromkeys(ignored))


def _last_section(tail: Sequence[Section]) -> Section:
    """Return the region or softmax section that ends a network."""
    if tail[0].kind == "region":
        if len(tail) > 1:
            raise tail[1].error("follows [region]; expected the end of the file")
        return tail[0]
    ends = [section for section in tail if section.kind != "cost"]
    if [section.kind for section in ends] != ["avgpool", "softmax"]:
        raise tail[0].error("ends the file; expected [region], or [avgpool] and [softmax]")
    return ends[1]


def _read_layers(sections: Sequence[Section]) -> list[Layer]:
    """Convert sections to layers that match and are not too large."""
    layers: list[Layer] = []
    in_channels, values = 3, 0
    for section in sections:
        layer = _read_layer(section)
        layers.append(layer)
        try:
            output = layer_outputs(layers)[-1]
        except InputError as error:
            raise section.error(str(error)) from None
        if isinstance(layer, Conv):
            values += layer.filters * (in_channels * layer.size**2 + 4)
        if values > MAX_VALUES:
            raise section.error(
                f"increases the network to {values:,} weights; allowed: up to {MAX_VALUES:,}"
            )
        in_channels = output.channels
    return layers


def _read_layer(section: Section) -> Layer:
    """Convert a section to a layer, with the default values of Darknet."""
    match section.kind:
        case "convolutional":
            size = section.integer("size", 1, 1, 1001)
            padding = section.integer("padding", 0, 0, 1000)
            if section.integer("pad", 0, 0, 1):
                padding = size // 2
            return Conv(
                section.integer("filters", 1, 1, MAX_FILTERS),
                size,
                section.integer("stride", 1, 1, 1000),
                None if padding == size // 2 else padding,
                bool(section.integer("batch_normalize", 0, 0, 1)),
                section.options.get("activation", "logistic"),  # type: ignore[arg-type]
            )
        case "maxpool":
            stride = section.integer("stride", 1, 1, 1000)
            size = section.integer("size", stride, 1, 1000)
            section.integer("padding", size - 1, size - 1, size - 1)
            return Pool(size, stride)
        case "reorg":
            return Reorg(section.integer("stride", 1, 1, 1000), "darknet")
        case "route":
            numbers = section.numbers("layers")
            if not all(number.is_integer() for number in numbers):
                raise section.error("layers; expected integers", "layers")
            return Route(tuple(int(number) for number in numbers))
        case _:
            return Dropout(section.number("probability", 0.5, 0.0, 0.999999))


def _read_region(section: Section) -> tuple[Region, int]:
    """Return the region and the number of classes."""
    classes = section.integer("classes", 20, 1, MAX_FILTERS)
    num = section.integer("num", 1, 1, 1000)
    anchors = section.numbers("anchors") if "anchors" in section.options else []
    if len(anchors) != 2 * num:
        raise section.error(
            f"anchors has {len(anchors)} numbers; expected {2 * num}, two for each of num={num}",
            "anchors",
        )
    if not all(0 < value < 1e6 for value in anchors):
        raise section.error("anchors; expected positive numbers", "anchors")
    if not section.integer("softmax", 0, 0, 1) and "tree" not in section.options:
        raise section.error("softmax=0 is not supported; allowed: 1, or a tree", "softmax")
    region = Region(
        tuple(anchors),
        bool(section.integer("rescore", 0, 0, 1)),
        section.number("thresh", 0.5, 0.0, 1.0),
        **{name: section.number(name, 1.0) for name in SCALES},
    )
    return region, classes
