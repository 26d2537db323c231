"""Take the MLflow server away from trainings, kill them, and count what the store holds.

    python tests/helpers/tracking_outage.py                   everything, about half an hour
    python tests/helpers/tracking_outage.py --only overhead --rounds 5
    python tests/helpers/tracking_outage.py --only outage --steps 400 --step-ms 100

--only      overhead, outage, kill, five-kills, two-at-once: which of these, all of them otherwise
--steps     of a timed training
--step-ms   what a step is filled up to by matrix products, the same number of them in each training
--wait      fill steps up by waiting, as a host waits for its GPU; then nothing but what a step does
            beside it can make it longer
--rounds    how often each kind of a timed training is run, in turns
--folder    where to work, a temporary folder otherwise

A real `mlflow server` runs on this machine; everything is imported once and each training is a
fork. Points are counted in the store's database. Step times leave out the first ten steps of a
process and what contains a validation. Ends with 1 where a training fails, or a point is missing or
there twice; times are for the reader to judge, beside what else the machine does.
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

from tests.helpers.kill_and_resume import ended
from tests.helpers.kill_and_resume import write_recipe as write_plain_recipe
from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint

MEASURED = ("system/", "speed/", "memory/")  # what no two trainings have in common
SKIPPED, OUTAGE_AT, OUTAGE_S = 10, 40, 10.0
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
}  # fmt: skip


class Clock(pl.Callback):
    """Fills steps up to a length, notes when each one ended, and stops where it is told to.

    The environment's ``STOP`` says what is to happen, where, and at which step: a signal's name or
    ``error``; ``before`` or ``after`` the batch, or in the ``validation`` once so many steps are
    done. Such as ``SIGKILL after 3``.

    Args:
        folder: of ``clock.jsonl``, with a line for each process that ended training, and ``step``.
        products: of two matrices, in each step.
        wait_ms: waited in each step.
    """

    def __init__(self, folder: str, products: int = 0, wait_ms: float = 0) -> None:
        self.folder, self.products, self.wait_s = Path(folder), products, wait_ms / 1000
        self._factor = torch.ones(192, 192)
        self._ends: list[tuple[int, float, float, float, float]] = []
        self._logging_s = 0.0
        self._file = -1
        self._stop = os.environ.get("STOP", "")

    def _stops(self, where: str, step: int) -> None:
        what, *wanted = self._stop.split() or [""]
        if wanted != [where, str(step)]:
            return
        self._stop = ""
        if what == "error":
            raise RuntimeError("it was asked for")
        os.kill(os.getpid(), signal.Signals[what])

    def _metered(self, call: Callable[..., None]) -> Callable[..., None]:
        def metered(*arguments: Any) -> None:
            begun = time.perf_counter()
            call(*arguments)
            self._logging_s += time.perf_counter() - begun

        return metered

    def on_train_start(self, trainer, pl_module) -> None:
        (keeper,) = (one for one in trainer.callbacks if isinstance(one, LastCheckpoint))
        for owner, name in ((keeper, "_log_step"),
                            (trainer._logger_connector, "update_train_step_metrics")):  # fmt: skip
            setattr(owner, name, self._metered(getattr(owner, name)))
        self._file = os.open(self.folder / "step", os.O_WRONLY | os.O_CREAT, 0o644)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._stops("before", batch.step)
        multiply(self._factor, self.products)
        if self.wait_s:
            time.sleep(self.wait_s)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        own = time.perf_counter(), time.thread_time(), time.process_time()
        self._ends.append((batch.step, *own, self._logging_s))
        os.pwrite(self._file, b"%12d" % (batch.step + 1), 0)
        self._stops("after", batch.step)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_) -> None:
        if batch_idx == 1:
            self._stops("validation", trainer.global_step)

    def on_validation_start(self, trainer, pl_module) -> None:
        self._ends.append((-1, 0.0, 0.0, 0.0, 0.0))

    def on_train_end(self, trainer, pl_module) -> None:
        with (self.folder / "clock.jsonl").open("a") as file:
            file.write(json.dumps(self._ends) + "\n")


def multiply(factor: torch.Tensor, products: int) -> None:
    """Do as much work as told."""
    for _ in range(products):
        torch.mm(factor, factor)


class Server:
    """A real MLflow server on this machine with a SQLite file behind it.

    Args:
        folder: of its database, its artifacts and its log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.database = folder, folder / "server.db"
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, patience_s: float = 90) -> None:
        """Start it, again after `kill` too, and wait until it answers."""
        command = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{self.database}",
                   "--artifacts-destination", str(self.folder / "artifacts")]  # fmt: skip
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *command], cwd=self.folder, stdout=log, stderr=log,
                env={**os.environ, **QUIET}, start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + patience_s
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self.folder / "server.log").read_text()[-2000:])
            time.sleep(0.05)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
            return True
        return False

    def signal(self, number: int) -> None:
        """Send a signal to it and its children."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def hang(self) -> None:
        """Leave its port open, and never answer."""
        self.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Answer again, what was asked meanwhile first."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it, with its children."""
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
    """Write a small joint recipe that logs to a store, or nowhere.

    Args:
        folder: of the recipe, and of all that the training writes.
        store: its address.
        every: steps from one that is logged to the next.
        save_every: steps from one that is saved to the next.
        products, wait_ms: see `Clock`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = write_plain_recipe(folder)
    text = file.read_text(encoding="utf-8")
    if store is not None:
        told = {"tracking_uri": store, "experiment_name": "outage"}
        logger = {"class_path": "yolo_lightning.tracking.RunLogger", "init_args": told}
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
    """Return the command line of a training in `folder`."""
    modules = [f"--allow-module=tests.helpers.{name}" for name in ("diary", "tracking_outage")]
    return ["fit", "--config", str(folder / "recipe.yaml"), "--resume", "auto", *modules, *options]


def start(
    folder: Path,
    *options: str,
    console: bool = False,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Fork a training in a process group of its own; return its number.

    Args:
        folder: of its recipe.
        options: of its command line.
        console: as a shell runs it, for Ctrl-C.
        environment: beside what is there.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        _speak_into(folder / "log.txt")
        os.environ.update(environment or {})
        from yolo_lightning.cli import main as __main__

        sys.argv = ["yolo-lightning", *arguments(folder, *options)]
        code = __main__.console() if console else __main__.main()
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _speak_into(file: Path) -> None:
    """Let this process's words go into a file, where a test's runner would catch them too."""
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


def finished(process: int, folder: Path, expected: int = 0, patience_s: float = 600) -> None:
    """Wait for a training's exit code."""
    code = ended(process, patience_s)
    log = (folder / "log.txt").read_text(errors="replace") if code != expected else ""
    assert code == expected, f"exit code {code}: {log[-3000:]}"


