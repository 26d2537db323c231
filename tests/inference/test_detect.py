"""`detect`: sources, detections, output files."""

import csv
import itertools
import json
import re
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import miniatures
from tests.helpers.hostile_images import fifo, progressive_jpeg
from tests.helpers.trees import BACKBONE, TREE
from yolo_lightning import load
from yolo_lightning.cli.commands import detect
from yolo_lightning.cli.main import main
from yolo_lightning.detections import Detection
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint, export_model
from yolo_lightning.images import read_image
from yolo_lightning.inference.sources import (
    Frame,
    FrameSource,
    batched,
    find_sources,
    prefetch,
)
from yolo_lightning.inference.writers import CSVWriter
from yolo_lightning.tree.wordtree import WordTree

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
    torch.save(build_checkpoint(module, {}), path)
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


def test_quiet_and_hostile_names(checkpoint, photos, capsys):
    (photos / "a.jpg").rename(photos / "red\x1b[31m.jpg")
    assert run(checkpoint, photos, "--no-pictures", "--score-threshold", 1) == 0
    output = capsys.readouterr().out
    assert "photos/red\\x1b[31m.jpg: nothing found, " in output
    assert "\x1b" not in output
    assert run(checkpoint, photos, "--no-pictures", "--quiet") == 0
    assert ".jpg: " not in capsys.readouterr().out


