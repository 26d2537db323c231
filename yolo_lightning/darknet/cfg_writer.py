"""Convert a network description to the sections of a `.cfg` file."""

from typing import Any

from yolo_lightning.darknet.config import SCALES, TRAINING_OPTIONS, NetworkDescription
from yolo_lightning.darknet.files import Section
from yolo_lightning.errors import InputError
from yolo_lightning.models.layers import (
    Conv,
    CustomBackbone,
    Dropout,
    Layer,
    Pool,
    Reorg,
    Route,
)


def to_sections(description: NetworkDescription) -> list[Section]:
    """Return the sections of a `.cfg` file for a network.

    Raises:
        InputError: a layer that Darknet does not have.
    """
    net = {"batch": "1", "subdivisions": "1", **description.options.get("net", {})}
    height, width = description.size_hw
    net |= {"width": str(width), "height": str(height), "channels": "3"}
    net.pop("interpolation", None)
    if description.interpolation != "darknet":  # our own option, which Darknet ignores
        net["interpolation"] = description.interpolation
    for option, name in TRAINING_OPTIONS.items():
        if name in description.training:
            net[option] = _format_number(description.training[name])
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
    region.pop("map", None)  # refers to the nodes of another tree
    settings = description.region
    region |= {
        "anchors": ", ".join(_format_number(value) for value in settings.anchors),
        "num": str(len(settings.anchors) // 2),
        "classes": str(description.classes),
        "rescore": str(int(settings.rescore)),
        **{name: _format_number(getattr(settings, name)) for name in ("thresh", *SCALES)},
    }
    if description.tree_file:
        region["tree"] = description.tree_file
    return [*sections, Section("region", options=region)]


def _format_number(value: float) -> str:
    """Return the shortest text that parses to the same number."""
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
                    f"layer {number} is a reorg of kind {layer.kind}; Darknet only supports "
                    "model.reorg: darknet"
                )
            kind, options = "reorg", {"stride": layer.stride}
        case Route():
            kind, options = "route", {"layers": ",".join(map(str, layer.layers))}
        case Dropout():
            kind, options = "dropout", {"probability": _format_number(layer.probability)}
        case CustomBackbone():
            raise InputError(
                f"the backbone is {layer.class_path}; Darknet cannot describe a module"
            )
    return Section(kind, options={name: str(value) for name, value in options.items()})
