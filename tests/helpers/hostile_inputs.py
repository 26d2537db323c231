"""Hostile recipes, checkpoints, run folders, working folders, requests and servers.

`CASES` maps a name to a function that writes files into a `Place`, and returns the arguments of
`yolo-lightning`, or a function to call, and a word that its output must hold. None may print a
traceback, change anything in `Place.victim`, show or write `SECRET`, or create `Place.owned`.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.helpers.hostile_images import fifo, jpeg_bomb, unix_socket
from tests.helpers.images import write_image
from tests.helpers.kill_and_resume import write_recipe

SECRET = "aws_secret_access_key"
LIMITS = ["--trainer.max_steps=2", "--trainer.max_epochs=-1", "--data.num_workers=0",
          "--trainer.limit_val_batches=0"]  # fmt: skip


class Place(NamedTuple):
    """Folders of a case.

    Args:
        work: the working folder.
        victim: files of the user's, which nothing may change; ``secret.txt`` holds `SECRET`.
        owned: a file that hostile code would create.
        run: a sound run folder, which a case may copy, with its checkpoints and its journal.
    """

    work: Path
    victim: Path
    owned: Path
    run: Path

    @property
    def secret(self) -> Path:
        """A file with a secret."""
        return self.victim / "secret.txt"

    @property
    def ckpt(self) -> Path:
        """A sound checkpoint of the run."""
        return self.run / "checkpoints" / "last.ckpt"

    def copy_run(self) -> Path:
        """Copy the run to the folder of runs of the recipe; return it."""
        target = self.work / "runs" / self.run.name
        shutil.copytree(self.run, target)
        return target


Command = list[str] | Callable[[], int]
Case = Callable[[Place], tuple[Command, str]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Add a function to `CASES` under its own name."""
    CASES[function.__name__] = function
    return function


_Family = Callable[[Place, Any], tuple[Command, str]]


def family(**variants: Any) -> Callable[[_Family], _Family]:
    """Add a function to `CASES` once for each variant, which is its second argument."""

    def add(function: _Family) -> _Family:
        for name, variant in variants.items():
            CASES[f"{function.__name__}_{name}"] = lambda p, v=variant: function(p, v)  # type: ignore[misc]
        return function

    return add


# recipes


def fit(place: Place, *options: str) -> list[str]:
    """Write a sound recipe unless there is one; return the command that trains two steps of it."""
    recipe = place.work / "recipe.yaml"
    if not os.path.lexists(recipe):
        write_recipe(place.work)
    return ["fit", "--config", str(recipe), "--allow-module", "tests.helpers.diary", *LIMITS,
            *options]  # fmt: skip


def resume(place: Place) -> list[str]:
    return fit(place, "--resume", "auto")


def _logger(options: str) -> str:
    return f"logger: {{class_path: yolo_lightning.tracking.RunLogger, init_args: {{{options}}}}}"


def _edit(place: Place, old: str, new: str) -> list[str]:
    command = fit(place)
    file = place.work / "recipe.yaml"
    text = file.read_text()
    assert old in text
    for name in ("owned", "secret", "victim"):
        new = new.replace(f"<{name}>", str(getattr(place, name)))
    file.write_text(text.replace(old, new))
    return command


_TOUCH = "{class_path: subprocess.Popen, init_args: {args: [touch, <owned>]}}"
_MODEL = "class_path: yolo_lightning.DetectorModule"
_DATA = "class_path: yolo_lightning.CombinedDataModule"
_SHIPPER = "{class_path: yolo_lightning.tracking.uploader.Uploader, init_args: {journal: <secret>}}"
_NESTED = "{class_path: yolo_lightning.cli.recipe.RecipeCLI, init_args: {args: [fit]}}"


@family(
    model=(_MODEL, "class_path: os.system", "os.system"),
    model_is_the_parser=(_MODEL, "class_path: lightning.pytorch.cli.LightningCLI", "LightningCLI"),
    data_is_an_optimizer=(_DATA, "class_path: torch.optim.SGD", "SGD"),
    callback=("callbacks:", f"callbacks:\n    - {_TOUCH}", "subprocess"),
    callback_hook=(
        "callbacks:", "callbacks:\n    - {class_path: lightning.pytorch.callbacks.LambdaCallback, "
        "init_args: {setup: os.system}}", "LambdaCallback",
    ),
    in_a_backbone=("backbone: small", f"backbone: [[conv, {_TOUCH}]]", "class_path"),
    nested_in_a_backbone=("backbone: small", f"backbone: [[conv, 8], [[[{_NESTED}]]]]", "backbone"),
    in_tags=("logger: false", _logger("tags: {a: " + _SHIPPER + "}"), "tags"),
    nested_in_tags=("logger: false", _logger("tags: {a: [{b: " + _NESTED + "}]}"), "tags"),
    in_anchors=("anchors_wh_cell: [[1.5, 1.5], [3, 3]]", f"anchors_wh_cell: [{_TOUCH}]", "anchors"),
    in_a_seed=("seed_everything: 0", f"seed_everything: {_TOUCH}", "seed_everything"),
    with_escape=(_MODEL, 'class_path: "\\e[31mos.system"', "recipe.yaml"),
    key_merged=("model:\n", f"x: &x {_TOUCH}\nmodel:\n  <<: *x\n", "recipe.yaml"),
    profiler=("accelerator: cpu", f"accelerator: cpu\n  profiler: {_TOUCH}", "subprocess"),
    tree=("tree: ", f"tree: {_TOUCH} #", "tree"),
)  # fmt: skip
def recipe_class(place: Place, change: tuple[str, str, str]) -> tuple[Command, str]:
    old, new, word = change
    return _edit(place, old, new), word