def read_csv(folder):
    with (folder / "detections.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def run(checkpoint, *args):
    return main(["detect", checkpoint, *[str(arg) for arg in args]])


def test_all_formats_equal_the_python_interface(checkpoint, photos, tmp_path, capsys):
    out = tmp_path / "out"
    formats = ("--format", "coco", "yolo", "csv")
    assert run(checkpoint, photos, LOW, "--output", out, *formats) == 0
    output = capsys.readouterr().out
    assert "3 images" in output
    assert "milliseconds per image" in output
    shown = re.findall(r"^(.+): (.+), \d+\.\d ms$", output, re.M)
    assert [Path(path) for path, _ in shown] == sorted(photos.rglob("*.*"))
    model = load(checkpoint)
    coco = json.loads((out / "detections.json").read_text())
    names = {row["id"]: row["name"] for row in coco["categories"]}
    assert list(names.values()) == [row[2] for row in TREE]
    rows = read_csv(out)
    assert len(coco["images"]) == 3
    total = 0
    for entry in coco["images"]:
        path = photos / entry["file_name"]
        expected = model(path, score_threshold=0.05)
        assert expected, "the test needs detections"
        counts = Counter(one.name for one in expected)
        line = dict(shown)[str(path)]
        assert sorted(line.split(", ")) == sorted(f"{n} {name}" for name, n in counts.items())
        total += len(expected)
        height, width = read_image(path)[1]
        assert (entry["height"], entry["width"]) == (height, width)
        annotations = [row for row in coco["annotations"] if row["image_id"] == entry["id"]]
        csv_rows = [row for row in rows if row["file"] == entry["file_name"]]
        label = path.relative_to(photos).with_suffix(".txt")
        lines = (out / "labels" / label).read_text().splitlines()
        assert len(annotations) == len(csv_rows) == len(lines) == len(expected)
        for one, as_coco, as_csv, as_text in zip(
            expected, annotations, csv_rows, lines, strict=True
        ):
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


def test_formulas_in_the_table_are_quoted(tmp_path):
    source = FrameSource("=1+1.jpg", "=1+1.jpg", "=1+1", "image")
    frame = Frame(source, np.zeros((4, 4, 3), np.uint8), np.zeros(0), (4, 4))
    writer = CSVWriter(tmp_path, WordTree([("-key", "-", "@name")]))
    writer.write(frame, [Detection((-1.0, 0.0, 2.0, 2.0), "@name", 0.5, 0, "-key")], 1.0)
    writer.close()
    (row,) = read_csv(tmp_path)
    assert [row[name] for name in ("file", "name", "key", "x1")] == [
        "'=1+1.jpg", "'@name", "'-key", "-1.000",
    ]  # fmt: skip


def test_annotated_images_have_the_original_size_and_boxes(checkpoint, photos, tmp_path):
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


def test_batch_size_does_not_change_the_detections(checkpoint, photos, tmp_path):
    for size in (1, 2, 8):
        out = tmp_path / f"out{size}"
        args = (LOW, f"--batch-size={size}", "--no-pictures", "--format", "csv", "--output", out)
        assert run(checkpoint, photos, *args) == 0
    first, *others = (read_csv(tmp_path / f"out{size}") for size in (1, 2, 8))
    for other in others:
        assert len(other) == len(first)
        for one, two in zip(first, other, strict=True):
            assert one["name"] == two["name"]
            assert float(one["score"]) == pytest.approx(float(two["score"]), abs=1e-4)


def test_classes_option_includes_descendants(checkpoint, photos, tmp_path):
    def names(*args):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        fixed = (LOW, "--tree-threshold=0.1", "--no-pictures", "--format", "csv", "--output", out)
        assert run(checkpoint, photos, *fixed, *args) == 0
        return [row["name"] for row in read_csv(out)] if (out / "detections.csv").exists() else []

    everything = names()
    animals = [name for name in everything if name in ("animal", "cat", "dog")]
    assert 0 < len(animals) < len(everything)
    assert names("--classes", "animal") == animals
    assert names("--classes", "cat", "thing") == [
        name for name in everything if name in ("cat", "thing", "cup", "jug")
    ]


def test_lower_tree_threshold_gives_more_specific_classes(checkpoint, photos):
    model = load(checkpoint)
    path = photos / "a.jpg"
    coarse = {one.name for one in model(path, 0.05, tree_threshold=1.0)}
    fine = {one.name for one in model(path, 0.01, tree_threshold=0.0)}
    assert coarse <= {"animal", "thing"}
    assert fine <= {"cat", "dog", "cup", "jug"}


def test_python_interface_takes_arrays_and_another_size(checkpoint, photos):
    model = load(checkpoint)
    pixels, _ = read_image(photos / "c.png")
    assert model(pixels, 0.05) == model(photos / "c.png", 0.05)
    assert model(pixels, 0.05, image_size=160) != model(pixels, 0.05)
    with pytest.raises(InputError, match="multiples of 32"):
        model(pixels, image_size=100)
    others = {
        "float32 (96, 96, 3)": np.zeros((96, 96, 3), np.float32), "uint8 (48, 64)": pixels[..., 0],
        "uint8 (0, 64, 3)": pixels[:0], "torch.uint8": torch.zeros(96, 96, 3)[..., :2].byte(),
        "Image": Image.fromarray(pixels), "int": 3,
    }  # fmt: skip
    for found, image in others.items():
        with pytest.raises(InputError) as refused:
            model(image)
        assert str(refused.value).startswith(f"an image of {found}")


def test_darknet_files_instead_of_a_checkpoint(module, checkpoint, photos, tmp_path):
    export_model(module, {}, tmp_path / "net", False)
    (tmp_path / "net.data").write_text("names = net.names\ntree = net.tree\n")
    files = [f"--{name}={tmp_path / f'net.{name}'}" for name in ("cfg", "weights", "data")]
    same = (LOW, "--no-pictures", "--format", "csv", "--output")
    assert main(["detect", str(photos), *files, *same, str(tmp_path / "one")]) == 0
    assert run(checkpoint, photos, *same, tmp_path / "two") == 0
    one, two = read_csv(tmp_path / "one"), read_csv(tmp_path / "two")
    assert [row["name"] for row in one] == [row["name"] for row in two]
    for first, second in zip(one, two, strict=True):
        assert float(first["score"]) == pytest.approx(float(second["score"]), abs=1e-4)


def test_each_call_without_output_gets_a_new_folder(checkpoint, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, "photos/a.jpg") == 0
    assert run(checkpoint, "photos/a.jpg") == 0
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == [
        "detect-001", "detect-002",
    ]  # fmt: skip


def test_unreadable_images_are_reported_after_the_others(checkpoint, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    (photos / "scans.jpg").write_bytes(progressive_jpeg(101, 64))
    for name in ("pipe.jpg", "pipe.mp4"):
        fifo(photos / name)
    out = tmp_path / "out"
    assert run(checkpoint, photos, "--output", out) == 2
    output = capsys.readouterr()
    assert "broken.jpg: not a readable image" in output.err
    assert "scans.jpg: 101 scans of 64 x 64 px; allowed: at most 100" in output.err
    assert "pipe.jpg: not a regular file" in output.err
    assert "pipe.mp4: not a regular file" in output.err
    assert "3 images" in output.out
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
        (["{photos}", "--start=-1"], "--start is -1.0; allowed: 0 seconds or more"),
        (["{photos}", "--start=nan"], "--start is nan; allowed: 0 seconds or more"),
        (["{photos}", "--duration=0"], "--duration is 0.0; allowed: more than 0 seconds"),
        (["{photos}", "--output={photos}"], "holds files; nothing is overwritten"),
        (["{photos}", "--output={photos}/a.jpg"], "is a file; expected a folder"),
        (["{photos}", "--device=gpu"], "--device is 'gpu'; allowed: cpu, cuda"),
        (["{photos}/none.jpg"], "no such file or folder"),
        (["{photos}/*.gif"], "no such file or folder"),
        ([], "name a checkpoint, then images"),
        (["{photos}", "--cfg=x.cfg"], "need --weights"),
    ],
)  # fmt: skip
def test_invalid_input_gives_one_message(
    checkpoint, photos, tmp_path, monkeypatch, capsys, args, message
):
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert run(checkpoint, *[arg.format(photos=photos) for arg in args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("yolo-lightning: error: ")
    assert message in error
    assert "Traceback" not in error
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_other_files_and_classifiers_are_rejected(photos, tmp_path, capsys):
    from yolo_lightning.classifier import ClassifierModule

    classifier = ClassifierModule(tree=["a", "b"], backbone=BACKBONE, image_size=64)
    torch.save(build_checkpoint(classifier, {}), tmp_path / "c.ckpt")
    assert run(str(tmp_path / "c.ckpt"), photos) == 2
    assert "holds a classifier; detect takes a detector" in capsys.readouterr().err
    assert run(str(photos / "a.jpg"), photos) == 2
    assert "not a checkpoint of this program" in capsys.readouterr().err


# --- video


@pytest.fixture
def film(tmp_path):
    """Forty frames at ten frames/s, with a moving square."""
    pytest.importorskip("av")
    from yolo_lightning.inference.video_writer import VideoWriter

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
def test_annotated_video_has_every_frame_and_a_browser_codec(
    checkpoint, film, tmp_path, suffix, codec
):
    out = tmp_path / "out"
    args = (LOW, "--video-format", suffix, "--format", "coco", "csv", "--output", out)
    assert run(checkpoint, film, *args) == 0
    frames, name = frames_in(out / f"film.{suffix}")
    assert name.removeprefix("lib") in (codec, f"{codec}-vp9", "vpx-vp9")
    assert len(frames) == 40
    assert frames[0].shape == (96, 128, 3)
    assert frames[5][:8, :40].max() > 200, "frame rate in the corner"
    images = json.loads((out / "detections.json").read_text())["images"]
    assert [entry["frame"] for entry in images] == list(range(40))
    assert [entry["time_s"] for entry in images] == pytest.approx([k / 10 for k in range(40)])
    assert {row["frame"] for row in read_csv(out)} <= {str(k) for k in range(40)}


def test_start_and_duration_select_the_frames(checkpoint, film, tmp_path):
    out = tmp_path / "out"
    cut = ("--start=1", "--duration=1.5", "--no-fps-overlay")
    assert run(checkpoint, film, *cut, "--score-threshold=1", "--output", out) == 0
    frames, _ = frames_in(out / "film.webm")
    assert len(frames) == 15
    original, _ = frames_in(film)
    assert np.abs(frames[0].astype(int) - original[10]).mean() < 5
    assert np.abs(frames[0].astype(int) - original[14]).mean() > 5


def test_frames_before_damage_are_written(checkpoint, film, photos, tmp_path, capsys):
    from yolo_lightning.inference.video_writer import VideoWriter

    generator = np.random.default_rng(0)
    with VideoWriter(film, (96, 128), 10) as writer:  # noise: frames of equal size in the file
        for k in range(40):
            writer.write(generator.integers(0, 255, (96, 128, 3), dtype=np.uint8), k / 10)
    film.write_bytes(film.read_bytes()[: film.stat().st_size * 2 // 3])
    out = tmp_path / "out"
    assert run(checkpoint, film, photos / "a.jpg", "--output", out) == 2
    assert "film.mp4" in capsys.readouterr().err
    entries = json.loads((out / "detections.json").read_text())["images"]
    assert entries[-1]["file_name"].endswith("a.jpg")
    frames, _ = frames_in(out / "film.webm")
    assert 5 < len(frames) == len(entries) - 1 < 40


def test_without_pyav_images_work_and_videos_name_the_extra(
    checkpoint, photos, film, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(checkpoint, photos, "--output", tmp_path / "one") == 0
    assert run(checkpoint, film, "--output", tmp_path / "two") == 2
    assert "pip install 'yolo-lightning[video]'" in capsys.readouterr().err


def test_missing_camera_is_reported(checkpoint, tmp_path, capsys):
    pytest.importorskip("av")
    assert run(checkpoint, "97", "--output", tmp_path / "out") == 2
    assert "97" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- sources


def test_sources_are_found_once_with_unique_names(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = tmp_path / "list.txt"
    listed.write_text(f"# a list\nphotos/a.jpg\n{photos}/b/a.jpg\n\n")
    assert [(source.location, source.output_name) for source in find_sources([str(listed)])] == [
        ("photos/a.jpg", "a"), (f"{photos}/b/a.jpg", "a-2"),
    ]  # fmt: skip
    globbed = find_sources(["photos/*.*", "photos/a.jpg"])
    assert [source.output_name for source in globbed] == ["a", "c"]
    assert [source.output_name for source in find_sources(["photos"])] == ["a", "b/a", "c"]
    assert len(find_sources(["photos/**/*.jpg"])) == 2
    (photos / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images and no videos"):
        find_sources(["photos/empty"])
    (photos / "notes.md").write_text("")
    with pytest.raises(InputError, match="neither an image nor a video"):
        find_sources(["photos/notes.md"])


def test_live_frames_complete_their_batch(photos):
    (still,) = find_sources([str(photos / "a.jpg")])
    (live,) = find_sources(["0"])
    assert live.kind == "live"

    blank = np.zeros((1, 1, 3), np.uint8)

    def frames(*sources):
        return iter([Frame(source, blank, blank, (1, 1)) for source in sources])

    batches = list(batched(frames(still, still, still, live, live), 2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert [len(b) for b in batched(frames(live, live, live), 8)] == [1, 1, 1]


def test_prefetch_keeps_order_raises_errors_and_stops():
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


def test_prefetch_of_a_live_source_drops_frames_of_a_slow_consumer():
    def camera():
        for k in range(40):
            time.sleep(0.005)
            yield k

    received = []
    for k in prefetch(camera(), 1, drop_oldest=True):
        time.sleep(0.04)
        received.append(k)
    assert received == sorted(set(received))
    assert 2 < len(received) < 20
    assert received[-1] == 39

    def breaking():
        yield 0
        raise InputError("silent for 10 s")

    with pytest.raises(InputError, match="silent"):
        list(prefetch(breaking(), 1, drop_oldest=True))


class Recorder:
    """A writer that keeps the frames, slower than the network."""

    def __init__(self, error=None):
        self.written, self.closed, self.error = [], 0, error

    def write(self, frame, detections, frame_rate):
        time.sleep(0.01)
        if self.error is not None:
            raise self.error
        self.written.append((frame, detections[0]))

    def close(self):
        self.closed += 1


def batches_of_one() -> Any:
    return ([frame] for frame in range(20))


def test_interrupt_keeps_the_results_so_far(capsys):
    def predict(frames):
        if frames == [12]:
            raise KeyboardInterrupt
        return [[-frames[0]]]

    recorder: Any = Recorder()
    stats = detect.run(batches_of_one(), predict, lambda: [recorder], lambda *_: None)
    assert recorder.written == [(k, -k) for k in range(12)]
    assert (stats.frames, stats.interrupted, recorder.closed) == (12, True, 1)
    assert "interrupted; the results so far are written" in capsys.readouterr().err


def test_write_error_ends_the_run():
    recorder: Any = Recorder(OSError(28, "No space left on device"))
    show: Any = lambda *_: None  # noqa: E731
    predicted = []

    def predict(frames):
        predicted.extend(frames)
        time.sleep(0.01)
        return [[0]]

    with pytest.raises(OSError, match="No space"):
        detect.run(batches_of_one(), predict, lambda: [recorder], show)
    assert 0 < len(predicted) < 20
    assert recorder.closed == 1
    with pytest.raises(OSError, match="No space"):  # also of the last write
        detect.run(itertools.islice(batches_of_one(), 1), predict, lambda: [recorder], show)
