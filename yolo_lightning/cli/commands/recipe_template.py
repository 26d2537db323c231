"""Text of the recipe that `yolo-lightning init` writes."""

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from yolo_lightning.cli.commands.init_defaults import Settings, counted
from yolo_lightning.cli.recipe_paths import INPUT_KEYS
from yolo_lightning.datamodules.files import AnnotatedImages, LabelledImages
from yolo_lightning.models.anchors import (
    DEFAULT_COUNT,
    as_yaml_values,
    cluster_anchors,
    scale_to_letterbox,
)
from yolo_lightning.models.backbones import backbone_layers
from yolo_lightning.models.layers import layer_outputs

NOT_IN_TEMPLATE = {"batch_norm": True, "location": "direct"}
"""Options of the network with their defaults, which a recipe names only if they have others."""

_TEMPLATE = Path(__file__).with_suffix(".yaml")
_BEST = """\
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: best, monitor: val/AP50, mode: max, enable_version_counter: false}
"""


Source = AnnotatedImages | LabelledImages


def _anchors(
    number: int | None, boxes: AnnotatedImages, network: Mapping[str, Any], image_size: int
) -> list[list[float]]:
    """Return the anchors of the pretrained detector, or cluster the boxes; in cells."""
    pretrained = network.get("anchors_wh_cell")
    if pretrained is not None:
        return [list(pair) for pair in pretrained]
    stride = layer_outputs(backbone_layers(network["backbone"]))[-1].stride
    shapes = scale_to_letterbox(*boxes.shapes_wh_px(), image_size) / stride
    distinct = len(np.unique(shapes, axis=0))
    return as_yaml_values(cluster_anchors(shapes, number or min(DEFAULT_COUNT, distinct)))


def _from(folder: Path, path: str) -> str:
    """Return a path, relative to the working folder, as a recipe in another folder names it."""
    return path if path.startswith(("/", "~")) else os.path.relpath(path, folder)


def _source_lines(source: Source | None, folder: Path, missing: str = "null") -> str:
    """Return a source as lines of a recipe in a folder, or ``missing`` on the same line."""
    if source is None:
        return f" {missing}"
    names = (
        "root", "split", "years", "annotations", "file", "challenge", "images", "names", "mapping",
        "only", "without",
    )  # fmt: skip
    values = {name: getattr(source, name) for name in names if hasattr(source, name)}
    for key in INPUT_KEYS & values.keys():
        path = values[key]  # names may also be a file of the dataset
        if isinstance(path, str) and (key != "names" or Path(path).is_file()):
            values[key] = _from(folder, path)
    lines = [f"class_path: yolo_lightning.datamodules.{type(source).__name__}", "init_args:"]
    lines += [
        f"  {key}: {_as_yaml(value)}" for key, value in values.items() if value not in (None, {})
    ]
    if source.allow_outside:
        lines.append("  allow_outside: true")
    if not getattr(source, "exclusive_names", True):
        lines.append("  exclusive_names: false")
    return "".join(f"\n{' ' * 6}{line}" for line in lines)


def _as_yaml(value: object) -> str:
    """Return a value as YAML on one line, quoted if necessary."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()


def label_batches(boxes: AnnotatedImages, images: int) -> int:
    """Return how many batches of images with labels follow one of images with boxes."""
    return min(4, max(1, round(images / len(boxes)))) if images else 0


def recipe_text(
    options: argparse.Namespace,
    sources: Mapping[str, Any],
    network: Mapping[str, Any],
    settings: Settings,
    command: str,
) -> str:
    """Return the text of the recipe of sources, by their part in the data."""
    size, boxes = settings.image_size, sources["detection"]
    images = len(sources.get("classification", ()))
    ratio = label_batches(boxes, images)
    batches = -(-len(boxes) // settings.batch)  # of a pass
    spread = 64 if size > 320 else 32
    sizes = [s for s in range(size - spread, size + spread + 1, 32) if s >= 96]
    recipe, stem = Path(options.output), Path(options.output).stem
    evaluated = "null  # images with boxes to evaluate"
    folder, weights = recipe.parent, network["pretrained"]
    return _TEMPLATE.read_text(encoding="utf-8").format(
        title=f"{stem}: detector trained on boxes{' and image labels' if images else ''}",
        command=command,
        recipe=shlex.quote(str(recipe)),
        boxes=f"{len(boxes)} images with {sum(boxes.name_counts().values())} boxes",
        images=f"{images} images with a label" if images else "no images with labels only",
        tree=_as_yaml(recipe.with_suffix(".tsv").name),
        batch=settings.batch,
        alternating=f", then {ratio} x {settings.batch} with labels" if ratio else "",
        backbone=_as_yaml(network["backbone"]),
        pretrained=_as_yaml(weights and _from(folder, weights)),
        anchors=json.dumps(_anchors(options.num_anchors, boxes, network, size)),
        head_channels=network["head_channels"],
        passthrough_channels=_as_yaml(network["passthrough_channels"]),
        reorg=network["reorg"],
        others="".join(
            f"\n    {name}: {_as_yaml(network[name])}"
            for name, default in NOT_IN_TEMPLATE.items()
            if network.get(name, default) != default
        ),
        anchor_prior_images=network["anchor_prior_images"],
        learning_rate=0.001 if network["backbone"] == "darknet19" else 0.005,
        detection=_source_lines(boxes, folder),
        classification=_source_lines(sources.get("classification"), folder),
        validation=_source_lines(sources.get("validation"), folder, evaluated),
        test=_source_lines(sources.get("test"), folder, "null  # null: the validation images"),
        ratio=ratio,
        image_size=size,
        sizes=sizes,
        workers=settings.workers,
        precision=settings.precision,
        max_steps=settings.steps,
        epochs=counted(settings.steps / batches / (1 + ratio), "epoch"),
        duration=settings.duration,
        every=settings.every,
        log_every=min(20, settings.every),  # each validation then has a loss beside it
        decay=round(1 - 20 / max(settings.steps, 200), 4),
        stem=_as_yaml(stem),
        folder=_as_yaml(f"outputs/{stem}"),
        best=_BEST if "validation" in sources else "",
    )
