"""Test tracking with outages of the MLflow server and killed trainings; measure its overhead.

    python tests/helpers/tracking_outage.py                   everything, about half an hour
    python tests/helpers/tracking_outage.py --only overhead --rounds 5
    python tests/helpers/tracking_outage.py --only outage --steps 400 --step-ms 100

--only      which of overhead, outage, kill, five-kills, two-at-once to run (default: all)
--steps     number of steps of a timed training
--step-ms   duration of a step, reached with matrix products, the same number in each training
--wait      sleep instead of matrix products, as a host waits for its GPU: then only work in the
            training thread makes a step longer
--rounds    number of trainings of each kind, which take turns
--folder    working folder (default: a temporary folder)

Starts a real `mlflow server` on this machine. Everything is imported once, and each training is a
fork. Points are counted in the store's database. Step times leave out the first ten steps of a
process and steps with a validation. Exits with 1 if a training fails or if a point is missing or
duplicated. Times are only printed: they depend on the load of the machine.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from tests.helpers.kill_and_resume import wait_for_process
from tests.helpers.kill_and_resume import write_recipe as write_untracked_recipe
from tests.helpers.kill_points import kill_at
from tests.helpers.tracked import empty_tables
from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint

VARYING_METRICS = ("system/", "speed/", "memory/")  # differ between any two trainings
SKIPPED_STEPS, OUTAGE_AT, OUTAGE_S = 10, 40, 10.0
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
}  # fmt: skip


class Clock(pl.Callback):
    """Extends steps to a given duration, records when they end, and interrupts training.

    The environment variable ``STOP`` has an action, a position and a step, such as
    ``SIGKILL after 3``. Actions: a signal name or ``error``. Positions: ``before`` or ``after`` the
    batch, or ``validation``, the one after so many steps.

    Args:
        folder: for ``clock.jsonl``, with a line per process that completed training, and ``step``.
        products: number of matrix products per step.
        wait_ms: sleep per step.
    """

    def __init__(self, folder: str, products: int = 0, wait_ms: float = 0) -> None:
        self.folder, self.products, self.wait_s = Path(folder), products, wait_ms / 1000
        self._factor = torch.ones(192, 192)
        self._ends: list[tuple[int, float, float, float, float]] = []
        self._logging_s = 0.0
        self._file = -1
        self._stop = os.environ.get("STOP", "")

    def _stop_if_due(self, position: str, step: int) -> None:
        action, *due = self._stop.split() or [""]
        if due != [position, str(step)]:
            return
        self._stop = ""
        if action == "error":
            raise RuntimeError("requested by STOP")
        os.kill(os.getpid(), signal.Signals[action])

    def _timed(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed_function(*arguments: Any) -> None:
            started = time.perf_counter()
            call(*arguments)
            self._logging_s += time.perf_counter() - started

        return timed_function

    def on_train_start(self, trainer, pl_module) -> None:
        (last_checkpoint,) = (c for c in trainer.callbacks if isinstance(c, LastCheckpoint))
        for owner, name in ((last_checkpoint, "_log_step"),
                            (trainer._logger_connector, "update_train_step_metrics")):  # fmt: skip
            setattr(owner, name, self._timed(getattr(owner, name)))
        self._file = os.open(self.folder / "step", os.O_WRONLY | os.O_CREAT, 0o644)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._stop_if_due("before", batch.step)
        multiply(self._factor, self.products)
        if self.wait_s:
            time.sleep(self.wait_s)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        times = time.perf_counter(), time.thread_time(), time.process_time()
        self._ends.append((batch.step, *times, self._logging_s))
        os.pwrite(self._file, b"%12d" % (batch.step + 1), 0)
        self._stop_if_due("after", batch.step)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_) -> None:
        if batch_idx == 1:
            self._stop_if_due("validation", trainer.global_step)

    def on_validation_start(self, trainer, pl_module) -> None:
        self._ends.append((-1, 0.0, 0.0, 0.0, 0.0))

    def on_train_end(self, trainer, pl_module) -> None:
        with (self.folder / "clock.jsonl").open("a") as file:
            file.write(json.dumps(self._ends) + "\n")


def multiply(factor: torch.Tensor, products: int) -> None:
    """Compute a number of matrix products."""
    for _ in range(products):
        torch.mm(factor, factor)


class Server:
    """A real MLflow server on this machine, with a SQLite database.

    Args:
        folder: for the database, the artifacts and the log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder, folder / "server.db"
        self.database.write_bytes(empty_tables())
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 90) -> None:
        """Start or restart the server, and wait until it responds."""
        command = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{self.database}",
                   "--artifacts-destination", str(self.folder / "artifacts")]  # fmt: skip
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command], cwd=self.folder, stdout=log, stderr=log,
                env={**os.environ, **QUIET}, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + timeout_s
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "server.log").read_text()[-2000:])
            time.sleep(0.05)

    def _is_healthy(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
            return True
        return False

    def signal(self, number: int) -> None:
        """Send a signal to the server and its child processes."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def hang(self) -> None:
        """Stop responding, with the port still open."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Respond again, first to the requests received while hanging."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the server and its child processes."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait(20)
            self._process = None


# --- trainings


def write_recipe(
    folder: Path,
    store: str | None,
    every: int = 1,
    save_every: int = 2,
    products: int = 0,
    wait_ms: float = 0,
) -> Path:
    """Write a small joint recipe that logs to a store.

    Args:
        folder: for the recipe and all outputs of the training.
        store: its address; None to disable logging.
        every: number of steps between two logged steps.
        save_every: number of steps between two saved checkpoints.
        products, wait_ms: see `Clock`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = write_untracked_recipe(folder)
    text = file.read_text(encoding="utf-8")
    if store is not None:
        init_args = {"tracking_uri": store, "experiment_name": "outage"}
        logger = {"class_path": "yolo_lightning.tracking.RunLogger", "init_args": init_args}
        assert "logger: false" in text
        text = text.replace("logger: false", f"logger: {json.dumps(logger)}")
    text = text.replace("every_n_steps: 2}", f"every_n_steps: {save_every}}}")
    text += f"""\
    - class_path: yolo_lightning.callbacks.throughput.Throughput
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{filename: best, monitor: val/AP50, mode: max, enable_version_counter: false}}
    - class_path: tests.helpers.tracking_outage.Clock
      init_args: {json.dumps({"folder": str(folder), "products": products, "wait_ms": wait_ms})}
  log_every_n_steps: {every}
