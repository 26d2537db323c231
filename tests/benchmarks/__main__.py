"""Run all benchmarks, print their table, and write it to docs/benchmarks.md.

    python -m tests.benchmarks [--only NAME]

Ratios are of functions that run in turn in one process; each row is the median of several rounds
and, in brackets, the smallest and the largest. With --only, nothing is written.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable

import lightning
import psutil
import torch

from tests.benchmarks import compiling, loading, naming, network, saving, start, step, waits
from tests.benchmarks.rehearsal_report import table, write_section
from tests.benchmarks.rows import HEAD, Row
from tests.helpers.paths import REPO
from yolo_lightning.memory import keep_freed_memory

START, END = "<!-- benchmarks: start -->", "<!-- benchmarks: end -->"
COMMAND = "make benchmarks"

SUBJECTS: dict[str, Callable[[], list[Row]]] = {
    "start": start.measure,  # first: its memory would be shared with a large process
    "waits": waits.measure,
    "step": step.measure,
    "naming": naming.measure,
    "network": network.measure,
    "loading": loading.measure,
    "saving": saving.measure,
    "compiling": compiling.measure,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; return the exit code."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks")
    parser.add_argument("--only", choices=SUBJECTS, metavar="NAME", help=", ".join(SUBJECTS))
    options = parser.parse_args(arguments)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    keep_freed_memory(2**30)  # as trainings do
    started, rows = time.monotonic(), list[Row]()
    for name in [options.only] if options.only else SUBJECTS:
        print(f"{name} …", file=sys.stderr, flush=True)
        for row in SUBJECTS[name]():
            print("  " + " | ".join(row.cells()), file=sys.stderr, flush=True)
            rows.append(row)
    text = render(rows, time.monotonic() - started)
    print(text)
    if not options.only:
        write_section(REPO / "docs/benchmarks.md", text, START, END)
    return 0


def render(rows: Iterable[Row], seconds: float) -> str:
    """Return the section as Markdown."""
    return f"""## Against alternatives

```sh
{COMMAND}
```

{_machine()}; it took {seconds / 60:.0f} minutes, at a load of {os.getloadavg()[2]:.1f} processes.
Ours and the alternative ran in turn in one process. Each figure is the median of several rounds,
the smallest and the largest in brackets; a ratio below 1 means that ours is faster, unless the row
says otherwise. Processor time is the user time of all threads: it varies less than seconds where
other programs run.

{table(HEAD, (row.cells() for row in rows))}"""


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; Python "
        f"{platform.python_version()}, torch {torch.__version__}, lightning "
        f"{lightning.__version__}; {torch.get_num_threads()} threads"
    )


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
