"""`explain`: terms of the loss, responsible boxes, and selected boxes."""

import itertools
import math
from argparse import Namespace
from typing import Any

import pytest
import torch

from tests.helpers.golden import detection_batch
from tests.helpers.miniatures import save_grey, set_up_data, write_xml
from tests.helpers.paths import REPO
from yolo_lightning.batches import ClassificationBatch, DetectionBatch, unit_range
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.cli.commands.explain import images_seen, load_detector, read_image
from yolo_lightning.cli.data import DataCLI
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels, VOCFolder
from yolo_lightning.datamodules.batching import EvaluationDataset
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.explain import picture as explain_picture
from yolo_lightning.explain.analysis import TERMS, explain_boxes, explain_label, path_to
from yolo_lightning.explain.text import label_lines
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.losses import LossSettings, assign_objects, select_boxes, yolo9000_loss
from yolo_lightning.models.head import HeadOutput
from yolo_lightning.models.layers import LayerRow
from yolo_lightning.tree.exclusive import ExclusiveNames
from yolo_lightning.tree.wordtree import WordTree

ANCHORS = torch.tensor([[1.0, 1.0], [3.0, 2.0]])
FLAT = WordTree.from_names(["a", "b"])
PETS = WordTree(
    [("animal", "-", "animal"), ("thing", "-", "thing"), ("cat", "animal", "cat"),
     ("dog", "animal", "dog"), ("bengal", "cat", "Bengal"), ("siamese", "cat", "Siamese")]
)  # fmt: skip
BENGAL, CAT = 4, 2
QUICK = "recipes/quickstart.yaml"
BACKBONE: list[LayerRow] = [["conv", 4], ["pool"], ["conv", 4], ["pool"], ["conv", 8], ["pool"],
                            ["conv", 8], ["pool"], ["conv", 16]]  # fmt: skip


