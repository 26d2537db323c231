"""`yolo-lightning check-data`: read all data, report on it, and check that training starts."""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.cli.commands.anchors import is_recipe
from yolo_lightning.errors import InputError, expand, not_found, printable, write_atomically

if TYPE_CHECKING:
    from yolo_lightning.cli.commands.check_data.report import PartReport
    from yolo_lightning.datamodules.combined import CombinedDataModule
    from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource

_PARTS = ("detection", "classification", "validation", "test")
_MAX_DRAWN = 12  # images of a batch


def load_datamodule(
    source: str, overrides: Sequence[str], allow_outside: bool = False
) -> "tuple[CombinedDataModule, Any]":
    """Return the datamodule of a recipe and its values, or one of a dataset, and None.

    Raises:
        InputError: `source` is missing, or not a known format.
    """
    from yolo_lightning.datamodules.autodetect import detection_source, held_out, label_source
    from yolo_lightning.datamodules.combined import CombinedDataModule

    if is_recipe(source):
        from yolo_lightning.cli.data import DataCLI

        cli = DataCLI([source, *overrides])
        return cli.datamodule, cli.recipe
    if overrides:
        raise InputError(f"{overrides[0]}: {source!r} is no recipe, so it has no such option")
    parts: dict[str, Any] = {}
    try:
        dataset: Any = detection_source(source, allow_outside=allow_outside)
    except InputError as error:
        try:
            dataset = label_source(source, allow_outside)
        except InputError as other_error:
            raise InputError(f"{error}\n  {other_error}") from None
        parts["classification"] = dataset
    else:
        parts = {"detection": dataset, **held_out(source, dataset)}
    names = {n for part in parts.values() for n, count in part.name_counts().items() if count}
    return CombinedDataModule(tree=sorted(names) or ["no class"], **parts), None


def inspect_parts(data: "CombinedDataModule") -> "list[PartReport]":
    """Inspect each source of each part of the data."""
    from yolo_lightning.datamodules.inspection import inspect
    from yolo_lightning.datamodules.source import ConcatSource

    reports: list[PartReport] = []
    inspected: set[int] = set()
    for part in _PARTS:
        whole: DetectionSource | ImageLabelSource | None = getattr(data, part)
        if whole is not None and id(whole) not in inspected:
            inspected.add(id(whole))
            sources = whole.sources if isinstance(whole, ConcatSource) else [whole]
            reports += [(part, inspect(source, data.tree)) for source in sources]
    return reports


def find_problems(
    data: "CombinedDataModule", reports: "Sequence[PartReport]", recipe: Any = None
) -> list[str]:
    """Return the reasons why training would not start; the test data is not needed."""
    needed = [(name, report) for name, report in reports if name != "test"]
    problems = [report.problem for _, report in needed if report.problem is not None]
    for part in ("detection", "classification"):
        own = [report for name, report in reports if name == part]
        images = sum(report.images for report in own)
        if images and images == sum(len(report.unreadable) for report in own):
            problems.append(f"data.{part}: none of {images} images can be decoded")
    if not problems:
        try:
            data.setup("fit")
        except InputError as error:
            problems.append(str(error))
    weights = recipe.model.init_args.get("pretrained") if recipe is not None else None
    if weights and not expand(weights).is_file():
        problems.append(str(not_found(weights, "model.pretrained")))
    return list(dict.fromkeys(problems))


def _draw_batches(data: "CombinedDataModule", folder: Path) -> list[tuple[str, Path]]:
    """Draw the first augmented batch of each kind; return titles and files."""
    from yolo_lightning.visualization.drawing import draw_batch, save_image

    images = []
    order, kinds = data.order, dict[str, int]()
    for step in range(order.ratio.numerator + order.ratio.denominator):  # one period of both
        kinds.setdefault(order.plan(step).kind, step)
    for kind, step in sorted(kinds.items(), reverse=True):
        file = folder / f"{kind}-batch.jpg"
        save_image(file, draw_batch(data.batch(step), data.tree.names, _MAX_DRAWN))
        images.append((f"{kind}, step {step}, augmented", file))
    return images


def _plot_labels(reports: "Sequence[PartReport]", folder: Path) -> dict[int, Path]:
    """Plot the labels of each source; return files by index of the report."""
    import numpy as np

    from yolo_lightning.visualization.figures import LabelPlot, save_label_plot

    plots: dict[int, Path] = {}
    for number, (part, report) in enumerate(reports):
        if report.generated or not report.images:
            continue
        file = folder / f"labels-{number}-{part}.png"
        relative = report.boxes_wh_px / report.boxes_of_wh_px.clip(min=1)
        save_label_plot(
            LabelPlot(
                dict(report.classes),
                np.asarray(relative).clip(0, 1),
                report.boxes_wh_px,
                report.centres_norm,
                report.objects_per_image,
                report.sizes_wh_px,
            ),
            file,
        )
        plots[number] = file
    return plots


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning check-data",
        description="Read all images and annotations, and report on them.",
        epilog="Other options, after the recipe, override its values. The exit code is 0 if "
        "training would start, else 2.",
        allow_abbrev=False,
    )
    parser.add_argument("source", help="RECIPE.yaml, or a dataset in a known format")
    parser.add_argument("--output", help="folder for the report (outputs/check-data/NAME)")
    parser.add_argument(
        "--allow-outside", action="store_true", help="let the dataset name files outside its folder"
    )
    return parser


def main(argv: Sequence[str]) -> None:
    """Print the report, and write it as JSON and HTML.

    Raises:
        InputError: training would not start; names all reasons, after the report.
    """
    options, overrides = _parser().parse_known_args(list(argv))
    from yolo_lightning.cli.commands.check_data.report import format_reports, render_page
    from yolo_lightning.datamodules.inspection import same_files

    data, recipe = load_datamodule(options.source, overrides, options.allow_outside)
    reports = inspect_parts(data)
    duplicates = same_files(reports)
    print(printable(format_reports(reports, duplicates)))
    problems = find_problems(data, reports, recipe)
    vocabulary = data.vocabulary_report() if recipe is not None and not problems else ""
    if vocabulary:
        print(printable(vocabulary))
    name = Path(options.source).resolve().stem
    folder = Path(options.output or f"outputs/check-data/{name}")
    plain = {
        "source": options.source,
        "starts": not problems,
        "problems": problems,
        "sources": [{"part": part, **report.to_plain()} for part, report in reports],
        "classes": data.vocabulary_table() if vocabulary else [],
        "same_files": [[list(pair) for pair in group] for group in duplicates],
    }
    report = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
    write_atomically(folder / "report.json", report.encode(errors="replace"))
    with tempfile.TemporaryDirectory() as scratch:
        plots = _plot_labels(reports, Path(scratch))
        images = _draw_batches(data, Path(scratch)) if not problems else []
        text = render_page(options.source, reports, plots, duplicates, problems, vocabulary, images)
    write_atomically(folder / "index.html", text.encode(errors="replace"))
    print(f"page: {folder / 'index.html'}   report: {folder / 'report.json'}")
    if problems:
        raise InputError("training would not start:\n  " + "\n  ".join(problems))
