"""`yolo-lightning mlflow compare`: compare runs in the terminal."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.cli.commands.mlflow import check_store, store_uri
from yolo_lightning.errors import InputError, nearest
from yolo_lightning.tracking.names import mask_credentials

if TYPE_CHECKING:
    from yolo_lightning.tracking.compare.runs import TrackedRun
    from yolo_lightning.tracking.compare.tables import Table

_MAX_LABEL_PARAMS = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning mlflow compare",
        description="Compare runs: best and last values of metrics, different parameters, and the "
        "first step at which they read different batches.",
        epilog="The best value is the highest, or the lowest if the name contains 'loss'. "
        "--experiment, --run and --metric can be repeated.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--experiment",
        action="append",
        default=[],
        metavar="NAME",
        help="only runs of it (default: all)",
    )
    add(
        "--run", action="append", default=[], metavar="NAME",
        help="name or id of a run; a parent run means its child runs (default: the newest runs)",
    )  # fmt: skip
    add("--max-runs", type=int, default=20, metavar="N", help="number of newest runs (default: 20)")
    add(
        "--metric", action="append", default=[], metavar="NAME",
        help="metric to show (default: val/AP50 and val/AP, if they exist)",
    )  # fmt: skip
    add(
        "--group-by",
        metavar="NAME",
        help="tag or parameter; show mean and standard deviation of each group",
    )
    add("--last", action="store_true", help="use last values instead of the best to group and sort")
    add("--csv", type=Path, metavar="FILE", help="write the table with all different parameters")
    add("--plot", type=Path, metavar="FILE.png", help="plot the metrics over steps")
    return parser


def main(argv: Sequence[str]) -> None:
    """Print a comparison of runs, and write the requested files.

    Raises:
        InputError: a name does not exist, or the store does not respond.
    """
    options = _parser().parse_args(list(argv))
    if options.max_runs < 1:
        raise InputError(f"--max-runs is {options.max_runs}; allowed: 1 or more")
    if options.plot and options.plot.suffix.lower() != ".png":
        raise InputError(f"--plot {str(options.plot)!r}: plots are PNG files; use a name FILE.png")
    uri = store_uri()
    check_store(uri)
    from yolo_lightning.tracking.compare.runs import open_client, read_curve, select_metrics
    from yolo_lightning.tracking.compare.tables import ranking_key

    with open_client(uri) as client:
        runs = _select_runs(client, options)
        metrics = select_metrics(runs, options.metric)
        for run in runs:
            for metric in run.metrics.intersection(metrics):
                run.curves[metric] = read_curve(client, run.run_id, metric)
        if not options.run:  # best first
            runs.sort(key=lambda run: ranking_key(run, metrics[0], options.last))
        if options.group_by:
            _show_groups(runs, metrics, options)
        else:
            _show_runs(client, runs, metrics, options)


def _select_runs(client: Any, options: argparse.Namespace) -> list["TrackedRun"]:
    """Return the selected runs, without those that have no metrics."""
    from yolo_lightning.tracking.compare import runs as tracked_runs

    experiments = tracked_runs.find_experiments(client, options.experiment)
    all_runs = tracked_runs.search_runs(client, experiments)
    if options.run:
        selected = tracked_runs.select_runs(all_runs, options.run)
        runs = [run for run in selected if run.metrics]
        if empty := [run.name for run in selected if not run.metrics]:
            print(f"skipped runs without metrics: {', '.join(empty)}")
    else:
        with_metrics = (run for run in all_runs if run.metrics)
        runs = list(islice(with_metrics, options.max_runs))
        if next(with_metrics, None):
            print(f"the newest {len(runs)} runs; use --max-runs {2 * len(runs)} to show more")
    if not runs:
        where = f" in {', '.join(options.experiment)}" if options.experiment else ""
        raise InputError(f"no run with a metric{where} in {mask_credentials(store_uri())}")
    return runs


def _show_runs(
    client: Any, runs: Sequence["TrackedRun"], metrics: Sequence[str], options: argparse.Namespace
) -> None:
    from yolo_lightning.tracking.compare import tables
    from yolo_lightning.tracking.compare.runs import read_batches

    params, _ = tables.different_params([[run] for run in runs])
    labels, merged = tables.run_labels(runs), tables.merge_equal_params(params)
    as_columns = len(merged) <= tables.MAX_PARAM_COLUMNS
    table = tables.runs_table(runs, metrics, params, merged if as_columns else ())
    print(table.to_text())
    if not as_columns:
        numbers = [str(k + 1) for k in range(len(runs))]
        text = tables.params_text({name: params[name] for name in merged}, numbers)
        print(f"\nparameters that differ, each value with the # of its runs\n{text}")
    _show_merged(merged)
    if len(runs) > 1:
        batches = [read_batches(client, run.run_id) for run in runs]
        print(f"\n{tables.batches_text(batches, labels)}")
    in_label = merged if len(merged) <= _MAX_LABEL_PARAMS else {}
    lines = {}
    for k, (label, run) in enumerate(zip(labels, runs, strict=True)):
        values = [f"{name.split('.')[-1]} {tables.shorten(params[name][k])}" for name in in_label]
        lines["  ".join([str(k + 1), label, *values])] = [run]
    _write(table, lines, metrics, options)


def _show_merged(merged: Mapping[str, Sequence[str]]) -> None:
    lines = [
        f"changes together with {name}: {', '.join(others)}"
        for name, others in merged.items()
        if others
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
        groups.setdefault(run.get(key) or "-", []).append(run)
    if list(groups) == ["-"]:
        names = {name for run in runs for name in (*run.params, *run.tags)}
        hint = nearest(key, sorted(names)) or "examples: recipe, experiment, model.learning_rate"
        raise InputError(f"--group-by {key!r}: no run has a tag or parameter of this name; {hint}")
    table = tables.groups_table(groups, key, metrics, options.last)
    print(f"{'last' if options.last else 'best'} values of {len(runs)} runs\n{table.to_text()}")
    between, within = tables.different_params(list(groups.values()))
    merged = tables.merge_equal_params(between, key)
    shown = {name: between[name] for name in merged if name != key}
    if shown:
        text = tables.params_text(shown, list(groups))
        print(f"\nparameters that differ between groups\n{text}")
    _show_merged(merged)
    if within:
        print(f"\nparameters that differ within a group: {', '.join(within)}")
    lines = {
        f"{key} {name}, {len(members)} run{'s' if len(members) > 1 else ''}": members
        for name, members in groups.items()
    }
    _write(table, lines, metrics, options)


def _write(
    table: "Table",
    lines: Mapping[str, Sequence["TrackedRun"]],
    metrics: Sequence[str],
    options: argparse.Namespace,
) -> None:
    """Write the requested files: the table, and a plot with one line per label."""
    if options.csv:
        table.write_csv(options.csv)
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