def raw_head(classes: int, grid: int = 3, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(1, 2 * (5 + classes), grid, grid, generator=generator)


def explain_raw_boxes(raw, boxes, labels, tree=FLAT, images_seen=20_000, **options):
    """Return the explanation of an image and the terms of its loss."""
    batch = detection_batch(torch.tensor([boxes]), torch.tensor([labels]), images_seen)
    output, settings = HeadOutput.from_dense(raw, len(ANCHORS)), LossSettings(**options)
    no_ancestors = torch.full((len(tree),), -1)
    terms = yolo9000_loss(output, batch, ANCHORS, tree, no_ancestors, settings)
    return explain_boxes(output, batch, ANCHORS, tree, settings), terms


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# --- boxes


def test_the_loss_of_a_name_that_excludes_another():
    batch = detection_batch(torch.tensor([[[0.4, 0.4, 0.3, 0.3]]]), torch.tensor([[CAT]]), 20_000)
    output, settings = HeadOutput.from_dense(raw_head(len(PETS)), len(ANCHORS)), LossSettings()
    names = ExclusiveNames(PETS, [1], [[CAT, BENGAL]])
    (found,) = explain_boxes(output, batch, ANCHORS, PETS, settings, names).objects
    assert found.name == "cat without Bengal"
    prob = found.path[-1].prob
    logits = output.class_logits.gather_boxes(
        *(torch.tensor([k]) for k in (0, found.box.anchor, 3 * found.box.row + found.box.column))
    )
    rest = prob - float(PETS.log_probs(logits)[0, BENGAL].exp())
    assert found.terms["loss_class"] == pytest.approx(-math.log(rest), rel=1e-5)
    (plain,) = explain_boxes(output, batch, ANCHORS, PETS, settings).objects
    assert plain.name == "cat"
    assert plain.terms["loss_class"] == pytest.approx(-math.log(prob), rel=1e-5)


def test_responsible_cell_and_anchor_and_decoded_box_equal_those_by_hand():
    raw = torch.zeros(1, 14, 2, 2)
    raw[0, 7:, 1, 0] = torch.tensor([0.4, -0.2, 0.1, 0.3, 0.7, 1.0, -0.5])
    # 1.6 x 1.2 cells about (0.8, 1.5): column 0, row 1; shape IoU 1/1.92 and 1.92/6
    (found,) = explain_raw_boxes(raw, [[0.4, 0.75, 0.8, 0.6]], [0])[0].objects
    assert (found.box.anchor, found.box.row, found.box.column) == (0, 1, 0)
    assert found.shape_ious == pytest.approx((1 / 1.92, 1.92 / 6))
    # 2.4 x 2 cells: 1/4.8 and 4.8/6
    (found,) = explain_raw_boxes(raw, [[0.4, 0.75, 1.2, 1.0]], [0])[0].objects
    assert (found.box.anchor, found.box.row, found.box.column) == (1, 1, 0)
    assert found.box.objectness == pytest.approx(sigmoid(0.7))
    x, y = sigmoid(0.4) / 2, (1 + sigmoid(-0.2)) / 2
    w, h = math.exp(0.1) * 3 / 2, math.exp(0.3) * 2 / 2
    corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    assert found.box.xyxy_norm == pytest.approx(corners)
    inter = (min(x + w / 2, 1.0) - max(x - w / 2, -0.2)) * (
        min(y + h / 2, 1.25) - max(y - h / 2, 0.25)
    )
    assert found.iou == pytest.approx(inter / (w * h + 1.2 - inter)) == found.objectness_target
    assert [node.name for node in found.path] == ["a"]
    assert found.path[0].conditional_prob == pytest.approx(sigmoid(1.5))
    assert found.terms["loss_class"] == pytest.approx(-math.log(sigmoid(1.5)))


def test_the_decoded_box_of_an_unbounded_location_by_hand():
    raw = torch.zeros(1, 14, 2, 2)
    raw[0, 7:9, 1, 0] = torch.tensor([0.5, -0.25])
    batch = detection_batch(torch.tensor([[[0.4, 0.75, 1.2, 1.0]]]), torch.tensor([[0]]))
    output = HeadOutput.from_dense(raw, len(ANCHORS))
    output.location = "offset"
    (found,) = explain_boxes(output, batch, ANCHORS, FLAT, LossSettings()).objects
    # 3 x 2 cells about (0.5 + 1.5, 1.5 - 0.5) cells
    assert found.box.xyxy_norm == pytest.approx((0.25, 0.0, 1.75, 1.0))


@pytest.mark.parametrize("images_seen", [0, 20_000])
@pytest.mark.parametrize("rescore", [True, False])
def test_terms_of_objects_and_other_boxes_sum_to_the_loss(images_seen, rescore):
    boxes = [
        [0.2, 0.2, 0.3, 0.3],
        [0.7, 0.3, 0.9, 0.5],
        [0.5, 0.8, 0.2, 0.6],
        [0.9, 0.9, 0.1, 0.1],
    ]
    scales = {"coord_scale": 2.0, "obj_scale": 3.0, "noobj_scale": 0.5, "class_scale": 1.5}
    explanation, terms = explain_raw_boxes(
        raw_head(6), boxes, [4, 3, 2, 1], PETS, images_seen, rescore=rescore, **scales
    )
    assert explanation.terms == {name: value.item() for name, value in terms.items()}
    assert tuple(terms) == TERMS
    assert (explanation.terms["loss_anchor_prior"] > 0) == (images_seen == 0)
    for name in ("loss_coord", "loss_obj", "loss_class"):
        terms_of_objects = [item.terms[name] for item in explanation.objects]
        assert min(terms_of_objects) > 0
        assert sum(terms_of_objects) == pytest.approx(explanation.terms[name], rel=1e-5)
    assert explanation.num_negatives + explanation.num_ignored + len(boxes) == 2 * 9


def test_of_two_objects_with_the_same_box_only_the_later_one_has_a_loss():
    boxes = [[0.5, 0.5, 0.3, 0.3], [0.1, 0.1, 0.3, 0.3], [0.52, 0.5, 0.3, 0.3]]
    explanation, terms = explain_raw_boxes(raw_head(2), boxes, [0, 1, 1])
    first, other, last = explanation.objects
    assert (first.overridden_by, other.overridden_by, last.overridden_by) == (2, None, None)
    assert first.box == last.box
    assert not first.terms
    for name in last.terms:
        assert last.terms[name] + other.terms[name] == pytest.approx(terms[name].item(), rel=1e-5)


def test_negatives_ignored_boxes_and_false_positives():
    raw = torch.zeros(1, 14, 3, 3)
    raw[0, [4, 11]] = -20.0  # low objectness everywhere
    raw[0, 4, 0, 2] = 2.0
    raw[0, 4, 2, 0] = -1.0
    # a target of 1.3 x 1.1 cells in the centre; anchor 0 is responsible
    boxes = [[0.5, 0.5, 1.3 / 3, 1.1 / 3]]
    explanation, terms = explain_raw_boxes(raw, boxes, [0])
    assert (explanation.num_negatives, explanation.num_ignored) == (17, 0)
    (one,) = explanation.false_positives  # an objectness of 0.27 is too low
    assert (one.box.anchor, one.box.row, one.box.column) == (0, 0, 2)
    # an intersection of 0.15 x 0.05 cells
    assert one.iou == pytest.approx(0.0075 / (1 + 1.43 - 0.0075), rel=1e-3)
    assert one.loss == pytest.approx(0.5 * sigmoid(2.0) ** 2)
    both = one.loss + 0.5 * sigmoid(-1.0) ** 2
    assert terms["loss_noobj"].item() == pytest.approx(both, rel=1e-5)
    # the IoUs of anchor 1 in the middle row are 0.205, 0.238, 0.205
    raw[0, 11, 1, 0] = 4.0
    near, terms = explain_raw_boxes(raw, boxes, [0], ignore_iou=0.2)
    assert (near.num_negatives, near.num_ignored) == (14, 3)
    assert near.false_positives == (one,)
    assert terms["loss_noobj"].item() == pytest.approx(both, rel=1e-5)
    assert explain_raw_boxes(raw, boxes, [0])[0].false_positives[0].box.objectness == pytest.approx(
        sigmoid(4.0)
    )


def test_an_image_without_objects():
    explanation, terms = explain_raw_boxes(raw_head(2), [[0.0, 0.0, 0.0, 0.0]], [-1])
    assert not explanation.objects
    assert explanation.num_negatives == 18
    assert explanation.terms["loss_noobj"] == terms["loss_noobj"].item() > 0


def test_paths_start_at_the_top_and_name_a_more_probable_sibling():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 0.0])
    animal, cat, bengal = path_to(logits, BENGAL, PETS)
    assert (animal.name, cat.name, bengal.name) == ("animal", "cat", "Bengal")
    probs = sigmoid(1.0), sigmoid(-3.0), sigmoid(0.5)
    assert (animal.conditional_prob, cat.conditional_prob, bengal.conditional_prob) == (
        pytest.approx(probs)
    )
    assert bengal.prob == pytest.approx(math.prod(probs))
    assert cat.prob == pytest.approx(probs[0] * probs[1])
    assert animal.best_sibling is None
    assert bengal.best_sibling is None
    assert cat.best_sibling is not None
    assert cat.best_sibling[0] == "dog"
    assert cat.best_sibling[1] == pytest.approx(sigmoid(3.0))


