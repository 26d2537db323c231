"""Datasets in files: every layout, every fault that files have, indices, and exact order."""

import json
import mmap
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin
from scipy.io import savemat

from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.datamodules import (
    ClassificationAugmentation,
    COCOJson,
    CombinedDataModule,
    DetectionAugmentation,
    ILSVRCDetection,
    ImageFolder,
    ImageNet,
    LabelCSV,
    VOCFolder,
    YOLOText,
    annotated,
    index,
)
from yolo_lightning.datamodules.batching import JointDataset
from yolo_lightning.datamodules.images import UnreadableSample, read_header, read_image
from yolo_lightning.datamodules.recognise import detection_source, label_source
from yolo_lightning.errors import InputError
from yolo_lightning.wordtree import WordTree

FRUIT = WordTree.flat(["apple", "banana"])
WIDTH, HEIGHT = 64, 48


def picture(width: int = WIDTH, height: int = HEIGHT) -> Any:
    """Return four quarters, each of one colour: nothing that JPEG blurs, nothing symmetric."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[: height // 2, : width // 2] = 200, 40, 40
    image[: height // 2, width // 2 :] = 40, 180, 60
    image[height // 2 :, : width // 2] = 60, 60, 220
    image[height // 2 :, width // 2 :] = 230, 220, 70
    return image


def save(path: Path, image: Any = None, **options: Any) -> Path:
    """Save RGB pixels, or a Pillow image, in the format that the ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = picture() if image is None else image
    if not isinstance(whole, Image.Image):
        whole = Image.fromarray(whole)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        options = {"quality": 95, "subsampling": 0, **options}
    whole.save(path, **options)
    return path


def plain(path: Path, value: int, width: int = WIDTH, height: int = HEIGHT) -> Path:
    """Save an image of one grey."""
    return save(path, np.full((height, width, 3), value, np.uint8))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def bound(source: Any, tree: WordTree = FRUIT) -> Any:
    source.bind(tree)
    return source


def paths_of(source: Any, root: Path) -> list[str]:
    return [os.path.relpath(source.image_path(k), root) for k in range(len(source))]


def data_of(**options: Any) -> CombinedDataModule:
    defaults = {"tree": ["apple", "banana"], "image_size": 64, "num_workers": 0}
    data = CombinedDataModule(**{**defaults, **options})
    data.setup("fit")
    return data


# --- images


def bomb(path: Path) -> Path:
    """Write a whole PNG of 20,000 x 20,000 px, one bit each: 50 kB for 1.2 GB once decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    deflate = zlib.compressobj(1)
    rows = bytes(2501 * 1000)
    packed = b"".join(deflate.compress(rows) for _ in range(20)) + deflate.flush()
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", packed), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def cut_off(path: Path, share: float = 0.6, **options: Any) -> Path:
    data = save(path, np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8), **options)
    whole = data.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    return path


BAD = {
    "cut-off JPEG": lambda folder: cut_off(folder / "bad.jpg"),
    "almost whole JPEG": lambda folder: cut_off(folder / "bad.jpg", 0.98),
    "cut-off progressive JPEG": lambda folder: cut_off(folder / "bad.jpg", progressive=True),
    "cut-off PNG": lambda folder: cut_off(folder / "bad.png"),
    "cut-off BMP": lambda folder: cut_off(folder / "bad.bmp"),
    "cut-off WebP": lambda folder: cut_off(folder / "bad.webp"),
    "zero bytes": lambda folder: write(folder / "bad.jpg", ""),
    "text": lambda folder: write(folder / "bad.jpg", "<html>404 not found</html>\n" * 50),
    "bomb": lambda folder: bomb(folder / "bad.png"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_broken_image_is_refused_by_name(tmp_path, kind):
    file = BAD[kind](tmp_path)
    with pytest.raises(UnreadableSample) as caught:
        read_image(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("kind", BAD)
def test_a_broken_image_is_replaced_by_the_next_in_training(tmp_path, kind):
    folder = tmp_path / "images"
    plain(folder / "a.png", 40)
    bad = BAD[kind](folder)
    plain(folder / "c.png", 200)
    for name in ("a", "bad", "c"):
        write(tmp_path / "labels" / f"{name}.txt", f"{int(name == 'c')} 0.5 0.5 0.5 0.5\n")
    table = f"images/a.png,apple\nimages/{bad.name},apple\nimages/c.png,banana\n"
    data = data_of(
        detection=YOLOText(str(tmp_path), names=["apple", "banana"]),
        classification=LabelCSV(str(write(tmp_path / "table.csv", table))),
        detection_batch_size=3,
        classification_batch_size=3,
    )
    batches = list(data.train_dataloader())
    assert [type(batch) for batch in batches] == [DetectionBatch, ClassificationBatch]
    for batch in batches:
        rows = {number: row for row, number in enumerate(batch.sample_ids.tolist())}
        assert sorted(rows) == [0, 1, 2]
        middle = batch.images[:, 0, 32, 32]
        assert middle[[rows[0], rows[1], rows[2]]].tolist() == [40, 200, 200]
        labels = batch.labels.reshape(3, -1)[:, 0]
        assert labels[[rows[0], rows[1], rows[2]]].tolist() == [0, 1, 1]
        (fault,) = batch.faults
        assert fault.startswith(f"{bad}: ")
        assert fault.endswith("; the next image stands in")


def test_a_broken_image_counts_for_nothing_in_the_evaluation_of_labels(tmp_path):
    plain(tmp_path / "apple/a.png", 40)
    bad = write(tmp_path / "apple/b.jpg", "")
    plain(tmp_path / "banana/c.png", 200)
    source = ImageFolder(str(tmp_path))
    data = data_of(classification=source, validation=source, classification_batch_size=3)
    (batch,) = list(data.val_dataloader())
    assert isinstance(batch, ClassificationBatch)
    assert batch.sample_ids.tolist() == [0, -1, 2]
    assert batch.faults == [f"{bad}: not a readable image; left out of the evaluation"]


def test_an_image_that_went_after_it_was_indexed_is_replaced(tmp_path):
    plain(tmp_path / "apple/a.png", 40)
    gone = plain(tmp_path / "banana/b.png", 200)
    data = data_of(classification=ImageFolder(str(tmp_path)), classification_batch_size=2)
    gone.unlink()
    (batch,) = list(data.train_dataloader())
    assert batch.labels.tolist() == [0, 0]
    assert batch.faults == [
        f"{gone}: cannot be read (No such file or directory); the next image stands in"
    ]


def test_training_stops_where_no_image_can_be_read(tmp_path):
    for k in range(3):
        write(tmp_path / f"apple/{k}.jpg", "")
    data = data_of(classification=ImageFolder(str(tmp_path)), classification_batch_size=1)
    with pytest.raises(InputError, match=r"no readable image among 3 in a row: .*\.jpg: not a"):
        list(data.train_dataloader())


def test_a_bomb_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    def decode(*args: Any, **options: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(cv2, "imdecode", decode)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    file = bomb(tmp_path / "bomb.png")
    for read in (read_header, read_image):
        with pytest.raises(UnreadableSample, match=r"bomb\.png: "):
            read(file)


def test_a_refusal_for_size_names_the_limit_that_holds(tmp_path):
    file = bomb(tmp_path / "bomb.png")
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", 14_000, 14_000)  # 196 million: above 178, below twice that
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(bytes(data))
    with pytest.raises(UnreadableSample, match="more than 17[89] million"):
        read_image(file)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
def test_a_header_is_read_without_decoding(tmp_path, monkeypatch, suffix):
    file = save(tmp_path / f"a.{suffix}")

    def load(*args: Any) -> None:
        raise AssertionError("decoded")

    for kind in (ImageFile.ImageFile, PngImagePlugin.PngImageFile):
        monkeypatch.setattr(kind, "load", load)
    assert read_header(file).size_hw == (HEIGHT, WIDTH)


def alpha() -> Any:
    """Return an image whose right half is transparent."""
    opacity = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    opacity[:, WIDTH // 2 :] = 0
    return np.concatenate([picture(), opacity], axis=2)


def grey_of(image: Any) -> Any:
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def cmyk(path: Path) -> Path:
    return save(path, Image.fromarray(picture()).convert("CMYK"))


SIXTEEN = np.repeat(np.array([[0x0000, 0x1234, 0x80FF, 0xFFFF]], np.uint16), 4, axis=0)
SIXTEEN_RGB = np.stack([SIXTEEN, SIXTEEN[:, ::-1], SIXTEEN // 2], axis=-1)


def sixteen(path: Path, pixels: Any) -> Path:
    assert cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    return path


GOOD: dict[str, tuple[Any, Any, float]] = {
    "JPEG": (lambda folder: save(folder / "a.jpg"), picture(), 12),
    "grey JPEG": (lambda f: save(f / "a.jpg", Image.fromarray(picture()).convert("L")),
                  grey_of(picture()), 12),
    "CMYK JPEG": (lambda folder: cmyk(folder / "a.jpg"), picture(), 12),
    "16-bit PNG": (lambda folder: sixteen(folder / "a.png", SIXTEEN_RGB), SIXTEEN_RGB / 257, 1),
    "16-bit grey PNG": (lambda folder: sixteen(folder / "a.png", SIXTEEN),
                        np.repeat(SIXTEEN[..., None] / 257, 3, axis=2), 1),
    "palette PNG": (lambda f: save(f / "a.png", Image.fromarray(picture()).quantize(16)),
                    picture(), 1),
    "transparent palette PNG": (
        lambda f: save(f / "a.png", Image.fromarray(picture()).quantize(16), transparency=0),
        picture(), 1),
    "PNG with alpha": (lambda folder: save(folder / "a.png", alpha()), picture(), 0),
    "WebP": (lambda folder: save(folder / "a.webp", lossless=True), picture(), 0),
    "WebP with alpha": (lambda f: save(f / "a.webp", alpha(), lossless=True, exact=True),
                        picture(), 0),
    "BMP": (lambda folder: save(folder / "a.bmp"), picture(), 0),
    "1 x 1 JPEG": (lambda folder: plain(folder / "a.jpg", 90, 1, 1), np.full((1, 1, 3), 90), 1),
    "1 x 1 PNG": (lambda folder: plain(folder / "a.png", 90, 1, 1), np.full((1, 1, 3), 90), 0),
    "PNG called .jpg": (lambda f: save(f / "b.png").rename(f / "a.jpg"), picture(), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_an_odd_image_becomes_rgb(tmp_path, kind):
    make, expected, tolerance = GOOD[kind]
    image, size_hw = read_image(make(tmp_path))
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert size_hw == expected.shape[:2]
    assert np.abs(image.astype(float) - expected).max() <= tolerance


def test_a_cmyk_image_is_what_pillow_makes_of_it(tmp_path):
    inks = np.zeros((48, 64, 4), np.uint8)
    inks[:24], inks[24:] = (200, 30, 90, 60), (10, 120, 250, 5)
    file = save(tmp_path / "a.jpg", Image.frombytes("CMYK", (64, 48), inks.tobytes()))
    with Image.open(file) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.abs(read_image(file)[0].astype(int) - expected).max() <= 2


@pytest.mark.parametrize("kind", GOOD)
def test_an_odd_image_serves_in_training(tmp_path, kind):
    make, expected, tolerance = GOOD[kind]
    (tmp_path / "apple").mkdir()
    make(tmp_path / "apple")
    data = data_of(
        classification=ImageFolder(str(tmp_path)),
        classification_batch_size=1,
        image_size=32,
    )
    (batch,) = list(data.train_dataloader())
    assert batch.faults == []
    top = (32 - 32 * expected.shape[0] // expected.shape[1]) // 2  # grey of the letterbox
    corner = batch.images[0, :, top + 1, 1].numpy()
    assert np.abs(corner - expected[0, 0]).max() <= max(tolerance, 1)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path / f"a.{suffix}", exif=exif)
    with Image.open(file) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB")).astype(int)
    turned = orientation >= 5
    image, size_hw = read_image(file)
    assert size_hw == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))
    assert read_header(file).size_hw == size_hw
    assert image.shape[:2] == size_hw
    assert np.abs(image - expected).max() < 12


def test_a_turned_jpeg_is_turned_when_it_is_shrunk_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, size_hw = read_image(save(tmp_path / "a.jpg", exif=exif), least_side=12)
    assert size_hw == (64, 48)
    assert image.shape == (16, 12, 3)
    # a quarter clockwise: what was below on the left is above on the left now
    assert np.abs(image[2, 2].astype(int) - (60, 60, 220)).max() < 12


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_size_and_pixels_agree_on_an_orientation_that_only_xmp_tells(tmp_path, suffix):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image, size_hw = read_image(save(tmp_path / f"a.{suffix}", xmp=xmp))
    assert image.shape[:2] == size_hw


def test_boxes_lie_on_the_upright_image_in_training_and_evaluation(tmp_path):
    upright = np.full((64, 32, 3), 20, np.uint8)
    upright[8:24, 16:28] = 240
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter clockwise
    save(tmp_path / "images/a.jpg", np.rot90(upright).copy(), exif=exif)
    write(tmp_path / "labels/a.txt", f"0 {22 / 32} {16 / 64} {12 / 32} {16 / 64}\n")
    source = YOLOText(str(tmp_path), names=["apple"])
    data = data_of(detection=source, validation=source, detection_batch_size=1)
    assert source.read(0).size_hw_orig == (64, 32)
    assert [sizes.tolist() for sizes in source.shapes_wh_px()] == [[[12, 16]], [[32, 64]]]
    for loader in (data.train_dataloader(), data.val_dataloader()):
        (batch,) = list(loader)
        assert isinstance(batch, DetectionBatch)
        # 64 x 32 in 64 x 64: 16 px of grey at the left
        expected = torch.tensor([(16 + 22) / 64, 16 / 64, 12 / 64, 16 / 64])
        torch.testing.assert_close(batch.boxes_cxcywh_norm[0, 0], expected)
        assert batch.images[0, :, 9:23, 33:43].min() > 225
        assert batch.images[0, :, 27:60, 17:47].max() < 35
    assert batch.sizes_hw_orig.tolist() == [[64, 32]]


# --- large JPEGs are decoded at a part of their size


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A JPEG of 1600 x 1200 px that is darker towards the upper left."""
    across = np.linspace(20, 220, 1600)[None, :, None] * np.linspace(0.5, 1, 1200)[:, None, None]
    image = np.broadcast_to(across, (1200, 1600, 3)).astype(np.uint8)
    return save(tmp_path_factory.mktemp("large") / "a.jpg", image.copy())


