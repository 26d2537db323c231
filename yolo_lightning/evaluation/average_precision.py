"""Average precision over boxes: our own `torchmetrics.Metric`, matching by faster-coco-eval."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torchmetrics import Metric

from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.coco import COCO_FIGURES, coco_evaluation
from yolo_lightning.evaluation.matching import (
    AREA,
    BOX,
    COLUMNS,
    CROWD,
    DIFFICULT,
    FLAG,
    IMAGE,
    LABEL,
    SCORE,
    Table,
    no_boxes,
)
from yolo_lightning.evaluation.voc import VOC_FIGURES, voc_figures

__all__ = ["COCO_FIGURES", "VOC_FIGURES", "BoxAveragePrecision", "coco_evaluation"]

MAX_DETECTIONS = 100
PADDING = -1
"""Id of an image that stands in for none: what makes the ranks' shares equal."""

_OPTIONAL = ("iscrowd", "difficult", "area")
_UNNAMED = -2
_ENTRY = COLUMNS
"""Column behind those of `boxtables`: a number for each image that an update brings. It tells
apart images that have no id, and two that have the same."""
_entries = itertools.count()
_ENTRIES_OF_A_RANK = 2**40

Scores = tuple[dict[str, float], dict[int, dict[str, float]]]
"""Figures over all classes, by name, and those of each class, by node."""


