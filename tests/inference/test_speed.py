"""`speed`: timing, operation counts, output files."""

import csv
import json
import re
import statistics
import time
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from PIL import Image

from tests.helpers import darknet, miniatures
from yolo_lightning import detector
from yolo_lightning.batches import unit_range
from yolo_lightning.boxes import pairwise_iou
from yolo_lightning.classifier import ClassifierModule
from yolo_lightning.cli.commands.speed import measurement
from yolo_lightning.cli.data import recipe_data
from yolo_lightning.cli.main import main
from yolo_lightning.darknet.released import LAYOUTS
from yolo_lightning.detector import SCORE_THRESHOLD, DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.images import UnreadableSample
from yolo_lightning.inference import timing
from yolo_lightning.inference.classification import prepare
from yolo_lightning.inference.loading import load
from yolo_lightning.inference.timing import WARM_UP, Timing, billion_operations, measure_latency
from yolo_lightning.models.head import HeadOutput
from yolo_lightning.models.networks import YOLOv2

BACKBONE: list[list[Any]] = [
    ["conv", 8], ["pool"], ["conv", 8], ["pool"], ["conv", 8], ["pool"], ["conv", 8], ["pool"],
    ["conv", 16], ["pool"], ["conv", 16],
]  # fmt: skip
MODEL: dict[str, Any] = {
    "tree": ["box"], "anchors_wh_cell": [[1.0, 1.0]], "backbone": BACKBONE, "head_channels": 0,
    "passthrough_channels": 0,
}  # fmt: skip
FEW_RUNS = ("--runs", 2, "--batch-size", 3)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detector that predicts a box in every cell, of the size of the cell."""
    module = DetectorModule(**MODEL)
    with torch.no_grad():
        module.network.box_conv.weight.zero_()
        assert module.network.box_conv.bias is not None
        module.network.box_conv.bias.copy_(torch.tensor([0.0, 0, 0, 0, 5]))
    path = tmp_path_factory.mktemp("model") / "cells.ckpt"
    torch.save(build_checkpoint(module, {}), path)
    return str(path)


@pytest.fixture
def module(checkpoint):
    return load(checkpoint)


@pytest.fixture
def recipe(workplace):
    """A recipe whose test images of 64 px have a box in each quarter, that is in each cell."""
    images, annotations = [], []
    for image in range(5):
        miniatures.save_grey(workplace / f"images/{image}.png", 40 * image, 64, 64)
        images.append({"id": image, "file_name": f"{image}.png", "width": 64, "height": 64})
        for k, (x, y) in enumerate([(0, 0), (32, 0), (0, 32), (32, 32)]):
            row = {"id": 4 * image + k + 1, "image_id": image, "category_id": 3}
            annotations.append({**row, "bbox": [x, y, 32, 32]})
    file = miniatures.write_coco(
        workplace / "boxes.json", annotations, images, [{"id": 3, "name": "box"}]
    )
    source = {"class_path": "yolo_lightning.datamodules.COCOJson",
              "init_args": {"annotations": str(file)}}  # fmt: skip
    values = {
        "model": {"class_path": "yolo_lightning.DetectorModule", "init_args": MODEL},
        "data": {
            "class_path": "yolo_lightning.CombinedDataModule",
            "init_args": {
                "tree": ["box"], "detection": source, "validation": source, "num_workers": 0,
            },
        },
    }  # fmt: skip
    return miniatures.write(workplace / "recipe.yaml", yaml.safe_dump(values))


def run(*args):
    return main(["speed", *[str(arg) for arg in args]])


def read_output(folder):
    content = json.loads((folder / "speed.json").read_text())
    with (folder / "speed.csv").open(encoding="utf-8", newline="") as file:
        return content, content["sizes"], list(csv.DictReader(file))


def test_percentiles_and_shares_by_hand():
    runs = [(0.010, 0.006, 0.001), (0.020, 0.016, 0.002), (0.040, 0.010, 0.003)]
    found = Timing.from_runs(4, runs)
    assert found.median_ms == pytest.approx(20)
    assert found.p10_ms == pytest.approx(12)  # a fifth of the way from 10 to 20
    assert found.p90_ms == pytest.approx(36)
    assert found.images_per_second == pytest.approx(200)
    # medians of 6, 16, 10; of 1, 2, 3; and of what is left, 3, 2, 27
    parts = (found.network_share, found.decode_share, found.suppression_share)
    assert parts == pytest.approx((10 / 15, 2 / 15, 3 / 15))


def test_shares_are_never_negative():
    found = Timing.from_runs(1, [(0.010, 0.009, 0.002)])
    assert found.network_share == pytest.approx(9 / 11)
    assert found.suppression_share == 0


def test_stages_are_timed_between_clock_readings(module, monkeypatch):
    readings = iter([0.0, 6.0, 9.0, 10.0, 12.0] * (WARM_UP + 1))
    monkeypatch.setattr(timing.SynchronizedClock, "__call__", lambda self: next(readings))
    images, sizes = measurement.smooth_noise(64, 1)
    found = measure_latency(module, images, sizes, 1, 1)
    assert found.median_ms == 9000
    assert found.network_share == pytest.approx(6 / 9)
    assert found.decode_share == pytest.approx(2 / 9)
    assert found.suppression_share == pytest.approx(1 / 9)
    assert next(readings, None) is None


def test_clock_synchronizes_only_gpus(monkeypatch):
    synchronized: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    timing.SynchronizedClock(torch.device("cpu"))()
    assert not synchronized
    first = timing.SynchronizedClock(torch.device("cuda:1"))
    assert first() < first()
    assert synchronized == [torch.device("cuda:1")] * 2


def test_precision_name_mentions_tf32_on_gpus():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert timing.precision_name(cpu, torch.float32) == "float32"
    assert timing.precision_name(gpu, torch.float16) == "float16 with autocast"
    assert "TF32" in timing.precision_name(gpu, torch.float32)


def test_runs_cycle_through_the_images_and_remove_the_hook(module, monkeypatch):
    calls = []
    describe = module.detect_most_specific

    def recorded(images, sizes_hw_orig, score_threshold):
        assert torch.is_inference_mode_enabled()
        assert score_threshold == 0.25
        calls.append((images[:, 0, 0, 0].tolist(), sizes_hw_orig[:, 0].tolist()))
        return describe(images, sizes_hw_orig, score_threshold)

    monkeypatch.setattr(module, "detect_most_specific", recorded)
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 64, 64)
    measure_latency(module, images, torch.tensor([[5, 5], [6, 6], [7, 7]]), 2, 4)
    assert len(calls) == WARM_UP + 4
    assert calls[:3] == [([0, 1], [5, 6]), ([2, 0], [7, 5]), ([1, 2], [6, 7])]
    assert not module.network._forward_hooks


@pytest.mark.parametrize("name", ["yolov2-voc", "yolo9000"])
@pytest.mark.parametrize("size", [224, 416])
def test_operations_match_the_readme(name, size):
    with torch.device("meta"):
        network = darknet.build_network(LAYOUTS[name]())
    assert isinstance(network, YOLOv2)
    assert billion_operations(network, size) == pytest.approx(darknet.operations(name, size))


def test_table_without_recipe(checkpoint, module, workplace, capsys):
    assert run(checkpoint, "--image-sizes", 96, 64, 96, *FEW_RUNS) == 0
    text = capsys.readouterr().out
    content, rows, table = read_output(workplace / "outputs/speed/cells-001")
    assert [row["image_size"] for row in rows] == [64, 96]
    for row, line in zip(rows, table, strict=True):
        assert row["billion_operations"] == billion_operations(module.network, row["image_size"])
        assert (row["AP50"], row["AP"]) == (None, None)
        for prefix, images in (("", 1), ("batch_", 3)):
            low, median, high = (
                row[f"{prefix}latency_{name}"] for name in ("10_percent_ms", "ms", "90_percent_ms")
            )
            assert 0 < low <= median <= high
            assert row[f"{prefix}images_per_second"] == pytest.approx(1000 * images / median)
            parts = [row[f"{prefix}{name}_share"] for name in ("network", "decode", "suppression")]
            assert min(parts[:2]) > 0
            assert sum(parts) == pytest.approx(1)
        assert {k: "" if v is None else str(v) for k, v in row.items()} == line
        printed = f"^ *{row['image_size']} +- +- .*{row['images_per_second']:.1f} .*"
        assert re.search(printed + f"{row['batch_images_per_second']:.1f} ", text, re.MULTILINE)
    assert re.search(r"network +decode +suppress$", text, re.MULTILINE)
    assert "network, decoding and suppression: % of the time" in text
    assert (content["runs"], content["batch_size"], content["threads"]) == (2, 3, 1)
    for name in ("device_name", "torch", "yolo_lightning"):
        assert content[name]
        assert content[name] in text
    assert (content["device"], content["precision"], content["images"]) == (
        "cpu",
        "float32",
        "smooth noise",
    )
    with Image.open(workplace / "outputs/speed/cells-001/speed.png") as picture:
        assert min(picture.size) > 500
    assert run(checkpoint, "--image-sizes", 64, *FEW_RUNS) == 0
    assert (workplace / "outputs/speed/cells-002/speed.png").is_file()


def test_average_precision_at_each_size(checkpoint, recipe, workplace, capsys):
    out = workplace / "out"
    assert (
        run(checkpoint, "--recipe", recipe, "--image-sizes", 64, 96, *FEW_RUNS, "--output", out)
        == 0
    )
    content, rows, _ = read_output(out)
    # four cells at 64 px are the quarters; nine at 96 px overlap them by 4/9
    assert rows[0]["AP50"] == pytest.approx(1)
    assert rows[0]["AP"] == pytest.approx(1)
    assert rows[1]["AP50"] == pytest.approx(0)
    assert content["images"] == f"test images of {recipe}"
    assert re.search(r"^ *64 +1\.000 +1\.000 ", capsys.readouterr().out, re.MULTILINE)


def test_average_precision_equals_trainer_test(checkpoint, module, recipe):
    twin = load(checkpoint)
    data = measurement.load_test_data(str(recipe), [], module)
    for size in (96, 64):
        own = recipe_data([str(recipe), f"--data.image_size={size}"])
        tester = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        figures = tester.test(twin, own, verbose=False)[0]
        expected = {name: figures[f"test/{name}"] for name in ("AP50", "AP")}
        found = measurement.measure_accuracy(module, data, size, half=False)
        assert found == pytest.approx(expected)
    assert not module.training


def test_half_on_a_cpu_is_bfloat16(checkpoint, module, recipe, workplace, capsys):
    types = []
    module.network.box_conv.register_forward_hook(lambda m, i, output: types.append(output.dtype))
    images, sizes = measurement.smooth_noise(64, 1)
    assert measure_latency(module, images, sizes, 1, 1, torch.bfloat16).median_ms > 0
    assert set(types) == {torch.bfloat16}
    options = ("--recipe", recipe, "--half", "--image-sizes", 64, *FEW_RUNS, "--output", "out")
    assert run(checkpoint, *options) == 0
    content, rows, _ = read_output(workplace / "out")
    assert content["precision"] == "bfloat16 with autocast"
    assert "bfloat16 with autocast" in capsys.readouterr().out
    assert rows[0]["AP50"] == pytest.approx(1)


def test_number_of_threads_is_restored(checkpoint, workplace):
    before = torch.get_num_threads()
    options = ("--image-sizes", 64, *FEW_RUNS, "--output", "out")
    assert run(checkpoint, "--threads", before + 1, *options) == 0
    assert read_output(workplace / "out")[0]["threads"] == before + 1
    assert torch.get_num_threads() == before


def test_timed_images_are_spread_over_the_test_images(module, recipe, monkeypatch):
    data = measurement.load_test_data(str(recipe), [], module)
    images, sizes = measurement.load_images(data, module, 96, 2)
    assert images[:, 0, 0, 0].tolist() == [0, 80]  # the first and the third of five
    assert images.shape == (2, 3, 96, 96)
    assert sizes.tolist() == [[64, 64]] * 2
    assert measurement.load_images(data, module, 64, 9)[0].shape[0] == 5
    read = data.test.read

    def broken(index, min_side=None):
        if index == 0:
            raise UnreadableSample("0.png: broken")
        return read(index, min_side)

    monkeypatch.setattr(data.test, "read", broken)
    assert measurement.load_images(data, module, 96, 2)[0][:, 0, 0, 0].tolist() == [80]
    monkeypatch.setattr(data.test, "read", lambda *a: broken(0))
    with pytest.raises(InputError, match="no test image can be read: 0.png: broken"):
        measurement.load_images(data, module, 96, 2)


def test_noise_is_smooth_and_deterministic():
    images, sizes = measurement.smooth_noise(96, 3)
    assert torch.equal(images, measurement.smooth_noise(96, 3)[0])
    assert not torch.equal(images[0], images[1])
    assert images.dtype == torch.uint8
    assert sizes.tolist() == [[96, 96]] * 3
    steps = images.int().diff(dim=3).abs()
    assert int(steps.max()) < 30
    assert images.float().std() > 40


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory")]
)
def test_out_of_memory_omits_only_the_batch_columns(
    checkpoint, workplace, monkeypatch, capsys, error
):
    def with_little_memory(module, images, sizes, batch_size, *rest):
        if batch_size > max_batch_size:
            raise error
        return measure_latency(module, images, sizes, batch_size, *rest)

    monkeypatch.setattr(measurement, "measure_latency", with_little_memory)
    max_batch_size = 1
    assert run(checkpoint, "--image-sizes", 64, *FEW_RUNS, "--output", "out") == 0
    assert "too little memory" in capsys.readouterr().out
    _, (row,), (line,) = read_output(workplace / "out")
    assert row["batch_latency_ms"] is None
    assert line["batch_latency_ms"] == ""
    assert row["latency_ms"] > 0
    max_batch_size = 0
    assert run(checkpoint, "--image-sizes", 64, *FEW_RUNS, "--output", "none") == 2
    assert "64 px: too little memory for one image" in capsys.readouterr().err
    monkeypatch.setattr(measurement, "is_out_of_memory", lambda error: False)
    with pytest.raises(type(error)):
        run(checkpoint, "--image-sizes", 64, *FEW_RUNS, "--output", "neither")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image-sizes", "100"], "image size 100: allowed are multiples of 32"),
        (["--image-sizes", "64", "0"], "--image-sizes contains 0; allowed: 32, 64"),
        (["--runs", "0"], "--runs is 0; allowed: 1 or more"),
        (["--batch-size", "0"], "--batch-size is 0; allowed: 1 or more"),
        (["--threads", "0"], "--threads is 0; allowed: 1 or more"),
        (["--device", "abacus"], "--device is 'abacus'; allowed: cpu, cuda, cuda:1"),
        (["--device", "meta"], "--device is 'meta'; allowed: cpu, cuda, cuda:1"),
        (["--device", "cuda:99"], "device 'cuda:99'"),
        (["--data.seed", "1"], "--data.seed: no such option; with --recipe, also options of"),
        (["--recipe", "none.yaml"], "recipe 'none.yaml' not found"),
        (["--recipe", "recipe.yaml", "--run", "1"], "--run: no such option; did you mean '--runs'"),
        (["--recipe", "recipe.yaml", "--data.tree=[crate]"], "data.tree differs from the check"),
        (["--recipe", "recipe.yaml", "--data.validation=null"], "defines neither data.test nor"),
        (["--output", "full"], "--output 'full' holds files; nothing is overwritten"),
        (["--output", "recipe.yaml"], "--output 'recipe.yaml' is a file; expected a folder"),
    ],
)  # fmt: skip
def test_invalid_input_writes_nothing(checkpoint, recipe, workplace, capsys, args, message):
    miniatures.write(workplace / "full/notes.txt", "mine")
    assert run(checkpoint, *args) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not output.out
    assert not (workplace / "outputs").exists()
    assert [path.name for path in (workplace / "full").iterdir()] == ["notes.txt"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A classifier that ranks every image's classes alphabetically, a first."""
    module = ClassifierModule(tree=list("abcdefg"), backbone=BACKBONE, image_size=64)
    with torch.no_grad():
        module.network.class_conv.weight.zero_()
        assert module.network.class_conv.bias is not None
        module.network.class_conv.bias.copy_(torch.arange(7.0, 0, -1))
    path = tmp_path_factory.mktemp("model") / "letters.ckpt"
    torch.save(build_checkpoint(module, {}), path)
    return str(path)


