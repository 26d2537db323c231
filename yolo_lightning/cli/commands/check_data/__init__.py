"""`yolo-lightning check-data`: read everything, report, and say whether training would start."""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.cli.commands.anchors import is_recipe
from yolo_lightning.cli.commands.check_data.page import Part, page
from yolo_lightning.datamodules.autodetect import detection_source, held_out, label_source
from yolo_lightning.datamodules.combined import CombinedDataModule
from yolo_lightning.datamodules.inspection import Report, inspect, parts_of, same_files
from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource
from yolo_lightning.errors import InputError
from yolo_lightning.visualization.drawing import batch_picture, save
from yolo_lightning.visualization.figures import LabelsPicture, save_labels

_PARTS = ("detection", "classification", "validation", "test")
_SHOWN, _CLASSES, _DRAWN = 10, 20, 12


def datamodule_of(place: str, overrides: Sequence[str]) -> tuple[CombinedDataModule, Any]:
    """Return the data of a recipe and the recipe's values, or a dataset as such data, and None.

    Raises:
        InputError: nothing there, or nothing that is recognised.
    """
    if is_recipe(place):
        from yolo_lightning.cli.data import DataCLI

        run = DataCLI([place, *overrides])
        return run.datamodule, run.recipe
    if overrides:
        raise InputError(f"{overrides[0]}: {place!r} is no recipe and has no such option")
    parts: dict[str, Any] = {}
    try:
        source: Any = detection_source(place)
        parts = {"detection": source, **held_out(place, source)}
    except InputError as error:
        try:
            source = label_source(place)
        except InputError as other:
            raise InputError(f"{error}; {other}") from None
        parts["classification"] = source
    names = {n for part in parts.values() for n, count in part.name_counts().items() if count}
    return CombinedDataModule(tree=sorted(names) or ["nothing"], **parts), None


def inspected(data: CombinedDataModule) -> list[tuple[str, Report]]:
    """Return what each source of each part of a recipe holds."""
    reports: list[tuple[str, Report]] = []
    seen: set[int] = set()
    for part in _PARTS:
        whole: DetectionSource | ImageLabelSource | None = getattr(data, part)
        if whole is None or id(whole) in seen:
            continue
        seen.add(id(whole))
        reports += [(part, inspect(source, data.tree)) for source in parts_of(whole)]
    return reports


def problems_of(
    data: CombinedDataModule, reports: Sequence[tuple[str, Report]], recipe: Any = None
) -> list[str]:
    """Return why training would not start; what only `test` reads does not matter for it."""
    needed = [(name, report) for name, report in reports if name != "test"]
    found = [report.problem for _, report in needed if report.problem is not None]
    for part in ("detection", "classification"):
        unreadable = [len(report.unreadable) for name, report in reports if name == part]
        images = [report.images for name, report in reports if name == part]
        if (
            sum(images)
            and sum(unreadable) == sum(images)
            and not any(report.generated for name, report in reports if name == part)
        ):
            found.append(f"data.{part}: not one of {sum(images)} images can be decoded")
    if not found:
        try:
            data.setup("fit")
        except InputError as error:
            found.append(str(error))
    weights = recipe.model.init_args.get("pretrained") if recipe is not None else None
    if weights and not Path(weights).expanduser().is_file():
        found.append(f"model.pretrained {weights!r} not found (working folder: {Path.cwd()})")
    return list(dict.fromkeys(found))


