"""The reports of `check-data` as text, and as an HTML page with embedded images."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yolo_lightning.datamodules.inspection import Report

PartReport = tuple[str, Report]  # part of the recipe, such as detection, and one source of it

_STATISTICS = {
    "image width": ("image_width_px", " px"),
    "image height": ("image_height_px", " px"),
    "box side": ("box_side_px", " px"),
    "relative box side": ("box_side_relative", ""),
    "longer : shorter side": ("box_longer_to_shorter_side", ""),
    "objects in an image": ("objects_per_image", ""),
    "boxes by area": ("boxes_by_area", ""),
}
"""Heading to key of `Report.to_plain` and unit."""
_MAX_LISTED, _MAX_CLASSES, _MAX_LISTED_ON_PAGE = 10, 20, 200

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .4em }
img { max-width: 100%; border: 1px solid #ddd }
table { border-collapse: collapse } td, th { padding: .15em .9em .15em 0; text-align: left;
  vertical-align: top; font-variant-numeric: tabular-nums }
th { font-weight: 600; color: #555 } pre { white-space: pre-wrap }
.good { color: #17753a } .bad { color: #b3261e } details { margin: .4em 0 }
"""


def format_reports(
    reports: Sequence[PartReport], duplicates: Sequence[Sequence[tuple[str, str]]]
) -> str:
    """Return the reports as text."""
    lines = []
    for part, report in reports:
        boxes = f", {sum(report.classes.values())} boxes" if report.kind == "boxes" else ""
        lines.append(f"{part}: {report.name}: {report.images} images{boxes}")
        if report.problem is not None:
            lines.append(f"  {report.problem}")
        if report.generated:
            lines.append("  generated images; there are no files to check")
        lines += [f"  {title:<23}{text}" for title, text in _statistics(report).items()]
        ranked = report.classes.most_common()
        shown = ", ".join(f"{name} {count}" for name, count in ranked[:_MAX_CLASSES])
        more = f", … {len(ranked)} in total" if len(ranked) > _MAX_CLASSES else ""
        lines.append(f"  {'classes':<23}{shown}{more}")
        lines += [f"  {count:>6}  {kind}" for kind, count in _fault_counts(report).items()]
        faults = [*report.unreadable, *report.faults]
        lines += [f"          {fault}" for fault in faults[:_MAX_LISTED]]
    if duplicates:
        across = sum(len({part for part, _ in group}) > 1 for group in duplicates)
        lines.append(f"{len(duplicates)} duplicate images, {across} of them in several parts")
        for group in duplicates[:_MAX_LISTED]:
            more = f" = … {len(group)} in total" if len(group) > _MAX_LISTED else ""
            lines.append(f"  {_format_group(group[:_MAX_LISTED])}{more}")
    return "\n".join(lines)


def _statistics(report: Report) -> dict[str, str]:
    """Return the statistics that a source has, as text by heading."""
    plain: dict[str, Any] = report.to_plain()
    return {
        title: "  ".join(f"{name}: {value:g}" for name, value in plain[key].items()) + unit
        for title, (key, unit) in _STATISTICS.items()
        if any(plain[key].values())
    }


def _fault_counts(report: Report) -> dict[str, int]:
    counts = dict(report.fault_kinds().most_common())
    return counts | (
        {"images that cannot be decoded": len(report.unreadable)} if report.unreadable else {}
    )


def _format_group(group: Sequence[tuple[str, str]]) -> str:
    return " = ".join(f"{path} ({part})" for part, path in group)


def render_page(
    title: str,
    reports: Sequence[PartReport],
    plots: Mapping[int, Path],
    duplicates: Sequence[Sequence[tuple[str, str]]],
    problems: Sequence[str],
    vocabulary: str,
    images: Sequence[tuple[str, Path]],
) -> str:
    """Return the page as HTML.

    `plots` are files by index of the report; `images` are titles and files of augmented batches.
    """
    result = (
        '<p class="bad">Training would not start:</p>' + _list(problems)
        if problems
        else '<p class="good">Training would start.</p>'
    )
    sections = [f"<h1>{html.escape(title)}</h1>", result]
    if vocabulary:
        sections.append(f"<pre>{html.escape(vocabulary)}</pre>")
    for number, (part, report) in enumerate(reports):
        sections += _section(part, report, plots.get(number))
    if duplicates:
        sections.append("<h2>Duplicate images</h2>" + _list(list(map(_format_group, duplicates))))
    for heading, file in images:
        sections.append(f"<h2>{html.escape(heading)}</h2>{_image(file, heading)}")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(sections)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _section(part: str, report: Report, plot: Path | None) -> list[str]:
    """Return the blocks of HTML about one source."""
    title = f"{part}: {report.name}"
    rows = {"images": report.images}
    if report.kind == "boxes":
        rows["boxes"] = sum(report.classes.values())
    cells = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in {**rows, **_statistics(report), **_fault_counts(report)}.items()
    )
    blocks = [f"<h2>{html.escape(title)}</h2>", f"<table>{''.join(cells)}</table>"]
    if plot is not None:
        blocks.append(_image(plot, title))
    classes = [f"{name}: {count}" for name, count in report.classes.most_common()]
    for noun, items in (("faults", [*report.unreadable, *report.faults]), ("classes", classes)):
        if items:
            summary = f"<summary>{len(items)} {noun}</summary>"
            blocks.append(f"<details>{summary}{_list(items)}</details>")
    return blocks


def _list(items: Sequence[str]) -> str:
    shown = "".join(f"<li>{html.escape(item)}</li>" for item in items[:_MAX_LISTED_ON_PAGE])
    hidden = len(items) - _MAX_LISTED_ON_PAGE
    more = f"<li>… and {hidden} more</li>" if hidden > 0 else ""
    return f"<ul>{shown}{more}</ul>"


def _image(file: Path, title: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    kind = "jpeg" if file.suffix == ".jpg" else "png"
    return f'<img alt="{html.escape(title)}" src="data:image/{kind};base64,{data}">'
