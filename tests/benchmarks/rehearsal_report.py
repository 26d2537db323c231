"""The measurements of a rehearsal as a section of docs/benchmarks.md."""

import json
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.rehearsal_estimate import estimate
from yolo_lightning.errors import write_atomically

START, END = "<!-- rehearsal: start -->", "<!-- rehearsal: end -->"
HEADING = "## YOLO9000 at its true size"

MAX_START_S, MAX_OTHER_MIB = 60, 1.2e9 / 2**20

Record = dict[str, Any]
_PARTS = ("wait for data", "resize", "forward and loss", "backward and all-reduce", "optimizer")


@dataclass
class Results:
    """All that a rehearsal measured; plain values."""

    plan: dict[str, Any]
    indices: dict[str, list[Record]] = field(default_factory=dict)  # first parse, then opened
    # by training, one for each process: rank and records
    clocks: dict[str, list[tuple[int, list[Record]]]] = field(default_factory=dict)
    checkpoints: dict[str, int] = field(default_factory=dict)  # bytes
    compared: dict[str, int] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)
    loaded: list[Record] = field(default_factory=list)  # batches of loader workers
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def read_clocks(folder: Path) -> list[tuple[int, list[Record]]]:
    """Return the records of each process of a training, in the order of their starts."""
    clocks = []
    for file in sorted(folder.glob("clock-*.jsonl"), key=lambda file: file.stat().st_ctime_ns):
        lines = file.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        clocks.append((int(file.stem.split("-")[1]), records))
    return clocks


def write_section(page: Path, text: str, start: str = START, end: str = END) -> None:
    """Replace the section between the two comments of a page; add it at the end if missing."""
    content = page.read_text(encoding="utf-8")
    before, _, rest = content.partition(start)
    after = rest.partition(end)[2]
    write_atomically(
        page, f"{before.rstrip()}\n\n{start}\n{text}\n{end}{after or chr(10)}".lstrip()
    )


def render(results: Results) -> str:
    """Return the section as Markdown; add what exceeds a bound to the failures."""
    parts = (_introduction, _indices, _start, _memory, _steps, _checks, _needs)
    return "\n\n".join(part(results) for part in parts)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _find(results: Results, run: str, event: str) -> list[Record]:
    return [
        record
        for _, records in results.clocks[run]
        for record in records
        if record["event"] == event
    ]


def _span(values: Iterable[float], digits: int = 0) -> str:
    """Return the least and the greatest of some values."""
    ordered = sorted(values)
    low, high = (f"{value:,.{digits}f}" for value in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} to {high}"


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 130)


def _introduction(results: Results) -> str:
    plan, indices = results.plan, results.indices
    coco, imagenet = indices["COCO"][0], indices["ImageNet-22k"][0]
    boxed = len({s["step"] for s in _steps_of(results) if s["kind"] == "DetectionBatch"})
    sizes = f"{min(plan['sizes'])} to {max(plan['sizes'])} px"
    network = "a small network" if plan["is_small"] else "Darknet-19 in bf16-mixed"
    text = _paragraph(
        f"""`recipes/joint_yolo9000.yaml` with two torchrun agents, as on two nodes, on one machine
        with two cores: generated data with the numbers of COCO ({coco["images"]:,} images,
        {coco["labelled"]:,} boxes to learn from) and of ImageNet-22k
        ({imagenet["images_in_index"]:,} names in
        {plan["scale"]["folders"]:,} folders, of which {imagenet["images"]:,} images are in the
        tree), few photographs of 640 x 480 behind them, and a tree of 9,418 nodes with the shape of
        the authors'. {plan["steps"]} steps, {boxed} with boxes and {plan["steps"] - boxed} with
        labels, {plan["batch_size"]} images each, at {sizes}, {network}, one thread and one loader
        worker for each rank; a burn-in of 10 steps to 0.0001, so that the weights change. It took
        {results.seconds / 60:.0f} minutes."""
    )
    return f"{HEADING}\n\n```sh\nmake rehearsal\n```\n\n{text}"


