"""Network descriptions, and their conversion from Darknet's `.cfg` files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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

    @property
    def outputs(self) -> int:
        """Channels of the last 1x1 convolution."""
        if self.region is None:
            return self.classes
        return len(self.region.anchors) // 2 * (5 + self.classes)


_LAYER_OPTIONS: dict[str, dict[str, str]] = {
    # options that change the result of a layer, with the only supported value
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
_READ_OPTIONS = {
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
TRAINING_OPTIONS = {
    "learning_rate": "learning_rate",
    "momentum": "momentum",
    "decay": "weight_decay",
}


class _SectionReader:
    """Read options of a section; error messages name file and line."""

    def __init__(self, section: Section, origin: str) -> None:
        self.section, self.origin = section, origin

    def error(self, message: str, option: str = "") -> InputError:
        line = self.section.lines.get(option, self.section.line)
        return InputError(f"{self.origin}:{line}: [{self.section.kind}] {message}")

    def integer(self, option: str, default: int, low: int, high: int) -> int:
        """Return an integer between two bounds."""
        text = self.section.options.get(option, str(default))
        try:
            value = int(text)
        except ValueError:
            raise self.error(f"{option}={text}; expected an integer", option) from None
        if not low <= value <= high:
            raise self.error(f"{option}={value}; allowed: {low} … {high}", option)
        return value

    def number(self, option: str, default: float, low: float = 0.0, high: float = 1e9) -> float:
        """Return a number between two bounds."""
        text = self.section.options.get(option, str(default))
        try:
            value = float(text)
        except ValueError:
            raise self.error(f"{option}={text}; expected a number", option) from None
        if not low <= value <= high:
            raise self.error(f"{option}={text}; allowed: {low:g} … {high:g}", option)
        return value

    def numbers(self, option: str) -> list[float]:
        """Return numbers separated by commas."""
        text = self.section.options.get(option, "")
        try:
            return [float(part) for part in text.replace(" ", "").strip(",").split(",")]
        except ValueError:
            raise self.error(
                f"{option}={text}; expected numbers separated by commas", option
            ) from None

    def check_fixed(self) -> list[str]:
        """Raise on unsupported options; return the options without an effect."""
        fixed = _LAYER_OPTIONS[self.section.kind]
        for option, supported in fixed.items():
            value = self.section.options.get(option, supported)
            if not _equal(value, supported):
                raise self.error(f"{option}={value} is not supported; allowed: {supported}", option)
        known = {*fixed, *_READ_OPTIONS.get(self.section.kind, "").split()}
        return [f"[{self.section.kind}] {o}" for o in self.section.options if o not in known]


def parse_network(sections: Sequence[Section], origin: str) -> NetworkDescription:
    """Convert the sections of a `.cfg` file to a network description.

    Raises:
        InputError: an unsupported section or option, inconsistent values, or too large a network;
            names the line.
    """
    net = _SectionReader(sections[0], origin)
    if sections[0].kind != "net":
        raise net.error("is the first section; expected [net]")
    size_hw = (net.integer("height", 0, 1, MAX_PX), net.integer("width", 0, 1, MAX_PX))
    net.integer("channels", 3, 3, 3)
    training = {
        name: net.number(option, 0.0)
        for option, name in TRAINING_OPTIONS.items()
        if option in sections[0].options
    }
    body, tail, ignored = _split_sections(sections[1:], origin)
    layers = [_read_layer(_SectionReader(section, origin)) for section in body]
    _check_layers(layers, body, origin)
    last = layers.pop()
    if not layers:
        raise InputError(f"{origin}: contains one layer; expected more before the last convolution")
    _check_last(last, _SectionReader(body[-1], origin))
    assert isinstance(last, Conv)
    try:
        check_sizes(layers, size_hw)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    end = _SectionReader(tail[0] if tail else body[-1], origin)
    options = {"net": dict(sections[0].options)}
    if not tail or tail[0].kind != "region":
        if [section.kind for section in tail if section.kind != "cost"] != ["avgpool", "softmax"]:
            raise end.error("ends the file; expected [region], or [avgpool] and [softmax]")
        softmax = next(section for section in tail if section.kind == "softmax")
        tree_file = softmax.options.get("tree", "")
        return NetworkDescription(
            tuple(layers), last.filters, size_hw, None, (), bool(tree_file), tree_file,
            training, options, ignored,
        )  # fmt: skip
    if len(tail) > 1:
        raise _SectionReader(tail[1], origin).error(
            "follows [region]; expected the end of the file"
        )
    region, classes = _region(end)
    stride = layer_outputs(layers)[-1].stride if layers else 1
    if size_hw[0] % stride or size_hw[1] % stride:
        raise net.error(
            f"width={size_hw[1]}, height={size_hw[0]}; allowed: multiples of {stride}", "width"
        )
    description = NetworkDescription(
        tuple(layers), classes, size_hw, region, (), "tree" in tail[0].options,
        tail[0].options.get("tree", ""), training,
        {**options, "region": dict(tail[0].options)}, ignored,
    )  # fmt: skip
    if last.filters != description.outputs:
        raise _SectionReader(body[-1], origin).error(
            f"filters={last.filters} before [region]; expected {description.outputs}: "
            f"num={len(region.anchors) // 2} x (classes={classes} + 5)",
            "filters",
        )
    return description


def _split_sections(
    sections: Sequence[Section], origin: str
) -> tuple[list[Section], list[Section], list[str]]:
    """Return the sections of the layers, the final sections, and ignored options."""
    ends = ("avgpool", "softmax", "cost", "region")
    ignored: list[str] = []
    body: list[Section] = []
    tail: list[Section] = []
    for section in sections:
        reader = _SectionReader(section, origin)
        if section.kind not in _LAYER_OPTIONS:
            hint = nearest(section.kind, _LAYER_OPTIONS) or f"allowed: {', '.join(_LAYER_OPTIONS)}"
            raise reader.error(f"is not supported; {hint}")
        ignored += reader.check_fixed()
        if section.kind in ends:
            tail.append(section)
        elif tail:
            raise reader.error(f"follows [{tail[-1].kind}]; expected the end of the network")
        else:
            body.append(section)
    if not 0 < len(body) <= MAX_LAYERS:
        raise InputError(f"{origin}: contains {len(body)} layers; allowed: 1 … {MAX_LAYERS}")
    return body, tail, list(dict.fromkeys(ignored))


def _read_layer(reader: _SectionReader) -> Layer:
    """Convert a section to a layer, with the default values of Darknet."""
    match reader.section.kind:
        case "convolutional":
            size = reader.integer("size", 1, 1, 1001)
            padding = reader.integer("padding", 0, 0, 1000)
            if reader.integer("pad", 0, 0, 1):
                padding = size // 2
            return Conv(
                reader.integer("filters", 1, 1, MAX_FILTERS),
                size,
                reader.integer("stride", 1, 1, 1000),
                None if padding == size // 2 else padding,
                bool(reader.integer("batch_normalize", 0, 0, 1)),
                reader.section.options.get("activation", "logistic"),  # type: ignore[arg-type]
            )
        case "maxpool":
            stride = reader.integer("stride", 1, 1, 1000)
            size = reader.integer("size", stride, 1, 1000)
            reader.integer("padding", size - 1, size - 1, size - 1)
            return Pool(size, stride)
        case "reorg":
            return Reorg(reader.integer("stride", 1, 1, 1000), "darknet")
        case "route":
            numbers = reader.numbers("layers")
            if not all(number.is_integer() for number in numbers):
                raise reader.error("layers; expected integers", "layers")
            return Route(tuple(int(number) for number in numbers))
        case _:
            return Dropout(reader.number("probability", 0.5, 0.0, 0.999999))


def _check_layers(layers: Sequence[Layer], sections: Sequence[Section], origin: str) -> None:
    """Raise InputError if layers do not match, or the network is too large."""
    outputs = layer_outputs([])
    values = 0
    for number, (layer, section) in enumerate(zip(layers, sections, strict=True)):
        reader = _SectionReader(section, origin)
        in_channels = outputs[-1].channels if outputs else 3
        try:
            outputs = layer_outputs(layers[: number + 1])
        except InputError as error:
            raise reader.error(str(error)) from None
        if outputs[-1].channels > MAX_FILTERS:
            raise reader.error(
                f"has {outputs[-1].channels} output channels; allowed: up to {MAX_FILTERS}"
            )
        if isinstance(layer, Conv):
            values += layer.filters * (in_channels * layer.size**2 + 4)
        if values > MAX_VALUES:
            raise reader.error(
                f"increases the network to {values:,} weights; allowed: up to {MAX_VALUES:,}"
            )


def _check_last(last: Layer, reader: _SectionReader) -> None:
    """Raise InputError if the last layer is not a linear 1x1 convolution."""
    if not isinstance(last, Conv):
        raise reader.error("is the last layer; expected [convolutional]")
    if (last.size, last.stride, last.batch_norm, last.activation) != (1, 1, False, "linear"):
        raise reader.error(
            "is the last layer; expected size=1, stride=1, activation=linear and no batch_normalize"
        )


def _region(reader: _SectionReader) -> tuple[Region, int]:
    """Return the region and the number of classes."""
    options = reader.section.options
    classes = reader.integer("classes", 20, 1, MAX_FILTERS)
    num = reader.integer("num", 1, 1, 1000)
    anchors = reader.numbers("anchors") if "anchors" in options else []
    if len(anchors) != 2 * num:
        raise reader.error(
            f"anchors has {len(anchors)} numbers; expected {2 * num}, two for each of num={num}",
            "anchors",
        )
    if not all(0 < value < 1e6 for value in anchors):
        raise reader.error("anchors; expected positive numbers", "anchors")
    if not reader.integer("softmax", 0, 0, 1) and "tree" not in options:
        raise reader.error("softmax=0 is not supported; allowed: 1, or a tree", "softmax")
    region = Region(
        tuple(anchors),
        bool(reader.integer("rescore", 0, 0, 1)),
        reader.number("thresh", 0.5, 0.0, 1.0),
        reader.number("object_scale", 1.0),
        reader.number("noobject_scale", 1.0),
        reader.number("class_scale", 1.0),
        reader.number("coord_scale", 1.0),
    )
    return region, classes


def _equal(first: str, second: str) -> bool:
    """Compare two options, as numbers if possible."""
    try:
        return float(first) == float(second)
    except ValueError:
        return first == second


def find_referenced_file(path: str, cfg: str | Path) -> Path | None:
    """Find a file that a `.cfg` names, in the working folder or next to the `.cfg`."""
    folder = Path(cfg).parent
    candidates = (Path(path), folder / path, folder.parent / path, folder / Path(path).name)
    return next((file for file in candidates if file.is_file()), None)
