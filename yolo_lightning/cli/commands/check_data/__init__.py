"""`yolo-lightning check-data`: read all data, report on it, and check that training starts."""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.cli.commands.anchors import is_recipe
from yolo_lightning.cli.commands.check_data.page import Part, render_page
from yolo_lightning.datamodules.autodetect import detection_source, held_out, label_source
from yolo_lightning.datamodules.combined import CombinedDataModule
from yolo_lightning.datamodules.inspection import Report, inspect, parts_of, same_files
from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource
from yolo_lightning.errors import InputError
from yolo_lightning.visualization.drawing import draw_batch, save_image
from yolo_lightning.visualization.figures import LabelPlot, save_label_plot

_PARTS = ("detection", "classification", "validation", "test")
_MAX_LISTED, _MAX_CLASSES, _MAX_DRAWN = 10, 20, 12


def load_datamodule(source: str, overrides: Sequence[str]) -> tuple[CombinedDataModule, Any]:
    """Return the datamodule of a recipe and its values, or one of a dataset, and None.

    Raises:
        InputError: `source` is missing, or not a known format.
    """
    if is_recipe(source):
        from yolo_lightning.cli.data import DataCLI

        cli = DataCLI([source, *overrides])
        return cli.datamodule, cli.recipe
    if overrides:
        raise InputError(f"{overrides[0]}: {source!r} is no recipe, so it has no such option")
    parts: dict[str, Any] = {}
    try:
        dataset: Any = detection_source(source)
        parts = {"detection": dataset, **held_out(source, dataset)}
    except InputError as error:
        try:
            dataset = label_source(source)
        except InputError as other_error:
            raise InputError(f"{error}; {other_error}") from None
        parts["classification"] = dataset
    names = {n for part in parts.values() for n, count in part.name_counts().items() if count}
    return CombinedDataModule(tree=sorted(names) or ["no class"], **parts), None


def inspect_parts(data: CombinedDataModule) -> list[tuple[str, Report]]:
    """Inspect each source of each part of the data."""
    reports: list[tuple[str, Report]] = []
    inspected: set[int] = set()
    for part in _PARTS:
        part_source: DetectionSource | ImageLabelSource | None = getattr(data, part)
        if part_source is None or id(part_source) in inspected:
            continue
        inspected.add(id(part_source))
        reports += [(part, inspect(source, data.tree)) for source in parts_of(part_source)]
    return reports


def find_problems(
    data: CombinedDataModule, reports: Sequence[tuple[str, Report]], recipe: Any = None
) -> list[str]:
    """Return the reasons why training would not start; the test data is not needed."""
    needed = [(name, report) for name, report in reports if name != "test"]
    problems = [report.problem for _, report in needed if report.problem is not None]
    for part in ("detection", "classification"):
        unreadable = [len(report.unreadable) for name, report in reports if name == part]
        images = [report.images for name, report in reports if name == part]
        if (
            sum(images)
            and sum(unreadable) == sum(images)
            and not any(report.generated for name, report in reports if name == part)
        ):
            problems.append(f"data.{part}: none of {sum(images)} images can be decoded")
    if not problems:
        try:
            data.setup("fit")
        except InputError as error:
            problems.append(str(error))
    weights = recipe.model.init_args.get("pretrained") if recipe is not None else None
    if weights and not Path(weights).expanduser().is_file():
        problems.append(f"model.pretrained {weights!r} not found (working folder: {Path.cwd()})")
    return list(dict.fromkeys(problems))