# --- image labels


def explain_raw_label(raw, rule, ancestors, label=BENGAL, **options):
    batch = ClassificationBatch(torch.zeros(1, 3, 1, 1), torch.zeros(1), torch.tensor([label]))
    output = HeadOutput.from_dense(raw, len(ANCHORS))
    settings = LossSettings(box_selection=rule, **options)
    explanation = explain_label(output, batch, ANCHORS, PETS, ancestors, settings)
    return explanation, yolo9000_loss(output, batch, ANCHORS, PETS, ancestors, settings), output


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", ["boxed_ancestor", "label", "largest"])
def test_the_selected_box_is_that_of_the_loss_and_ranks_first(rule, seed):
    raw = raw_head(6, grid=4, seed=seed, size=2.0)
    ancestors = PETS.deepest_ancestor_in(PETS.ancestors_or_self(torch.tensor([CAT])))
    explanation, terms, output = explain_raw_label(raw, rule, ancestors)
    label = torch.tensor([BENGAL])
    for name in ("boxed_ancestor", "label", "largest"):
        anchor, cell = select_boxes(output, label, ANCHORS, PETS, ancestors, name)
        box = explanation.candidates[0].box if name == rule else explanation.other_rules[name]
        assert (box.anchor, 4 * box.row + box.column) == (int(anchor), int(cell))
    scores = [one.score for one in explanation.candidates]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert len({one.box for one in explanation.candidates}) == 5
    assert explanation.terms == {name: value.item() for name, value in terms.items()}
    assert explanation.path[-1].prob == pytest.approx(explanation.candidates[0].prob_label)
    node = {"boxed_ancestor": CAT, "label": BENGAL, "largest": None}[rule]
    assert explanation.node == (None if node is None else PETS.names[node])
    for one in explanation.candidates:
        x1, y1, x2, y2 = one.box.xyxy_norm
        key = [torch.tensor([v]) for v in (0, one.box.anchor, 4 * one.box.row + one.box.column)]
        probs = PETS.log_probs(output.class_logits.gather_boxes(*key))[0].exp()
        score = min(1, (x2 - x1) * (y2 - y1))
        if node is not None:
            score = one.box.objectness * float(probs[node])
        assert one.score == pytest.approx(score, rel=1e-4)
        assert one.prob_label == pytest.approx(float(probs[BENGAL]), rel=1e-4)


