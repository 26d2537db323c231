"""`yolo-lightning init`: from datasets of one's own to a recipe that trains."""

import argparse
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from yolo_lightning.checkpoints.validation import is_checkpoint, read_checkpoint
from yolo_lightning.cli.commands.wordtree import write
from yolo_lightning.cli.tree_inputs import read_hierarchy, read_mapping, tree_of
from yolo_lightning.datamodules.annotated import AnnotatedImages
from yolo_lightning.datamodules.autodetect import detection_source, held_out, label_source
from yolo_lightning.datamodules.labelled import LabelledImages
from yolo_lightning.datamodules.vocabulary import vocabulary_report
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.images import UnreadableSample
from yolo_lightning.models.anchors import as_yaml_values, cluster, letterboxed_wh
from yolo_lightning.models.backbones import BACKBONES, backbone_layers
from yolo_lightning.models.layers import extents
from yolo_lightning.tree.build import ENTITY
from yolo_lightning.tree.labels import reviewed
from yolo_lightning.tree.wordtree import WordTree

ANCHORS = 5
BATCH, PASSES, MIN_STEPS, MAX_STEPS = 16, 60, 600, 80_000
_READ, _SHOWN = 64, 10

_RECIPE = """\
# {title}
#
# Written by: {command}
# {boxes}; {images}.
# The tree is {tree}: edit it, or write it anew with `yolo-lightning wordtree build`.
#
#   yolo-lightning fit --config {recipe}                         CPU or one GPU
#   torchrun --nproc-per-node=8 -m yolo_lightning fit --config {recipe} --trainer.devices 8
#   srun yolo-lightning fit --config {recipe} --trainer.devices 8 --trainer.num_nodes 2
#
# Effective batch: {batch} images with boxes{alternating}, one optimizer step each.
seed_everything: 0

model:
  class_path: yolo_lightning.DetectorModule
  init_args:
    tree: {tree}
    backbone: {backbone}  # tiny_darknet for two cores; darknet19 for a GPU
    pretrained: {pretrained}  # Darknet's .weights or a checkpoint to start from; null begins afresh
    anchors_wh_cell: {anchors}  # anchors; yolo-lightning anchors shows how they fit
    head_channels: {head_channels}
    passthrough_channels: {passthrough_channels}
    reorg: {reorg}  # darknet, for networks that Darknet shall run
    learning_rate: {learning_rate}  # per optimizer step; a tenth of it where training diverges
    momentum: 0.9
    weight_decay: 0.0005
    schedule:
      class_path: yolo_lightning.schedules.PolynomialDecay
      init_args:
        burn_in_steps: 100
        total_steps: ${{.....trainer.max_steps}}
        power: 1.0
    loss:
      anchor_prior_images: {anchor_prior_images}  # images until which boxes are pulled to anchors
      label_noobj_scale: 0.0
      box_selection: boxed_ancestor  # which box an image label trains: docs/box-selection.md
      objectness_rule: paper

data:
  class_path: yolo_lightning.CombinedDataModule
  init_args:
    tree: ${{...model.init_args.tree}}
    detection:
{detection}
    classification:{classification}
    validation:{validation}
    test:{test}
    detection_augmentation:
      class_path: yolo_lightning.datamodules.DetectionAugmentation
      init_args: {{jitter: 0.2, flip: 0.5, hue: 0.02, saturation: 1.3, exposure: 1.3}}
    classification_augmentation:
      class_path: yolo_lightning.datamodules.ClassificationAugmentation
      init_args:
        shorter_side: {shorter_side}
        aspect: 0.85
        degrees: 7.0
        flip: 0.5
        hue: 0.02
        saturation: 1.3
        exposure: 1.3
    detection_batch_size: {batch}  # over all ranks
    classification_batch_size: {batch}
    classification_batches_per_detection_batch: {ratio}
    image_size: {image_size}  # of evaluation, px, a multiple of 32
    canvas_size: {canvas_size}  # the largest that MultiScale draws
    num_workers: 2
    seed: ${{...seed_everything}}

trainer:
  max_steps: {max_steps}  # some {passes:.0f} passes over the images with boxes
  max_epochs: -1
  accelerator: auto
  devices: 1
  num_nodes: 1
  precision: 32-true  # bf16-mixed halves the time on CPUs that know bfloat16, and on GPUs
  accumulate_grad_batches: 1
  gradient_clip_val: 10.0
  num_sanity_val_steps: 0
  val_check_interval: {every}
  check_val_every_n_epoch: null
  log_every_n_steps: 20
  default_root_dir: {folder}
  logger:
    class_path: yolo_lightning.tracking.RunLogger
    init_args: {{experiment_name: {stem}}}
  callbacks:
    - class_path: yolo_lightning.callbacks.MultiScale
      init_args: {{sizes: {sizes}, every_n_batches: 10}}
    - class_path: lightning.pytorch.callbacks.TQDMProgressBar
      init_args: {{refresh_rate: 10}}
{best}    - class_path: yolo_lightning.callbacks.LastCheckpoint
      init_args: {{every_n_steps: {every}}}
"""

