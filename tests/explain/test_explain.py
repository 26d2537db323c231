"""What `explain` says: numbers of the loss, who is responsible, why a box was chosen."""

import itertools
import math
import sys
from argparse import Namespace
from typing import Any

import pytest
import torch

from tests.helpers.golden import detection_batch
from tests.helpers.miniatures import data_of, plain, write_xml
from tests.helpers.paths import REPO
from yolo_lightning.batches import ClassificationBatch, DetectionBatch, unit_range
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.cli.commands.explain import images_seen, network, read_image
from yolo_lightning.cli.data import DataCLI
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import ShapesDetection, ShapesImageLabels, VOCFolder
from yolo_lightning.datamodules.batching import EvaluationDataset
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.explain import picture as explain_picture
from yolo_lightning.explain.analysis import TERMS, explain_boxes, explain_label, path_of
from yolo_lightning.export.darknet import checkpoint_of
from yolo_lightning.losses import LossSettings, assign, select_boxes, yolo9000_loss
from yolo_lightning.models.head import HeadOutput
from yolo_lightning.tree.wordtree import WordTree

ANCHORS = torch.tensor([[1.0, 1.0], [3.0, 2.0]])
FLAT = WordTree.flat(["a", "b"])
PETS = WordTree(
    [("animal", "-", "animal"), ("thing", "-", "thing"), ("cat", "animal", "cat"),
     ("dog", "animal", "dog"), ("bengal", "cat", "Bengal"), ("siamese", "cat", "Siamese")]
)  # fmt: skip
BENGAL, CAT = 4, 2
QUICK = "recipes/quickstart.yaml"
BACKBONE = [*[row for width in (4, 4, 8, 8) for row in (["conv", width], ["pool"])], ["conv", 16]]


