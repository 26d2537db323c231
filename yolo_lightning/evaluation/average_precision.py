"""Average precision of boxes as a `torchmetrics.Metric`, matched by faster-coco-eval."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torchmetrics import Metric

from yolo_lightning.errors import InputError
from yolo_lightning.evaluation.coco import Scores, evaluate_coco
from yolo_lightning.evaluation.matching import (
    AREA,
    BOX,
    CROWD,
    DIFFICULT,
    FLAG,
    IMAGE,
    LABEL,
    NUM_COLUMNS,
    SCORE,
    Table,
    empty_table,
)
from yolo_lightning.evaluation.voc import VOC_METRICS, evaluate_voc

MAX_DETECTIONS = 100
PADDING = -1  # image id of padding, which gives all ranks equally many images

_OPTIONAL = ("iscrowd", "difficult", "area")
_NO_ID = -2
# a column after those of `matching`: a number for each image of each update, which separates images
# without an id and images with equal ids
_ENTRY = NUM_COLUMNS
_entries = itertools.count()
_ENTRIES_PER_RANK = 2**40


class BoxAveragePrecision(Metric):
    """Average precision of COCO and Pascal VOC, on boxes in px of the original images.

    Takes the same input as torchmetrics' `MeanAveragePrecision`. The 100 highest-scoring detections
    of each image are kept, on the CPU. In distributed runs rank 0 computes and broadcasts.

    Attributes:
        results: `COCO_METRICS` and `VOC_METRICS` of the last `compute`; -1 if undefined.
        per_class: AP, AP50, AP75 and `VOC_METRICS`, 0…1, of every class with a target, by node.
        tables: targets and detections by ascending image id, see `matching`; empty on ranks > 0.
    """

    full_state_update = False
    targets: list[Tensor]
    detections: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dist_sync_fn=_gather_on_rank_zero, **kwargs)
        self.results: dict[str, float] = {}
        self.per_class: dict[int, dict[str, float]] = {}
        self.tables: tuple[Table, Table] = empty_table(), empty_table()
        self.add_state("targets", default=[], dist_reduce_fx="cat")
        self.add_state("detections", default=[], dist_reduce_fx="cat")

    def update(
        self, preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Any]]
    ) -> None:
        """Add images.

        Args:
            preds: for each image `boxes`, float (N, 4), corners in px; `labels`, int64 (N,);
                `scores`, float (N,).
            target: for each image `boxes` (M, 4) and `labels` (M,); optionally `iscrowd` (M,), as
                in COCO; `difficult` (M,), ignored as in Pascal VOC; `area` (M,), square px, 0 for
                the area of the box; `image_id`, an int. Images with equal ids count once, over all
                ranks; -1 is padding and does not count; images without an id all count.

        Raises:
            InputError: a value is missing, or the values of an image differ in length.
        """
        _check(preds, target)
        image_ids = [int(image.get("image_id", _NO_ID)) for image in target]
        rows = [k for k, image_id in enumerate(image_ids) if image_id != PADDING]
        if not rows:
            return
        ids = [(image_ids[k], next(_entries)) for k in rows]
        targets, detections = [_with_flags(target[k]) for k in rows], [_top(preds[k]) for k in rows]
        self.targets.append(_to_table(ids, targets, {AREA: "area", FLAG: "flag"}))
        self.detections.append(_to_table(ids, detections, {SCORE: "scores"}))

    def compute(self) -> dict[str, Tensor]:
        """Return `results` as scalars, equal on every rank."""
        synced = self._is_synced  # then rank 0 holds the rows of all ranks
        scores = [Scores({}, {})]
        self.tables = empty_table(), empty_table()
        if not synced or distributed.get_rank(self.process_group) == 0:
            self.tables = _merge(self.targets, self.detections)
            scores = [evaluate_tables(*self.tables)]
        if synced:
            distributed.broadcast_object_list(scores, group=self.process_group, group_src=0)
        self.results, self.per_class = scores[0]
        return {name: torch.tensor(value) for name, value in self.results.items()}


def evaluate_tables(targets: Table, detections: Table) -> Scores:
    """Return `results` and `per_class` of `BoxAveragePrecision`."""
    coco, voc = evaluate_coco(targets, detections), evaluate_voc(targets, detections)
    means = {
        name: float(np.mean([row[name] for row in voc.values()])) if voc else -1.0
        for name in VOC_METRICS
    }
    per_class = {node: row | voc[node] for node, row in coco.per_class.items()}
    return Scores(coco.metrics | means, per_class)


def _check(preds: Sequence[Mapping[str, Tensor]], target: Sequence[Mapping[str, Any]]) -> None:
    if len(preds) != len(target):
        raise InputError(f"preds has {len(preds)} images, target has {len(target)}")
    for argument, images, required in (
        ("preds", preds, ("boxes", "labels", "scores")),
        ("target", target, ("boxes", "labels")),
    ):
        for number, image in enumerate(images):
            if missing := [name for name in required if name not in image]:
                raise InputError(f"{argument}, image {number}: {', '.join(missing)} missing")
            lengths = {name: len(image[name]) for name in (*required, *_OPTIONAL) if name in image}
            if len(set(lengths.values())) > 1:
                raise InputError(f"{argument}, image {number}: lengths differ: {lengths}")


def _top(preds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if len(preds["scores"]) <= MAX_DETECTIONS:
        return preds
    top = preds["scores"].argsort(descending=True, stable=True)[:MAX_DETECTIONS]
    return {name: preds[name][top] for name in ("boxes", "labels", "scores")}


def _with_flags(target: Mapping[str, Any]) -> Mapping[str, Tensor]:
    zeros = torch.zeros_like(target["labels"])
    crowd, difficult = (target.get(name, zeros).bool() for name in ("iscrowd", "difficult"))
    return {
        "boxes": target["boxes"],
        "labels": target["labels"],
        "area": target.get("area", zeros),
        "flag": torch.where(crowd, CROWD, difficult * DIFFICULT),
    }


def _to_table(
    ids: Sequence[tuple[int, int]], images: Sequence[Mapping[str, Tensor]], columns: dict[int, str]
) -> Tensor:
    """Return the boxes of images as a table on the CPU, with values in the named columns."""
    counts = torch.tensor([len(image["labels"]) for image in images])
    rows = torch.zeros(int(counts.sum()), NUM_COLUMNS + 1, dtype=torch.float64)
    for column, name in {LABEL: "labels", **columns}.items():
        rows[:, column] = torch.cat([image[name] for image in images]).cpu()
    rows[:, BOX] = torch.cat([image["boxes"].reshape(-1, 4) for image in images]).cpu()
    numbers = torch.tensor(ids, dtype=torch.float64)
    rows[:, [IMAGE, _ENTRY]] = numbers.repeat_interleave(counts, dim=0)
    return rows


def _gather_on_rank_zero(rows: Tensor, group: Any = None) -> list[Tensor]:
    # the state of a rank without images is an empty vector
    local = rows.cpu().double().reshape(-1, NUM_COLUMNS + 1)
    if distributed.get_rank(group) > 0:
        distributed.gather_object(local.numpy(), group=group, group_dst=0)
        return [local[:0]]
    parts: list[Any] = [None] * distributed.get_world_size(group)
    distributed.gather_object(local.numpy(), parts, group=group, group_dst=0)
    for rank, part in enumerate(parts):
        part[:, _ENTRY] += rank * _ENTRIES_PER_RANK
    return [torch.from_numpy(part) for part in parts]


def _merge(*states: list[Tensor] | Tensor) -> tuple[Table, Table]:
    """Return targets and detections sorted by image, each image once and with an id."""
    empty = torch.zeros(0, NUM_COLUMNS + 1, dtype=torch.float64)
    tables = [
        torch.cat([empty, *([state] if isinstance(state, Tensor) else state)]).cpu().numpy()
        for state in states
    ]
    entries, images = np.concatenate([table[:, [_ENTRY, IMAGE]] for table in tables]).T
    entries, first = np.unique(entries, return_index=True)
    images = images[first]
    without_id = images == _NO_ID
    images[without_id] = images.max(initial=-1) + 1 + np.arange(without_id.sum())
    is_first = np.zeros(len(images), dtype=np.bool_)
    is_first[np.unique(images, return_index=True)[1]] = True
    merged = []
    for table in tables:
        entry = np.searchsorted(entries, table[:, _ENTRY])
        rows = table[is_first[entry], :NUM_COLUMNS]
        rows[:, IMAGE] = images[entry[is_first[entry]]]
        merged.append(rows[np.argsort(rows[:, IMAGE], kind="stable")])
    targets, detections = merged
    return targets, detections
