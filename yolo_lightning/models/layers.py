"""Networks as lists of layers: layer types, their output sizes, and conversion to plain values."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from yolo_lightning.errors import InputError

if TYPE_CHECKING:
    from torch import nn

Activation = Literal["leaky", "linear", "relu", "logistic", "tanh", "elu"]
ReorgKind = Literal["darknet", "space_to_depth"]
MAX_FILTERS = 65_536  # of a layer
LayerRow = list[str | int | float | bool | list[int] | None]  # such as ["conv", 32, 3]


@dataclass(frozen=True)
class Conv:
    """A convolution with a square kernel; without batch norm, it has a bias."""

    filters: int
    size: int = 3
    stride: int = 1
    padding: int | None = None  # px of zeros per side; None: half of the kernel, keeps the size
    batch_norm: bool = True
    activation: Activation = "leaky"  # slope 0.1


@dataclass(frozen=True)
class Pool:
    """Max pooling; windows may extend beyond the right and lower edges, as in Darknet."""

    size: int = 2
    stride: int = 2


@dataclass(frozen=True)
class Reorg:
    """Fold blocks of stride x stride cells into channels.

    `space_to_depth` stacks neighbouring cells, as in the paper; `darknet` first reinterprets the
    map as one with fewer channels and more cells, as the original program does.
    """

    stride: int = 2
    kind: ReorgKind = "space_to_depth"


@dataclass(frozen=True)
class Route:
    """Concatenated outputs of earlier layers; negative indices are relative to this layer."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Dropout:
    """Set values to zero with this probability during training."""

    probability: float = 0.5


@dataclass(frozen=True)
class CustomBackbone:
    """A module as the first layer: (B, 3, H, W) to (B, out_channels, H / stride, W / stride)."""

    class_path: str  # import path of the class
    out_channels: int
    stride: int
    module: "nn.Module | None" = None  # None if a checkpoint describes it


Layer = Conv | Pool | Reorg | Route | Dropout | CustomBackbone

_TYPES: dict[str, Callable[..., Layer]] = {
    "conv": Conv,
    "pool": Pool,
    "reorg": Reorg,
    "route": Route,
    "dropout": Dropout,
}
_NAMES: dict[Any, str] = {layer_type: name for name, layer_type in _TYPES.items()}
_NAMES[CustomBackbone] = "module"  # not in _TYPES: rows cannot name classes


def layers_to_rows(layers: Iterable[Layer]) -> list[list[Any]]:
    """Convert layers to plain values for checkpoints and recipes, such as ``["conv", 32, 3]``."""
    rows: list[list[Any]] = []
    for layer in layers:
        if isinstance(layer, CustomBackbone):
            rows.append([_NAMES[CustomBackbone], layer.class_path])
            continue
        values, defaults = list(astuple(layer)), [field.default for field in fields(layer)]
        while values and values[-1] == defaults[len(values) - 1]:
            values.pop()
        rows.append(
            [_NAMES[type(layer)], *(list(v) if isinstance(v, tuple) else v for v in values)]
        )
    return rows


def layers_from_rows(rows: Sequence[Sequence[Any]]) -> tuple[Layer, ...]:
    """Convert plain values to layers; raise `InputError`, naming the row, if they are invalid."""
    layers: list[Layer] = []
    for number, row in enumerate(rows):
        layer_type = _TYPES.get(row[0]) if row and isinstance(row[0], str) else None
        if layer_type is None:
            raise InputError(f"layer {number} is {list(row)}; allowed types: {', '.join(_TYPES)}")
        try:
            values = [tuple(v) if isinstance(v, list) else v for v in row[1:]]
            if layer_type is Route and not isinstance(row[-1], list | tuple):
                values = [tuple(values)]  # [route, -1, -4] means [route, [-1, -4]]
            layer = layer_type(*values)
        except TypeError as error:
            raise InputError(f"layer {number} is {list(row)}: {error}") from None
        layers.append(layer)
    if not layers:
        raise InputError("the list of layers is empty; expected rows such as [conv, 32, 3]")
    return tuple(layers)


@dataclass(frozen=True)
class LayerOutput:
    """Output channels of a layer, and px of network input per output cell."""

    channels: int
    stride: int


