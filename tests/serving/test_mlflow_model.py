"""MLflow models: what a folder holds, what it answers, and its place in a run."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from tests.helpers import miniatures
from tests.helpers.images import exif_of
from tests.helpers.paths import REPO
from tests.helpers.trees import BACKBONE, TREE
from yolo_lightning import ClassifierModule, DetectorModule, load
from yolo_lightning.checkpoints.io import load_file
from yolo_lightning.cli.commands.mlflow.model import main
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import checkpoint_of
from yolo_lightning.inference.classification import classify, read_image
from yolo_lightning.serving.mlflow_model import REQUIREMENTS, log_model, register, save_model

THRESHOLD = 0.05


def write_checkpoint(path: Path, module: Any, **beside: Any) -> Path:
    """Write a checkpoint with what a resume needs, as training does."""
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    resume = {"optimizer_states": [weights], "loops": {}, "callbacks": {}, "global_step": 40}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**checkpoint_of(module, {}), **resume, **beside}, path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint, its model, and images."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(3)
    module = DetectorModule(
        tree=TREE, anchors_wh_cell=[(0.6, 0.6), (2.0, 1.4)], backbone=BACKBONE, head_channels=0,
        passthrough_channels=0, image_size=96, iou_threshold=0.4,
    )  # fmt: skip
    with torch.no_grad():
        module.network.box_conv.weight.mul_(40)
        module.network.class_weight.mul_(40)
        module.network.class_bias.copy_(torch.randn_like(module.network.class_bias))
    write_checkpoint(folder / "run/checkpoints/best.ckpt", module.eval())
    miniatures.save(folder / "a.jpg")
    miniatures.save(folder / "turned.png", exif=exif_of(6))
    miniatures.save(folder / "c.webp")
    save_model(folder / "run/checkpoints/best.ckpt", folder / "model", miniatures.picture())
    return folder


@pytest.fixture(scope="module")
def model(place):
    return mlflow.pyfunc.load_model(str(place / "model"))


def table_of(*images: bytes | Path | None) -> Any:
    return pd.DataFrame({"image": [i.read_bytes() if isinstance(i, Path) else i for i in images]})


def boxes_in(rows: Any) -> Any:
    return rows[["x1", "y1", "x2", "y2"]].to_numpy()


def test_a_model_answers_as_the_python_door_does(place, model):
    files = [place / "a.jpg", place / "turned.png", place / "c.webp"]
    found = model.predict(table_of(*files), params={"score_threshold": THRESHOLD})
    door = load(place / "run/checkpoints/best.ckpt")
    assert found["image"].unique().tolist() == [0, 1, 2]
    for number, file in enumerate(files):
        rows = found[found["image"] == number]
        expected = door(file, THRESHOLD)
        assert len(expected) > 1
        assert rows["name"].tolist() == [one.name for one in expected]
        assert rows["key"].tolist() == [one.key for one in expected]
        assert rows["node"].tolist() == [one.node for one in expected]
        assert rows["score"].tolist() == [one.score for one in expected]
        np.testing.assert_array_equal(boxes_in(rows), [one.box_xyxy_orig_px for one in expected])
    above = {name: [n for n in (parent, name) if n != "-"] for name, parent, _ in TREE}
    assert found["path"].tolist() == [above[name] for name in found["name"]]
    assert found["path"].map(len).max() == 2


def test_parameters_hold_for_one_question_alone(place, model):
    image = table_of(place / "a.jpg", place / "a.jpg")
    usual = model.predict(image, params={"score_threshold": THRESHOLD})
    wide = model.predict(image, params={"score_threshold": THRESHOLD, "iou_threshold": 1.0})
    counts = [wide["image"].tolist().count(number) for number in (0, 1)]
    assert counts[0] == counts[1] > len(usual) / 2
    top = model.predict(image, params={"score_threshold": THRESHOLD, "tree_threshold": 1.0})
    assert set(top["name"]) <= {"animal", "thing"}
    pd.testing.assert_frame_equal(
        model.predict(image, params={"score_threshold": THRESHOLD}), usual
    )
    nothing = model.predict(image, params={"score_threshold": 1.0})
    assert len(nothing) == 0
    assert nothing.columns.tolist() == usual.columns.tolist()
    assert nothing["x1"].dtype == usual["x1"].dtype == np.float64


@pytest.mark.parametrize("data", [b"", b"no image at all", "cut", None])
def test_an_image_that_cannot_be_read_is_named_by_its_row(place, model, data):
    whole = (place / "a.jpg").read_bytes()
    bad = whole[:200] if data == "cut" else data
    with pytest.raises(MlflowException, match=r"^row 1, counted from 0: [^/]*$") as caught:
        model.predict(table_of(whole, bad))
    assert caught.value.get_http_status_code() == 400


def test_a_parameter_out_of_range_is_refused(place, model):
    with pytest.raises(MlflowException, match="score_threshold is 25.0; allowed: 0 … 1"):
        model.predict(table_of(place / "a.jpg"), params={"score_threshold": 25.0})


def test_a_folder_holds_code_and_weights_and_no_pickles(place, model):
    folder = place / "model"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*")}
    for kept in (
        "code/yolo_lightning/datamodules/voc.py", "code/yolo_lightning/callbacks/multi_scale.py",
        "code/yolo_lightning/cli/commands/mlflow/model.py",
        "code/yolo_lightning/tree/data/wordnet_nouns.xz",
    ):  # fmt: skip
        assert kept in names
    assert not [n for n in names if re.search(r"\.(pkl|pickle|pyc|joblib)$|__pycache__", n)]
    assert not [n for n in names if (folder / n).is_symlink()]
    held = load_file(folder / "artifacts/model.ckpt")
    assert not {"optimizer_states", "loops", "callbacks"} & set(held)
    assert held["global_step"] == 40
    whole = (place / "run/checkpoints/best.ckpt").stat().st_size
    assert (folder / "artifacts/model.ckpt").stat().st_size < 0.8 * whole
    assert str(REPO) not in (folder / "MLmodel").read_text()
    beside = sum(f.stat().st_size for f in (folder / "code").rglob("*") if f.is_file())
    assert beside < 4 * 2**20


def test_a_model_says_what_it_takes_and_gives(place, model):
    signature = model.metadata.signature.to_dict()
    assert json.loads(signature["inputs"]) == [
        {"type": "binary", "name": "image", "required": True}
    ]
    defaults = {row["name"]: row["default"] for row in json.loads(signature["params"])}
    assert defaults == {"score_threshold": 0.25, "tree_threshold": 0.5, "iou_threshold": 0.4}
    told = [row["name"] for row in json.loads(signature["outputs"])]
    assert told == model.predict(model.input_example).columns.tolist()
    (example,) = model.input_example["image"]
    (place / "example.jpg").write_bytes(example)
    shown = 255 * read_image(place / "example.jpg").permute(1, 2, 0)
    assert (shown - torch.tensor(miniatures.picture())).abs().mean() < 10


def test_requirements_are_the_project_s_own_pinned(place):
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [re.split("[<>=]", line)[0] for line in project] == list(REQUIREMENTS)
    lines = (place / "model/requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == list(REQUIREMENTS)
    assert f"torch=={torch.__version__.split('+')[0]}" in lines
    assert f"mlflow=={mlflow.__version__}" in lines


def test_writing_leaves_mlflow_and_the_folders_as_they_were(place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "uv.lock").write_text("version = 1")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'mine'\nversion = '1'")
    before = (mlflow.get_tracking_uri(), mlflow.active_run(), mlflow.get_active_model_id())
    environment = dict(os.environ)
    large = np.full((900, 1800, 3), 50, np.uint8)
    save_model(place / "run/checkpoints/best.ckpt", "new/model", large)
    assert (mlflow.get_tracking_uri(), mlflow.active_run(), mlflow.get_active_model_id()) == before
    assert dict(os.environ) == environment
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "pyproject.toml", "uv.lock"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model"]
    assert not (tmp_path / "new/model/uv.lock").exists()
    example = json.loads((tmp_path / "new/model/input_example.json").read_text())
    (tmp_path / "example").write_bytes(base64.b64decode(example["data"][0][0]))
    assert tuple(read_image(tmp_path / "example").shape) == (3, 320, 640)
    with pytest.raises(InputError, match="new/model: not an empty folder"):
        save_model(place / "run/checkpoints/best.ckpt", "new/model")
    (tmp_path / "other.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="other.ckpt"):
        save_model("other.ckpt", "fresh/model")
    assert not (tmp_path / "fresh").exists()


def test_a_classifier_answers_with_names(tmp_path):
    torch.manual_seed(0)
    module = ClassifierModule(tree=TREE, backbone=BACKBONE, image_size=64).eval()
    save_model(write_checkpoint(tmp_path / "c.ckpt", module), tmp_path / "model")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    file = miniatures.save(tmp_path / "a.jpg")
    found = model.predict(table_of(file, file), params={"top": 3})
    expected = classify(module, read_image(file), (64, 64), "letterbox", 3)["classes"]
    for number in (0, 1):
        rows = found[found["image"] == number]
        assert rows["key"].tolist() == [row["key"] for row in expected]
        assert rows["score"].tolist() == [row["probability"] for row in expected]
        assert all(path[-1] == name for path, name in zip(rows["path"], rows["name"], strict=True))
    with pytest.raises(MlflowException, match="top is 0; allowed: 1 or more"):
        model.predict(table_of(file), params={"top": 0})


def test_the_code_inside_is_what_runs_where_nothing_is_installed(place, tmp_path):
    code = f"""
