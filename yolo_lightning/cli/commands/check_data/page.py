"""HTML page of `check-data`, a single file with embedded images."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yolo_lightning.datamodules.inspection import Report

_MAX_LISTED = 200

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


@dataclass
class Part:
    """One source on the page."""

    part: str  # of the recipe, such as detection
    report: Report
    plot: Path | None  # of its labels


def render_page(
    title: str,
    parts: Sequence[Part],
    duplicates: Sequence[Sequence[tuple[str, str]]],
    problems: Sequence[str],
    vocabulary: str,
    images: Sequence[tuple[str, Path]],
) -> str:
    """Return the page as HTML; `images` are titles and files of augmented batches."""
    result = (
        '<p class="bad">Training would not start:</p>' + _list(problems)
        if problems
        else '<p class="good">Training would start.</p>'
    )
    sections = [f"<h1>{html.escape(title)}</h1>", result]
    if vocabulary:
        sections.append(f"<pre>{html.escape(vocabulary)}</pre>")
    sections += [_section(part) for part in parts]
    if duplicates:
        rows = [" = ".join(f"{path} ({part})" for part, path in group) for group in duplicates]
        sections.append("<h2>Duplicate images</h2>" + _list(rows))
    for heading, file in images:
        sections.append(f"<h2>{html.escape(heading)}</h2>{_image(file, heading)}")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(sections)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _section(part: Part) -> str:
    report, plain = part.report, part.report.to_plain()
    title = f"{part.part}: {report.name}"
    blocks = [f"<h2>{html.escape(title)}</h2>"]
    rows = [("images", str(report.images))]
    if report.kind == "boxes":
        rows.append(("boxes", str(sum(report.classes.values()))))
    for key in ("image_width_px", "image_height_px", "box_side_px", "box_side_relative",
                "box_longer_to_shorter_side", "objects_per_image", "boxes_by_area"):  # fmt: skip
        if plain[key]:
            values = ", ".join(f"{name} {value:g}" for name, value in plain[key].items())
            rows.append((key.replace("_", " "), values))
    rows += [(kind, str(count)) for kind, count in plain["fault_kinds"].items()]
    if report.unreadable:
        rows.append(("cannot be decoded", str(len(report.unreadable))))
    cells = (f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    blocks.append(f"<table>{''.join(cells)}</table>")
    if part.plot is not None:
        blocks.append(_image(part.plot, title))
    faults = [*report.unreadable, *report.faults]
    if faults:
        blocks.append(f"<details><summary>{len(faults)} faults</summary>{_list(faults)}</details>")
    classes = [f"{name}: {count}" for name, count in report.classes.most_common()]
    if classes:
        blocks.append(
            f"<details><summary>{len(classes)} classes</summary>{_list(classes)}</details>"
        )
    return "\n".join(blocks)


def _list(items: Sequence[str]) -> str:
    shown = "".join(f"<li>{html.escape(item)}</li>" for item in items[:_MAX_LISTED])
    more = f"<li>… and {len(items) - _MAX_LISTED} more</li>" if len(items) > _MAX_LISTED else ""
    return f"<ul>{shown}{more}</ul>"


def _image(file: Path, title: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    kind = "jpeg" if file.suffix == ".jpg" else "png"
    return f'<img alt="{html.escape(title)}" src="data:image/{kind};base64,{data}">'