def raw_head(classes: int, grid: int = 3, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(1, 2 * (5 + classes), grid, grid, generator=generator)


def explained_boxes(raw, boxes, labels, tree=FLAT, seen=20_000, **options):
    """Return the explanation of an image and the terms of its loss."""
    batch = detection_batch(torch.tensor([boxes]), torch.tensor([labels]), seen)
    output, settings = HeadOutput.from_dense(raw, len(ANCHORS)), LossSettings(**options)
    nobody = torch.full((len(tree),), -1)
    terms = yolo9000_loss(output, batch, ANCHORS, tree, nobody, settings)
    return explain_boxes(output, batch, ANCHORS, tree, settings), terms


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


# --- numbers


def test_the_responsible_cell_and_anchor_and_the_decoded_box_are_those_by_hand():
    raw = torch.zeros(1, 14, 2, 2)
    raw[0, 7:, 1, 0] = torch.tensor([0.4, -0.2, 0.1, 0.3, 0.7, 1.0, -0.5])
    # 1.6 x 1.2 cells about (0.8, 1.5): column 0, row 1; shape IoU 1/1.92 and 1.92/6
    (found,) = explained_boxes(raw, [[0.4, 0.75, 0.8, 0.6]], [0])[0].objects
    assert (found.box.anchor, found.box.row, found.box.column) == (0, 1, 0)
    assert found.shape_ious == pytest.approx((1 / 1.92, 1.92 / 6))
    # 2.4 x 2 cells: 1/4.8 and 4.8/6
    (found,) = explained_boxes(raw, [[0.4, 0.75, 1.2, 1.0]], [0])[0].objects
    assert (found.box.anchor, found.box.row, found.box.column) == (1, 1, 0)
    assert found.box.objectness == pytest.approx(sigmoid(0.7))
    x, y = sigmoid(0.4) / 2, (1 + sigmoid(-0.2)) / 2
    w, h = math.exp(0.1) * 3 / 2, math.exp(0.3) * 2 / 2
    corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    assert found.box.xyxy_norm == pytest.approx(corners)
    inter = (min(x + w / 2, 1.0) - max(x - w / 2, -0.2)) * (
        min(y + h / 2, 1.25) - max(y - h / 2, 0.25)
    )
    assert found.iou == pytest.approx(inter / (w * h + 1.2 - inter)) == found.target
    assert [step.name for step in found.path] == ["a"]
    assert found.path[0].given_parent == pytest.approx(sigmoid(1.5))
    assert found.terms["loss_class"] == pytest.approx(-math.log(sigmoid(1.5)))


@pytest.mark.parametrize("seen", [0, 20_000])
@pytest.mark.parametrize("rescore", [True, False])
def test_shares_of_objects_and_other_boxes_add_up_to_the_loss(seen, rescore):
    places = [
        [0.2, 0.2, 0.3, 0.3],
        [0.7, 0.3, 0.9, 0.5],
        [0.5, 0.8, 0.2, 0.6],
        [0.9, 0.9, 0.1, 0.1],
    ]
    scales = {"coord_scale": 2.0, "obj_scale": 3.0, "noobj_scale": 0.5, "class_scale": 1.5}
    explained, terms = explained_boxes(
        raw_head(6), places, [4, 3, 2, 1], PETS, seen, rescore=rescore, **scales
    )
    assert explained.terms == {name: value.item() for name, value in terms.items()}
    assert tuple(terms) == TERMS
    assert (explained.terms["loss_anchor_prior"] > 0) == (seen == 0)
    for name in ("loss_coord", "loss_obj", "loss_class"):
        shares = [item.terms[name] for item in explained.objects]
        assert min(shares) > 0
        assert sum(shares) == pytest.approx(explained.terms[name], rel=1e-5)
    assert explained.counted + explained.spared + len(places) == 2 * 9


def test_of_two_objects_with_one_box_the_later_one_has_it_and_the_other_costs_nothing():
    places = [[0.5, 0.5, 0.3, 0.3], [0.1, 0.1, 0.3, 0.3], [0.52, 0.5, 0.3, 0.3]]
    explained, terms = explained_boxes(raw_head(2), places, [0, 1, 1])
    first, other, last = explained.objects
    assert (first.taken_by, other.taken_by, last.taken_by) == (2, None, None)
    assert first.box == last.box
    assert not first.terms
    for name in last.terms:
        assert last.terms[name] + other.terms[name] == pytest.approx(terms[name].item(), rel=1e-5)


def test_boxes_that_pay_are_counted_those_near_a_truth_spared_and_sure_ones_named():
    raw = torch.zeros(1, 14, 3, 3)
    raw[0, [4, 11]] = -20.0  # sure of nothing, anywhere
    raw[0, 4, 0, 2] = 2.0
    raw[0, 4, 2, 0] = -1.0
    # a truth of 1.3 x 1.1 cells in the middle, where anchor 0 answers for it
    truth = [[0.5, 0.5, 1.3 / 3, 1.1 / 3]]
    explained, terms = explained_boxes(raw, truth, [0])
    assert (explained.counted, explained.spared) == (17, 0)
    (one,) = explained.unexpected  # 0.27 is not sure
    assert (one.box.anchor, one.box.row, one.box.column) == (0, 0, 2)
    # they share 0.15 x 0.05 cells
    assert one.iou == pytest.approx(0.0075 / (1 + 1.43 - 0.0075), rel=1e-3)
    assert one.cost == pytest.approx(0.5 * sigmoid(2.0) ** 2)
    both = one.cost + 0.5 * sigmoid(-1.0) ** 2
    assert terms["loss_noobj"].item() == pytest.approx(both, rel=1e-5)
    # anchor 1 of the middle row overlaps the truth by 0.205, 0.238, 0.205
    raw[0, 11, 1, 0] = 4.0
    near, terms = explained_boxes(raw, truth, [0], ignore_iou=0.2)
    assert (near.counted, near.spared) == (14, 3)
    assert near.unexpected == (one,)
    assert terms["loss_noobj"].item() == pytest.approx(both, rel=1e-5)
    assert explained_boxes(raw, truth, [0])[0].unexpected[0].box.objectness == pytest.approx(
        sigmoid(4.0)
    )


def test_an_image_without_objects_is_told_about():
    explained, terms = explained_boxes(raw_head(2), [[0.0, 0.0, 0.0, 0.0]], [-1])
    assert not explained.objects
    assert explained.counted == 18
    assert explained.terms["loss_noobj"] == terms["loss_noobj"].item() > 0


def test_paths_go_from_the_top_and_name_the_sibling_that_the_network_prefers():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 0.0])
    animal, cat, bengal = path_of(logits, BENGAL, PETS)
    assert (animal.name, cat.name, bengal.name) == ("animal", "cat", "Bengal")
    given = sigmoid(1.0), sigmoid(-3.0), sigmoid(0.5)
    assert (animal.given_parent, cat.given_parent, bengal.given_parent) == pytest.approx(given)
    assert bengal.absolute == pytest.approx(math.prod(given))
    assert cat.absolute == pytest.approx(given[0] * given[1])
    assert animal.rival is None
    assert bengal.rival is None
    assert cat.rival is not None
    assert cat.rival[0] == "dog"
    assert cat.rival[1] == pytest.approx(sigmoid(3.0))