@pytest.mark.parametrize(
    ("least_side", "expected"),
    [
        (None, (1200, 1600)),
        (601, (1200, 1600)),
        (600, (600, 800)),
        (301, (600, 800)),
        (300, (300, 400)),
        (151, (300, 400)),
        (150, (150, 200)),
        (10, (150, 200)),
    ],
)
def test_a_large_jpeg_is_shrunk_as_far_as_is_allowed(large, least_side, expected):
    image, size_hw = read_image(large, least_side)
    assert image.shape[:2] == expected
    assert size_hw == (1200, 1600)
    whole = cv2.resize(read_image(large)[0], expected[::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(whole.astype(int) - image).mean() < 2


def test_only_jpegs_are_shrunk(tmp_path):
    for suffix in ("png", "webp", "bmp"):
        assert read_image(plain(tmp_path / f"a.{suffix}", 9, 80, 80), 10)[0].shape == (80, 80, 3)


def test_boxes_follow_an_image_that_was_shrunk(large, tmp_path, write_voc):
    write_voc(tmp_path, "a", [("apple", 401, 301, 1200, 900)], (8, 8), (1600, 1200))
    shutil.copy(large, tmp_path / "a.jpg")
    source = bound(VOCFolder(str(tmp_path)))
    for least_side, scale in ((None, 1), (600, 2), (300, 4)):
        sample = source.read(0, least_side)
        assert sample.image.shape == (1200 // scale, 1600 // scale, 3)
        assert sample.size_hw_orig == (1200, 1600)
        expected = np.array([[400, 300, 1200, 900]]) / scale
        assert sample.boxes_xyxy_px.tolist() == expected.tolist()
        assert sample.faults == []


def test_shrinking_moves_no_box_of_a_batch(tmp_path, monkeypatch):
    # sides that nothing divides: the worst case of rounding
    ramp = np.broadcast_to(np.linspace(0, 255, 1601)[None, :, None], (1203, 1601, 3))
    save(tmp_path / "images/a.jpg", ramp.astype(np.uint8))
    write(tmp_path / "labels/a.txt", "0 0.5 0.5 1 1\n1 0.2 0.7 0.1 0.05\n")
    source = YOLOText(str(tmp_path), names=["apple", "banana"])
    data = data_of(detection=source, validation=source, detection_batch_size=1, image_size=288)
    sides: list[int] = []

    def batches(shrink: bool) -> list[Any]:
        def read(path: Path, least_side: int | None = None) -> Any:
            found = read_image(path, least_side if shrink else None)
            sides.append(found[0].shape[1])
            return found

        monkeypatch.setattr(annotated, "read_image", read)
        return [next(iter(loader)) for loader in (data.train_dataloader(), data.val_dataloader())]

    shrunk, whole = batches(True), batches(False)
    assert sides == [401, 401, 1601, 1601]
    for a, b in zip(shrunk, whole, strict=True):
        torch.testing.assert_close(a.boxes_cxcywh_norm, b.boxes_cxcywh_norm, atol=0.5 / 288, rtol=0)
        assert (a.images.float() - b.images.float()).abs().mean() < 2
    assert shrunk[1].sizes_hw_orig.tolist() == whole[1].sizes_hw_orig.tolist() == [[1203, 1601]]


# --- what annotations have wrong: Pascal VOC

Box = list[float]
GOOD_VOC = ("banana", 1, 1, 10, 20)
GOOD_BOX: Box = [0, 0, 10, 20]


def sizes_of(boxes: list[Box]) -> list[Box]:
    return [[x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes]


@pytest.mark.parametrize(
    ("box", "kept", "said"),
    [
        (("nan", 1, 9, 9), [], "has no usable box, skipped"),
        (("inf", 1, 9, 9), [], "has no usable box, skipped"),
        (("", 1, 9, 9), [], "has no usable box, skipped"),
        (("left", 1, 9, 9), [], "has no usable box, skipped"),
        ((9, 9, 20, 9), [], "has no area, skipped"),
        # pixels count from 1 and the last one is included, in whatever order corners stand
        ((40, 30, 11, 5), [[10, 4, 40, 30]], "has swapped corners, repaired"),
        ((40, 5, 11, 30), [[10, 4, 40, 30]], "has swapped corners, repaired"),
        ((65, 10, 80, 20), [], "lies outside the image, skipped"),
        ((-20, -20, -5, -5), [], "lies outside the image, skipped"),
        ((33, 25, 100, 90), [[32, 24, 64, 48]], "reaches over the edge, clipped"),
        ((-9, -9, 8, 8), [[0, 0, 8, 8]], "reaches over the edge, clipped"),
        # a pixel is rounding
        ((33, 25, 65, 49), [[32, 24, 64, 48]], None),
        ((0, 0, 8, 8), [[0, 0, 8, 8]], None),
    ],
)
def test_a_bad_voc_object(tmp_path, write_voc, box, kept, said):
    file = write_voc(tmp_path, "a", [("apple", *box), GOOD_VOC])
    source = bound(VOCFolder(str(tmp_path)))
    assert source.read(0).boxes_xyxy_px.tolist() == [*kept, GOOD_BOX]
    assert source.read(0).faults == []
    assert source.faults == ([f"{file}: object 1 {said}"] if said else [])
    assert source.shapes_wh_px()[0].tolist() == sizes_of([*kept, GOOD_BOX])


def test_a_voc_object_that_stands_twice_is_taken_once(tmp_path, write_voc):
    twice = ("apple", 5, 5, 9, 9)
    file = write_voc(tmp_path, "a", [twice, GOOD_VOC, twice, ("banana", 5, 5, 9, 9)])
    write_voc(tmp_path, "b", [twice])
    source = bound(VOCFolder(str(tmp_path)))
    assert source.read(0).boxes_xyxy_px.tolist() == [[4, 4, 9, 9], GOOD_BOX, [4, 4, 9, 9]]
    assert source.read(0).labels.tolist() == [0, 1, 1]
    assert len(source.read(1).labels) == 1
    assert source.faults == [f"{file}: object 3 stands there twice, one skipped"]


def test_voc_objects_without_name_or_box_and_empty_files_are_named(tmp_path, write_voc):
    file = write_voc(tmp_path, "a", [GOOD_VOC])
    text = file.read_text()
    extra = "<object><name> </name></object><object><name>apple</name></object></annotation>"
    file.write_text(text.replace("</annotation>", extra))
    write_voc(tmp_path, "empty", [])
    empty = write(tmp_path / "zero.xml", "")
    plain(tmp_path / "zero.jpg", 9)
    source = bound(VOCFolder(str(tmp_path)))
    assert paths_of(source, tmp_path) == ["a.jpg", "empty.jpg"]
    assert source.read(0).boxes_xyxy_px.tolist() == [GOOD_BOX]
    assert source.read(1).boxes_xyxy_px.shape == (0, 4)
    said = sorted(source.faults)
    assert said[0] == f"{file}: object 2 has no name, skipped"
    assert said[1] == f"{file}: object 3 has no usable box, skipped"
    assert said[2].startswith(f"{empty}: not readable XML")
    assert len(said) == 3


def test_voc_takes_the_image_of_the_files_own_name_first(tmp_path, write_voc):
    file = write_voc(tmp_path, "a", [GOOD_VOC])
    (tmp_path / "b.xml").write_text(file.read_text())  # a copy, with a.jpg still inside
    plain(tmp_path / "b.png", 9)
    plain(tmp_path / "c_named_within.png", 9)
    text = file.read_text().replace("a.jpg", "C:\\photos\\c_named_within.png")
    (tmp_path / "c.xml").write_text(text)
    source = bound(VOCFolder(str(tmp_path)))
    assert paths_of(source, tmp_path) == ["a.jpg", "b.png", "c_named_within.png"]


def test_a_stated_size_that_is_wrong_costs_no_object(tmp_path, write_voc):
    # width and height are swapped, as programs write that overlook how a photo is turned
    write_voc(tmp_path, "a", [("apple", 51, 11, 60, 40), GOOD_VOC], (64, 48), (48, 64))
    source = bound(VOCFolder(str(tmp_path)))
    assert source.read(0).boxes_xyxy_px.tolist() == [[50, 10, 60, 40], GOOD_BOX]
    assert "is 64 x 48, its annotation says 48 x 64" in "".join(
        [*source.faults, *source.read(0).faults]
    )


# --- what annotations have wrong: COCO

CATEGORIES = [{"id": 3, "name": "banana"}, {"id": 90, "name": "apple"}]
GOOD_COCO = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [0, 0, 10, 20]}


def write_coco(
    file: Path,
    annotations: list[Any],
    images: list[Any] | None = None,
    categories: Any = CATEGORIES,
) -> Path:
    if images is None:
        images = [{"id": 5, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write(file, json.dumps(content))


@pytest.mark.parametrize(
    ("bbox", "kept", "said"),
    [
        ([float("nan"), 1, 9, 9], [], "has no usable box, skipped"),
        ([1, 1, float("inf"), 9], [], "has no usable box, skipped"),
        ([1, 1, 9], [], "has no usable box, skipped"),
        ([1, 1, "wide", 9], [], "has no usable box, skipped"),
        (None, [], "has no usable box, skipped"),
        ([], [], "has no usable box, skipped"),
        ([5, 5, 0, 10], [], "has no area, skipped"),
        ([40, 30, -29, -25], [[11, 5, 40, 30]], "has swapped corners, repaired"),
        ([70, 5, 10, 10], [], "lies outside the image, skipped"),
        ([-20, 5, 20, 10], [], "lies outside the image, skipped"),
        ([32, 24, 100, 100], [[32, 24, 64, 48]], "reaches over the edge, clipped"),
        ([32, 24, 33, 24], [[32, 24, 64, 48]], None),
        ([1.5, 2.25, 10, 10], [[1.5, 2.25, 11.5, 12.25]], None),
    ],
)
def test_a_bad_coco_annotation(tmp_path, bbox, kept, said):
    plain(tmp_path / "a.jpg", 90)
    bad = {"id": 7, "image_id": 5, "category_id": 90, "bbox": bbox}
    file = write_coco(tmp_path / "ann.json", [bad, GOOD_COCO])
    source = bound(COCOJson(str(file)))
    assert source.read(0).boxes_xyxy_px.tolist() == [*kept, GOOD_BOX]
    assert source.faults == ([f"{file}: annotation 7 (a.jpg) {said}"] if said else [])
    assert source.shapes_wh_px()[0].tolist() == sizes_of([*kept, GOOD_BOX])


def test_coco_annotations_of_nothing_known_are_skipped_and_named(tmp_path):
    plain(tmp_path / "a.jpg", 90)
    images = [
        {"id": 5, "file_name": "a.jpg"},
        {"id": 6, "file_name": "gone.jpg"},
        {"id": 5, "file_name": "a.jpg"},
        {"id": 8},
    ]
    box = {"bbox": [1, 1, 5, 5]}
    annotations = [
        GOOD_COCO,
        {**GOOD_COCO, "id": 2, "category_id": 1},
        {**GOOD_COCO, "id": 3},
        {**box, "id": 4, "image_id": 6, "category_id": 3},
        {**box, "id": 5, "image_id": 77, "category_id": 3},
        {**box, "id": 6, "image_id": 5},
    ]
    file = write_coco(tmp_path / "ann.json", annotations, images)
    source = bound(COCOJson(str(file)))
    assert len(source) == 1
    assert source.read(0).boxes_xyxy_px.tolist() == [GOOD_BOX]
    assert sorted(source.faults) == [
        f"{file}: 2 annotations of images not used, skipped",
        f"{file}: annotation 2 has the unknown category 1, skipped",
        f"{file}: annotation 3 (a.jpg) stands there twice, one skipped",
        f"{file}: annotation 6 has the unknown category None, skipped",
        f"{file}: image 5 stands there twice, one skipped",
        f"{file}: image 6: {tmp_path / 'gone.jpg'} is missing, skipped",
        f"{file}: image 8 has no id or no file_name, skipped",
    ]


def test_coco_ids_are_never_labels(tmp_path):
    plain(tmp_path / "a.jpg", 90)
    file = write_coco(
        tmp_path / "ann.json", [{**GOOD_COCO, "category_id": 90, "bbox": [1, 2, 3, 4]}, GOOD_COCO]
    )
    source = bound(COCOJson(str(file)))
    assert source.read(0).labels.tolist() == [0, 1]
    assert source.nodes.tolist() == [0, 1]
    assert source.name_counts() == {"apple": 1, "banana": 1}


def test_coco_categories_of_one_name_are_one_class(tmp_path):
    plain(tmp_path / "a.jpg", 90)
    categories = [{"id": k, "name": name} for k, name in ((1, "apple"), (5, "apple"), (9, "kiwi"))]
    annotations = [
        {"id": k, "image_id": 5, "category_id": category, "bbox": [k, 2, 3, 4]}
        for k, category in enumerate((5, 1, 5))
    ]
    file = write_coco(tmp_path / "ann.json", annotations, categories=categories)
    source = bound(COCOJson(str(file)))  # kiwi has no boxes, so nobody misses it in the tree
    assert source.read(0).labels.tolist() == [0, 0, 0]
    assert source.node_counts() == {0: {"apple": 3}}
    assert source.read(0).boxes_xyxy_px[:, 0].tolist() == [0, 1, 2]


def test_coco_objects_stay_with_their_images_in_whatever_order_they_come(tmp_path):
    for name in "abc":
        plain(tmp_path / f"{name}.jpg", 90)
    images = [{"id": k, "file_name": f"{name}.jpg"} for k, name in ((9, "a"), (2, "b"), (4, "c"))]
    annotations = [
        {"id": k, "image_id": image, "category_id": 3, "bbox": [k, 0, 5, 5]}
        for k, image in enumerate((4, 9, 4, 9, 4))
    ]
    source = bound(COCOJson(str(write_coco(tmp_path / "ann.json", annotations, images))))
    left = [source.read(k).boxes_xyxy_px[:, 0].tolist() for k in range(3)]
    assert left == [[1, 3], [], [0, 2, 4]]


def test_regions_of_a_crowd_are_evaluated_but_not_trained(tmp_path):
    plain(tmp_path / "a.jpg", 90)
    region = {"id": 2, "image_id": 5, "category_id": 3, "bbox": [20, 4, 30, 40], "iscrowd": 1}
    # regions may repeat each other: they are no objects
    file = write_coco(tmp_path / "ann.json", [region, GOOD_COCO, {**region, "id": 3}])
    source = COCOJson(str(file))
    data = data_of(detection=source, validation=source, detection_batch_size=1)
    sample = source.read(0)
    assert sample.crowd.tolist() == sample.difficult.tolist() == [True, False, True]
    assert source.faults == []
    (trained,), (evaluated,) = list(data.train_dataloader()), list(data.val_dataloader())
    assert isinstance(trained, DetectionBatch)
    assert isinstance(evaluated, DetectionBatch)
    assert trained.labels[0].tolist() == [1] + [-1] * 7
    assert not trained.crowd.any()
    assert not trained.difficult.any()
    # 64 x 48 in 64 x 64: 8 px of grey above
    torch.testing.assert_close(trained.boxes_cxcywh_norm[0, 0], torch.tensor([5, 18, 10, 20]) / 64)
    assert evaluated.labels[0].tolist() == [1, 1, 1] + [-1] * 5
    assert evaluated.crowd[0].tolist() == [True, False, True] + [False] * 5
    assert evaluated.difficult.tolist() == evaluated.crowd.tolist()


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("ann.json", "."),
        ("ann.json", "images"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/train.json", "train"),
        ("annotations/train.json", "images"),
        ("annotations/train.json", "."),
    ],
)
def test_coco_images_are_found_where_they_usually_lie(tmp_path, file, folder):
    plain(tmp_path / folder / "a.jpg", 90)
    plain(tmp_path / "val2017/b.jpg", 90)
    source = bound(COCOJson(str(write_coco(tmp_path / file, [GOOD_COCO]))))
    assert paths_of(source, tmp_path) == [os.path.normpath(f"{folder}/a.jpg")]


def test_coco_images_may_lie_in_a_folder_that_is_named(tmp_path):
    plain(tmp_path / "far away/deep/a.jpg", 90)
    images = [{"id": 5, "file_name": "deep/a.jpg"}]
    file = write_coco(tmp_path / "here/ann.json", [GOOD_COCO], images)
    with pytest.raises(InputError, match=r"ann\.json: its images are in none of .*images: …"):
        COCOJson(str(file)).bind(FRUIT)
    source = bound(COCOJson(str(file), images=str(tmp_path / "far away")))
    assert paths_of(source, tmp_path) == ["far away/deep/a.jpg"]
    with pytest.raises(InputError, match="COCO images: folder 'nowhere' not found"):
        COCOJson(str(file), images="nowhere").bind(FRUIT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"images": [], "annotations": []}',
        '{"images": null, "annotations": [], "categories": []}',
        '{"images": [{"id": 5, "file_name": "a.jpg"}], "annotations": [1], "categories": []}',
        '{"images": ["a.jpg"], "annotations": [], "categories": []}',
        '{"images": [], "annotations": [], "categories": [{"id": 1}]}',
        '{"images": [{"id": [], "file_name": "a.jpg"}], "annotations": [], "categories": []}',
        '{"images": [{"id": 5, "file_name": "a.jpg"}], "annotations": [{"image_id": {}}], '
        '"categories": []}',
        '{"images": [{"id": 5, "file_name": "a.jpg"}], "annotations": [], '
        '"categories": [{"id": [1], "name": "apple"}]}',
    ],
)
def test_a_malformed_coco_file_is_named(tmp_path, text):
    plain(tmp_path / "a.jpg", 90)
    file = write(tmp_path / "ann.json", text)
    with pytest.raises(InputError, match=r"ann\.json: not a COCO annotation file \("):
        COCOJson(str(file)).bind(FRUIT)


def test_a_coco_file_that_is_no_text_or_not_there_is_named(tmp_path):
    file = tmp_path / "ann.json"
    with pytest.raises(InputError, match=r"COCO annotations: file '.*ann\.json' not found"):
        COCOJson(str(file)).bind(FRUIT)
    file.write_bytes(bytes(range(128, 256)))
    with pytest.raises(InputError, match=r"ann\.json: not a COCO annotation file"):
        COCOJson(str(file)).bind(FRUIT)


def test_coco_annotation_ids_may_be_of_any_kind(tmp_path):
    plain(tmp_path / "a.jpg", 90)
    ids = [10**30, "seven", None]
    annotations = [{**GOOD_COCO, "id": k, "bbox": [n, 0, 5, 5]} for n, k in enumerate(ids)]
    source = bound(COCOJson(str(write_coco(tmp_path / "ann.json", annotations))))
    assert len(source.read(0).labels) == 3


@pytest.mark.parametrize("absolute", [False, True])
def test_coco_images_outside_need_leave(tmp_path, absolute):
    plain(tmp_path / "inner/a.jpg", 90)
    outer = plain(tmp_path / "outer/b.jpg", 90)
    name = str(outer) if absolute else "../outer/b.jpg"
    images = [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": name}]
    file = write_coco(tmp_path / "inner/ann.json", [GOOD_COCO], images)
    with pytest.raises(InputError, match=r"image 6: path '.*b\.jpg' leaves .*allow_outside: true"):
        COCOJson(str(file)).bind(FRUIT)
    source = bound(COCOJson(str(file), allow_outside=True))
    assert [source.image_path(k) for k in range(2)] == [tmp_path / "inner/a.jpg", outer]
    assert source.faults == []


def test_an_absolute_path_does_not_tell_where_the_others_lie(tmp_path):
    plain(tmp_path / "images/a.jpg", 90)
    far = plain(tmp_path / "far/b.jpg", 90)
    images = [{"id": 6, "file_name": str(far)}, {"id": 5, "file_name": "a.jpg"}]
    file = write_coco(tmp_path / "ann.json", [GOOD_COCO], images)
    source = bound(COCOJson(str(file), allow_outside=True))
    assert paths_of(source, tmp_path) == ["far/b.jpg", "images/a.jpg"]


def test_a_path_that_turns_back_inside_stays_inside(tmp_path):
    plain(tmp_path / "images/a.jpg", 90)
    images = [{"id": 5, "file_name": "deep/../a.jpg"}]
    file = write_coco(tmp_path / "ann.json", [GOOD_COCO], images)
    source = bound(COCOJson(str(file), images=str(tmp_path / "images")))
    assert paths_of(source, tmp_path) == ["images/a.jpg"]


# --- what annotations have wrong: YOLO text


@pytest.mark.parametrize(
    ("line", "kept", "said"),
    [
        ("0 nan 0.5 0.5 0.5", [], " has no usable box, skipped"),
        ("0 0.5 0.5 inf 0.5", [], " has no usable box, skipped"),
        ("0 0.5 0.5 0.5", [], " has no usable box, skipped"),
        ("0", [], " has no usable box, skipped"),
        ("0 0.1 0.1 0.3 nan 0.5 0.5", [], " has no usable box, skipped"),
        ("0 0.5 0.5 0 0.5", [], " has no area, skipped"),
        ("0 0.5 0.5 -0.5 0.5", [[16, 12, 48, 36]], " has swapped corners, repaired"),
        ("0 1.5 0.5 0.25 0.25", [], " lies outside the image, skipped"),
        ("0 1.0 0.5 0.5 0.5", [[48, 12, 64, 36]], " reaches over the edge, clipped"),
        ("0 0.5 0.5 1.001 1", [[0, 0, 64, 48]], None),
        ("2 0.5 0.5 0.5 0.5", [], ": class 2, allowed: 0 … 1, skipped"),
        ("-1 0.5 0.5 0.5 0.5", [], ": class -1, allowed: 0 … 1, skipped"),
        ("apple 0.5 0.5 0.5 0.5", [], ": 'apple 0.5 0.5 0.5 0.5' is no object, skipped"),
        ("0,0.5,0.5,0.5,0.5", [], ": '0,0.5,0.5,0.5,0.5' is no object, skipped"),
        # six columns: the last one is a confidence
        ("0 0.5 0.5 0.5 0.5 0.9", [[16, 12, 48, 36]], None),
        # polygons, the box around them; four corners of a turned box are one too
        ("0 0.25 0.5 0.5 0.25 0.75 0.5", [[16, 12, 48, 24]], None),
        ("0 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5", [[16, 12, 48, 36]], None),
    ],
)
def test_a_bad_yolo_line(tmp_path, line, kept, said):
    plain(tmp_path / "images/a.jpg", 90)
    file = write(tmp_path / "labels/a.txt", f"{line}\n\n1 0.25 0.25 0.5 0.5\n")
    source = bound(YOLOText(str(tmp_path), names=["apple", "banana"]))
    assert source.read(0).boxes_xyxy_px.tolist() == [*kept, [0, 0, 32, 24]]
    assert source.faults == ([f"{file}:1{said}"] if said else [])
    assert source.shapes_wh_px()[0].tolist() == sizes_of([*kept, [0, 0, 32, 24]])


def test_yolo_files_that_are_missing_or_empty_are_images_without_objects(tmp_path):
    for name in ("a", "b", "c", "d"):
        plain(tmp_path / f"images/{name}.jpg", 90)
    twice = write(tmp_path / "labels/a.txt", "0 0.5 0.5 0.5 0.5\n" * 2)
    empty = write(tmp_path / "labels/b.txt", "\n")
    missing = tmp_path / "labels/c.txt"
    binary = tmp_path / "labels/d.txt"
    binary.write_bytes(b"0 0.5 \xff\xfe")
    source = bound(YOLOText(str(tmp_path), names=["apple"]))
    assert [len(source.read(k).labels) for k in range(4)] == [1, 0, 0, 0]
    said = sorted(source.faults)
    assert said[:3] == [
        f"{twice}:2 stands there twice, one skipped",
        f"{empty}: empty, its image taken as without objects",
        f"{missing}: no such file, images/c.jpg taken as without objects",
    ]
    assert said[3].startswith(f"{binary}: not readable (")
    assert len(said) == 4


def test_a_dataset_without_a_single_object_serves(tmp_path):
    plain(tmp_path / "images/a.jpg", 90)
    write(tmp_path / "labels/a.txt", "")
    source = YOLOText(str(tmp_path), names=["apple"])
    data = data_of(detection=source, validation=source, detection_batch_size=1)
    assert source.nodes.tolist() == []
    (batch,) = list(data.train_dataloader())
    assert batch.labels.tolist() == [[-1] * 8]


# --- Pascal VOC and ILSVRC layouts


def write_devkit(root: Path, write_voc: Any, year: int, lists: dict[str, str]) -> None:
    folder = root / f"VOC{year}"
    for name in ("a", "b"):
        write_voc(
            folder / "Annotations", f"{year}_{name}", [GOOD_VOC], images="../JPEGImages",
            difficult=int(name == "b"),
        )  # fmt: skip
    for split, names in lists.items():
        listed = "".join(f"{year}_{name}\n" for name in names)
        write(folder / "ImageSets/Main" / f"{split}.txt", listed)


def test_voc_years_follow_each_other(tmp_path, write_voc):
    write_devkit(tmp_path, write_voc, 2007, {"train": "b", "trainval": "ab"})
    write_devkit(tmp_path, write_voc, 2012, {"train": "a", "trainval": "ba"})
    write_devkit(tmp_path, write_voc, 2010, {"trainval": "a"})
    source = bound(VOCFolder(str(tmp_path), "trainval", years=[2012, 2007]))
    assert paths_of(source, tmp_path) == [
        "VOC2012/JPEGImages/2012_b.jpg",
        "VOC2012/JPEGImages/2012_a.jpg",
        "VOC2007/JPEGImages/2007_a.jpg",
        "VOC2007/JPEGImages/2007_b.jpg",
    ]
    assert [source.read(k).difficult.tolist() for k in range(4)] == [
        [True],
        [False],
        [False],
        [True],
    ]
    assert not source.read(0).crowd.any()
    with pytest.raises(InputError, match="VOC2008' not found"):
        VOCFolder(str(tmp_path), "trainval", years=[2008]).bind(FRUIT)
    with pytest.raises(InputError, match="no split 'test'; found: train, trainval, Annotations"):
        VOCFolder(str(tmp_path), "test", years=[2007]).bind(FRUIT)


def test_a_voc_devkit_without_years_says_what_to_name(tmp_path, write_voc):
    write_devkit(tmp_path, write_voc, 2007, {"train": "a"})
    write_devkit(tmp_path, write_voc, 2012, {"train": "a"})
    with pytest.raises(InputError, match=r"holds VOC2007, VOC2012: .*years: \[2007, …\]"):
        VOCFolder(str(tmp_path), "train").bind(FRUIT)


def test_a_listed_voc_file_that_is_missing_is_named(tmp_path, write_voc):
    write_devkit(tmp_path, write_voc, 2007, {"train": "ax"})
    source = bound(VOCFolder(str(tmp_path / "VOC2007"), "train"))
    assert len(source) == 1
    xml = tmp_path / "VOC2007/Annotations/2007_x.xml"
    assert source.faults == [f"{xml}: listed but missing, skipped"]


def write_xml(file: Path, name: str, box: tuple[int, int, int, int]) -> Path:
    sides = "".join(
        f"<{side}>{v}</{side}>"
        for side, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return write(
        file,
        f"<annotation><filename>{file.stem}</filename><size><width>{WIDTH}</width>"
        f"<height>{HEIGHT}</height></size><object><name>{name}</name><bndbox>{sides}</bndbox>"
        "</object></annotation>",
    )


WNIDS = WordTree.flat(["n01", "n02"])


def write_ilsvrc(root: Path) -> Path:
    files = {
        "train/ILSVRC2013_train/n01/n01_7": ("n01", (0, 5, 20, 30)),
        "train/ILSVRC2013_train/n02/n02_3": ("n02", (1, 1, 63, 47)),
        "val/v_1": ("n02", (2, 3, 4, 5)),
        "val/v_2": ("n01", (2, 3, 4, 5)),
    }
    for name, (label, box) in files.items():
        write_xml(root / f"Annotations/DET/{name}.xml", label, box)
        plain(root / f"Data/DET/{name}.JPEG", 90)
    write(root / "ImageSets/DET/val_part.txt", "v_2 1\nv_9 2\n")
    return root


def test_ilsvrc_boxes_are_taken_as_they_are(tmp_path):
    source = bound(ILSVRCDetection(str(write_ilsvrc(tmp_path))), WNIDS)
    below = "Data/DET/train/ILSVRC2013_train"
    assert paths_of(source, tmp_path) == [f"{below}/n01/n01_7.JPEG", f"{below}/n02/n02_3.JPEG"]
    boxes = [source.read(k).boxes_xyxy_px.tolist() for k in range(2)]
    assert boxes == [[[0, 5, 20, 30]], [[1, 1, 63, 47]]]
    assert [source.read(k).labels.tolist() for k in range(2)] == [[0], [1]]
    assert source.faults == []


def test_ilsvrc_splits_are_folders_or_lists(tmp_path):
    write_ilsvrc(tmp_path)
    whole = bound(ILSVRCDetection(str(tmp_path), "val"), WNIDS)
    assert paths_of(whole, tmp_path) == ["Data/DET/val/v_1.JPEG", "Data/DET/val/v_2.JPEG"]
    listed = bound(ILSVRCDetection(str(tmp_path), "val_part"), WNIDS)
    assert paths_of(listed, tmp_path) == ["Data/DET/val/v_2.JPEG"]
    gone = tmp_path / "Annotations/DET/val/v_9.xml"
    assert listed.faults == [f"{gone}: listed but missing, skipped"]
    with pytest.raises(InputError, match=r"no split 'tset' in Annotations/DET or .*: train, val"):
        ILSVRCDetection(str(tmp_path), "tset").bind(WNIDS)


def test_ilsvrc_boxes_of_the_classification_images(tmp_path):
    write_xml(tmp_path / "Annotations/CLS-LOC/train/n01/n01_7.xml", "n01", (1, 2, 3, 4))
    plain(tmp_path / "Data/CLS-LOC/train/n01/n01_7.JPEG", 90)
    source = bound(ILSVRCDetection(str(tmp_path), challenge="CLS-LOC"), WNIDS)
    assert source.read(0).boxes_xyxy_px.tolist() == [[1, 2, 3, 4]]


# --- YOLO text layouts

NAMES = "names:\n  0: banana\n  1: apple\n"
LINE = "1 0.5 0.5 0.5 0.5\n"

# files that are written, the root, the split, and which images come
YOLO_LAYOUTS: dict[str, tuple[dict[str, str], str, str, list[str]]] = {
    "folders": (
        {"data.yaml": f"train: images/train\nval: images/val\n{NAMES}",
         "images/train/b.jpg": "labels/train/b.txt", "images/train/a.png": "labels/train/a.txt",
         "images/val/c.jpg": "labels/val/c.txt"},
        "data.yaml", "train", ["images/train/a.png", "images/train/b.jpg"]),
    "another split": (
        {"data.yaml": f"train: images/train\nval: images/val\n{NAMES}",
         "images/train/b.jpg": "labels/train/b.txt", "images/val/c.jpg": "labels/val/c.txt"},
        "data.yaml", "val", ["images/val/c.jpg"]),
    "folders below folders": (
        {"data.yaml": f"train: images\n{NAMES}", "images/b/a.jpg": "labels/b/a.txt",
         "images/a/b.jpg": "labels/a/b.txt"},
        "data.yaml", "train", ["images/a/b.jpg", "images/b/a.jpg"]),
    "a path above them": (
        {"set.yml": "path: the set\ntrain: images\nnames: [banana, apple]\n",
         "the set/images/a.jpg": "the set/labels/a.txt"},
        "set.yml", "train", ["the set/images/a.jpg"]),
    "several folders": (
        {"data.yaml": f"train: [images/two, images/one]\n{NAMES}",
         "images/one/a.jpg": "labels/one/a.txt", "images/two/b.jpg": "labels/two/b.txt"},
        "data.yaml", "train", ["images/two/b.jpg", "images/one/a.jpg"]),
    "a list": (
        {"data.yaml": f"train: lists/train.txt\n{NAMES}",
         "lists/train.txt": "images/b.jpg\n\n ./../images/a.jpg \n",
         "images/a.jpg": "labels/a.txt", "images/b.jpg": "labels/b.txt"},
        "data.yaml", "train", ["images/b.jpg", "images/a.jpg"]),
    "a list below a path": (
        {"conf/data.yaml": f"path: ../set\ntrain: train.txt\n{NAMES}",
         "set/train.txt": "./images/a.jpg\n", "set/images/a.jpg": "set/labels/a.txt"},
        "conf/data.yaml", "train", ["set/images/a.jpg"]),
    "a list alone": (
        {"train.txt": "images/a.jpg\n", "classes.txt": "banana\napple\n",
         "images/a.jpg": "labels/a.txt"},
        "train.txt", "train", ["images/a.jpg"]),
    "Roboflow": (
        {"data.yaml": "train: ../train/images\nval: ../valid/images\nnc: 2\n"
         "names: ['banana', 'apple']\n",
         "train/images/a.jpg": "train/labels/a.txt", "valid/images/b.jpg": "valid/labels/b.txt"},
        "data.yaml", "train", ["train/images/a.jpg"]),
    "Darknet": (
        {"obj.data": "classes = 2\ntrain = train.txt\nvalid = test.txt\nnames = obj.names\n"
         "backup = backup/\n", "obj.names": "banana\napple\n", "test.txt": "obj/b.jpg\n",
         "train.txt": "obj/a.jpg\n", "obj/a.jpg": "obj/a.txt", "obj/b.jpg": "obj/b.txt"},
        "obj.data", "val", ["obj/b.jpg"]),
    "Darknet, from the folder that it runs in": (
        {"data/obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n",
         "data/obj.names": "banana\napple\n", "data/train.txt": "data/obj/a.jpg\n",
         "data/obj/a.jpg": "data/obj/a.txt"},
        "data/obj.data", "train", ["data/obj/a.jpg"]),
    "Darknet's VOC": (
        {"voc.data": "train = train.txt\nnames = voc.names\n", "voc.names": "banana\napple\n",
         "train.txt": "VOC2007/JPEGImages/a.jpg\n",
         "VOC2007/JPEGImages/a.jpg": "VOC2007/labels/a.txt"},
        "voc.data", "train", ["VOC2007/JPEGImages/a.jpg"]),
    "a folder": (
        {"classes.txt": "banana\n\napple\n", "images/a.jpg": "labels/a.txt"},
        ".", "train", ["images/a.jpg"]),
    "a folder with splits": (
        {"x.names": "banana\napple\n", "images/train/a.jpg": "labels/train/a.txt",
         "images/val/b.jpg": "labels/val/b.txt"},
        ".", "val", ["images/val/b.jpg"]),
    "a folder of splits": (
        {"data.yaml": NAMES, "train/images/a.jpg": "train/labels/a.txt",
         "val/images/b.jpg": "val/labels/b.txt"},
        ".", "val", ["val/images/b.jpg"]),
    "all in one folder": (
        {"obj.names": "banana\napple\n", "a.jpg": "a.txt", "b.jpg": "b.txt"},
        ".", "train", ["a.jpg", "b.jpg"]),
}  # fmt: skip


def write_layout(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        if Path(name).suffix in (".jpg", ".png"):
            plain(root / name, 90)
            write(root / content, LINE)
        else:
            write(root / name, content)


@pytest.mark.parametrize("layout", YOLO_LAYOUTS)
def test_yolo_layouts_are_found(tmp_path, monkeypatch, layout):
    files, root, split, expected = YOLO_LAYOUTS[layout]
    write_layout(tmp_path, files)
    monkeypatch.chdir(tmp_path)
    source = bound(YOLOText(root, split))
    assert [os.path.normpath(path) for path in paths_of(source, tmp_path)] == expected
    assert source.faults == []
    for k in range(len(source)):
        assert source.read(k).boxes_xyxy_px.tolist() == [[16, 12, 48, 36]]
        assert source.read(k).labels.tolist() == [0]


@pytest.mark.parametrize("root", ["../set/train.txt", "../set/data.yaml"])
def test_a_root_above_the_working_folder_is_no_way_out(tmp_path, monkeypatch, root):
    files = {
        "data.yaml": f"train: train.txt\n{NAMES}",
        "train.txt": "images/a.jpg\n",
        "images/a.jpg": "labels/a.txt",
    }
    write_layout(tmp_path / "set", files)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    source = bound(YOLOText(root))
    assert source.image_path(0).resolve() == tmp_path / "set/images/a.jpg"


@pytest.mark.parametrize("absolute", [False, True])
def test_listed_images_outside_need_leave(tmp_path, absolute):
    outer = plain(tmp_path / "outer/images/a.jpg", 90)
    write(tmp_path / "outer/labels/a.txt", LINE)
    listed = write(
        tmp_path / "inner/train.txt", f"{outer if absolute else '../outer/images/a.jpg'}\n"
    )
    names = ["banana", "apple"]
    with pytest.raises(InputError, match=r"train\.txt:1: path .* leaves .*allow_outside: true"):
        YOLOText(str(listed), names=names).bind(FRUIT)
    source = bound(YOLOText(str(listed), names=names, allow_outside=True))
    assert source.image_path(0) == outer
    assert source.read(0).labels.tolist() == [0]


def test_listed_images_that_are_missing_are_named(tmp_path):
    plain(tmp_path / "images/a.jpg", 90)
    write(tmp_path / "labels/a.txt", LINE)
    listed = write(tmp_path / "train.txt", f"images/gone.jpg\n{tmp_path}/images/a.jpg\n")
    source = bound(YOLOText(str(listed), names=["banana", "apple"]))
    assert paths_of(source, tmp_path) == ["images/a.jpg"]
    assert source.faults == [f"{listed}:1: images/gone.jpg is missing, skipped"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("train: images\n", "no names of classes; give names: "),
        ("train: images\nnames: 2\n", "no names of classes"),
        ("train: images\nnames: gone.names\n", r"file of names 'gone\.names' not found"),
        (f"train: nowhere\n{NAMES}", "'nowhere' not found, neither below"),
        (f"valid: images\n{NAMES}", "no split 'train'; found: valid"),
        ("- train\n", r"data\.yaml: expected lines such as train: images/train"),
        ("train: [images\n", r"data\.yaml: not YAML"),
    ],
)
def test_a_bad_yolo_description_is_named(tmp_path, monkeypatch, content, said):
    plain(tmp_path / "images/a.jpg", 90)
    write(tmp_path / "data.yaml", content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=said):
        YOLOText("data.yaml").bind(FRUIT)


def test_yolo_names_may_be_keyed_by_text(tmp_path):
    plain(tmp_path / "images/a.jpg", 90)
    write(tmp_path / "labels/a.txt", LINE)
    write(tmp_path / "data.yaml", "train: images\nnames:\n  '0': banana\n  '1': apple\n")
    source = bound(YOLOText(str(tmp_path / "data.yaml")))
    assert source.read(0).labels.tolist() == [0]


def test_a_split_that_a_yolo_folder_lacks_is_not_all_of_it(tmp_path):
    write_layout(
        tmp_path,
        {"images/train/a.jpg": "labels/train/a.txt", "images/val/b.jpg": "labels/val/b.txt"},
    )
    with pytest.raises(InputError, match="no split 'tset'"):
        YOLOText(str(tmp_path), "tset", names=["banana", "apple"]).bind(FRUIT)


def test_a_yolo_root_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="YOLO text: '.*gone' not found"):
        YOLOText(str(tmp_path / "gone")).bind(FRUIT)


# --- images with labels


def test_class_folders_may_be_links_and_loops_end(tmp_path):
    root = tmp_path / "set"
    plain(tmp_path / "elsewhere/deep/x.png", 10)
    plain(root / "banana/y.png", 20)
    (root / "apple").symlink_to(tmp_path / "elsewhere")
    (root / "banana/self").symlink_to(root / "banana")
    (root / "banana/again").mkdir()
    (root / "banana/again/up").symlink_to(root / "banana")
    source = bound(ImageFolder(str(root)))
    assert paths_of(source, root) == ["apple/deep/x.png", "banana/y.png"]
    assert [source.read(k)[1] for k in range(2)] == [0, 1]


def test_a_link_back_to_the_root_labels_nothing_twice(tmp_path):
    plain(tmp_path / "apple/x.png", 10)
    plain(tmp_path / "banana/y.png", 20)
    (tmp_path / "apple/root").symlink_to(tmp_path)
    source = bound(ImageFolder(str(tmp_path)))
    assert paths_of(source, tmp_path) == ["apple/x.png", "banana/y.png"]


@pytest.mark.parametrize("name", ["with space", "Äpfel, grün", "リンゴ", "a'b\"c"])
def test_any_name_serves(tmp_path, name):
    plain(tmp_path / name / f"{name}.jpg", 90)
    tree = WordTree.flat([name, "other"])
    source = bound(ImageFolder(str(tmp_path)), tree)
    assert source.image_path(0) == tmp_path / name / f"{name}.jpg"
    assert source.read(0)[1] == 0


def test_a_file_name_that_is_no_utf8_serves(tmp_path):
    (tmp_path / "apple").mkdir()
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/apple/caf\xe9.png")
    os.rename(plain(tmp_path / "x.png", 77), odd)
    bound(ImageFolder(str(tmp_path)))
    source = bound(ImageFolder(str(tmp_path)))  # once more, from the index
    assert source.image_name(0) == odd
    assert source.read(0)[0][0, 0].tolist() == [77] * 3


def test_hidden_files_and_empty_class_folders(tmp_path):
    plain(tmp_path / "apple/x.png", 10)
    plain(tmp_path / "apple/.cache/z.png", 10)
    plain(tmp_path / ".thumbs/z.png", 10)
    plain(tmp_path / "apple/._x.png", 10)
    (tmp_path / "kiwi").mkdir()
    source = bound(ImageFolder(str(tmp_path)))
    assert paths_of(source, tmp_path) == ["apple/x.png"]
    assert source.faults == [f"{tmp_path / 'kiwi'}: no images"]


@pytest.mark.parametrize(
    "text",
    [
        "a.png,apple\nb 1.png,banana\n",
        "path,label\na.png,apple\nb 1.png,banana\n",
        "\ufefffile_name,class,split\na.png,apple,train\n\n b 1.png , banana ,val\n",
        "image\tlabel\na.png\tapple\nb 1.png\tbanana\n",
        "a.png;apple\nb 1.png;banana\n",
        'path,label\n"a.png","apple"\r\n"b 1.png","banana"\r\n',
    ],
)
def test_tables_are_read_in_every_hand(tmp_path, text):
    plain(tmp_path / "a.png", 10)
    plain(tmp_path / "b 1.png", 20)
    source = bound(LabelCSV(str(write(tmp_path / "table.csv", text))))
    assert paths_of(source, tmp_path) == ["a.png", "b 1.png"]
    assert [source.read(k)[1] for k in range(2)] == [0, 1]
    assert source.faults == []


def test_a_table_names_what_is_missing(tmp_path):
    plain(tmp_path / "pictures/a.png", 10)
    file = write(tmp_path / "table.csv", "path,label\ngone.png,apple\na.png,banana\n")
    source = bound(LabelCSV(str(file), root=str(tmp_path / "pictures")))
    assert paths_of(source, tmp_path) == ["pictures/a.png"]
    assert source.node_counts() == {1: {"banana": 1}}
    assert source.faults == [f"{file}:2: gone.png is missing, skipped"]
    with pytest.raises(InputError, match=r"holds no images: .*:2: gone\.png is missing"):
        LabelCSV(str(file)).bind(FRUIT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.png,apple\na.png\n", r"table\.csv:2: expected path,label; found 'a\.png'"),
        ("a.png;apple\n;apple\n", r"table\.csv:2: expected path;label; found ';apple'"),
        ("a.png,apple\n../b.png,apple\n", r"table\.csv:2: path '\.\./b\.png' leaves"),
        ("/etc/passwd,apple\n", r"table\.csv:1: path '/etc/passwd' leaves"),
    ],
)
def test_a_bad_table_is_named(tmp_path, text, said):
    plain(tmp_path / "a.png", 10)
    with pytest.raises(InputError, match=said):
        LabelCSV(str(write(tmp_path / "table.csv", text))).bind(FRUIT)


def test_a_table_may_lead_outside_where_that_is_allowed(tmp_path):
    plain(tmp_path / "b.png", 10)
    file = write(tmp_path / "tables/table.csv", f"../b.png,apple\n{tmp_path}/b.png,banana\n")
    source = bound(LabelCSV(str(file), allow_outside=True))
    assert [source.image_path(k) for k in range(2)] == [tmp_path / "b.png"] * 2


def test_imagenet_folders_are_wnids(tmp_path):
    plain(tmp_path / "train/n02/n02_1.JPEG", 20)
    plain(tmp_path / "train/n01/n01_1.JPEG", 10)
    (tmp_path / "train/n03").mkdir()
    source = bound(ImageNet(str(tmp_path)), WNIDS)
    assert paths_of(source, tmp_path) == ["train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG"]
    assert [source.read(k)[1] for k in range(2)] == [0, 1]
    assert source.faults == [f"{tmp_path / 'train/n03'}: no images"]
    with pytest.raises(InputError, match="no split 'val'; found: .*train"):
        ImageNet(str(tmp_path), "val").bind(WNIDS)


KAGGLE = "".join(
    [
        "ImageId,PredictionString\n",
        "ILSVRC2012_val_00000003,n01 1 2 3 4 n01 5 6 7 8\n",
        "ILSVRC2012_val_00000001,n02 1 2 3 4 \n",
        "ILSVRC2012_val_00000002,n01 1 2 3 4\n",
    ]
)


def write_meta(file: Path) -> None:
    """Write the list of synsets as the development kit has it: a struct array, one a row."""
    synsets = np.zeros((3, 1), dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")])
    rows = ((1, "n02", "two"), (2, "n01", "one"), (3, "n09", "inner"))
    for k, row in enumerate(rows):
        synsets[k, 0] = row
    savemat(str(file), {"synsets": synsets})


def write_validation(root: Path, place: str = "val") -> Path:
    for k in (1, 2, 3):
        plain(root / place / f"ILSVRC2012_val_0000000{k}.JPEG", 10 * k)
    return root


@pytest.mark.parametrize(
    "kind",
    ["Kaggle", "synsets", "synsets below", "kit", "named file", "named folder", "archive"],
)
def test_imagenet_validation_labels_are_found(tmp_path, kind):
    place = "Data/CLS-LOC/val" if kind == "archive" else "val"
    root = write_validation(tmp_path / "set", place)
    labels = None
    if kind in ("Kaggle", "archive"):
        write(root / "LOC_val_solution.csv", KAGGLE)
    elif kind.startswith("synsets"):
        below = "a/b/" if kind == "synsets below" else ""
        write(root / f"{below}imagenet_2012_validation_synset_labels.txt", "n02\nn01\nn01\n")
    elif kind == "named file":
        labels = str(write(tmp_path / "mine.txt", "n02\nn01\nn01\n"))
    else:
        folder = (root if kind == "kit" else tmp_path) / "ILSVRC2012_devkit_t12/data"
        write(folder / "ILSVRC2012_validation_ground_truth.txt", "1\n2\n2\n")
        write_meta(folder / "meta.mat")
        labels = str(folder.parent) if kind == "named folder" else None
    source = bound(ImageNet(str(root), "val", labels), WNIDS)
    assert [source.image_path(k).name[-6:] for k in range(3)] == ["1.JPEG", "2.JPEG", "3.JPEG"]
    assert [source.read(k)[1] for k in range(3)] == [1, 0, 0]
    assert source.node_counts() == {0: {"n01": 2}, 1: {"n02": 1}}
    assert source.faults == []


def test_part_of_the_validation_images_keep_their_own_labels(tmp_path):
    root = write_validation(tmp_path)
    (root / "val/ILSVRC2012_val_00000001.JPEG").unlink()
    write(root / "imagenet_2012_validation_synset_labels.txt", "n02\nn01\nn02\n")
    source = bound(ImageNet(str(root), "val"), WNIDS)
    assert [source.read(k)[1] for k in range(2)] == [0, 1]


def test_validation_images_without_a_label_are_named(tmp_path):
    root = write_validation(tmp_path)
    file = write(root / "LOC_val_solution.csv", "\n".join(KAGGLE.splitlines()[:3]))
    source = bound(ImageNet(str(root), "val"), WNIDS)
    assert [source.read(k)[1] for k in range(2)] == [1, 0]
    assert source.faults == [f"{file}: no label for ILSVRC2012_val_00000002.JPEG, skipped"]


def test_validation_labels_that_are_missing_or_do_not_fit_are_named(tmp_path):
    root = write_validation(tmp_path)
    with pytest.raises(InputError, match=r"LOC_val_solution\.csv.*labels: PATH"):
        ImageNet(str(root), "val").bind(WNIDS)
    file = write(root / "val_synsets.txt", "n01\nn02\n")
    with pytest.raises(InputError, match=f"{file}: 2 labels for 3 images in the split 'val'"):
        ImageNet(str(root), "val").bind(WNIDS)
    file.unlink()
    write(root / "data/ILSVRC2012_validation_ground_truth.txt", "1\n2\n2\n")
    with pytest.raises(InputError, match=r"meta\.mat: not the development kit's list of synsets"):
        ImageNet(str(root), "val").bind(WNIDS)


# --- every source, in its usual layout: mapping, unknown labels, recognition, index


def build_voc(root: Path) -> Any:
    for name in ("a", "b"):
        write_xml(root / f"{name}.xml", "pomme" if name == "a" else "banane", (1, 1, 10, 20))
        plain(root / f"{name}.jpg", 90)
    return lambda **options: VOCFolder(str(root), **options)


def build_devkit(root: Path) -> Any:
    for name in ("a", "b"):
        label = "pomme" if name == "a" else "banane"
        write_xml(root / f"Annotations/{name}.xml", label, (1, 1, 10, 20))
        plain(root / f"JPEGImages/{name}.jpg", 90)
    write(root / "ImageSets/Main/trainval.txt", "a\nb\n")
    return lambda **options: VOCFolder(str(root), "trainval", **options)


def build_ilsvrc(root: Path) -> Any:
    for name, label in (("a", "pomme"), ("b", "banane")):
        write_xml(root / f"Annotations/DET/train/{name}/{name}.xml", label, (0, 0, 10, 20))
        plain(root / f"Data/DET/train/{name}/{name}.JPEG", 90)
    return lambda **options: ILSVRCDetection(str(root), **options)


def build_coco(root: Path) -> Any:
    for name in ("a", "b"):
        plain(root / f"images/{name}.jpg", 90)
    images = [{"id": 5, "file_name": "a.jpg"}, {"id": 6, "file_name": "b.jpg"}]
    categories = [{"id": 3, "name": "banane"}, {"id": 90, "name": "pomme"}]
    annotations = [{**GOOD_COCO, "category_id": 90}, {**GOOD_COCO, "id": 2, "image_id": 6}]
    file = write_coco(root / "ann.json", annotations, images, categories)
    return lambda **options: COCOJson(str(file), **options)


def build_yolo(root: Path) -> Any:
    for k, name in enumerate("ab"):
        plain(root / f"images/{name}.jpg", 90)
        write(root / f"labels/{name}.txt", f"{k} 0.078125 0.208333333 0.15625 0.416666667\n")
    write(root / "data.yaml", "train: images\nnames: [pomme, banane]\n")
    return lambda **options: YOLOText(str(root / "data.yaml"), **options)


def build_yolo_folder(root: Path) -> Any:
    build_yolo(root)
    return lambda **options: YOLOText(str(root), **options)


def build_yolo_flat(root: Path) -> Any:
    for k, name in enumerate("ab"):
        plain(root / f"{name}.jpg", 90)
        write(root / f"{name}.txt", f"{k} 0.078125 0.208333333 0.15625 0.416666667\n")
    write(root / "classes.txt", "pomme\nbanane\n")
    return lambda **options: YOLOText(str(root), **options)


def build_folders(root: Path) -> Any:
    plain(root / "pomme/a.jpg", 90)
    plain(root / "banane/b.jpg", 90)
    return lambda **options: ImageFolder(str(root), **options)


def build_table(root: Path) -> Any:
    plain(root / "a.jpg", 90)
    plain(root / "b.jpg", 90)
    file = write(root / "table.csv", "path,label\na.jpg,pomme\nb.jpg,banane\n")
    return lambda **options: LabelCSV(str(file), **options)


def build_imagenet(root: Path) -> Any:
    plain(root / "train/pomme/a.jpg", 90)
    plain(root / "train/banane/b.jpg", 90)
    return lambda **options: ImageNet(str(root), **options)


def build_validation(root: Path) -> Any:
    plain(root / "val/ILSVRC2012_val_00000001.JPEG", 90)
    plain(root / "val/ILSVRC2012_val_00000002.JPEG", 90)
    write(root / "val_synsets.txt", "pomme\nbanane\n")
    return lambda **options: ImageNet(str(root), "val", **options)


BOXES = {
    "VOC": build_voc,
    "VOC devkit": build_devkit,
    "ILSVRC": build_ilsvrc,
    "COCO": build_coco,
    "YOLO": build_yolo,
    "YOLO folder": build_yolo_folder,
    "YOLO in one folder": build_yolo_flat,
}
LABELS = {
    "class folders": build_folders,
    "table": build_table,
    "ImageNet": build_imagenet,
    "ImageNet validation": build_validation,
}
SOURCES = {**BOXES, **LABELS}
FRENCH = {"pomme": "apple", "banane": "banana"}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_mapping_says_what_labels_are_called_in_the_tree(tmp_path, kind):
    source = bound(SOURCES[kind](tmp_path)(mapping=FRENCH))
    assert source.node_counts() == {0: {"pomme": 1}, 1: {"banane": 1}}
    assert source.nodes.tolist() == [0, 1]
    for k in range(2):
        found = source.read(k)
        (label,) = found.labels.tolist() if kind in BOXES else [found[1]]
        assert label == (0 if source.image_path(k).stem[-1] in "a1" else 1)


# where each source meets the labels first, below its folder
MET = {
    "VOC": ("a.xml: object 1", "b.xml: object 1"),
    "VOC devkit": ("Annotations/a.xml: object 1", "Annotations/b.xml: object 1"),
    "ILSVRC": (
        "Annotations/DET/train/a/a.xml: object 1",
        "Annotations/DET/train/b/b.xml: object 1",
    ),
    "COCO": ("ann.json", "ann.json"),
    "YOLO": ("labels/a.txt:1", "labels/b.txt:1"),
    "YOLO folder": ("labels/a.txt:1", "labels/b.txt:1"),
    "YOLO in one folder": ("a.txt:1", "b.txt:1"),
    "class folders": ("pomme", "banane"),
    "table": ("table.csv:2", "table.csv:3"),
    "ImageNet": ("train/pomme", "train/banane"),
    "ImageNet validation": ("val_synsets.txt", "val_synsets.txt"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_all_unknown_labels_come_in_one_message(tmp_path, kind):
    source = SOURCES[kind](tmp_path)()
    with pytest.raises(InputError) as caught:
        source.bind(FRUIT)
    said = str(caught.value)
    for name, place in zip(("pomme", "banane"), MET[kind], strict=True):
        assert f"{tmp_path / place}: label {name!r} is not in the tree" in said
    assert "did you mean 'banana'?" in said
    assert "mapping: {label: node}" in said
    with pytest.raises(InputError) as caught:
        SOURCES[kind](tmp_path)(mapping={"pomme": "apple", "banane": "kiwi"}).bind(FRUIT)
    assert "'kiwi' is not in the tree" in str(caught.value)
    assert "'pomme'" not in str(caught.value)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_second_open_parses_nothing(tmp_path, monkeypatch, kind):
    make = SOURCES[kind](tmp_path)
    cache = tmp_path / index.CACHE_FOLDER
    cache.mkdir()
    os.utime(cache, ns=(10**18, 10**18))  # so that saving in it changes its time for certain
    first = make().open()
    source = make()

    def parse(self: Any) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(type(source), "_parse", parse)
    second = source.open()
    assert second.facts == first.facts
    for name, array in first.arrays.items():
        assert np.array_equal(second[name], array), name


def count_parses(monkeypatch: pytest.MonkeyPatch, source: Any) -> list[str]:
    parse, found = type(source)._parse, []

    def counted(self: Any) -> Any:
        found.append(self.name)
        return parse(self)

    monkeypatch.setattr(type(source), "_parse", counted)
    return found


def rewrite(file: Path, old: str, new: str) -> None:
    """Change a file in its place: same size, so that the time alone tells."""
    assert len(old) == len(new)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    later = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))


@pytest.mark.parametrize(
    ("kind", "file", "old", "new"),
    [
        ("VOC", "a.xml", "pomme", "poire"),
        ("VOC devkit", "Annotations/a.xml", "pomme", "poire"),
        ("VOC devkit", "ImageSets/Main/trainval.txt", "a\nb", "b\nb"),
        ("ILSVRC", "Annotations/DET/train/a/a.xml", "pomme", "poire"),
        ("COCO", "ann.json", "pomme", "poire"),
        ("YOLO", "labels/a.txt", "0 0.078125", "1 0.078125"),
        ("YOLO", "data.yaml", "pomme", "poire"),
        ("YOLO folder", "labels/a.txt", "0 0.078125", "1 0.078125"),
        ("YOLO folder", "data.yaml", "pomme", "poire"),
        ("YOLO in one folder", "classes.txt", "pomme", "poire"),
        ("table", "table.csv", "pomme", "poire"),
        ("ImageNet validation", "val_synsets.txt", "pomme", "poire"),
    ],
)
def test_a_changed_annotation_is_parsed_again(tmp_path, kind, file, old, new):
    make = SOURCES[kind](tmp_path)
    assert make().name_counts()["pomme"] == 1
    rewrite(tmp_path / file, old, new)
    assert make().name_counts()["pomme"] == 0


def test_a_changed_list_of_ilsvrc_is_parsed_again(tmp_path):
    write_ilsvrc(tmp_path)
    assert bound(ILSVRCDetection(str(tmp_path), "val_part"), WNIDS).nodes.tolist() == [0]
    rewrite(tmp_path / "ImageSets/DET/val_part.txt", "v_2", "v_1")
    assert bound(ILSVRCDetection(str(tmp_path), "val_part"), WNIDS).nodes.tolist() == [1]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("VOC", "c.xml"),
        ("ILSVRC", "Annotations/DET/train/a/c.xml"),
        ("YOLO", "images/c.jpg"),
        ("YOLO folder", "images/deeper/c.jpg"),
        ("class folders", "pomme/c.jpg"),
        ("class folders", "pomme/deeper/c.jpg"),
        ("class folders", "poire/c.jpg"),
        ("ImageNet", "train/pomme/c.jpg"),
        ("ImageNet", "train/poire/c.jpg"),
    ],
)
def test_a_new_file_in_a_folder_is_found(tmp_path, kind, file):
    make = SOURCES[kind](tmp_path)
    before = make()
    before.open()
    place = tmp_path / file
    if place.suffix == ".xml":
        shutil.copy(place.with_name("a.xml"), place)
        data = str(place.parent).replace("Annotations", "Data")
        plain(Path(data) / "c.jpg", 90)
    else:
        plain(place, 90)
    for folder in (place.parent, place.parent.parent):
        later = folder.stat().st_mtime_ns + 10**9
        os.utime(folder, ns=(later, later))
    assert (len(before), len(make())) == (2, 3)


def test_a_label_file_that_appears_is_found(tmp_path):
    make = build_yolo(tmp_path)
    (tmp_path / "labels/a.txt").unlink()
    assert make().name_counts()["banane"] == 1
    write(tmp_path / "labels/a.txt", LINE)
    os.utime(tmp_path / "labels", ns=(2 * 10**18, 2 * 10**18))
    assert make().name_counts()["banane"] == 2


@pytest.mark.parametrize("option", ["COCO images", "table root"])
def test_a_relative_folder_means_another_place_in_another_working_folder(
    tmp_path, monkeypatch, option
):
    make = SOURCES["COCO" if option == "COCO images" else "table"](tmp_path / "set")
    name = "images" if option == "COCO images" else "root"
    for place in ("one", "two"):
        plain(tmp_path / place / "pictures/a.jpg", 90)
        plain(tmp_path / place / "pictures/b.jpg", 90)
        monkeypatch.chdir(tmp_path / place)
        source = make(**{name: "pictures"})
        assert source.image_path(0) == tmp_path / place / "pictures/a.jpg"


def test_options_have_indices_of_their_own(tmp_path, write_voc):
    write_devkit(tmp_path, write_voc, 2007, {"train": "a", "val": "b"})
    root = str(tmp_path / "VOC2007")
    for split, name in (("train", "2007_a"), ("val", "2007_b"), ("train", "2007_a")):
        assert VOCFolder(root, split).image_path(0).stem == name


def the_index(root: Path) -> Path:
    (file,) = root.glob("*.index")
    return file


def test_an_index_of_another_version_is_made_anew(tmp_path, monkeypatch):
    make = build_folders(tmp_path)
    make().open()
    parses = count_parses(monkeypatch, make())
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    assert len(make()) == 2
    assert len(parses) == 1
    assert len(make()) == 2
    assert len(parses) == 1


@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_an_index_that_was_cut_off_is_made_anew(tmp_path, monkeypatch, share):
    make = build_coco(tmp_path)
    whole = make().open()
    file = the_index(tmp_path / index.CACHE_FOLDER)
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: int(len(data) * share)])
    parses = count_parses(monkeypatch, make())
    again = make().open()
    assert len(parses) == 1
    assert again.facts == whole.facts
    assert file.read_bytes()[:10] == data[:10]
    make().open()
    assert len(parses) == 1


