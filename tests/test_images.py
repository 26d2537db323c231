"""Decoding of images: formats, orientation, reduced size, damaged files."""

import shutil
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from tests.helpers import hostile_images
from tests.helpers.images import exif_of
from tests.helpers.miniatures import (
    HEIGHT,
    WIDTH,
    bind_source,
    quarters,
    save,
    save_grey,
    set_up_data,
    write,
)
from yolo_lightning import images
from yolo_lightning.batches import ClassificationBatch, DetectionBatch
from yolo_lightning.datamodules import ImageFolder, LabelCSV, VOCFolder, YOLOText, files
from yolo_lightning.errors import InputError
from yolo_lightning.images import (
    UnreadableSample,
    centre_crop,
    check_image,
    decode_image,
    fit,
    read_header,
    read_image,
    resize_image,
)

# --- damaged images


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
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
    "bomb": lambda folder: put(folder / "bad.png", hostile_images.png_bomb()),
    "scans": lambda folder: put(folder / "bad.jpg", hostile_images.progressive_jpeg(101, 64)),
    "texts": lambda folder: put(folder / "bad.png", hostile_images.png_texts(21, 100)),
    "too wide for OpenCV": lambda folder: save(folder / "bad.bmp", Image.new("1", (1_100_000, 1))),
    "not a format of ours": lambda folder: put(
        folder / "bad.jpg", hostile_images.animation("TIFF", 1, 32)
    ),
    "named pipe": lambda folder: hostile_images.fifo(folder / "bad.jpg"),
}