def _indices(results: Results) -> str:
    rows = []
    for name, (first, opened) in results.indices.items():
        rows.append(
            (
                name, f"{first['images_in_index']:,}", f"{first['index_s']:.1f} s",
                f"{first['peak_mib'] - first['imported_mib']:,.0f} MiB",
                f"{first['index_mib']:,.1f} MiB", f"{opened['index_s']:.3f} s",
                f"{opened['bind_s']:.2f} s",
                f"{opened['peak_mib'] - opened['imported_mib']:,.0f} MiB",
            )
        )  # fmt: skip
    head = ("index", "images", "first parse", "peak beyond imports", "on disk", "opened again",
            "bound to the tree", "peak beyond imports")  # fmt: skip
    return table(head, rows)


def _start(results: Results) -> str:
    starts = _find(results, "uninterrupted", "start") + _find(results, "killed", "start")
    longest = max(start["seconds"] for start in starts)
    if longest > MAX_START_S:
        results.failures.append(f"{longest:.0f} s to the first step, allowed: {MAX_START_S}")
    names = sorted({name for start in starts for name in start["parts"]}, key=_order(starts))
    rows = [(name, _span((s["parts"].get(name, 0.0) for s in starts), 1)) for name in names]
    rows.append(("all, from the start of the process", _span((s["seconds"] for s in starts), 1)))
    text = _paragraph(
        f"""Seconds of a rank from its start to the first step, with indices on disk; {len(starts)}
        starts of ranks, two of them after the kill:"""
    )
    return f"{text}\n\n{table(('part', 's'), rows)}"


def _order(starts: list[Record]) -> Callable[[str], float]:
    def longest_first(name: str) -> float:
        return -max(float(start["parts"].get(name, 0.0)) for start in starts)

    return longest_first


def _memory(results: Results) -> str:
    parameters = _find(results, "killed", "fit_start")[0]["parameters"]
    weights = 4 * parameters / 2**20
    (small_start,) = _find(results, "small-network", "fit_start")
    # weights, gradients, momentum
    small = max(r["peak"] for r in _with_memory(results, "small-network"))
    small -= 3 * 4 * small_start["parameters"] / 2**20
    other = small + weights
    if not results.plan["is_small"] and other > MAX_OTHER_MIB:
        results.failures.append(f"{other:.0f} MiB a rank beyond network, gradients and activations")
    ranks = _with_memory(results, "killed")
    workers = [w for record in ranks for w in record.get("workers", ())]
    rows = [
        ("weights; gradients and momentum take as much each",
         f"{weights:,.0f}"),
        ("peak of a rank, all included", _span([max(r["peak"] for r in ranks)])),
        ("of it anonymous, at most", f"{max(r['anonymous'] for r in ranks):,.0f}"),
        ("peak of the same training with a network of 8 channels at 64 px, without what its "
         "weights take", f"{small:,.0f}"),
        ("**beyond network, gradients and activations**: that and the momentum",
         f"**{other:,.0f}**"),
        ("before the first gradient, without the weights",
         _span(r["rss"] - weights for r in _find(results, "killed", "fit_start")[:2])),
        ("a loader worker: resident", _span(w["rss"] for w in workers)),
        ("a loader worker: pages that no other process has", _span(w["own"] for w in workers)),
    ]  # fmt: skip
    text = _paragraph(
        """A network of 8 channels at 64 px has hardly any activations, so its peak is what index,
        tree, MLflow and the evaluation with all nodes take, and 590 MiB of imported
        libraries. Resident memory includes pages of files, which all processes share. A worker
        keeps the pages of its rank that change after its start, such as weights on a CPU; the
        workers of a rank share them."""
    )
    return f"Memory, MiB:\n\n{table(('what', 'MiB'), rows)}\n\n{text}"


def _with_memory(results: Results, run: str) -> list[Record]:
    return [record for _, records in results.clocks[run] for record in records if "peak" in record]


def _steps_of(results: Results) -> list[Record]:
    """Return the steps of both ranks, without repeated ones and the first of each process."""
    steps: dict[tuple[int, int], Record] = {}
    for rank, records in results.clocks["killed"]:
        for record in records:
            if record["event"] == "step":
                steps[rank, record["step"]] = record
    return list(steps.values())