# --- image labels


def explained_label(raw, rule, ancestors, label=BENGAL, **options):
    batch = ClassificationBatch(torch.zeros(1, 3, 1, 1), torch.zeros(1), torch.tensor([label]))
    output = HeadOutput.from_dense(raw, len(ANCHORS))
    settings = LossSettings(box_selection=rule, **options)
    explained = explain_label(output, batch, ANCHORS, PETS, ancestors, settings)
    return explained, yolo9000_loss(output, batch, ANCHORS, PETS, ancestors, settings), output


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", ["boxed_ancestor", "label", "largest"])
def test_the_chosen_box_is_that_of_the_loss_and_leads_the_ranking(rule, seed):
    raw = raw_head(6, grid=4, seed=seed, size=2.0)
    ancestors = PETS.deepest_ancestor_in(PETS.ancestors_or_self(torch.tensor([CAT])))
    explained, terms, output = explained_label(raw, rule, ancestors)
    label = torch.tensor([BENGAL])
    for name in ("boxed_ancestor", "label", "largest"):
        anchor, cell = select_boxes(output, label, ANCHORS, PETS, ancestors, name)
        box = explained.candidates[0].box if name == rule else explained.others[name]
        assert (box.anchor, 4 * box.row + box.column) == (int(anchor), int(cell))
    scores = [one.score for one in explained.candidates]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert len({one.box for one in explained.candidates}) == 5
    assert explained.terms == {name: value.item() for name, value in terms.items()}
    assert explained.path[-1].absolute == pytest.approx(explained.candidates[0].prob_label)
    node = {"boxed_ancestor": CAT, "label": BENGAL, "largest": None}[rule]
    assert explained.node == (None if node is None else PETS.names[node])
    for one in explained.candidates:
        x1, y1, x2, y2 = one.box.xyxy_norm
        place = [torch.tensor([v]) for v in (0, one.box.anchor, 4 * one.box.row + one.box.column)]
        probs = PETS.log_probs(output.class_logits.at(*place))[0].exp()
        ranked = min(1, (x2 - x1) * (y2 - y1))
        if node is not None:
            ranked = one.box.objectness * float(probs[node])
        assert one.score == pytest.approx(ranked, rel=1e-4)
        assert one.prob_label == pytest.approx(float(probs[BENGAL]), rel=1e-4)


def test_without_a_taught_ancestor_objectness_alone_chooses_and_may_learn_nothing():
    raw, nobody = raw_head(6), torch.full((6,), -1)
    explained, *_ = explained_label(raw, "boxed_ancestor", nobody, objectness_rule="darknet")
    assert explained.node is None
    assert explained.target is None
    for one in explained.candidates:
        assert one.score == pytest.approx(one.box.objectness)
    assert explained.candidates[0].box.objectness == pytest.approx(
        raw[0, [4, 15]].sigmoid().max().item()
    )


def test_only_boxes_that_are_sure_enough_are_candidates_for_the_largest():
    raw = raw_head(6)
    raw[0, [4, 15]] = -5.0
    raw[0, 4, 1, 1] = raw[0, 15, 0, 2] = 3.0
    explained, *_ = explained_label(raw, "largest", torch.arange(6))
    assert explained.any_sure
    assert {(one.box.anchor, one.box.row, one.box.column) for one in explained.candidates} == {
        (0, 1, 1), (1, 0, 2),
    }  # fmt: skip


# --- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detector of the quickstart's classes and anchors, of random weights."""
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
    torch.save(checkpoint_of(module, {}), path)
    return path, module


@pytest.fixture
def explain(checkpoint, workplace, capsys):
    def run(image: int, *options: str) -> str:
        arguments = [QUICK, "--checkpoint", str(checkpoint[0]), "--image", str(image), *options]
        code = main(["explain", *arguments])
        told = capsys.readouterr()
        assert code == 0, told.err
        return str(told.out)

    return run


