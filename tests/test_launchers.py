"""The cluster launch scripts, with fake torchrun, srun, scontrol and python."""

import os
import subprocess

import pytest

from tests.helpers.paths import REPO

FOLDER = REPO / "recipes/cluster"


@pytest.fixture
def run_script(tmp_path):
    """Return a function that runs a script and returns the command that it would start."""
    for name in ("torchrun", "srun", "scontrol", "python"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        output = "first-host" if name == "scontrol" else "3" if name == "python" else ""
        lines = f"echo {output}" if output else 'printf "%s\\n" "$0" "$@"; env | grep MASTER_'
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


def test_torchrun_script_passes_recipe_and_options_unchanged(run_script):
    code, words, _ = run_script(
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


def test_slurm_script_sets_devices_and_rendezvous(run_script):
    code, words, _ = run_script(
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
def test_missing_recipe_is_reported(run_script, name):
    code, words, error = run_script(name)
    assert code != 0
    assert "recipe missing; usage: " in error
    assert not words