def test_without_a_boxed_ancestor_the_highest_objectness_is_selected():
    raw, no_ancestors = raw_head(6), torch.full((6,), -1)
    explanation, *_ = explain_raw_label(
        raw, "boxed_ancestor", no_ancestors, objectness_rule="darknet"
    )
    assert explanation.node is None
    assert explanation.ranked_by == "objectness"
    assert label_lines(explanation)[-1].endswith("without a loss (loss.objectness_rule)")
    for one in explanation.candidates:
        assert one.score == pytest.approx(one.box.objectness)
    assert explanation.candidates[0].box.objectness == pytest.approx(
        raw[0, [4, 15]].sigmoid().max().item()
    )


def test_only_boxes_above_the_minimum_objectness_are_candidates_for_the_largest():
    raw = raw_head(6)
    raw[0, [4, 15]] = -5.0
    raw[0, 4, 1, 1] = raw[0, 15, 0, 2] = 3.0
    explanation, *_ = explain_raw_label(raw, "largest", torch.arange(6))
    assert explanation.ranked_by == "area"
    assert {(one.box.anchor, one.box.row, one.box.column) for one in explanation.candidates} == {
        (0, 1, 1), (1, 0, 2),
    }  # fmt: skip


# --- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Return a detector with the quickstart's classes and anchors and random weights."""
    torch.manual_seed(3)
    module = DetectorModule(
        tree=str(REPO / "recipes/trees/shapes.tsv"),
        anchors_wh_cell=[(1.6, 1.7), (2.4, 2.5)],
        backbone=BACKBONE,
        head_channels=0,
        passthrough_channels=0,
        image_size=96,
    ).eval()
    with torch.no_grad():
        module.network.box_conv.weight.mul_(20)
        module.network.class_weight.mul_(100)
    path = tmp_path_factory.mktemp("explain") / "m.ckpt"
    torch.save(build_checkpoint(module, {}), path)
    return path, module


@pytest.fixture
def explain(checkpoint, workplace, capsys):
    def run(image: int, *options: str) -> str:
        arguments = [QUICK, "--checkpoint", str(checkpoint[0]), "--image", str(image), *options]
        code = main(["explain", *arguments])
        output = capsys.readouterr()
        assert code == 0, output.err
        return str(output.out)

    return run


