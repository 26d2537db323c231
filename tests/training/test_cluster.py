"""Two simulated nodes: torchrun, network namespaces, SLURM."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.diary import entries, mismatches
from tests.helpers.kill_and_resume import STEPS, write_recipe
from tests.helpers.paths import REPO

pytestmark = pytest.mark.cluster

SHARED = REPO.parent / "shared/cluster"
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(REPO), "GLOO_SOCKET_IFNAME": "lo",
    "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}  # fmt: skip
OPTIONS = ["--allow-module", "tests.helpers.diary", "--trainer.strategy=ddp"]


def tracking_options(folder: Path) -> list[str]:
    """Return options that track a training in an SQLite file in its folder."""
    return [
        "--trainer.logger=yolo_lightning.tracking.RunLogger",
        f"--trainer.logger.tracking_uri=sqlite:///{folder}/mlflow.db",
        "--trainer.log_every_n_steps=1",
    ]


def check_store(folder: Path) -> None:
    """Check that MLflow has one finished run, with each metric logged once per step."""
    store = sqlite3.connect(folder / "mlflow.db")
    assert store.execute("select status from runs").fetchall() == [("FINISHED",)]
    steps = "select step from metrics where key = 'train/lr' order by step"
    assert [step for (step,) in store.execute(steps)] == list(range(STEPS))
    duplicates = "select key, step from metrics group by key, step having count(*) > 1"
    assert store.execute(duplicates).fetchall() == []
    store.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_agents(folder: Path, prefixes=((), ()), master="127.0.0.1", **environment: str):
    """Start torchrun.sh as on two machines, with command prefixes; return both processes."""
    recipe = write_recipe(folder)
    common = {**ENVIRONMENT, "NODES": "2", "DEVICES": "1", "RUN_ID": folder.name, **environment}
    common["MASTER"] = f"{master}:{free_port()}"
    started = []
    for rank in (0, 1):
        log = (folder / f"agent{rank}.txt").open("w")
        script = str(REPO / "recipes/cluster/torchrun.sh")
        command = [*prefixes[rank], script, str(recipe), *OPTIONS, *tracking_options(folder)]
        env = {**common, "NODE_RANK": str(rank)}
        if "LOCAL_ADDR" in env:
            env["LOCAL_ADDR"] += f".{rank + 1}"
        started.append(
            subprocess.Popen(
                command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
        )
    return started


def wait(processes, folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            code = process.wait(max(1.0, deadline - time.monotonic()))
            assert code == 0, (folder / "agent0.txt").read_text()[-3000:]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def wait_for_steps(folder: Path, rank: int, count: int, seconds: float) -> float:
    """Wait deadline a rank has recorded some steps; return the time."""
    deadline = time.monotonic() + seconds
    while len(entries(folder, rank)) < count:
        assert time.monotonic() < deadline, (folder / "agent0.txt").read_text()[-3000:]
        time.sleep(0.05)
    return time.monotonic()


def rank_process(folder: Path, rank: int) -> int:
    """Return the process id of a rank of the training in a folder."""
    for entry in Path("/proc").iterdir():
        try:
            environ = (entry / "environ").read_bytes().split(b"\0")
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        same_run = f"TORCHELASTIC_RUN_ID={folder.name}".encode() in environ
        if same_run and f"RANK={rank}".encode() in environ and b"yolo_lightning" in line:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    wait(start_agents(folder), folder, 200)
    expected = [entries(folder, rank) for rank in (0, 1)]
    assert all(len(one) == STEPS for one in expected)
    assert [e[:3] for e in expected[0]] == [e[:3] for e in expected[1]]
    assert all(not set(a[3]) & set(b[3]) for a, b in zip(*expected, strict=True))
    return expected


@pytest.mark.timeout(600)
def test_killed_rank_restarts_and_both_resume_exactly(two_ranks, tmp_path, capsys):
    folder = tmp_path / "killed"
    folder.mkdir()
    processes = start_agents(folder)
    wait_for_steps(folder, 1, 7, 150)
    os.kill(rank_process(folder, 1), signal.SIGKILL)
    killed = time.monotonic()
    time.sleep(1)  # a killed process may still complete a line
    before = len(entries(folder, 1))
    resumed = wait_for_steps(folder, 1, before + 1, 240)
    wait(processes, folder, 200)
    for rank in (0, 1):
        assert not mismatches(two_ranks[rank], entries(folder, rank), STEPS)
    assert len(list((folder / "runs").iterdir())) == 1
    check_store(folder)
    with capsys.disabled():
        print(f"\na killed rank resumed after {resumed - killed:.0f} s")


def namespaces_unavailable():
    """Return why network namespaces cannot be used, or an empty string."""
    if os.geteuid() or not shutil.which("ip"):
        return "needs root and ip"
    result = subprocess.run(["ip", "netns", "add", "yl-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "yl-probe"], capture_output=True, check=False)
    return result.stderr.decode().strip() if result.returncode else ""


@pytest.mark.timeout(400)
def test_training_across_two_network_namespaces(two_ranks, tmp_path):
    if reason := namespaces_unavailable():
        pytest.skip(reason)
    names = [f"yl{os.getpid()}a", f"yl{os.getpid()}b"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}",
    ]
    for k, name in enumerate(names):
        commands += [
            f"ip -n {name} addr add 10.77.0.{k + 1}/24 dev veth0",
            f"ip -n {name} link set veth0 up", f"ip -n {name} link set lo up",
        ]  # fmt: skip
    folder = tmp_path / "apart"
    folder.mkdir()
    try:
        for command in commands:
            subprocess.run(command.split(), check=True)
        prefixes = tuple(("ip", "netns", "exec", name) for name in names)
        processes = start_agents(
            folder, prefixes, "10.77.0.1", GLOO_SOCKET_IFNAME="veth0", LOCAL_ADDR="10.77.0"
        )
        wait(processes, folder, 300)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
    for rank in (0, 1):
        assert not mismatches(two_ranks[rank], entries(folder, rank), STEPS)


# --- SLURM


def slurm(command: str, configuration: Path, **options) -> str:
    result = subprocess.run(
        command.split(), env={**ENVIRONMENT, "SLURM_CONF": str(configuration)},
        capture_output=True, text=True, check=False, timeout=60, **options,
    )  # fmt: skip
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return str(result.stdout.strip())


@pytest.fixture
def cluster(tmp_path_factory):
    if not shutil.which("slurmctld") or not SHARED.is_dir() or os.geteuid():
        pytest.skip("needs SLURM's daemons, root, and the scripts that start them")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([str(SHARED / "slurm_up.sh"), str(folder)], check=True, timeout=120)
    yield folder / "slurm.conf"
    subprocess.run([str(SHARED / "slurm_down.sh"), str(folder)], check=False, timeout=60)


@pytest.mark.timeout(900)
def test_five_slurm_preemptions_lose_no_step(two_ranks, cluster, tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    recipe = write_recipe(folder)
    site = "--nodes=2 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 --time=60"
    options = [*OPTIONS, *tracking_options(folder)]
    job = slurm(
        f"sbatch --parsable {site} --output={folder}/job.txt --export=ALL,MASTER_ADDR=127.0.0.1 "
        f"{REPO}/recipes/cluster/slurm.sbatch {recipe} {' '.join(options)}",
        cluster, cwd=folder,
    )  # fmt: skip
    try:
        for k in range(5):
            log = folder / "job.txt"
            deadline = time.monotonic() + 150
            while len(entries(folder)) < 3 * k + 2:
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.1)
            slurm(f"scancel --signal=USR1 {job}", cluster)
            while "PENDING" not in slurm(f"scontrol show job {job}", cluster):
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            slurm(f"scontrol update jobid={job} StartTime=now", cluster)
        deadline = time.monotonic() + 200
        while "COMPLETED" not in slurm(f"scontrol show job {job}", cluster):
            assert time.monotonic() < deadline, (folder / "job.txt").read_text()[-3000:]
            time.sleep(0.5)
    finally:
        subprocess.run(["scancel", job], env={**ENVIRONMENT, "SLURM_CONF": str(cluster)},
                       check=False, timeout=60)  # fmt: skip
    for rank in (0, 1):
        found = entries(folder, rank)
        assert not mismatches(two_ranks[rank], found, STEPS)
        assert len(found) == STEPS, "no step is repeated"
    assert (folder / f"runs/slurm-{job}").is_dir()
    check_store(folder)