@pytest.mark.parametrize("kind", BAD)
def test_damaged_image_raises_with_its_path(tmp_path, kind):
    file = BAD[kind](tmp_path)
    with pytest.raises(UnreadableSample) as caught:
        read_image(file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("kind", BAD)
def test_damaged_image_is_replaced_in_training(tmp_path, kind):
    folder = tmp_path / "images"
    save_grey(folder / "a.png", 40)
    bad = BAD[kind](folder)
    save_grey(folder / "c.png", 200)
    for name in ("a", "bad", "c"):
        write(tmp_path / "labels" / f"{name}.txt", f"{int(name == 'c')} 0.5 0.5 0.5 0.5\n")
    table = f"images/a.png,apple\nimages/{bad.name},apple\nimages/c.png,banana\n"
    data = set_up_data(
        detection=YOLOText(str(tmp_path), names=["apple", "banana"]),
        classification=LabelCSV(str(write(tmp_path / "table.csv", table))),
        detection_batch_size=3,
        classification_batch_size=3,
    )
    batches = list(data.train_dataloader())
    assert [type(batch) for batch in batches] == [DetectionBatch, ClassificationBatch]
    for batch in batches:
        # the image that is read in its place has its own id
        order = batch.sample_ids.argsort()
        assert batch.sample_ids[order].tolist() == [0, 0, 2]
        assert batch.images[order, 0, 32, 32].tolist() == [40, 40, 200]
        assert batch.labels.reshape(3, -1)[order, 0].tolist() == [0, 0, 1]
        (fault,) = batch.faults
        assert fault.startswith(f"{bad}: ")
        assert fault.endswith("; another image is used instead")


def test_damaged_image_is_left_out_of_evaluation(tmp_path):
    save_grey(tmp_path / "apple/a.png", 40)
    bad = write(tmp_path / "apple/b.jpg", "")
    save_grey(tmp_path / "banana/c.png", 200)
    source = ImageFolder(str(tmp_path))
    data = set_up_data(classification=source, validation=source, classification_batch_size=3)
    (batch,) = list(data.val_dataloader())
    assert isinstance(batch, ClassificationBatch)
    assert batch.sample_ids.tolist() == [0, -1, 2]
    reason = "not a readable image (allowed: JPEG, PNG, BMP, WebP, GIF)"
    assert batch.faults == [f"{bad}: {reason}; left out of the evaluation"]


def test_image_deleted_after_indexing_is_replaced(tmp_path):
    save_grey(tmp_path / "apple/a.png", 40)
    gone = save_grey(tmp_path / "banana/b.png", 200)
    data = set_up_data(classification=ImageFolder(str(tmp_path)), classification_batch_size=2)
    gone.unlink()
    (batch,) = list(data.train_dataloader())
    assert batch.labels.tolist() == [0, 0]
    assert batch.faults == [
        f"{gone}: cannot be read (No such file or directory); another image is used instead"
    ]


def test_training_without_a_readable_image_raises(tmp_path):
    for k in range(3):
        write(tmp_path / f"apple/{k}.jpg", "")
    with pytest.raises(InputError, match=r"no readable image among 3: .*\.jpg: not a"):
        set_up_data(classification=ImageFolder(str(tmp_path)), classification_batch_size=1)


def test_class_with_only_damaged_images_is_replaced(tmp_path):
    for k in range(40):
        write(tmp_path / f"apple/{k:02}.jpg", "")
        save_grey(tmp_path / f"banana/{k:02}.png", 1 + k)
    data = set_up_data(classification=ImageFolder(str(tmp_path)), classification_batch_size=16)
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    assert all((batch.labels == 1).all() for batch in batches)
    stood_in = {int(v) for batch in batches for v in batch.images[:, 0, 32, 32]}
    assert len(stood_in) == 40  # not the same neighbour for all of them


def fail_decode(*args: Any, **options: Any) -> None:
    raise AssertionError("decoded")


def test_decompression_bomb_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", fail_decode)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail_decode)
    file = put(tmp_path / "bomb.png", hostile_images.png_bomb())
    for read in (read_header, read_image):
        with pytest.raises(UnreadableSample, match=r"bomb\.png: .* million"):
            read(file)


def test_size_error_names_the_limit(tmp_path):
    data = bytearray(hostile_images.png_bomb())
    data[16:24] = struct.pack(">II", 14_000, 14_000)  # 196 million: above 178, below twice that
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(UnreadableSample, match="more than 17[89] million"):
        read_image(put(tmp_path / "bomb.png", bytes(data)))


def test_limits_of_scans(monkeypatch):
    whole, size_hw = decode_image(hostile_images.progressive_jpeg(100, 64), "a")
    assert whole.shape[:2] == size_hw == (64, 64)
    with pytest.raises(UnreadableSample, match="^a: 101 scans of 64 x 64 px; allowed: at most 100"):
        check_image(hostile_images.progressive_jpeg(101, 64), "a")
    monkeypatch.setattr(images, "MAX_SCANNED_PIXELS", 64 * 64 * 7)
    check_image(hostile_images.progressive_jpeg(7, 64), "a")
    with pytest.raises(UnreadableSample, match="^a: 8 scans of 64 x 64 px; allowed: at most 7$"):
        check_image(hostile_images.progressive_jpeg(8, 64), "a")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif"])
def test_ordinary_files_are_far_from_the_limits(tmp_path, suffix):
    """Also with a thumbnail and texts; Pillow writes 10 scans for colours, mozjpeg up to 14."""
    thumbnail = save(tmp_path / "thumbnail.jpg", progressive=True).read_bytes()
    texts = PngImagePlugin.PngInfo()
    for name in ("XML:com.adobe.xmp", "Comment"):
        texts.add_itxt(name, "text " * 100, zip=True)
    options: dict[str, dict[str, Any]] = {
        "jpg": {"progressive": True, "comment": thumbnail},
        "png": {"pnginfo": texts},
    }
    data = save(tmp_path / f"a.{suffix}", **options.get(suffix, {})).read_bytes()
    assert check_image(data, "a").size_hw == (HEIGHT, WIDTH)
    if suffix == "jpg":
        assert len(images._SCAN.findall(data)) == 20
        assert images.MAX_PIXELS * 14 < images.MAX_SCANNED_PIXELS


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_limit_of_parts_of_a_header(tmp_path, suffix):
    """Pillow needs 15 s for 2 million empty parts of a PNG, which has 24 MB."""
    data = save(tmp_path / f"a.{suffix}").read_bytes()
    parts = {"jpg": (2, b"\xff\xfe\0\2"), "png": (33, hostile_images.chunk(b"teSt", b""))}
    start, part = parts[suffix]
    for count in (200, images.MAX_HEADER_READS):
        file = tmp_path / f"{count}.{suffix}"
        file.write_bytes(data[:start] + part * count + data[start:])
    assert read_header(tmp_path / f"200.{suffix}").size_hw == (HEIGHT, WIDTH)
    for read in (read_header, read_image):
        with pytest.raises(UnreadableSample, match=f"{suffix}: a header of too many parts$"):
            read(file)


def test_limit_of_bytes(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png")
    size = file.stat().st_size
    monkeypatch.setattr(images, "MAX_BYTES", size - 1)
    message = f"a.png: {size} bytes; allowed: at most {size - 1}$"
    for read in (read_header, read_image, lambda file: check_image(file.read_bytes(), str(file))):
        with pytest.raises(UnreadableSample, match=message):
            read(file)


@pytest.mark.parametrize("make", [hostile_images.fifo, hostile_images.unix_socket, Path.mkdir])
def test_only_regular_files_are_opened(tmp_path, make, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 characters
    make(Path("a.jpg"))
    Path("b.jpg").symlink_to("a.jpg")
    for name in ("a.jpg", "b.jpg"):
        for read in (read_header, read_image):
            with pytest.raises(UnreadableSample, match=f"^{name}: not a regular file$"):
                read(Path(name))


def test_a_path_that_no_file_can_have_is_unreadable():
    for name in ("a\0b.jpg", "a" * 300 + ".jpg"):
        with pytest.raises(UnreadableSample, match="cannot be read"):
            read_image(Path(name))


@pytest.mark.slow
def test_scans_and_texts_do_not_take_the_time_that_they_would(tmp_path):
    """Decoding takes 28 s and 3 s."""
    for data in (hostile_images.jpeg_bomb(), hostile_images.png_texts()):
        started = time.perf_counter()
        with pytest.raises(UnreadableSample, match="scans|texts"):
            decode_image(data, "a", 416)
        assert time.perf_counter() - started < 0.5


# --- pixel formats


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
def test_header_is_read_without_decoding(tmp_path, monkeypatch, suffix):
    file = save(tmp_path / f"a.{suffix}")
    for kind in (ImageFile.ImageFile, PngImagePlugin.PngImageFile):
        monkeypatch.setattr(kind, "load", fail_decode)
    assert read_header(file).size_hw == (HEIGHT, WIDTH)


def alpha() -> Any:
    """Return an image whose right half is transparent."""
    opacity = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    opacity[:, WIDTH // 2 :] = 0
    return np.concatenate([quarters(), opacity], axis=2)


def grey_of(image: Any) -> Any:
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


SIXTEEN = np.repeat(np.array([[0x0000, 0x1234, 0x80FF, 0xFFFF]], np.uint16), 4, axis=0)
SIXTEEN_RGB = np.stack([SIXTEEN, SIXTEEN[:, ::-1], SIXTEEN // 2], axis=-1)


def sixteen(path: Path, pixels: Any) -> Path:
    assert cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    return path


GOOD: dict[str, tuple[Any, Any, float]] = {
    "JPEG": (lambda folder: save(folder / "a.jpg"), quarters(), 12),
    "grey JPEG": (lambda f: save(f / "a.jpg", Image.fromarray(quarters()).convert("L")),
                  grey_of(quarters()), 12),
    "CMYK JPEG": (lambda f: save(f / "a.jpg", Image.fromarray(quarters()).convert("CMYK")),
                  quarters(), 12),
    "16-bit PNG": (lambda folder: sixteen(folder / "a.png", SIXTEEN_RGB), SIXTEEN_RGB / 257, 1),
    "16-bit grey PNG": (lambda folder: sixteen(folder / "a.png", SIXTEEN),
                        np.repeat(SIXTEEN[..., None] / 257, 3, axis=2), 1),
    "palette PNG": (lambda f: save(f / "a.png", Image.fromarray(quarters()).quantize(16)),
                    quarters(), 1),
    "transparent palette PNG": (
        lambda f: save(f / "a.png", Image.fromarray(quarters()).quantize(16), transparency=0),
        quarters(), 1),
    "PNG with alpha": (lambda folder: save(folder / "a.png", alpha()), quarters(), 0),
    "WebP": (lambda folder: save(folder / "a.webp", lossless=True), quarters(), 0),
    "WebP with alpha": (lambda f: save(f / "a.webp", alpha(), lossless=True, exact=True),
                        quarters(), 0),
    "BMP": (lambda folder: save(folder / "a.bmp"), quarters(), 0),
    "GIF called .jpg": (lambda f: save(f / "a.gif").rename(f / "a.jpg"), quarters(), 1),
    "JPEG with a preview": (
        lambda f: save(f / "a.mpo", save_all=True, append_images=[Image.fromarray(quarters())],
                       quality=95, subsampling=0).rename(f / "a.jpg"), quarters(), 12),
    "1 x 1 JPEG": (lambda folder: save_grey(folder / "a.jpg", 90, 1, 1), np.full((1, 1, 3), 90), 1),
    "1 x 1 PNG": (lambda folder: save_grey(folder / "a.png", 90, 1, 1), np.full((1, 1, 3), 90), 0),
    "PNG called .jpg": (lambda f: save(f / "b.png").rename(f / "a.jpg"), quarters(), 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_every_pixel_format_becomes_rgb(tmp_path, kind):
    make, expected, tolerance = GOOD[kind]
    image, size_hw = read_image(make(tmp_path))
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert size_hw == expected.shape[:2]
    assert np.abs(image.astype(float) - expected).max() <= tolerance


def test_cmyk_is_converted_as_in_pillow(tmp_path):
    inks = np.zeros((48, 64, 4), np.uint8)
    inks[:24], inks[24:] = (200, 30, 90, 60), (10, 120, 250, 5)
    file = save(tmp_path / "a.jpg", Image.frombytes("CMYK", (64, 48), inks.tobytes()))
    with Image.open(file) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.abs(read_image(file)[0].astype(int) - expected).max() <= 2


@pytest.mark.parametrize("kind", GOOD)
def test_every_pixel_format_in_training(tmp_path, kind):
    make, expected, tolerance = GOOD[kind]
    (tmp_path / "apple").mkdir()
    make(tmp_path / "apple")
    data = set_up_data(
        classification=ImageFolder(str(tmp_path)),
        classification_batch_size=1,
        image_size=32,
    )
    (batch,) = list(data.train_dataloader())
    assert batch.faults == []
    top = (32 - 32 * expected.shape[0] // expected.shape[1]) // 2  # grey of the letterbox
    corner = batch.images[0, :, top + 1, 1].numpy()
    assert np.abs(corner - expected[0, 0]).max() <= max(tolerance, 1)


# --- orientation


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(tmp_path, orientation, suffix):
    file = save(tmp_path / f"a.{suffix}", exif=exif_of(orientation))
    with Image.open(file) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB")).astype(int)
    turned = orientation >= 5
    image, size_hw = read_image(file)
    assert size_hw == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))
    assert read_header(file).size_hw == size_hw
    assert image.shape[:2] == size_hw
    assert np.abs(image - expected).max() < 12


def test_exif_orientation_with_reduced_decoding(tmp_path):
    image, size_hw = read_image(save(tmp_path / "a.jpg", exif=exif_of(6)), min_side=12)
    assert size_hw == (64, 48)
    assert image.shape == (16, 12, 3)
    # a quarter clockwise: what was below on the left is above on the left now
    assert np.abs(image[2, 2].astype(int) - (60, 60, 220)).max() < 12


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_header_and_pixels_agree_on_an_orientation_in_xmp(tmp_path, suffix):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image, size_hw = read_image(save(tmp_path / f"a.{suffix}", xmp=xmp))
    assert image.shape[:2] == size_hw


def test_boxes_refer_to_the_rotated_image(tmp_path):
    upright = np.full((64, 32, 3), 20, np.uint8)
    upright[8:24, 16:28] = 240
    # shown after a quarter clockwise
    save(tmp_path / "images/a.jpg", np.rot90(upright).copy(), exif=exif_of(6))
    write(tmp_path / "labels/a.txt", f"0 {22 / 32} {16 / 64} {12 / 32} {16 / 64}\n")
    source = YOLOText(str(tmp_path), names=["apple"])
    data = set_up_data(detection=source, validation=source, detection_batch_size=1)
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


# --- decoding at reduced size


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A JPEG of 1600 x 1200 px that is darker towards the upper left."""
    across = np.linspace(20, 220, 1600)[None, :, None] * np.linspace(0.5, 1, 1200)[:, None, None]
    image = np.broadcast_to(across, (1200, 1600, 3)).astype(np.uint8)
    return save(tmp_path_factory.mktemp("large") / "a.jpg", image.copy())


@pytest.mark.parametrize(
    ("min_side", "expected"),
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
def test_large_jpeg_is_decoded_at_reduced_size(large, min_side, expected):
    image, size_hw = read_image(large, min_side)
    assert image.shape[:2] == expected
    assert size_hw == (1200, 1600)
    whole = cv2.resize(read_image(large)[0], expected[::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(whole.astype(int) - image).mean() < 2


def test_only_jpegs_are_decoded_at_reduced_size(tmp_path):
    for suffix in ("png", "webp", "bmp"):
        assert read_image(save_grey(tmp_path / f"a.{suffix}", 9, 80, 80), 10)[0].shape == (
            80,
            80,
            3,
        )


def test_boxes_are_scaled_with_a_reduced_image(large, tmp_path, write_voc):
    write_voc(tmp_path, "a", [("apple", 401, 301, 1200, 900)], (8, 8), (1600, 1200))
    shutil.copy(large, tmp_path / "a.jpg")
    source = bind_source(VOCFolder(str(tmp_path)))
    for min_side, scale in ((None, 1), (600, 2), (300, 4)):
        sample = source.read(0, min_side)
        assert sample.image.shape == (1200 // scale, 1600 // scale, 3)
        assert sample.size_hw_orig == (1200, 1600)
        expected = np.array([[400, 300, 1200, 900]]) / scale
        assert sample.boxes_xyxy_px.tolist() == expected.tolist()
        assert sample.faults == []


def test_reduced_decoding_moves_no_box_of_a_batch(tmp_path, monkeypatch):
    # sides that nothing divides: the worst case of rounding
    ramp = np.broadcast_to(np.linspace(0, 255, 1601)[None, :, None], (1203, 1601, 3))
    save(tmp_path / "images/a.jpg", ramp.astype(np.uint8))
    write(tmp_path / "labels/a.txt", "0 0.5 0.5 1 1\n1 0.2 0.7 0.1 0.05\n")
    source = YOLOText(str(tmp_path), names=["apple", "banana"])
    data = set_up_data(detection=source, validation=source, detection_batch_size=1, image_size=288)
    sides: list[int] = []

    def batches(shrink: bool) -> list[Any]:
        def read(path: Path, min_side: int | None = None) -> Any:
            found = read_image(path, min_side if shrink else None)
            sides.append(found[0].shape[1])
            return found

        monkeypatch.setattr(files, "read_image", read)
        return [next(iter(loader)) for loader in (data.train_dataloader(), data.val_dataloader())]

    shrunk, whole = batches(True), batches(False)
    assert sides == [401, 401, 1601, 1601]
    for a, b in zip(shrunk, whole, strict=True):
        torch.testing.assert_close(a.boxes_cxcywh_norm, b.boxes_cxcywh_norm, atol=0.5 / 288, rtol=0)
        assert (a.images.float() - b.images.float()).abs().mean() < 2
    assert shrunk[1].sizes_hw_orig.tolist() == whole[1].sizes_hw_orig.tolist() == [[1203, 1601]]


# --- network inputs


def test_darknet_interpolates_without_averaging_from_corner_to_corner():
    row = np.array([[0, 10, 100, 20, 200]], np.uint8)
    image = np.repeat(np.concatenate([row, row // 2])[..., None], 3, axis=2)  # (2, 5, 3)
    smaller = resize_image(image, (2, 3), "darknet")
    assert smaller.dtype == np.float32
    # each second pixel; those in between do not count, as they do for `area`
    assert smaller[:, :, 0] * 255 == pytest.approx(np.array([[0, 100, 200], [0, 50, 100]]))
    assert resize_image(image, (2, 3), "area")[0, 1, 0] < 80
    larger = resize_image(image, (3, 9), "darknet")[:, :, 1] * 255
    expected = [[0, 5, 10, 55, 100, 60, 20, 110, 200], [0, 3.75, 7.5, 41.25, 75, 45, 15, 82.5, 150]]
    assert larger[:2] == pytest.approx(np.array(expected), abs=1e-4)
    one_pixel = resize_image(image[:1, 3:4], (2, 2), "darknet")
    assert one_pixel * 255 == pytest.approx(np.full((2, 2, 3), 20))


def test_letterbox_of_darknet_is_half_grey():
    image = np.full((2, 5, 3), 255, np.uint8)
    fitted, scale, margin = fit(image, (8, 8), "letterbox", interpolation="darknet")
    assert fitted.dtype == np.float32
    # 5 x 2 in 8 x 8: 8 x 3 px, 2.5 px above rounded down
    assert (fitted[:2] == 0.5).all()
    assert (fitted[2:5] == 1).all()
    assert (fitted[5:] == 0.5).all()
    assert (scale, margin) == ((1.6, 1.5), (0, 2))
    same_size, *_ = fit(image, (2, 5), "stretch", interpolation="darknet")
    assert same_size.dtype == np.float32  # not the uint8 image itself


def test_centre_crop():
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, 20:60] = 200
    assert (centre_crop(image, (40, 40)) == 200).all()
    assert centre_crop(image, (20, 20)).shape == (20, 20, 3)
    assert centre_crop(image[:, :40], (64, 64)).shape == (64, 64, 3)
    assert centre_crop(image, (20, 20), "darknet") * 255 == pytest.approx(np.full((20, 20, 3), 200))
    wide = centre_crop(image, (10, 30))  # of 27 x 80 px
    assert wide.shape == (10, 30, 3)
    assert (wide[:, 8:22] == 200).all()
    assert (wide[:, :7] == 0).all()
