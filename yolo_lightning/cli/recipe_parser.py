"""Parse recipes and command lines, and turn a checkpoint into recipe values."""

import os
import re
import tempfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from yolo_lightning.cli.launch import option_values
from yolo_lightning.cli.recipe_errors import readable_message
from yolo_lightning.cli.recipe_paths import relative_to_recipe
from yolo_lightning.cli.recipe_policy import check_values
from yolo_lightning.errors import InputError, short
from yolo_lightning.models.preparation import PREPARATION

ANY_MODEL = {
    "class_path": "yolo_lightning.DetectorModule",
    "init_args": {"tree": ["any"], "anchors_wh_cell": [[1.0, 1.0]]},
}
PRINT_CONFIG = "--print_config"
_RESOLVING = "InputError raised while resolving interpolation:"
_SAVED_TREE = ["(the checkpoint's tree)"]  # a list, as text would be a path
_NETWORK_KEYS = ("backbone", "head_channels", "passthrough_channels", "reorg")

# the parser writes recipes with the defaults of classes, such as the interval of Lightning's Timer
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, item: dumper.represent_data(item.value))


class _QuotingDumper(yaml.SafeDumper):
    """Quotes all text, so that none is read as a number."""


_QuotingDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


class _ParserError(Exception):
    """An unprocessed error message of the parser."""


class RecipeParser(LightningArgumentParser):
    """A parser that raises errors instead of printing its usage and exiting.

    Options have one spelling, so that recipes and output folders are found before parsing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raise the message; nested parsers pass it on, so `parse` makes it readable."""
        raise _ParserError(message) from None

    def parse_path(self, path: str | os.PathLike[str], **options: Any) -> Namespace:
        """Parse a recipe, whose paths are relative to its folder."""
        text = Path(path).read_text(encoding="utf-8-sig")
        values = get_loader("yaml")(text)
        if isinstance(values, dict):
            values = relative_to_recipe(values, os.fspath(path))
            text = yaml.dump(values, Dumper=_QuotingDumper, allow_unicode=True, sort_keys=False)
        return self.parse_string(text, path=os.path.basename(path), **options)

    def _add_signature_parameter(self, *args: Any, **kwargs: Any) -> None:
        """Read no unchecked file where a class is expected, as Lightning asks for."""
        super()._add_signature_parameter(*args, **{**kwargs, "sub_configs": False})

    def format_help(self) -> str:
        """Return the help without the list of all modules, which a backbone can be."""
        return re.sub(r", known\s+subclasses:\s+torch\.nn\.Module,[^)]*", "", super().format_help())


def parse(
    parser: LightningArgumentParser,
    args: Sequence[str],
    recipes: Sequence[str],
    model: dict[str, Any] | None = None,
) -> Namespace:
    """Parse a command line with a `RecipeParser`; the recipes are named in error messages.

    `model` holds defaults of the section `model`, which the recipes override.

    Raises:
        InputError: an unknown key, a wrong value, a reference to a missing key, or what
            `check_values` refuses.
    """
    origin = "".join(f"{recipe}: " for recipe in recipes)
    rows = (model or {}).get("init_args", {}).get("tree")
    is_printing = any(arg.startswith(PRINT_CONFIG) for arg in args)
    # parsing takes time by the square of the length of a list
    if model and rows is not None and not is_printing:
        model = {**model, "init_args": {**model["init_args"], "tree": _SAVED_TREE}}
    try:
        with tempfile.TemporaryDirectory() as folder:
            defaults = Path(folder) / "model.yaml"
            defaults.write_text(yaml.safe_dump({"model": model} if model else {}))
            config = parser.parse_args([args[0], "--config", str(defaults), *args[1:]])
        check_values(config[args[0]].as_dict(), option_values(args))
        seed = config[args[0]].get("seed_everything")
        if type(seed) is int and not 0 <= seed < 2**32:
            raise InputError(
                f"{origin}seed_everything is {short(str(seed))}; allowed: 0 … {2**32 - 1:,}"
            )
    except OmegaConfBaseException as error:
        key = str(error.full_key).removeprefix(f"{args[0]}.")
        reason = str(error).splitlines()[0]
        reason = reason.replace(_RESOLVING, "") if _RESOLVING in reason else f": {reason}"
        raise InputError(f"{origin}{key}{reason}") from None
    except _ParserError as error:
        raise InputError(origin + readable_message(str(error), recipes)) from None
    except InputError as error:
        raise InputError(f"{origin}{error}") from None
    for section in ("model", "data"):
        init_args = (config[args[0]].get(section) or {}).get("init_args") or {}
        if init_args.get("tree") == _SAVED_TREE:
            init_args["tree"] = rows
    return config