@pytest.fixture
def labels(workplace):
    """A recipe of test data alone: two images of a, one of b, one of g."""
    for k, (name, side) in enumerate([("a", 40), ("a", 64), ("b", 96), ("g", 50)]):
        miniatures.save_grey(workplace / f"labels/{name}/{k}.png", 60 * k, side, 48)
    source = {"class_path": "yolo_lightning.datamodules.ImageFolder",
              "init_args": {"root": "labels"}}  # fmt: skip
    data = {"test": source, "tree": list("abcdefg"), "num_workers": 0}
    values = {"class_path": "yolo_lightning.CombinedDataModule", "init_args": data}
    return miniatures.write(workplace / "labels.yaml", yaml.safe_dump({"data": values}))


def test_a_classifier_is_measured_with_its_accuracy(classifier, labels, workplace, capsys):
    options = ("--image-sizes", 64, 96, *FEW_RUNS, "--output", "out")
    assert run(classifier, "--recipe", labels, *options) == 0
    content, rows, table = read_output(workplace / "out")
    assert [(row["image_size"], row["top1"], row["top5"]) for row in rows] == [
        (64, 0.5, 0.75), (96, 0.5, 0.75),
    ]  # fmt: skip
    assert table[0]["top1"] == "0.5"
    network = load(classifier).network
    assert [row["billion_operations"] for row in rows] == [
        billion_operations(network, size) for size in (64, 96)
    ]
    assert all(row["network_share"] == 1 and row["suppression_share"] == 0 for row in rows)
    assert (content["metrics"], content["until"]) == (["top1", "top5"], "class logits")
    text = capsys.readouterr().out
    assert re.search(r"^ *px +top1 +top5 ", text, re.MULTILINE)
    assert re.search(r"^ *64 +0\.500 +0\.750 .* … \d+\.\d\)$", text, re.MULTILINE)
    assert not re.search("network|decod|suppress|%$", text, re.MULTILINE)
    with Image.open(workplace / "out/speed.png") as picture:
        assert min(picture.size) > 500