"""
    file.write_text(text, encoding="utf-8")
    return file


def arguments(folder: Path, *options: str) -> list[str]:
    """Return the command line of a training in `folder`, which says where outputs go."""
    recipe = folder / "recipe.yaml"
    trainer = yaml.safe_load(recipe.read_text(encoding="utf-8"))["trainer"]
    places = [f"--trainer.default_root_dir={trainer['default_root_dir']}"]
    if trainer["logger"]:
        store = trainer["logger"]["init_args"]["tracking_uri"]
        places += [f"--trainer.logger.init_args.tracking_uri={store}"]
    modules = [f"--allow-module=tests.helpers.{name}" for name in ("diary", "tracking_outage")]
    return ["fit", "--config", str(recipe), "--resume", "auto", *modules, *places, *options]


def start(
    folder: Path,
    *options: str,
    console: bool = False,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Fork a training in a new process group; return its process id.

    Args:
        folder: of its recipe.
        options: of its command line.
        console: use the entry point of the console script, which handles Ctrl-C.
        environment: additional variables.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        redirect_output(folder / "log.txt")
        os.environ.update(environment or {})
        # Lightning has set it on import
        setattr(rank_zero_only, "rank", int(os.environ.get("LOCAL_RANK", 0)))  # noqa: B010
        kill_at(os.environ.get("KILL_AT", ""))
        from yolo_lightning.cli import main as __main__

        sys.argv = ["yolo-lightning", *arguments(folder, *options)]
        code = __main__.console() if console else __main__.main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect_output(file: Path) -> None:
    """Redirect the output of this process, also from pytest's capture, to a file."""
    log = file.open("a", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(log)

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {message}", file=log)

    warnings.showwarning = show


def wait_for_exit(process: int, folder: Path, expected: int = 0, timeout_s: float = 600) -> None:
    """Wait until a training exits, and check its exit code."""
    code = wait_for_process(process, timeout_s)
    log = (folder / "log.txt").read_text(errors="replace") if code != expected else ""
    assert code == expected, f"exit code {code}: {log[-3000:]}"


def current_step(folder: Path) -> int:
    """Return the number of batches that the training in `folder` has completed."""
    try:
        return int((folder / "step").read_bytes() or 0)
    except OSError:
        return 0


def wait_for_step(folder: Path, process: int, step: int, timeout_s: float = 120) -> None:
    """Wait until a training has completed a number of batches."""
    deadline = time.monotonic() + timeout_s
    while current_step(folder) < step:
        assert time.monotonic() < deadline, f"{folder}: no step {step}"
        code = wait_for_process(process, 0.01)
        assert code is None, (code, (folder / "log.txt").read_text(errors="replace")[-3000:])


def kill(process: int) -> None:
    """Kill a training and its child processes."""
    os.killpg(process, signal.SIGKILL)
    wait_for_process(process, 10)


# --- points in the store


def journals(folder: Path) -> list[Path]:
    """Return the journals of the trainings in `folder`."""
    return sorted(folder.glob("runs/*/mlflow/journal.jsonl"))


def logged_points(folder: Path) -> set[tuple[str, int]]:
    """Return name and step of each point in the journals of the trainings in `folder`."""
    lines = [line for file in journals(folder) for line in file.read_text().splitlines()]
    entries = [entry for entry in map(json.loads, lines) if {"step", "values"} <= entry.keys()]
    return {(key, entry["step"]) for entry in entries for key in entry["values"]}


def query_database(database: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    """Query a database in read-only mode."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(query, values).fetchall()


def find_runs(database: Path, folder: Path) -> list[tuple[str, str]]:
    """Return ids and statuses of the runs of the trainings in `folder`."""
    query = "select r.run_uuid, r.status from runs r join tags t on r.run_uuid = t.run_uuid where "
    query += "t.key = 'run_folder' and t.value like ? order by r.start_time"
    return query_database(database, query, f"{folder}/runs/%")


def count_points(database: Path, run_id: str) -> Counter[tuple[str, int, float]]:
    """Return how often a run has each point, without metrics that differ in every training."""
    query = "select key, step, value, is_nan from metrics where run_uuid = ?"
    return Counter(
        (key, step, float("nan") if is_nan else value)
        for key, step, value, is_nan in query_database(database, query, run_id)
        if not key.startswith(VARYING_METRICS)
    )


class PointCount:
    """Compares the points in a training's journal with those of its run.

    Args:
        database: of the store.
        folder: of one training.
    """

    def __init__(self, database: Path, folder: Path) -> None:
        runs = find_runs(database, folder)
        self.runs = len(runs)
        self.run_id, self.status = runs[0] if runs else ("", "")
        query = "select key, step, count(*) from metrics where run_uuid = ? group by key, step"
        found = {(key, step): n for key, step, n in query_database(database, query, self.run_id)}
        expected = logged_points(folder)
        self.expected, self.found = len(expected), sum(found.values())
        self.duplicate = sorted(point for point, n in found.items() if n > 1)
        self.missing = sorted(expected - found.keys())
        self.unexpected = sorted(found.keys() - expected)

    @property
    def complete(self) -> bool:
        """Whether there is one run, with every point once."""
        return self.runs == 1 and not (self.duplicate or self.missing or self.unexpected)

    def __str__(self) -> str:
        """Return a summary on one line."""
        return (
            f"{self.runs} run, {self.status}; points: {self.expected} expected, {self.found} "
            f"found, {len(self.duplicate)} duplicate, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected"
        )


# --- times


class StepTimes:
    """Step times of trainings of one kind."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.rounds: list[tuple[float, float]] = []  # medians and means
        self.thread: list[float] = []
        self.process: list[float] = []
        self.logging: list[float] = []

    def add(self, folder: Path, begin: int = SKIPPED_STEPS) -> None:
        """Add the times that `Clock` recorded, from step `begin` on."""
        lines = (folder / "clock.jsonl").read_text().splitlines()
        ends = json.loads(lines[-1])
        pairs = [
            [late - early for early, late in zip(before[1:], after[1:], strict=True)]
            for before, after in zip(ends, ends[1:], strict=False)
            if before[0] >= begin and after[0] >= begin
        ]
        wall, thread, process, logging_s = ([pair[k] for pair in pairs] for k in range(4))
        self.wall += wall
        self.rounds.append((statistics.median(wall), statistics.mean(wall)))
        self.thread.append(statistics.mean(thread))
        self.process.append(statistics.mean(process))
        self.logging.append(statistics.mean(logging_s))

    def compare_with(self, other: "StepTimes") -> str:
        """Return the times and the differences from another kind, by round, on one line."""
        rounds = zip(self.rounds, other.rounds, strict=True)
        percent = [100 * (mine[0] / theirs[0] - 1) for mine, theirs in rounds]
        rows = {
            "median": (statistics.median(self.wall), statistics.median(other.wall)),
            "mean": (statistics.mean(self.wall), statistics.mean(other.wall)),
            "CPU main thread": (statistics.mean(self.thread), statistics.mean(other.thread)),
            "CPU process": (statistics.mean(self.process), statistics.mean(other.process)),
        }
        times = [f"{k} {a * 1e3:.2f} ms ({100 * (a / b - 1):+.2f} %)" for k, (a, b) in rows.items()]
        medians = " ".join(f"{value:+.2f}" for value in percent)
        logging_ms = 1e3 * statistics.mean(self.logging)
        threads_ms = 1e3 * (statistics.mean(self.process) - statistics.mean(self.thread))
        return (
            f"{', '.join(times)}; medians by round: {medians} %; logging {logging_ms:.2f} ms per "
            f"step, other threads {threads_ms:.2f} ms; {len(self.wall)} steps"
        )


def products_for(step_ms: float) -> int:
    """Return the number of matrix products that extend a 20 ms step to `step_ms`."""
    factor, number = torch.ones(192, 192), 200
    multiply(factor, number)
    durations = []
    for _ in range(5):
        started = time.perf_counter()
        multiply(factor, number)
        durations.append((time.perf_counter() - started) / number)
    return max(0, int((step_ms / 1e3 - 0.020) / min(durations)))


# --- benchmarks


class Benchmark:
    """Trainings with an MLflow server or a SQLite store.

    Args:
        folder: working folder.
        options: of the command line.
    """

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options = folder, options
        self.products = 0 if options.wait else products_for(options.step_ms)
        self.wait_ms = options.step_ms - 20 if options.wait else 0
        self.server = Server(folder)
        self.failures = 0

    def check(self, name: str, database: Path, folder: Path) -> None:
        """Check the run of a training, and print the result."""
        count = PointCount(database, folder)
        ok = count.complete and count.status == "FINISHED"
        self.failures += not ok
        print(f"{name}: {count}{'' if ok else '  WRONG'}", flush=True)
        for kind in ("duplicate", "missing", "unexpected"):
            if getattr(count, kind):
                print(f"  {kind}: {getattr(count, kind)[:8]}")

    def empty_store(self, folder: Path) -> Path:
        """Copy an empty store to a folder; creating one takes ten seconds."""
        template = self.folder / "empty" / "mlflow.db"
        if not template.exists():
            template.parent.mkdir()
            code = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
            uri = f"sqlite:///{template}"
            subprocess.run([sys.executable, "-c", code, uri], check=True, capture_output=True)
        folder.mkdir(parents=True)
        shutil.copy(template, folder / "mlflow.db")
        return folder / "mlflow.db"

    def start_timed(self, folder: Path, store: str | None, every: int) -> int:
        """Start a training of `--steps` steps with one validation, at its end."""
        write_recipe(folder, store, every, 25, self.products, self.wait_ms)
        steps = self.options.steps
        limits = (f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1")
        length = f"--data.steps_per_epoch={steps}"
        return start(folder, *limits, length, f"--trainer.val_check_interval={steps}")

    def overhead(self) -> None:
        """Compare trainings with and without tracking."""
        kinds: list[tuple[str, str, int]] = [("none", "", 50)]
        kinds += [(f"{s} every {n}", s, n) for s in ("SQLite", "server") for n in (1, 50)]
        times = {name: StepTimes() for name, *_ in kinds}
        for number in range(self.options.rounds):
            turn = number % len(kinds)
            for name, kind, every in [*kinds[turn:], *kinds[:turn]]:
                folder = self.folder / f"overhead-{number}-{name.replace(' ', '-')}"
                store, database = None, None
                if kind == "SQLite":
                    database = self.empty_store(folder)
                    store = f"sqlite:///{database}"
                elif kind == "server":
                    store, database = self.server.uri, self.server.database
                wait_for_exit(self.start_timed(folder, store, every), folder)
                times[name].add(folder)
                if database is not None:
                    self.check(f"overhead, {name}", database, folder)
        for name, step_times in times.items():
            print(f"overhead, {name}: {step_times.compare_with(times['none'])}", flush=True)

    def outage(self) -> None:
        """Compare trainings with and without a temporary outage of the server."""
        outages: dict[str, Callable[[int, Path], None]] = {
            "none": self._no_outage,
            "hangs 10 s": self._hang,
            "dead about 10 s": self._restart,
            "dead for the rest": self._stay_down,
        }
        times = {name: StepTimes() for name in outages}
        for number in range(self.options.rounds):
            turn = number % len(outages)
            for name, outage in [*list(outages.items())[turn:], *list(outages.items())[:turn]]:
                folder = self.folder / f"outage-{number}-{name.replace(' ', '-')}"
                process = self.start_timed(folder, self.server.uri, 1)
                wait_for_step(folder, process, OUTAGE_AT)
                outage(process, folder)
                times[name].add(folder, OUTAGE_AT)
                self.check(f"outage, {name}, exit code 0", self.server.database, folder)
        for name, step_times in times.items():
            print(f"outage, {name}: {step_times.compare_with(times['none'])}", flush=True)

    def _no_outage(self, process: int, folder: Path) -> None:
        wait_for_exit(process, folder)

    def _hang(self, process: int, folder: Path) -> None:
        self.server.hang()
        assert wait_for_process(process, OUTAGE_S) is None
        self.server.resume()
        wait_for_exit(process, folder)

    def _restart(self, process: int, folder: Path) -> None:
        self.server.kill()
        assert wait_for_process(process, OUTAGE_S / 2) is None
        self.server.start()  # takes about OUTAGE_S / 2
        wait_for_exit(process, folder)

    def _stay_down(self, process: int, folder: Path) -> None:
        self.server.kill()
        wait_for_exit(process, folder)
        self.server.start()
        sync(folder, self.server.uri)

    def kill(self) -> None:
        """Kill a training during an outage, then restart the server and resume."""
        folder = self.folder / "kill"
        process = self.start_timed(folder, self.server.uri, 1)
        wait_for_step(folder, process, OUTAGE_AT)
        self.server.kill()
        wait_for_step(folder, process, OUTAGE_AT + 30)
        kill(process)
        self.server.start()
        wait_for_exit(self.start_timed(folder, self.server.uri, 1), folder)
        self.check("kill -9 in an outage, then resumed", self.server.database, folder)

    def five_kills(self) -> None:
        """Kill and resume a training five times, with each kind of store."""
        for kind in ("SQLite", "server"):
            folder = self.folder / f"five-kills-{kind}"
            database = self.server.database
            store = self.server.uri
            if kind == "SQLite":
                database = self.empty_store(folder)
                store = f"sqlite:///{database}"
            write_recipe(folder, store, products=self.products // 2)
            for stop in (4, 6, 9, 13, 19):  # the first checkpoint is saved by then
                process = start(folder)
                wait_for_step(folder, process, stop)
                kill(process)
            wait_for_exit(start(folder), folder)
            self.check(f"five kills, {kind}", database, folder)

    def two_at_once(self) -> None:
        """Start two trainings with a database that does not exist yet."""
        root = self.folder / "two"
        store = f"sqlite:///{root}/mlflow.db"
        folders = [root / "one", root / "two"]
        for folder in folders:
            write_recipe(folder, store)
        processes = [(start(folder), folder) for folder in folders]
        for process, folder in processes:
            wait_for_exit(process, folder)
        for folder in folders:
            self.check(f"two at once, {folder.name}", root / "mlflow.db", folder)


def sync(folder: Path, store: str) -> None:
    """Run `mlflow sync`, to a store that the environment does not name."""
    from yolo_lightning.cli.main import main as command

    process = os.fork()
    if not process:
        code = 1
        try:
            code = command(["mlflow", "sync", str(folder / "runs"), "--store", store])
        finally:
            os._exit(code)
    assert wait_for_process(process, 120) == 0


@contextlib.contextmanager
def working_folder(folder: str | None) -> Iterator[Path]:
    """Yield the given folder, or a temporary one."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder).resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the selected benchmarks."""
    names = ("overhead", "outage", "kill", "five-kills", "two-at-once")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=names, nargs="+", default=names)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--step-ms", type=float, default=100)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder")
    options = parser.parse_args(argv)
    os.environ.update(QUIET)
    torch.set_num_threads(1)
    import_module("yolo_lightning.cli.recipe")
    with working_folder(options.folder) as folder:
        benchmark = Benchmark(folder, options)
        benchmark.server.start()
        try:
            for name in options.only:
                getattr(benchmark, name.replace("-", "_"))()
        finally:
            benchmark.server.kill()
    return int(benchmark.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