import socket, sys
sys.path += [{sysconfig.get_path("purelib")!r}, {sysconfig.get_path("platlib")!r}]
reached = []
def refuse(*args, **kwargs):
    reached.append(args)
    raise OSError("no network here")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from importlib.util import find_spec
assert find_spec("yolo_lightning") is None
import mlflow, os, pandas
model = mlflow.pyfunc.load_model({str(place / "model")!r})
image = open({str(place / "a.jpg")!r}, "rb").read()
found = model.predict(pandas.DataFrame({{"image": [image]}}), params={{"score_threshold": 0.05}})
import yolo_lightning, yolo_lightning.datamodules.voc
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
assert not reached, reached
print(yolo_lightning.__file__, len(found))
"""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    clean.pop("MLFLOW_DISABLE_TELEMETRY", None)
    done = subprocess.run(
        [sys.executable, "-S", "-B", "-c", code],
        cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    file, count = done.stdout.split()
    assert Path(file) == place / "model/code/yolo_lightning/__init__.py"
    expected = load(place / "run/checkpoints/best.ckpt")(place / "a.jpg", THRESHOLD)
    assert int(count) == len(expected)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return tmp_path_factory.mktemp("store") / "mlflow.db"  # made once: that takes seconds


@pytest.fixture
def store(database, tmp_path, monkeypatch):
    """A store, a run in it, and a global store of MLflow that must not be used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/never.db")
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.create_experiment(tmp_path.name, f"file://{tmp_path}/files")
    run_id = client.create_run(experiment).info.run_id
    yield client, run_id
    assert not (tmp_path / "never.db").exists()


