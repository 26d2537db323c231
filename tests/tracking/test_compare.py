"""`mlflow compare`: values computed by hand, on a store with a few runs."""

import csv
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.helpers.tracked import fresh_store
from yolo_lightning.cli.commands.mlflow import main
from yolo_lightning.errors import InputError
from yolo_lightning.tracking.compare import first_difference, merge_equal_params, shorten
from yolo_lightning.visualization.metric_curves import downsample, mean_and_std

NAN, INF = float("nan"), float("inf")
ALL_BUT_NAN_AND_INF = [(10, 0.2), (20, 0.5), (30, NAN), (40, INF), (50, 0.4)]


def add_run(client, experiment, name, params, metrics, batches=None, tags=(), folder=None):
    """Log a run; metrics are lists of (step, value), with increasing timestamps."""
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
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of known runs, and with an empty one."""
    from mlflow.tracking import MlflowClient  # after the package has set environment variables

    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # for the artifacts of runs
        client = MlflowClient(fresh_store(folder))
        shutil.copy(folder / "mlflow.db", folder / "empty.db")
        shapes, fruit = client.create_experiment("shapes"), client.create_experiment("fruit")
        parent = add_run(client, shapes, "sweep", {}, {})
        trial = {"recipe": "shapes", "mlflow.parentRunId": parent}
        shared = {"model.momentum": "0.9"}
        a = {**shared, "model.learning_rate": "0.01", "seed_everything": "0"}
        b = {**shared, "model.learning_rate": "0.01", "seed_everything": "1"}
        c = {**shared, "model.learning_rate": "0.02", "seed_everything": "0"}
        # step 10 was trained twice: the later 0.2 counts, not 0.9
        metrics = {
            "val/AP50": [(10, 0.9), *ALL_BUT_NAN_AND_INF],
            "train/loss": [(1, 3.0), (2, 1.0), (60, 2.0)],
            "system/cpu": [(900, 1.0)],
        }
        add = add_run
        add(client, shapes, "shapes/a", a, metrics, [1, 2, 3, 4], trial, folder)
        add(client, shapes, "shapes/b", b, {"val/AP50": [(10, 0.1), (50, 0.7)]}, [1, 2, 0, 4, 5],
            trial, folder)  # fmt: skip
        add(client, shapes, "shapes/c", c, {"val/AP50": [(50, 0.3)]}, [1, 2, 3, 9],
            {"recipe": "shapes"}, folder)  # fmt: skip
        add(client, fruit, "fruit/e", {**shared, "data.root": "x" * 30 + "y" * 30},
            {"val/AP50": [(7, 0.25)], "val/AP": [(7, NAN)]}, tags={"recipe": "fruit"})  # fmt: skip
        add(client, fruit, "fruit/empty", {}, {})
        deleted = add(client, shapes, "shapes/gone", {}, {"val/AP50": [(1, 0.99)]})
        client.delete_run(deleted)
    return folder


@pytest.fixture
def compare(store_folder, tmp_path, monkeypatch, capsys):
    """Return a function that runs the command on the store and returns its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store_folder / 'mlflow.db'}")

    def run(*argv: str) -> str:
        capsys.readouterr()
        main(["compare", *argv])
        return str(capsys.readouterr().out)

    return run


def row_of(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if name in line.split()]
    return line.split()


def test_best_and_last_values_and_the_order_of_runs(compare):
    text = compare("--experiment", "shapes", "--metric", "val/AP50", "--metric", "train/loss")
    # NaN and infinity are never the best; the later value of step 10 counts
    assert row_of(text, "shapes/a") == (
        "2 shapes/a finished 60 0.5000 20 0.4000 1.0000 2 2.0000 0.01 0".split()
    )
    assert row_of(text, "shapes/b")[:7] == "1 shapes/b finished 50 0.7000 50 0.7000".split()
    assert row_of(text, "shapes/c")[7:] == "- - - 0.02 0".split()
    assert [line.split()[1] for line in text.splitlines()[1:4]] == [
        "shapes/b", "shapes/a", "shapes/c",
    ]  # fmt: skip


