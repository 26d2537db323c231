"""Text of the recipe that `yolo-lightning init` writes."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from yolo_lightning.datamodules.files import AnnotatedImages, LabelledImages
from yolo_lightning.models.anchors import as_yaml_values, cluster_anchors, scale_to_letterbox
from yolo_lightning.models.backbones import backbone_layers
from yolo_lightning.models.layers import layer_outputs

ANCHORS = 5
BATCH, PASSES, MIN_STEPS, MAX_STEPS = 16, 60, 600, 80_000

_RECIPE = """\
# {title}
#
# Written by: {command}
# {boxes}; {images}.
# The tree of classes is {tree}: edit it, or rebuild it with `yolo-lightning wordtree build`.
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
    backbone: {backbone}  # tiny_darknet for CPUs, darknet19 for GPUs
    pretrained: {pretrained}  # Darknet .weights or a checkpoint; null: random weights
    anchors_wh_cell: {anchors}  # check them with `yolo-lightning anchors`
    head_channels: {head_channels}
    passthrough_channels: {passthrough_channels}
    reorg: {reorg}  # darknet: compatible with Darknet
    learning_rate: {learning_rate}  # per optimizer step; divide it by 10 if training diverges
    momentum: 0.9
    weight_decay: 0.0005
    schedule:
      class_path: yolo_lightning.schedules.PolynomialDecay
      init_args:
        burn_in_steps: 100
        total_steps: ${{.....trainer.max_steps}}
        power: 1.0
    loss:
      anchor_prior_images: {anchor_prior_images}  # images while boxes are pulled to anchors
      label_noobj_scale: 0.0
      box_selection: boxed_ancestor  # box that an image label trains: docs/box-selection.md
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
    detection_batch_size: {batch}  # total of all ranks
    classification_batch_size: {batch}
    classification_batches_per_detection_batch: {ratio}
    image_size: {image_size}  # for evaluation, px, a multiple of 32
    canvas_size: {canvas_size}  # largest size of MultiScale, px
    num_workers: 2
    seed: ${{...seed_everything}}

trainer:
  max_steps: {max_steps}  # about {passes:.0f} passes over the images with boxes
  max_epochs: -1
  accelerator: auto
  devices: 1
  num_nodes: 1
  precision: 32-true  # bf16-mixed: half the time on GPUs and CPUs with bfloat16
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
class Datasets:
    """The datasets of a recipe."""

    detection: AnnotatedImages
    classification: LabelledImages | None
    validation: AnnotatedImages | None
    test: AnnotatedImages | None

    def sources(self) -> list[AnnotatedImages | LabelledImages]:
        """Return all sources that are not None."""
        every = (self.detection, self.classification, self.validation, self.test)
        return [source for source in every if source is not None]


def _anchors(options: argparse.Namespace, datasets: Datasets, network: Mapping[str, Any]) -> Any:
    """Return the anchors of the pretrained detector, or cluster the boxes; in cells."""
    pretrained = network.get("anchors_wh_cell")
    if pretrained is not None:
        return [list(pair) for pair in pretrained]
    stride = layer_outputs(backbone_layers(network["backbone"]))[-1].stride
    boxes = scale_to_letterbox(*datasets.detection.shapes_wh_px(), options.image_size) / stride
    distinct = len(np.unique(boxes, axis=0))
    return as_yaml_values(cluster_anchors(boxes, options.num_anchors or min(ANCHORS, distinct)))


def _source_lines(source: AnnotatedImages | LabelledImages | None, indent: int = 6) -> str:
    """Return a source as lines of a recipe; empty for None."""
    if source is None:
        return ""
    names = ("root", "split", "years", "annotations", "file", "challenge")
    values = {name: getattr(source, name) for name in names if hasattr(source, name)}
    lines = [f"class_path: yolo_lightning.datamodules.{type(source).__name__}", "init_args:"]
    lines += [f"  {key}: {_as_yaml(value)}" for key, value in values.items() if value is not None]
    return "\n".join(" " * indent + line for line in lines)


def _as_yaml(value: object) -> str:
    """Return a value as YAML on one line, quoted if necessary."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("...\n").strip()


def recipe_text(
    options: argparse.Namespace, datasets: Datasets, network: Mapping[str, Any], command: str
) -> str:
    """Return the text of the recipe."""
    size = options.image_size
    images = len(datasets.classification) if datasets.classification is not None else 0
    ratio = min(4, max(1, round(images / len(datasets.detection)))) if images else 0
    batches = max(1, len(datasets.detection) // BATCH)
    steps = int(np.clip(PASSES * batches * (1 + ratio), MIN_STEPS, MAX_STEPS))
    sizes = [s for s in range(size - 64, size + 65, 32) if s >= 96]
    recipe, stem = Path(options.output), Path(options.output).stem
    counts = sum(datasets.detection.name_counts().values())
    labelled = _source_lines(datasets.classification)
    validation, test = _source_lines(datasets.validation), _source_lines(datasets.test)
    return _RECIPE.format(
        title=f"{stem}: detector trained on boxes{' and image labels' if images else ''}",
        command=command,
        recipe=recipe,
        boxes=f"{len(datasets.detection)} images with {counts} boxes",
        images=f"{images} images with a label" if images else "no images with labels only",
        tree=_as_yaml(str(recipe.with_suffix(".tsv"))),
        batch=BATCH,
        alternating=f", then {ratio} x {BATCH} with labels" if ratio else "",
        backbone=_as_yaml(network["backbone"]),
        pretrained=_as_yaml(options.pretrained),
        anchors=json.dumps(_anchors(options, datasets, network)),
        head_channels=network["head_channels"],
        passthrough_channels=_as_yaml(network["passthrough_channels"]),
        reorg=network["reorg"],
        anchor_prior_images=network["anchor_prior_images"],
        learning_rate=0.001 if network["backbone"] == "darknet19" else 0.005,
        detection=_source_lines(datasets.detection),
        classification=f"\n{labelled}" if labelled else " null",
        validation=f"\n{validation}" if validation else " null  # images with boxes to evaluate",
        test=f"\n{test}" if test else " null  # null: the validation images",
        shorter_side=[int(size * 0.9), int(size * 1.3)],
        ratio=ratio,
        image_size=size,
        canvas_size=max(sizes),
        sizes=sizes,
        max_steps=steps,
        passes=steps / batches / (1 + ratio),
        every=max(1, steps // 4),
        stem=_as_yaml(stem),
        folder=_as_yaml(f"outputs/{stem}"),
        best=_BEST if validation else "",
    )