class BoxAveragePrecision(Metric):
    """Average precision as COCO and as Pascal VOC define it, in px of the original images.

    Takes what torchmetrics' own `MeanAveragePrecision` takes, and serves beside it in a
    `MetricCollection`. Of an image the 100 surest detections are kept, on the CPU. In distributed
    runs the first rank alone computes, and tells the others; ranks without images take part.

    Attributes:
        figures: COCO's twelve numbers and VOC's two when `compute` was last called, by
            `COCO_FIGURES` and `VOC_FIGURES`; -1 where there is nothing to say.
        per_class: AP, AP50, AP75 and VOC's two, 0…1, by node, of every class that has a truth.
        tables: truths and detections that this was computed from, as `coco_evaluation` takes
            them, by ascending id; on the first rank those of all ranks, elsewhere without rows.
    """

    full_state_update = False
    truths: list[Tensor]
    detections: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dist_sync_fn=_on_the_first_rank, **kwargs)
        self.figures: dict[str, float] = {}
        self.per_class: dict[int, dict[str, float]] = {}
        self.tables: tuple[Table, Table] = no_boxes(), no_boxes()
        self.add_state("truths", default=[], dist_reduce_fx="cat")
        self.add_state("detections", default=[], dist_reduce_fx="cat")

    def update(
        self, preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add images.

        Args:
            preds: of each image, `boxes`, float (N, 4), corners in px; `labels`, int64 (N,);
                `scores`, float (N,).
            target: of each image, `boxes` (M, 4) and `labels` (M,); where known, `iscrowd` (M,),
                regions of a crowd: any number of detections may lie in one, as far as they are
                covered by it; `difficult` (M,), neither asked for nor punished; `area` (M,),
                square px, 0 for the box's own; `image_id`, an int: an image that comes twice, on
                whatever rank, counts once, and -1, padding, is left out. Images without an id all
                count.

        Raises:
            InputError: a part is missing, or parts differ in length.
        """
        _check(preds, target)
        images = [int(truth.get("image_id", _UNNAMED)) for truth in target]
        kept = [k for k, image in enumerate(images) if image != PADDING]
        if not kept:
            return
        places = [(images[k], next(_entries)) for k in kept]
        truths, found = [_flagged(target[k]) for k in kept], [_best(preds[k]) for k in kept]
        self.truths.append(_rows(places, truths, {AREA: "area", FLAG: "flag"}))
        self.detections.append(_rows(places, found, {SCORE: "scores"}))

    def compute(self) -> dict[str, Tensor]:
        """Return `figures` as scalars, the same on every rank."""
        shared = self._is_synced  # the first rank has just been given the rows of all
        told: list[Scores] = [({}, {})]
        self.tables = no_boxes(), no_boxes()
        if not shared or distributed.get_rank(self.process_group) == 0:
            self.tables = _joined(self.truths, self.detections)
            told = [evaluated(*self.tables)]
        if shared:
            distributed.broadcast_object_list(told, group=self.process_group, group_src=0)
        self.figures, self.per_class = told[0]
        return {name: torch.tensor(value) for name, value in self.figures.items()}


def evaluated(truths: Table, detections: Table) -> Scores:
    """Return `figures` and `per_class` of `BoxAveragePrecision`.

    Args:
        truths: (N, 8), see `boxtables`.
        detections: (M, 8).
    """
    coco, voc = coco_evaluation(truths, detections), voc_figures(truths, detections)
    means = {
        name: float(np.mean([row[name] for row in voc.values()])) if voc else -1.0
        for name in VOC_FIGURES
    }
    return coco.figures | means, {node: row | voc[node] for node, row in coco.per_class.items()}


def _check(preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what `BoxAveragePrecision` cannot add."""
    if len(preds) != len(target):
        raise InputError(f"preds are of {len(preds)} images, target of {len(target)}")
    for part, images, wanted in (
        ("preds", preds, ("boxes", "labels", "scores")),
        ("target", target, ("boxes", "labels")),
    ):
        for number, image in enumerate(images):
            if missing := [name for name in wanted if name not in image]:
                raise InputError(f"{part}, image {number}: {', '.join(missing)} missing")
            lengths = {name: len(image[name]) for name in (*wanted, *_OPTIONAL) if name in image}
            if len(set(lengths.values())) > 1:
                raise InputError(f"{part}, image {number}: lengths differ: {lengths}")


def _best(found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the 100 surest detections of an image."""
    if len(found["scores"]) <= MAX_DETECTIONS:
        return found
    best = found["scores"].argsort(descending=True, stable=True)[:MAX_DETECTIONS]
    return {name: found[name][best] for name in ("boxes", "labels", "scores")}


def _flagged(truth: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the truths of an image with an area and a flag each."""
    none = torch.zeros_like(truth["labels"])
    crowd, difficult = (truth.get(name, none).bool() for name in ("iscrowd", "difficult"))
    return {
        "boxes": truth["boxes"],
        "labels": truth["labels"],
        "area": truth.get("area", none),
        "flag": torch.where(crowd, CROWD, difficult * DIFFICULT),
    }


def _rows(
    places: Sequence[tuple[int, int]], images: Sequence[Mapping[str, Tensor]], own: dict[int, str]
) -> Tensor:
    """Return the table of images, on the CPU; `own` names what belongs in which column."""
    counts = torch.tensor([len(image["labels"]) for image in images])
    rows = torch.zeros(int(counts.sum()), COLUMNS + 1, dtype=torch.float64)
    for column, name in {LABEL: "labels", **own}.items():
        rows[:, column] = torch.cat([image[name] for image in images]).cpu()
    rows[:, BOX] = torch.cat([image["boxes"].reshape(-1, 4) for image in images]).cpu()
    numbers = torch.tensor(places, dtype=torch.float64)
    rows[:, [IMAGE, _ENTRY]] = numbers.repeat_interleave(counts, dim=0)
    return rows


def _on_the_first_rank(rows: Tensor, group: Any = None) -> list[Tensor]:
    """Return the rows of every rank on the first one, and none elsewhere."""
    own = rows.cpu().double().reshape(-1, COLUMNS + 1)  # a rank without images has an empty vector
    if distributed.get_rank(group) > 0:
        distributed.gather_object(own.numpy(), group=group, group_dst=0)
        return [own[:0]]
    parts: list[Any] = [None] * distributed.get_world_size(group)
    distributed.gather_object(own.numpy(), parts, group=group, group_dst=0)
    for rank, part in enumerate(parts):
        part[:, _ENTRY] += rank * _ENTRIES_OF_A_RANK
    return [torch.from_numpy(part) for part in parts]


def _joined(*states: list[Tensor] | Tensor) -> tuple[Table, Table]:
    """Return tables in the order of the images, each image once and with an id."""
    empty = torch.zeros(0, COLUMNS + 1, dtype=torch.float64)
    tables = [
        torch.cat([empty, *([state] if isinstance(state, Tensor) else state)]).cpu().numpy()
        for state in states
    ]
    entries, images = np.concatenate([table[:, [_ENTRY, IMAGE]] for table in tables]).T
    entries, first = np.unique(entries, return_index=True)
    images = images[first]
    unnamed = images == _UNNAMED
    images[unnamed] = images.max(initial=-1) + 1 + np.arange(unnamed.sum())
    once = np.zeros(len(images), dtype=np.bool_)
    once[np.unique(images, return_index=True)[1]] = True  # the entry that came first
    joined = []
    for table in tables:
        entry = np.searchsorted(entries, table[:, _ENTRY])
        kept = table[once[entry], :COLUMNS]
        kept[:, IMAGE] = images[entry[once[entry]]]
        joined.append(kept[np.argsort(kept[:, IMAGE], kind="stable")])
    truths, detections = joined
    return truths, detections