_BEST = """\
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: best, monitor: val/AP50, mode: max, enable_version_counter: false}
"""


@dataclass
class Found:
    """The datasets that a recipe is written for."""

    detection: AnnotatedImages
    classification: LabelledImages | None
    validation: AnnotatedImages | None
    test: AnnotatedImages | None

    def sources(self) -> list[AnnotatedImages | LabelledImages]:
        """Return those that there are."""
        every = (self.detection, self.classification, self.validation, self.test)
        return [source for source in every if source is not None]


def _found(options: argparse.Namespace) -> Found:
    """Recognise the datasets, open their indices, and try to read some of their images."""
    detection = detection_source(options.detection)
    parts = held_out(options.detection, detection)
    if options.validation:
        parts["validation"] = detection_source(options.validation)
    classification = label_source(options.classification) if options.classification else None
    found = Found(detection, classification, parts.get("validation"), parts.get("test"))
    for source in found.sources():
        _check(source)
    return found


def _check(source: AnnotatedImages | LabelledImages) -> None:
    """Print what a source holds; refuse one without images or labels."""
    names, faults = source.name_counts(), list(source.open().facts["faults"])
    if not len(source) or not sum(names.values()):
        hint = f": {faults[0]}" if faults else ""
        raise InputError(f"{source.name}: holds nothing to train on{hint}")
    for index in np.linspace(0, len(source) - 1, min(_READ, len(source))).astype(int).tolist():
        try:
            _ = source.readable(index)
        except UnreadableSample as error:
            faults.append(str(error))
    what = "boxes" if isinstance(source, AnnotatedImages) else "images"
    counts = ", ".join(f"{name} {count}" for name, count in names.most_common(_SHOWN))
    more = f", … {len(names)} names in all" if len(names) > _SHOWN else ""
    print(f"{source.name}: {len(source)} images; {what}: {counts}{more}")
    for fault in faults[:_SHOWN]:
        print(f"  {fault}")
    if len(faults) > _SHOWN:
        print(f"  … and {len(faults) - _SHOWN} more repaired or skipped")


def _tree(options: argparse.Namespace, found: Found) -> WordTree:
    """Return the tree over all names; flat where the user says so."""
    datasets: dict[str, list[str]] = {}
    for source in found.sources():
        used = [name for name, count in source.name_counts().items() if count]
        datasets.setdefault(source.name, []).extend(used)
    if options.flat:
        return WordTree.flat(sorted({name for names in datasets.values() for name in names}))
    hierarchy = read_hierarchy(options.hierarchy) if options.hierarchy else {}
    meanings = read_mapping(options.mapping) if options.mapping else {}
    try:
        return tree_of(datasets, hierarchy, meanings, options.table, options.root)
    except InputError as error:
        raise InputError(
            f"{error}\n  Names that mean several things go into --mapping FILE (mouse: n03793489), "
            "classes of your own into --hierarchy FILE (bengal: domestic cat); --flat takes all "
            "names as they are, side by side"
        ) from None