def table(reports: Sequence[tuple[str, Report]], twins: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Return the reports as text."""
    lines = []
    for part, report in reports:
        plain = report.to_plain()
        objects = sum(report.classes.values())
        what = f", {objects} boxes" if report.kind == "boxes" else ""
        lines.append(f"{part}: {report.name}: {report.images} images{what}")
        if report.problem is not None:
            lines.append(f"  {report.problem}")
        if report.generated:
            lines.append("  drawn when they are read; nothing to check in files")
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
        shown = ", ".join(f"{name} {count}" for name, count in ranked[:_CLASSES])
        more = f", … {len(ranked)} in all" if len(ranked) > _CLASSES else ""
        lines.append(f"  {'classes':<18}{shown}{more}")
        for kind, count in report.fault_kinds().most_common():
            lines.append(f"  {count:>6}  {kind}")
        if report.unreadable:
            lines.append(f"  {len(report.unreadable):>6}  images that cannot be decoded")
        for fault in [*report.unreadable, *report.faults][:_SHOWN]:
            lines.append(f"          {fault}")
    if twins:
        across = sum(len({part for part, _ in group}) > 1 for group in twins)
        lines.append(f"{len(twins)} images there more than once, {across} of them in several parts")
        for group in twins[:_SHOWN]:
            same = " = ".join(f"{path} ({part})" for part, path in group[:_SHOWN])
            more = f" = … {len(group)} in all" if len(group) > _SHOWN else ""
            lines.append(f"  {same}{more}")
    return "\n".join(lines)


def _pictures(data: CombinedDataModule, folder: Path) -> list[tuple[str, Path]]:
    """Draw the first augmented batch of each kind."""
    found = []
    order, kinds = data.order, dict[str, int]()
    for step in range(order.ratio.numerator + order.ratio.denominator):  # one round of both
        kinds.setdefault(order.plan(step).kind, step)
    for kind, step in sorted(kinds.items(), reverse=True):
        file = folder / f"{kind}-batch.jpg"
        save(file, batch_picture(data.batch(step), data.tree.names, _DRAWN))
        found.append((f"{kind}, step {step}, as augmented", file))
    return found


def _plots(reports: Sequence[tuple[str, Report]], folder: Path) -> dict[int, Path]:
    """Draw the labels of each source, by its place among the reports."""
    found: dict[int, Path] = {}
    for number, (part, report) in enumerate(reports):
        if report.generated or not report.images:
            continue
        file = folder / f"labels-{number}-{part}.png"
        relative = report.boxes_wh_px / report.boxes_of_wh_px.clip(min=1)
        save_labels(
            LabelsPicture(
                dict(report.classes),
                np.asarray(relative).clip(0, 1),
                report.centres_norm,
                report.objects_per_image,
                report.sizes_wh_px,
            ),
            file,
        )
        found[number] = file
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning check-data",
        description="Read all images and annotations, and report what is in them.",
        epilog="Any other option, after the recipe, overrides its values. The exit code says "
        "whether training would start: 0, or 2.",
        allow_abbrev=False,
    )
    parser.add_argument("place", help="RECIPE.yaml, or a dataset in a usual layout")
    parser.add_argument("--output", help="folder of page and figures (outputs/check-data/NAME)")
    return parser


def main(argv: Sequence[str]) -> None:
    """Print the report, write it as JSON and as a page.

    Raises:
        InputError: training would not start; names every reason, after all was reported.
    """
    options, overrides = _parser().parse_known_args(list(argv))
    data, recipe = datamodule_of(options.place, overrides)
    reports = inspected(data)
    twins = same_files(reports)
    print(table(reports, twins))
    problems = problems_of(data, reports, recipe)
    vocabulary = data.vocabulary_report() if recipe is not None and not problems else ""
    if vocabulary:
        print(vocabulary)
    name = Path(options.place).resolve().stem
    folder = Path(options.output or f"outputs/check-data/{name}")
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        "place": options.place,
        "starts": not problems,
        "problems": problems,
        "sources": [{"part": part, **report.to_plain()} for part, report in reports],
        "classes": data.vocabulary_table() if vocabulary else [],
        "same_files": [[list(pair) for pair in group] for group in twins],
    }
    _write(folder / "report.json", json.dumps(plain, indent=2, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        plots = _plots(reports, Path(scratch))
        pictures = _pictures(data, Path(scratch)) if not problems else []
        parts = [
            Part(part, report, plots.get(number)) for number, (part, report) in enumerate(reports)
        ]
        text = page(options.place, parts, twins, problems, vocabulary, pictures)
    _write(folder / "index.html", text)
    print(f"page: {folder / 'index.html'}   figures: {folder / 'report.json'}")
    if problems:
        raise InputError("training would not start:\n  " + "\n  ".join(problems))


def _write(file: Path, text: str) -> None:
    fresh = file.with_name(file.name + ".fresh")
    fresh.write_text(text, encoding="utf-8", errors="replace")
    os.replace(fresh, file)
