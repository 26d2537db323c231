"""The graph from pixels to boxes, scores and nodes: eager, in ONNX Runtime, and in a .pt2 file."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.helpers.paths import REPO
from yolo_lightning import DetectorModule, WordTree
from yolo_lightning.boxes import batched_nms, unletterbox
from yolo_lightning.cli.main import main
from yolo_lightning.detections import Detections
from yolo_lightning.export import graph
from yolo_lightning.export.check import find_threshold, max_difference, run_onnx, run_torch
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.export.graph import DetectorGraph, GraphSettings, TreeDescent, nms_rows

pytestmark = pytest.mark.end_to_end

ROWS = [
    ("animal", "-", "animal"), ("tool", "-", "tool"), ("cat", "animal", "cat"),
    ("dog", "animal", "dog"), ("bengal", "cat", "Bengal"), ("manx", "cat", "Manx"),
    ("saw", "tool", "saw"), ("drill", "tool", "drill"),
]  # fmt: skip
BACKBONE = [["conv", 8], ["pool"], ["conv", 8], ["pool"], ["conv", 8]]
KINDS = {"onnx": ".onnx", "torch-export": ".pt2"}
OPTIONS: dict[str, Any] = {
    "score_threshold": 0.3,
    "tree_threshold": 0.6,
    "iou_threshold": 0.4,
    "top": 60,
}


def small(tree=ROWS, backbone=BACKBONE, **options) -> DetectorModule:
    """Return a detector that is sure of many different things."""
    torch.manual_seed(0)
    given = {"head_channels": 8, "passthrough_channels": 4, "image_size": 48} | options
    module = DetectorModule(tree, [(1.0, 1.5), (4.0, 3.0)], backbone, **given).eval()
    with torch.no_grad():
        head = module.network
        spreads = torch.tensor([0.3, 0.3, 0.3, 0.3, 2.0] * 2)[:, None, None, None]
        head.box_conv.weight.normal_().mul_(spreads)
        head.class_weight.normal_(std=3.0)
        # features are mostly positive: their mean would decide everything
        head.box_conv.weight.sub_(head.box_conv.weight.mean(dim=1, keepdim=True))
        head.class_weight.sub_(head.class_weight.mean(dim=2, keepdim=True))
    return module


def images(batch: int, height: int, width: int) -> torch.Tensor:
    """Return blots of 8 px, each of a colour."""
    random = torch.Generator().manual_seed(1)
    blots = torch.rand(batch, 3, height // 8, width // 8, generator=random)
    return (255 * blots).byte().repeat_interleave(8, 2).repeat_interleave(8, 3)


def original_sizes(batch: int) -> torch.Tensor:
    return torch.tensor([[70, 200], [333, 90], [64, 64]])[:batch]


@pytest.fixture(scope="module")
def module() -> DetectorModule:
    return small(iou_threshold=OPTIONS["iou_threshold"])


@pytest.fixture(scope="module")
def exported(module, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Return, for each format, a file and what the command printed."""
    folder = tmp_path_factory.mktemp("exported")
    torch.save(build_checkpoint(module, {}), folder / "m.ckpt")
    found = {}
    for kind, suffix in KINDS.items():
        output, printed = folder / f"m{suffix}", io.StringIO()
        args = [f"--{name.replace('_', '-')}={value}" for name, value in OPTIONS.items()]
        with contextlib.redirect_stdout(printed):
            command = ["export", str(folder / "m.ckpt"), "--format", kind, "--output", str(output)]
            assert main([*command, *args]) == 0
        found[kind] = output, printed.getvalue()
    assert sorted(path.name for path in folder.iterdir()) == ["m.ckpt", "m.onnx", "m.pt2"]
    return found


@pytest.fixture(scope="module")
def run_file(exported):
    """Return a function that runs the file of a format, at a score threshold if one is given."""
    program: Any = torch.export.load(exported["torch-export"][0]).module()  # takes a second

    def run(kind: str, given, sizes, score_threshold=None):
        if kind == "torch-export" and score_threshold is None:
            return program(given, sizes)
        runner = run_onnx if kind == "onnx" else run_torch
        (rows,) = runner(exported[kind][0], [(given, sizes)], score_threshold)
        return rows

    return run


