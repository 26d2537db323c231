"""Pictures of what the detector finds on the same validation images, as training goes on."""

import contextlib
from typing import Any

import cv2
import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from numpy.typing import NDArray

from yolo_lightning.batches import DetectionBatch
from yolo_lightning.detections import Detection
from yolo_lightning.errors import InputError
from yolo_lightning.images import Image, UnreadableSample
from yolo_lightning.tracking.logger import run_loggers
from yolo_lightning.visualization.drawing import draw_boxes, grid

_TILE, _COLUMNS, _PAPER = 320, 4, 228
_GREEN, _ORANGE, _WHITE = (24, 160, 70), (245, 110, 0), (255, 255, 255)
_FONT, _TEXT_SCALE, _DASH = cv2.FONT_HERSHEY_SIMPLEX, 0.4, 6
_AT_ONCE = 4


class PredictionGrid(pl.Callback):
    """Draw predictions and truths of the same validation images after every few validations.

    The images lie evenly over the validation source; those that cannot be read are left out. The
    weights are those that the validation measures, averaged ones too. The picture goes to every
    `RunLogger`; without one, and for classifiers, nothing is done. Training is as without it: what
    goes wrong here is a warning, and random numbers stay as they are.

    Args:
        images: how many to draw.
        every_n_validations: validations from one picture to the next.
        score_threshold: the least score that is drawn, 0…1.

    Raises:
        InputError: a value out of range.
    """

    def __init__(
        self, images: int = 12, every_n_validations: int = 1, score_threshold: float = 0.25
    ) -> None:
        for name, value in (("images", images), ("every_n_validations", every_n_validations)):
            if value < 1:
                raise InputError(f"PredictionGrid: {name} is {value}; allowed: 1 or more")
        if not 0 <= score_threshold <= 1:
            raise InputError(
                f"PredictionGrid: score_threshold is {score_threshold:g}; allowed: 0 … 1"
            )
        self.images, self.every_n_validations = images, every_n_validations
        self.score_threshold = score_threshold
        self._validations = 0

    def state_dict(self) -> dict[str, Any]:
        """Return how many validations there were, for a resumed training to go on counting."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._validations = state_dict["validations"]

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw after the last batch: once the epoch has ended, averaged weights are gone."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if batch_idx + 1 != trainer.num_val_batches[dataloader_idx]:
            return
        self._validations += 1
        loggers = run_loggers(trainer)
        source = getattr(trainer.datamodule, "validation", None)  # type: ignore[attr-defined]
        due = self._validations % self.every_n_validations == 0 and trainer.is_global_zero
        if not (due and loggers and source is not None and isinstance(batch, DetectionBatch)):
            return
        with isolate_rng(include_cuda=False):  # nothing here draws on a device
            try:
                picture = self._picture(trainer, pl_module, source)
            except Exception as error:  # a picture may fail, training may not
                rank_zero_warn(f"no picture of predictions: {type(error).__name__}: {error}")
                return
        if picture is not None:
            for logger in loggers:  # where the figures of the same validation stand
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_picture("predictions", picture, step)

    def _picture(self, trainer: pl.Trainer, module: Any, source: Any) -> Image | None:
        """Return the grid, None where no image can be read."""
        places = evenly(self.images, len(source))
        tiles: list[Image] = []
        for start in range(0, len(places), _AT_ONCE):
            samples = _readable(source, places[start : start + _AT_ONCE], module.size_hw())
            if not samples:
                continue
            fitted, sizes_hw = zip(*(module.fitted(one.image) for one in samples), strict=True)
            images = torch.stack(fitted).to(module.device)
            with trainer.precision_plugin.val_step_context():
                found = module.describe(images, torch.tensor(sizes_hw), self.score_threshold)
            for sample, predicted in zip(samples, found, strict=True):
                names = [module.tree.names[label] for label in sample.labels.tolist()]
                told = predicted.told(module.tree)
                tiles.append(tile(sample.image, sample.boxes_xyxy_px, names, told))
        legend = (
            f"Step {trainer.global_step}: truths dashed green, "
            f"predictions of {self.score_threshold:g} and above solid orange"
        )
        return grid(tiles, min(_COLUMNS, len(tiles)), legend) if tiles else None


def _readable(source: Any, places: list[int], size_hw: tuple[int, int]) -> list[Any]:
    """Return the samples that can be read, without what an evaluation does not ask for."""
    samples = []
    for index in places:
        with contextlib.suppress(UnreadableSample):
            sample = source.read(index, max(_TILE, *size_hw))
            samples.append(sample.chosen(~sample.difficult))
    return samples


def evenly(wanted: int, size: int) -> list[int]:
    """Return the numbers of at most `wanted` of `size` things, from the first to the last."""
    count = min(wanted, size)
    return [round(k * (size - 1) / max(1, count - 1)) for k in range(count)]


def tile(
    image: Image,
    truths_xyxy_px: NDArray[np.float32],
    names: list[str],
    found: list[Detection],
) -> Image:
    """Return an image fitted into a square, with what it shows and what was found in it.

    Args:
        image: uint8 (H, W, 3), RGB.
        truths_xyxy_px: float (N, 4), px of `image`.
        names: of the truths.
        found: in px of `image`.
    """
    height, width = image.shape[:2]
    scale = _TILE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (_TILE - size[0]) // 2, (_TILE - size[1]) // 2
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    canvas = np.full((_TILE, _TILE, 3), _PAPER, np.uint8)
    canvas[top : top + size[1], left : left + size[0]] = cv2.resize(
        image, size, interpolation=method
    )
    offset = np.array([left, top, left, top])
    placed = np.round(truths_xyxy_px * scale + offset).clip(0, _TILE - 1).astype(int).tolist()
    for corners in placed:
        _dash(canvas, corners)
    boxes = np.array([one.box_xyxy_orig_px for one in found], np.float32).reshape(-1, 4)
    captions = [f"{one.name} {one.score:.2f}" for one in found]
    drawn = draw_boxes(
        canvas, (boxes * scale + offset).astype(np.float32), captions, [_ORANGE] * len(found)
    )
    for corners, name in zip(placed, names, strict=True):  # last, so that no line crosses them
        _name(drawn, corners, name)
    return drawn


def _dash(canvas: Image, corners: list[int]) -> None:
    """Draw a box in green dashes with white between them, which is seen on every ground."""
    x1, y1, x2, y2 = corners
    cv2.rectangle(canvas, (x1, y1), (x2, y2), _WHITE, 1)
    for x in range(x1, x2, 2 * _DASH):
        for y in (y1, y2):
            cv2.line(canvas, (x, y), (min(x + _DASH, x2), y), _GREEN, 1)
    for y in range(y1, y2, 2 * _DASH):
        for x in (x1, x2):
            cv2.line(canvas, (x, y), (x, min(y + _DASH, y2)), _GREEN, 1)


def _name(canvas: Image, corners: list[int], name: str) -> None:
    """Write what a truth is at the foot of its box."""
    x1, _, _, y2 = corners
    (width, height), _ = cv2.getTextSize(name, _FONT, _TEXT_SCALE, 1)
    left = max(0, min(x1, _TILE - width - 2))
    cv2.rectangle(canvas, (left, y2 - height - 4), (left + width + 2, y2), _GREEN, -1)
    cv2.putText(canvas, name, (left + 1, y2 - 2), _FONT, _TEXT_SCALE, _WHITE, 1, cv2.LINE_AA)
