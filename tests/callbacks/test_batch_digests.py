"""What each step read, as numbers that two runs can be compared by."""

from pathlib import Path

import numpy as np

from tests.helpers.paths import REPO
from tests.helpers.recipes import QUICK, TINY
from yolo_lightning.cli.main import main


def digests(folder: Path) -> list[int]:
    return [int(one) for one in np.fromfile(folder / "batches/steps.crc32", "<u4")]


def trained(workplace, *options: str, recipe: str = QUICK[1]):
    """Train, and return the run's folder and its digests."""
    before = set(workplace.glob("outputs/quickstart/*"))
    assert main(["fit", "--config", recipe, *TINY, *options]) == 0
    (folder,) = set(workplace.glob("outputs/quickstart/*")) - before or before
    return folder, digests(folder)


def test_runs_read_the_same_up_to_where_sizes_samples_or_sources_differ(workplace):
    _, first = trained(workplace)
    assert len(first) == len(set(first)) == 4
    assert 0 not in first
    assert trained(workplace, "--model.learning_rate=0.5")[1] == first
    recipe = (REPO / "recipes/quickstart.yaml").read_text()
    (workplace / "quickstart.yaml").write_text(recipe.replace("sizes: [96]", "sizes: [64]"))
    assert not set(trained(workplace, recipe="quickstart.yaml")[1]) & set(first)
    # other labels, the same boxes: every second batch holds labels
    other = trained(workplace, "--data.classification.seed=7")[1]
    assert [a == b for a, b in zip(first, other, strict=True)] == [True, False, True, False]
    # four pairs of eight images: one may come again by chance, four do not
    other = trained(workplace, "--data.seed=7")[1]
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 2


def test_a_resumed_run_writes_the_same_numbers_over_the_same_places(workplace):
    folder, first = trained(workplace)
    path = folder / "batches/steps.crc32"
    longer = trained(workplace, "--trainer.max_steps=6")[1]
    path.write_bytes(path.read_bytes()[:8] + bytes(8))  # as one that was killed earlier has it
    last = folder / "checkpoints/last.ckpt"
    main(["fit", *QUICK, *TINY, "--trainer.max_steps=6", f"--ckpt_path={last}"])
    assert digests(folder)[:2] == first[:2]
    assert digests(folder)[4:] == longer[4:]
    (logged,) = (workplace / "mlruns").glob(f"*/{run_of(folder)}/artifacts/batches/steps.crc32")
    assert logged.read_bytes() == path.read_bytes()


def run_of(folder: Path) -> str:
    return (folder / "mlflow_run_id").read_text()