def test_equal_parameters_deleted_runs_and_parents_are_not_shown(compare):
    text = compare("--experiment", "shapes")
    assert "model.learning_rate" in text
    assert "momentum" not in text
    assert "gone" not in text
    assert "sweep" not in text
    assert "experiment" not in text
    # runs of two experiments: there is a column for the experiment
    assert row_of(compare(), "fruit/e")[:4] == ["4", "fruit/e", "fruit", "finished"]


def test_many_different_parameters_are_listed_below_the_table(compare, monkeypatch):
    monkeypatch.setattr("yolo_lightning.tracking.compare.MAX_PARAM_COLUMNS", 1)
    text = compare("--experiment", "shapes")
    assert "  model.learning_rate  0.01 (1, 2);  0.02 (3)" in text
    assert "  seed_everything      0 (2, 3);  1 (1)" in text
    assert "0.02" not in text.split("parameters that differ")[0]


def test_parameters_that_change_together_are_merged():
    params = {"data.a.seed": ["0", "1"], "data.seed": ["0", "1"], "rate": ["1", "2"]}
    assert merge_equal_params(params) == {"data.seed": ["data.a.seed"], "rate": []}
    assert merge_equal_params(params, "data.a.seed") == {"data.a.seed": ["data.seed"], "rate": []}


def test_a_parent_selects_its_children_and_an_id_selects_a_run(compare, store_folder):
    assert [line.split()[1] for line in compare("--run", "sweep").splitlines()[1:3]] == [
        "shapes/a", "shapes/b",
    ]  # fmt: skip
    with (store_folder / "x.csv").open("w+") as handle:
        compare("--experiment", "shapes", "--csv", handle.name)
        (run_id,) = [row["id"] for row in csv.DictReader(handle) if row["run"] == "shapes/c"]
    text = compare("--run", run_id[:8], "--run", "shapes/b")
    assert [line.split()[1] for line in text.splitlines()[1:3]] == ["shapes/c", "shapes/b"]


def test_missing_values_differ_from_values_that_are_not_finite(compare):
    text = compare("--run", "fruit/e", "--run", "fruit/empty", "--metric", "val/AP")
    assert row_of(text, "fruit/e")[2:7] == ["finished", "7", "-", "-", "nan"]
    assert row_of(text, "fruit/empty")[2:7] == ["finished", "0", "-", "-", "-"]


def test_first_step_with_different_batches(compare):
    two = compare("--run", "shapes/a", "--run", "shapes/c")
    assert "compared with those of # 1\n  different batches, first at step 3: # 2\n" in two
    # step 2 was not trained by b, and a has no step 4
    two = compare("--run", "shapes/a", "--run", "shapes/b")
    assert "the same batches in all 3 steps that both have trained: # 2\n" in two
    several = compare("--run", "sweep", "--run", "shapes/c", "--run", "fruit/e")
    assert "batches, compared with those of # 1\n" in several
    assert "the same batches in all 3 steps that both have trained: # 2\n" in several
    assert "different batches, first at step 3: # 3\n" in several
    assert "batches are not recorded for # 4\n" in several
    assert "batches" not in compare("--run", "shapes/a")
    assert "not recorded for # 2" in compare("--run", "shapes/a", "--run", "fruit/e")


def test_steps_that_only_one_run_has_trained_are_not_compared():
    def checks(*values: int) -> np.ndarray:
        return np.array(values, dtype=np.uint32)

    assert first_difference(checks(0, 0, 5), checks(1, 2)) == (None, 0)
    assert first_difference(checks(0, 7, 8, 1), checks(3, 7, 9, 2, 4)) == (2, 3)
    assert first_difference(checks(), checks(1)) == (None, 0)


def test_groups_have_mean_and_standard_deviation(compare, tmp_path):
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


def test_groups_by_a_parameter_are_sorted_by_mean(compare):
    text = compare("--group-by", "model.learning_rate", "--experiment", "shapes")
    rows = [line.split()[1:4] for line in text.splitlines()[2:4]]
    assert rows == [["0.01", "2", "0.6000"], ["0.02", "1", "0.3000"]]
    text = compare("--group-by", "seed_everything", "--experiment", "shapes", "--max-runs", "2")
    assert "the newest 2 runs; use --max-runs 4 to show more" in text
    assert "differ within a group" not in text
    # c has seed 0, b has seed 1
    assert "  model.learning_rate  0.01 (1);  0.02 (0)" in text