def check_rows(rows, module, given, sizes, settings) -> list[Detections]:
    """Compare the output of a graph with `detect_most_specific`; return the detections."""
    ours: list[Detections]
    ours = module.detect_most_specific(
        given, sizes, settings.score_threshold, settings.tree_threshold
    )
    boxes, scores, nodes = rows
    assert boxes.shape == (len(given), settings.top, 4)
    assert scores.shape == nodes.shape == (len(given), settings.top)
    assert (boxes.dtype, scores.dtype, nodes.dtype) == (torch.float32, torch.float32, torch.int64)
    for k, found in enumerate(ours):
        best = found.select(torch.arange(min(len(found.scores), settings.top)))
        count = len(best.scores)
        assert bool((nodes[k, :count] >= 0).all())
        assert bool((nodes[k, count:] == -1).all())
        assert not boxes[k, count:].any()
        assert not scores[k, count:].any()
        assert bool((scores[k].diff() <= 0).all())
        theirs = Detections(boxes[k, :count], nodes[k, :count], scores[k, :count])
        assert float(max_difference(best, theirs, sizes[k].tolist())) < 1e-4
    return ours


def random_tree(count: int, top: int, seed: int) -> WordTree:
    """Return a tree whose nodes hang anywhere below earlier ones, deep now and then.

    Of its leaves below another node, every third is the ``X/other`` of that node.
    """
    random = np.random.default_rng(seed)
    rows = []
    for node in range(count):
        above = node - 1 if random.random() < 0.5 else int(random.integers(0, max(node, 1)))
        rows.append((f"n{node}", "-" if node < top else f"n{above}", f"n{node}"))
    others = {above: key for key, above, _ in rows[::3] if above != "-"}
    inner = {above for _, above, _ in rows}
    rows = [
        (f"{above}/other" if others.get(above) == key and key not in inner else key, above, name)
        for key, above, name in rows
    ]
    order = random.permutation(count)
    return WordTree([rows[k] for k in order])


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("count", "top"), [(1, 1), (9, 9), (60, 3), (200, 1)])
def test_tree_descent_equals_the_tree_at_every_depth(count, top, threshold):
    tree = random_tree(count, top, seed=count)
    assert count < 60 or tree.paths.shape[1] > 8
    assert count < 60 or (tree.is_other.sum() > 4 and (tree.reported != torch.arange(count)).any())
    logits = 4 * torch.randn(300, count, generator=torch.Generator().manual_seed(0))
    logits[100:200] = logits[100:200].round()  # ties
    first = torch.tensor([int((tree.groups == group).nonzero()[0]) for group in tree.groups])
    logits[200:, (first != torch.arange(count)).nonzero().flatten()[::2]] = -torch.inf
    nodes, probs = TreeDescent(tree, threshold)(logits)
    expected, expected_probs = tree.most_specific_nodes(logits, threshold)
    assert torch.equal(nodes, expected)
    torch.testing.assert_close(probs, expected_probs, rtol=1e-5, atol=1e-9)


def test_tree_descent_without_boxes():
    nodes, probs = TreeDescent(WordTree(ROWS), 0.5)(torch.zeros(0, len(ROWS)))
    assert nodes.shape == probs.shape == (0,)


def test_unletterbox_each_equals_unletterbox():
    random = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 3000, (200, 2), generator=random)
    sizes[:3] = torch.tensor([[64, 96], [1, 3000], [3000, 1]])
    boxes = torch.rand(len(sizes), 7, 4, generator=random)
    found = graph.unletterbox_each(boxes, sizes, 64, 96)
    image = torch.arange(len(sizes)).repeat_interleave(7)
    expected = unletterbox(boxes.flatten(0, 1), image, sizes, (64, 96))
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-6, atol=1e-6)


CROWDED = torch.tensor(
    [
        [0.0, 0, 10, 10], [0, 0, 10, 10],  # the same twice
        [0, 0, 5, 10], [20, 20, 20, 30],  # IoU 0.5 with the first; empty
        [20, 20, 30, 30], [21, 20, 31, 30], [60, 60, 70, 70],
    ]
)  # fmt: skip
SCORES = torch.tensor([[0.5, 0.5, 0.9, 0.3, 0.3, 0.3, 0.0], [0.5, 0.4, 0.3, 0.2, 0.1, 0.7, 0.6]])


