"""The check of launched processes against devices and nodes of a recipe."""

from pathlib import Path

import pytest

from yolo_lightning.cli.launch import (
    Launch,
    check_command_line,
    check_launch,
    detect_launch,
    visible_gpu_count,
)
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError


def slurm(nodes: int = 2, tasks: int = 8, **variables: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0",
        "SLURMD_NODENAME": "n1", "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_NNODES": str(nodes),
        "SLURM_JOB_NUM_NODES": str(nodes), **variables,
    }  # fmt: skip


def torchrun(nodes: int, tasks: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": str(nodes * tasks), "MASTER_ADDR": "first",
        "LOCAL_WORLD_SIZE": str(tasks), "GROUP_WORLD_SIZE": str(nodes),
    }  # fmt: skip


def trainer(**values: object) -> dict[str, object]:
    return {f"trainer.{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("values", "environment"),
    [
        (trainer(), {}),
        (trainer(devices=8), {}),
        (trainer(devices=8, num_nodes=2), slurm()),
        (trainer(devices="8", num_nodes="2"), slurm()),
        (trainer(devices=[0, 1], num_nodes=1), slurm(1, 2)),
        (trainer(devices="0, 1", num_nodes=1), slurm(1, 2)),
        (trainer(devices="auto", num_nodes=2), slurm()),
        (trainer(devices=-1, num_nodes=2), slurm()),
        (trainer(num_nodes=2), slurm()),
        (trainer(devices="${oc.env:DEVICES_DATA,1}", num_nodes=2), slurm(DEVICES_DATA="8")),
        (trainer(devices="${oc.env:DEVICES_DATA,8}", num_nodes=2), slurm()),
        (trainer(devices="${..elsewhere}", num_nodes=2), slurm()),
        (trainer(devices=1), slurm(1, 1)),
        # with one task, SLURM does not set SLURM_NTASKS_PER_NODE
        (trainer(devices=1), {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"}),
        # Lightning ignores jobs with these names
        (trainer(devices=1), slurm(SLURM_JOB_NAME="bash")),
        (trainer(devices=1), slurm(SLURM_JOB_NAME="interactive")),
        (trainer(devices=4, num_nodes=2), torchrun(2, 4)),
        # torchrun takes precedence over SLURM
        (trainer(devices=4, num_nodes=2), slurm() | torchrun(2, 4)),
        # started without a launcher on every node
        (trainer(devices=4, num_nodes=2), {"MASTER_ADDR": "first", "NODE_RANK": "1"}),
        (trainer(devices="auto", accelerator="cpu"), torchrun(1, 1)),
    ],
)
def test_matching_launch_passes(values, environment):
    check_launch(values, environment)


@pytest.mark.parametrize(
    ("values", "environment", "message"),
    [
        (
            trainer(devices=8, num_nodes=1), slurm(),
            "the job has 2 nodes x 8 tasks (started by SLURM), but the recipe has "
            "trainer.num_nodes 1, trainer.devices 8: pass --trainer.num_nodes 2, or",
        ),
        (trainer(devices=8), slurm(), "pass --trainer.num_nodes 2, or"),
        (
            trainer(devices=1, num_nodes=2), slurm(),
            "the recipe has trainer.num_nodes 2, trainer.devices 1: pass --trainer.devices 8, or",
        ),
        (
            trainer(devices=1, num_nodes=1), slurm(3, 4),
            "3 nodes x 4 tasks (started by SLURM), but the recipe has trainer.num_nodes 1, "
            "trainer.devices 1: pass --trainer.num_nodes 3 --trainer.devices 4",
        ),
        (trainer(devices=8, num_nodes=2), slurm(1, 8), "has 1 node x 8 tasks"),
        (
            trainer(devices=8, num_nodes=2),
            {k: v for k, v in slurm().items() if k != "SLURM_NNODES"}
            | {"SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "32"},
            "has 4 nodes x 8 tasks",
        ),
        # the same number of processes, but other nodes and devices
        (trainer(devices=16, num_nodes=1), torchrun(2, 8), "8 tasks (started by torchrun)"),
        (trainer(devices="auto", accelerator="cpu"), torchrun(1, 2), "pass --trainer.devices 2"),
        (trainer(devices=[0, 1, 2], num_nodes=1), torchrun(1, 2), "trainer.devices [0, 1, 2]"),
        (
            trainer(devices=8, num_nodes=2),
            {k: v for k, v in slurm().items() if k != "SLURM_NTASKS_PER_NODE"},
            "16 tasks on 2 nodes, set by --ntasks; use SLURM's --ntasks-per-node=8 instead",
        ),
        (
            trainer(devices=8, num_nodes=2), slurm() | {"SLURM_NTASKS": "4"},
            "srun started 4 tasks, but the job has 2 nodes x 8 tasks",
        ),
        (
            trainer(devices=8, num_nodes=2),
            {k: v for k, v in slurm().items() if k != "SLURM_STEP_ID"},
            "this process is not one of them: put srun before the command",
        ),
        (
            trainer(devices=8, num_nodes=2), {},
            "the recipe has trainer.num_nodes 2, but this process was started by neither srun nor",
        ),
        (trainer(num_nodes=2), slurm(SLURM_JOB_NAME="bash"), "neither srun nor torchrun"),
    ],
)  # fmt: skip
def test_mismatch_names_both_numbers(values, environment, message):
    with pytest.raises(InputError) as raised:
        check_launch(values, environment)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("values", "gpus", "message"),
    [
        (trainer(devices=8), 8, None),
        (trainer(devices=8), 16, None),
        (trainer(devices=8), None, None),
        (trainer(devices=8), 0, None),  # auto means CPU processes there
        (trainer(devices=8, accelerator="cpu"), 4, None),
        (trainer(devices="auto"), 4, None),
        (
            trainer(devices=8),
            4,
            "trainer.devices 8, but this process sees 4 GPUs: pass --trainer.d",
        ),
        (trainer(devices=2), 1, "this process sees 1 GPU: pass --trainer.devices 1"),
        (trainer(devices=[0, 1]), 1, "trainer.devices [0, 1], but this process sees 1 GPU"),
        (trainer(devices=1, accelerator="gpu"), 0, "sees 0 GPUs: pass --trainer.accelerator cpu"),
        (trainer(accelerator="cuda"), 0, "trainer.devices auto, but this process sees 0 GPUs"),
    ],
)
def test_devices_are_compared_with_visible_gpus(values, gpus, message):
    if message is None:
        check_launch(values, {}, gpus)
    else:
        with pytest.raises(InputError) as raised:
            check_launch(values, {}, gpus)
        assert message in str(raised.value)


def test_message_for_tasks_that_see_only_one_gpu_of_their_node():
    values = trainer(devices=8, num_nodes=2)
    with pytest.raises(InputError, match="give every task all GPUs of its node, --gres=gpu:8"):
        check_launch(values, slurm(), 1)


def test_launcher_is_detected():
    assert detect_launch({}) is None
    assert detect_launch(slurm(3, 4)) == Launch("SLURM", 3, 4)
    assert detect_launch(torchrun(2, 4) | slurm(1, 8)) == Launch("torchrun", 2, 4)


def test_visible_gpus_are_counted_without_cuda(monkeypatch):
    assert visible_gpu_count({"CUDA_VISIBLE_DEVICES": "0,1,3"}) == 3
    assert visible_gpu_count({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,MIG-GPU-1/2/3"}) == 2
    assert visible_gpu_count({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert visible_gpu_count({"CUDA_VISIBLE_DEVICES": "-1"}) == 0
    assert (
        visible_gpu_count({"CUDA_VISIBLE_DEVICES": "0,-1,1"}) == 1
    )  # CUDA ignores what follows an invalid index
    assert visible_gpu_count({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}) == 0
    assert visible_gpu_count({"SLURM_GPUS_ON_NODE": "4"}) == 4
    assert visible_gpu_count({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}) == 1
    monkeypatch.setattr("os.listdir", lambda path: ["0000:01:00.0", "0000:02:00.0"])
    assert visible_gpu_count({}) == 2

    def absent(path: str) -> list[str]:
        raise FileNotFoundError(path)

    monkeypatch.setattr("os.listdir", absent)
    assert visible_gpu_count({}) is None


def test_command_line_overrides_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("trainer: {devices: 1, num_nodes: 1}\nmodel: {init_args: {a: 1}}\n")
    Path("two.yaml").write_text("trainer: {devices: 2}\ntrainer.accelerator: cpu\n")
    recipes = ["--config", "one.yaml", "--config=two.yaml"]
    values = check_command_line(recipes)
    assert values["trainer.devices"] == 2
    assert values["trainer.num_nodes"] == 1
    assert values["trainer.accelerator"] == "cpu"
    assert values["model.init_args.a"] == 1
    options = ["--trainer.devices", "4", "--trainer.num_nodes=3", "--trainer={max_steps: 5}"]
    values = check_command_line([*options, *recipes])
    assert (values["trainer.devices"], values["trainer.num_nodes"]) == (4, 3)
    assert values["trainer.max_steps"] == 5


def test_fit_reports_a_mismatch_before_heavy_imports(workplace, monkeypatch, capsys):
    for name, value in slurm(2, 2).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("yolo_lightning.cli.main.import_module", lambda name: pytest.fail(name))
    fit = ["fit", "--config", "recipes/quickstart.yaml", "--trainer.devices=2"]
    assert main(fit) == 2
    message = capsys.readouterr().err
    assert (
        "has 2 nodes x 2 tasks (started by SLURM), but the recipe has trainer.num_nodes 1"
        in message
    )
    with pytest.raises(pytest.fail.Exception, match="yolo_lightning.cli.recipe"):
        main([*fit, "--trainer.num_nodes", "2"])
    # evaluation runs in one process in any job
    with pytest.raises(pytest.fail.Exception, match="yolo_lightning.cli.recipe"):
        main(["test", *fit[1:]])
