"""The page of `check-data`: one HTML file that needs nothing beside it."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yolo_lightning.datamodules.inspection import Report

_LISTED = 200

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
    """One source on the page.

    Attributes:
        part: of the recipe, such as ``detection``.
        report: what was found.
        plot: a picture of its labels.
    """

    part: str
    report: Report
    plot: Path | None


def page(
    place: str,
    parts: Sequence[Part],
    twins: Sequence[Sequence[tuple[str, str]]],
    problems: Sequence[str],
    vocabulary: str,
    pictures: Sequence[tuple[str, Path]],
) -> str:
    """Return the page.

    Args:
        place: the recipe or dataset.
        parts: a section each.
        twins: groups of files with the same bytes.
        problems: why training would not start.
        vocabulary: what each class learns from.
        pictures: titles and files of augmented samples.
    """
    verdict = (
        '<p class="bad">Training would not start:</p>' + _list(problems)
        if problems
        else '<p class="good">Training would start.</p>'
    )
    sections = [f"<h1>{html.escape(place)}</h1>", verdict]
    if vocabulary:
        sections.append(f"<pre>{html.escape(vocabulary)}</pre>")
    sections += [_section(part) for part in parts]
    if twins:
        rows = [" = ".join(f"{path} ({part})" for part, path in group) for group in twins]
        sections.append("<h2>Images there more than once</h2>" + _list(rows))
    for title, file in pictures:
        sections.append(f"<h2>{html.escape(title)}</h2>{_image(file, title)}")
    head = f'<meta charset="utf-8"><title>{html.escape(place)}</title><style>{_STYLE}</style>'
    body = "\n".join(sections)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _section(part: Part) -> str:
    report, plain = part.report, part.report.to_plain()
    title = f"{part.part}: {report.name}"
    said = [f"<h2>{html.escape(title)}</h2>"]
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
    said.append(f"<table>{''.join(cells)}</table>")
    if part.plot is not None:
        said.append(_image(part.plot, title))
    faults = [*report.unreadable, *report.faults]
    if faults:
        said.append(f"<details><summary>{len(faults)} faults</summary>{_list(faults)}</details>")
    classes = [f"{name}: {count}" for name, count in report.classes.most_common()]
    if classes:
        said.append(f"<details><summary>{len(classes)} classes</summary>{_list(classes)}</details>")
    return "\n".join(said)


def _list(items: Sequence[str]) -> str:
    shown = "".join(f"<li>{html.escape(item)}</li>" for item in items[:_LISTED])
    more = f"<li>… and {len(items) - _LISTED} more</li>" if len(items) > _LISTED else ""
    return f"<ul>{shown}{more}</ul>"


def _image(file: Path, title: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    kind = "jpeg" if file.suffix == ".jpg" else "png"
    return f'<img alt="{html.escape(title)}" src="data:image/{kind};base64,{data}">'