def layer_outputs(layers: Sequence[Layer], in_channels: int = 3) -> list[LayerOutput]:
    """Return each layer's output channels and stride, without building modules.

    Raises:
        InputError: an invalid value, or a route to missing or mismatched layers; names the layer.
    """
    outputs: list[LayerOutput] = []
    for number, layer in enumerate(layers):
        previous = outputs[-1] if outputs else LayerOutput(in_channels, 1)
        _check_layer(number, layer, previous, outputs)
        match layer:
            case Conv():
                outputs.append(LayerOutput(layer.filters, previous.stride * layer.stride))
            case Pool():
                outputs.append(LayerOutput(previous.channels, previous.stride * layer.stride))
            case Reorg():
                channels = previous.channels * layer.stride**2
                outputs.append(LayerOutput(channels, previous.stride * layer.stride))
            case Route():
                sources = [outputs[k] for k in route_sources(number, layer)]
                outputs.append(LayerOutput(sum(s.channels for s in sources), sources[0].stride))
            case Dropout():
                outputs.append(previous)
            case CustomBackbone():
                outputs.append(LayerOutput(layer.out_channels, layer.stride))
    return outputs


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _check_layer(
    number: int, layer: Layer, previous: LayerOutput, outputs: Sequence[LayerOutput]
) -> None:

    def fail(message: str) -> None:
        raise InputError(f"layer {number} ({_NAMES[type(layer)]}): {message}")

    if isinstance(layer, Conv | Pool | Reorg):
        for name in ("filters", "size", "stride"):
            value = getattr(layer, name, 1)
            if not _is_int(value, 1) or value > MAX_FILTERS:
                fail(f"{name} is {value}; allowed: 1 … {MAX_FILTERS:,}")
    match layer:
        case Conv():
            if layer.padding is not None and not _is_int(layer.padding, 0):
                fail(f"padding is {layer.padding}; allowed: 0 or more")
            if layer.batch_norm not in (True, False):
                fail(f"batch_norm is {layer.batch_norm!r}; allowed: true, false")
            if layer.activation not in get_args(Activation):
                allowed = ", ".join(get_args(Activation))
                fail(f"activation is {layer.activation!r}; allowed: {allowed}")
        case Reorg():
            if layer.kind not in get_args(ReorgKind):
                fail(f"kind is {layer.kind!r}; allowed: {', '.join(get_args(ReorgKind))}")
            if layer.kind == "darknet" and previous.channels % layer.stride**2:
                fail(
                    f"{previous.channels} input channels; allowed: multiples of "
                    f"{layer.stride**2}, the square of its stride"
                )
        case Route():
            if not layer.layers or not all(isinstance(k, int) for k in layer.layers):
                fail(f"layers is {layer.layers}; expected layer indices")
            for index, source in zip(layer.layers, route_sources(number, layer), strict=True):
                if not 0 <= source < number:
                    fail(f"index {index}; allowed: 0 … {number - 1}, or {-number} … -1")
            strides = {outputs[k].stride for k in route_sources(number, layer)}
            if len(strides) > 1:
                fail(f"concatenates layers of different strides, {sorted(strides)} px")
        case Dropout():
            if not (isinstance(layer.probability, int | float) and 0 <= layer.probability < 1):
                fail(f"probability is {layer.probability}; allowed: at least 0 and less than 1")
        case _:
            pass


def check_sizes(layers: Sequence[Layer], size_hw: tuple[int, int]) -> None:
    """Check that the feature maps match at a network input of size_hw px.

    Raises:
        InputError: an empty feature map, one that a reorg cannot divide, a route over different
            sizes, or a custom backbone; names the layer.
    """
    sizes: list[tuple[int, int]] = []
    for number, layer in enumerate(layers):
        height, width = sizes[-1] if sizes else size_hw
        where = f"layer {number} ({_NAMES[type(layer)]}) at {size_hw[1]} x {size_hw[0]} px: "
        match layer:
            case Conv():
                padding = layer.size // 2 if layer.padding is None else layer.padding
                add = 2 * padding - layer.size + layer.stride
                sizes.append(((height + add) // layer.stride, (width + add) // layer.stride))
            case Pool():
                sizes.append((-(-height // layer.stride), -(-width // layer.stride)))
            case Reorg():
                if height % layer.stride or width % layer.stride:
                    raise InputError(
                        f"{where}cannot divide {width} x {height} cells by {layer.stride}"
                    )
                sizes.append((height // layer.stride, width // layer.stride))
            case Route():
                source_sizes = {sizes[k] for k in route_sources(number, layer)}
                if len(source_sizes) > 1:
                    maps = " and ".join(f"{w} x {h}" for h, w in sorted(source_sizes))
                    raise InputError(f"{where}cannot concatenate {maps} cells")
                sizes.append(source_sizes.pop())
            case Dropout():
                sizes.append((height, width))
            case CustomBackbone():
                raise InputError(f"{where}the layers of {layer.class_path} are unknown")
        if min(sizes[-1]) < 1:
            raise InputError(f"{where}no cells remain of {width} x {height}")


def route_sources(number: int, route: Route) -> list[int]:
    """Return the indices, from 0, of the layers that route `number` concatenates."""
    return [source if source >= 0 else number + source for source in route.layers]