def test_csv_has_all_different_parameters_in_full(compare, tmp_path):
    text = compare("--csv", "deep/runs.csv")
    rows = {row["run"]: row for row in csv.DictReader((tmp_path / "deep/runs.csv").open())}
    assert rows["fruit/e"]["data.root"] == "x" * 30 + "y" * 30
    assert "xxx…yyy" in text
    assert rows["shapes/a"]["data.root"] == "-"
    assert rows["shapes/a"]["val/AP50 best step"] == "20"
    assert rows["shapes/c"]["val/AP"] == ""


def test_plots_of_runs_and_groups(compare, tmp_path):
    for options in ([], ["--group-by", "recipe"]):
        compare("--plot", "deep/curves.png", "--metric", "val/AP50", "--metric", "train/loss",
                *options)  # fmt: skip
        picture = tmp_path / "deep/curves.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()


def curve(*points: tuple[int, float]) -> pd.Series:
    return pd.Series(dict(points))


def test_mean_and_std_cover_the_steps_of_all_runs():
    steps, mean, std = mean_and_std(
        [curve((0, 0.0), (10, 1.0), (20, 3.0)), curve((0, 2.0), (20, 4.0), (30, 9.0))]
    )
    assert steps.tolist() == [0, 10, 20]
    assert mean.tolist() == [1.0, 2.0, 3.5]  # at 10 the second is at 3, half way
    assert std == pytest.approx([2**0.5, 2**0.5, 0.5**0.5])
    assert not len(mean_and_std([curve((0, NAN)), curve((0, 1.0))])[0])
    assert mean_and_std([curve((0, 1.0))])[2].tolist() == [0.0]


def test_downsample_averages_neighbouring_points():
    values = np.arange(450.0)
    values[0], values[449] = NAN, INF
    few, size = downsample(pd.Series(values))
    assert (size, len(few)) == (3, 150)
    assert few.to_numpy()[:2].tolist() == [1.5, 4.0]  # of 1 and 2; of 3, 4 and 5
    assert few.iloc[-1] == 447.5
    assert few.index[:2].tolist() == [1, 4]


def test_shorten_replaces_the_middle():
    assert shorten("abcdefghij", 7) == "abc…hij"
    assert shorten("abcdefghij", 10) == "abcdefghij"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--experiment", "shape"], "did you mean 'shapes'"),
        (["--metric", "val/AP5"], "did you mean 'val/AP50'"),
        (["--run", "shapes/z"], "did you mean 'shapes/"),
        (["--group-by", "recip"], "did you mean 'recipe'"),
        (["--experiment", "Default"], "no run with a metric in Default"),
        (["--max-runs", "0"], "allowed: 1 or more"),
        (["--plot", "curves.jpg"], "use a name FILE.png"),
    ],
)
def test_unknown_names_raise_with_a_suggestion(compare, argv, message):
    with pytest.raises(InputError, match=message):
        compare(*argv)


def test_empty_and_unreachable_stores_raise(store_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match=f"no mlflow.db in {tmp_path}"):
        main(["compare"])
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store_folder / 'empty.db'}")
    with pytest.raises(InputError, match="no run with a metric in sqlite"):
        main(["compare"])
    (tmp_path / "text.db").write_text("no store of anything")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///text.db")
    with pytest.raises(InputError, match="not an MLflow store"):
        main(["compare"])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    start = time.monotonic()
    with pytest.raises(InputError, match="unreachable"):
        main(["compare"])
    assert time.monotonic() - start < 6


def test_usage_and_unknown_commands(capsys):
    main([])
    overview = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == overview
    assert all(f"  {name} " in overview for name in ("ui", "sync", "compare", "model"))
    with pytest.raises(InputError, match="did you mean 'compare'"):
        main(["compar"])
    with pytest.raises(InputError, match="allowed: ui, compare, sync, model"):
        main(["zzz"])