def _network(options: argparse.Namespace) -> dict[str, Any]:
    """Return the network's options: those of the checkpoint to start from, else the backbone's."""
    values: dict[str, Any] = {"backbone": options.backbone, "anchor_prior_images": 3200}
    path, held = options.pretrained, {}
    if path is not None:
        if not Path(path).expanduser().is_file():
            raise InputError(f"--pretrained {path!r} not found (working folder: {Path.cwd()})")
        if is_checkpoint(path):
            held = read_checkpoint(path)["hyper_parameters"]
    values["backbone"] = held.get("backbone", options.backbone)
    values["head_channels"] = 1024 if values["backbone"] == "darknet19" else 128
    values |= {"passthrough_channels": 64, "reorg": "space_to_depth"}
    if "anchors_wh_cell" in held:  # a detector goes on as it is
        names = ("head_channels", "passthrough_channels", "reorg", "anchors_wh_cell")
        values |= {name: held[name] for name in names}
        values["anchor_prior_images"] = 0
    return values


def _anchors(options: argparse.Namespace, found: Found, network: Mapping[str, Any]) -> Any:
    """Return anchors, in cells; those of a detector to start from stay."""
    held = network.get("anchors_wh_cell")
    if held is not None:
        return [list(pair) for pair in held]
    stride = extents(backbone_layers(network["backbone"]))[-1].stride
    boxes = letterboxed_wh(*found.detection.shapes_wh_px(), options.image_size) / stride
    most = len(np.unique(boxes, axis=0))
    return as_yaml_values(cluster(boxes, options.num_anchors or min(ANCHORS, most)))


def _source(source: AnnotatedImages | LabelledImages | None, indent: int = 6) -> str:
    """Return the lines of a recipe that name a source; null where there is none."""
    if source is None:
        return ""
    kind = type(source)
    given = {"root": "root", "split": "split", "years": "years", "annotations": "annotations",
             "file": "file", "challenge": "challenge"}  # fmt: skip
    values = {key: getattr(source, name) for key, name in given.items() if hasattr(source, name)}
    lines = [f"class_path: yolo_lightning.datamodules.{kind.__name__}", "init_args:"]
    lines += [f"  {key}: {_plain(value)}" for key, value in values.items() if value is not None]
    return "\n".join(" " * indent + line for line in lines)