@pytest.mark.parametrize(
    ("iou_threshold", "top", "expected"),
    [
        (0.5, 5, [[2, 0, 3, 4, -1], [5, 6, 0, 2, 3]]),  # 0.5 is not above 0.5; 4 falls to 5
        (0.4, 5, [[2, 3, 4, -1, -1], [5, 6, 0, 3, -1]]),
        (1.0, 2, [[2, 0], [5, 6]]),
        (0.0, 9, [[2, 3, 4, -1, -1, -1, -1, -1, -1], [5, 6, 0, 3, -1, -1, -1, -1, -1]]),
    ],
)
def test_three_implementations_of_nms_agree(iou_threshold, top, expected):
    boxes = CROWDED.expand(2, -1, -1).contiguous()
    assert nms_rows(boxes, SCORES, iou_threshold, top).tolist() == expected
    theirs = graph._onnx_nms(boxes.numpy(), SCORES.numpy(), iou_threshold, top)
    assert theirs.value.tolist() == expected
    for wanted, scores in zip(expected, SCORES, strict=True):
        index = (scores > 0).nonzero().flatten()
        one_class = torch.zeros_like(index)
        kept = index[batched_nms(CROWDED[index], scores[index], one_class, iou_threshold)]
        assert kept[:top].tolist() == [row for row in wanted if row >= 0]


@pytest.mark.parametrize(
    "options",
    [
        {"resize": "stretch"},
        {"reorg": "space_to_depth", "passthrough_channels": None},
        {"tree": ["a", "b", "c"], "passthrough_channels": 0, "batch_norm": False},
        {"location": "offset"},
        {"tree": ["alone"], "head_channels": 0, "passthrough_channels": 0},
        {
            "backbone": [
                ["conv", 8, 3, 2],
                ["pool", 3, 2],
                ["conv", 8],
                ["pool", 2, 1],
                ["conv", 8],
            ],
            "passthrough_channels": 0,
        },
    ],
)
def test_the_graph_equals_the_module_for_every_network(options):
    module = small(**options)
    settings = GraphSettings(module.hparams["resize"], 0.2, 0.4, module.iou_threshold, 30)
    wanted = DetectorGraph(module.network, module.tree, settings, nms_rows)
    found = check_rows(wanted(images(2, 48, 64), original_sizes(2)), module, images(2, 48, 64),
                       original_sizes(2), settings)  # fmt: skip
    assert sum(len(image.scores) for image in found) > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 48, 48), (1, 32, 80), (3, 8, 8)])
def test_files_equal_the_module(module, run_file, kind, shape):
    settings = GraphSettings("letterbox", **OPTIONS)
    sizes = original_sizes(shape[0])
    rows = run_file(kind, images(*shape), sizes)
    found = check_rows(rows, module, images(*shape), sizes, settings)
    if shape[0] == 2:  # more than fit, at several levels
        assert max(len(image.scores) for image in found) > settings.top
        depths = (module.tree.paths[rows[2][rows[2] >= 0]] >= 0).sum(dim=1)
        assert set(depths.tolist()) == {1, 2, 3}