@family(
    tree=("tree: ", "tree: <secret> #", "secret.txt"),
    pretrained=("head_channels: 8", "head_channels: 8\n    pretrained: <secret>", "secret.txt"),
    pretrained_url=("head_channels: 8", "head_channels: 8\n    pretrained: http://[::1]:9/", ""),
    dataset=("ShapesDetection\n      init_args: {length: 13, image_size: 64}",
             "COCOJson\n      init_args: {annotations: <secret>, images: /}", "secret.txt"),
    checkpoint=("trainer:", "ckpt_path: <secret>\ntrainer:", "secret.txt"),
    environment=("logger: false", _logger('experiment_name: "${oc.env:DRILL_TOKEN}"'),
                 "DRILL_TOKEN"),
    environment_in_a_path=("default_root_dir: ", 'default_root_dir: "${oc.env:DRILL_TOKEN}" #',
                           "DRILL_TOKEN"),
    environment_default=("logger: false", _logger('run_name: "${oc.env:DRILL_TOKEN,a}"'),
                         "DRILL_TOKEN"),
    other_recipe=("trainer:", "config: <secret>\ntrainer:", "recipe.yaml"),
)  # fmt: skip
def recipe_steals(place: Place, change: tuple[str, str, str]) -> tuple[Command, str]:
    old, new, word = change
    os.environ["DRILL_TOKEN"] = SECRET  # of the test process too
    return _edit(place, old, new), word


@family(
    image_size=("image_size: 64\n    steps", "image_size: 1000000000000\n    steps", "image_size"),
    image_of_a_dataset=("length: 13, image_size: 64", "length: 13, image_size: 99999999", "image"),
    head_channels=("head_channels: 8", "head_channels: 1000000000000", "head_channels"),
    many_digits=("head_channels: 8", f"head_channels: {'9' * 5000}", "5000 digits"),
    backbone=("backbone: small", "backbone: [[conv, 100000000], [conv, 100000000]]", "backbone"),
    backbone_layers=("backbone: small", f"backbone: [{'[conv, 8], ' * 20_000}]", "20,000 items"),
    anchors=("[[1.5, 1.5], [3, 3]]", "[" + "[1, 1], " * 20_000 + "]", "anchors"),
    anchors_infinite=("[[1.5, 1.5], [3, 3]]", "[[.inf, .nan]]", "anchors"),
    batch=("detection_batch_size: 4", "detection_batch_size: 1000000000000", "batch_size"),
    workers=("num_workers: 0", "num_workers: 1000000", "num_workers"),
    seed=("seed_everything: 0", f"seed_everything: 1{'0' * 400}", "seed"),
    negative_seed=("seed_everything: 0", "seed_everything: -5", "seed"),
    epochs=("max_epochs: 4", f"max_epochs: 1{'0' * 400}", ""),
    steps_per_epoch=("steps_per_epoch: 6", "steps_per_epoch: -1", "steps_per_epoch"),
    devices=("devices: 1", "devices: 1000000", "devices"),
    sizes=("sizes: [32, 64]", "sizes: [1000000000]", "size 1000000000"),
    every=("every_n_steps: 2", "every_n_steps: .inf", "every_n_steps"),
)  # fmt: skip
def recipe_number(place: Place, change: tuple[str, str, str]) -> tuple[Command, str]:
    old, new, word = change
    command = [word for word in _edit(place, old, new) if "num_workers" not in word]
    return command, word