def table_row(text: str, name: str) -> list[float]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return [float(part) for part in line.removeprefix(name).split()]


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_printed_terms_of_an_image_with_boxes_equal_the_loss(explain, checkpoint, workplace):
    module = checkpoint[1]
    source = ShapesDetection(16384, image_size=96, classes=[
        "right triangle", "rhombus", "semicircle", "pentagram", "Greek cross", "ring",
    ])  # fmt: skip
    source.bind(module.tree)
    batch = EvaluationDataset(source, 96)[[5]]
    batch.images_seen = 3200
    output = module.network(unit_range(batch.images))
    settings = LossSettings(anchor_prior_images=3200)
    anchors, no_ancestors = module.network.anchors_wh_cell, torch.full((19,), -1)
    terms = yolo9000_loss(output, batch, anchors, module.tree, no_ancestors, settings)
    values = [value.item() for value in terms.values()]
    text = explain(5)
    assert table_row(text, "image") == pytest.approx([*values, sum(values)], abs=1e-4)
    assert values[4] == 0
    names = [module.tree.names[label] for label in batch.labels[0].tolist() if label >= 0]
    found = assign_objects(batch, anchors, (6, 6))
    assert len(names) == int(found.counts.sum()) > 1
    for number, name in enumerate(names, start=1):
        coord, obj, class_loss, total = table_row(text, f"{number} {name}")
        assert coord + obj + class_loss == pytest.approx(total, abs=2e-4)
    losses = [table_row(text, f"{k + 1} {name}")[-1] for k, name in enumerate(names)]
    losses.append(table_row(text, "other boxes")[-1])
    assert sum(losses) == pytest.approx(table_row(text, "image")[-1], abs=5e-4)
    assert "loss_anchor_prior: off after the first 3,200 images" in text
    width, height = png_size(workplace / "explain-detection-5.png")
    assert width > 1500
    assert height > 1000
    assert "figure: explain-detection-5.png" in text


