"""Tables of the parameters of a class, from its signature and its docstring.

A description is ``name (unit): effect. Source: where the value is from.``
"""

import inspect
import json
from importlib import import_module
from typing import Any, NamedTuple

from docstring_parser import DocstringStyle, parse


class Parameter(NamedTuple):
    """A row of the table."""

    name: str
    default: str
    unit: str
    effect: str
    source: str


def find(path: str) -> Any:
    """Return the class that a dotted path names."""
    module, name = path.rsplit(".", 1)
    return getattr(import_module(module), name)


def parameters(path: str) -> list[Parameter]:
    """Return the parameters of a class, in the order of its signature."""
    found = find(path)
    described = {p.arg_name: p for p in parse(found.__doc__, DocstringStyle.GOOGLE).params}
    rows = []
    for name, parameter in inspect.signature(found).parameters.items():
        text = described.get(name)
        effect, _, source = " ".join((text and text.description or "").split()).partition(
            " Source: "
        )
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else f"`{json.dumps(parameter.default)}`"
        unit = (text and text.type_name) or ""
        rows.append(Parameter(name, default.replace('"', ""), unit, effect, source.rstrip(".")))
    return rows


def table(path: str) -> str:
    """Return the parameters as a table in Markdown."""
    lines = ["| parameter | default, unit | effect, *source* |", "| --- | --- | --- |"]
    for name, default, unit, effect, source in parameters(path):
        origin = f" *{source}*" if source else ""
        lines.append(f"| `{name}` | {default} {unit} | {effect}{origin} |")
    return "\n".join(lines)
