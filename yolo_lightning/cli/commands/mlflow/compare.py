"""`yolo-lightning mlflow compare`: compare runs in the terminal."""

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from yolo_lightning.cli.commands.mlflow import check_store, store_uri
from yolo_lightning.errors import InputError

_MAX_LABEL_PARAMS = 2
_OPTIONS = {
    "--experiment": "only runs of it (default: all)",
    "--run": "name or id of a run; a parent run means its child runs (default: the newest runs)",
    "--metric": "metric to show (default: val/AP50 and val/AP, if they exist)",
}


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
    for name, text in _OPTIONS.items():
        add(name, action="append", default=[], metavar="NAME", help=text)
    add("--max-runs", type=int, default=20, metavar="N", help="number of newest runs (default: 20)")
    text = "tag or parameter; show mean and standard deviation of each group"
    add("--group-by", default="", metavar="NAME", help=text)
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
    from yolo_lightning.tracking import compare

    with compare.open_client(uri) as client:
        experiments, all_runs = compare.find_runs(client, options.experiment)
        runs = _select_runs(all_runs, options)
        metrics = compare.select_metrics(runs, options.metric)
        curves = {metric: compare.read_curves(client, runs, metric) for metric in metrics}
        table = compare.runs_table(runs, experiments, curves)
        if not options.run:  # best first
            ranking = compare.ranking_values(table, metrics[0], options.last)
            order = ranking.sort_values(ascending="loss" in metrics[0], kind="stable").index
            table = table.loc[order]
        table.insert(0, "#", range(1, len(table) + 1))
        table, lines = _show(client, runs, table, metrics, options)
    if options.csv:
        try:
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(options.csv, index=False)
        except OSError as error:
            raise InputError(f"--csv {str(options.csv)!r}: {error.strerror or error}") from None
        print(f"table: {options.csv}")
    if options.plot:
        panels = {
            metric: {label: [by_run[k] for k in ids if k in by_run] for label, ids in lines.items()}
            for metric, by_run in curves.items()
        }
        compare.save_curves(panels, options.plot)
        print(f"curves: {options.plot}")


def _select_runs(all_runs: Iterator[Any], options: argparse.Namespace) -> list[Any]:
    """Return the selected runs, without those that have no metrics."""
    from yolo_lightning.tracking import compare
    from yolo_lightning.tracking.names import mask_credentials

    if options.run:
        selected = compare.select_runs(list(all_runs), options.run)
        runs = [run for run in selected if run.data.metrics]
        if empty := [str(run.info.run_name) for run in selected if not run.data.metrics]:
            print(f"skipped runs without metrics: {', '.join(empty)}")
    else:
        with_metrics = (run for run in all_runs if run.data.metrics)
        runs = list(islice(with_metrics, options.max_runs))
        if next(with_metrics, None):
            print(f"the newest {len(runs)} runs; use --max-runs {2 * len(runs)} to show more")
    if not runs:
        where = f" in {', '.join(options.experiment)}" if options.experiment else ""
        raise InputError(f"no run with a metric{where} in {mask_credentials(store_uri())}")
    return runs


def _show(
    client: Any, runs: Sequence[Any], table: Any, metrics: list[str], options: argparse.Namespace
) -> tuple[Any, dict[str, list[str]]]:
    """Print the tables of runs or groups; return the full table, and run ids by label."""
    import pandas as pd

    from yolo_lightning.tracking import compare

    key = options.group_by
    groups = compare.group_names(runs, table, key) if key else table["#"].astype(str)
    params, within = compare.different_params(runs, groups)
    merged = compare.merge_equal_params(params, key)
    names = [name for name in merged if name != key]
    as_columns = not key and len(names) <= compare.MAX_PARAM_COLUMNS
    if key:
        full = shown = compare.groups_table(table, groups, metrics, options.last)
        print(f"{'last' if options.last else 'best'} values of {len(runs)} runs")
    else:
        columns = params.set_axis(table.index)
        hidden = ["id", "experiment"] if table["experiment"].nunique() == 1 else ["id"]
        full = pd.concat([table, columns], axis=1)
        shown = table.drop(columns=hidden)
        shown = pd.concat([shown, columns[names]], axis=1) if as_columns else shown
    print(compare.to_text(shown))
    if names and not as_columns:
        which = " between groups" if key else ", each value with the # of its runs"
        print(f"\nparameters that differ{which}\n{compare.params_text(params[names])}")
    if together := [f"changes together with {k}: {', '.join(v)}" for k, v in merged.items() if v]:
        print("\n" + "\n".join(together))
    if within:
        print(f"\nparameters that differ within a group: {', '.join(within)}")
    if not key and len(runs) > 1:
        batches = [compare.read_batches(client, run_id) for run_id in table.index]
        print(f"\n{compare.batches_text(batches, list(table['run']))}")
    lines = {}
    for name, ids in groups.groupby(groups, sort=False).groups.items():
        label = f"{key} {name}, {len(ids)} run{'s' if len(ids) > 1 else ''}"
        if not key:
            in_label = params.loc[name, names if len(names) <= _MAX_LABEL_PARAMS else []]
            values = [f"{k.split('.')[-1]} {compare.shorten(v)}" for k, v in in_label.items()]
            label = "  ".join([name, table["run"][ids[0]], *values])
        lines[label] = list(ids)
    return full, lines
