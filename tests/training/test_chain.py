"""A chain of trainings: what is checked, started, skipped and handed on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from tests.helpers.chain import NAMES, Miniature
from tests.helpers.paths import REPO
from yolo_lightning.cli.main import main
from yolo_lightning.cli.recipe import RecipeCLI
from yolo_lightning.cli.runs import FINISHED

SCRIPT = str(REPO / "recipes/cluster/chain.sh")
TINY = [["conv", 4, 3], ["pool", 32, 32]]


def edit(file: Path, **values) -> Path:
    """Set values of a recipe by dotted key, with ``__`` for the dots."""
    recipe = yaml.safe_load(file.read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        part = recipe
        for name in parents:
            part = part[int(name) if isinstance(part, list) else name]
        part[last] = value
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


@pytest.fixture(scope="module", autouse=True)
def one_parser():
    """Build the parser of a command once: it takes a tenth of a second."""
    original = RecipeCLI.setup_parser
    built: dict[str, dict[str, Any]] = {}

    def set_up(cli, *args):
        before, command = set(vars(cli)), cli.command_line[0]
        if command not in built:
            original(cli, *args)
            built[command] = {k: v for k, v in vars(cli).items() if k not in before}
        vars(cli).update(built[command])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecipeCLI, "setup_parser", set_up)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two recipes, and the first one's finished run in a chain."""
    folder = tmp_path_factory.mktemp("trained")
    Miniature((2, 2, 2, 2), (32, 32), TINY, batch_size=2, logger=False).write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        root = "--trainer.default_root_dir=outputs/chain/mine/1-classify_small"
        assert main(["fit", "--config", "classify_small.yaml", root]) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path, monkeypatch):
    """A copy of the folder, which is the working folder."""
    shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def chain(capsys, name="mine", stages=2):
    """Run the check of the first stages; return exit code, output and messages."""
    capsys.readouterr()
    code = main(["chain", name, *(f"{stage}.yaml" for stage in NAMES[:stages])])
    return code, *capsys.readouterr()


def run_folder(folder: Path) -> Path:
    return next(folder.glob("outputs/chain/mine/1-classify_small/2*"))


def test_finished_stage_is_skipped_and_hands_on_its_best_checkpoint(folder, capsys):
    # paths, devices, precision and the like may change after a stage has finished
    edit(folder / "classify_small.yaml", data__init_args__num_workers=1, trainer__devices=2,
         trainer__precision="bf16-mixed")  # fmt: skip
    shutil.copy(REPO / "recipes/trees/shapes.tsv", folder)
    edit(folder / "classify_small.yaml", model__init_args__tree="shapes.tsv")
    code, output, messages = chain(capsys)
    assert code == 0, messages
    best = f"{run_folder(Path())}/checkpoints/best.ckpt"
    assert f"1-classify_small  finished at step 2: {best}" in messages
    assert f"2-classify_large  starts from {best}" in messages
    assert output == (
        "classify_large.yaml --trainer.default_root_dir=outputs/chain/mine/2-classify_large "
        f"--model.pretrained={best}\n"
    )


def test_interrupted_stage_resumes_in_its_run(folder, capsys):
    (run_folder(folder) / FINISHED).unlink()
    code, output, messages = chain(capsys)
    last = f"{run_folder(Path())}/checkpoints/last.ckpt"
    assert code == 0
    assert f"resumes at step 2: {last}" in messages
    first, second = output.splitlines()
    assert first.endswith(f"--ckpt_path={last}")
    # the best checkpoint is not known yet, but the folder of the runs is
    assert second.endswith("--model.pretrained=outputs/chain/mine/1-classify_small")


@pytest.mark.slow
def test_finished_run_is_marked_again_after_resuming_it(folder, capsys):
    (run_folder(folder) / FINISHED).unlink()
    root = "--trainer.default_root_dir=outputs/chain/mine/1-classify_small"
    assert main(["fit", "--config", "classify_small.yaml", root, "--resume", "auto"]) == 0
    record = yaml.safe_load((run_folder(folder) / FINISHED).read_text())
    assert record == {"step": 2, "checkpoint": "checkpoints/best.ckpt"}
    # what the resumed process recorded is not taken for a change
    assert chain(capsys, stages=1)[0] == 0


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model__init_args__learning_rate": 0.5}, "model.learning_rate is 0.5, but was 0.05"),
        ({"trainer__max_steps": 9}, "trainer.max_steps is 9, but was 2"),
        ({"data__init_args__image_size": 64}, "data.image_size is 64, but was 32"),
        (
            {"trainer__callbacks__0__init_args__monitor": "val/top5"},
            "callbacks.ModelCheckpoint.monitor is top5, but was top1",
        ),
    ],
)
def test_stage_that_was_changed_after_it_finished_is_refused(folder, capsys, change, key):
    edit(folder / "classify_small.yaml", **change)
    code, output, messages = chain(capsys, stages=1)
    assert (code, output) == (2, "")
    assert f"stage 1-classify_small: {key} when the stage was trained" in messages


