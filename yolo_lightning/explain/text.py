"""What `yolo-lightning explain` says in words and tables."""

from collections.abc import Mapping, Sequence

from yolo_lightning.explain.analysis import (
    TERMS,
    Box,
    BoxesExplained,
    ExplainedObject,
    LabelExplained,
    Step,
)
from yolo_lightning.losses import LossSettings

_NAME, _HEADING = 24, 16


def _place(box: Box) -> str:
    """Return where a box is, in words."""
    return f"row {box.row}, column {box.column}, anchor {box.anchor}"


def _path(path: Sequence[Step]) -> str:
    """Return a path's probabilities given the parent, and their product."""
    parts = []
    for step in path:
        rival = f" ({step.rival[0]} {step.rival[1]:.2f})" if step.rival else ""
        parts.append(f"{step.name} {step.given_parent:.2f}{rival}")
    product = f" = {path[-1].absolute:.2f}" if len(path) > 1 else ""
    return " · ".join(parts) + product


def object_lines(
    number: int, item: ExplainedObject, anchor_wh_px: tuple[float, float]
) -> list[str]:
    """Return what is told about an object, its name first.

    Args:
        number: of the object, from 1.
        item: the object.
        anchor_wh_px: of its anchor, px of the network input.
    """
    own, *rest = sorted(item.shape_ious, reverse=True)
    other = f", next {rest[0]:.2f}" if rest else ""
    learns = f", learns {item.target:.2f}" if item.taken_by is None else ""
    lines = [
        f"{number}  {item.name}",
        f"{_place(item.box)}: {anchor_wh_px[0]:.0f} x {anchor_wh_px[1]:.0f} px, "
        f"shape IoU {own:.2f}{other}",
        f"decoded box: IoU {item.iou:.2f}; objectness {item.box.objectness:.2f}{learns}",
        f"path: {_path(item.path)}",
    ]
    if item.taken_by is not None:
        return [*lines, f"costs nothing: object {item.taken_by + 1} has the same box"]
    terms = ", ".join(f"{name[5:]} {value:.4f}" for name, value in item.terms.items())
    return [*lines, f"costs {sum(item.terms.values()):.4f}: {terms}"]


def _terms_table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Return rows of terms and their sums, the columns named in the first line."""
    width = max(len(name[:_NAME]) for name, _ in rows)
    lines = [" " * width + "".join(f"{name:>12}" for name in TERMS) + f"{'loss':>10}"]
    for name, terms in rows:
        cells = "".join(f"{terms[term]:>12.4f}" if term in terms else " " * 12 for term in TERMS)
        lines.append(f"{name[:_NAME]:<{width}}{cells}{sum(terms.values()):>10.4f}")
    return lines


def boxes_summary(explained: BoxesExplained, settings: LossSettings, each: bool) -> list[str]:
    """Return what boxes without an object pay, and all terms.

    Args:
        explained: the image.
        settings: scales and rules.
        each: whether every object has a row, or all have one.
    """
    objects, total = explained.objects, explained.terms
    lines = [
        f"{explained.counted} boxes without an object pay loss_noobj; {explained.spared} more "
        f"overlap a truth by over {settings.ignore_iou:g} and do not",
        *(
            f"no object: {_place(one.box)}: objectness {one.box.objectness:.2f}, "
            f"IoU {one.iou:.2f} with the nearest truth, pays {one.cost:.4f}"
            for one in explained.unexpected
        ),
    ]
    rows = [(f"{k + 1} {item.name}", item.terms) for k, item in enumerate(objects)]
    if not each:
        own = {term: sum(item.terms.get(term, 0.0) for item in objects) for term in TERMS}
        rows = [("objects", {term: own[term] for term in ("loss_coord", "loss_obj", "loss_class")})]
    others = {term: total[term] for term in ("loss_noobj", "loss_anchor_prior")}
    return [*lines, "", *_terms_table([*rows, ("other boxes", others), ("image", total)])]


def _why(explained: LabelExplained) -> str:
    """Return why the chosen box was chosen."""
    name, node = explained.name, explained.node
    if explained.rule == "largest":
        if explained.any_sure:
            return "the largest of the boxes whose objectness is above 0.3"
        return "no objectness is above 0.3, so the box with the highest"
    if node is None:
        return f"boxes taught no ancestor of {name}, so the box with the highest objectness"
    best = f"the box with the highest objectness x P({node})"
    if explained.rule == "label":
        return best
    if node == name:
        return f"{best}; boxes taught {node} itself"
    return f"{best}; {node} is the deepest ancestor of {name} that boxes taught"


def label_lines(explained: LabelExplained) -> list[str]:
    """Return what is told about an image with a label, its name first."""
    first = explained.candidates[0].box
    if explained.target is None:
        learns = "and learns nothing (loss.objectness_rule)"
    elif first.objectness < explained.target:
        learns = f"and learns to reach {explained.target:g}"
    else:
        learns = f"and has nothing to learn from {explained.target:g} on"
    others = [
        f"{rule}: {'the same' if box == first else _place(box)}"
        for rule, box in explained.others.items()
    ]
    return [
        explained.name,
        f"box_selection {explained.rule}: {_why(explained)}",
        f"other rules would choose: {'; '.join(others)}",
        f"path at the chosen box: {_path(explained.path)}",
        f"the chosen box's objectness is {first.objectness:.2f} {learns}",
    ]


def candidates_table(explained: LabelExplained, size: int) -> list[str]:
    """Return the best boxes by the rule, the columns named in the first line.

    Args:
        explained: the image.
        size: side of the network input, px.
    """
    listed = explained.candidates
    columns = [("objectness", [one.box.objectness for one in listed])]
    if explained.rule == "largest" and explained.any_sure:
        columns.append(("area", [one.score for one in listed]))
    elif explained.node is not None:
        columns.append((_chance(explained.node), [one.prob_node for one in listed]))
        columns.append(("product", [one.score for one in listed]))
    if explained.rule != "label":
        columns.append((_chance(explained.name), [one.prob_label for one in listed]))
    lines = [f"{'':<3}{'row':>3}{'column':>8}{'anchor':>7}{'w x h px':>12}"]
    for k, one in enumerate(listed):
        box, (x1, y1, x2, y2) = one.box, one.box.xyxy_norm
        extent = f"{(x2 - x1) * size:.0f} x {(y2 - y1) * size:.0f}"
        lines.append(f"{k + 1:<3}{box.row:>3}{box.column:>8}{box.anchor:>7}{extent:>12}")
    for name, values in columns:
        cells = [name, *(f"{value:.4f}" for value in values)]
        width = max(map(len, cells)) + 2
        lines = [f"{line}{cell:>{width}}" for line, cell in zip(lines, cells, strict=True)]
    return lines


def _chance(name: str) -> str:
    return f"P({name})" if len(name) <= _HEADING else f"P({name[: _HEADING - 1]}…)"


def label_summary(explained: LabelExplained) -> list[str]:
    """Return all terms."""
    total = explained.terms
    chosen = {term: total[term] for term in ("loss_obj", "loss_class")}
    others = {"loss_noobj": total["loss_noobj"]}
    return _terms_table([("chosen box", chosen), ("other boxes", others), ("image", total)])


def warm_up(seen: int, settings: LossSettings) -> str:
    """Return whether `loss_anchor_prior` counts; `seen` images came before."""
    most = settings.anchor_prior_images
    if not most:
        return "loss_anchor_prior: none, loss.anchor_prior_images is 0"
    if seen >= most:
        return f"loss_anchor_prior: over after the first {most:,} images"
    return f"loss_anchor_prior: {seen:,} of its first {most:,} images were seen"