def test_a_model_is_logged_once_and_registered_once(place, store, tmp_path):
    client, run_id = store
    for key, step in (("val/AP", 39), ("val/AP", 19), ("val/AP/cat", 39), ("train/loss", 39)):
        client.log_metric(run_id, key, 0.5, step=step)
    first = log_model(client, run_id, place / "model", "best", 40, "animals")
    assert log_model(client, run_id, place / "model", "best", 40, "animals") == first
    run = client.get_run(run_id)
    assert [(o.model_id, o.step) for o in run.outputs.model_outputs] == [(first, 40)]
    logged = client.get_logged_model(first)
    assert logged.status == "READY"
    assert [(m.key, m.step) for m in logged.metrics] == [("val/AP", 39)]
    assert len(client.get_metric_history(run_id, "val/AP")) == 2
    assert [v.version for v in client.search_model_versions("name = 'animals'")] == [1]
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "animals", "version": 1}]
    as_servers_write = '[{"name": "animals", "version": "1"}]'
    client.set_logged_model_tags(first, {"mlflow.modelVersions": as_servers_write})
    assert register(client, first, "animals") == "1"
    assert client.get_logged_model(first).tags["mlflow.modelVersions"] == as_servers_write
    described = Path(logged.artifact_location.removeprefix("file://"), "MLmodel").read_text()
    assert f"model_id: {first}" in described
    assert f"run_id: {run_id}" in described
    later = log_model(client, run_id, place / "model", "best", 60, "animals")
    assert later != first
    assert client.get_model_version("animals", "2").run_id == run_id
    source = client.get_model_version_download_uri("animals", "2")
    loaded = mlflow.pyfunc.load_model(source)
    assert len(loaded.predict(table_of(place / "a.jpg"), params={"score_threshold": THRESHOLD}))
    assert loaded.metadata.model_id == later