def test_tree_whose_rows_changed_after_the_stage_finished_is_refused(folder, capsys):
    text = (REPO / "recipes/trees/shapes.tsv").read_text()
    (folder / "shapes.tsv").write_text(text.replace("\tring", "\tannulus"))
    edit(folder / "classify_small.yaml", model__init_args__tree="shapes.tsv")
    code, _, messages = chain(capsys, stages=1)
    assert code == 2
    assert "model.tree was changed after the stage was trained: entry 4" in messages


BAD_TEXTS = ["", "a: " + "[" * 50_000]
BAD_STEPS = ["1\ncheckpoint: ../../../secret.ckpt", ".inf\ncheckpoint: checkpoints/a.ckpt"]


@pytest.mark.parametrize(
    "text", [*BAD_TEXTS, *(f"step: {step}\n" for step in BAD_STEPS), "garbage: ["]
)
def test_damaged_record_of_a_finished_stage_is_named(folder, capsys, text):
    (run_folder(folder) / FINISHED).write_text(text)
    code, output, messages = chain(capsys)
    assert (code, output) == (2, "")
    assert f"{run_folder(Path()) / FINISHED}: expected the keys step and checkpoint" in messages


@pytest.mark.parametrize("text", ["- 1", BAD_TEXTS[1]])
def test_damaged_values_of_a_finished_stage_are_named(folder, capsys, text):
    (run_folder(folder) / "resolved.yaml").write_text(text)
    code, _, messages = chain(capsys)
    assert code == 2
    assert f"{run_folder(Path()) / 'resolved.yaml'}:" in messages


def test_stages_that_disagree_in_backbone_are_refused(folder, capsys):
    edit(folder / "classify_large.yaml", model__init_args__backbone="small")
    code, output, messages = chain(capsys)
    assert (code, output) == (2, "")
    assert "model.backbone of 1-classify_small and of 2-classify_large differ" in messages
    assert "2 entries in 1-classify_small, 11 in 2-classify_large" in messages


def test_missing_checkpoint_is_reported(folder, capsys):
    (run_folder(folder) / "checkpoints/best.ckpt").unlink()
    code, output, messages = chain(capsys)
    assert (code, output) == (2, "")
    assert "the best checkpoint of 1-classify_small" in messages
    assert "best.ckpt" in messages


def test_missing_pretrained_weights_are_reported(folder, capsys):
    edit(folder / "classify_small.yaml", model__init_args__pretrained="gone.weights")
    code, output, messages = chain(capsys, name="new", stages=1)
    assert (code, output) == (2, "")
    assert "stage 1-classify_small: model.pretrained 'gone.weights'" in messages
    edit(folder / "classify_small.yaml", model__init_args__pretrained="")
    assert "model.pretrained is ''; allowed: a file, a folder" in chain(capsys, "new", 1)[2]


def test_stage_trained_from_another_checkpoint_is_refused(folder, capsys):
    shutil.copytree(run_folder(folder), folder / "outputs/chain/mine/2-classify_large/run")
    code, _, messages = chain(capsys)
    assert code == 2
    assert "stage 2-classify_large: was started from None, but the best checkpoint of" in messages
    (run_folder(folder) / FINISHED).unlink()
    _, _, messages = chain(capsys)
    assert "has a run, but 1-classify_small, which it starts from, is not finished" in messages


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model__init_args__tree": "gone.tsv"}, "gone.tsv"),
        ({"data__init_args__tree": "other.tsv"}, "data.tree differs from model.tree"),
        (
            {"data__init_args__tree": "other.tsv", "model__init_args__tree": "other.tsv"},
            "n03646695",
        ),
    ],
    ids=["missing", "two trees", "unknown label"],
)
def test_tree_that_is_not_the_datas_is_refused_before_an_earlier_stage_starts(
    folder, capsys, values, reason
):
    rows = (REPO / "recipes/trees/shapes.tsv").read_text().splitlines()
    (folder / "other.tsv").write_text("\n".join(rows[:-1]))
    edit(folder / "classify_large.yaml", **values)
    code, output, messages = chain(capsys, name="new")
    assert (code, output) == (2, "")
    assert "stage 2-classify_large: " in messages
    assert reason in messages