def test_onnx_accepts_a_single_cell(module, run_file):
    settings, given = GraphSettings("letterbox", **OPTIONS), images(2, 8, 8)[:, :, 2:6, 2:6]
    found = check_rows(
        run_file("onnx", given, original_sizes(2), 0.01),
        module, given, original_sizes(2), replace(settings, score_threshold=0.01),
    )  # fmt: skip
    assert sum(len(image.scores) for image in found) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_files_return_only_padding_if_no_box_exceeds_the_threshold(run_file, kind):
    boxes, scores, nodes = run_file(kind, images(2, 48, 48), original_sizes(2), 0.9999)
    assert not boxes.any()
    assert not scores.any()
    assert bool((nodes == -1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_files_equal_the_python_api_for_an_image(module, run_file, kind):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 120, 3), dtype=np.uint8)
    fitted, size_hw_orig = module.preprocess(pixels)
    boxes, scores, nodes = run_file(kind, fitted[None], torch.tensor([size_hw_orig]))
    detections = module(pixels, OPTIONS["score_threshold"], OPTIONS["tree_threshold"])[
        : OPTIONS["top"]
    ]
    assert len(detections) > 20
    assert [found.node for found in detections] == nodes[0, : len(detections)].tolist()
    expected = torch.tensor([found.box_xyxy_orig_px for found in detections])
    torch.testing.assert_close(boxes[0, : len(detections)], expected, rtol=1e-4, atol=1e-3)
    expected = torch.tensor([found.score for found in detections])
    torch.testing.assert_close(scores[0, : len(detections)], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_files_reject_sizes_that_are_not_multiples_of_the_stride(run_file, kind):
    with pytest.raises(Exception, match=r"(?i)reshape|guard|multiple|expected"):
        run_file(kind, images(1, 48, 48)[:, :, :46], original_sizes(1))


def test_metadata_of_files(exported):
    held = {p.key: json.loads(p.value) for p in onnx.load(exported["onnx"][0]).metadata_props}
    extra = {graph.METADATA_FILE: ""}
    program = torch.export.load(exported["torch-export"][0], extra_files=extra)
    assert_only_torch_operators(program)
    assert held == json.loads(extra[graph.METADATA_FILE])
    assert held["names"] == ["animal", "tool", "cat", "dog", "Bengal", "Manx", "saw", "drill"]
    assert held["interpolation"] == "area"
    assert held["keys"][4:] == ["bengal", "manx", "saw", "drill"]
    assert held["parents"] == [-1, -1, 0, 0, 2, 2, 1, 1]
    assert held["anchors_wh_cell"] == [[1.0, 1.5], [4.0, 3.0]]
    assert (held["resize"], held["image_size_hw"], held["stride"]) == ("letterbox", [48, 48], 4)
    assert {name: held[name] for name in OPTIONS} == OPTIONS


def test_files_contain_no_paths_of_the_machine(exported):
    with zipfile.ZipFile(exported["torch-export"][0]) as archive:
        texts = [archive.read(name) for name in archive.namelist()]
    for text in (exported["onnx"][0].read_bytes(), *texts):
        assert str(REPO).encode() not in text
        assert str(Path(torch.__file__).parent).encode() not in text


def assert_only_torch_operators(program: torch.export.ExportedProgram) -> None:
    """Assert that a program loads where this package is not installed."""
    targets = [
        str(node.target)
        for part in program.graph_module.modules()
        for node in getattr(part, "graph", torch.fx.Graph()).nodes
        if node.op == "call_function"
    ]
    assert "while_loop" in targets
    assert not [target for target in targets if "yolo" in target]


def test_onnx_uses_its_nms_operator(exported):
    model = onnx.load(exported["onnx"][0])
    assert [node.op_type for node in model.graph.node].count("NonMaxSuppression") == 1
    assert {entry.domain for entry in model.opset_import} == {""}


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_reports_the_comparison(exported, kind):
    output = exported[kind][1]
    detections = r"checked: (\d+) boxes of (\d+) images, maximum difference (\S+) "
    ((boxes, images_compared, worst),) = re.findall(detections, output)
    assert int(boxes) > 20
    assert int(images_compared) == 3
    assert 0 < float(worst) < 1e-4
    assert str(exported[kind][0]) in output


@pytest.fixture
def quick(exported, monkeypatch, workplace: Path) -> Path:
    """A working folder with a checkpoint whose export is at hand, of the options above."""
    shutil.copy(exported["onnx"][0].with_name("m.ckpt"), "m.ckpt")

    def write(network, tree, settings, path, metadata):
        shutil.copy(exported["onnx"][0], path)

    monkeypatch.setattr(graph, "write_onnx", write)
    return workplace


def export(*args: str) -> int:
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in OPTIONS.items()}
    given = [part for pair in options.items() for part in pair]
    return main(["export", "m.ckpt", *given, *args])


def test_an_existing_file_is_replaced_only_with_overwrite(quick, capsys):
    assert export() == 0
    Path("m.onnx").write_text("mine")
    assert export() == 2
    assert "m.onnx exists; --overwrite replaces it" in capsys.readouterr().err
    assert Path("m.onnx").read_text() == "mine"
    assert export("--overwrite") == 0
    assert Path("m.onnx").stat().st_size > 1000
    assert export("--output", "sub/other.onnx") == 0
    assert sorted(p.name for p in quick.iterdir()) == ["m.ckpt", "m.onnx", "recipes", "sub"]


@pytest.mark.parametrize(
    "other",
    [("--tree-threshold", "0.99"), ("--iou-threshold", "0.9"), ("--score-threshold", "0.6")],
)
def test_a_file_that_differs_from_the_checkpoint_is_removed(quick, capsys, other):
    Path("m.onnx").write_text("mine")
    assert export("--overwrite", *other) == 2
    output = capsys.readouterr()
    assert re.search(r"m.onnx: differs from the checkpoint, maximum difference", output.err)
    assert "allowed: 0.001. Not kept" in output.err
    assert output.out == ""
    assert Path("m.onnx").read_text() == "mine"
    assert sorted(p.name for p in quick.iterdir()) == ["m.ckpt", "m.onnx", "recipes"]


