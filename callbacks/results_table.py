"""`ResultsTable`: the figures of each validation, on the screen, in a CSV file and as curves."""

import csv
import gc
import io
import math
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_warn

from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint, is_logged_step
from yolo_lightning.callbacks.training_progress import total_losses
from yolo_lightning.errors import InputError, read_text, write_atomically

_SHOWN = {
    "val/AP50": "AP50",
    "val/AP50_unboxed": "unboxed",
    "val/AP": "AP",
    "val/top1": "top-1",
    "val/top5": "top-5",
}
_NAME = re.compile(r"[\w/]{1,100}")  # of a column
_CURVES_EVERY_S, _FIRST_INTERVAL_S, _MAX_SECONDS = 60.0, 10.0, 1e9

Row = dict[str, float]


class ResultsTable(pl.Callback):
    """Write a row for each validation to ``results.csv`` in the run folder, and print it.

    The columns are ``step``, ``seconds`` of training, the losses, as means over the logged steps
    since the validation before, and the metrics of the validation, without those of single classes.
    A resumed training replaces the rows of steps that it repeats. ``results.png`` shows the curves;
    it is drawn at the end, and before in intervals that grow to a minute. Write errors are
    warnings.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._losses: dict[str, tuple[float, int]] = {}  # sum and number of values
        self._start_s, self._drawn_s = 0.0, -math.inf
        self._seconds_before = 0.0  # of the processes before this one

    @staticmethod
    def path(trainer: pl.Trainer) -> Path:
        """Return the path of the file."""
        return Path(trainer.default_root_dir) / "results.csv"

    def state_dict(self) -> dict[str, Any]:
        """Return the losses since the last validation."""
        return {"losses": {name: list(values) for name, values in self._losses.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the losses since the last validation."""
        losses = state_dict["losses"].items()
        self._losses = {str(name): (float(total), int(count)) for name, (total, count) in losses}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the rows of a resumed training."""
        self._start_s = time.monotonic()
        if trainer.is_global_zero and trainer.ckpt_path and self.path(trainer).is_file():
            try:
                rows = read_rows(self.path(trainer))
            except InputError as error:
                rank_zero_warn(f"results of earlier steps are lost: {error}")
                return
            self.rows = [row for row in rows if row["step"] <= trainer.global_step]
            self._seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add the losses of a logged step."""
        if not (trainer.is_global_zero and is_logged_step(trainer, batch_idx)):
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        saver = next((c for c in callbacks if isinstance(c, LastCheckpoint)), LastCheckpoint())
        for name, value in saver.step_metrics(trainer).items():
            # values of a resumed checkpoint may be anything
            if name.startswith("train/") and "loss" in name and isinstance(value, float):
                total, count = self._losses.get(name, (0.0, 0))
                self._losses[name] = (total + value, count + 1)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print and write the row."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        losses = {name: total / count for name, (total, count) in self._losses.items()}
        self._losses.clear()
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/") and name.count("/") == 1
        }
        seconds = round(self._seconds_before + time.monotonic() - self._start_s, 1)
        row = {"step": trainer.global_step, "seconds": seconds, **losses, **metrics}
        self.rows = [one for one in self.rows if one["step"] < row["step"]] + [row]
        name, best = best_row(self.rows, trainer)
        print(format_row(row, name if best is row else ""), flush=True)
        self._write(trainer)
        # soon again at first, and then less often
        interval_s = min(_CURVES_EVERY_S, self._drawn_s - self._start_s + _FIRST_INTERVAL_S)
        if time.monotonic() - self._drawn_s >= interval_s:
            self._draw(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        try:
            write_atomically(self.path(trainer), format_csv(self.rows))
        except InputError as error:
            rank_zero_warn(str(error))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the curves."""
        self._draw(trainer)

    def summary(self, trainer: pl.Trainer) -> str:
        """Return the last and the best value of the most important metric; empty without one."""
        name, best = best_row(self.rows, trainer)
        if best is None:
            return ""
        value = f"{self.rows[-1].get(name, math.nan):.3f}"
        return (
            f"{name.removeprefix('val/')} {value}; best {best[name]:.3f} at step {best['step']:.0f}"
        )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Draw the curves of a training that is stopped."""
        self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        self._drawn_s = time.monotonic()
        if len(self.rows) < 2:
            return
        import pandas as pd

        from yolo_lightning.visualization.metric_curves import save_curves

        table = pd.DataFrame(self.rows).set_index("step")
        names = [*total_losses(table), *(name for name in _SHOWN if name in table)]
        curves = {name: {"run": table[name].dropna()} for name in names}
        path = self.path(trainer).with_suffix(".png")
        try:
            save_curves(curves, pd.Series({"run": "this training"}), path)
            gc.collect()  # a figure of 15 MB refers to itself
        except Exception as error:  # a failed drawing must not stop training
            rank_zero_warn(f"cannot draw curves: {type(error).__name__}: {error}")


def best_row(rows: list[Row], trainer: pl.Trainer) -> tuple[str, Row | None]:
    """Return the metric that `ModelCheckpoint` monitors, and the first row with its best value.

    Without such a callback, the metric is ``val/AP50`` or ``val/top1``.
    """
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    monitors = [(c.monitor, -1 if c.mode == "min" else 1) for c in savers if c.monitor]
    default = "val/top1" if rows and "val/top1" in rows[-1] else "val/AP50"
    name, sign = (*monitors, (default, 1))[0]
    known = [row for row in rows if not math.isnan(row.get(name, math.nan))]
    return name, max(known, key=lambda row: sign * row[name], default=None)


def format_row(row: Row, best: str) -> str:
    """Return a row for the screen; `best` is the metric of which it has the best value so far."""
    losses = [f"loss {row[name]:<5.3g}" for name in total_losses(row)][:1]
    metrics = [f"{text} {row[name]:.3f}" for name, text in _SHOWN.items() if name in row]
    texts = [f"step {row['step']:>5.0f}", *losses, *metrics, Tqdm.format_interval(row["seconds"])]
    if best:
        texts.append("best" if best in _SHOWN else f"best {best.rpartition('_')[2]}")
    return "  ".join(texts)


def format_csv(rows: list[Row]) -> str:
    """Return rows as CSV; columns are those of all rows, in the order of their first use."""
    file = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(file, list(names), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.0f}" if k == "step" else f"{v:.6g}" for k, v in row.items()})
    return file.getvalue()


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, by ascending step.

    Raises:
        InputError: the file is not one of `format_csv`.
    """
    try:
        rows = [
            {name: float(value) for name, value in row.items() if value and _NAME.fullmatch(name)}
            for row in csv.DictReader(io.StringIO(read_text(path)))
        ]
        valid = [row for row in rows if row["step"] >= 0 and 0 <= row["seconds"] < _MAX_SECONDS]
        return sorted(valid, key=lambda row: row["step"])
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: no table of results ({type(error).__name__})") from None
