"""Runs side by side: figures by hand, on a store with a few runs."""

import csv
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from yolo_lightning.cli.commands.mlflow import main
from yolo_lightning.errors import InputError
from yolo_lightning.tracking.compare.plot import mean_and_spread, thinned
from yolo_lightning.tracking.compare.runs import Curve, first_difference
from yolo_lightning.tracking.compare.tables import alike, cut

NAN, INF = float("nan"), float("inf")
ALL_BUT_NAN_AND_INF = [(10, 0.2), (20, 0.5), (30, NAN), (40, INF), (50, 0.4)]


def add_run(client, experiment, name, params, metrics, batches=None, tags=(), folder=None):
    """Write a run: metrics are lists of (step, value), later ones with later times."""
    from mlflow.entities import Metric, Param, RunTag

    run_id = client.create_run(experiment, run_name=name).info.run_id
    client.log_batch(
        run_id,
        params=[Param(key, value) for key, value in params.items()],
        tags=[RunTag(key, value) for key, value in dict(tags).items()],
        metrics=[
            Metric(key, value, 1000 + number, step)
            for key, points in metrics.items()
            for number, (step, value) in enumerate(points)
        ],
    )
    if batches is not None:
        file = folder / "steps.crc32"
        np.array(batches, dtype="<u4").tofile(file)
        client.log_artifact(run_id, str(file), "batches")
    client.set_terminated(run_id)
    return run_id


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of known runs, and with one that has none."""
    from mlflow.tracking import MlflowClient  # after the switches that the package sets

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # files of runs go there
        client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        client.search_experiments()
        shutil.copy(folder / "mlflow.db", folder / "empty.db")
        shapes, fruit = client.create_experiment("shapes"), client.create_experiment("fruit")
        parent = add_run(client, shapes, "sweep", {}, {})
        trial = {"recipe": "shapes", "mlflow.parentRunId": parent}
        shared = {"model.momentum": "0.9"}
        a = {**shared, "model.learning_rate": "0.01", "seed_everything": "0"}
        b = {**shared, "model.learning_rate": "0.01", "seed_everything": "1"}
        c = {**shared, "model.learning_rate": "0.02", "seed_everything": "0"}
        # step 10 was trained twice: the later 0.2 counts, not 0.9
        figures = {
            "val/AP50": [(10, 0.9), *ALL_BUT_NAN_AND_INF],
            "train/loss": [(1, 3.0), (2, 1.0), (60, 2.0)],
            "system/cpu": [(900, 1.0)],
        }
        add = add_run
        add(client, shapes, "shapes/a", a, figures, [1, 2, 3, 4], trial, folder)
        add(client, shapes, "shapes/b", b, {"val/AP50": [(10, 0.1), (50, 0.7)]}, [1, 2, 0, 4, 5],
            trial, folder)  # fmt: skip
        add(client, shapes, "shapes/c", c, {"val/AP50": [(50, 0.3)]}, [1, 2, 3, 9],
            {"recipe": "shapes"}, folder)  # fmt: skip
        add(client, fruit, "fruit/e", {**shared, "data.root": "x" * 30 + "y" * 30},
            {"val/AP50": [(7, 0.25)], "val/AP": [(7, NAN)]}, tags={"recipe": "fruit"})  # fmt: skip
        gone = add(client, shapes, "shapes/gone", {}, {"val/AP50": [(1, 0.99)]})
        client.delete_run(gone)
    return folder


@pytest.fixture
def compare(place, tmp_path, monkeypatch, capsys):
    """Run the command on the store; give what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")

    def run(*argv: str) -> str:
        capsys.readouterr()
        main(["compare", *argv])
        return str(capsys.readouterr().out)

    return run


def row_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if name in line.split()]
    return line.split()


def test_best_step_and_last_value_by_hand_and_the_best_run_first(compare):
    text = compare("--experiment", "shapes", "--metric", "val/AP50", "--metric", "train/loss")
    # NaN and infinity are not the best; of the two values of step 10 the later one counts
    assert row_of(text, "shapes/a") == (
        "2 shapes/a finished 60 0.5000 20 0.4000 1.0000 2 2.0000 0.01 0".split()
    )
    assert row_of(text, "shapes/b")[:7] == "1 shapes/b finished 50 0.7000 50 0.7000".split()
    assert row_of(text, "shapes/c")[7:] == "- - - 0.02 0".split()
    assert [line.split()[1] for line in text.splitlines()[1:4]] == [
        "shapes/b", "shapes/a", "shapes/c",
    ]  # fmt: skip


