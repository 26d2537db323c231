"""Callback that draws predictions on fixed validation images during training."""

import contextlib
from pathlib import Path
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
from yolo_lightning.images import Image, UnreadableSample, decoding_side, fit
from yolo_lightning.tracking.logger import run_loggers
from yolo_lightning.visualization.drawing import draw_boxes, draw_captions, make_grid, save_image

_TILE, _COLUMNS = 320, 4
_GREEN, _ORANGE, _WHITE = (24, 160, 70), (245, 110, 0), (255, 255, 255)
_DASH, _BATCH_SIZE = 6, 4


class PredictionGrid(pl.Callback):
    """Draw predictions and ground truth of the same validation images every n validations.

    The weights are those of the validation. The grid is written to ``predictions.jpg`` in the run
    folder, and logged to every `RunLogger`. Errors become warnings, and random states are restored.

    Args:
        images: number of images, evenly spaced over the validation source.
        every_n_validations: validations from one grid to the next.
        score_threshold: minimum score of drawn predictions, 0…1.

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
        """Return the number of validations so far."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of validations."""
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
        """Draw after the last batch; at the end of the epoch averaged weights are swapped out."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if batch_idx + 1 != trainer.num_val_batches[dataloader_idx]:
            return
        self._validations += 1
        source = getattr(trainer.datamodule, "validation", None)  # type: ignore[attr-defined]
        is_due = self._validations % self.every_n_validations == 0 and trainer.is_global_zero
        if not (is_due and source is not None and isinstance(batch, DetectionBatch)):
            return
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with isolate_rng(include_cuda=False):  # no random numbers on the device
            try:
                image = self._draw(trainer, pl_module, source)
                if image is not None:
                    self._log(trainer, image)
            except Exception as error:  # a failed drawing must not stop training
                rank_zero_warn(f"cannot draw predictions: {type(error).__name__}: {error}")

    def _log(self, trainer: pl.Trainer, image: Image) -> None:
        for logger in run_loggers(trainer):  # at the step of the metrics of this validation
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
            logger.log_image("predictions", image, step)
        save_image(Path(trainer.default_root_dir) / "predictions.jpg", image)

    def _draw(self, trainer: pl.Trainer, module: Any, source: Any) -> Image | None:
        indices = evenly_spaced(self.images, len(source))
        side = max(_TILE, *module.input_size_hw())
        min_side = decoding_side(side, module.hparams["interpolation"])
        samples = _read_samples(source, indices, min_side)
        tiles: list[Image] = []
        for start in range(0, len(samples), _BATCH_SIZE):
            batch = samples[start : start + _BATCH_SIZE]
            fitted, sizes_hw = zip(*(module.preprocess(one.image) for one in batch), strict=True)
            images = torch.stack(fitted).to(module.device)
            with trainer.precision_plugin.val_step_context():
                predictions = module.detect_most_specific(
                    images, torch.tensor(sizes_hw), self.score_threshold
                )
            for sample, predicted in zip(batch, predictions, strict=True):
                names = [module.tree.names[label] for label in sample.labels.tolist()]
                detections = predicted.to_list(module.tree)
                tiles.append(draw_tile(sample.image, sample.boxes_xyxy_px, names, detections))
        legend = (
            f"Step {trainer.global_step}: ground truth dashed green, "
            f"predictions of {self.score_threshold:g} and above solid orange"
        )
        return make_grid(tiles, min(_COLUMNS, len(tiles)), legend) if tiles else None


def _read_samples(source: Any, indices: list[int], min_side: int | None) -> list[Any]:
    """Return the readable ones of some samples, without difficult objects."""
    samples = []
    for index in indices:
        with contextlib.suppress(UnreadableSample):
            sample = source.read(index, min_side)
            samples.append(sample.select(~sample.difficult))
    return samples


def evenly_spaced(max_count: int, size: int) -> list[int]:
    """Return at most `max_count` indices, evenly spaced from 0 to `size` - 1."""
    count = min(max_count, size)
    return [round(k * (size - 1) / max(1, count - 1)) for k in range(count)]


def draw_tile(
    image: Image,
    targets_xyxy_px: NDArray[np.float32],
    names: list[str],
    detections: list[Detection],
) -> Image:
    """Return an image fitted into a square, with its targets and detections, in px of `image`."""
    canvas, scale_xy, margin_xy = fit(image, (_TILE, _TILE))
    canvas, scale, offset = canvas.copy(), np.array([*scale_xy] * 2), np.array([*margin_xy] * 2)
    targets = np.round(targets_xyxy_px * scale + offset).clip(0, _TILE - 1).astype(int).tolist()
    for corners in targets:
        _draw_dashed_box(canvas, corners)
    boxes = np.array([one.box_xyxy_orig_px for one in detections], np.float32).reshape(-1, 4)
    boxes = (boxes * scale + offset).astype(np.float32)
    captions = [f"{one.name} {one.score:.2f}" for one in detections]
    colours = [_ORANGE] * len(detections)
    drawn = draw_boxes(canvas, boxes, [""] * len(detections), colours)
    corners = np.concatenate([boxes.round().astype(int), np.array(targets, int).reshape(-1, 4)])
    draw_captions(drawn, corners, [*captions, *names], [*colours, *[_GREEN] * len(names)])
    return drawn


def _draw_dashed_box(canvas: Image, corners: list[int]) -> None:
    x1, y1, x2, y2 = corners
    cv2.rectangle(canvas, (x1, y1), (x2, y2), _WHITE, 1)
    columns = [x for x in range(x1, x2 + 1) if (x - x1) % (2 * _DASH) <= _DASH]
    rows = [y for y in range(y1, y2 + 1) if (y - y1) % (2 * _DASH) <= _DASH]
    canvas[np.ix_([y1, y2], columns)] = _GREEN
    canvas[np.ix_(rows, [x1, x2])] = _GREEN