def test_sizes_of_a_classifier_are_the_papers_by_default(classifier, workplace):
    assert run(classifier, "--runs", 1, "--batch-size", 1, "--output", "out") == 0
    content, rows, _ = read_output(workplace / "out")
    assert [(row["image_size"], row["top1"]) for row in rows] == [(224, None), (448, None)]
    assert content["images"] == "smooth noise"


def test_timed_images_of_a_classifier_are_prepared_as_in_test(classifier, labels, workplace):
    module = load(classifier)
    data = measurement.load_test_data(str(labels), [], module, classifier)
    images, _ = measurement.load_images(data, module, 64, 8)
    files = sorted((workplace / "labels").glob("*/*.png"))
    prepared = [prepare(file, module, (64, 64), "crop")[0] for file in files]
    assert torch.equal(images, torch.stack(prepared))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--image-sizes", "100"], "image size 100: allowed are multiples of 32"),
        (["--recipe", "recipe.yaml"], "data.tree differs from the checkpoint's tree"),
        (
            ["--recipe", "recipe.yaml", "--data.tree=[a, b, c, d, e, f, g]"],
            "data.test has boxes; a classifier needs image labels",
        ),
    ],
)
def test_invalid_input_for_a_classifier(classifier, recipe, workplace, capsys, args, message):
    assert run(classifier, *args) == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "outputs").exists()