def _bomb() -> str:
    lines = [f"a0: &a0 [{', '.join(['x'] * 9)}]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 9)]
    return "\n".join(lines)


@family(
    alias_bomb=_bomb(),
    deep="a: " + "[" * 50_000,
    deep_block="\n".join("  " * k + "a:" for k in range(1_000)),
    tag="a: !!python/object/apply:os.getcwd []",
    large="a: " + "x" * (2 << 20),
    nul="a: \0",
    not_utf8=b"a: \xff\xfe",
    duplicate="model: 1\nmodel: 2",
    list="- 1",
    number="5",
    recursive="a: &a [*a]",
    many_keys="\n".join(f"k{k}: 1" for k in range(60_000)),
    reference_to_itself="seed_everything: ${seed_everything}",
    reference_circle="a: ${b}\nb: ${a}\nseed_everything: ${a}",
    reference_bomb="\n".join([f"k{k}: ${{k{k + 1}}}${{k{k + 1}}}" for k in range(40)] + ["k40: x"]),
    key_of_a_megabyte="x" * (900 << 10) + ": 1",
)  # fmt: skip
def recipe_text(place: Place, text: str | bytes) -> tuple[Command, str]:
    content = text if isinstance(text, bytes) else text.encode()
    (place.work / "recipe.yaml").write_bytes(content + b"\n")
    return fit(place), "recipe.yaml"


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir(parents=True)


FILES = {"fifo": fifo, "socket": unix_socket, "zeros": _device, "folder": _folder}


@family(**FILES)
def recipe_is(place: Place, make: Callable[[Path], Any]) -> tuple[Command, str]:
    make(place.work / "recipe.yaml")
    return fit(place), "recipe.yaml"


# checkpoints


def changed(place: Place, name: str = "m.ckpt", **values: Any) -> Path:
    """Write a copy of the run's checkpoint with these values in place of its own."""
    content = torch.load(place.ckpt, weights_only=True)
    for key, value in values.items():
        if key in content["hyper_parameters"]:
            content["hyper_parameters"][key] = value
        else:
            content[key] = value
    torch.save(content, place.work / name)
    return place.work / name


def _callback(name: str, state: Any) -> Callable[[Place], dict[str, Any]]:
    def change(place: Place) -> dict[str, Any]:
        callbacks = torch.load(place.ckpt, weights_only=True)["callbacks"]
        key = next((key for key in callbacks if key.startswith(name)), name)
        return {"callbacks": callbacks | {key: state}}

    return change


_MOMENTUM = [{"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": []}]
_NAN = float("nan")


@family(
    loops_are_text={"loops": "x"},
    loops_are_empty={"loops": {}},
    loops_of_other_values={"loops": {"fit_loop": {"epoch_loop.batch_progress": 5}}},
    callbacks_are_a_list={"callbacks": [1, 2]},
    callback_is_a_number=_callback("ModelCheckpoint", 5),
    callback_of_text=_callback("MultiScale", "x"),
    no_optimizer={"optimizer_states": []},
    optimizers_are_text={"optimizer_states": "x"},
    optimizer_of_another_size={"optimizer_states": _MOMENTUM},
    no_schedule={"lr_schedulers": []},
    schedule_of_text={"lr_schedulers": ["x"]},
    step_is_text={"global_step": "x"},
    step_is_negative={"global_step": -5},
    step_is_huge={"global_step": 10**30},
    epoch_is_nan={"epoch": _NAN},
    epoch_is_huge={"epoch": 10**18},
    step_metrics_are_text={"step_metrics": "x"},
    step_metrics_of_escapes={"step_metrics": {"\x1b[31m" * 1000: "x"}},
    datamodule_is_text={"CombinedDataModule": "x"},
    version_is_a_number={"pytorch-lightning_version": 5},
    version_is_new={"pytorch-lightning_version": "99999.0.0"},
    run_id_is_a_list={"mlflow_run_id": ["x"]},
    run_id_of_escapes={"mlflow_run_id": "\x1b[31m\n" * 1000},
    schedule_is_a_class={"schedule": {"class_path": "os.system"}},
    momentum_is_nan={"momentum": _NAN},
)
def resumed(place: Place, change: Any) -> tuple[Command, str]:
    values = change(place) if callable(change) else change
    return fit(place, "--ckpt_path", str(changed(place, **values))), "m.ckpt"


@case
def checkpoint_deletes(place: Place) -> tuple[Command, str]:
    """Let `ModelCheckpoint` remove what a checkpoint calls its worst one, after a better one."""
    run = place.copy_run()
    target = str(run / "checkpoints" / ".." / ".." / ".." / ".." / "victim" / "photos")
    worst = torch.tensor(-1.0)
    models = {
        "monitor": "val/AP50", "best_model_score": worst, "best_model_path": target,
        "current_score": worst, "best_k_models": {target: worst}, "kth_best_model_path": target,
        "kth_value": worst, "last_model_path": target,
    }  # fmt: skip
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    keys = [key for key in content["callbacks"] if key.startswith("ModelCheckpoint")]
    assert keys
    content["callbacks"][keys[0]] = models
    torch.save(content, run / "checkpoints/last.ckpt")
    callback = (
        "callbacks:\n    - {class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: "
        "{filename: best, monitor: val/AP50, mode: max, enable_version_counter: false}}"
    )
    _edit(place, "callbacks:", callback)
    command = [word for word in resume(place) if not word.startswith("--trainer")]
    return [*command, "--trainer.max_epochs=6"], ""


@family(relative="../../../victim/run", absolute="{victim}/run")
def checkpoint_names_a_folder(place: Place, run_id: str) -> tuple[Command, str]:
    """The folder of the journal of `validate` is named after the checkpoint's run."""
    logger = _logger("tracking_uri: sqlite:///mlflow.db")
    command = _edit(place, "logger: false", logger)
    path = changed(place, mlflow_run_id=run_id.format(victim=place.victim))
    return ["validate", *command[1:5], "--ckpt_path", str(path)], ""


def _detect(place: Place, *words: str | Path) -> list[str]:
    return ["detect", *map(str, words), "--output", str(place.work / "out")]


@family(
    of_8192_px={"image_size": 8192},
    of_8192_by_8192_px={"image_size": [8192, 8192]},
    anchors_of_1e38={"anchors_wh_cell": [[1e38, 1e38], [3, 3]]},
    threshold_is_text={"iou_threshold": "x"},
    threshold_is_nan={"iou_threshold": _NAN},
    names_of_escapes={"tree": [["\x1b[31m", "-", "\x1b]0;owned\x07"]]},
    names_of_a_megabyte={"tree": [["a", "-", "a" * 2**20]]},
    weights_of_nan={"state_dict": None},
)
def detector(place: Place, values: dict[str, Any]) -> tuple[Command, str]:
    values = dict(values)
    if "state_dict" in values:
        state = torch.load(place.ckpt, weights_only=True)["state_dict"]
        values["state_dict"] = {
            key: torch.full_like(tensor, _NAN) if tensor.is_floating_point() else tensor
            for key, tensor in state.items()
        }
    return _detect(place, changed(place, **values), write_image(place.work / "x.jpg")), ""


@family(**FILES)
def checkpoint_is(place: Place, make: Callable[[Path], Any]) -> tuple[Command, str]:
    make(place.work / "m.ckpt")
    return _detect(place, place.work / "m.ckpt", write_image(place.work / "x.jpg")), "m.ckpt"


@family(
    export=lambda p: ["export", "m.ckpt", "--output", "m.onnx"],
    export_darknet=lambda p: ["darknet", "export", "m.ckpt", "--output", "m"],
    classify=lambda p: ["classify", "m.ckpt", str(write_image(p.work / "x.jpg"))],
    speed=lambda p: ["speed", "m.ckpt"],
    model=lambda p: ["mlflow", "model", "m.ckpt", "--output", "model"],
    fit=lambda p: fit(p, "--ckpt_path", "m.ckpt"),
    pretrained=lambda p: fit(p, "--model.init_args.pretrained=m.ckpt"),
    validate=lambda p: ["validate", *fit(p)[1:5], "--ckpt_path", "m.ckpt"],
)
def fifo_as_checkpoint(place: Place, command: Any) -> tuple[Command, str]:
    fifo(place.work / "m.ckpt")
    return command(place), "m.ckpt"


# run folders


@family(
    **{
        f"{kind}_as_{name.rpartition('/')[2].replace('.', '_').lstrip('_')}": (name, kind)
        for kind in ("fifo", "link")
        for name in (
            ".lock", "checkpoints/last.ckpt", "finished.yaml", "tree.tsv", "anchors.csv",
            "recipe.yaml", "resolved.yaml", "batches/steps.crc32", "mlflow/journal.jsonl",
            "mlflow/token", "mlflow/lock", "mlflow/uploaded.json", "mlflow_run_id",
        )
    }
)  # fmt: skip
def run_folder(place: Place, change: tuple[str, str]) -> tuple[Command, str]:
    name, kind = change
    run = place.copy_run()
    (run / name).unlink(missing_ok=True)
    (run / name).parent.mkdir(exist_ok=True)
    if kind == "fifo":
        fifo(run / name)
    else:
        (run / name).symlink_to(place.secret)
    logger = _logger("tracking_uri: sqlite:///mlflow.db")
    _edit(place, "logger: false", logger)
    return resume(place), ""


@family(checkpoints="checkpoints", journal="mlflow", files="mlflow/files", batches="batches",
        report="report")  # fmt: skip
def run_folder_links(place: Place, name: str) -> tuple[Command, str]:
    """A folder of the run is a link to one of the user's."""
    run = place.copy_run()
    shutil.rmtree(run / name, ignore_errors=True)
    (run / name).symlink_to(place.victim)
    _edit(place, "logger: false", _logger("tracking_uri: sqlite:///mlflow.db"))
    return resume(place), ""


# journals


def _open(**values: Any) -> dict[str, Any]:
    return {
        "op": "open", "t": 1, "store": "sqlite:///mlflow.db", "experiment": "e", "name": "n",
        "run_ids": [None, None], "checkpoint_run_id": None, "parent": None,
        "existing_run_only": False, **values,
    }  # fmt: skip


def sync(place: Place, *entries: Any, lines: bytes = b"", **opened: Any) -> list[str]:
    """Write a journal; return the command that uploads it to the user's store."""
    journal = place.work / "run" / "mlflow"
    (journal / "files").mkdir(parents=True)
    texts = [json.dumps(entry) for entry in (_open(**opened), *entries)]
    (journal / "journal.jsonl").write_bytes("\n".join(texts).encode() + b"\n" + lines)
    return [
        "mlflow",
        "sync",
        str(place.work / "run"),
        "--store",
        f"sqlite:///{place.work}/mlflow.db",
    ]


@family(
    source={"source": "../../victim/secret.txt"},
    absolute_source={"source": "{victim}/secret.txt"},
    linked={"link": "x"},
    linked_folder={"link": "."},
    folder={"folder": "../../../../victim"},
)
def journal_steals(place: Place, change: dict[str, str]) -> tuple[Command, str]:
    entry = {"op": "file", "file": "x", "folder": change.get("folder", "")}
    if "source" in change:
        entry["source"] = change["source"].format(victim=place.victim)
    command = sync(place, entry)
    files = place.work / "run/mlflow/files"
    if change.get("link") == "x":
        (files / "x").symlink_to(place.secret)
    elif change.get("link") == ".":
        files.rmdir()
        files.symlink_to(place.victim)
        entry["file"] = "secret.txt"
        shutil.rmtree(place.work / "run")
        command = sync(place, entry)
        files.rmdir()
        files.symlink_to(place.victim)
    else:
        (files / "x").write_text("x") if "folder" in change else None
    return command, "run"


METRICS = {"op": "metrics", "t": 1, "step": 1, "values": {"a": 1.0}}


@family(
    run_ids_are_lists={"run_ids": [[1]]},
    run_ids_are_mappings={"run_ids": [{"a": 1}]},
    run_ids_of_a_megabyte={"run_ids": ["x" * 2**20]},
    many_run_ids={"run_ids": [f"{k:032x}" for k in range(2_000)]},
    run_id_of_a_path={"run_ids": ["../../victim"]},
    experiment_is_empty={"experiment": ""},
    experiment_of_a_megabyte={"experiment": "x" * 2**20},
    experiment_of_escapes={"experiment": "\x1b[31m\0"},
    name_of_a_megabyte={"name": "x" * 2**20},
    parent_is_a_list={"parent": [1]},
    parent_of_quotes={"parent": "' or 1 = 1 --"},
    store_is_another={"store": "sqlite:///{victim}/other.db"},
    store_is_a_plugin={"store": "evil://x"},
)
def journal_opens(place: Place, values: dict[str, Any]) -> tuple[Command, str]:
    values = {
        k: v.replace("{victim}", str(place.victim)) if k == "store" else v
        for k, v in values.items()
    }
    command = sync(place, METRICS, **values)
    return (command[:3] if "store" in values else command), "run"


@family(
    unknown_status={"op": "status", "t": 1, "status": "NONSENSE"},
    status_of_the_far_future={"op": "status", "t": 2**62, "status": "FINISHED"},
    step_of_2_to_the_62={**METRICS, "step": 2**62},
    value_of_1e308={**METRICS, "values": {"a": 1.7e308}},
    value_of_nan={**METRICS, "values": {"a": math.nan}},
    name_is_empty={**METRICS, "values": {"": 1.0}},
    name_of_a_megabyte={**METRICS, "values": {"x" * 2**20: 1.0}},
    name_of_a_path={**METRICS, "values": {"../../victim/a": 1.0}},
    many_values={**METRICS, "values": {f"a{k}": 1.0 for k in range(2_000)}},
    many_params={"op": "params", "values": {f"a{k}": "1" for k in range(2_000)}},
    param_of_a_megabyte={"op": "params", "values": {"a": "x" * 2**20}},
    many_tags={"op": "tags", "values": {f"a{k}": "1" for k in range(2_000)}},
    tag_of_mlflow={"op": "tags", "values": {"mlflow.parentRunId": "x", "mlflow.user": "root"}},
    datasets_of_other_values={"op": "inputs", "datasets": [1, {"a": 2}]},
    deep={"op": "inputs", "datasets": []},
    image_of_a_path={"op": "image", "t": 1, "file": "x", "key": "../../../../victim/a", "step": 1},
    model_of_a_path={"op": "model", "file": "x", "name": "../../victim", "step": 1},
    model_of_a_quote={"op": "model", "file": "x", "name": "' OR name != '", "step": 1},
)
def journal_entry(place: Place, entry: dict[str, Any]) -> tuple[Command, str]:
    command = sync(place, entry)
    write_image(place.work / "run/mlflow/files/x.png")
    shutil.move(place.work / "run/mlflow/files/x.png", place.work / "run/mlflow/files/x")
    return command, "run"


@family(
    deep=b'{"op": "params", "values": ' + b"[" * 200_000 + b"\n",
    of_a_long_line=b'{"op": "metrics", "values": "' + b"x" * (150 << 20) + b'"}\n',
    of_nul=b"\0" * (20 << 20) + b"\n",
    of_many_digits=b'{"op": "metrics", "t": 1, "step": ' + b"9" * 5000 + b', "values": {}}\n',
    of_escapes=b"\x1b[31mx\n",
    of_many_unreadable_lines=b"x\n" * 200_000,
)  # fmt: skip
def journal_lines(place: Place, lines: bytes) -> tuple[Command, str]:
    return sync(place, lines=lines), "run"


@family(
    deep="[" * 200_000,
    number="5",
    offset_is_text='{"STORE": {"run_id": "x", "offset": "x"}}',
    offset_is_negative='{"STORE": {"run_id": "x", "offset": -5}}',
    offset_is_huge=f'{{"STORE": {{"run_id": "x", "offset": {10**30}}}}}',
    run_id_is_a_list='{"STORE": {"run_id": ["x"], "offset": 0}}',
    pending_is_text='{"STORE": {"run_id": "x", "offset": 0, "pending": "x"}}',
    of_many_digits='{"STORE": {"run_id": "x", "offset": ' + "9" * 5000 + "}}",
)
def uploads(place: Place, text: str) -> tuple[Command, str]:
    command = sync(place, METRICS)
    file = place.work / "run/mlflow/uploaded.json"
    file.write_text(text.replace("STORE", f"sqlite:///{place.work}/mlflow.db"))
    return command, "run"


@family(**FILES)
def journal_is(place: Place, make: Callable[[Path], Any]) -> tuple[Command, str]:
    command = sync(place)
    (place.work / "run/mlflow/journal.jsonl").unlink()
    make(place.work / "run/mlflow/journal.jsonl")
    return command, "run"


@case
def journal_of_a_link_that_contains_itself(place: Place) -> tuple[Command, str]:
    command = sync(place, METRICS)
    for name in ("a", "b"):
        (place.work / "run" / name).symlink_to(place.work / "run")
    return command, "run"


# chains


def finished_stage(place: Place) -> Path:
    """Train, and return the run folder as that of the first stage of a chain."""
    fit(place)
    run = place.work / "outputs/chain/c/1-recipe/run"
    shutil.copytree(place.run, run)
    return run


@family(
    alias_bomb=_bomb(),
    deep="a: " + "[" * 50_000,
    infinite_step="step: .inf\ncheckpoint: x",
    checkpoint_outside="step: 1\ncheckpoint: ../../../../../victim/secret.txt",
    list="- 1",
    nul="step: \0",
)
def finished(place: Place, text: str) -> tuple[Command, str]:
    (finished_stage(place) / "finished.yaml").write_text(text)
    return ["chain", "c", "recipe.yaml", "--allow-module", "tests.helpers.diary"], "recipe"


@family(
    alias_bomb=_bomb(),
    deep="a: " + "[" * 50_000,
    list="- 1",
    text="x",
    empty="",
    no_model="trainer: {}",
)
def resolved(place: Place, text: str) -> tuple[Command, str]:
    run = finished_stage(place)
    (run / "finished.yaml").write_text("step: 24\ncheckpoint: checkpoints/last.ckpt\n")
    (run / "resolved.yaml").write_text(text)
    return ["chain", "c", "recipe.yaml", "--allow-module", "tests.helpers.diary"], "recipe"


# working folders


def tracked_fit(place: Place) -> list[str]:
    """Return the command that trains two steps, which are logged to the user's store."""
    return _edit(place, "logger: false", _logger("tracking_uri: sqlite:///mlflow.db"))


@case
def repository_with_fsmonitor(place: Place) -> tuple[Command, str]:
    git = place.work / ".git"
    for name in ("objects", "refs/heads"):
        (git / name).mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    program = place.work / "monitor"
    program.write_text(f"#!/bin/sh\ntouch {place.owned}\n")
    program.chmod(0o755)
    (git / "config").write_text(f"[core]\nrepositoryformatversion = 0\nfsmonitor = {program}\n")
    (git / "refs/heads/main").write_text("0" * 39 + "1\n")
    return tracked_fit(place), ""


@family(
    head=("HEAD", b"\x1b[31m" * 10),
    head_of_a_path=("HEAD", b"ref: ../../victim/secret.txt\n"),
    head_of_a_gigabyte=("HEAD", None),
)
def repository(place: Place, change: tuple[str, bytes | None]) -> tuple[Command, str]:
    (place.work / ".git").mkdir()
    file = place.work / ".git" / change[0]
    if change[1] is None:
        with file.open("wb") as sparse:
            sparse.truncate(1 << 30)
    else:
        file.write_bytes(change[1])
    return tracked_fit(place), ""


@case
def repository_head_fifo(place: Place) -> tuple[Command, str]:
    fifo(place.work / ".git" / "HEAD")
    return tracked_fit(place), ""


@family(**FILES)
def store_is(place: Place, make: Callable[[Path], Any]) -> tuple[Command, str]:
    (place.work / "mlflow.db").unlink()
    make(place.work / "mlflow.db")
    return ["mlflow", "compare"], "mlflow.db"


@family(fifo=fifo, link=lambda path: path.symlink_to(path.parent.parent / "victim/secret.txt"))
def store_lock(place: Place, make: Callable[[Path], Any]) -> tuple[Command, str]:
    make(place.work / "mlflow.db.lock")
    return sync(place, METRICS), ""


@family(text=b"x" * 5000, header=b"SQLite format 3\0" + b"\xff" * 5000)
def store_of(place: Place, content: bytes) -> tuple[Command, str]:
    (place.work / "mlflow.db").write_bytes(content)
    return ["mlflow", "compare"], "mlflow.db"


@family(
    python_module="mlflow.py", library="sqlalchemy.py", start_up="sitecustomize.py"
)  # fmt: skip
def shadowed(place: Place, name: str) -> tuple[Command, str]:
    """A module in the working folder must not replace that of the dashboard."""
    (place.work / name).write_text(f"open({str(place.owned)!r}, 'w')\nraise SystemExit\n")

    def dashboard() -> int:
        from yolo_lightning.cli.commands.mlflow import ui

        def serve(command: Sequence[str], environment: Mapping[str, str]) -> int:
            program = [*command[: command.index("ui")], "--version"]
            return subprocess.run(program, env=dict(environment), check=False).returncode

        ui._serve = serve
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        ui.main(["--port", str(port)])
        return 0

    return dashboard, ""


@case
def settings_of_matplotlib(place: Place) -> tuple[Command, str]:
    (place.work / "matplotlibrc").write_text("backend: module://evil\ntext.usetex: True\n")
    (place.work / "evil.py").write_text(f"open({str(place.owned)!r}, 'w')\n")
    data = place.work / "data"
    write_image(data / "images" / "x.jpg")
    (data / "labels").mkdir()
    (data / "labels/x.txt").write_text("0 .5 .5 .5 .5\n")
    (data / "data.yaml").write_text("train: images\nnames: [a]\n")
    return ["anchors", str(data / "data.yaml"), "--num", "1", "--output", "plots"], ""


# images, lists and videos of `detect`


@family(
    list_of_zeros=("x.txt", _device),
    list_fifo=("x.txt", fifo),
    image_fifo=("x.jpg", fifo),
    image_of_zeros=("x.jpg", _device),
    video_fifo=("x.mp4", fifo),
    video_of_zeros=("x.mp4", _device),
    video_socket=("x.mp4", unix_socket),
)
def detect(place: Place, change: tuple[str, Callable[[Path], Any]]) -> tuple[Command, str]:
    change[1](place.work / change[0])
    return _detect(place, place.ckpt, place.work / change[0]), change[0]


@family(
    playlist=("x.mp4", "#EXTM3U\n#EXTINF:1,\n{victim}/secret.txt\n"),
    playlist_of_a_server=("x.mp4", "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n"),
    concatenation=("x.mp4", "ffconcat version 1.0\nfile '{victim}/secret.txt'\n"),
    concatenation_of_itself=("x.mkv", "ffconcat version 1.0\nfile 'x.mkv'\n"),
    playlist_without_end=("x.ts", "#EXTM3U\n" + "#EXTINF:1,\nx.ts\n" * 50_000),
    list_of_devices=("x.txt", "/dev/zero\n/dev/stdin\n"),
    list_of_secrets=("x.txt", "{victim}/secret.txt\n"),
    list_of_nul=("x.txt", "a\0b\n"),
    list_of_a_long_name=("x.txt", "a" * 2**20 + "\n"),
    list_of_itself=("x.txt", "x.txt\n"),
    list_of_users=("x.txt", "~nobody-there/x.jpg\n"),
    list_of_escapes=("x.txt", "\x1b[31m.jpg\n"),
)
def detect_text(place: Place, change: tuple[str, str]) -> tuple[Command, str]:
    (place.work / change[0]).write_text(change[1].format(victim=place.victim))
    return _detect(place, place.ckpt, place.work / change[0]), ""


@case
def detect_folder_of_links(place: Place) -> tuple[Command, str]:
    for name in ("a", "b", "c"):
        (place.work / "in" / name).mkdir(parents=True)
        for other in "abc":
            (place.work / "in" / name / other).symlink_to(place.work / "in")
    write_image(place.work / "in/x.jpg")
    return _detect(place, place.ckpt, place.work / "in"), ""


@case
def detect_image_with_escape_in_its_name(place: Place) -> tuple[Command, str]:
    write_image(place.work / "in/x.jpg").rename(place.work / "in/\x1b[31m.jpg")
    return _detect(place, place.ckpt, place.work / "in"), ""


# requests to the served model


def predict(place: Place, images: list[Any], params: dict[str, Any] | None = None) -> Command:
    def request() -> int:
        import mlflow.pyfunc
        import pandas as pd
        from mlflow.exceptions import MlflowException

        from yolo_lightning.serving.mlflow_model import save_model

        save_model(place.ckpt, place.work / "model")
        model = mlflow.pyfunc.load_model(str(place.work / "model"))
        try:
            print(model.predict(pd.DataFrame({"image": images}), params))
        except MlflowException as error:
            print(error)
            return 2
        return 0

    return request


def image_bytes(place: Place) -> bytes:
    return write_image(place.work / "x.jpg").read_bytes()


@family(
    text=["x"],
    number=[5],
    nothing=[None],
    empty=[b""],
    noise=[bytes(range(256)) * 100],
    svg=[b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'],
    zeros=[bytes(50 << 20)],
    mixed=[b"", "x"],
    many=[b"x"] * 20_000,
    jpeg_bomb=[jpeg_bomb],
    mjpeg=[b"\xff\xd8\xff" * 1000],
    gif=[b"GIF89a" + b"\xff" * 100],
    playlist=[b"#EXTM3U\nfile:///etc/passwd\n"],
)
def request(place: Place, images: list[Any]) -> tuple[Command, str]:
    return predict(place, [value() if callable(value) else value for value in images]), ""


@family(
    threshold_of_nan={"score_threshold": _NAN},
    threshold_of_text={"score_threshold": "x"},
    threshold_of_infinity={"iou_threshold": math.inf},
    threshold_list={"score_threshold": [0.1]},
    interpolation={"interpolation": "x" * 2**20},
    unknown={"top": 10**30},
    zero={"score_threshold": 0.0, "iou_threshold": 1.0, "tree_threshold": 0.0},
)
def parameter(place: Place, params: dict[str, Any]) -> tuple[Command, str]:
    return predict(place, [image_bytes(place)], params), ""


@case
def many_large_images(place: Place) -> tuple[Command, str]:
    data = write_image(place.work / "big.jpg", 8000, 8000).read_bytes()
    return predict(place, [data] * 200), ""


# servers


class Server:
    """A server that answers every request with the same bytes, and records what it is sent.

    Args:
        chunks: yields the bytes of an answer.
        log: receives the requests.
    """

    def __init__(self, chunks: Callable[[], Any], log: Path) -> None:
        self.chunks, self.log = chunks, log
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                with self.log.open("ab") as log:
                    log.write(connection.recv(1 << 16))
                for chunk in self.chunks():
                    connection.sendall(chunk)
            except OSError:
                return


_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def _flood() -> Any:
    yield _HEAD + b"\r\n"
    for _ in range(4_000):
        yield b" " * (1 << 20)


def _drip() -> Any:
    yield _HEAD + b"\r\n"
    for _ in range(600):
        time.sleep(1)
        yield b" "


def _gzip_bomb() -> Any:
    packer = zlib.compressobj(9, wbits=31)
    head = packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    body = head + 4_000 * block
    yield _HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def _headers() -> Any:
    yield b"HTTP/1.1 200 OK\r\n"
    for number in range(10**6):
        yield b"X-%d: x\r\n" % number


def _body(text: bytes, status: bytes = b"200 OK") -> Callable[[], Any]:
    head = b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\nConnection: close\r\n"

    def chunks() -> Any:
        yield head + b"Content-Length: %d\r\n\r\n" % len(text) + text

    return chunks


@family(
    flood=_flood,
    drip=_drip,
    gzip_bomb=_gzip_bomb,
    headers=_headers,
    deep=_body(b"[" * 200_000),
    list=_body(b"[]"),
    number=_body(b"5"),
    escapes=_body(b'{"error_code": "X", "message": "\\u001b[31m"}', b"500 Oh"),
    long_message=_body(b'{"error_code": "X", "message": "' + b"x" * 10**7 + b'"}', b"400 No"),
    number_of_many_digits=_body(b'{"experiment": {"creation_time": ' + b"9" * 5000 + b"}}"),
    closes=lambda: iter(()),
)
def server(place: Place, chunks: Callable[[], Any]) -> tuple[Command, str]:
    uri = Server(chunks, place.work / "received.txt").uri
    os.environ["MLFLOW_TRACKING_TOKEN"] = "token-of-the-user"  # the store is the user's own
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1"  # three for an answer
    return [*sync(place, METRICS)[:3], "--store", uri], "run"


@family(
    recipe=lambda p, uri: _edit(p, "logger: false", _logger(f"tracking_uri: {uri}")),
    journal=lambda p, uri: sync(p, METRICS, store=uri)[:3],
)
def token_for(place: Place, command: Any) -> tuple[Command, str]:
    """Credentials of the environment do not go to a store that a file names."""
    os.environ["MLFLOW_TRACKING_TOKEN"] = SECRET
    uri = Server(_body(b"{}"), place.work / "received.txt").uri
    return command(place, uri), ""


@case
def redirect_with_a_token(place: Place) -> tuple[Command, str]:
    """A store that redirects to another server does not get the token there."""
    os.environ["MLFLOW_TRACKING_TOKEN"] = SECRET
    other = Server(_body(b"{}"), place.work / "received.txt").uri.replace("127.0.0.1", "localhost")
    answer = b"HTTP/1.1 307 X\r\nLocation: %s/x\r\nContent-Length: 0\r\n\r\n" % other.encode()
    uri = Server(lambda: iter([answer]), place.victim.parent / "own.txt").uri
    return [*sync(place, METRICS)[:3], "--store", uri], ""