def row(text: str, name: str) -> list[float]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return [float(part) for part in line.removeprefix(name).split()]


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_the_printed_terms_of_an_image_with_boxes_are_those_of_the_loss(
    explain, checkpoint, workplace
):
    module = checkpoint[1]
    source = ShapesDetection(16384, image_size=96, classes=[
        "right triangle", "rhombus", "semicircle", "pentagram", "Greek cross", "ring",
    ])  # fmt: skip
    source.bind(module.tree)
    batch = EvaluationDataset(source, 96)[[5]]
    batch.images_seen = 3200
    output = module.network(unit_range(batch.images))
    settings = LossSettings(anchor_prior_images=3200)
    anchors, nobody = module.network.anchors_wh_cell, torch.full((19,), -1)
    terms = yolo9000_loss(output, batch, anchors, module.tree, nobody, settings)
    values = [value.item() for value in terms.values()]
    text = explain(5)
    assert row(text, "image") == pytest.approx([*values, sum(values)], abs=1e-4)
    assert values[4] == 0
    names = [module.tree.names[label] for label in batch.labels[0].tolist() if label >= 0]
    found = assign(batch.boxes_cxcywh_norm, batch.labels, anchors, (6, 6))
    assert len(names) == len(found.cell) > 1
    for number, name in enumerate(names, start=1):
        coord, obj, kind, total = row(text, f"{number} {name}")
        assert coord + obj + kind == pytest.approx(total, abs=2e-4)
    shares = [row(text, f"{k + 1} {name}")[-1] for k, name in enumerate(names)]
    shares.append(row(text, "other boxes")[-1])
    assert sum(shares) == pytest.approx(row(text, "image")[-1], abs=5e-4)
    assert "loss_anchor_prior: over after the first 3,200 images" in text
    width, height = png_size(workplace / "explain-detection-5.png")
    assert width > 1500
    assert height > 1000
    assert "picture: explain-detection-5.png" in text


