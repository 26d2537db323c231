"""MLflow models: the saved folder, its predictions, logging and registering."""

import base64
import json
import math
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
from concurrent.futures import ThreadPoolExecutor
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
from tests.helpers.hostile_images import progressive_jpeg
from tests.helpers.images import exif_of
from tests.helpers.paths import REPO
from tests.helpers.tracked import fresh_store
from tests.helpers.trees import BACKBONE, TREE
from yolo_lightning import ClassifierModule, DetectorModule, load
from yolo_lightning.checkpoints.io import load_file
from yolo_lightning.cli.commands.mlflow.model import main
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.images import read_image
from yolo_lightning.inference.classification import classify, prepare
from yolo_lightning.serving.mlflow_model import REQUIREMENTS, log_model, register, save_model

pytestmark = pytest.mark.end_to_end

THRESHOLD = 0.05


def write_checkpoint(path: Path, module: Any, **extra: Any) -> Path:
    """Write a checkpoint with the state for resuming, as training does."""
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    resume = {"optimizer_states": [weights], "loops": {}, "callbacks": {}, "global_step": 40}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**build_checkpoint(module, {}), **resume, **extra}, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
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
    save_model(folder / "run/checkpoints/best.ckpt", folder / "model", miniatures.quarters())
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return mlflow.pyfunc.load_model(str(folder / "model"))


def image_table(*images: bytes | Path | None) -> Any:
    return pd.DataFrame({"image": [i.read_bytes() if isinstance(i, Path) else i for i in images]})


def boxes_in(rows: Any) -> Any:
    return rows[["x1", "y1", "x2", "y2"]].to_numpy()


def test_predictions_equal_those_of_load(folder, model):
    files = [folder / "a.jpg", folder / "turned.png", folder / "c.webp"]
    table = model.predict(image_table(*files), params={"score_threshold": THRESHOLD})
    detector = load(folder / "run/checkpoints/best.ckpt")
    assert table["image"].unique().tolist() == [0, 1, 2]
    for number, file in enumerate(files):
        rows = table[table["image"] == number]
        expected = detector(file, THRESHOLD)
        assert len(expected) > 1
        assert rows["name"].tolist() == [one.name for one in expected]
        assert rows["key"].tolist() == [one.key for one in expected]
        assert rows["node"].tolist() == [one.node for one in expected]
        assert rows["score"].tolist() == [one.score for one in expected]
        np.testing.assert_array_equal(boxes_in(rows), [one.box_xyxy_orig_px for one in expected])
    above = {name: [n for n in (parent, name) if n != "-"] for name, parent, _ in TREE}
    assert table["path"].tolist() == [above[name] for name in table["name"]]
    assert table["path"].map(len).max() == 2


def test_parameters_apply_to_one_call_only(folder, model):
    image = image_table(folder / "a.jpg", folder / "a.jpg")
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


@pytest.mark.parametrize("data", [b"", b"no image at all", "cut", None, progressive_jpeg(101, 64)])
def test_an_unreadable_image_raises_with_its_row(folder, model, data):
    whole = (folder / "a.jpg").read_bytes()
    bad = whole[:200] if data == "cut" else data
    with pytest.raises(MlflowException, match=r"^row 1, counted from 0: [^/]*$") as caught:
        model.predict(image_table(whole, bad))
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize("value", [25.0, math.nan, math.inf])
def test_a_parameter_out_of_range_raises(folder, model, value):
    with pytest.raises(MlflowException, match=f"score_threshold is {value}; allowed: 0 … 1"):
        model.predict(image_table(folder / "a.jpg"), params={"score_threshold": value})


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_rows": 1}, "^2 rows; allowed: at most 1$"),
        ({"max_row_bytes": 100}, r"^row 0, counted from 0: [\d,]+ bytes; allowed: at most 100$"),
        ({"max_pixels": 2 * 48 * 64 - 1}, "^2 images of 6,144 px together; allowed: at most 6,143"),
    ],
)
def test_limits_of_a_request(folder, model, monkeypatch, limits, message):
    defaults = model.metadata.flavors["python_function"]["config"]
    assert sorted(defaults) == ["max_pixels", "max_row_bytes", "max_rows", "max_seconds"]
    images = image_table(folder / "a.jpg", folder / "a.jpg")
    limited = mlflow.pyfunc.load_model(str(folder / "model"), model_config=limits)
    monkeypatch.setattr(limited.unwrap_python_model(), "_predict_image", fail_predict)
    with pytest.raises(MlflowException, match=message) as caught:
        limited.predict(images)
    assert caught.value.get_http_status_code() == 400


def fail_predict(*args: Any) -> Any:
    raise RuntimeError("predicted, with a secret in the message")


