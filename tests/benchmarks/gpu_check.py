"""Check and measure on a GPU, in at most ten minutes.

    python -m tests.benchmarks.gpu_check --output gpu_check.json
    python -m tests.benchmarks.gpu_check --write gpu_check.json

The first command runs on the machine with the GPU, and writes a JSON file and a table; a section
that fails is reported, and the others go on. The second one, on any machine, writes the table to
docs/benchmarks.md. Without a GPU, `--device cpu --tiny` runs what can run there.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import lightning
import torch

from tests.benchmarks.gpu_sections import SECTIONS, Place, Rows
from tests.benchmarks.rehearsal_report import table, write_section
from tests.helpers.paths import REPO

START, END = "<!-- gpu: start -->", "<!-- gpu: end -->"
BUDGET_S = 540.0  # no section begins later


def run(
    sections: Mapping[str, Callable[[Place], Rows]], place: Place, budget_s: float = BUDGET_S
) -> dict[str, Any]:
    """Run the sections; return plain values."""
    started, found = time.monotonic(), []
    for name, section in sections.items():
        start, rows, error = time.monotonic(), list[tuple[str, str]](), ""
        if start - started > budget_s:
            error = f"skipped: {budget_s:.0f} s had passed"
        else:
            print(f"{name} …", file=sys.stderr, flush=True)
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    rows = section(place)
            except Exception as failure:
                traceback.print_exc()
                message = next(iter(str(failure).splitlines()), "")
                error = f"failed: {type(failure).__name__}: {message}"
        seconds = round(time.monotonic() - start, 1)
        found.append({"name": name, "seconds": seconds, "rows": rows, "error": error})
    return {"machine": _machine(place), "seconds": time.monotonic() - started, "sections": found}


def render(results: Mapping[str, Any]) -> str:
    """Return the section of the page as Markdown."""
    rows = []
    for section in results["sections"]:
        for what, value in section["rows"]:
            rows.append((section["name"], what, value.replace("|", "/")))
        if section["error"]:
            rows.append((section["name"], "–", section["error"].replace("|", "/")))
    times = ", ".join(f"{s['name']} {s['seconds']:.0f} s" for s in results["sections"])
    text = f"{results['machine']}; {results['seconds']:.0f} s: {times}."
    return f"```sh\nmake gpu-check\n```\n\n{text}\n\n{table(('section', 'what', 'result'), rows)}"


def _machine(place: Place) -> str:
    name = torch.cuda.get_device_name() if place.has_gpu else "no GPU"
    return (
        f"{name}, {os.cpu_count()} cores; Python {platform.python_version()}, torch "
        f"{torch.__version__}, lightning {lightning.__version__}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run or write; return 1 if a section failed or was skipped."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks.gpu_check")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="in seconds, as a test")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"), metavar="FILE")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a result to the page")
    parser.add_argument("--page", type=Path, default=REPO / "docs/benchmarks.md", metavar="FILE")
    options = parser.parse_args(arguments)
    if options.write:
        results = json.loads(options.write.read_text(encoding="utf-8"))
        write_section(options.page, render(results), START, END)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU was found; without one: --device cpu --tiny")
    results = run(SECTIONS, Place(options.device, options.tiny))
    options.output.write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(render(results))
    return int(any(section["error"] for section in results["sections"]))


if __name__ == "__main__":
    sys.exit(main())