def test_only_what_differs_is_shown_and_neither_deleted_runs_nor_parents(compare):
    text = compare("--experiment", "shapes")
    assert "model.learning_rate" in text
    assert "momentum" not in text
    assert "gone" not in text
    assert "sweep" not in text
    assert "experiment" not in text
    # beside another experiment: its column; without a tag for it, all others have no root
    assert row_of(compare(), "fruit/e")[:4] == ["4", "fruit/e", "fruit", "finished"]


def test_more_parameters_than_fit_get_lines_with_the_numbers_of_their_runs(compare, monkeypatch):
    monkeypatch.setattr("yolo_lightning.tracking.compare.tables.FEW_PARAMS", 1)
    text = compare("--experiment", "shapes")
    assert "  model.learning_rate  0.01 (1, 2);  0.02 (3)" in text
    assert "  seed_everything      0 (2, 3);  1 (1)" in text
    assert "0.02" not in text.split("parameters that differ")[0]


def test_parameters_that_change_together_are_told_once():
    params = {"data.a.seed": ["0", "1"], "data.seed": ["0", "1"], "rate": ["1", "2"]}
    assert alike(params) == {"data.seed": ["data.a.seed"], "rate": []}
    assert alike(params, "data.a.seed") == {"data.a.seed": ["data.seed"], "rate": []}


def test_a_parent_stands_for_its_trials_and_a_run_is_found_by_its_id(compare, place):
    assert [line.split()[1] for line in compare("--run", "sweep").splitlines()[1:3]] == [
        "shapes/a", "shapes/b",
    ]  # fmt: skip
    with (place / "x.csv").open("w+") as handle:
        compare("--experiment", "shapes", "--csv", handle.name)
        (run_id,) = [row["id"] for row in csv.DictReader(handle) if row["run"] == "shapes/c"]
    text = compare("--run", run_id[:8], "--run", "shapes/b")
    assert [line.split()[1] for line in text.splitlines()[1:3]] == ["shapes/c", "shapes/b"]


def test_the_first_step_at_which_runs_read_different_batches(compare):
    two = compare("--run", "shapes/a", "--run", "shapes/c")
    assert "shapes/a and shapes/c: different batches first at step 3\n" in two
    # step 2 was not trained by b, and a has no step 4
    two = compare("--run", "shapes/a", "--run", "shapes/b")
    assert "shapes/a and shapes/b: the same batches in all 3 steps that both trained\n" in two
    every = compare("--run", "sweep", "--run", "shapes/c", "--run", "fruit/e")
    assert "batches, beside those of # 1\n" in every
    assert "the same batches in all 3 steps that both trained: # 2\n" in every
    assert "different batches first at step 3: # 3\n" in every
    assert "batches are not recorded of # 4\n" in every
    assert "batches" not in compare("--run", "shapes/a")
    assert "not recorded of # 2" in compare("--run", "shapes/a", "--run", "fruit/e")


def test_batches_of_steps_that_only_one_run_trained_say_nothing():
    def checks(*values: int) -> np.ndarray:
        return np.array(values, dtype=np.uint32)

    assert first_difference(checks(0, 0, 5), checks(1, 2)) == (None, 0)
    assert first_difference(checks(0, 7, 8, 1), checks(3, 7, 9, 2, 4)) == (2, 3)
    assert first_difference(checks(), checks(1)) == (None, 0)


def test_groups_have_a_mean_and_a_spread_over_their_runs(compare, tmp_path):
    text = compare("--group-by", "recipe", "--csv", "groups.csv")
    # best values 0.5, 0.7, 0.3: deviations of 0.2, by n - 1
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "val/AP50 shapes 3 0.5000 0.2000 0.3000 0.7000" in lines
    assert "val/AP50 fruit 1 0.2500 - 0.2500 0.2500" in lines
    assert "val/AP fruit 0 - - - -" in lines
    assert "differ within a group: model.learning_rate, seed_everything" in text
    rows = list(csv.DictReader((tmp_path / "groups.csv").open()))
    assert float(rows[0]["sd"]) == pytest.approx(0.2)
    assert rows[1]["sd"] == ""
    last = compare("--group-by", "recipe", "--last", "--metric", "val/AP50")
    assert row_of(last, "shapes")[2:4] == ["3", "0.4667"]  # 0.4, 0.7, 0.3