def test_a_slow_request_is_answered_in_time_and_does_not_delay_others(folder, monkeypatch):
    limits = {"max_seconds": 0.6}
    model = mlflow.pyfunc.load_model(str(folder / "model"), model_config=limits)
    served, predicted = model.unwrap_python_model(), []

    def predict(data: bytes, params: Any) -> Any:
        predicted.append(params["score_threshold"])
        time.sleep(0.1)
        return []

    monkeypatch.setattr(served, "_predict_image", predict)

    def request(number: int, rows: int) -> tuple[float, Any]:
        started = time.perf_counter()
        try:
            images = image_table(*[folder / "a.jpg"] * rows)
            model.predict(images, params={"score_threshold": number / 10})
        except MlflowException as error:
            return time.perf_counter() - started, error
        return time.perf_counter() - started, None

    with ThreadPoolExecutor() as clients:
        slow = clients.submit(request, 1, 200)
        while not predicted:
            time.sleep(0.01)
        seconds, error = clients.submit(request, 2, 2).result()
        assert error is None
        assert predicted.index(0.2) <= 2  # not after 200 images
        seconds, error = slow.result()
    assert error.get_http_status_code() == 504
    assert "of 200 images predicted in 0.6 s" in str(error)
    assert 0.6 <= seconds < 2
    count = len(predicted)
    time.sleep(0.3)
    assert len(predicted) <= count + 1  # nothing goes on for a client that has its answer


def test_an_unexpected_error_sends_no_traceback(folder, monkeypatch, caplog):
    model = mlflow.pyfunc.load_model(str(folder / "model"))
    monkeypatch.setattr(model.unwrap_python_model(), "_predict_image", fail_predict)
    with pytest.raises(MlflowException) as caught:
        model.predict(image_table(folder / "a.jpg"))
    answer = caught.value.serialize_as_json()
    assert "row 0, counted from 0: not predicted; the server's log says why" in answer
    assert "secret" not in answer
    assert "stack_trace" not in answer
    assert "predicted, with a secret" in caplog.text


def test_the_folder_contains_code_and_weights_but_no_pickles(folder, model):
    model_folder = folder / "model"
    names = {str(file.relative_to(model_folder)) for file in model_folder.rglob("*")}
    for expected_file in (
        "code/yolo_lightning/datamodules/voc.py", "code/yolo_lightning/callbacks/multi_scale.py",
        "code/yolo_lightning/cli/commands/mlflow/model.py",
        "code/yolo_lightning/tree/data/wordnet_nouns.xz",
    ):  # fmt: skip
        assert expected_file in names
    assert not [n for n in names if re.search(r"\.(pkl|pickle|pyc|joblib)$|__pycache__", n)]
    assert not [n for n in names if (model_folder / n).is_symlink()]
    content = load_file(model_folder / "artifacts/model.ckpt")
    assert not {"optimizer_states", "loops", "callbacks"} & set(content)
    assert content["global_step"] == 40
    full_size = (folder / "run/checkpoints/best.ckpt").stat().st_size
    assert (model_folder / "artifacts/model.ckpt").stat().st_size < 0.8 * full_size
    assert str(REPO) not in (model_folder / "MLmodel").read_text()
    code_size = sum(f.stat().st_size for f in (model_folder / "code").rglob("*") if f.is_file())
    assert code_size < 4 * 2**20


def test_signature_and_input_example(folder, model):
    signature = model.metadata.signature.to_dict()
    assert json.loads(signature["inputs"]) == [
        {"type": "binary", "name": "image", "required": True}
    ]
    defaults = {row["name"]: row["default"] for row in json.loads(signature["params"])}
    thresholds = {"score_threshold": 0.25, "tree_threshold": 0.5, "iou_threshold": 0.4}
    assert defaults == {**thresholds, "interpolation": "area"}
    outputs = [row["name"] for row in json.loads(signature["outputs"])]
    assert outputs == model.predict(model.input_example).columns.tolist()
    (example,) = model.input_example["image"]
    (folder / "example.jpg").write_bytes(example)
    shown = read_image(folder / "example.jpg")[0].astype(float)
    assert np.abs(shown - miniatures.quarters()).mean() < 10