def test_chain_name_is_one_folder(folder, capsys):
    code, _, messages = chain(capsys, name="../up")
    assert code == 2
    assert "chain name '../up'; allowed: letters" in messages


def test_pretrained_may_name_a_folder_of_runs(folder, capsys):
    fit = ["fit", "--config", "classify_large.yaml", "--trainer.max_steps=1"]
    assert main([*fit, "--model.pretrained=outputs/chain/mine/1-classify_small"]) == 0
    best = f"{run_folder(Path())}/checkpoints/best.ckpt"
    assert f"pretrained: {best}" in capsys.readouterr().out
    record = next(folder.glob("outputs/classify_large/*/resolved.yaml"))
    values = yaml.safe_load(record.read_text())["model"]["init_args"]
    assert values["pretrained"] == str(folder / best)
    (folder / "empty").mkdir()
    assert main([*fit, "--model.pretrained=empty"]) == 2
    assert (
        "model.pretrained: no run in 'empty' has checkpoints/best.ckpt" in capsys.readouterr().err
    )


# --- the script, with fake programs


@pytest.fixture
def script(tmp_path):
    """Return a function that runs the script, whose check lists two stages to train."""
    programs = {
        "python": 'if [ "$3" = chain ]; then printf "%s\\n" "\'a b.yaml\' --x=1" "b.yaml --y=2"; '
        'else printf "%s|" "$@"; echo; exit ${FIT_CODE:-0}; fi',
        "sbatch": 'printf "%s|" "$@" >> jobs.txt; echo >> jobs.txt; '
        'echo "$((100 + $(wc -l < jobs.txt)));here"',
        "squeue": 'echo "$QUEUE"',
        "torchrun": 'printf "%s|" torchrun "$@"; echo',
    }
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*args, **environment):
        done = subprocess.run(
            ["bash", SCRIPT, *args], cwd=tmp_path, text=True, capture_output=True, check=False,
            env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **environment}, timeout=30,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


def test_script_trains_one_stage_after_another(script):
    code, lines, _ = script("mine", "--trainer.precision", "32 true")
    fit = "-m|yolo_lightning|fit|--config|{}|--resume|auto|--trainer.precision|32 true|{}|"
    assert (code, lines) == (0, [fit.format("a b.yaml", "--x=1"), fit.format("b.yaml", "--y=2")])


def test_script_stops_at_a_failing_stage_and_says_how_to_go_on(script):
    code, lines, messages = script("mine", "a b.yaml", FIT_CODE="7", FOLDER="my out")
    assert code == 7
    assert len(lines) == 1
    assert "chain mine: stopped in a b.yaml with code 7; to go on: " in messages
    assert "; to go on: FOLDER='my out' /" in messages
    assert messages.endswith("chain.sh mine a\\ b.yaml \n")