def test_images_without_boxes_are_rejected(checkpoint, recipe, workplace, capsys):
    miniatures.save_grey(workplace / "labels/box/a.png")
    values = yaml.safe_load(recipe.read_text())
    folders = "yolo_lightning.datamodules.ImageFolder"
    values["data"]["init_args"]["test"] = {"class_path": folders, "init_args": {"root": "labels"}}
    recipe.write_text(yaml.safe_dump(values))
    assert run(checkpoint, "--recipe", recipe) == 2
    assert "data.test has no boxes; a detector needs boxes" in capsys.readouterr().err


COCO_ANCHORS = [(0.57273, 0.677385), (1.87446, 2.06253), (3.33843, 5.47434), (7.88282, 3.52778),
                (9.77052, 9.16828)]  # fmt: skip


def clustered(images, classes, spread_cells):
    """Return a seeded head output at 416 px with boxes around ten objects per image.

    Objectness falls with the distance from the nearest object, from 0.98 to about 0.001; the logit
    of its class is 6 above the others.
    """
    generator, side = torch.Generator().manual_seed(0), 13
    centres = side * torch.rand(images, 10, 2, generator=generator)
    kinds = torch.randint(classes, (images, 10), generator=generator)
    cells = torch.cartesian_prod(*[torch.arange(side) + 0.5] * 2)
    distance, nearest = torch.cdist(cells.expand(images, -1, 2), centres).min(dim=2)  # (B, G)
    raw = torch.randn(images, 5, 5 + classes, side * side, generator=generator)
    raw[:, :, 2:4] *= 0.3
    raw[:, :, 4] *= 0.5
    raw[:, :, 4] += (4 - (distance / spread_cells) ** 2).clamp(min=-7)[:, None]
    class_rows = 5 + kinds.gather(1, nearest)[:, None, None].expand(-1, 5, 1, -1)
    raw.scatter_add_(2, class_rows, torch.full(class_rows.shape, 6.0))
    return HeadOutput.from_dense(raw.unflatten(3, (side, side)).flatten(1, 2), 5)