def test_nothing_half_written_stays_behind(tmp_path):
    build_coco(tmp_path)().open()
    assert [file.suffix for file in (tmp_path / index.CACHE_FOLDER).iterdir()] == [".index"]


def test_the_index_of_a_read_only_folder_is_kept_in_the_users_cache(tmp_path, monkeypatch):
    root = tmp_path / "set"
    make = build_folders(root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(index.CACHE_VARIABLE, raising=False)
    root.chmod(0o555)
    try:
        assert len(make()) == 2
        assert the_index(tmp_path / "cache/yolo-lightning").is_file()
        assert not (root / index.CACHE_FOLDER).exists()
        parses = count_parses(monkeypatch, make())
        assert len(make()) == 2
        assert parses == []
    finally:
        root.chmod(0o755)


def test_indices_are_kept_where_one_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv(index.CACHE_VARIABLE, str(tmp_path / "my/indices"))
    make = build_folders(tmp_path / "set")
    build_voc(tmp_path / "other")().open()
    make().open()
    assert len(list((tmp_path / "my/indices").glob("*.index"))) == 2
    assert not (tmp_path / "set" / index.CACHE_FOLDER).exists()
    parses = count_parses(monkeypatch, make())
    assert len(make()) == 2
    assert parses == []


def test_where_nothing_can_be_kept_a_run_goes_on(tmp_path, monkeypatch):
    in_the_way = write(tmp_path / "file", "")
    monkeypatch.setenv(index.CACHE_VARIABLE, str(in_the_way / "below"))
    make = build_folders(tmp_path / "set")
    source = bound(make(mapping=FRENCH))
    assert len(source) == 2
    again = pickle.loads(pickle.dumps(source))
    assert again.image_name(1) == source.image_name(1)


def test_a_source_goes_to_a_worker_as_the_path_of_its_index(tmp_path):
    (tmp_path / "pomme").mkdir()
    for k in range(400):
        (tmp_path / "pomme" / f"a picture with a long name, number {k}.jpg").touch()
    source = bound(ImageFolder(str(tmp_path), mapping=FRENCH))
    opened = source.open()
    assert sum(array.nbytes for array in opened.arrays.values()) > 15_000
    packed = pickle.dumps(opened)
    assert len(packed) < 600
    assert len(pickle.dumps(source)) < 3000
    again = pickle.loads(packed)
    assert again.file == opened.file
    assert again.facts == opened.facts
    assert again.arrays.keys() == opened.arrays.keys()
    for name, array in opened.arrays.items():
        assert again[name].dtype == array.dtype
        assert np.array_equal(again[name], array)
    assert again.text("images", 7) == opened.text("images", 7)


@pytest.mark.parametrize("kind", SOURCES)
def test_indices_are_mapped_not_read(tmp_path, kind):
    opened = SOURCES[kind](tmp_path)().open()
    for name, array in opened.arrays.items():
        base: Any = array
        while not isinstance(base, mmap.mmap):
            assert base is not None, name
            base = base.base
        assert not array.flags.writeable


# --- recognition


@pytest.mark.parametrize(
    ("kind", "place", "expected"),
    [
        ("VOC", ".", VOCFolder),
        ("VOC devkit", ".", VOCFolder),
        ("ILSVRC", ".", ILSVRCDetection),
        ("COCO", "ann.json", COCOJson),
        ("COCO", ".", COCOJson),
        ("YOLO", "data.yaml", YOLOText),
        ("YOLO", ".", YOLOText),
        ("YOLO folder", ".", YOLOText),
    ],
)
def test_layouts_with_boxes_are_recognised(tmp_path, kind, place, expected):
    BOXES[kind](tmp_path)
    source = detection_source(str(tmp_path / place))
    assert type(source) is expected
    source.mapping = FRENCH
    source.bind(FRUIT)
    assert len(source) == 2
    assert source.node_counts() == {0: {"pomme": 1}, 1: {"banane": 1}}


def test_boxes_of_imagenets_archive_are_recognised(tmp_path):
    write_xml(tmp_path / "Annotations/CLS-LOC/train/n01/n01_7.xml", "n01", (1, 2, 3, 4))
    plain(tmp_path / "Data/CLS-LOC/train/n01/n01_7.JPEG", 90)
    source = detection_source(str(tmp_path))
    assert type(source) is ILSVRCDetection
    assert len(bound(source, WNIDS)) == 1


def test_cocos_own_archive_is_recognised(tmp_path):
    for split in ("train", "val"):
        plain(tmp_path / f"{split}2017/a.jpg", 90)
        for kind in ("instances", "person_keypoints"):
            write_coco(tmp_path / f"annotations/{kind}_{split}2017.json", [GOOD_COCO])
    source = detection_source(str(tmp_path))
    assert source.name == f"COCO {tmp_path / 'annotations/instances_train2017.json'}"


@pytest.mark.parametrize("place", ["train.txt", "obj.data", "."])
def test_yolo_lists_and_folders_without_a_description_are_recognised(tmp_path, place):
    write_layout(
        tmp_path,
        {
            "obj.data": "train = train.txt\nnames = obj.names\n",
            "obj.names": "banana\napple\n",
            "train.txt": "images/a.jpg\n",
            "images/a.jpg": "labels/a.txt",
        },
    )
    source = detection_source(str(tmp_path / place))
    assert type(source) is YOLOText
    assert len(bound(source)) == 1


def test_voc_folders_are_recognised_by_years_lists_and_splits(tmp_path, write_voc):
    kit = tmp_path / "VOCdevkit"
    write_devkit(kit, write_voc, 2012, {"train": "a", "trainval": "ab"})
    write_devkit(kit, write_voc, 2007, {"train": "a", "trainval": "ab", "test": "b"})
    years = bound(detection_source(str(kit)))
    assert [path[:7] for path in paths_of(years, kit)] == ["VOC2007"] * 2 + ["VOC2012"] * 2
    year = bound(detection_source(str(kit / "VOC2007"), "test"))
    assert paths_of(year, kit) == ["VOC2007/JPEGImages/2007_b.jpg"]
    assert len(bound(detection_source(str(kit / "VOC2007")))) == 2
    for split in ("train", "test"):
        write_voc(tmp_path / "splits" / split, split, [GOOD_VOC])
    assert paths_of(bound(detection_source(str(tmp_path / "splits"))), tmp_path / "splits") == [
        "train/train.jpg"
    ]
    test = bound(detection_source(str(tmp_path / "splits"), "test"))
    assert paths_of(test, tmp_path / "splits") == ["test/test.jpg"]


def test_of_several_coco_files_the_one_of_the_split_is_taken(tmp_path):
    plain(tmp_path / "train2017/a.jpg", 90)
    plain(tmp_path / "val2017/a.jpg", 90)
    for split in ("train", "val"):
        write_coco(tmp_path / f"annotations/instances_{split}2017.json", [GOOD_COCO])
    write(tmp_path / "annotations/captions_train2017.json", '{"images": [], "annotations": []}')
    train = bound(detection_source(str(tmp_path)))
    assert paths_of(train, tmp_path) == ["train2017/a.jpg"]
    val = bound(detection_source(str(tmp_path), "val"))
    assert paths_of(val, tmp_path) == ["val2017/a.jpg"]
    with pytest.raises(InputError, match=r"several COCO files; name one of .*instances_train2017"):
        detection_source(str(tmp_path), "test")


@pytest.mark.parametrize(
    ("kind", "place", "expected"),
    [
        ("class folders", ".", ImageFolder),
        ("table", "table.csv", LabelCSV),
    ],
)
def test_layouts_with_labels_are_recognised(tmp_path, kind, place, expected):
    LABELS[kind](tmp_path)
    source = label_source(str(tmp_path / place))
    assert type(source) is expected
    assert source.name_counts() == {"pomme": 1, "banane": 1}


@pytest.mark.parametrize("folder", [".", "Data/CLS-LOC"])
def test_imagenet_is_recognised(tmp_path, folder):
    plain(tmp_path / folder / "train/n01440764/n01440764_18.JPEG", 90)
    plain(tmp_path / folder / "val/ILSVRC2012_val_00000001.JPEG", 90)
    source = label_source(str(tmp_path))
    assert type(source) is ImageNet
    assert source.name_counts() == {"n01440764": 1}


@pytest.mark.parametrize("recognise", [detection_source, label_source])
def test_what_is_not_recognised_is_answered_with_what_is(tmp_path, recognise):
    write(tmp_path / "notes.md", "nothing")
    known = {
        detection_source: "known: COCO JSON; .*VOC.*; YOLO text .*; ILSVRC",
        label_source: "known: a folder with one folder of images per class; ImageNet's; a CSV",
    }[recognise]
    for place in (tmp_path, tmp_path / "notes.md"):
        with pytest.raises(InputError, match=f"{place}: no images with .* recognised; {known}"):
            recognise(str(place))
    with pytest.raises(InputError, match="gone': no such file or folder"):
        recognise(str(tmp_path / "gone"))


# --- several sources


def test_several_sources_follow_each_other(tmp_path, write_voc):
    write_voc(tmp_path / "voc", "a", [GOOD_VOC, ("apple", 2, 2, 9, 9)])
    write_voc(tmp_path / "voc", "b", [GOOD_VOC])
    yolo = build_yolo(tmp_path / "yolo")(mapping=FRENCH)
    write(tmp_path / "yolo/labels/b.txt", "7 0.5 0.5 0.1 0.1\n")
    folders = build_folders(tmp_path / "folders")(mapping=FRENCH)
    plain(tmp_path / "one/apple/x.png", 7)
    data = data_of(
        detection=[VOCFolder(str(tmp_path / "voc")), yolo],
        classification=[folders, ImageFolder(str(tmp_path / "one"))],
        detection_batch_size=4,
        classification_batch_size=3,
    )
    boxes, labels = data.detection, data.classification
    assert boxes is not None
    assert labels is not None
    assert (len(boxes), len(labels)) == (4, 3)
    assert [boxes.image_name(k) for k in range(4)] == [
        str(tmp_path / name)
        for name in ("voc/a.jpg", "voc/b.jpg", "yolo/images/a.jpg", "yolo/images/b.jpg")
    ]
    assert [labels.image_name(k) for k in range(3)] == [
        str(tmp_path / name)
        for name in ("folders/banane/b.jpg", "folders/pomme/a.jpg", "one/apple/x.png")
    ]
    assert boxes.node_counts() == {0: {"apple": 1, "pomme": 1}, 1: {"banana": 2}}
    assert labels.node_counts() == {0: {"apple": 1, "pomme": 1}, 1: {"banane": 1}}
    assert [boxes.read(k).labels.tolist() for k in range(4)] == [[1, 0], [1], [0], []]
    assert [labels.read(k)[1] for k in range(3)] == [1, 0, 0]
    shapes, sizes = boxes.shapes_wh_px()
    np.testing.assert_allclose(shapes, [[10, 20], [8, 8], [10, 20], [10, 20]], rtol=1e-5)
    assert sizes.tolist() == [[64, 48]] * 4
    assert data.boxed_nodes.tolist() == [0, 1]
    bad = tmp_path / "yolo/labels/b.txt"
    assert data.source_faults == [f"{bad}:1: class 7, allowed: 0 … 1, skipped"]
    batches = list(data.train_dataloader())
    assert sorted(batches[0].sample_ids.tolist()) == [0, 1, 2, 3]
    assert sorted(batches[1].sample_ids.tolist()) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["detection", "classification"])