def _steps(results: Results) -> str:
    columns = []
    for kind in ("DetectionBatch", "ClassificationBatch"):
        steps = [step for step in _steps_of(results) if step["kind"] == kind]
        parts = [statistics.fmean(s["parts"].get(part, 0.0) for s in steps) for part in _PARTS]
        # a checkpoint is saved after some steps, and counted in the next one
        total = statistics.fmean(s["seconds"] - s["parts"].get("checkpoint", 0.0) for s in steps)
        columns.append([*parts, total - sum(parts), total])
    names = [*_PARTS, "other: hooks, logging, buffers of batch norm", "all"]
    rows = [
        (name, *(f"{value:.3f}" for value in values))
        for name, *values in zip(names, *columns, strict=True)
    ]
    text = _paragraph(
        """Seconds of a step without checkpoints, means of both ranks; the backward pass includes
        the all-reduce, which runs beside it:"""
    )
    parts_table = table(("part", "with boxes", "with labels"), rows)
    return f"{text}\n\n{parts_table}\n\n{table(('what', 'measured'), _other_figures(results))}"


def _other_figures(results: Results) -> list[tuple[str, str]]:
    """Return rows about traffic, checkpoints, loading and the validation."""
    reduces = _find(results, "killed", "all_reduce")
    validation = max(_find(results, "killed", "validation"), key=lambda record: record["seconds"])
    images_per_s = validation["images"] / validation["seconds"]
    saved = [step["parts"].get("checkpoint", 0.0) for step in _steps_of(results)]
    sizes = (f"`{name}` {size / 2**20:,.0f} MiB" for name, size in results.checkpoints.items())
    loaded = [
        f"{_images_per_s(results, kind):.0f} {text}"
        for kind, text in (("detection", "with boxes"), ("classification", "with labels"))
    ]
    return [
        ("gradients of a step, sent once by each of two ranks",
         f"{reduces[0]['bytes'] / 2**20:,.0f} MiB"),
        ("the all-reduce by itself (Gloo, loopback)",
         f"{_span((reduce['seconds'] for reduce in reduces), 2)} s"),
        ("checkpoints", ", ".join(sizes)),
        ("writing a checkpoint, fsync included, and waiting for it",
         f"{_span((seconds for seconds in saved if seconds > 0.01), 1)} s"),
        ("images that one core decodes and augments in a second", ", ".join(loaded)),
        (f"validation of {validation['images']:,} images at {results.plan['image_size']} px",
         f"{validation['seconds']:,.0f} s, {images_per_s:.2f} images per second, both ranks"),
    ]  # fmt: skip


def _images_per_s(results: Results, kind: str) -> float:
    """Return how many images a core prepares in a second, by its processor time."""
    batches = [b for b in results.loaded if b["kind"] == kind]
    return float(sum(b["images"] for b in batches) / sum(b["cpu_s"] for b in batches))


def _checks(results: Results) -> str:
    compared, store = results.compared, results.store
    text = _paragraph(
        f"""Rank 1 was killed with SIGKILL after step {results.plan["kill_at"]}, and torchrun
        started both ranks again. Of {compared["steps"]} steps (two ranks,
        {compared["after_resume"]} of them after the resume) compared with a training without
        interruption, {compared["different"]} differ in sample ids, size or a bit of the loss.
        MLflow has {len(store["runs"])} run, {" ".join(store["runs"])}, with {store["points"]:,}
        points of {store["keys"]} metrics, {store["duplicates"]} of them duplicate, and
        {store["parameters"]} parameters of at most {store["longest_parameter"]:,} characters."""
    )
    return "\n".join([text, *(f"- failed: {failure}" for failure in results.failures)])


def _needs(results: Results) -> str:
    (reduce, *_) = _find(results, "killed", "all_reduce")
    last = max(results.checkpoints.values(), default=0)
    index_mib = {name: first["index_mib"] for name, (first, _) in results.indices.items()}
    return estimate(
        gradient_bytes=reduce["bytes"],
        checkpoint_bytes=last,
        index_mib=index_mib,
        images_per_core_s=_images_per_s(results, "classification"),
    )
