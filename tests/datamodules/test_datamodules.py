"""Sources and the combined datamodule."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.helpers.images import write_image
from tests.helpers.paths import REPO
from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.datamodules import (
    ClassificationAugmentation,
    CombinedDataModule,
    DetectionAugmentation,
    ImageFolder,
    ShapesDetection,
    ShapesImageLabels,
    VOCFolder,
)
from yolo_lightning.datamodules.shapes import SHAPES, _draw_shape, _draw_shapes
from yolo_lightning.errors import InputError
from yolo_lightning.tree.wordtree import WordTree

FRUIT = WordTree.from_names(["apple", "banana"])
SHAPES_TREE = REPO / "recipes/trees/shapes.tsv"


# --- shapes


def test_shapes_are_reproducible_different_and_inside_the_image():
    sources = [ShapesDetection(length=30, image_size=96, seed=seed) for seed in (0, 0, 1)]
    for source in sources:
        source.bind(WordTree.from_file(SHAPES_TREE))
    same, again, other = ([source.read(k) for k in range(30)] for source in sources)
    for a, b in zip(same, again, strict=True):
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.boxes_xyxy_px, b.boxes_xyxy_px)
        assert a.boxes_xyxy_px.min() >= 0
        assert a.boxes_xyxy_px.max() <= 96
        assert (a.boxes_xyxy_px[:, 2:] - a.boxes_xyxy_px[:, :2]).min() > 4
    assert not np.array_equal(same[0].image, same[1].image)
    assert not np.array_equal(same[0].image, other[0].image)
    assert {len(sample.labels) for sample in same} >= {1, 2, 3}


def test_boxes_are_tight_around_the_drawn_shape():
    rng = np.random.default_rng(0)
    for name in SHAPES:
        for _ in range(5):
            placed = _draw_shape(rng, name, 128, 30.0)
            rows, columns = np.nonzero(placed.mask > 127)
            drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert np.abs(drawn - placed.box_xyxy_px).max() < 2.5, name


def test_at_most_a_fifth_of_a_shape_is_covered():
    covered = []
    for seed in range(60):
        _, placed = _draw_shapes(np.random.default_rng(seed), list(SHAPES), 96, (0.13, 0.28))
        for k, shape in enumerate(placed):
            own = shape.mask > 127
            later = np.any([other.mask > 127 for other in placed[k + 1 :]] or [own & False], axis=0)
            covered.append((own & later).sum() / own.sum())
    assert max(covered) <= 0.2
    assert sum(share > 0.05 for share in covered) > 20  # crowded enough to need the rule


def test_images_without_shapes_and_invalid_options():
    source = ShapesDetection(length=20, objects=(0, 1), image_size=64)
    source.bind(WordTree.from_file(SHAPES_TREE))
    counts = [source.read(k).boxes_xyxy_px.shape for k in range(20)]
    assert {(0, 4), (1, 4)} == set(counts)
    for options in ({"length": 0}, {"objects": (3, 2)}, {"radii": (0.1, 0.9)}):
        with pytest.raises(InputError, match="shapes: .* allowed"):
            ShapesDetection(**options)


def test_labelled_shapes_have_every_class_equally_often():
    tree = WordTree.from_file(SHAPES_TREE)
    source = ShapesImageLabels(length=24, image_size=64)
    source.bind(tree)
    labels = [source.read(k)[1] for k in range(24)]
    assert sorted(set(labels)) == sorted(tree.leaves.tolist())
    assert source.read(0)[0].shape == (64, 64, 3)


def test_unknown_shape_raises():
    with pytest.raises(InputError, match="class 'sqare' cannot be drawn; did you mean 'square'"):
        ShapesDetection(classes=["sqare"])


# --- Pascal VOC


def test_voc_boxes_become_zero_based_corners(tmp_path, write_voc):
    write_voc(tmp_path, "a", [("apple", 1, 1, 10, 20), ("banana", 5, 6, 64, 48)])
    source = VOCFolder(str(tmp_path))
    source.bind(FRUIT)
    sample = source.read(0)
    assert sample.boxes_xyxy_px.tolist() == [[0, 0, 10, 20], [4, 5, 64, 48]]
    assert sample.labels.tolist() == [0, 1]
    assert source.nodes.tolist() == [0, 1]
    assert source.faults == sample.faults == []


@pytest.mark.parametrize("layout", ["devkit", "small letters", "folder a split"])
def test_voc_layouts(tmp_path, write_voc, layout):
    if layout == "folder a split":
        write_voc(tmp_path / "train", "a", [("apple", 1, 1, 9, 9)])
        write_voc(tmp_path / "test", "b", [("apple", 1, 1, 9, 9)])
    else:
        xml, images = {
            "devkit": ("Annotations", "JPEGImages"),
            "small letters": ("annotations", "images"),
        }[layout]
        for name in "ab":
            write_voc(tmp_path / xml, name, [("apple", 1, 1, 9, 9)], images=f"../{images}")
        (tmp_path / "ImageSets/Main").mkdir(parents=True)
        (tmp_path / "ImageSets/Main/train.txt").write_text("a\n\n")
    source = VOCFolder(str(tmp_path), split="train")
    source.bind(FRUIT)
    assert [source.image_path(k).stem for k in range(len(source))] == ["a"]


def test_voc_faults_are_repaired_or_skipped_and_reported(tmp_path, write_voc):
    write_voc(tmp_path, "zero", [("apple", 1, 1, 9, 9)], stated=(0, 0))
    write_voc(tmp_path, "lies", [("apple", 1, 1, 90, 40)], stated=(500, 300))
    write_voc(tmp_path, "empty box", [("apple", 9, 9, 9, 20), ("banana", 1, 1, 5, 5)])
    write_voc(tmp_path, "outside", [("apple", 100, 100, 120, 120)])
    write_voc(tmp_path, "hard", [("apple", 1, 1, 9, 9)], difficult=1)
    write_voc(tmp_path, "gone", [("apple", 1, 1, 9, 9)])
    (tmp_path / "gone.jpg").unlink()
    (tmp_path / "broken.xml").write_text("<annotation><object>")
    source = VOCFolder(str(tmp_path))
    source.bind(FRUIT)
    samples = {source.image_path(k).stem: source.read(k) for k in range(len(source))}
    message = "\n".join(source.faults)
    assert "zero.xml: gives the size as 0 x 0" in message
    assert "empty box.xml: object 1 has no area, skipped" in message
    assert "gone.xml: its image is missing" in message
    assert "broken.xml: not readable XML" in message
    assert samples["lies"].boxes_xyxy_px.tolist() == [[0, 0, 64, 40]]
    assert "is 64 x 48, but annotated as 500 x 300" in samples["lies"].faults[0]
    assert len(samples["outside"].labels) == 0
    assert "outside.xml: object 1 lies outside the image, skipped" in message
    assert samples["hard"].difficult.tolist() == [True]
    assert len(samples) == 5


def test_voc_errors_name_folder_label_and_split(tmp_path, write_voc):
    with pytest.raises(InputError, match="VOC folder '.*nowhere' not found"):
        VOCFolder(str(tmp_path / "nowhere")).bind(FRUIT)
    file = write_voc(tmp_path / "train", "a", [("appel", 1, 1, 9, 9)])
    with pytest.raises(
        InputError,
        match=f"{file}: object 1: label 'appel' is not in the tree; did you mean 'apple'\\?",
    ):
        VOCFolder(str(tmp_path), "train").bind(FRUIT)
    with pytest.raises(InputError, match="no split 'val'; found: train"):
        VOCFolder(str(tmp_path), "val").bind(FRUIT)


# --- folders of classes


def test_image_folder_reads_classes_at_any_depth(tmp_path):
    write_image(tmp_path / "banana" / "deep" / "x.JPG", value=10)
    write_image(tmp_path / "apple" / "y.png", value=200)
    (tmp_path / "apple" / "notes.txt").write_text("no image")
    source = ImageFolder(str(tmp_path))
    source.bind(FRUIT)
    assert [source.read(k)[1] for k in range(len(source))] == [0, 1]
    assert source.read(0)[0].mean() > 190


def test_image_folder_errors(tmp_path):
    with pytest.raises(InputError, match="contains no class folders"):
        ImageFolder(str(tmp_path)).bind(FRUIT)
    write_image(tmp_path / "cherry" / "x.png")
    with pytest.raises(
        InputError, match="label 'cherry' is not in the tree; allowed: apple, banana"
    ):
        ImageFolder(str(tmp_path)).bind(FRUIT)


# --- combined


def combined(**options) -> CombinedDataModule:
    defaults = {
        "tree": str(SHAPES_TREE),
        "detection": ShapesDetection(length=10, image_size=64),
        "classification": ShapesImageLabels(length=12, image_size=64),
        "validation": ShapesDetection(length=5, image_size=64, seed=9),
        "detection_batch_size": 4,
        "classification_batch_size": 6,
        "image_size": 64,
        "detection_augmentation": DetectionAugmentation(),
        "classification_augmentation": ClassificationAugmentation(),
        "num_workers": 0,
    }
    data = CombinedDataModule(**{**defaults, **options})
    data.setup("fit")
    return data


def test_batches_alternate_and_have_the_documented_shapes():
    batches = list(combined().train_dataloader())
    assert len(batches) == 6
    for step, batch in enumerate(batches):
        assert batch.step == step
        assert batch.images.dtype == torch.uint8
        if step % 2 == 0:
            assert isinstance(batch, DetectionBatch)
            assert batch.images.shape == (4, 3, 64, 64)
            assert batch.boxes_cxcywh_norm.shape == (4, 8, 4)
            assert batch.labels.shape == (4, 8)
            real = batch.labels >= 0
            assert batch.boxes_cxcywh_norm[real].min() > 0
            assert batch.boxes_cxcywh_norm[~real].abs().sum() == 0
        else:
            assert isinstance(batch, ClassificationBatch)
            assert batch.images.shape == (6, 3, 64, 64)
            assert batch.labels.shape == (6,)
    assert [batch.images_seen for batch in batches[:3]] == [0, 4, 10]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers):
    alone, helped = (list(combined(num_workers=n).train_dataloader()) for n in (0, workers))
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.labels, b.labels)


def test_unreadable_image_is_replaced_and_reported(tmp_path, write_voc):
    for name in "abc":
        write_voc(tmp_path, name, [("apple", 1, 1, 30, 30)])
    (tmp_path / "b.jpg").write_bytes(b"not an image")
    data = combined(
        tree=["apple", "banana"],
        detection=VOCFolder(str(tmp_path)),
        classification=None,
        validation=VOCFolder(str(tmp_path)),
        detection_batch_size=3,
    )
    (batch,) = list(data.train_dataloader())
    assert isinstance(batch, DetectionBatch)
    assert (batch.labels >= 0).sum(1).tolist() == [1, 1, 1]
    (fault,) = batch.faults
    assert "b.jpg: not a readable image (allowed: JPEG" in fault
    assert fault.endswith("another image is used instead")
    (evaluated,) = list(data.val_dataloader())
    assert sorted(evaluated.sample_ids.tolist()) == [-1, 0, 2]
    assert "left out of the evaluation" in evaluated.faults[0]


def test_difficult_objects_are_evaluated_but_not_trained(tmp_path, write_voc):
    write_voc(tmp_path, "a", [("apple", 1, 1, 30, 30)], difficult=1)
    write_voc(tmp_path, "b", [("apple", 1, 1, 30, 30)])
    source = VOCFolder(str(tmp_path))
    data = combined(
        tree=["apple"], detection=source, classification=None, validation=source,
        detection_batch_size=2, detection_augmentation=None,
    )  # fmt: skip
    (trained,), (evaluated,) = list(data.train_dataloader()), list(data.val_dataloader())
    assert isinstance(trained, DetectionBatch)
    assert isinstance(evaluated, DetectionBatch)
    in_order = trained.sample_ids.argsort()
    assert (trained.labels >= 0).sum(dim=1)[in_order].tolist() == [0, 1]
    assert evaluated.difficult.sum(dim=1).tolist() == [1, 0]
    assert (evaluated.labels >= 0).sum() == 2


def test_exif_orientation_is_applied(tmp_path):
    from yolo_lightning.images import read_image

    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, :20] = 255
    ok, jpeg = cv2.imencode(".jpg", image)
    assert ok
    exif = (
        bytes.fromhex("ffe1002245786966000049492a00080000000100120103000100000006000000")
        + b"\0\0\0\0"
    )
    file = Path(tmp_path / "turned.jpg")
    file.write_bytes(bytes(jpeg[:2]) + exif + bytes(jpeg[2:]))
    turned, size_hw = read_image(file)
    assert turned.shape == (80, 40, 3)
    assert size_hw == (80, 40)
    assert turned[:18].mean() > 230


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "data.image_size is 100; allowed: multiples of 32 up to 2048"),
        ({"image_size": 2080}, "data.image_size is 2080; allowed: multiples of 32 up to 2048"),
        ({"detection_batch_size": 0}, "data.detection_batch_size is 0; allowed: 1 … 1,000,000"),
        ({"classification_batches_per_detection_batch": -1}, "is -1; allowed: 0 … 1,000,000"),
    ],
)
def test_sizes_out_of_range_raise(options, message):
    with pytest.raises(InputError, match=message):
        combined(**options)


def test_file_sources_in_every_role(tmp_path, write_voc):
    for split in ("train", "val", "test"):
        write_voc(tmp_path / split, "a", [("apple", 1, 1, 30, 30)])
    write_image(tmp_path / "labels" / "banana" / "x.png")
    data = combined(
        tree=["apple", "banana"],
        detection=VOCFolder(str(tmp_path), "train"),
        classification=ImageFolder(str(tmp_path / "labels")),
        validation=VOCFolder(str(tmp_path), "val"),
        test=VOCFolder(str(tmp_path), "test"),
        detection_batch_size=1,
        classification_batch_size=1,
    )
    kinds = [type(batch) for batch in data.train_dataloader()]
    assert kinds == [DetectionBatch, ClassificationBatch]
    data.setup("test")
    assert len(list(data.test_dataloader())) == 1
    assert data.source_faults == []


def test_validate_and_test_without_images_raise():
    data = combined(validation=None)
    with pytest.raises(InputError, match=r"data\.validation is not set"):
        data.setup("validate")
    with pytest.raises(InputError, match="data.test and data.validation are not set"):
        data.test_dataloader()


def test_without_a_classification_source_all_batches_are_detection_batches():
    batches = list(combined(classification=None).train_dataloader())
    assert {type(batch) for batch in batches} == {DetectionBatch}


def test_moving_a_batch_keeps_fields_that_are_not_tensors():
    batch = next(iter(combined().train_dataloader()))
    batch.faults = ["x"]
    moved = batch.to("meta")
    assert moved.images.device.type == "meta"
    assert moved.faults == ["x"]
    assert moved.images_seen == batch.images_seen


def test_boxes_map_back_from_the_letterbox_to_the_original(tmp_path, write_voc):
    from yolo_lightning.detections import to_original_px

    write_voc(tmp_path, "a", [("apple", 21, 31, 60, 70), ("apple", 1, 1, 333, 500)], (333, 500))
    source = VOCFolder(str(tmp_path))
    data = combined(
        tree=["apple"], detection=source, validation=source, classification=None, image_size=416
    )
    (batch,) = list(data.val_dataloader())
    assert isinstance(batch, DetectionBatch)
    boxes = to_original_px(
        batch.boxes_cxcywh_norm[0, :2],
        torch.zeros(2, dtype=torch.long),
        batch.sizes_hw_orig,
        batch.images.shape[-2:],
    )
    expected = torch.tensor([[20.0, 30, 60, 70], [0, 0, 333, 500]])
    torch.testing.assert_close(boxes, expected, atol=1e-3, rtol=0)
