"""The launchers for clusters, with stand-ins for what they start."""

import os
import subprocess

import pytest

from tests.helpers.paths import REPO

FOLDER = REPO / "recipes/cluster"


@pytest.fixture
def started(tmp_path):
    """Run a launcher; return what it would have started, a word a line."""
    for name in ("torchrun", "srun", "scontrol", "python"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        said = "first-host" if name == "scontrol" else "3" if name == "python" else ""
        lines = f"echo {said}" if said else 'printf "%s\\n" "$0" "$@"; env | grep MASTER_'
        program.write_text(f"#!/bin/sh\n{lines}\nexit 0\n")
        program.chmod(0o755)

    def run(name, *args, **environment):
        done = subprocess.run(
            ["bash", str(FOLDER / name), *args],
            env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **environment},
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


def test_torchrun_gets_a_recipe_and_options_as_they_are(started):
    code, words, _ = started(
        "torchrun.sh", "my recipes/a b.yaml", "--model.tree=[a b, c]", NODES="2", NODE_RANK="1",
        MASTER="host:1",
    )  # fmt: skip
    assert code == 0
    text = "\n".join(words)
    for pair in ("--nnodes\n2", "--node-rank\n1", "--rdzv-endpoint\nhost:1", "--rdzv-id\na b",
                 "--nproc-per-node\n3", "--config\nmy recipes/a b.yaml", "--resume\nauto",
                 "--trainer.num_nodes\n2", "--trainer.devices\n3", "is_host=false"):  # fmt: skip
        assert pair in text, pair
    assert "--model.tree=[a b, c]" in words


def test_slurm_gets_one_task_a_device_and_meets_at_its_first_node(started):
    code, words, _ = started(
        "slurm.sbatch", "r.yaml", "--seed_everything=1", SLURM_JOB_ID="20007",
        SLURM_JOB_NODELIST="n[1-2]", SLURM_NNODES="2", SLURM_NTASKS_PER_NODE="4",
    )  # fmt: skip
    assert code == 0
    text = "\n".join(words)
    assert {"MASTER_ADDR=first-host", "MASTER_PORT=20007"} <= set(words)
    for pair in ("--config\nr.yaml", "--resume\nauto", "--trainer.num_nodes\n2",
                 "--trainer.devices\n4"):  # fmt: skip
        assert pair in text, pair
    assert "--seed_everything=1" in words


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch"])
def test_without_a_recipe_they_ask_for_one(started, name):
    code, words, said = started(name)
    assert code != 0
    assert "which recipe?" in said
    assert not words