def step_of(folder: Path) -> int:
    """Return how many batches the training in `folder` has done."""
    try:
        return int((folder / "step").read_bytes() or 0)
    except OSError:
        return 0


def wait_for_step(folder: Path, process: int, step: int, patience_s: float = 120) -> None:
    """Wait until a training has done so many batches."""
    until = time.monotonic() + patience_s
    while step_of(folder) < step:
        assert time.monotonic() < until, f"{folder}: no step {step}"
        code = ended(process, 0.01)
        assert code is None, (code, (folder / "log.txt").read_text(errors="replace")[-3000:])


def kill(process: int) -> None:
    """Kill a training and what it started."""
    os.killpg(process, signal.SIGKILL)
    ended(process, 10)


# --- what the store holds


def journals(folder: Path) -> list[Path]:
    """Return the journals of the trainings in `folder`."""
    return sorted(folder.glob("runs/*/mlflow/journal.jsonl"))


def told(folder: Path) -> set[tuple[str, int]]:
    """Return name and step of each point that the trainings in `folder` wrote down."""
    lines = [line for file in journals(folder) for line in file.read_text().splitlines()]
    found = [entry for entry in map(json.loads, lines) if {"step", "values"} <= entry.keys()]
    return {(key, entry["step"]) for entry in found for key in entry["values"]}