@pytest.mark.parametrize(
    "step",
    ["log_outputs", "log_model_artifacts", "log_model_artifact", "finalize_logged_model",
     "create_registered_model", "create_model_version", "set_logged_model_tags"],
)  # fmt: skip
@pytest.mark.parametrize("done", [False, True])
def test_logging_goes_on_where_it_broke_off(place, store, monkeypatch, step, done):
    client, run_id = store
    name = f"{step}-{done}"
    real = getattr(client, step)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if done:
            real(*args, **kwargs)
        raise MlflowException("the connection is gone")

    monkeypatch.setattr(client, step, broken)
    with pytest.raises(MlflowException, match="the connection is gone"):
        log_model(client, run_id, place / "model", "best", 40, name)
    monkeypatch.undo()
    model_id = log_model(client, run_id, place / "model", "best", 40, name)
    run = client.get_run(run_id)
    assert [o.model_id for o in run.outputs.model_outputs] == [model_id]
    logged = client.search_logged_models([run.info.experiment_id])
    assert [(m.model_id, m.status) for m in logged] == [(model_id, "READY")]
    assert [v.version for v in client.search_model_versions(f"name = '{name}'")] == [1]
    assert "mlflow.modelVersions" in client.get_logged_model(model_id).tags


def test_the_command_writes_a_folder_or_logs_into_the_run(place, store, monkeypatch, capsys):
    client, run_id = store
    checkpoint = str(place / "run/checkpoints/best.ckpt")
    main([checkpoint, "--output", "written"])
    said = capsys.readouterr().out
    assert "mlflow models serve -m written " in said
    assert mlflow.pyfunc.load_model("written").metadata.run_id is None
    with pytest.raises(InputError, match="belongs to no MLflow run"):
        main([checkpoint])
    with pytest.raises(InputError, match="--register needs a run"):
        main([checkpoint, "--output", "again", "--register", "beasts"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    module = load(checkpoint)
    own = write_checkpoint(Path("own.ckpt"), module, mlflow_run_id=run_id)
    main([str(own)])
    (logged,) = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert (
        f"detector, step 40: models:/{logged.model_id} in run {run_id}" in capsys.readouterr().out
    )
    beside = write_checkpoint(Path("run/checkpoints/best.ckpt"), module, mlflow_run_id="not this")
    Path("run/mlflow_run_id").write_text(f"{run_id}\n")
    main([str(beside), "--register", "beasts"])
    said = capsys.readouterr().out
    assert "registered as beasts, version 1" in said
    assert "mlflow.pyfunc.load_model('models:/beasts/1')" in said
    Path("run/mlflow_run_id").write_text("0123")
    with pytest.raises(InputError, match=r"run 0123 of run/.*not found"):
        main([str(beside)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    with pytest.raises(InputError, match=r"there is no none\.db in "):
        main([str(own)])
    assert not Path("none.db").exists()


def test_the_page_s_python_runs(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    miniatures.save(place / "dog.jpg")
    page = (REPO / "docs/serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(block.replace('": 0.3', f'": {THRESHOLD}'), "page", "exec"), {})
    said = capsys.readouterr().out
    assert any(name in said for _, _, name in TREE)


def asked(port: int, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(), {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_a_server_takes_images_in_base64(place, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(place / "model"),
         "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
        cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": tools, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        text = base64.b64encode((place / "a.jpg").read_bytes()).decode()
        params = {"score_threshold": THRESHOLD}
        expected = load(place / "run/checkpoints/best.ckpt")(place / "a.jpg", THRESHOLD)
        for body in (
            {"dataframe_split": {"columns": ["image"], "data": [[text]]}},
            {"dataframe_records": [{"image": text}]},
        ):
            status, answer = asked(port, {**body, "params": params})
            assert status == 200, answer
            rows = answer["predictions"]
            assert [row["name"] for row in rows] == [one.name for one in expected]
            assert [row["score"] for row in rows] == pytest.approx([o.score for o in expected])
        status, answer = asked(port, {"dataframe_records": [{"image": text}, {"image": "QUJD"}]})
        assert status == 400
        assert "row 1, counted from 0: not a readable image" in answer["message"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