def test_requirements_are_the_pinned_project_dependencies(folder):
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    assert [re.split("[<>=]", line)[0] for line in project] == list(REQUIREMENTS)
    lines = (folder / "model/requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in lines] == list(REQUIREMENTS)
    assert f"torch=={torch.__version__.split('+')[0]}" in lines
    assert f"mlflow=={mlflow.__version__}" in lines


def test_save_model_changes_no_global_state_and_leaves_no_other_files(
    folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "uv.lock").write_text("version = 1")
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'mine'\nversion = '1'")
    before = (mlflow.get_tracking_uri(), mlflow.active_run(), mlflow.get_active_model_id())
    environment = dict(os.environ)
    large = np.full((900, 1800, 3), 50, np.uint8)
    save_model(folder / "run/checkpoints/best.ckpt", "new/model", large)
    assert (mlflow.get_tracking_uri(), mlflow.active_run(), mlflow.get_active_model_id()) == before
    assert dict(os.environ) == environment
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "pyproject.toml", "uv.lock"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model"]
    assert not (tmp_path / "new/model/uv.lock").exists()
    example = json.loads((tmp_path / "new/model/input_example.json").read_text())
    (tmp_path / "example").write_bytes(base64.b64decode(example["data"][0][0]))
    assert read_image(tmp_path / "example")[1] == (320, 640)
    with pytest.raises(InputError, match="new/model: not an empty folder"):
        save_model(folder / "run/checkpoints/best.ckpt", "new/model")
    (tmp_path / "other.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="other.ckpt"):
        save_model("other.ckpt", "fresh/model")
    assert not (tmp_path / "fresh").exists()


@pytest.mark.parametrize("interpolation", ["area", "darknet"])
def test_classifier_predictions_equal_those_of_classify(tmp_path, interpolation):
    torch.manual_seed(0)
    module: Any = ClassifierModule(
        tree=TREE, backbone=BACKBONE, image_size=64, interpolation=interpolation
    ).eval()
    save_model(write_checkpoint(tmp_path / "c.ckpt", module), tmp_path / "model")
    module = load(tmp_path / "c.ckpt")
    model = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    file = miniatures.save(tmp_path / "a.jpg")
    table = model.predict(image_table(file, file), params={"top": 3})
    expected = classify(module, prepare(file, module, (64, 64), "crop"), 3)["classes"]
    for number in (0, 1):
        rows = table[table["image"] == number]
        assert rows["key"].tolist() == [row["key"] for row in expected]
        assert rows["score"].tolist() == [row["probability"] for row in expected]
        assert all(path[-1] == name for path, name in zip(rows["path"], rows["name"], strict=True))
    with pytest.raises(MlflowException, match="top is 0; allowed: 1 or more"):
        model.predict(image_table(file), params={"top": 0})
    other = "darknet" if interpolation == "area" else "area"
    module.hparams["interpolation"] = other
    changed = classify(module, prepare(file, module, (64, 64), "crop"), 3)["classes"]
    rows = model.predict(image_table(file), params={"top": 3, "interpolation": other})
    assert rows["score"].tolist() == [row["probability"] for row in changed]
    rows = model.predict(image_table(file), params={"top": 3})  # the model's own again
    assert rows["score"].tolist() == [row["probability"] for row in expected]
    assert changed != expected
    with pytest.raises(MlflowException, match="interpolation is cubic; allowed: area, darknet"):
        model.predict(image_table(file), params={"interpolation": "cubic"})


def test_the_saved_code_is_used_if_the_package_is_not_installed(folder, tmp_path):
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
model = mlflow.pyfunc.load_model({str(folder / "model")!r})
image = open({str(folder / "a.jpg")!r}, "rb").read()
found = model.predict(pandas.DataFrame({{"image": [image]}}), params={{"score_threshold": 0.05}})
import yolo_lightning, yolo_lightning.datamodules.voc
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
assert not reached, reached
print(yolo_lightning.__file__, len(found))
"""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    clean.pop("MLFLOW_DISABLE_TELEMETRY", None)
    completed = subprocess.run(
        [sys.executable, "-S", "-B", "-c", code],
        cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr[-2000:]
    file, count = completed.stdout.split()
    assert Path(file) == folder / "model/code/yolo_lightning/__init__.py"
    expected = load(folder / "run/checkpoints/best.ckpt")(folder / "a.jpg", THRESHOLD)
    assert int(count) == len(expected)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    fresh_store(folder)
    return folder / "mlflow.db"


@pytest.fixture
def store(database, tmp_path, monkeypatch):
    """A client, a run, and a global MLflow store that must not be used."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/never.db")
    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.create_experiment(tmp_path.name, f"file://{tmp_path}/files")
    run_id = client.create_run(experiment).info.run_id
    yield client, run_id
    assert not (tmp_path / "never.db").exists()


def test_a_model_is_logged_once_and_registered_once(folder, store, tmp_path):
    client, run_id = store
    for key, step in (("val/AP", 39), ("val/AP", 19), ("val/AP/cat", 39), ("train/loss", 39)):
        client.log_metric(run_id, key, 0.5, step=step)
    first = log_model(client, run_id, folder / "model", "best", 40, "animals")
    assert log_model(client, run_id, folder / "model", "best", 40, "animals") == first
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
    later = log_model(client, run_id, folder / "model", "best", 60, "animals")
    assert later != first
    assert client.get_model_version("animals", "2").run_id == run_id
    source = client.get_model_version_download_uri("animals", "2")
    loaded = mlflow.pyfunc.load_model(source)
    assert len(loaded.predict(image_table(folder / "a.jpg"), params={"score_threshold": THRESHOLD}))
    assert loaded.metadata.model_id == later


@pytest.mark.parametrize(
    "step",
    ["log_outputs", "log_model_artifacts", "log_model_artifact", "finalize_logged_model",
     "create_registered_model", "create_model_version", "set_logged_model_tags"],
)  # fmt: skip
@pytest.mark.parametrize("completed", [False, True])
def test_interrupted_logging_is_completed_by_the_next_call(
    folder, store, monkeypatch, step, completed
):
    client, run_id = store
    name = f"{step}-{completed}"
    original = getattr(client, step)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if completed:
            original(*args, **kwargs)
        raise MlflowException("the connection is gone")

    monkeypatch.setattr(client, step, interrupted)
    with pytest.raises(MlflowException, match="the connection is gone"):
        log_model(client, run_id, folder / "model", "best", 40, name)
    monkeypatch.undo()
    model_id = log_model(client, run_id, folder / "model", "best", 40, name)
    run = client.get_run(run_id)
    assert [o.model_id for o in run.outputs.model_outputs] == [model_id]
    logged = client.search_logged_models([run.info.experiment_id])
    assert [(m.model_id, m.status) for m in logged] == [(model_id, "READY")]
    assert [v.version for v in client.search_model_versions(f"name = '{name}'")] == [1]
    assert "mlflow.modelVersions" in client.get_logged_model(model_id).tags


def test_the_command_writes_a_folder_or_logs_to_the_run(folder, store, monkeypatch, capsys):
    client, run_id = store
    checkpoint = str(folder / "run/checkpoints/best.ckpt")
    main([checkpoint, "--output", "written"])
    output = capsys.readouterr().out
    assert "mlflow models serve -m written " in output
    assert mlflow.pyfunc.load_model("written").metadata.run_id is None
    with pytest.raises(InputError, match="has no MLflow run"):
        main([checkpoint])
    with pytest.raises(InputError, match="--register needs a run"):
        main([checkpoint, "--output", "again", "--register", "beasts"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    module = load(checkpoint)
    with_run_id = write_checkpoint(Path("own.ckpt"), module, mlflow_run_id=run_id)
    main([str(with_run_id)])
    (logged,) = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert (
        f"detector, step 40: models:/{logged.model_id} in run {run_id}" in capsys.readouterr().out
    )
    extra = write_checkpoint(Path("run/checkpoints/best.ckpt"), module, mlflow_run_id="f" * 32)
    Path("run/mlflow_run_id").write_text(f"{run_id}\n")
    main([str(extra), "--register", "beasts"])
    output = capsys.readouterr().out
    assert "registered as beasts, version 1" in output
    assert "mlflow.pyfunc.load_model('models:/beasts/1')" in output
    Path("run/mlflow_run_id").write_text("0123")
    with pytest.raises(InputError, match=r"run 0123 of run/.*not found"):
        main([str(extra)])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///none.db")
    with pytest.raises(InputError, match=r"there is no none\.db in "):
        main([str(with_run_id)])
    assert not Path("none.db").exists()


def test_the_python_example_of_the_docs_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    miniatures.save(folder / "dog.jpg")
    page = (REPO / "docs/serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(compile(block.replace('": 0.3', f'": {THRESHOLD}'), "page", "exec"), {})
    output = capsys.readouterr().out
    assert any(name in output for _, _, name in TREE)


def post(port: int, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(body).encode(), {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.slow
def test_a_server_accepts_images_in_base64(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder / "model"),
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
        text = base64.b64encode((folder / "a.jpg").read_bytes()).decode()
        params = {"score_threshold": THRESHOLD}
        expected = load(folder / "run/checkpoints/best.ckpt")(folder / "a.jpg", THRESHOLD)
        for body in (
            {"dataframe_split": {"columns": ["image"], "data": [[text]]}},
            {"dataframe_records": [{"image": text}]},
        ):
            status, response = post(port, {**body, "params": params})
            assert status == 200, response
            rows = response["predictions"]
            assert [row["name"] for row in rows] == [one.name for one in expected]
            assert [row["score"] for row in rows] == pytest.approx([o.score for o in expected])
        status, response = post(port, {"dataframe_records": [{"image": text}, {"image": "QUJD"}]})
        assert status == 400
        assert "row 1, counted from 0: not a readable image" in response["message"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
