"""Import and export of Darknet's files, round trips, and invalid files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from tests.helpers.darknet import build_network, conv_layers, write_values
from yolo_lightning import load
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.cli.main import main
from yolo_lightning.darknet.cfg_writer import to_sections
from yolo_lightning.darknet.config import NetworkDescription, Region, parse_network
from yolo_lightning.darknet.files import (
    Section,
    darknet_order,
    parse_cfg,
    read_cfg,
    read_names,
    read_tree,
    write_cfg,
    write_names,
    write_tree,
)
from yolo_lightning.darknet.released import LAYOUTS
from yolo_lightning.darknet.weights import read_weights, write_weights
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint, export_model, import_model, load_classes
from yolo_lightning.losses import LossSettings
from yolo_lightning.models.layers import (
    Activation,
    Conv,
    Dropout,
    Layer,
    Pool,
    Reorg,
    Route,
    check_sizes,
    layer_outputs,
)
from yolo_lightning.tree.wordtree import WordTree

CFG = """
# a comment
[net]
width=64
height=32
channels=3
learning_rate=0.002
decay=0.0001

[convolutional]
batch_normalize=1
filters=8
size=3
stride=1
pad=1
activation=leaky ; and another

[maxpool]
size=2
stride=2

[dropout]
probability=.25

[convolutional]
filters=14
size=1
activation=linear