def timed(runs, function):
    """Return the median time in seconds, and the last result."""
    seconds, result = [], None
    for _ in range(runs):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


@pytest.mark.slow
@pytest.mark.parametrize("spread_cells", [0.5, 1.0, 4.0])
@torch.inference_mode()
def test_decode_and_suppression_of_64_images(spread_cells, monkeypatch):
    """Print the time of both; run with -s to see it."""
    module = DetectorModule([f"class {k}" for k in range(80)], COCO_ANCHORS).eval()
    eight, output = unit_range(measurement.smooth_noise(416, 8)[0]), clustered(64, 80, spread_cells)
    chunk, _ = timed(5, lambda: module.network(eight))
    monkeypatch.setattr(module.network, "forward", lambda images: output)
    monkeypatch.setattr(
        detector, "unit_range", lambda images: images
    )  # is part of the network's time
    inputs, sizes = eight[:1].expand(64, -1, -1, -1), torch.full((64, 2), 416)
    leaves = module.tree.leaves
    rest, found = timed(7, lambda: module.detect(inputs, sizes, leaves, SCORE_THRESHOLD))
    passing = (output.box_logits[:, :, 4].sigmoid() > SCORE_THRESHOLD).sum() / 64
    pairs = sum(len(image.labels) for image in found) / 64
    print(
        f"\n64 images at 416 px, {torch.get_num_threads()} threads: network {8 * chunk:.1f} s, "
        f"decode and suppression {rest:.2f} s, {100 * rest / (8 * chunk):.1f} %; per image: "
        f"{passing:.0f} boxes of 845 above the threshold, {pairs:.0f} pairs kept"
    )
    for image in found:
        assert len(image.labels) >= 5
        assert bool(image.boxes_xyxy_orig_px.isfinite().all())
        assert bool((image.scores.diff() <= 0).all())
        assert float(image.scores.min()) > SCORE_THRESHOLD
    first = found[0]
    iou = pairwise_iou(first.boxes_xyxy_orig_px, first.boxes_xyxy_orig_px)
    same = (first.labels[:, None] == first.labels).fill_diagonal_(False)
    assert float(iou[same].max()) <= module.iou_threshold