def asked(database: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    """Ask a database that is only read."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as held:
        return held.execute(query, values).fetchall()


def runs_of(database: Path, folder: Path) -> list[tuple[str, str]]:
    """Return id and status of the runs of the trainings in `folder`."""
    query = "select r.run_uuid, r.status from runs r join tags t on r.run_uuid = t.run_uuid where "
    query += "t.key = 'run_folder' and t.value like ? order by r.start_time"
    return asked(database, query, f"{folder}/runs/%")


def points_of(database: Path, run_id: str) -> Counter[tuple[str, int, float]]:
    """Return how often a run holds each point that two trainings can have in common."""
    query = "select key, step, value, is_nan from metrics where run_uuid = ?"
    return Counter(
        (key, step, float("nan") if is_nan else value)
        for key, step, value, is_nan in asked(database, query, run_id)
        if not key.startswith(MEASURED)
    )


class Count:
    """What the journal of a folder's training has and the store's run.

    Args:
        database: of the store.
        folder: of one training, in one run.
    """

    def __init__(self, database: Path, folder: Path) -> None:
        runs = runs_of(database, folder)
        self.runs = len(runs)
        self.run_id, self.status = runs[0] if runs else ("", "")
        query = "select key, step, count(*) from metrics where run_uuid = ? group by key, step"
        found = {(key, step): n for key, step, n in asked(database, query, self.run_id)}
        expected = told(folder)
        self.expected, self.found = len(expected), sum(found.values())
        self.twice = sorted(point for point, n in found.items() if n > 1)
        self.missing = sorted(expected - found.keys())
        self.strange = sorted(found.keys() - expected)

    @property
    def whole(self) -> bool:
        """Whether one run holds every point, once."""
        return self.runs == 1 and not (self.twice or self.missing or self.strange)

    def __str__(self) -> str:
        """Say it in one line."""
        return (
            f"{self.runs} run, {self.status}; points: {self.expected} expected, {self.found} "
            f"found, {len(self.twice)} twice, {len(self.missing)} missing, "
            f"{len(self.strange)} unknown"
        )


# --- times


class Times:
    """Of the steps of trainings of one kind."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.rounds: list[tuple[float, float]] = []  # medians and means
        self.thread: list[float] = []
        self.process: list[float] = []
        self.logging: list[float] = []

    def add(self, folder: Path, begin: int = SKIPPED) -> None:
        """Add what a training's clock noted, from a step on."""
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

    def against(self, other: "Times") -> str:
        """Say it in one line, and how much more it is than another kind's, round by round."""
        each = zip(self.rounds, other.rounds, strict=True)
        shares = [100 * (own[0] / their[0] - 1) for own, their in each]
        rows = {
            "median": (statistics.median(self.wall), statistics.median(other.wall)),
            "mean": (statistics.mean(self.wall), statistics.mean(other.wall)),
            "CPU main thread": (statistics.mean(self.thread), statistics.mean(other.thread)),
            "CPU process": (statistics.mean(self.process), statistics.mean(other.process)),
        }
        said = [f"{k} {a * 1e3:.2f} ms ({100 * (a / b - 1):+.2f} %)" for k, (a, b) in rows.items()]
        spread = " ".join(f"{share:+.2f}" for share in shares)
        beside = statistics.mean(self.process) - statistics.mean(self.thread)
        own = f"a step logs for {1e3 * statistics.mean(self.logging):.2f} ms, "
        own += f"other threads work {1e3 * beside:.2f} ms"
        return f"{', '.join(said)}; medians by round: {spread} %; {own}; {len(self.wall)} steps"


def products_for(step_ms: float) -> int:
    """Return how many matrix products fill a step up, beside the 20 ms of the training itself."""
    factor, number = torch.ones(192, 192), 200
    multiply(factor, number)
    tries = []
    for _ in range(5):
        started = time.perf_counter()
        multiply(factor, number)
        tries.append((time.perf_counter() - started) / number)
    return max(0, int((step_ms / 1e3 - 0.020) / min(tries)))


# --- what is done


class Bench:
    """A server, an empty SQLite store, and trainings.

    Args:
        place: to work in.
        options: of the command line.
    """

    def __init__(self, place: Path, options: argparse.Namespace) -> None:
        self.place, self.options = place, options
        self.products = 0 if options.wait else products_for(options.step_ms)
        self.wait_ms = options.step_ms - 20 if options.wait else 0
        self.server = Server(place)
        self.failures = 0

    def judge(self, name: str, database: Path, folder: Path) -> None:
        """Print what the store holds of a training."""
        count = Count(database, folder)
        good = count.whole and count.status == "FINISHED"
        self.failures += not good
        print(f"{name}: {count}{'' if good else '  WRONG'}", flush=True)
        for what in ("twice", "missing", "strange"):
            if getattr(count, what):
                print(f"  {what}: {getattr(count, what)[:8]}")

    def fresh_store(self, folder: Path) -> Path:
        """Put a store's database without runs into a folder; making one takes ten seconds."""
        made = self.place / "empty" / "mlflow.db"
        if not made.exists():
            made.parent.mkdir()
            code = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
            uri = f"sqlite:///{made}"
            subprocess.run([sys.executable, "-c", code, uri], check=True, capture_output=True)
        folder.mkdir(parents=True)
        shutil.copy(made, folder / "mlflow.db")
        return folder / "mlflow.db"

    def timed(self, folder: Path, store: str | None, every: int) -> int:
        """Start a training of the asked length with one validation, at its end."""
        write_recipe(folder, store, every, 25, self.products, self.wait_ms)
        steps = self.options.steps
        limits = (f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1")
        length = f"--data.steps_per_epoch={steps}"
        return start(folder, *limits, length, f"--trainer.val_check_interval={steps}")

    def overhead(self) -> None:
        """Compare trainings with and without tracking."""
        kinds: list[tuple[str, str, int]] = [("none", "", 50)]
        kinds += [(f"{s} every {n}", s, n) for s in ("SQLite", "server") for n in (1, 50)]
        times = {name: Times() for name, *_ in kinds}
        for number in range(self.options.rounds):
            turn = number % len(kinds)
            for name, where, every in [*kinds[turn:], *kinds[:turn]]:
                folder = self.place / f"overhead-{number}-{name.replace(' ', '-')}"
                store, database = None, None
                if where == "SQLite":
                    database = self.fresh_store(folder)
                    store = f"sqlite:///{database}"
                elif where == "server":
                    store, database = self.server.uri, self.server.database
                finished(self.timed(folder, store, every), folder)
                times[name].add(folder)
                if database is not None:
                    self.judge(f"overhead, {name}", database, folder)
        for name, found in times.items():
            print(f"overhead, {name}: {found.against(times['none'])}", flush=True)

    def outage(self) -> None:
        """Compare trainings with a server that is away for some time with one that is not."""
        ways: dict[str, Callable[[int, Path], None]] = {
            "none": self._no_outage,
            "hangs 10 s": self._hangs,
            "dead about 10 s": self._dies,
            "dead for the rest": self._stays_away,
        }
        times = {name: Times() for name in ways}
        for number in range(self.options.rounds):
            turn = number % len(ways)
            for name, way in [*list(ways.items())[turn:], *list(ways.items())[:turn]]:
                folder = self.place / f"outage-{number}-{name.replace(' ', '-')}"
                process = self.timed(folder, self.server.uri, 1)
                wait_for_step(folder, process, OUTAGE_AT)
                way(process, folder)
                times[name].add(folder, OUTAGE_AT)
                self.judge(f"outage, {name}, exit code 0", self.server.database, folder)
        for name, found in times.items():
            print(f"outage, {name}: {found.against(times['none'])}", flush=True)

    def _no_outage(self, process: int, folder: Path) -> None:
        finished(process, folder)

    def _hangs(self, process: int, folder: Path) -> None:
        self.server.hang()
        assert ended(process, OUTAGE_S) is None
        self.server.go_on()
        finished(process, folder)

    def _dies(self, process: int, folder: Path) -> None:
        self.server.kill()
        assert ended(process, OUTAGE_S / 2) is None
        self.server.start()  # takes about as long again
        finished(process, folder)

    def _stays_away(self, process: int, folder: Path) -> None:
        self.server.kill()
        finished(process, folder)
        self.server.start()
        sync(folder)

    def kill(self) -> None:
        """Kill a training while the server is away, and go on with both."""
        folder = self.place / "kill"
        process = self.timed(folder, self.server.uri, 1)
        wait_for_step(folder, process, OUTAGE_AT)
        self.server.kill()
        wait_for_step(folder, process, OUTAGE_AT + 30)
        kill(process)
        self.server.start()
        finished(self.timed(folder, self.server.uri, 1), folder)
        self.judge("kill -9 in an outage, then resumed", self.server.database, folder)

    def five_kills(self) -> None:
        """Kill and resume five times, on either kind of store."""
        for where in ("SQLite", "server"):
            folder = self.place / f"five-kills-{where}"
            database = self.server.database
            store = self.server.uri
            if where == "SQLite":
                database = self.fresh_store(folder)
                store = f"sqlite:///{database}"
            write_recipe(folder, store, products=self.products // 2)
            for stop in (4, 6, 9, 13, 19):  # the first state is saved by then
                process = start(folder)
                wait_for_step(folder, process, stop)
                kill(process)
            finished(start(folder), folder)
            self.judge(f"five kills, {where}", database, folder)

    def two_at_once(self) -> None:
        """Begin two trainings on a database that does not exist."""
        place = self.place / "two"
        store = f"sqlite:///{place}/mlflow.db"
        folders = [place / "one", place / "two"]
        for folder in folders:
            write_recipe(folder, store)
        both = [(start(folder), folder) for folder in folders]
        for process, folder in both:
            finished(process, folder)
        for folder in folders:
            self.judge(f"two at once, {folder.name}", place / "mlflow.db", folder)


def sync(folder: Path) -> None:
    """Bring what the store did not take into it."""
    from yolo_lightning.cli.main import main as command

    process = os.fork()
    if not process:
        code = 1
        try:
            code = command(["mlflow", "sync", str(folder / "runs")])
        finally:
            os._exit(code)
    assert ended(process, 120) == 0


@contextlib.contextmanager
def workplace(folder: str | None) -> Iterator[Path]:
    """Yield the folder to work in."""
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder).resolve()
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked for."""
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
    with workplace(options.folder) as place:
        bench = Bench(place, options)
        bench.server.start()
        try:
            for name in options.only:
                getattr(bench, name.replace("-", "_"))()
        finally:
            bench.server.kill()
    return int(bench.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
