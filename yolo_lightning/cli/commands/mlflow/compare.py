"""`yolo-lightning mlflow compare`: compare runs in the terminal."""

import argparse
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from yolo_lightning.cli.commands.mlflow import check_store
from yolo_lightning.errors import InputError, csv_cell, mask_secrets
from yolo_lightning.tracking.names import own_store


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
    repeated: dict[str, Any] = {"action": "append", "default": [], "metavar": "NAME"}
    text = "name or id of a run; a parent run means its child runs (default: the newest runs)"
    add("--experiment", help="only runs of it (default: all)", **repeated)
    add("--run", help=text, **repeated)
    add("--max-runs", type=int, default=20, metavar="N", help="number of newest runs (default: 20)")
    text = "metric to show (default: val/AP50 and val/AP, if they exist)"
    add("--metric", help=text, **repeated)
    text = "tag or parameter; show mean and standard deviation of each group"
    add("--group-by", metavar="NAME", help=text)
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
    uri = own_store()
    check_store(uri)
    from yolo_lightning.tracking import compare

    with compare.open_client(uri) as client:
        runs = _select_runs(compare.search_runs(client, options.experiment), options)
        metrics = compare.select_metrics(runs, options.metric)
        curves = {metric: compare.read_curves(client, runs, metric) for metric in metrics}
        table = compare.runs_table(runs, curves)
        if not options.run:
            table = table.loc[compare.ranking(table, metrics[0], options.last).index]
        table.insert(0, "#", range(1, len(table) + 1))
        if options.group_by:
            table, labels = _show_groups(runs, table, metrics, options)
        else:
            table, labels = _show_runs(client, runs, table)
    if options.csv:
        try:
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            table.map(csv_cell).rename(columns=csv_cell).to_csv(options.csv, index=False)
        except OSError as error:
            raise InputError(f"--csv {str(options.csv)!r}: {error.strerror or error}") from None
        print(f"table: {options.csv}")
    if options.plot:
        from yolo_lightning.visualization.metric_curves import save_curves

        save_curves(curves, labels, options.plot)
        print(f"curves: {options.plot}")


def _select_runs(all_runs: Any, options: argparse.Namespace) -> list[Any]:
    """Return the named runs, or the newest ones that have metrics."""
    from yolo_lightning.tracking.compare import select_runs

    if options.run:
        runs = select_runs(list(all_runs), options.run)
    else:
        with_metrics = (run for run in all_runs if run.data.metrics)
        runs = list(islice(with_metrics, options.max_runs))
        if next(with_metrics, None):
            print(f"the newest {len(runs)} runs; use --max-runs {2 * len(runs)} to show more")
    if not any(run.data.metrics for run in runs):
        where = f" in {', '.join(options.experiment)}" if options.experiment else ""
        raise InputError(f"no run with a metric{where} in {mask_secrets(own_store())}")
    return runs


def _show_runs(client: Any, runs: Sequence[Any], table: Any) -> tuple[Any, Any]:
    """Print a row per run; return the table with all different parameters, and plot labels."""
    import pandas as pd

    from yolo_lightning.tracking import compare

    params, _ = compare.different_params(runs, table["id"])
    merged = compare.merge_equal_params(params)
    names, numbers = list(merged), table["#"].astype(str)
    labels = numbers + "  " + table["run"]
    shown = table.drop(columns="id")
    if table["experiment"].nunique() == 1:
        shown = shown.drop(columns="experiment")
    if len(names) <= compare.MAX_PARAM_COLUMNS:
        print(compare.to_text(pd.concat([shown, params[names]], axis=1)))
        for name in names:
            labels += f"  {name.split('.')[-1]} " + params[name].map(compare.shorten)
    else:
        print(compare.to_text(shown))
        print("\nparameters that differ, each value with the # of its runs")
        print(compare.params_text(params[names].set_axis(numbers)))
    _print_merged(merged)
    if len(runs) > 1:
        batches = {number: compare.read_batches(client, key) for key, number in numbers.items()}
        print(f"\n{compare.batches_text(batches)}")
    return pd.concat([table, params], axis=1), labels


def _show_groups(
    runs: Sequence[Any], table: Any, metrics: Sequence[str], options: argparse.Namespace
) -> tuple[Any, Any]:
    """Print a row per metric and group; return this table, and plot labels."""
    from yolo_lightning.tracking import compare

    key = options.group_by
    groups = compare.group_names(runs, key).loc[table.index]
    summary = compare.groups_table(table, groups, metrics, options.last)
    print(f"{'last' if options.last else 'best'} values of {len(runs)} runs")
    print(compare.to_text(summary))
    params, within = compare.different_params(runs, groups)
    merged = compare.merge_equal_params(params, key)
    names = [name for name in merged if name != key]
    if names:
        print(f"\nparameters that differ between groups\n{compare.params_text(params[names])}")
    _print_merged(merged)
    if within:
        print(f"\nparameters that differ within a group: {', '.join(within)}")
    counts = groups.map(groups.value_counts()).astype(str)
    return summary, f"{key} " + groups + ", runs: " + counts


def _print_merged(merged: Mapping[str, Sequence[str]]) -> None:
    together = {name: others for name, others in merged.items() if others}
    if together:
        print()
    for name, others in together.items():
        print(f"changes together with {name}: {', '.join(others)}")