def test_interrupted_script_ends_with_the_code_of_its_stage(script, tmp_path):
    text = (tmp_path / "bin/python").read_text().replace(
        "echo; exit", 'trap "exit 130" INT; touch started; while :; do sleep 0.1; done; exit'
    )  # fmt: skip
    (tmp_path / "bin/python").write_text(text)
    with subprocess.Popen(
        ["bash", SCRIPT, "mine"], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True,
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            while not (tmp_path / "started").exists():
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            _, messages = process.communicate(timeout=10)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert b"stopped in a b.yaml with code 130; to go on: " in messages


def test_script_starts_torchrun_with_devices(script):
    code, lines, _ = script("mine", DEVICES="2")
    assert code == 0
    assert len(lines) == 2
    assert "|--nproc-per-node|2|" in lines[0]
    assert "|--config|a b.yaml|--resume|auto|" in lines[0]
    assert lines[0].endswith("|--trainer.devices|2|--x=1|")


def test_script_submits_each_job_after_the_one_before(script, tmp_path):
    code, lines, messages = script("--slurm", "mine", "--seed_everything=1")
    assert (code, lines) == (0, ["job 101: a b.yaml", "job 102: b.yaml"]), messages
    first, second = (tmp_path / "jobs.txt").read_text().splitlines()
    assert "--dependency" not in first
    assert "|--dependency=afterok:101|" in second
    assert first.endswith("cluster/slurm.sbatch|a b.yaml|--seed_everything=1|--x=1|")


def test_script_does_not_submit_twice(script, tmp_path):
    code, _, messages = script("--slurm", "mine", QUEUE="101 waiting")
    assert code == 2
    assert "its jobs are still in the queue" in messages
    assert not (tmp_path / "jobs.txt").exists()


def test_dry_run_starts_nothing(script, tmp_path):
    _, lines, _ = script("--dry-run", "--slurm", "mine")
    assert lines[1].startswith("sbatch ")
    assert "--dependency=afterok:JOB" in lines[1]
    assert not (tmp_path / "jobs.txt").exists()


@pytest.mark.parametrize("args", [["--fast", "mine"], []])
def test_bad_options_of_the_script(script, args):
    code, lines, messages = script(*args)
    assert code != 0
    assert not lines
    assert "--slurm" in messages


# --- a miniature, killed in its third stage


def start(folder: Path, log: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    recipes = [f"{name}.yaml" for name in NAMES]
    with (folder / log).open("w") as file:
        return subprocess.Popen(
            ["bash", SCRIPT, "mine", *recipes], cwd=folder, env=environment, stdout=file,
            stderr=file, start_new_session=True,
        )  # fmt: skip


def weights(run: Path, name: str) -> dict[str, torch.Tensor]:
    return dict(torch.load(run / "checkpoints" / name, weights_only=True)["state_dict"])


def losses(run_id: str) -> list[tuple[int, float]]:
    history = MlflowClient("sqlite:///mlflow.db").get_metric_history(run_id, "train/loss")
    return sorted((point.step, point.value) for point in history)


@pytest.mark.slow
@pytest.mark.timeout(580)
def test_chain_that_is_killed_in_its_third_stage_goes_on_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # a learning rate of 0 keeps the weights that the last stage starts from
    recipes = Miniature((2, 2, 60, 2), learning_rates=(0.05, 0.01, 0.01, 0)).write(tmp_path)
    # the learning rate falls, so the best checkpoint is that of the first validation
    recipe = yaml.safe_load(recipes[2].read_text())
    recipe["trainer"]["callbacks"][0]["init_args"]["monitor"] = "train/lr"
    recipes[2].write_text(yaml.safe_dump(recipe))
    process = start(tmp_path, "first.txt")
    while process.poll() is None and not list(
        tmp_path.glob("outputs/chain/mine/3-detect/*/checkpoints/last.ckpt")
    ):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "first.txt").read_text()
    stages = [tmp_path / f"outputs/chain/mine/{k}-{name}" for k, name in enumerate(NAMES, 1)]
    before = [sorted((p, p.stat().st_mtime_ns) for p in one.rglob("*.ckpt")) for one in stages]
    assert [len(list(one.glob(f"*/{FINISHED}"))) for one in stages] == [1, 1, 0, 0]

    assert start(tmp_path, "second.txt").wait(400) == 0, (tmp_path / "second.txt").read_text()
    text = (tmp_path / "second.txt").read_text()
    assert text.count("nothing to resume") == 1  # the last stage
    assert text.count("resuming: ") == 1
    runs = [list(one.glob(f"*/{FINISHED}")) for one in stages]
    assert [len(markers) for markers in runs] == [1, 1, 1, 1]
    folders = [markers[0].parent for markers in runs]
    for one, files in zip(stages[:2], before[:2], strict=True):
        assert sorted((p, p.stat().st_mtime_ns) for p in one.rglob("*.ckpt")) == files

    # the third stage equals an uninterrupted one
    best = folders[1] / "checkpoints/best.ckpt"
    options = [f"--model.pretrained={best}", "--trainer.default_root_dir=whole"]
    assert main(["fit", "--config", "detect.yaml", *options]) == 0
    whole = next((tmp_path / "whole").glob("2*"))
    expected, actual = weights(whole, "last.ckpt"), weights(folders[2], "last.ckpt")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    client = MlflowClient("sqlite:///mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    tagged = client.search_runs(experiments, "tags.chain = 'mine'")
    assert len(tagged) == 4
    third = next(run for run in tagged if "3-detect" in run.data.tags["run_folder"])
    [other] = [run for run in client.search_runs(experiments) if "chain" not in run.data.tags]
    assert losses(third.info.run_id) == losses(other.info.run_id)
    assert len(losses(third.info.run_id)) == 60

    # the last stage starts from the best checkpoint of the third, which is not its last one
    handed, started = weights(folders[2], "best.ckpt"), weights(folders[3], "last.ckpt")
    names = [n for n in started if n.startswith("network.body") and n.endswith("conv.weight")]
    assert len(names) == 7
    assert all(torch.equal(started[name], handed[name]) for name in names)
    assert not any(torch.equal(started[name], actual[name]) for name in names)
