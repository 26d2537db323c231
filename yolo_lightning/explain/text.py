"""Text output of `yolo-lightning explain`."""

from collections.abc import Mapping, Sequence

from yolo_lightning.explain.analysis import (
    TERMS,
    BoxLossExplanation,
    LabelLossExplanation,
    ObjectExplanation,
    PathNode,
    PredictedBox,
)
from yolo_lightning.losses import LossSettings

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


def object_lines(
    number: int, item: ObjectExplanation, anchor_wh_px: tuple[float, float]
) -> list[str]:
    """Return the explanation of an object, its number (from 1) and name first."""
    best, *others = sorted(item.shape_ious, reverse=True)
    second_best = f", next {others[0]:.2f}" if others else ""
    is_overridden = item.overridden_by is not None
    target = "" if is_overridden else f", target {item.objectness_target:.2f}"
    lines = [
        f"{number}  {item.name}",
        f"{_location(item.box)}: {anchor_wh_px[0]:.0f} x {anchor_wh_px[1]:.0f} px, "
        f"shape IoU {best:.2f}{second_best}",
        f"decoded box: IoU {item.iou:.2f}; objectness {item.box.objectness:.2f}{target}",
        f"path: {_path(item.path)}",
    ]
    if item.overridden_by is not None:
        return [*lines, f"no loss: object {item.overridden_by + 1} has the same box"]
    terms = ", ".join(f"{name[5:]} {value:.4f}" for name, value in item.terms.items())
    return [*lines, f"loss {sum(item.terms.values()):.4f}: {terms}"]


def _terms_table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> list[str]:
    """Return a table of terms and their sums, with a header."""
    width = max(len(name[:_MAX_NAME]) for name, _ in rows)
    widths = {term: max(12, len(term) + 2) for term in TERMS}
    lines = [" " * width + "".join(f"{term:>{w}}" for term, w in widths.items()) + f"{'loss':>10}"]
    for name, terms in rows:
        cells = "".join(
            f"{terms[term]:>{w}.4f}" if term in terms else " " * w for term, w in widths.items()
        )
        lines.append(f"{name[:_MAX_NAME]:<{width}}{cells}{sum(terms.values()):>10.4f}")
    return lines


def boxes_summary(
    explanation: BoxLossExplanation, settings: LossSettings, row_per_object: bool
) -> list[str]:
    """Return the loss of boxes without an object, and a table of all terms.

    Without `row_per_object` the table has one row with the sum over the objects.
    """
    objects, total = explanation.objects, explanation.terms
    lines = [
        f"{explanation.num_negatives} boxes without an object have a loss_noobj; "
        f"{explanation.num_ignored} more have none, with an IoU above {settings.ignore_iou:g} "
        "with a target",
        *(
            f"no object: {_location(one.box)}: objectness {one.box.objectness:.2f}, "
            f"IoU {one.iou:.2f} with the nearest target, loss {one.loss:.4f}"
            for one in explanation.false_positives
        ),
    ]
    rows = [(f"{k + 1} {item.name}", item.terms) for k, item in enumerate(objects)]
    if not row_per_object:
        names = ("loss_coord", "loss_obj", "loss_class")
        sums = {term: sum(item.terms.get(term, 0.0) for item in objects) for term in names}
        rows = [("objects", sums)]
    others = {term: total[term] for term in ("loss_noobj", "loss_anchor_prior")}
    return [*lines, "", *_terms_table([*rows, ("other boxes", others), ("image", total)])]


def _reason(explanation: LabelLossExplanation) -> str:
    name, node = explanation.name, explanation.node
    if explanation.rule == "largest":
        if explanation.any_above_min:
            return "the largest of the boxes with an objectness above 0.3"
        return "the highest objectness, since none is above 0.3"
    if node is None:
        return f"the highest objectness, since {name} has no ancestor with boxes"
    best = f"the highest objectness x P({node})"
    if explanation.rule == "label":
        return best
    if node == name:
        return f"{best}; {node} itself has boxes"
    return f"{best}; {node} is the deepest ancestor of {name} with boxes"


def label_lines(explanation: LabelLossExplanation) -> list[str]:
    """Return the explanation of an image label, its name first."""
    first = explanation.candidates[0].box
    if explanation.objectness_target is None:
        target = "without a loss (loss.objectness_rule)"
    elif first.objectness < explanation.objectness_target:
        target = f"below the target of {explanation.objectness_target:g}"
    else:
        target = f"not below the target of {explanation.objectness_target:g}, so without a loss"
    others = [
        f"{rule}: {'the same' if box == first else _location(box)}"
        for rule, box in explanation.other_rules.items()
    ]
    return [
        explanation.name,
        f"box_selection {explanation.rule}: {_reason(explanation)}",
        f"other rules: {'; '.join(others)}",
        f"path at the selected box: {_path(explanation.path)}",
        f"objectness of the selected box: {first.objectness:.2f}, {target}",
    ]


def candidates_table(explanation: LabelLossExplanation, size: int) -> list[str]:
    """Return a table of the best boxes by the rule, with a header; `size` is the input's, px."""
    candidates = explanation.candidates
    columns = [("objectness", [one.box.objectness for one in candidates])]
    if explanation.rule == "largest" and explanation.any_above_min:
        columns.append(("area", [one.score for one in candidates]))
    elif explanation.node is not None:
        columns.append((_prob(explanation.node), [one.prob_node for one in candidates]))
        columns.append(("product", [one.score for one in candidates]))
    if explanation.rule != "label":
        columns.append((_prob(explanation.name), [one.prob_label for one in candidates]))
    lines = [f"{'':<3}{'row':>3}{'column':>8}{'anchor':>8}{'w x h px':>12}"]
    for k, one in enumerate(candidates):
        box, (x1, y1, x2, y2) = one.box, one.box.xyxy_norm
        box_size = f"{(x2 - x1) * size:.0f} x {(y2 - y1) * size:.0f}"
        lines.append(f"{k + 1:<3}{box.row:>3}{box.column:>8}{box.anchor:>8}{box_size:>12}")
    for name, values in columns:
        cells = [name, *(f"{value:.4f}" for value in values)]
        width = max(map(len, cells)) + 2
        lines = [f"{line}{cell:>{width}}" for line, cell in zip(lines, cells, strict=True)]
    return lines


def _prob(name: str) -> str:
    return f"P({name})" if len(name) <= _MAX_HEADING else f"P({name[: _MAX_HEADING - 1]}…)"


def label_summary(explanation: LabelLossExplanation) -> list[str]:
    """Return a table of all terms."""
    total = explanation.terms
    selected = {term: total[term] for term in ("loss_obj", "loss_class")}
    others = {"loss_noobj": total["loss_noobj"]}
    return _terms_table([("selected box", selected), ("other boxes", others), ("image", total)])


def anchor_prior_line(images_seen: int, settings: LossSettings) -> str:
    """Return whether `loss_anchor_prior` applies after a number of training images."""
    limit = settings.anchor_prior_images
    if not limit:
        return "loss_anchor_prior: off, loss.anchor_prior_images is 0"
    if images_seen >= limit:
        return f"loss_anchor_prior: off after the first {limit:,} images"
    return f"loss_anchor_prior: on, at image {images_seen:,} of the first {limit:,}"