def _plain(value: object) -> str:
    """Return a value as YAML in one line; texts that YAML would take for something else quoted."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()


def recipe_of(
    options: argparse.Namespace, found: Found, network: Mapping[str, Any], command: str
) -> str:
    """Return the recipe's text."""
    size = options.image_size
    images = len(found.classification) if found.classification is not None else 0
    ratio = min(4, max(1, round(images / len(found.detection)))) if images else 0
    batches = max(1, len(found.detection) // BATCH)
    steps = int(np.clip(PASSES * batches * (1 + ratio), MIN_STEPS, MAX_STEPS))
    sizes = [s for s in range(size - 64, size + 65, 32) if s >= 96]
    recipe, stem = Path(options.output), Path(options.output).stem
    counts = sum(found.detection.name_counts().values())
    labelled = _source(found.classification)
    validation, test = _source(found.validation), _source(found.test)
    return _RECIPE.format(
        title=f"{stem}: boxes{' and image labels' if images else ''} of one's own, one training",
        command=command,
        recipe=recipe,
        boxes=f"{len(found.detection)} images with {counts} boxes",
        images=f"{images} images with a label" if images else "no images with labels alone",
        tree=_plain(str(recipe.with_suffix(".tsv"))),
        batch=BATCH,
        alternating=f", and {ratio} x {BATCH} with labels after each" if ratio else "",
        backbone=_plain(network["backbone"]),
        pretrained=_plain(options.pretrained),
        anchors=json.dumps(_anchors(options, found, network)),
        head_channels=network["head_channels"],
        passthrough_channels=_plain(network["passthrough_channels"]),
        reorg=network["reorg"],
        anchor_prior_images=network["anchor_prior_images"],
        learning_rate=0.001 if network["backbone"] == "darknet19" else 0.005,
        detection=_source(found.detection),
        classification=f"\n{labelled}" if labelled else " null",
        validation=f"\n{validation}" if validation else " null  # images with boxes to measure on",
        test=f"\n{test}" if test else " null  # validation's where null",
        shorter_side=[int(size * 0.9), int(size * 1.3)],
        ratio=ratio,
        image_size=size,
        canvas_size=max(sizes),
        sizes=sizes,
        max_steps=steps,
        passes=steps / batches / (1 + ratio),
        every=max(1, steps // 4),
        stem=_plain(stem),
        folder=_plain(f"outputs/{stem}"),
        best=_BEST if validation else "",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning init",
        description="Check datasets, and write a tree, anchors and a recipe that trains on them.",
    )
    parser.add_argument("--detection", required=True, help="images with boxes, in a usual layout")
    parser.add_argument("--classification", help="images with labels, such as a folder per class")
    parser.add_argument("--validation", help="images with boxes to be measured on")
    parser.add_argument("--output", required=True, help="RECIPE.yaml; the tree goes beside it")
    parser.add_argument("--hierarchy", help="your own classes: YAML nesting or CSV child,parent")
    parser.add_argument("--mapping", help="what names mean: YAML or CSV of name and wnid or word")
    parser.add_argument("--table", help=f"reviewed meanings to use: {', '.join(reviewed())}")
    parser.add_argument("--root", default=ENTITY, help="wnid above the tree (entity)")
    parser.add_argument("--flat", action="store_true", help="no hierarchy: names side by side")
    parser.add_argument("--image-size", type=int, default=416, help="px, a multiple of 32 (416)")
    parser.add_argument("--num-anchors", type=int, help=f"anchors a cell ({ANCHORS})")
    parser.add_argument("--backbone", default="tiny_darknet", help=f"{', '.join(BACKBONES)}")
    parser.add_argument("--pretrained", help="Darknet's .weights, or a checkpoint to go on from")
    return parser


def _checked(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if output.suffix not in (".yaml", ".yml"):
        raise InputError(f"--output {options.output!r}; expected a name such as recipe.yaml")
    for file in (output, output.with_suffix(".tsv")):
        if file.exists():
            raise InputError(f"{file} is there already; name another --output, or move it away")
    if options.image_size < 96 or options.image_size % 32:
        raise InputError(
            f"--image-size is {options.image_size}; allowed: multiples of 32 from 96 on"
        )
    if options.backbone not in BACKBONES:
        hint = nearest(options.backbone, BACKBONES) or f"allowed: {', '.join(BACKBONES)}"
        raise InputError(f"--backbone {options.backbone!r}; {hint}")


def main(argv: Sequence[str]) -> None:
    """Write the tree and the recipe, and say how to go on.

    Raises:
        InputError: datasets that cannot be read, names without a meaning, files that are there.
    """
    options = _parser().parse_args(list(argv))
    _checked(options)
    found = _found(options)
    tree = _tree(options, found)
    for source in found.sources():
        source.bind(tree)
    boxes = found.detection.node_counts()
    images = found.classification.node_counts() if found.classification is not None else {}
    print(vocabulary_report(tree, boxes, images))
    command = shlex.join(["yolo-lightning", "init", *argv])
    text = recipe_of(options, found, _network(options), command)
    output = Path(options.output)
    write(tree, str(output.with_suffix(".tsv")))
    fresh = output.with_name(output.name + ".fresh")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, output)
    print(f"{output.with_suffix('.tsv')}: {len(tree)} classes")
    print(f"{output}: train with: yolo-lightning fit --config {shlex.quote(str(output))}")