def format_reports(
    reports: Sequence[tuple[str, Report]], duplicates: Sequence[Sequence[tuple[str, str]]]
) -> str:
    """Return the reports as text."""
    lines = []
    for part, report in reports:
        plain = report.to_plain()
        objects = sum(report.classes.values())
        boxes = f", {objects} boxes" if report.kind == "boxes" else ""
        lines.append(f"{part}: {report.name}: {report.images} images{boxes}")
        if report.problem is not None:
            lines.append(f"  {report.problem}")
        if report.generated:
            lines.append("  generated images; there are no files to check")
        for title, key, unit in (
            ("image width", "image_width_px", " px"), ("image height", "image_height_px", " px"),
            ("box side", "box_side_px", " px"), ("relative", "box_side_relative", ""),
            ("longer : shorter", "box_longer_to_shorter_side", ""),
            ("objects an image", "objects_per_image", ""),
        ):  # fmt: skip
            if plain[key]:
                values = "  ".join(f"{name} {value:g}" for name, value in plain[key].items())
                lines.append(f"  {title:<18}{values}{unit}")
        ranked = report.classes.most_common()
        shown = ", ".join(f"{name} {count}" for name, count in ranked[:_MAX_CLASSES])
        more = f", … {len(ranked)} in total" if len(ranked) > _MAX_CLASSES else ""
        lines.append(f"  {'classes':<18}{shown}{more}")
        for kind, count in report.fault_kinds().most_common():
            lines.append(f"  {count:>6}  {kind}")
        if report.unreadable:
            lines.append(f"  {len(report.unreadable):>6}  images that cannot be decoded")
        for fault in [*report.unreadable, *report.faults][:_MAX_LISTED]:
            lines.append(f"          {fault}")
    if duplicates:
        across = sum(len({part for part, _ in group}) > 1 for group in duplicates)
        lines.append(f"{len(duplicates)} duplicate images, {across} of them in several parts")
        for group in duplicates[:_MAX_LISTED]:
            paths = " = ".join(f"{path} ({part})" for part, path in group[:_MAX_LISTED])
            more = f" = … {len(group)} in total" if len(group) > _MAX_LISTED else ""
            lines.append(f"  {paths}{more}")
    return "\n".join(lines)


def _draw_batches(data: CombinedDataModule, folder: Path) -> list[tuple[str, Path]]:
    """Draw the first augmented batch of each kind; return titles and files."""
    images = []
    order, kinds = data.order, dict[str, int]()
    for step in range(order.ratio.numerator + order.ratio.denominator):  # one period of both
        kinds.setdefault(order.plan(step).kind, step)
    for kind, step in sorted(kinds.items(), reverse=True):
        file = folder / f"{kind}-batch.jpg"
        save_image(file, draw_batch(data.batch(step), data.tree.names, _MAX_DRAWN))
        images.append((f"{kind}, step {step}, augmented", file))
    return images


def _plot_labels(reports: Sequence[tuple[str, Report]], folder: Path) -> dict[int, Path]:
    """Plot the labels of each source; return files by index of the report."""
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
    return parser


def main(argv: Sequence[str]) -> None:
    """Print the report, and write it as JSON and HTML.

    Raises:
        InputError: training would not start; names all reasons, after the report.
    """
    options, overrides = _parser().parse_known_args(list(argv))
    data, recipe = load_datamodule(options.source, overrides)
    reports = inspect_parts(data)
    duplicates = same_files(reports)
    print(format_reports(reports, duplicates))
    problems = find_problems(data, reports, recipe)
    vocabulary = data.vocabulary_report() if recipe is not None and not problems else ""
    if vocabulary:
        print(vocabulary)
    name = Path(options.source).resolve().stem
    folder = Path(options.output or f"outputs/check-data/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "source": options.source,
        "starts": not problems,
        "problems": problems,
        "sources": [{"part": part, **report.to_plain()} for part, report in reports],
        "classes": data.vocabulary_table() if vocabulary else [],
        "same_files": [[list(pair) for pair in group] for group in duplicates],
    }
    _write(folder / "report.json", json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        plots = _plot_labels(reports, Path(scratch))
        images = _draw_batches(data, Path(scratch)) if not problems else []
        parts = [
            Part(part, report, plots.get(number)) for number, (part, report) in enumerate(reports)
        ]
        text = render_page(options.source, parts, duplicates, problems, vocabulary, images)
    _write(folder / "index.html", text)
    print(f"page: {folder / 'index.html'}   report: {folder / 'report.json'}")
    if problems:
        raise InputError("training would not start:\n  " + "\n  ".join(problems))


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(text, encoding="utf-8", errors="replace")
    os.replace(temporary, file)