def test_groups_by_a_parameter_are_sorted_by_their_means(compare):
    text = compare("--group-by", "model.learning_rate", "--experiment", "shapes")
    rows = [line.split()[1:4] for line in text.splitlines()[2:4]]
    assert rows == [["0.01", "2", "0.6000"], ["0.02", "1", "0.3000"]]
    text = compare("--group-by", "seed_everything", "--experiment", "shapes", "--max-runs", "2")
    assert "the newest 2 runs; --max-runs 4 shows more" in text
    assert "differ within a group" not in text
    # c has seed 0, b has seed 1
    assert "  model.learning_rate  0.01 (1);  0.02 (0)" in text


def test_a_csv_holds_every_parameter_that_differs_in_full(compare, tmp_path):
    text = compare("--csv", "deep/runs.csv")
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "deep/runs.csv").open())}
    assert rows["fruit/e"]["data.root"] == "x" * 30 + "y" * 30
    assert "xxx…yyy" in text
    assert rows["shapes/a"]["data.root"] == "-"
    assert rows["shapes/a"]["val/AP50 best step"] == "20"
    assert rows["shapes/c"]["val/AP"] == ""


def test_curves_are_drawn_for_runs_and_for_groups(compare, tmp_path):
    for options in ([], ["--group-by", "recipe"]):
        compare("--plot", "deep/curves.png", "--metric", "val/AP50", "--metric", "train/loss",
                *options)  # fmt: skip
        picture = tmp_path / "deep/curves.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()


def curve(*points: tuple[int, float]) -> Curve:
    return Curve(np.array([p[0] for p in points]), np.array([p[1] for p in points]))


def test_the_band_spans_the_steps_that_all_runs_reached():
    steps, mean, spread = mean_and_spread(
        [curve((0, 0.0), (10, 1.0), (20, 3.0)), curve((0, 2.0), (20, 4.0), (30, 9.0))]
    )
    assert steps.tolist() == [0, 10, 20]
    assert mean.tolist() == [1.0, 2.0, 3.5]  # at 10 the second is at 3, half way
    assert spread == pytest.approx([2**0.5, 2**0.5, 0.5**0.5])
    assert not len(mean_and_spread([curve((0, NAN)), curve((0, 1.0))])[0])
    assert mean_and_spread([curve((0, 1.0))])[2].tolist() == [0.0]


def test_many_points_become_means_of_neighbours():
    values = np.arange(450.0)
    values[0], values[449] = NAN, INF
    few, size = thinned(Curve(np.arange(450), values))
    assert (size, len(few.steps)) == (3, 150)
    assert few.values[:2].tolist() == [1.5, 4.0]  # of 1 and 2; of 3, 4 and 5
    assert few.values[-1] == 447.5
    assert few.steps[:2].tolist() == [1, 4]


def test_what_is_long_loses_its_middle():
    assert cut("abcdefghij", 7) == "abc…hij"
    assert cut("abcdefghij", 10) == "abcdefghij"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--experiment", "shape"], "did you mean 'shapes'"),
        (["--metric", "val/AP5"], "did you mean 'val/AP50'"),
        (["--run", "shapes/z"], "did you mean 'shapes/"),
        (["--group-by", "recip"], "did you mean 'recipe'"),
        (["--experiment", "Default"], "no run with a metric in Default"),
        (["--max-runs", "0"], "allowed: 1 or more"),
        (["--plot", "curves.jpg"], "name it FILE.png"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is_near(compare, argv, message):
    with pytest.raises(InputError, match=message):
        compare(*argv)


def test_stores_without_runs_and_stores_that_do_not_answer(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=f"no mlflow.db in {tmp_path}"):
        main(["compare"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'empty.db'}")
    with pytest.raises(InputError, match="no run with a metric in sqlite"):
        main(["compare"])
    (tmp_path / "text.db").write_text("no store of anything")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///text.db")
    with pytest.raises(InputError, match="no store of MLflow"):
        main(["compare"])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    start = time.monotonic()
    with pytest.raises(InputError, match="does not answer"):
        main(["compare"])
    assert time.monotonic() - start < 6


def test_the_overview_and_unknown_words(capsys):
    main([])
    overview = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == overview
    assert all(f"  {name} " in overview for name in ("ui", "sync", "compare", "model"))
    with pytest.raises(InputError, match="did you mean 'compare'"):
        main(["compar"])
    with pytest.raises(InputError, match="allowed: ui, compare, sync, model"):
        main(["zzz"])
