"""`BatchDigests`: a digest per step."""

from contextlib import nullcontext
from pathlib import Path
from typing import IO

import lightning.pytorch as pl
import numpy as np
import pytest
import yaml

from tests.helpers import training
from tests.helpers.recipes import QUICK, TINY, quickstart_values
from yolo_lightning.callbacks import BatchDigests
from yolo_lightning.cli.main import main

pytestmark = pytest.mark.end_to_end


@pytest.mark.parametrize("fails", [False, True])
def test_a_digest_is_on_disk_after_its_step_and_the_file_is_opened_once(
    tmp_path, monkeypatch, fails
):
    opened: list[IO[bytes]] = []
    found: list[int] = []
    open_file = BatchDigests._open

    def counted(self: BatchDigests, trainer: pl.Trainer) -> IO[bytes]:
        opened.append(open_file(self, trainer))
        return opened[-1]

    class Reader(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            found.append(len(digests(tmp_path)))
            if fails and len(found) == 3:
                raise ValueError("as any failure")

    monkeypatch.setattr(BatchDigests, "_open", counted)
    with pytest.raises(ValueError, match="any failure") if fails else nullcontext():
        training.train([BatchDigests(), Reader()], loggers=[], default_root_dir=tmp_path)
    assert found == list(range(1, len(found) + 1))
    assert len(found) == (3 if fails else 6)
    assert [file.closed for file in opened] == [True]


def digests(folder: Path) -> list[int]:
    return [int(one) for one in np.fromfile(folder / "batches/steps.crc32", "<u4")]


def train(workplace, *options: str, recipe: str = QUICK[1]):
    """Train, and return the run folder and its digests."""
    before = set(workplace.glob("outputs/quickstart/*"))
    assert main(["fit", "--config", recipe, *TINY, *options]) == 0
    (folder,) = set(workplace.glob("outputs/quickstart/*")) - before or before
    return folder, digests(folder)


@pytest.mark.slow
def test_digests_depend_on_image_size_samples_and_sources(workplace):
    _, first = train(workplace)
    assert len(first) == len(set(first)) == 4
    assert 0 not in first
    assert train(workplace, "--model.learning_rate=0.5")[1] == first
    recipe = yaml.safe_dump(quickstart_values())
    assert "- 96\n" in recipe
    (workplace / "quickstart.yaml").write_text(recipe.replace("- 96\n", "- 64\n"))
    assert not set(train(workplace, recipe="quickstart.yaml")[1]) & set(first)
    # other labels, the same boxes: every second batch holds labels
    other = train(workplace, "--data.classification.seed=7")[1]
    assert [a == b for a, b in zip(first, other, strict=True)] == [True, False, True, False]
    # four batches of eight images: one may be equal by chance, but not four
    other = train(workplace, "--data.seed=7")[1]
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 2


@pytest.mark.slow
def test_a_resumed_run_overwrites_digests_with_equal_values(workplace):
    folder, first = train(workplace)
    path = folder / "batches/steps.crc32"
    longer = train(workplace, "--trainer.max_steps=6")[1]
    path.write_bytes(path.read_bytes()[:8] + bytes(8))  # as after an earlier kill
    last = folder / "checkpoints/last.ckpt"
    main(["fit", *QUICK, *TINY, "--trainer.max_steps=6", f"--ckpt_path={last}"])
    assert digests(folder)[:2] == first[:2]
    assert digests(folder)[4:] == longer[4:]
    (logged,) = (workplace / "mlruns").glob(f"*/{run_id_of(folder)}/artifacts/batches/steps.crc32")
    assert logged.read_bytes() == path.read_bytes()


def run_id_of(folder: Path) -> str:
    return (folder / "mlflow_run_id").read_text()