[region]
anchors = 1.5,2, 3,2.5
classes=2
num=2
softmax=1
rescore=0
thresh=.7
object_scale=4
noobject_scale=.5
class_scale=2
coord_scale=3
jitter=.3
"""


def count_values(cfg: str) -> int:
    description = parse_network(parse_cfg(cfg, "x.cfg"))
    return sum(o * (i * k * k + (4 if norm else 1)) for i, o, k, norm in conv_layers(description))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.cfg").write_text(CFG)
    (tmp_path / "x.names").write_text("cat\ndog\n")
    write_values(tmp_path / "x.weights", count_values(CFG))
    return tmp_path


IMPORT = ["darknet", "import", "--cfg", "x.cfg", "--weights", "x.weights", "--names", "x.names"]


@pytest.mark.parametrize("is_64_bit", [False, True])
def test_import_converts_weights_layers_and_classes(files, is_64_bit, capsys):
    write_values(files / "x.weights", count_values(CFG), is_64_bit)
    assert main([*IMPORT, "--output", "out/m.ckpt"]) == 0
    said = capsys.readouterr().out
    assert "detector of 2 classes" in said
    assert "ignored options: [region] jitter" in said
    module = load("out/m.ckpt")
    assert isinstance(module, DetectorModule)
    assert module.tree.names == ("cat", "dog")
    assert module.hparams["image_size"] == [32, 64]
    assert module.hparams["anchors_wh_cell"] == [[1.5, 2.0], [3.0, 2.5]]
    assert (module.hparams["learning_rate"], module.hparams["weight_decay"]) == (0.002, 1e-4)
    assert module.loss == LossSettings(
        coord_scale=3, obj_scale=4, noobj_scale=0.5, class_scale=2, ignore_iou=0.7, rescore=False
    )
    assert module.network.body.layers == (Conv(8), Pool(), Dropout(0.25))
    assert read_checkpoint("out/m.ckpt")["darknet"]["images_seen"] == 640
    # the values in their order: shift, scale, mean, variance, kernels; then bias, kernels
    numbers = np.random.default_rng(0).uniform(0.1, 1, count_values(CFG)).astype("<f4")
    block: Any = module.network.body[0]
    assert block.norm.bias.tolist() == numbers[:8].tolist()
    assert block.norm.running_var.tolist() == numbers[24:32].tolist()
    assert block.conv.weight.flatten().tolist() == numbers[32:248].tolist()
    bias, kernels = numbers[248:262].reshape(2, 7), numbers[262:].reshape(2, 7, 8)
    assert module.network.box_conv.bias is not None
    assert module.network.box_conv.bias.view(2, 5).tolist() == bias[:, :5].tolist()
    assert module.network.class_bias.tolist() == bias[:, 5:].tolist()
    assert module.network.class_weight.tolist() == kernels[:, 5:].tolist()


def test_export_writes_the_imported_bytes_and_network(files):
    write_values(files / "x.weights", count_values(CFG), is_64_bit=True)
    assert main([*IMPORT, "--output", "m.ckpt"]) == 0
    assert main(["darknet", "export", "m.ckpt", "--output", "out/y"]) == 0
    assert (files / "out/y.weights").read_bytes()[20:] == (files / "x.weights").read_bytes()[20:]
    assert (files / "out/y.weights").read_bytes()[12:20] == np.array([640], "<i8").tobytes()
    assert (files / "out/y.names").read_text() == "cat\ndog\n"
    again, first = parse_network(read_cfg("out/y.cfg")), parse_network(read_cfg("x.cfg"))
    assert (again.layers, again.region, again.size_hw) == (
        first.layers, first.region, first.size_hw,
    )  # fmt: skip
    assert again.options["region"]["jitter"] == ".3"
    assert first.training.items() <= again.training.items()
    assert sorted(p.name for p in (files / "out").iterdir()) == ["y.cfg", "y.names", "y.weights"]


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n not in ("darknet19_448", "yolov2")])
def test_released_networks_round_trip(name, tmp_path):
    description = LAYOUTS[name]()
    if name == "yolo9000":
        description.classes = 30  # 196 MB otherwise, and no other layer
    tree = WordTree.from_names([f"c{k}" for k in range(description.classes)])
    if name == "yolo9000":
        tree = WordTree([(f"n{k}", "-" if k < 4 else f"n{k % 4}", f"name {k}") for k in range(30)])
    count = sum(o * (i * k * k + (4 if n else 1)) for i, o, k, n in conv_layers(description))
    write_values(tmp_path / "w.weights", count)
    module, metadata, notes = import_model(description, tmp_path / "w.weights", tree)
    assert notes == []
    export_model(module, metadata, tmp_path / "out")
    back = parse_network(read_cfg(tmp_path / "out.cfg"))
    assert (back.layers, back.classes, back.region) == (
        description.layers, description.classes, description.region,
    )  # fmt: skip
    tree_path = tmp_path / "out.tree"
    their_tree = load_classes(
        back, tmp_path / "out.names", tree_path if tree_path.exists() else None, None
    )
    again, _, _ = import_model(back, tmp_path / "out.weights", their_tree)
    if name == "yolo9000":  # siblings stand together now: the same rows by key
        assert their_tree.keys != tree.keys
        order = [tree.keys.index(key) for key in their_tree.keys]
        for part in ("class_weight", "class_bias"):
            rows = module.network.state_dict()[part][:, order]
            assert torch.equal(again.network.state_dict()[part], rows)
    else:
        assert their_tree.rows == tree.rows
    for key, value in module.network.state_dict().items():
        if name != "yolo9000" or "class" not in key:
            assert torch.equal(value, again.network.state_dict()[key]), key


@st.composite
def descriptions(draw: st.DrawFn) -> NetworkDescription:
    """Networks of the family, small ones."""
    layers: list[Layer] = []
    for _ in range(draw(st.integers(1, 6))):
        found = layer_outputs(layers)
        channels = found[-1].channels if found else 3
        kinds = ["conv", "conv", "pool", "dropout"]
        kinds += ["reorg"] if channels % 4 == 0 and channels < 64 else []
        kinds += ["route"] if layers else []
        match draw(st.sampled_from(kinds)):
            case "conv":
                names: list[Activation] = ["leaky", "linear", "relu", "logistic"]
                padding = draw(st.sampled_from([None, None, 0, 2]))
                size = draw(st.sampled_from([1, 3, 5]))
                if padding is not None and padding == size // 2:
                    padding = None
                layers.append(
                    Conv(
                        draw(st.integers(1, 9)), size, draw(st.integers(1, 2)), padding,
                        draw(st.booleans()), draw(st.sampled_from(names)),
                    )
                )  # fmt: skip
            case "pool":
                layers.append(Pool(draw(st.integers(1, 3)), draw(st.integers(1, 2))))
            case "reorg":
                layers.append(Reorg(2, "darknet"))
            case "dropout":
                layers.append(Dropout(draw(st.floats(0, 0.9))))
            case _:
                number = len(layers)
                stride = found[-1].stride
                fit = [k for k in range(number) if found[k].stride == stride]
                chosen = draw(st.lists(st.sampled_from(fit), min_size=1, max_size=2))
                layers.append(Route(tuple(draw(st.sampled_from([k, k - number])) for k in chosen)))
    classes = draw(st.integers(1, 5))
    scale = st.floats(0, 100, allow_nan=False)
    region = None
    if draw(st.booleans()):
        anchors = draw(st.lists(st.floats(0.01, 50), min_size=1, max_size=3))
        region = Region(
            tuple(v for a in anchors for v in (a, a / 2)), draw(st.booleans()),
            draw(st.floats(0, 1)), draw(scale), draw(scale), draw(scale), draw(scale),
        )  # fmt: skip
    side = 16 * layer_outputs(layers)[-1].stride * draw(st.integers(1, 2))
    try:
        check_sizes(layers, (side, 2 * side))
    except InputError:
        reject()
    return NetworkDescription(tuple(layers), classes, (side, 2 * side), region)


slow_is_fine = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@slow_is_fine
@given(description=descriptions(), seed=st.integers(0, 2**31))
def test_any_network_round_trips(description, seed, tmp_path):
    write_cfg(tmp_path / "a.cfg", to_sections(description))
    first = parse_network(read_cfg(tmp_path / "a.cfg"))
    assert (first.layers, first.classes, first.region, first.size_hw) == (
        description.layers, description.classes, description.region, description.size_hw,
    )  # fmt: skip
    count = sum(o * (i * k * k + (4 if n else 1)) for i, o, k, n in conv_layers(first))
    write_values(tmp_path / "a.weights", count, seed=seed)
    tree = WordTree.from_names([f"c{k}" for k in range(first.classes)])
    module, metadata, _ = import_model(first, tmp_path / "a.weights", tree)
    with torch.no_grad():  # what is not refused runs
        module.network(torch.zeros(1, 3, *first.size_hw))
    torch.save(build_checkpoint(module, metadata), tmp_path / "a.ckpt")
    export_model(load(tmp_path / "a.ckpt"), metadata, tmp_path / "b", overwrite=True)
    assert (tmp_path / "b.weights").read_bytes()[20:] == (tmp_path / "a.weights").read_bytes()[16:]
    second = parse_network(read_cfg(tmp_path / "b.cfg"))
    assert (second.layers, second.classes, second.region, second.size_hw) == (
        first.layers, first.classes, first.region, first.size_hw,
    )  # fmt: skip


@slow_is_fine
@given(
    parents=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_tree_round_trips(parents, shuffle, tmp_path):
    rows = []
    for k, parent in enumerate(parents):  # each below an earlier one, or on top
        rows.append((f"k{k}", f"k{parent}" if parent < k else "-", f"name {k}"))
    shuffle.shuffle(rows)
    tree = WordTree(rows)
    order = darknet_order(tree)
    assert sorted(order) == list(range(len(tree)))
    write_tree(tmp_path / "t.tree", tree, order)
    write_names(tmp_path / "t.names", [tree.names[node] for node in order])
    back = read_tree(tmp_path / "t.tree", read_names(tmp_path / "t.names"))
    assert set(back.rows) == set(tree.rows)
    assert darknet_order(back) == list(range(len(back)))
    write_tree(tmp_path / "u.tree", back, range(len(back)))
    assert (tmp_path / "u.tree").read_bytes() == (tmp_path / "t.tree").read_bytes()


def test_partial_weights_fill_the_first_layers(files, capsys):
    write_values(files / "x.weights", 248)  # the first convolution with its batch norm
    assert main([*IMPORT, "--output", "m.ckpt"]) == 0
    assert "partial weights: layer 3 and later layers are initialised" in capsys.readouterr().out
    numbers = np.random.default_rng(0).uniform(0.1, 1, 248).astype("<f4")
    block: Any = load("m.ckpt").network.body[0]
    assert block.conv.weight.flatten().tolist() == numbers[32:].tolist()


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert not list(Path().glob("*.ckpt*"))
    return said.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:-4], "byte 1008: layer 3 has 126 values, found 125"),
        (lambda d: d[:-1], "byte 1508: 3 bytes after the last complete value"),
        (lambda d: d + bytes(8), "byte 1512: 2 values after the last layer"),
        (lambda d: d[:10], "10 bytes; expected a header"),
        (lambda d: d[:16], "byte 16: layer 0 has 248 values, found 0"),
        (lambda d: b"\xff" * 4 + d[4:], "byte 0: version -1.1.0"),
        (lambda d: d[:12] + b"\xff" * 4 + d[16:], "byte 12: -1 images seen"),
        (lambda d: d[:40] + np.array([np.nan], "<f4").tobytes() + d[44:], "byte 40: the value nan"),
        (lambda d: b"PK\x03\x04" + d[4:], "not a Darknet weights file"),
        (
            lambda d: d[:120] + np.array([-0.5], "<f4").tobytes() + d[124:],
            "byte 120: the variance -0.5; expected 0 or more",
        ),
    ],
)
def test_invalid_weights_are_reported_with_the_byte(files, capsys, change, message):
    path = files / "x.weights"
    path.write_bytes(change(path.read_bytes()))
    assert message in error_of([*IMPORT, "--output", "m.ckpt"], capsys)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[dropout]", "[shortcut]", "x.cfg:22: [shortcut] is not supported; allowed: convol"),
        ("[dropout]", "[dropuot]", "x.cfg:22: [dropuot] is not supported; did you mean 'dropout'"),
        ("filters=14", "filters=15", "x.cfg:26: [convolutional] filters=15 before [region]; "
         "expected 14: num=2 x (classes=2 + 5)"),
        ("filters=8", "filters=2000000000", "x.cfg:12: [convolutional] filters=2000000000; "
         "allowed: 1 … 1000000"),
        ("filters=8", "filters=-8", "filters=-8; allowed: 1"),
        ("filters=8", "filters=eight", "filters=eight; expected an integer"),
        ("width=64", "width=63", "x.cfg:4: [net] width=63, height=32; allowed: multiples of 2"),
        ("channels=3", "channels=1", "channels=1; allowed: 3 … 3"),
        ("[net]", "[net]\ninterpolation=cubic", "interpolation=cubic; allowed: area, "),
        ("num=2", "num=3", "anchors has 4 numbers; expected 6, two for each of num=3"),
        ("num=2", "num=2000000000", "num=2000000000; allowed: 1 … 1000"),
        ("anchors = 1.5", "anchors = x", "expected numbers separated by commas"),
        ("anchors = 1.5", "anchors = -1.5", "anchors; expected positive numbers"),
        ("softmax=1", "softmax=0", "softmax=0 is not supported"),
        ("size=3", "size=3\ngroups=2", "groups=2 is not supported; allowed: 1"),
        ("activation=leaky", "activation=mish", "x.cfg:10: [convolutional] layer 0 (conv): "
         "activation is 'mish'; allowed: leaky"),
        ("activation=linear", "activation=leaky", "is the last layer; expected size=1"),
        ("[dropout]\nprobability=.25", "[route]\nlayers=-5", "index -5; allowed: 0 … 1"),
        ("[dropout]\nprobability=.25", "[reorg]\nstride=3", "allowed: multiples of 9"),
        ("[region]", "[avgpool]\n[region]", "x.cfg:30: [avgpool] ends the file; expected [region]"),
        ("jitter=.3", "jitter=.3\n[maxpool]", "x.cfg:42: [maxpool] follows [region]"),
        ("[dropout]\nprobability=.25", "[route]\nlayers=inf", "layers; expected integers"),
        (
            "size=2\nstride=2", "size=2\nstride=2\nstride=1",
            "x.cfg:21: stride is already set in line 20",
        ),
        ("size=2\nstride=2", "size=2\nstride=2\nmaxpool_depth=1", "maxpool_depth=1 is not supp"),
        ("[net]", "net", "x.cfg:3: expected [section] or name=value, found 'net'"),
        (
            "[net]", "[convolutional]",
            "x.cfg:3: [convolutional] is the first section; expected [net]",
        ),
    ],
)  # fmt: skip
def test_invalid_cfg_files_are_reported_with_the_line(files, capsys, old, new, message):
    (files / "x.cfg").write_text(CFG.replace(old, new, 1))
    assert message in error_of([*IMPORT, "--output", "m.ckpt"], capsys)


def test_feature_maps_that_do_not_match(files, capsys):
    conv = "[convolutional]\nfilters=4\nsize=3\nactivation=leaky\n"
    end = "[convolutional]\nfilters=2\nactivation=linear\n[avg]\n[soft]\n"
    head = "[network]\nwidth=32\nheight=32\n"
    for body, message in (
        (
            f"{conv}[route]\nlayers=0\n{conv}[route]\nlayers=-1,0\n",
            "cannot concatenate 28 x 28 and 30",
        ),
        (f"{conv}[max]\nsize=2\nstride=2\n[reorg]\nstride=2\n", "cannot divide 15 x 15 cells by 2"),
        (f"{conv * 16}", "layer 15 (conv) at 32 x 32 px: no cells remain of 2 x 2"),
        ("", "x.cfg: contains one layer"),
    ):
        (files / "x.cfg").write_text(head + body + end)
        assert message in error_of([*IMPORT, "--output", "m.ckpt"], capsys), body
    (files / "x.cfg").write_text(head + conv + end)
    write_values(files / "x.weights", 4 * 28 + 2 * 5)
    assert main([*IMPORT, "--output", "m.ckpt"]) == 0
    assert load("m.ckpt").network.body.layers == (Conv(4, 3, 1, 0, False, "leaky"),)


def test_a_cfg_with_too_many_layers(files, capsys):
    (files / "x.cfg").write_text("[net]\nwidth=32\nheight=32\n" + "[dropout]\n" * 100_000)
    said = error_of([*IMPORT, "--output", "m.ckpt"], capsys)
    assert "x.cfg: contains 100000 layers; allowed: 1 … 1000" in said


def test_a_malicious_cfg_uses_no_memory(files, capsys):
    layer = "[convolutional]\nfilters=60000\nsize=999\nactivation=linear\n"
    (files / "x.cfg").write_text("[net]\nwidth=32\nheight=32\n" + layer * 3)
    said = error_of([*IMPORT, "--output", "m.ckpt"], capsys)
    assert "x.cfg:4: [convolutional] increases the network to 179,640,420,000 weights" in said
    assert "allowed: up to 200,000,000" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a -1\nb 2\nc 1\n", "x.tree:2: parent 2 of 'b'; expected -1 or the number of a line"),
        ("a -1\nb 0\nc -1\nd 0\n", "x.tree:3: 'c' is separated"),
        ("a -1\nb -1\nc 0\nd 1\ne 0\n", "x.tree:5: 'e' is separated from the other children"),
        ("a -1\na -1\n", "x.tree:2: key 'a' was already defined in line 1"),
        ("a -1\nb\0 0\n", "x.tree:2: a NUL byte at byte 6"),
        ("a -1\nb zero\n", "x.tree:2: expected a key and its parent's number, found 'b zero'"),
        ("a -1\nb -2\n", "x.tree:2: parent -2 of 'b'"),
        ("a -1\nb 99999999999999\n", "x.tree:2: expected a key"),
        ("a -1\nb 0\nc 0\n", "x.tree: 3 nodes, but the network has 2 classes"),
        ("", "x.tree: empty"),
        ("a -1\n" + "".join(f"k{k} {k}\n" for k in range(5000)), "5001 nodes, but the network"),
    ],
)  # fmt: skip
def test_invalid_tree_files_are_reported_with_the_line(files, capsys, text, message):
    (files / "x.tree").write_text(text)
    assert message in error_of([*IMPORT, "--tree", "x.tree", "--output", "m.ckpt"], capsys)


def test_the_tree_of_a_cfg_is_found_next_to_it_or_required(files, capsys):
    (files / "x.cfg").write_text(CFG + "tree=data/x.tree\n")
    said = error_of([*IMPORT, "--output", "m.ckpt"], capsys)
    assert "form a tree; 'data/x.tree' not found: use --tree" in said
    (files / "x.tree").write_text("n1 -1\nn2 0\n")
    assert main([*IMPORT, "--output", "m.ckpt"]) == 0
    assert load("m.ckpt").tree.rows == [("n1", "-", "cat"), ("n2", "n1", "dog")]
    assert main(["darknet", "export", "m.ckpt", "--output", "y"]) == 0
    assert (files / "y.tree").read_text() == "n1 -1\nn2 0\n"
    assert "tree=y.tree" in (files / "y.cfg").read_text()


def test_all_classes_of_a_list_had_boxes_and_those_of_a_tree_are_named(files, capsys):
    note = "which classes had boxes in training is unknown; --boxed FILE names them"

    def boxed(*options: str) -> list[bool]:
        assert main([*IMPORT, *options, "--output", "m.ckpt"]) == 0
        state = torch.load("m.ckpt", weights_only=True)["state_dict"]
        return [bool(value) for value in state["boxed"]]

    assert boxed() == [True, True]
    assert note not in capsys.readouterr().out
    (files / "x.tree").write_text("n02121808 -1\nn1 0\n")  # COCO's cat, and a breed
    assert boxed("--tree", "x.tree") == [False, False]
    assert note in capsys.readouterr().out
    assert boxed("--tree", "x.tree", "--boxed", "coco") == [True, False]
    output = capsys.readouterr().out
    assert "classes that had boxes in training: 1" in output
    assert note not in output
    (files / "boxed.txt").write_text("# by name\ndog\n")
    assert boxed("--tree", "x.tree", "--boxed", "boxed.txt") == [False, True]
    (files / "m.ckpt").unlink()
    said = error_of([*IMPORT, "--boxed", "gone.txt", "--output", "m.ckpt"], capsys)
    assert "list of seen classes 'gone.txt' not found" in said
    assert "allowed: a file with one class per line, imagenet_det_44 or coco" in said


def test_paths_are_read_from_a_data_file(files):
    (files / "sub").mkdir()
    (files / "sub/x.data").write_text("classes = 2\nnames = data/x.names\nlabels=x.labels\n")
    (files / "sub/x.names").write_bytes(b"crane\r\ncrane\r\n")
    (files / "x.labels").write_text("n1\nn2\n")
    argv = [*IMPORT[:-2], "--data", "sub/x.data", "--output", "m.ckpt"]
    assert main(argv) == 0
    assert load("m.ckpt").tree.rows == [("n1", "-", "crane"), ("n2", "-", "crane")]


def test_notes_say_what_an_import_changes(files, capsys):
    write_lines(files / "x.tree", "n1 -1", "n2 0")
    assert main([*IMPORT, "--tree", "x.tree", "--output", "m.ckpt"]) == 0
    assert "its softmax was over all classes, now over siblings" in capsys.readouterr().out
    assert main([*IMPORT[:-2], "--output", "m.ckpt"]) == 0
    assert "the classes have numbers as names; use --names FILE" in capsys.readouterr().out
    assert load("m.ckpt").tree.names == ("class 0", "class 1")
    (files / "c.cfg").write_text(
        "[net]\nwidth=32\nheight=32\n[convolutional]\nfilters=4\nactivation=leaky\n"
        "[convolutional]\nfilters=2\nactivation=linear\n[avgpool]\n[softmax]\n"
    )
    write_values(files / "c.weights", 4 * 4 + 2 * 5)
    argv = ["darknet", "import", "--cfg", "c.cfg", "--weights", "c.weights", "--names", "long"]
    write_lines(files / "long", "a", "b", "c")
    assert main([*argv, "--output", "m.ckpt"]) == 0
    assert "long: 3 lines; using the first 2" in capsys.readouterr().out
    assert load("m.ckpt").tree.names == ("a", "b")


def test_keys_are_exported_as_labels_or_without_spaces(files, capsys):
    flat = DetectorModule([("n1", "-", "cat"), ("n2", "-", "dog")], [(1.0, 1.0)], "small", 0, 0)
    paths = export_model(flat, {}, files / "flat")
    assert [path.name for path in paths] == [
        "flat.cfg", "flat.weights", "flat.names", "flat.labels",
    ]  # fmt: skip
    assert (files / "flat.names").read_text() == "cat\ndog\n"
    assert (files / "flat.labels").read_text() == "n1\nn2\n"
    tree = DetectorModule([("a", "-", "a"), ("hot dog", "a", "b")], [(1.0, 1.0)], "small", 0, 0)
    torch.save(build_checkpoint(tree, {}), "m.ckpt")
    assert main(["darknet", "export", "m.ckpt", "--output", "y"]) == 0
    assert (
        "spaces in 1 keys became underscores, for example in 'hot dog'" in capsys.readouterr().out
    )
    assert (files / "y.tree").read_text() == "a -1\nhot_dog 0\n"


def test_duplicate_names_get_unique_keys(files):
    (files / "x.names").write_text("crane\ncrane\n")
    assert main([*IMPORT, "--output", "m.ckpt"]) == 0
    assert load("m.ckpt").tree.rows == [("crane #0", "-", "crane"), ("crane #1", "-", "crane")]


def test_a_detector_requires_one_name_per_class(files, capsys):
    (files / "x.names").write_text("a\nb\nc\n")
    said = error_of([*IMPORT, "--output", "m.ckpt"], capsys)
    assert "x.names: 3 lines, but the network has 2 classes" in said


def test_output_that_cannot_be_written(files, capsys):
    (files / "folder").mkdir()
    for output, message in (("folder", "is a folder"), ("x.cfg/m.ckpt", "--output 'x.cfg/m.ckpt'")):
        assert message in error_of([*IMPORT, "--output", output], capsys)
    assert list((files / "folder").iterdir()) == []
    assert main([*IMPORT, "--output", "folder/m.ckpt"]) == 0
    before = (files / "x.weights").read_bytes()
    assert main(["darknet", "export", "folder/m.ckpt", "--output", "x"]) == 2
    assert "x.cfg exists; --overwrite replaces it" in capsys.readouterr().err
    assert (files / "x.weights").read_bytes() == before
    assert main(["darknet", "export", "folder/m.ckpt", "--output", "x.cfg", "--overwrite"]) == 0
    assert not (files / "x.cfg.cfg").exists()
    assert main(["darknet", "export", "folder/m.ckpt", "--output", "."]) == 2


def test_invalid_command_lines(files, capsys):
    output = ["--output", "m.ckpt"]
    assert "use one of --cfg FILE and --layout" in error_of(
        ["darknet", "import", "--weights", "x.weights", *output], capsys
    )
    assert "'yolov3'; did you mean 'yolov2'" in error_of(
        ["darknet", "import", "--layout", "yolov3", "--weights", "x.weights", *output], capsys
    )
    assert "darknet 'imprt'; did you mean 'import'?" in error_of(["darknet", "imprt"], capsys)
    assert "1 lines, but the network has 2 classes" in error_of(
        [*IMPORT[:-1], str(write_lines(files / "one", "cat")), *output], capsys
    )
    assert "weights file 'gone' not found" in error_of(
        ["darknet", "import", "--cfg", "x.cfg", "--weights", "gone", *output], capsys
    )


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reorg": "space_to_depth"}, "Darknet only supports model.reorg: darknet"),
        ({"location": "offset"}, "model.location is offset; Darknet only supports direct"),
    ],
)
def test_networks_that_darknet_does_not_support_are_not_exported(
    tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    module = DetectorModule(["a"], [(1.0, 1.0)], "small", 8, 4, **options)
    torch.save(build_checkpoint(module, {}), "m.ckpt")
    assert main(["darknet", "export", "m.ckpt", "--output", "out/y"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_network_without_batch_norm_round_trips(tmp_path):
    torch.manual_seed(0)
    module = DetectorModule(["a", "b"], [(1.0, 1.0)], "small", 8, 4, batch_norm=False).eval()
    export_model(module, {}, tmp_path / "y")
    description = parse_network(read_cfg(tmp_path / "y.cfg"))
    again = import_model(description, tmp_path / "y.weights", module.tree).module
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.network(images).box_logits, module.network(images).box_logits)


def test_a_failed_export_leaves_nothing(tmp_path):
    tree = WordTree([("a b", "-", "x"), ("a_b", "-", "y"), ("c", "a_b", "z")])
    module = DetectorModule(tree.rows, [(1.0, 1.0)], "small", 0, 0)
    with pytest.raises(InputError, match="a .tree file already has the key"):
        export_model(module, {}, tmp_path / "out/y")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_checkpoint_keeps_the_training_options_of_the_cfg(files):
    assert main([*IMPORT, "--output", "m.ckpt"]) == 0
    held = read_checkpoint("m.ckpt")
    assert held["module"] == "DetectorModule"
    assert held["darknet"]["options"]["region"]["jitter"] == ".3"


def test_the_interpolation_is_darknets_unless_the_cfg_says_otherwise(files):
    """A network that was trained here keeps its own through Darknet's files."""
    assert main([*IMPORT, "--output", "m.ckpt"]) == 0
    module = load("m.ckpt")
    assert module.hparams["interpolation"] == "darknet"
    export_model(module, {}, Path("theirs"))
    assert "interpolation" not in Path("theirs.cfg").read_text()
    module.hparams["interpolation"] = "area"
    export_model(module, {}, Path("ours"))
    for name, expected in (("theirs", "darknet"), ("ours", "area")):
        assert parse_network(read_cfg(f"{name}.cfg")).interpolation == expected
    again = [f"--{part}=ours.{part}" for part in ("cfg", "weights", "names")]
    assert main(["darknet", "import", *again, "--output", "again.ckpt"]) == 0
    assert load("again.ckpt").hparams["interpolation"] == "area"


def test_sections_round_trip(tmp_path):
    write_cfg(tmp_path / "a.cfg", [Section("net", options={"a": "1", "b": "x,y"}), Section("cost")])
    first, second = read_cfg(tmp_path / "a.cfg")
    assert (first.kind, first.options, second.kind) == ("net", {"a": "1", "b": "x,y"}, "cost")
    write_weights(tmp_path / "w", [torch.tensor([1.5, 2.5])], 2**40)
    weights = read_weights(tmp_path / "w")
    assert (weights.version, weights.images_seen) == ((0, 2, 0), 2**40)
    assert weights.values.tolist() == [1.5, 2.5]


def test_released_networks_equal_their_cfg():
    for name, make in LAYOUTS.items():
        description = make()
        if name == "yolo9000":
            continue
        back = parse_network(to_sections(description))
        assert back.layers == description.layers
        with torch.device("meta"):
            network = build_network(back)
        assert network.body.layers == description.layers