def test_the_anchor_prior_loss_applies_to_the_first_images(explain, workplace):
    text = explain(0, "--images-seen", "7", "--output", "a/b.jpg")
    assert table_row(text, "image")[4] == table_row(text, "other boxes")[1] > 0
    assert "loss_anchor_prior: on, at image 7 of the first 3,200" in text
    assert (workplace / "a/b.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_images_seen_of_a_checkpoint():
    data = set_up_data(
        tree=str(REPO / "recipes/trees/shapes.tsv"),
        detection=ShapesDetection(8),
        classification=ShapesImageLabels(8),
        detection_batch_size=4,
        classification_batch_size=2,
    )
    progress: dict[str, Any] = {"epoch_loop.batch_progress": {"total": {"processed": 3}}}
    # boxes, labels, boxes
    assert images_seen({"loops": {"fit_loop": progress}}, data) == 10
    assert images_seen({"state_dict": {}}, data) is None


def test_printed_terms_of_an_image_with_a_label_equal_the_loss(explain, checkpoint, workplace):
    text = explain(1, "--source", "classification")
    assert "triangle is the deepest ancestor of equilateral triangle with boxes" in text
    module = checkpoint[1]
    source = ShapesImageLabels(16384, image_size=96)
    source.bind(module.tree)
    image, node = source.read(1)
    batch = ClassificationBatch(
        torch.from_numpy(image).permute(2, 0, 1)[None], torch.zeros(1), torch.tensor([node])
    )
    output = module.network(unit_range(batch.images))
    boxed = torch.zeros(19, dtype=torch.bool)
    names = ("right triangle", "rhombus", "semicircle", "pentagram", "Greek cross", "ring")
    boxed[[module.tree.find_node(name) for name in names]] = True
    supervised = module.tree.ancestors_or_self(boxed.nonzero().flatten())
    ancestors = module.tree.deepest_ancestor_in(supervised)
    anchors, settings = module.network.anchors_wh_cell, LossSettings(anchor_prior_images=3200)
    terms = yolo9000_loss(output, batch, anchors, module.tree, ancestors, settings)
    values = [value.item() for value in terms.values()]
    assert table_row(text, "image") == pytest.approx([*values, sum(values)], abs=1e-4)
    anchor, cell = select_boxes(
        output, batch.labels, anchors, module.tree, ancestors, "boxed_ancestor"
    )
    (first,) = [line for line in text.splitlines() if line.startswith("1  ")]
    assert [int(part) for part in first.split()[1:4]] == [
        int(cell) // 6,
        int(cell) % 6,
        int(anchor),
    ]
    assert png_size(workplace / "explain-classification-1.png")[0] > 1500


def test_boxed_classes_of_the_checkpoint_and_the_rule_of_the_recipe_are_used(
    checkpoint, workplace, capsys
):
    contents = torch.load(checkpoint[0], weights_only=True)
    contents["state_dict"]["boxed"][checkpoint[1].tree.find_node("circle")] = True
    torch.save(contents, "seen.ckpt")
    argv = [QUICK, "--checkpoint", "seen.ckpt", "--image", "1", "--source", "classification"]
    assert main(["explain", *argv]) == 0
    assert "plane figure is the deepest ancestor of equilateral" in capsys.readouterr().out
    assert main(["explain", *argv, "--model.loss.box_selection", "label"]) == 0
    assert "the highest objectness x P(equilateral tri" in capsys.readouterr().out


def test_texts_of_a_crowded_figure_lie_inside_it_and_do_not_overlap(
    explain, monkeypatch, workplace
):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figures: list[Any] = []
    monkeypatch.setattr(
        explain_picture, "save_figure", lambda figure, *args, **kwargs: figures.append(figure)
    )
    explain(4, "--data.detection.objects", "[14,16]", "--data.detection.radii", "[0.05,0.1]")
    explain(4, "--data.detection.objects", "[0,0]")
    explain(4, "--source", "classification")
    long_names = WordTree.from_names(["a name " * 20, "W" * 150])
    found = explain_raw_boxes(raw_head(2), [[0.5, 0.5, 0.3, 0.3]], [1], long_names)[0]
    explain_picture.save_boxes(workplace / "a.png", "folder/$x_1$/" * 20, found)
    crowded, empty, *_ = figures
    assert any("smaller objects" in text.get_text() for text in crowded.axes[1].texts)
    assert "no objects" in empty.axes[0].get_xlabel()
    for figure in figures:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image, panel = figure.axes
        titles = [image._left_title, image.xaxis.label, *(tile.title for tile in image.child_axes)]
        texts = [text for text in (*panel.texts, *titles) if text.get_text()]
        boxes = [item.get_window_extent() for item in (*texts, image.get_legend())]
        assert len(boxes) > 8
        tiles = [axes.get_window_extent() for axes in (image, *image.child_axes)]
        for box in (*boxes, *tiles):
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1
        for one, other in itertools.combinations([*boxes, *tiles], 2):
            assert not one.overlaps(other), (one, other)
    assert len(crowded.axes[0].child_axes) == explain_picture.MAX_OBJECTS


# --- input


def test_images_are_fitted_as_in_validation_without_difficult_objects(tmp_path, write_voc):
    write_voc(tmp_path, "a", [("apple", 10, 10, 30, 40)], (64, 48))
    write_voc(tmp_path, "b", [("banana", 10, 10, 30, 40)], (64, 48), difficult=1)
    data = set_up_data(detection=VOCFolder(str(tmp_path)))
    batch, file_name = read_image(data, "detection", 0, 96)
    expected = EvaluationDataset(data.detection, 96)[[0]]
    assert file_name.endswith("a.jpg")
    assert torch.equal(batch.images, expected.images)
    assert isinstance(batch, DetectionBatch)
    assert torch.equal(batch.boxes_cxcywh_norm, expected.boxes_cxcywh_norm)
    assert bool((read_image(data, "detection", 1, 96)[0].labels < 0).all())


def test_an_unreadable_image_is_refused_by_name(tmp_path):
    for name in ("a", "b"):
        write_xml(tmp_path / f"{name}.xml", "apple", (1, 1, 10, 20))
        save_grey(tmp_path / f"{name}.jpg")
    data = set_up_data(detection=VOCFolder(str(tmp_path)))
    (tmp_path / "b.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.jpg: not a readable image"):
        read_image(data, "detection", 1, 96)


def save_classifier(path) -> None:
    module = ClassifierModule(tree=str(REPO / "recipes/trees/shapes.tsv"), backbone=BACKBONE)
    torch.save(build_checkpoint(module, {}), path)


def save_detector(path, tree=None, anchors=((1.6, 1.7), (2.4, 2.5)), **options) -> None:
    module = DetectorModule(
        tree=tree or str(REPO / "recipes/trees/shapes.tsv"), anchors_wh_cell=[*anchors],
        backbone=BACKBONE, head_channels=0, passthrough_channels=0, **options,
    )  # fmt: skip
    torch.save(build_checkpoint(module, {}), path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "16384"], "--image is 16384; data.detection has 16384 images: 0 … 16383"),
        (["--image-size", "104"], "--image-size is 104; allowed: multiples of 16"),
        (["--images-seen", "-5"], "--images-seen is -5; allowed: 0 or more"),
        (["--output", "a.gif"], "--output is 'a.gif'; allowed extensions: .png, "),
        (["--output", "recipes/quickstart.yaml/a.png"], "recipes/quickstart.yaml/a.png"),
        (["--model.loss.box_selection", "best"], "model.loss.box_selection: allowed: 'label'"),
    ],
)
def test_invalid_options_give_one_line_of_error(options, message, checkpoint, workplace, capsys):
    argv = ["--checkpoint", str(checkpoint[0]), "--image", "0", *options]
    assert main(["explain", QUICK, *argv]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not list(workplace.glob("*.png"))


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        return DataCLI([QUICK])


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: None, r"checkpoint '.*m\.ckpt' not found"),
        (save_classifier, "contains a classifier; explain needs a detector"),
        (
            lambda path: save_detector(path, ["a", "b"]),
            "data.tree differs from the checkpoint's: 19 entries in the recipe, 2 in",
        ),
        (
            lambda path: save_detector(path, anchors=((1.6, 1.7), (2.4, 2.6))),
            r"model.anchors_wh_cell differs from the checkpoint's: entry 2 is \[2.4, 2.5\] in",
        ),
        (
            lambda path: save_detector(path, location="offset"),
            "model.location differs from the checkpoint's: direct in the recipe, offset in the",
        ),
    ],
)
def test_an_unsuitable_checkpoint_is_refused(save, message, recipe, tmp_path):
    save(tmp_path / "m.ckpt")
    options = Namespace(checkpoint=str(tmp_path / "m.ckpt"), recipe=QUICK)
    with pytest.raises(InputError, match=message):
        load_detector(options, recipe)


def test_a_recipe_of_a_classifier_is_refused(checkpoint, monkeypatch):
    monkeypatch.chdir(REPO)
    name = "recipes/classify_imagenet_224.yaml"
    run = DataCLI([name, "--model.tree=[a]"])
    with pytest.raises(InputError, match="ClassifierModule; explain needs a detector"):
        load_detector(Namespace(checkpoint=str(checkpoint[0]), recipe=name), run)


def test_a_missing_source_and_a_negative_index_are_refused():
    data = set_up_data(tree=str(REPO / "recipes/trees/shapes.tsv"), detection=ShapesDetection(8))
    message = "the recipe has no data.classification; it has: detection$"
    with pytest.raises(InputError, match=message):
        read_image(data, "classification", 0, 64)
    with pytest.raises(InputError, match="--image is -1; data.detection has 8 images: 0 … 7"):
        read_image(data, "detection", -1, 64)
