"""Text output of `yolo-lightning explain`."""

from collections.abc import Sequence

from yolo_lightning.explain.analysis import (
    TERMS,
    BoxLossExplanation,
    LabelLossExplanation,
    PathNode,
    PredictedBox,
    width_height,
)
from yolo_lightning.losses import PAPER_MIN_OBJECTNESS

_MAX_NAME, _MAX_HEADING = 24, 16


def _location(box: PredictedBox) -> str:
    return f"row {box.row}, column {box.column}, anchor {box.anchor}"


def _path(path: Sequence[PathNode]) -> str:
    parts = []
    for node in path:
        best = node.best_sibling
        sibling = f" ({best[0]} {best[1]:.2f})" if best else ""
        parts.append(f"{node.name} {node.conditional_prob:.2f}{sibling}")
    product = f" = {path[-1].prob:.2f}" if len(path) > 1 else ""
    return " · ".join(parts) + product


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [[row[0].ljust(widths[0]), *row[1:]] for row in rows]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def terms_table(explanation: BoxLossExplanation | LabelLossExplanation) -> list[str]:
    """Return a table of all terms: a header, a row per object, other boxes, and the image."""
    total, others = explanation.terms, ["loss_noobj"]
    if isinstance(explanation, BoxLossExplanation):
        rows = [(f"{k + 1} {item.name}", item.terms) for k, item in enumerate(explanation.objects)]
        others.append("loss_anchor_prior")
    else:
        rows = [("selected box", {term: total[term] for term in ("loss_obj", "loss_class")})]
    rows += [("other boxes", {term: total[term] for term in others}), ("image", total)]
    cells = [["", *TERMS, "loss"]]
    for name, terms in rows:
        values = [f"{terms[term]:.4f}" if term in terms else "" for term in TERMS]
        cells.append([name[:_MAX_NAME], *values, f"{sum(terms.values()):.4f}"])
    return _table(cells)


def object_lines(explanation: BoxLossExplanation, k: int) -> list[str]:
    """Return the explanation of object k, its number (from 1) and name first."""
    item = explanation.objects[k]
    w, h = (explanation.image_size * side for side in explanation.anchors_wh_norm[item.box.anchor])
    best, *others = sorted(item.shape_ious, reverse=True)
    second_best = f", next {others[0]:.2f}" if others else ""
    if item.overridden_by is None:
        terms = ", ".join(f"{name[5:]} {value:.4f}" for name, value in item.terms.items())
        loss = f"loss {sum(item.terms.values()):.4f}: {terms}"
        target = f", target {item.objectness_target:.2f}"
    else:
        loss, target = f"no loss: object {item.overridden_by + 1} has the same box", ""
    return [
        f"{k + 1}  {item.name}",
        f"   {_location(item.box)}: {w:.0f} x {h:.0f} px, shape IoU {best:.2f}{second_best}",
        f"   decoded box: IoU {item.iou:.2f}; objectness {item.box.objectness:.2f}{target}",
        f"   path: {_path(item.path)}",
        f"   {loss}",
    ]


def other_boxes_lines(explanation: BoxLossExplanation) -> list[str]:
    """Return the loss of boxes without an object."""
    limit, images_seen = explanation.settings.anchor_prior_images, explanation.batch.images_seen
    prior = f"on, at image {images_seen:,} of the first {limit:,}"
    if images_seen >= limit:
        prior = f"off after the first {limit:,} images"
    return [
        f"loss_anchor_prior: {prior if limit else 'off, loss.anchor_prior_images is 0'}",
        f"{explanation.num_negatives} boxes without an object have a loss_noobj; "
        f"{explanation.num_ignored} more have none, with an IoU above "
        f"{explanation.settings.ignore_iou:g} with a target",
        *(
            f"no object: {_location(one.box)}: objectness {one.box.objectness:.2f}, "
            f"IoU {one.iou:.2f} with the nearest target, loss {one.loss:.4f}"
            for one in explanation.false_positives
        ),
    ]


def _reason(explanation: LabelLossExplanation) -> str:
    """Return why the first candidate is selected."""
    name, node, rule = explanation.name, explanation.node, explanation.settings.box_selection
    if explanation.ranked_by == "area":
        return "the largest of the boxes with an objectness above 0.3"
    if node is None:
        cause = "none is above 0.3" if rule == "largest" else f"{name} has no ancestor with boxes"
        return f"the highest objectness, since {cause}"
    boxed = f"is the deepest ancestor of {name} with boxes" if node != name else "itself has boxes"
    cause = "" if rule == "label" else f"; {node} {boxed}"
    return f"the highest objectness x P({node}){cause}"


def label_lines(explanation: LabelLossExplanation) -> list[str]:
    """Return the explanation of an image label, its name first."""
    first, settings = explanation.candidates[0].box, explanation.settings
    if settings.objectness_rule != "paper":
        target = "without a loss (loss.objectness_rule)"
    elif first.objectness < PAPER_MIN_OBJECTNESS:
        target = f"below the target of {PAPER_MIN_OBJECTNESS:g}"
    else:
        target = f"not below the target of {PAPER_MIN_OBJECTNESS:g}, so without a loss"
    others = [
        f"{rule}: {'the same' if box == first else _location(box)}"
        for rule, box in explanation.other_rules.items()
    ]
    return [
        explanation.name,
        f"box_selection {settings.box_selection}: {_reason(explanation)}",
        f"other rules: {'; '.join(others)}",
        f"path at the selected box: {_path(explanation.path)}",
        f"objectness of the selected box: {first.objectness:.2f}, {target}",
    ]


def _prob(name: str) -> str:
    return f"P({name})" if len(name) <= _MAX_HEADING else f"P({name[: _MAX_HEADING - 1]}…)"


def candidates_table(explanation: LabelLossExplanation) -> list[str]:
    """Return a table of the best boxes by the rule, with a header."""
    heading, rows = ["", "row", "column", "anchor", "w x h px"], []
    for number, one in enumerate(explanation.candidates, start=1):
        w, h = (explanation.image_size * side for side in width_height(one.box.xyxy_norm))
        values = [("objectness", one.box.objectness)]
        if explanation.ranked_by == "area":
            values.append(("area", one.score))
        elif explanation.node is not None:
            values += [(_prob(explanation.node), one.prob_node), ("product", one.score)]
        if explanation.settings.box_selection != "label":
            values.append((_prob(explanation.name), one.prob_label))
        location = map(str, (number, one.box.row, one.box.column, one.box.anchor))
        rows.append([*location, f"{w:.0f} x {h:.0f}", *(f"{value:.4f}" for _, value in values)])
    return _table([[*heading, *(name for name, _ in values)], *rows])


def boxes_text(explanation: BoxLossExplanation) -> str:
    """Return the explanation of an image with boxes."""
    lines = [line for k in range(len(explanation.objects)) for line in object_lines(explanation, k)]
    return "\n".join([*lines, *other_boxes_lines(explanation), "", *terms_table(explanation)])


def label_text(explanation: LabelLossExplanation) -> str:
    """Return the explanation of an image with a label."""
    tables = [*candidates_table(explanation), "", *terms_table(explanation)]
    return "\n".join([*label_lines(explanation), "", *tables])