def _is_plain(value: Any) -> bool:
    """Return whether a value of a checkpoint names no class and has no references."""
    if isinstance(value, dict):
        return "class_path" not in value and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return not isinstance(value, str) or "${" not in value


def model_from_checkpoint(
    checkpoint: dict[str, Any], config: Namespace, args: Sequence[str], recipes: Sequence[str]
) -> dict[str, Any]:
    """Return the hyper-parameters of a checkpoint as the `model` section of a recipe.

    Those of the network are left out if the recipe or the command line names another backbone.

    Raises:
        InputError: the checkpoint's backbone is a class that the recipe does not name, or another
            of its values names a class or refers to another value.
    """
    module = checkpoint.get("module", "DetectorModule")
    values = dict(checkpoint["hyper_parameters"])
    for key, value in values.items():  # the parser would expand a dotted key, and import a class
        is_class = key == "backbone" and isinstance(value, dict)
        if not str(key).isidentifier() or not (is_class or _is_plain(value)):
            raise InputError(
                f"the checkpoint's hyper-parameter {str(key)[:60]!r} may not name a class or refer "
                "to another value"
            )
    is_named = any(
        arg.startswith(("--model.backbone", "--model.init_args.backbone")) for arg in args
    )
    for recipe in recipes:
        model = (yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {}).get("model") or {}
        is_named |= "backbone" in (model.get("init_args") or {})
    backbone, saved_backbone = config.model.init_args.get("backbone"), values.get("backbone")
    if isinstance(saved_backbone, dict):  # a checkpoint must not import classes, only a recipe
        saved_backbone = str(saved_backbone.get("class_path"))
        del values["backbone"]
        if not is_named:
            raise InputError(
                f"the checkpoint's backbone is the class {saved_backbone}; name it in the recipe's "
                "model.init_args.backbone"
            )
        if isinstance(backbone, Namespace):
            backbone = saved_backbone  # loading the weights compares the classes
    if is_named and backbone != saved_backbone:
        values = {key: value for key, value in values.items() if key not in _NETWORK_KEYS}
    return {"class_path": f"yolo_lightning.{module}", "init_args": values}


def take_from_model(config: Namespace) -> None:
    """Set the tree, and how images are prepared, in the data that does not say it.

    Raises:
        InputError: the model's input is not square.
    """
    data = (config.get("data") or {}).get("init_args") or {}
    model = (config.get("model") or {}).get("init_args") or {}
    for name in ("tree", *PREPARATION):
        if name in data and data[name] is None and name in model:
            data[name] = model[name]
            if name == "image_size" and not isinstance(model[name], int):
                height, width = model[name]
                raise InputError(
                    f"the model's input is {width} x {height} px, but that of the data is square: "
                    "set data.image_size"
                )


def describe_preparation(config: Namespace, saved: dict[str, Any]) -> str | None:
    """Return how the data prepares images, and which of it a checkpoint's model says."""
    data = (config.get("data") or {}).get("init_args") or {}
    parts = []
    for name in PREPARATION:
        value, own = data.get(name), saved.get(name)
        if value is not None:
            note = "" if own is None else " (the checkpoint's)" if value == own else f" (not {own})"
            parts.append(f"{name} {value}{note}")
    return f"images: {', '.join(parts)}" if parts else None