def test_an_empty_list_of_sources_is_refused(kind):
    with pytest.raises(InputError, match="a list of sources is empty"):
        data_of(**{kind: []})


@pytest.mark.parametrize("kind", ["VOC", "COCO", "YOLO", "class folders", "table"])
def test_a_source_without_images_is_refused(tmp_path, kind):
    make = SOURCES[kind](tmp_path)
    for file in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.xml")]:
        file.unlink()
    with pytest.raises(InputError, match="no annotated images|holds no images|images are in none"):
        make().bind(FRUIT)


# --- exact order


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ten images with boxes and eleven with labels; one of each is broken."""
    root = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for k in range(10):
        save(root / f"boxes/images/{k}.jpg", rng.integers(0, 255, (48, 64 + k, 3), np.uint8))
        x, y = rng.uniform(0.3, 0.7, 2)
        write(root / f"boxes/labels/{k}.txt", f"{k % 2} {x} {y} 0.4 0.4\n")
    for k in range(11):
        place = root / "labels" / ("apple", "banana")[k % 2] / f"{k}.png"
        save(place, rng.integers(0, 255, (40, 40, 3), np.uint8))
    write(root / "boxes/images/3.jpg", "broken")
    write(root / "labels/apple/4.png", "broken")
    return root


def ordered(files: Path, **options: Any) -> CombinedDataModule:
    defaults = {
        "detection": YOLOText(str(files / "boxes"), names=["apple", "banana"]),
        "classification": ImageFolder(str(files / "labels")),
        "detection_batch_size": 4,
        "classification_batch_size": 8,
        "steps_per_epoch": 12,
        "detection_augmentation": DetectionAugmentation(),
        "classification_augmentation": ClassificationAugmentation((40, 80)),
        "seed": 5,
    }
    return data_of(**{**defaults, **options})


@pytest.fixture(scope="module")
def alone(files):
    """The batches of twelve steps, read without workers."""
    return list(ordered(files).train_dataloader())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 4])
def test_no_number_of_workers_changes_a_batch(files, alone, workers):
    helped = list(ordered(files, num_workers=workers).train_dataloader())
    assert len(helped) == len(alone) == 12
    for a, b in zip(alone, helped, strict=True):
        assert a.step == b.step
        assert a.sample_ids.tolist() == b.sample_ids.tolist()
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert a.faults == b.faults
        if isinstance(a, DetectionBatch):
            assert torch.equal(a.boxes_cxcywh_norm, b.boxes_cxcywh_norm)


def test_a_pass_holds_every_sample_once_and_no_two_are_alike(alone):
    for kind, size, passes in ((DetectionBatch, 10, 2), (ClassificationBatch, 11, 4)):
        chosen = [batch for batch in alone if isinstance(batch, kind)]
        ids = torch.cat([batch.sample_ids for batch in chosen]).tolist()
        found = [ids[k * size : (k + 1) * size] for k in range(passes)]
        assert all(sorted(one) == list(range(size)) for one in found)
        assert len({tuple(one) for one in found}) == passes
        images = torch.cat([batch.images for batch in chosen])
        again = images[ids.index(0)], images[size + ids[size:].index(0)]
        assert not torch.equal(*again)  # augmentation draws anew in each pass


def test_another_seed_gives_another_order(files, alone):
    other = next(iter(ordered(files, seed=6).train_dataloader()))
    assert other.sample_ids.tolist() != alone[0].sample_ids.tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batches(files, alone, world_size):
    data = ordered(files)
    dataset = JointDataset(
        data.detection, data.classification, data.augmentations, data.canvas_size, data.seed
    )
    order = data.order
    for step, whole in enumerate(alone):
        plans = [order.plan(step, rank, world_size) for rank in range(world_size)]
        assert sum((plan.indices for plan in plans), []) == order.plan(step).indices
        assert {plan.images_seen for plan in plans} == {whole.images_seen}
        parts = [dataset[plan] for plan in plans]
        assert len({len(part) for part in parts}) == 1
        assert torch.cat([part.sample_ids for part in parts]).tolist() == whole.sample_ids.tolist()
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
        assert [fault for part in parts for fault in part.faults] == whole.faults
