"""`detect`: what is read, what is found, what is written."""

import csv
import json
import sys
import threading
import time

import numpy as np
import pytest
import torch

from tests.helpers import miniatures
from tests.helpers.trees import BACKBONE, TREE
from yolo_lightning import load
from yolo_lightning.cli.main import main
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import checkpoint_of, export_model
from yolo_lightning.images import read_image
from yolo_lightning.inference.sources import (
    BackgroundWriter,
    Frame,
    in_batches,
    newest,
    places_in,
    prefetch,
)

LOW = "--score-threshold=0.05"


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(3)
    model = DetectorModule(
        tree=TREE, anchors_wh_cell=[(0.6, 0.6), (2.0, 1.4)], backbone=BACKBONE, head_channels=0,
        passthrough_channels=0, image_size=96, reorg="darknet",
    )  # fmt: skip
    with torch.no_grad():
        model.network.box_conv.weight.mul_(40)
        model.network.class_weight.mul_(40)
        model.network.class_bias.copy_(torch.randn_like(model.network.class_bias))
    return model.eval()


@pytest.fixture(scope="module")
def checkpoint(module, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.ckpt"
    torch.save(checkpoint_of(module, {}), path)
    return str(path)


@pytest.fixture
def photos(tmp_path):
    generator = np.random.default_rng(0)
    for k, (name, height, width) in enumerate(
        [("a.jpg", 120, 160), ("b/a.jpg", 300, 90), ("c.png", 48, 64)]
    ):
        image = generator.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
        miniatures.save(tmp_path / "photos" / name, image.repeat(8, 0).repeat(8, 1) // (k + 1))
    return tmp_path / "photos"


def rows_of(folder):
    with (folder / "detections.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(checkpoint, *args):
    return main(["detect", checkpoint, *[str(arg) for arg in args]])


def test_all_formats_say_what_the_python_door_says(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "out"
    formats = ("--format", "coco", "yolo", "csv")
    assert run(checkpoint, photos, LOW, "--output", out, *formats) == 0
    said = capsys.readouterr().out
    assert "3 images" in said
    assert "milliseconds an image" in said
    door = load(checkpoint)
    coco = json.loads((out / "detections.json").read_text())
    names = {row["id"]: row["name"] for row in coco["categories"]}
    assert list(names.values()) == [row[2] for row in TREE]
    rows = rows_of(out)
    assert len(coco["images"]) == 3
    total = 0
    for entry in coco["images"]:
        path = photos / entry["file_name"]
        expected = door(path, score_threshold=0.05)
        assert expected, "a test that finds nothing says nothing"
        total += len(expected)
        height, width = read_image(path)[1]
        assert (entry["height"], entry["width"]) == (height, width)
        found = [row for row in coco["annotations"] if row["image_id"] == entry["id"]]
        told = [row for row in rows if row["file"] == entry["file_name"]]
        label = path.relative_to(photos).with_suffix(".txt")
        lines = (out / "labels" / label).read_text().splitlines()
        assert len(found) == len(told) == len(lines) == len(expected)
        for one, as_coco, as_csv, as_text in zip(expected, found, told, lines, strict=True):
            x1, y1, x2, y2 = one.box_xyxy_orig_px
            assert as_coco["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=2e-3)
            assert as_coco["score"] == pytest.approx(one.score, abs=2e-6)
            assert names[as_coco["category_id"]] == as_csv["name"] == one.name
            assert as_csv["key"] == one.key
            assert float(as_csv["y2"]) == pytest.approx(y2, abs=1e-3)
            node, cx, _, w, *_, score = (float(v) for v in as_text.split())
            assert node == one.node
            assert cx == pytest.approx((x1 + x2) / 2 / width, abs=1e-5)
            assert w == pytest.approx((x2 - x1) / width, abs=1e-5)
            assert score == pytest.approx(one.score, abs=1e-5)
    assert total == len(rows)
    assert (out / "classes.txt").read_text().split() == [row[2] for row in TREE]


def test_pictures_have_the_size_of_the_original_and_boxes_on_them(checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    assert run(checkpoint, photos, LOW, "--output", out) == 0
    for name in ("a", "b/a", "c"):
        drawn, size_hw = read_image(out / f"{name}.jpg")
        (original,) = [p for p in photos.glob(f"{name}.*") if p.is_file()]
        image, expected = read_image(original)
        assert size_hw == expected
        assert np.abs(drawn.astype(int) - image).max() > 100
    assert not (out / "labels").exists()
    assert not (out / "detections.csv").exists()
    bare = tmp_path / "bare"
    assert run(checkpoint, photos, "--no-pictures", "--output", bare) == 0
    assert [path.name for path in bare.iterdir()] == ["detections.json"]


def test_batches_do_not_change_what_is_found(checkpoint, photos, tmp_path):
    for size in (1, 2, 8):
        out = tmp_path / f"out{size}"
        args = (LOW, f"--batch-size={size}", "--no-pictures", "--format", "csv", "--output", out)
        assert run(checkpoint, photos, *args) == 0
    first, *others = (rows_of(tmp_path / f"out{size}") for size in (1, 2, 8))
    for other in others:
        assert len(other) == len(first)
        for one, two in zip(first, other, strict=True):
            assert one["name"] == two["name"]
            assert float(one["score"]) == pytest.approx(float(two["score"]), abs=1e-4)


def test_classes_take_their_subtree(checkpoint, photos, tmp_path):
    def names(*args):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        fixed = (LOW, "--tree-threshold=0.1", "--no-pictures", "--format", "csv", "--output", out)
        assert run(checkpoint, photos, *fixed, *args) == 0
        return [row["name"] for row in rows_of(out)] if (out / "detections.csv").exists() else []

    everything = names()
    animals = [name for name in everything if name in ("animal", "cat", "dog")]
    assert 0 < len(animals) < len(everything)
    assert names("--classes", "animal") == animals
    assert names("--classes", "cat", "thing") == [
        name for name in everything if name in ("cat", "thing", "cup", "jug")
    ]


def test_lower_tree_thresholds_name_more_specifically(checkpoint, photos):
    door = load(checkpoint)
    path = photos / "a.jpg"
    coarse = {one.name for one in door(path, 0.05, tree_threshold=1.0)}
    fine = {one.name for one in door(path, 0.01, tree_threshold=0.0)}
    assert coarse <= {"animal", "thing"}
    assert fine <= {"cat", "dog", "cup", "jug"}


def test_the_door_takes_pixels_and_another_size(checkpoint, photos):
    door = load(checkpoint)
    pixels, _ = read_image(photos / "c.png")
    assert door(pixels, 0.05) == door(photos / "c.png", 0.05)
    assert door(pixels, 0.05, image_size=160) != door(pixels, 0.05)
    with pytest.raises(InputError, match="multiples of 32"):
        door(pixels, image_size=100)


def test_darknets_files_serve_as_they_are(module, checkpoint, photos, tmp_path):
    export_model(module, {}, tmp_path / "net", False)
    (tmp_path / "net.data").write_text("names = net.names\ntree = net.tree\n")
    files = [f"--{name}={tmp_path / f'net.{name}'}" for name in ("cfg", "weights", "data")]
    same = (LOW, "--no-pictures", "--format", "csv", "--output")
    assert main(["detect", str(photos), *files, *same, str(tmp_path / "one")]) == 0
    assert run(checkpoint, photos, *same, tmp_path / "two") == 0
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["name"] for row in one] == [row["name"] for row in two]
    for first, second in zip(one, two, strict=True):
        assert float(first["score"]) == pytest.approx(float(second["score"]), abs=1e-4)


def test_without_an_output_each_call_gets_a_folder(checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, "photos/a.jpg") == 0
    assert run(checkpoint, "photos/a.jpg") == 0
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == [
        "detect-001", "detect-002",
    ]  # fmt: skip


def test_unreadable_images_are_named_and_the_rest_is_done(checkpoint, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    out = tmp_path / "out"
    assert run(checkpoint, photos, "--output", out) == 2
    told = capsys.readouterr()
    assert "broken.jpg" in told.err
    assert "3 images" in told.out
    assert len(json.loads((out / "detections.json").read_text())["images"]) == 3
    assert not (out / "broken.jpg").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{photos}", "--score-threshold=1.5"], "--score-threshold is 1.5; allowed: 0 … 1"),
        (["{photos}", "--iou-threshold=-1"], "--iou-threshold is -1.0; allowed: 0 … 1"),
        (["{photos}", "--tree-threshold=nan"], "--tree-threshold is nan"),
        (["{photos}", "--classes", "cet"], "cat"),
        (["{photos}", "--image-size=100"], "multiples of 32"),
        (["{photos}", "--batch-size=0"], "--batch-size is 0; allowed: 1 or more"),
        (["{photos}", "--start=2"], "there are only images"),
        (["{photos}", "--output={photos}"], "holds files; nothing is overwritten"),
        (["{photos}", "--output={photos}/a.jpg"], "is a file; expected a folder"),
        (["{photos}", "--device=gpu"], "device 'gpu'"),
        (["{photos}/none.jpg"], "no such file or folder"),
        (["{photos}/*.gif"], "no such file or folder"),
        ([], "name a checkpoint, then images"),
        (["{photos}", "--cfg=x.cfg"], "need --weights"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_message(
    checkpoint, photos, tmp_path, monkeypatch, capsys, args, message
):
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert run(checkpoint, *[arg.format(photos=photos) for arg in args]) == 2
    told = capsys.readouterr().err
    assert told.startswith("yolo-lightning: error: ")
    assert message in told
    assert "Traceback" not in told
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_other_kinds_of_models_are_refused(photos, tmp_path, capsys):
    from yolo_lightning.classifier import ClassifierModule

    classifier = ClassifierModule(tree=["a", "b"], backbone=BACKBONE, image_size=64)
    torch.save(checkpoint_of(classifier, {}), tmp_path / "c.ckpt")
    assert run(str(tmp_path / "c.ckpt"), photos) == 2
    assert "holds a classifier; detect takes a detector" in capsys.readouterr().err
    assert run(str(photos / "a.jpg"), photos) == 2
    assert "not a checkpoint of this program" in capsys.readouterr().err


# --- video


@pytest.fixture
def film(tmp_path):
    """Forty frames at ten a second; a square moves through them."""
    pytest.importorskip("av")
    from yolo_lightning.inference.video import VideoWriter

    path = tmp_path / "film.mp4"
    with VideoWriter(path, (96, 128), 10) as writer:
        for k in range(40):
            image = np.full((96, 128, 3), 60, np.uint8)
            image[20:60, 2 * k : 2 * k + 40] = (230, 180, 40)
            writer.write(image, k / 10)
    return path


def frames_in(path):
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return frames, container.streams.video[0].codec_context.name


@pytest.mark.parametrize(("suffix", "codec"), [("webm", "vp9"), ("mp4", "h264")])
def test_a_written_video_has_every_frame_and_a_codec_of_browsers(
    checkpoint, film, tmp_path, suffix, codec
):
    out = tmp_path / "out"
    args = (LOW, "--video-format", suffix, "--format", "coco", "csv", "--output", out)
    assert run(checkpoint, film, *args) == 0
    frames, name = frames_in(out / f"film.{suffix}")
    assert name.removeprefix("lib") in (codec, f"{codec}-vp9", "vpx-vp9")
    assert len(frames) == 40
    assert frames[0].shape == (96, 128, 3)
    assert frames[5][:8, :40].max() > 200, "frames a second in the corner"
    images = json.loads((out / "detections.json").read_text())["images"]
    assert [entry["frame"] for entry in images] == list(range(40))
    assert [entry["time_s"] for entry in images] == pytest.approx([k / 10 for k in range(40)])
    assert {row["frame"] for row in rows_of(out)} <= {str(k) for k in range(40)}


def test_a_cut_begins_and_ends_where_it_is_told_to(checkpoint, film, tmp_path):
    out = tmp_path / "out"
    cut = ("--start=1", "--duration=1.5", "--no-fps-overlay")
    assert run(checkpoint, film, *cut, "--score-threshold=1", "--output", out) == 0
    frames, _ = frames_in(out / "film.webm")
    assert len(frames) == 15
    original, _ = frames_in(film)
    assert np.abs(frames[0].astype(int) - original[10]).mean() < 5
    assert np.abs(frames[0].astype(int) - original[14]).mean() > 5


def test_a_video_that_breaks_off_keeps_what_was_done(checkpoint, film, photos, tmp_path, capsys):
    from yolo_lightning.inference.video import VideoWriter

    generator = np.random.default_rng(0)
    with VideoWriter(film, (96, 128), 10) as writer:  # noise: frames of equal size in the file
        for k in range(40):
            writer.write(generator.integers(0, 255, (96, 128, 3), dtype=np.uint8), k / 10)
    film.write_bytes(film.read_bytes()[: film.stat().st_size * 2 // 3])
    out = tmp_path / "out"
    assert run(checkpoint, film, photos / "a.jpg", "--output", out) == 2
    told = capsys.readouterr()
    assert "film.mp4" in told.err
    entries = json.loads((out / "detections.json").read_text())["images"]
    assert entries[-1]["file_name"].endswith("a.jpg")
    frames, _ = frames_in(out / "film.webm")
    assert 5 < len(frames) == len(entries) - 1 < 40


def test_without_pyav_images_work_and_videos_say_what_is_missing(
    checkpoint, photos, film, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(checkpoint, photos, "--output", tmp_path / "one") == 0
    assert run(checkpoint, film, "--output", tmp_path / "two") == 2
    assert "pip install 'yolo-lightning[video]'" in capsys.readouterr().err


def test_a_camera_that_is_not_there_is_said_so(checkpoint, tmp_path, capsys):
    pytest.importorskip("av")
    assert run(checkpoint, "97", "--output", tmp_path / "out") == 2
    assert "97" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- what is read


def test_lists_globs_and_folders_name_places_once_and_apart(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = tmp_path / "list.txt"
    listed.write_text(f"# a list\nphotos/a.jpg\n{photos}/b/a.jpg\n\n")
    assert [(place.where, place.name) for place in places_in([str(listed)])] == [
        ("photos/a.jpg", "a"), (f"{photos}/b/a.jpg", "a-2"),
    ]  # fmt: skip
    assert [place.name for place in places_in(["photos/*.*", "photos/a.jpg"])] == ["a", "c"]
    assert [place.name for place in places_in(["photos"])] == ["a", "b/a", "c"]
    assert len(places_in(["photos/**/*.jpg"])) == 2
    (photos / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images and no videos"):
        places_in(["photos/empty"])
    (photos / "notes.md").write_text("")
    with pytest.raises(InputError, match="neither an image nor a video"):
        places_in(["photos/notes.md"])


def test_live_frames_do_not_wait_for_a_batch(photos):
    (still,) = places_in([str(photos / "a.jpg")])
    (live,) = places_in(["0"])
    assert live.kind == "live"

    blank = np.zeros((1, 1, 3), np.uint8)

    def frames(*places):
        return iter([Frame(place, blank, blank, (1, 1)) for place in places])

    batches = list(in_batches(frames(still, still, still, live, live), 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [len(b) for b in in_batches(frames(live, live, live), 8)] == [1, 1, 1]


def test_reading_ahead_keeps_order_passes_errors_and_ends_with_its_reader():
    assert list(prefetch(iter(range(50)), 3)) == list(range(50))

    def failing():
        yield 1
        raise InputError("broken")

    items = prefetch(failing(), 3)
    assert next(items) == 1
    with pytest.raises(InputError, match="broken"):
        next(items)
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    source = endless()
    items = prefetch(source, 2)
    next(items)
    before = threading.active_count()
    items.close()
    assert threading.active_count() < before


def test_live_frames_that_nobody_waited_for_are_left_out():
    def camera():
        for k in range(40):
            time.sleep(0.005)
            yield k

    seen = []
    for k in newest(camera()):
        time.sleep(0.04)
        seen.append(k)
    assert seen == sorted(set(seen))
    assert 2 < len(seen) < 20
    assert seen[-1] == 39

    def breaking():
        yield 0
        raise InputError("silent for 10 s")

    with pytest.raises(InputError, match="silent"):
        list(newest(breaking()))


def test_writing_behind_keeps_order_and_raises_what_went_wrong():
    done: list[int] = []
    writing = BackgroundWriter(done.append, 2)
    for k in range(20):
        writing.put(k)
    writing.close()
    assert done == list(range(20))

    def refuse(item):
        raise OSError(28, "No space left on device")

    writing = BackgroundWriter(refuse, 2)

    def put_many():
        for _ in range(100):
            writing.put(0)
            time.sleep(0.01)

    with pytest.raises(OSError, match="No space"):
        put_many()
    with pytest.raises(OSError, match="No space"):
        writing.close()
