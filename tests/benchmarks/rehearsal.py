"""Rehearse the joint training of YOLO9000 at its true size, on two nodes of this machine.

    python -m tests.benchmarks.rehearsal [--folder outputs/rehearsal] [--quick]

Generates data of the size of COCO and ImageNet-22k, parses it, and trains
recipes/joint_yolo9000.yaml with two torchrun agents: once for a few steps without interruption,
then to its end with a rank killed in between. Compares the steps, checks the MLflow run, and writes
the measurements into docs/benchmarks.md. `--quick` runs all of it with little data and a small
network, and writes the page into its own folder. Exits with 1 if a check fails.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.rehearsal_data import QUICK, TRUE_SIZE, Scale, generate
from tests.benchmarks.rehearsal_report import START, Results, read_clocks, render, write_section
from tests.helpers.diary import entries, mismatches
from tests.helpers.paths import REPO
from tests.helpers.trees import BACKBONE

RECIPE = REPO / "recipes/joint_yolo9000.yaml"
MODULES = ("tests.helpers.diary", "tests.benchmarks.rehearsal_clock")


@dataclass(frozen=True)
class Plan:
    """What is trained; one step in five has boxes, as in the recipe."""

    scale: Scale = TRUE_SIZE
    steps: int = 150
    compared_steps: int = 30  # also trained without interruption
    kill_at: int = 17
    checkpoint_steps: int = 10
    sizes: tuple[int, ...] = (416, 448, 480, 512, 544, 576, 608)  # px
    image_size: int = 544  # px, of the validation
    batch_size: int = 2  # of all ranks
    is_small: bool = False  # the network


FULL = Plan()
# the kill, within 0.1 s after its step, is far from the checkpoints before and after it
SMALL = Plan(QUICK, 60, 45, 23, 20, (64, 96), 64, is_small=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the rehearsal; return 1 if a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of data and outputs (about 4 GB)")
    parser.add_argument("--quick", action="store_true", help="little data, a small network")
    parser.add_argument("--parse", choices=SOURCES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    name = "rehearsal-quick" if options.quick else "rehearsal"
    folder = (options.folder or REPO / "outputs" / name).absolute()
    if options.parse:
        return parse(options.parse, folder)
    results = rehearse(folder, SMALL if options.quick else FULL)
    page = REPO / "docs/benchmarks.md"
    if options.quick:
        page = folder / "benchmarks.md"
        page.write_text(f"{START}\n", encoding="utf-8")
    text = render(results)
    print(text)
    write_section(page, text)
    print(f"\nwritten to {page}; logs: {folder / 'runs'}")
    for failure in results.failures:
        print(f"FAILED: {failure}")
    return int(bool(results.failures))


def rehearse(folder: Path, plan: Plan) -> Results:
    """Generate, parse, train, kill, resume, validate and check."""
    started = time.monotonic()

    def announce(what: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s: {what}", flush=True)

    announce("data")
    generate(folder / "data", plan.scale)
    for outputs in ("runs", "indices"):
        shutil.rmtree(folder / outputs, ignore_errors=True)
    (folder / "runs").mkdir()
    results = Results(plan=asdict(plan))
    for name in SOURCES:
        announce(f"index of {name}")
        command = ["--parse", name, "--folder", str(folder)]
        results.indices[name] = [json.loads(_python(folder, command)) for _ in range(2)]
    announce("memory with a small network")
    alone = replace(plan, sizes=(64,), batch_size=1)
    small = Run(folder, "small-network", alone, steps=10, is_small=True, validation_batches=40)
    small.finish(small.start_one())
    announce(f"{plan.compared_steps} steps without interruption")
    whole = Run(folder, "uninterrupted", plan, steps=plan.compared_steps)
    whole.finish(whole.start_two())
    announce(f"{plan.steps} steps, a rank is killed after step {plan.kill_at}")
    killed = Run(folder, "killed", plan, steps=plan.steps, validates=True)
    agents = killed.start_two()
    killed.wait_for_step(plan.kill_at)
    killed.kill_rank(1)
    killed.finish(agents)
    announce("checks")
    for run in (small, whole, killed):
        results.clocks[run.name] = read_clocks(run.folder)
        _shrink(run, results)
    results.loaded = [
        json.loads(line)
        for file in killed.folder.glob("loader-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    results.compared = _compare(whole, killed, plan, results.failures)
    results.store = _check_store(killed, plan, results.failures)
    results.seconds = time.monotonic() - started
    (folder / "results.json").write_text(json.dumps(asdict(results)), encoding="utf-8")
    return results


# --- indices

SOURCES = ("COCO", "ImageNet-22k", "validation")


def parse(name: str, folder: Path) -> int:
    """Parse or open a source, bind it, and print time, memory and size as JSON."""
    from yolo_lightning.datamodules import COCOJson, ImageFolder
    from yolo_lightning.tree.wordtree import WordTree

    data = folder / "data"
    if name == "ImageNet-22k":
        source: Any = ImageFolder(str(data / "imagenet22k"), skip_unknown=True)
    else:
        split = "val2017" if name == "validation" else "train2017"
        source = COCOJson(
            str(data / f"coco/annotations/instances_{split}.json"), str(data / "coco" / split)
        )
    tree = WordTree.from_file(data / "tree.tsv")
    imported_mib, start = _peak_mib(), time.monotonic()
    index = source.load_index()
    index_s, start = time.monotonic() - start, time.monotonic()
    source.bind(tree)
    print(
        json.dumps(
            {
                "index_s": index_s,
                "bind_s": time.monotonic() - start,
                "imported_mib": imported_mib,
                "peak_mib": _peak_mib(),
                "index_mib": index.file.stat().st_size / 2**20,
                "images_in_index": len(index.arrays["paths_offsets"]) - 1,
                "images": len(source),
                "labelled": sum(sum(c.values()) for c in source.node_counts().values()),
                "nodes": len(source.nodes),
            }
        )
    )
    return 0


def _peak_mib() -> float:
    # not ru_maxrss, which includes the memory of the parent process
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024


def _python(folder: Path, arguments: list[str]) -> str:
    """Run this module in a process of its own; return what it prints."""
    command = [sys.executable, "-m", "tests.benchmarks.rehearsal", *arguments]
    return subprocess.run(
        command, cwd=REPO, env=_environment(folder), check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def _environment(folder: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COCO_DATA": str(folder / "data/coco"),
        "IMAGENET22K": str(folder / "data/imagenet22k"),
        "YOLO_LIGHTNING_CACHE": str(folder / "indices"),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }


# --- trainings


class Run:
    """A training of the recipe with overrides, in a folder of its own."""

    def __init__(
        self,
        work: Path,
        name: str,
        plan: Plan,
        steps: int,
        is_small: bool = False,
        validates: bool = False,
        validation_batches: int | None = None,
    ) -> None:
        self.work, self.name, self.plan = work, name, plan
        self.folder = work / "runs" / name
        self.folder.mkdir()
        recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
        for key, value in self._overrides(steps, is_small or plan.is_small).items():
            _set(recipe, key, value)
        if not validates and validation_batches is None:
            recipe["trainer"]["limit_val_batches"] = 0
        elif validation_batches is not None:
            recipe["trainer"]["limit_val_batches"] = validation_batches
        recipe["trainer"]["callbacks"] = self._callbacks(recipe["trainer"]["callbacks"])
        self.recipe = self.folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")

    def _overrides(self, steps: int, is_small: bool) -> dict[str, Any]:
        plan = self.plan
        values: dict[str, Any] = {
            "model.init_args.tree": str(self.work / "data/tree.tsv"),
            # weights change from the first steps, so that a wrong resume is seen
            "model.init_args.schedule.init_args.burn_in_steps": 10,
            # with one image a rank and random weights, the loss explodes at the recipe's 0.001
            "model.init_args.learning_rate": 0.0001,
            "data.init_args.detection_batch_size": plan.batch_size,
            "data.init_args.classification_batch_size": plan.batch_size,
            "data.init_args.num_workers": 1,
            "data.init_args.image_size": plan.image_size,
            "trainer.accelerator": "cpu",
            "trainer.max_steps": steps,
            "trainer.val_check_interval": steps,
            "trainer.log_every_n_steps": 1,
            "trainer.enable_progress_bar": False,
            "trainer.default_root_dir": str(self.folder / "outputs"),
            "trainer.logger.init_args.tracking_uri": f"sqlite:///{self.folder}/mlflow.db",
        }
        if is_small:
            values["model.init_args.backbone"] = BACKBONE
        return values

    def _callbacks(self, callbacks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        options = {
            "MultiScale": {"sizes": list(self.plan.sizes), "last_batches_at_largest": 0},
            "LastCheckpoint": {"every_n_steps": self.plan.checkpoint_steps},
        }
        for callback in callbacks:
            name = callback["class_path"].split(".")[-1]
            callback["init_args"].update(options.get(name, {}))
        folder = {"folder": str(self.folder)}
        return [
            *callbacks,
            {"class_path": "tests.benchmarks.rehearsal_clock.Clock", "init_args": folder},
            {"class_path": "tests.helpers.diary.Diary", "init_args": folder},
        ]

    def _options(self) -> list[str]:
        return [option for module in MODULES for option in ("--allow-module", module)]

    def start_one(self) -> list[subprocess.Popen[bytes]]:
        """Start the training as one process."""
        command = [sys.executable, "-m", "yolo_lightning", "fit", "--config", str(self.recipe)]
        return [self._start([*command, *self._options()], 0, {})]

    def start_two(self) -> list[subprocess.Popen[bytes]]:
        """Start the training with torchrun, as on two machines with one process each."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            master = f"127.0.0.1:{probe.getsockname()[1]}"
        command = [str(REPO / "recipes/cluster/torchrun.sh"), str(self.recipe), *self._options()]
        common = {"NODES": "2", "DEVICES": "1", "MASTER": master, "RUN_ID": self.name}
        return [self._start(command, n, {**common, "NODE_RANK": str(n)}) for n in (0, 1)]

    def _start(
        self, command: list[str], number: int, environment: dict[str, str]
    ) -> subprocess.Popen[bytes]:
        with (self.folder / f"log{number}.txt").open("w") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env={**_environment(self.work), **environment},
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def log_tail(self) -> str:
        """Return the end of the log of the first process."""
        return (self.folder / "log0.txt").read_text(errors="replace")[-4000:]

    def wait_for_step(self, step: int, seconds: float = 900) -> None:
        """Wait until rank 1 has trained a step."""
        deadline = time.monotonic() + seconds
        while len(entries(self.folder, 1)) <= step:
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.name}: step {step} is not reached\n{self.log_tail()}")
            time.sleep(0.05)

    def kill_rank(self, rank: int) -> None:
        """Kill the process of a rank."""
        (file,) = self.folder.glob(f"clock-{rank}-*.jsonl")
        os.kill(int(file.stem.split("-")[-1]), signal.SIGKILL)

    def finish(self, processes: list[subprocess.Popen[bytes]], seconds: float = 2400) -> None:
        """Wait for the end of the training; raise if it fails."""
        deadline = time.monotonic() + seconds
        try:
            codes = [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if any(codes):
            raise SystemExit(f"{self.name}: exit codes {codes}\n{self.log_tail()}")


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values[part]
    values[last] = value


# --- checks


def _compare(whole: Run, killed: Run, plan: Plan, failures: list[str]) -> dict[str, int]:
    """Compare steps with those of the uninterrupted training, bit for bit; return counts."""
    counts = {"steps": 0, "after_resume": 0, "different": 0}
    for rank in (0, 1):
        expected = entries(whole.folder, rank)
        found = [e for e in entries(killed.folder, rank) if int(str(e[0])) < plan.compared_steps]
        different = mismatches(expected, found, plan.compared_steps)
        failures += [f"rank {rank}: {line}" for line in different[:5]]
        steps = [int(str(entry[0])) for entry in found]
        restarts = [k for k in range(1, len(steps)) if steps[k] <= steps[k - 1]]
        if not restarts:
            failures.append(f"rank {rank}: no step was repeated after the kill")
        counts["steps"] += len(found)
        counts["after_resume"] += len(steps) - restarts[0] if restarts else 0
        counts["different"] += len(different)
        last = max(int(str(entry[0])) for entry in entries(killed.folder, rank))
        if last != plan.steps - 1:
            failures.append(f"rank {rank}: ended at step {last}")
    return counts


def _check_store(run: Run, plan: Plan, failures: list[str]) -> dict[str, Any]:
    """Check that MLflow has one finished run with each point once; return counts."""
    store = sqlite3.connect(run.folder / "mlflow.db")

    def query(text: str) -> list[Any]:
        return [row[0] if len(row) == 1 else row for row in store.execute(text).fetchall()]

    found = {
        "runs": query("select status from runs"),
        "points": query("select count(*) from metrics")[0],
        "duplicates": len(query("select 1 from metrics group by key, step having count(*) > 1")),
        "keys": query("select count(distinct key) from metrics")[0],
        "parameters": query("select count(*) from params")[0],
        "longest_parameter": query("select max(length(value)) from params")[0],
        "validations": query("select count(*) from metrics where key = 'val/AP50'")[0],
    }
    steps = query("select step from metrics where key = 'train/lr' order by step")
    store.close()
    if found["runs"] != ["FINISHED"]:
        failures.append(f"MLflow: expected one finished run, found {found['runs']}")
    if found["duplicates"]:
        failures.append(f"MLflow: {found['duplicates']} points are duplicate")
    if steps != list(range(plan.steps)):
        failures.append(f"MLflow: {len(steps)} steps instead of {plan.steps}")
    if found["validations"] != 1:
        failures.append(f"MLflow: {found['validations']} validations instead of 1")
    return found


def _shrink(run: Run, results: Results) -> None:
    """Record the sizes of the checkpoints and of the run, and delete what is large."""
    for file in sorted(run.folder.glob("outputs/**/*")):
        if file.suffix == ".ckpt" and run.name == "killed":
            results.checkpoints[file.name] = file.stat().st_size
        if file.is_file() and file.stat().st_size > 50 * 2**20:
            file.unlink()
    shutil.rmtree(run.folder / "mlartifacts", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
