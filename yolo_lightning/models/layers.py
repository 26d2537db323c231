"""Networks as lists of layers: kinds of layers, their sizes, and their plain form."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal, get_args

from yolo_lightning.errors import InputError

Activation = Literal["leaky", "linear", "relu", "logistic", "tanh", "elu"]
ReorgKind = Literal["darknet", "space_to_depth"]


@dataclass(frozen=True)
class Conv:
    """A convolution.

    Attributes:
        filters: output channels.
        size: of the square kernel, px.
        stride: px.
        padding: px of zeros on each side; None for half of the kernel, which keeps the size.
        batch_norm: whether batch norm follows; else the convolution has a bias.
        activation: ``leaky`` has slope 0.1.
    """

    filters: int
    size: int = 3
    stride: int = 1
    padding: int | None = None
    batch_norm: bool = True
    activation: Activation = "leaky"


@dataclass(frozen=True)
class Pool:
    """Largest value of a window; windows reach over the right and lower edges, as in Darknet.

    Attributes:
        size, stride: of the window, px.
    """

    size: int = 2
    stride: int = 2


@dataclass(frozen=True)
class Reorg:
    """Fold blocks of cells into channels.

    Attributes:
        stride: side of a block.
        kind: `space_to_depth` stacks neighbours, as the paper says; `darknet` rereads the map
            as one of fewer channels and more cells first, as the original program does.
    """

    stride: int = 2
    kind: ReorgKind = "space_to_depth"


@dataclass(frozen=True)
class Route:
    """Outputs of earlier layers, joined along the channels.

    Attributes:
        layers: their numbers from 0, or negative ones counted back from this layer.
    """

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Dropout:
    """Zeros in training, with this probability."""

    probability: float = 0.5


Layer = Conv | Pool | Reorg | Route | Dropout

_KINDS: dict[str, Callable[..., Layer]] = {
    "conv": Conv,
    "pool": Pool,
    "reorg": Reorg,
    "route": Route,
    "dropout": Dropout,
}
_NAMES: dict[Any, str] = {kind: name for name, kind in _KINDS.items()}


def to_plain(layers: Iterable[Layer]) -> list[list[Any]]:
    """Return layers as a checkpoint or a recipe holds them, such as ``["conv", 32, 3]``."""
    rows = []
    for layer in layers:
        values, defaults = list(astuple(layer)), [field.default for field in fields(layer)]
        while values and values[-1] == defaults[len(values) - 1]:
            values.pop()
        rows.append(
            [_NAMES[type(layer)], *(list(v) if isinstance(v, tuple) else v for v in values)]
        )
    return rows


def from_plain(rows: Sequence[Sequence[Any]]) -> tuple[Layer, ...]:
    """Return the layers that plain values describe.

    Raises:
        InputError: an unknown kind or values that do not fit it; names the row.
    """
    layers: list[Layer] = []
    for number, row in enumerate(rows):
        kind = _KINDS.get(row[0]) if row and isinstance(row[0], str) else None
        if kind is None:
            raise InputError(f"layer {number} is {list(row)}; allowed kinds: {', '.join(_KINDS)}")
        try:
            values = [tuple(v) if isinstance(v, list) else v for v in row[1:]]
            if kind is Route and not isinstance(row[-1], list | tuple):
                values = [tuple(values)]  # [route, -1, -4] means [route, [-1, -4]]
            layer = kind(*values)
        except TypeError as error:
            raise InputError(f"layer {number} is {list(row)}: {error}") from None
        layers.append(layer)
    if not layers:
        raise InputError("a list of no layers; expected rows such as [conv, 32, 3]")
    return tuple(layers)


@dataclass(frozen=True)
class Extent:
    """What a layer gives: channels, and px of the network input per cell."""

    channels: int
    stride: int


def extents(layers: Sequence[Layer], in_channels: int = 3) -> list[Extent]:
    """Return each layer's channels and stride; builds nothing.

    Raises:
        InputError: a value that no layer can have, or a route to layers that do not exist or do
            not fit together; names the layer.
    """
    found: list[Extent] = []
    for number, layer in enumerate(layers):
        before = found[-1] if found else Extent(in_channels, 1)
        _check(number, layer, before, found)
        match layer:
            case Conv():
                found.append(Extent(layer.filters, before.stride * layer.stride))
            case Pool():
                found.append(Extent(before.channels, before.stride * layer.stride))
            case Reorg():
                channels = before.channels * layer.stride**2
                found.append(Extent(channels, before.stride * layer.stride))
            case Route():
                sources = [found[k] for k in sources_of(number, layer)]
                found.append(Extent(sum(s.channels for s in sources), sources[0].stride))
            case Dropout():
                found.append(before)
    return found


def _at_least(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _check(number: int, layer: Layer, before: Extent, found: Sequence[Extent]) -> None:
    """Refuse values that no layer can have."""

    def refuse(what: str) -> None:
        raise InputError(f"layer {number} ({_NAMES[type(layer)]}): {what}")

    if isinstance(layer, Conv | Pool | Reorg):
        for name in ("filters", "size", "stride"):
            value = getattr(layer, name, 1)
            if not _at_least(value, 1):
                refuse(f"{name} is {value}; allowed: 1 or more")
    match layer:
        case Conv():
            if layer.padding is not None and not _at_least(layer.padding, 0):
                refuse(f"padding is {layer.padding}; allowed: 0 or more")
            if layer.batch_norm not in (True, False):
                refuse(f"batch_norm is {layer.batch_norm!r}; allowed: true, false")
            if layer.activation not in get_args(Activation):
                allowed = ", ".join(get_args(Activation))
                refuse(f"activation is {layer.activation!r}; allowed: {allowed}")
        case Reorg():
            if layer.kind not in get_args(ReorgKind):
                refuse(f"kind is {layer.kind!r}; allowed: {', '.join(get_args(ReorgKind))}")
            if layer.kind == "darknet" and before.channels % layer.stride**2:
                refuse(
                    f"{before.channels} channels; allowed: multiples of {layer.stride**2}, "
                    "the square of its stride"
                )
        case Route():
            if not layer.layers or not all(isinstance(k, int) for k in layer.layers):
                refuse(f"names {layer.layers}; expected numbers of layers")
            for named, source in zip(layer.layers, sources_of(number, layer), strict=True):
                if not 0 <= source < number:
                    refuse(f"names layer {named}; allowed: 0 … {number - 1}, or {-number} … -1")
            strides = {found[k].stride for k in sources_of(number, layer)}
            if len(strides) > 1:
                refuse(f"joins layers of different strides, {sorted(strides)} px")
        case Dropout():
            if not (isinstance(layer.probability, int | float) and 0 <= layer.probability < 1):
                refuse(f"probability is {layer.probability}; allowed: 0 … below 1")
        case _:
            pass


def check_sizes(layers: Sequence[Layer], size_hw: tuple[int, int]) -> None:
    """Refuse layers whose maps do not fit together at a size of the network input; builds nothing.

    Args:
        layers: that `extents` accepts.
        size_hw: of the network input, px.

    Raises:
        InputError: a map of no cells, a reorg that cuts one, a route over different ones; names
            the layer.
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
                    raise InputError(f"{where}cuts a map of {width} x {height} cells")
                sizes.append((height // layer.stride, width // layer.stride))
            case Route():
                found = {sizes[k] for k in sources_of(number, layer)}
                if len(found) > 1:
                    maps = " and ".join(f"{w} x {h}" for h, w in sorted(found))
                    raise InputError(f"{where}joins maps of {maps} cells")
                sizes.append(found.pop())
            case Dropout():
                sizes.append((height, width))
        if min(sizes[-1]) < 1:
            raise InputError(f"{where}leaves no cells of {width} x {height}")


def sources_of(number: int, route: Route) -> list[int]:
    """Return the layers that a route joins, counted from 0."""
    return [source if source >= 0 else number + source for source in route.layers]