def test_the_anchor_loss_counts_where_the_images_seen_are_few(explain, workplace):
    text = explain(0, "--images-seen", "7", "--output", "a/b.jpg")
    assert row(text, "image")[4] == row(text, "other boxes")[1] > 0
    assert "7 of its first 3,200 images" in text
    assert (workplace / "a/b.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_a_checkpoint_of_a_training_says_how_many_images_it_saw():
    data = data_of(
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


def test_an_image_with_a_label_is_told_why_its_box_was_chosen(explain, checkpoint, workplace):
    text = explain(1, "--source", "classification")
    assert "triangle is the deepest ancestor of equilateral triangle that boxes taught" in text
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
    boxed[[module.tree.node(name) for name in names]] = True
    supervised = module.tree.ancestors_or_self(boxed.nonzero().flatten())
    ancestors = module.tree.deepest_ancestor_in(supervised)
    anchors, settings = module.network.anchors_wh_cell, LossSettings(anchor_prior_images=3200)
    terms = yolo9000_loss(output, batch, anchors, module.tree, ancestors, settings)
    values = [value.item() for value in terms.values()]
    assert row(text, "image") == pytest.approx([*values, sum(values)], abs=1e-4)
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


def test_what_the_checkpoint_saw_with_boxes_decides_and_the_recipes_rule(
    checkpoint, workplace, capsys
):
    held = torch.load(checkpoint[0], weights_only=True)
    held["state_dict"]["boxed"][checkpoint[1].tree.node("circle")] = True
    torch.save(held, "seen.ckpt")
    given = [QUICK, "--checkpoint", "seen.ckpt", "--image", "1", "--source", "classification"]
    assert main(["explain", *given]) == 0
    assert "plane figure is the deepest ancestor of equilateral" in capsys.readouterr().out
    assert main(["explain", *given, "--model.loss.box_selection", "label"]) == 0
    assert "box with the highest objectness x P(equilateral tri" in capsys.readouterr().out


def test_every_text_of_a_crowded_picture_is_on_it_and_none_covers_another(
    explain, monkeypatch, workplace
):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kept: list[Any] = []
    monkeypatch.setattr(explain_picture._Page, "save", lambda self, path: kept.append(self.figure))
    explain(4, "--data.detection.objects", "[14,16]", "--data.detection.radii", "[0.05,0.1]")
    explain(4, "--data.detection.objects", "[0,0]")
    explain(4, "--source", "classification")
    crowded, empty, _ = kept
    assert any("smaller ones" in text.get_text() for text in crowded.texts)
    assert any("no objects" in text.get_text() for text in empty.texts)
    for figure in kept:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
        boxes += [legend.get_window_extent() for legend in figure.legends]
        for box in boxes:
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y1 <= figure.bbox.y1
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other), (one, other)
        corners = [axes.get_window_extent() for axes in figure.axes]
        assert not any(box.overlaps(axes) for box in boxes for axes in corners)


def test_no_matplotlib_is_said_after_the_numbers(explain, checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["explain", QUICK, "--checkpoint", str(checkpoint[0]), "--image", "0"]) == 2
    told = capsys.readouterr()
    assert row(told.out, "image")
    assert "pip install 'yolo-lightning[plots]'" in told.err


# --- what is read


def test_images_are_fitted_as_for_validation_and_difficult_objects_left_out(tmp_path, write_voc):
    write_voc(tmp_path, "a", [("apple", 10, 10, 30, 40)], (64, 48))
    write_voc(tmp_path, "b", [("banana", 10, 10, 30, 40)], (64, 48), difficult=1)
    data = data_of(detection=VOCFolder(str(tmp_path)))
    batch, called = read_image(data, "detection", 0, 96)
    wanted = EvaluationDataset(data.detection, 96)[[0]]
    assert called.endswith("a.jpg")
    assert torch.equal(batch.images, wanted.images)
    assert isinstance(batch, DetectionBatch)
    assert torch.equal(batch.boxes_cxcywh_norm, wanted.boxes_cxcywh_norm)
    assert bool((read_image(data, "detection", 1, 96)[0].labels < 0).all())


def test_an_unreadable_image_is_refused_by_name(tmp_path):
    for name in ("a", "b"):
        write_xml(tmp_path / f"{name}.xml", "apple", (1, 1, 10, 20))
        plain(tmp_path / f"{name}.jpg")
    data = data_of(detection=VOCFolder(str(tmp_path)))
    (tmp_path / "b.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.jpg: not a readable image"):
        read_image(data, "detection", 1, 96)


def classifier(path) -> None:
    module = ClassifierModule(tree=str(REPO / "recipes/trees/shapes.tsv"), backbone=BACKBONE)
    torch.save(checkpoint_of(module, {}), path)


def detector(path, tree=None, anchors=((1.6, 1.7), (2.4, 2.5))) -> None:
    module = DetectorModule(
        tree=tree or str(REPO / "recipes/trees/shapes.tsv"), anchors_wh_cell=[*anchors],
        backbone=BACKBONE, head_channels=0, passthrough_channels=0,
    )  # fmt: skip
    torch.save(checkpoint_of(module, {}), path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "16384"], "--image is 16384; data.detection has 16384 images: 0 … 16383"),
        (["--image-size", "104"], "--image-size is 104; allowed: multiples of 16"),
        (["--images-seen", "-5"], "--images-seen is -5; allowed: 0 or more"),
        (["--output", "a.gif"], "--output is 'a.gif'; allowed endings: .png, "),
        (["--output", "recipes/quickstart.yaml/a.png"], "recipes/quickstart.yaml/a.png"),
        (["--model.loss.box_selection", "best"], "model.loss.box_selection: allowed: 'label'"),
    ],
)
def test_bad_input_is_one_message(options, message, checkpoint, workplace, capsys):
    given = ["--checkpoint", str(checkpoint[0]), "--image", "0", *options]
    assert main(["explain", QUICK, *given]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not list(workplace.glob("*.png"))


@pytest.fixture(scope="module")
def recipe():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPO)
        return DataCLI([QUICK])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, r"checkpoint '.*m\.ckpt' not found"),
        (classifier, "holds a classifier; explain takes a detector"),
        (
            lambda path: detector(path, ["a", "b"]),
            "data.tree differs from the checkpoint's: 19 entries in the recipe, 2 in",
        ),
        (
            lambda path: detector(path, anchors=((1.6, 1.7), (2.4, 2.6))),
            r"model.anchors_wh_cell differs from the checkpoint's: entry 2 is \[2.4, 2.5\] in",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(make, message, recipe, tmp_path):
    make(tmp_path / "m.ckpt")
    options = Namespace(checkpoint=str(tmp_path / "m.ckpt"), recipe=QUICK)
    with pytest.raises(InputError, match=message):
        network(options, recipe)


def test_a_recipe_of_a_classifier_is_refused(checkpoint, monkeypatch):
    monkeypatch.chdir(REPO)
    name = "recipes/classify_imagenet_224.yaml"
    run = DataCLI([name, "--model.tree=[a]"])
    with pytest.raises(InputError, match="ClassifierModule; explain takes a detector"):
        network(Namespace(checkpoint=str(checkpoint[0]), recipe=name), run)


def test_a_source_that_the_recipe_lacks_and_numbers_below_zero_are_refused():
    data = data_of(tree=str(REPO / "recipes/trees/shapes.tsv"), detection=ShapesDetection(8))
    message = "the recipe names no data.classification; it has: detection$"
    with pytest.raises(InputError, match=message):
        read_image(data, "classification", 0, 64)
    with pytest.raises(InputError, match="--image is -1; data.detection has 8 images: 0 … 7"):
        read_image(data, "detection", -1, 64)
