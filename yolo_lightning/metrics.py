"""Average precision over boxes: our own `torchmetrics.Metric`, matching by faster-coco-eval."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

_IMAGE, _LABEL, _SCORE, _FLAG, _BOX = 0, 1, 2, 3, slice(4, 8)
_COLUMNS = 8
_CROWD = 2

MAX_DETECTIONS = 100
_LARGEST_AREA = 1e10


class BoxAveragePrecision(Metric):
    """COCO average precision per class, in px of the original images.

    Images with the id -1, the padding of distributed evaluation, are left out. Ranks that saw no
    image take part in the synchronisation all the same.
    """

    full_state_update = False
    truths: list[Tensor]
    detections: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("truths", default=[], dist_reduce_fx="cat")
        self.add_state("detections", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget everything; a table without rows keeps ranks without images from hanging."""
        super().reset()
        self.truths.append(torch.zeros(0, _COLUMNS, dtype=torch.float64, device=self.device))
        self.detections.append(torch.zeros(0, _COLUMNS, dtype=torch.float64, device=self.device))

    def update(
        self,
        image_id: int,
        boxes_xyxy_orig_px: Tensor,
        labels: Tensor,
        scores: Tensor,
        truth_xyxy_orig_px: Tensor,
        truth_labels: Tensor,
        truth_difficult: Tensor,
        truth_crowd: Tensor | None = None,
    ) -> None:
        """Add one image.

        Args:
            image_id: its index in the source; -1 for padding.
            boxes_xyxy_orig_px: float (N, 4).
            labels: int64 (N,), tree nodes.
            scores: float (N,); of more than 100 detections the best 100 stay.
            truth_xyxy_orig_px: float (M, 4).
            truth_labels: int64 (M,).
            truth_difficult: bool (M,), neither asked for nor punished.
            truth_crowd: bool (M,), those of them that are regions of a crowd: any number of
                detections may lie in one, as far as they are covered by it.
        """
        if image_id < 0:
            return
        best = scores.argsort(descending=True, stable=True)[:MAX_DETECTIONS]
        self.detections.append(
            _table(image_id, boxes_xyxy_orig_px[best], labels[best], _SCORE, scores[best])
        )
        flags = truth_difficult.int()
        if truth_crowd is not None:
            flags = torch.where(truth_crowd, _CROWD, flags)
        self.truths.append(_table(image_id, truth_xyxy_orig_px, truth_labels, _FLAG, flags))

    def compute(self) -> dict[int, dict[str, float]]:
        """Return ``{node: {"AP": …, "AP50": …}}`` for every class that has a truth, 0…1."""
        truths = _joined(self.truths)
        return average_precision(truths, _joined(self.detections)) if len(truths) else {}


def _table(image_id: int, boxes: Tensor, labels: Tensor, column: int, values: Tensor) -> Tensor:
    """Return rows on the device of the boxes, where distributed synchronisation wants them."""
    rows = torch.zeros(len(labels), _COLUMNS, dtype=torch.float64, device=boxes.device)
    rows[:, _IMAGE] = image_id
    rows[:, _LABEL] = labels.double()
    rows[:, column] = values.double()
    rows[:, _BOX] = boxes.double()
    return rows


def _joined(state: list[Tensor] | Tensor) -> NDArray[np.float64]:
    joined = state if isinstance(state, Tensor) else torch.cat(state)
    return np.asarray(joined.cpu().numpy(), dtype=np.float64)


def average_precision(
    truths: NDArray[np.float64], detections: NDArray[np.float64]
) -> dict[int, dict[str, float]]:
    """Return AP (IoU 0.50…0.95) and AP50 of every class with at least one truth.

    Args:
        truths: (N, 8) rows of image, class, 0, flag (1 difficult, 2 crowd), x1, y1, x2, y2.
        detections: (M, 8) rows of image, class, score, 0, x1, y1, x2, y2.
    """
    # imported here: it takes a second, and training starts without it
    from faster_coco_eval import COCO, COCOeval_faster

    classes = sorted({int(label) for label in truths[truths[:, _FLAG] == 0, _LABEL]})
    images = sorted(
        {int(image) for image in truths[:, _IMAGE]} | {int(i) for i in detections[:, _IMAGE]}
    )
    ground_truth = COCO(
        {
            "info": {},
            "images": [{"id": image + 1} for image in images],
            "categories": [{"id": label, "name": str(label)} for label in classes],
            "annotations": _annotations(truths),
        }
    )
    found = COCO(
        {
            "info": {},
            "images": ground_truth.dataset["images"],
            "categories": ground_truth.dataset["categories"],
            "annotations": _annotations(detections),
        }
    )
    evaluation = COCOeval_faster(ground_truth, found, iouType="bbox", print_function=_silent)
    evaluation.params.catIds = classes
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, _LARGEST_AREA]], ["all"]
    evaluation.params.maxDets = [MAX_DETECTIONS]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, 0]  # (IoU, recall, class)
    return {
        label: {
            "AP": float(precision[:, :, k].mean()),
            "AP50": float(precision[0, :, k].mean()),
        }
        for k, label in enumerate(classes)
    }


def _silent(*_: object) -> None:
    """Print nothing."""


def _annotations(rows: NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return COCO annotations; ids and images count from 1, since 0 means none to the matcher."""
    sizes = rows[:, 6:8] - rows[:, 4:6]
    return [
        {
            "id": number,
            "image_id": int(row[_IMAGE]) + 1,
            "category_id": int(row[_LABEL]),
            "bbox": [row[4], row[5], size[0], size[1]],
            # difficult truths lie outside the range of areas: matched by plain IoU, yet not counted
            "area": 10 * _LARGEST_AREA if row[_FLAG] else size[0] * size[1],
            "score": row[_SCORE],
            "iscrowd": int(row[_FLAG] == _CROWD),
        }
        for number, (row, size) in enumerate(zip(rows, sizes, strict=True), start=1)
    ]