def test_a_file_with_other_weights_is_removed(quick, module, capsys):
    checkpoint = build_checkpoint(module, {})
    state = {name: value.clone() for name, value in checkpoint["state_dict"].items()}
    state["network.class_bias"][:, 2] += 0.05
    torch.save({**checkpoint, "state_dict": state}, "m.ckpt")
    assert export() == 2
    assert "differs from the checkpoint" in capsys.readouterr().err


def make_detections(boxes, nodes, scores) -> Detections:
    return Detections(torch.tensor(boxes), torch.tensor(nodes), torch.tensor(scores))


def test_the_difference_is_relative_to_sides_and_scores():
    boxes = [[0.0, 0, 100, 50], [10, 10, 60, 40]]
    first = make_detections(boxes, [1, 2], [0.8, 0.4])

    def difference(other: Detections) -> float:
        return float(max_difference(first, other, (100, 200)))

    moved = [[10.0, 10, 62, 40], [0, 0, 100, 50]]  # in another order
    assert difference(make_detections(moved, [2, 1], [0.4, 0.8])) == pytest.approx(0.01)
    assert difference(make_detections(moved, [2, 1], [0.5, 0.8])) == pytest.approx(0.25)
    for changed in (
        make_detections(boxes, [1, 3], [0.8, 0.4]),  # another node
        make_detections(boxes[:1], [1], [0.8]),  # one missing
        make_detections([*boxes, [90, 0, 99, 9]], [1, 2, 2], [0.8, 0.4, 0.4]),
        first.select(torch.tensor([], dtype=torch.int64)),
    ):
        assert difference(changed) > 0.1
        assert float(max_difference(changed, first, (100, 200))) > 0.1
    assert np.isnan(difference(make_detections(boxes, [1, 2], [0.8, float("nan")])))


def test_the_lowered_threshold_is_in_the_widest_gap():
    scores = torch.tensor([0.9, 0.8, 0.7, 0.4, 0.39, 0.01])
    assert 0.4 < find_threshold(scores, 2, 4) < 0.7
    assert 0.8 < find_threshold(scores, 1, 1) < 0.9
    assert find_threshold(scores[:1], 1, 4) == 0.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--score-threshold", "1.5"], "--score-threshold is 1.5; allowed: 0 … 1"),
        (["--tree-threshold", "-1"], "--tree-threshold is -1.0; allowed: 0 … 1"),
        (["--iou-threshold", "nan"], "--iou-threshold is nan; allowed: 0 … 1"),
        (["--top", "0"], "--top is 0; allowed: 1 or more"),
        (["--image-size", "0"], "--image-size is 0; allowed: 1 or more"),
        (["--image-size", "50"], "image size 50: allowed are multiples of 4"),
        (["--output", "m.ckpt/x.onnx"], "m.ckpt/x.onnx cannot be written"),
        (["--output", "recipes"], "'recipes' is a folder"),
    ],
)
def test_invalid_options(quick, capsys, args, message):
    assert export(*args) == 2
    assert message in capsys.readouterr().err
    assert not Path("m.onnx").exists()


def test_classifiers_and_missing_checkpoints_are_refused(quick, capsys, monkeypatch):
    monkeypatch.setattr("yolo_lightning.inference.loading.load", lambda path: torch.nn.Identity())
    assert export() == 2
    assert "m.ckpt: holds a classifier; export takes a detector" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["export", "none.ckpt", "--format", "torch-export"]) == 2
    assert "checkpoint 'none.ckpt' not found" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_extra(quick, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert export() == 2
    output = capsys.readouterr().err
    assert "needs onnxscript" in output
    assert "pip install 'yolo-lightning[export]'" in output


def test_a_detector_without_detections_is_rejected(quick, module, capsys):
    checkpoint = build_checkpoint(module, {})
    state = dict(checkpoint["state_dict"])
    state["network.box_conv.bias"] = torch.full_like(state["network.box_conv.bias"], -500.0)
    torch.save({**checkpoint, "state_dict": state}, "m.ckpt")
    assert export() == 2
    assert "no box of the detector has a score above 0" in capsys.readouterr().err
    assert not Path("m.onnx").exists()


def test_help_imports_no_heavy_modules():
    code = (
        "import sys\nfrom yolo_lightning.cli.commands.export import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("[]")
