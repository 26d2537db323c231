"""`yolo-lightning mlflow compare`: runs side by side."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.cli.commands.mlflow import check_answers, store_uri
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.tracking.store import masked

if TYPE_CHECKING:
    from yolo_lightning.tracking.compare.runs import TrackedRun
    from yolo_lightning.tracking.compare.tables import Table

_MAX_NAMED = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning mlflow compare",
        description="Show runs side by side: their best and last figures, the parameters that "
        "differ, and the first step at which they read different batches.",
        epilog="The best value is the highest; of names with 'loss' the lowest. --experiment, "
        "--run and --metric may be given several times.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--experiment", action="append", default=[], metavar="NAME", help="only its runs (all)")
    add(
        "--run", action="append", default=[], metavar="NAME",
        help="name or id of a run, or of a parent, which stands for its trials (the newest runs)",
    )  # fmt: skip
    add("--max-runs", type=int, default=20, metavar="N", help="how many of the newest runs (20)")
    add(
        "--metric", action="append", default=[], metavar="NAME",
        help="any that a run has (val/AP50 and val/AP, or what there is)",
    )  # fmt: skip
    add("--group-by", metavar="NAME", help="mean and spread of runs that share a tag or parameter")
    add("--last", action="store_true", help="group and sort by last values, not by the best")
    add("--csv", type=Path, metavar="FILE", help="write the table, all parameters that differ")
    add("--plot", type=Path, metavar="FILE.png", help="draw the metrics over the steps")
    return parser


def main(argv: Sequence[str]) -> None:
    """Print runs side by side, and write and draw them where asked to.

    Raises:
        InputError: names that are not there, or a store that does not answer.
    """
    options = _parser().parse_args(list(argv))
    if options.max_runs < 1:
        raise InputError(f"--max-runs is {options.max_runs}; allowed: 1 or more")
    if options.plot and options.plot.suffix.lower() != ".png":
        raise InputError(f"--plot {str(options.plot)!r}: the picture is a PNG; name it FILE.png")
    uri = store_uri()
    check_answers(uri)
    from yolo_lightning.tracking.compare.runs import metrics_of, read_curve, reading
    from yolo_lightning.tracking.compare.tables import place

    with reading(uri) as client:
        runs = _chosen(client, options)
        metrics = metrics_of(runs, options.metric)
        for run in runs:
            for metric in run.metrics.intersection(metrics):
                run.curves[metric] = read_curve(client, run.run_id, metric)
        if not options.run:  # the best first
            runs.sort(key=lambda run: place(run, metrics[0], options.last))
        if options.group_by:
            _show_groups(runs, metrics, options)
        else:
            _show_runs(client, runs, metrics, options)


def _chosen(client: Any, options: argparse.Namespace) -> list["TrackedRun"]:
    """Return the runs that are asked for, without those that hold no figures."""
    from yolo_lightning.tracking.compare.runs import experiments, named, runs_of

    found = runs_of(client, experiments(client, options.experiment))
    if options.run:
        chosen = named(found, options.run)
        runs = [run for run in chosen if run.metrics]
        if idle := [run.name for run in chosen if not run.metrics]:
            print(f"left out, without a metric so far: {', '.join(idle)}")
    else:
        figured = (run for run in found if run.metrics)
        runs = list(islice(figured, options.max_runs))
        if next(figured, None):
            print(f"the newest {len(runs)} runs; --max-runs {2 * len(runs)} shows more")
    if not runs:
        where = f" in {', '.join(options.experiment)}" if options.experiment else ""
        raise InputError(f"no run with a metric{where} in {masked(store_uri())}")
    return runs


def _show_runs(
    client: Any, runs: Sequence["TrackedRun"], metrics: Sequence[str], options: argparse.Namespace
) -> None:
    from yolo_lightning.tracking.compare import tables
    from yolo_lightning.tracking.compare.runs import read_batches

    params, _ = tables.differing([[run] for run in runs])
    labels, alike = tables.labels_of(runs), tables.alike(params)
    few = len(alike) <= tables.FEW_PARAMS
    table = tables.runs_table(runs, metrics, params, alike if few else ())
    print(table.text())
    if not few:
        numbers = [str(k + 1) for k in range(len(runs))]
        text = tables.params_text({name: params[name] for name in alike}, numbers)
        print(f"\nparameters that differ, each value with the # of its runs\n{text}")
    _show_alike(alike)
    if len(runs) > 1:
        recorded = [read_batches(client, run.run_id) for run in runs]
        print(f"\n{tables.batches_text(recorded, labels)}")
    about = alike if len(alike) <= _MAX_NAMED else {}
    lines = {}
    for k, (label, run) in enumerate(zip(labels, runs, strict=True)):
        values = [f"{name.split('.')[-1]} {tables.cut(params[name][k])}" for name in about]
        lines["  ".join([str(k + 1), label, *values])] = [run]
    _write(table, lines, metrics, options)


def _show_alike(alike: Mapping[str, Sequence[str]]) -> None:
    lines = [
        f"differs with {name}: {', '.join(others)}" for name, others in alike.items() if others
    ]
    if lines:
        print("\n" + "\n".join(lines))


def _show_groups(
    runs: Sequence["TrackedRun"], metrics: Sequence[str], options: argparse.Namespace
) -> None:
    from yolo_lightning.tracking.compare import tables

    key = options.group_by
    groups: dict[str, list[TrackedRun]] = {}
    for run in runs:
        groups.setdefault(run.of(key) or "-", []).append(run)
    if list(groups) == ["-"]:
        known = {name for run in runs for name in (*run.params, *run.tags)}
        hint = nearest(key, sorted(known)) or "such as recipe, experiment, model.learning_rate"
        raise InputError(
            f"--group-by {key!r}: none of these runs has such a tag or parameter; {hint}"
        )
    table = tables.groups_table(groups, key, metrics, options.last)
    print(f"{'last' if options.last else 'best'} values of {len(runs)} runs\n{table.text()}")
    between, within = tables.differing(list(groups.values()))
    alike = tables.alike(between, key)
    shown = {name: between[name] for name in alike if name != key}
    if shown:
        text = tables.params_text(shown, list(groups))
        print(f"\nparameters that differ between groups\n{text}")
    _show_alike(alike)
    if within:
        print(f"\nparameters that differ within a group: {', '.join(within)}")
    lines = {
        f"{key} {name}, {len(some)} run{'s' if len(some) > 1 else ''}": some
        for name, some in groups.items()
    }
    _write(table, lines, metrics, options)


def _write(
    table: "Table",
    lines: Mapping[str, Sequence["TrackedRun"]],
    metrics: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """Write the files that are asked for: the table, and a line of the picture a label."""
    if options.csv:
        table.write(options.csv)
        print(f"table: {options.csv}")
    if options.plot:
        from yolo_lightning.tracking.compare.plot import save_curves

        panels = {
            metric: {
                label: [run.curves[metric] for run in runs if metric in run.curves]
                for label, runs in lines.items()
            }
            for metric in metrics
        }
        save_curves(panels, options.plot)
        print(f"curves: {options.plot}")
