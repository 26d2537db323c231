"""`ResultsTable`: one row for each validation, and what it does with bad files."""

import csv
import math
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.helpers.training import train
from yolo_lightning.callbacks.results_table import (
    ResultsTable,
    best_row,
    format_csv,
    format_row,
    read_rows,
)
from yolo_lightning.errors import InputError


class Losses(pl.Callback):
    """Records the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def test_a_row_holds_means_of_losses_and_metrics(tmp_path, capsys):
    losses, table = Losses(), ResultsTable()
    trainer = train([losses, table], log_every_n_steps=1, default_root_dir=tmp_path)
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    for k, row in enumerate(rows):
        mean = (losses.values[2 * k] + losses.values[2 * k + 1]) / 2
        assert float(row["train/loss"]) == pytest.approx(mean, rel=1e-5)
    assert not [name for name in rows[0] if name.count("/") > 1], "no columns of single classes"
    assert {"seconds", "train/loss_coord", "val/AP50", "val/AP"} <= set(rows[0])
    last = float(trainer.callback_metrics["val/AP50"])
    assert float(rows[-1]["val/AP50"]) == pytest.approx(last, rel=1e-5)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in printed] == ["2", "4", "6"]
    assert printed[0].endswith("best")
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_a_full_disk_is_a_warning(tmp_path):
    for name in ("results.csv", "results.png"):
        (tmp_path / name).mkdir()
    with (
        pytest.warns(UserWarning, match="results.csv' cannot be written"),
        pytest.warns(UserWarning, match="cannot draw curves: InputError: "),
    ):
        trainer = train([ResultsTable()], default_root_dir=tmp_path)
    assert trainer.global_step == 6


@pytest.mark.parametrize(
    "options", [{"num_sanity_val_steps": -1, "max_steps": 1}, {"fast_dev_run": True}]
)
def test_nothing_is_written_without_a_validation(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    train([ResultsTable()], **options)
    assert not list(tmp_path.glob("results.*"))


def rows_of(*values: float, name: str = "val/AP50") -> list[dict[str, float]]:
    return [{"step": k, "seconds": k, name: value} for k, value in enumerate(values)]


@pytest.mark.parametrize(
    ("saver", "values", "step"),
    [
        (None, (0.1, 0.3, 0.3), 1),  # the first of equals
        (None, (math.nan, 0.3, math.nan), 1),
        (None, (math.nan,), None),
        (None, (), None),
        (ModelCheckpoint(monitor="val/AP50", mode="min"), (0.2, 0.1, 0.3), 1),
        (ModelCheckpoint(monitor="val/AP50_boxed", mode="max"), (0.2, 0.1), None),
        (ModelCheckpoint(), (0.2, 0.1), 0),
    ],
)
def test_the_best_row_is_that_of_the_checkpoint(saver, values, step):
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[saver] if saver else [])
    _, best = best_row(rows_of(*values), trainer)
    assert (best and best["step"]) == step


def test_rows_for_the_screen_fit_into_80_columns():
    row = {"step": 99999, "seconds": 3599, "train/loss": 123.4567, "val/AP": 0.5}
    row |= {"val/AP50": 1.0, "val/AP50_unboxed": 0.25, "val/AP50_boxed": 0.125}
    assert format_row(row, "val/AP50_boxed") == (
        "step 99999  loss 123    AP50 1.000  unboxed 0.250  AP 0.500  59:59  best boxed"
    )
    labels = {"step": 10, "seconds": 61, "train/loss_class": 2.0, "val/top1": 0.5, "val/top5": 1}
    assert format_row(labels, "val/top1") == (
        "step    10  loss 2      top-1 0.500  top-5 1.000  01:01  best"
    )


def test_csv_is_read_as_it_was_written(tmp_path):
    rows = [{"step": 12_345_678, "seconds": 1.5, "train/loss": 0.1}, *rows_of(0.5)]
    path = tmp_path / "results.csv"
    path.write_text(format_csv(rows))
    assert path.read_text().splitlines() == [
        "step,seconds,train/loss,val/AP50", "12345678,1.5,0.1,", "0,0,,0.5",
    ]  # fmt: skip
    assert read_rows(path) == [rows[1], rows[0]]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("step,seconds,=cmd|'/c calc'!A1,\x1b[31m\n1,2,3,4\n", [{"step": 1, "seconds": 2}]),
        ("step,seconds\nnan,1\n1,inf\n-1,1\n2,-1\n3,nan\n", []),
        ("step,seconds\n1,2,3\n", None),
        ("step,seconds\n1,=x\n", None),
        ("seconds\n1\n", None),
        ('step,seconds\n1,"' + "9" * 200_000 + '"\n', None),
        ("", []),
    ],
)
def test_a_table_of_somebody_else_is_checked(tmp_path, text, rows):
    path = tmp_path / "results.csv"
    path.write_text(text)
    if rows is None:
        with pytest.raises(InputError, match=r"results\.csv: no table of results"):
            read_rows(path)
    else:
        assert read_rows(path) == rows
