"""Malicious checkpoints: rejected with one message, nothing is executed, memory is limited."""

import os
import pickle
import random
import re
import resource
import struct
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.images import write_image
from tests.helpers.recipes import QUICK, TINY
from yolo_lightning import ClassifierModule, DetectorModule, load
from yolo_lightning.checkpoints.io import verify
from yolo_lightning.checkpoints.resuming import check_removable_paths
from yolo_lightning.checkpoints.validation import read_checkpoint
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint

BACKBONE: list[list[Any]] = [["conv", 8], ["pool"], ["conv", 8], ["pool"], ["conv", 16, 1]]
MEMORY_LIMIT = 200 << 20
"""Bytes of address space for rejecting a file."""


def module() -> DetectorModule:
    torch.manual_seed(0)
    return DetectorModule(["a", "b"], [(1, 1), (2, 2)], BACKBONE, 8, 4, image_size=64)


def write_with(path: Path, **changes: Any) -> Path:
    """Write a checkpoint with changed hyper-parameters."""
    checkpoint = build_checkpoint(module(), {})
    checkpoint["hyper_parameters"] |= changes
    torch.save(checkpoint, path)
    return path


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    """Write an archive in the format of PyTorch with the given pickle and records."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for name, content in (records or {}).items():
            file.writestr(f"archive/data/{name}", content)
        file.writestr("archive/version", "3\n")
    return path


class MakesFolder:
    """Create a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def executes_code(path: Path) -> Path:
    content = {
        "state_dict": {},
        "hyper_parameters": {"tree": MakesFolder(path.parent / "executed")},
    }
    return archive(path, pickle.dumps(content, protocol=2))


def plain_pickle(path: Path) -> Path:
    path.write_bytes(pickle.dumps(MakesFolder(path.parent / "executed"), protocol=2))
    return path


def truncated(path: Path) -> Path:
    whole = write_with(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def flipped_bit(path: Path) -> Path:
    content = bytearray(write_with(path).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def compressed(path: Path) -> Path:
    content = {"state_dict": {"x": torch.zeros(8)}, "hyper_parameters": {"tree": []}}
    torch.save(content, path)
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in records.items():
            file.writestr(
                name, bytes(MEMORY_LIMIT + (50 << 20)) if name.endswith("data/0") else data
            )
    assert path.stat().st_size < 2 << 20
    return path


def tensor_with_little_data(path: Path) -> Path:
    checkpoint = build_checkpoint(module(), {})
    state = checkpoint["state_dict"]
    state["network.class_weight"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(checkpoint, path)
    return path


def network_of_60000_channels(path: Path) -> Path:
    return write_with(path, head_channels=60_000)


def pickle_of_a_huge_object(path: Path) -> Path:
    """Create `bytearray(10**11)` from a few bytes."""
    number = struct.pack("<q", 10**11)[:5]
    return archive(path, b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + number + b"\x85R.")


MALICIOUS: dict[Callable[[Path], Path], str] = {
    executes_code: "rejected: its pickle uses posix.mkdir; allowed: plain values and tensors",
    plain_pickle: r"not a checkpoint of this program \(no archive\)",
    truncated: r"damaged \(truncated, or followed by other data\)",
    flipped_bit: r"damaged \(Bad CRC-32 for file 'm/data/\d+'\)",
    compressed: "record 'm/data.pkl' is compressed; allowed: stored",
    tensor_with_little_data: r"a tensor of shape \[1000000, 1000000\] with less data",
    network_of_60000_channels: r"class_weight is float \[2, 2, 8\], but its hyper-parameters "
    r"describe float \[2, 2, 60000\]: not a checkpoint of this version",
    pickle_of_a_huge_object: "rejected: its pickle uses __builtin__.bytearray; allowed: plain",
}


@contextmanager
def limited_memory() -> Iterator[None]:
    """Limit the address space to `MEMORY_LIMIT` more bytes, and the time to 15 s."""
    used = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, before[1]))
    started = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < 15


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image; detects on it once, so that everything is imported."""
    folder = tmp_path_factory.mktemp("image")
    image = write_image(folder / "a.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["detect", str(write_with(folder / "m.ckpt")), str(image)]) == 0
    return image


@pytest.mark.parametrize("write", MALICIOUS, ids=lambda write: write.__name__)
def test_malicious_checkpoint_gives_one_message_in_every_command(
    tmp_path, image, monkeypatch, capsys, write
):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "m.ckpt")
    with limited_memory(), pytest.raises(InputError, match=f"^{path}: .*{MALICIOUS[write]}"):
        load(path)
    for command in (["detect", str(path), str(image)], ["classify", str(path), str(image)]):
        with limited_memory():
            assert main(command) == 2
        (message,) = capsys.readouterr().err.strip().splitlines()
        assert re.search(f"yolo-lightning: error: .*{MALICIOUS[write]}", message)
        assert len(message) < 500
    assert not (tmp_path / "executed").exists()


def test_resuming_from_a_malicious_checkpoint_builds_no_network(workplace, capsys):
    path = network_of_60000_channels(workplace / "m.ckpt")
    with limited_memory():
        assert main(["fit", *QUICK, *TINY, "--ckpt_path", str(path)]) == 2
    assert "but its hyper-parameters describe float [2, 2, 60000]" in capsys.readouterr().err
    assert not (workplace / "outputs").exists()


def test_unsafe_unpickling_executes_the_code(tmp_path):
    """Precondition of the other tests."""
    with zipfile.ZipFile(executes_code(tmp_path / "m.ckpt")) as file:
        pickle.loads(file.read("archive/data.pkl"))
    assert (tmp_path / "executed").is_dir()


def test_truncated_file_is_rejected(tmp_path):
    whole = write_with(tmp_path / "whole").read_bytes()
    for length in (0, 3, 4, 21, 22, 100, *range(500, len(whole), 997), len(whole) - 1):
        (tmp_path / "m.ckpt").write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"truncated|no archive"):
            read_checkpoint(tmp_path / "m.ckpt")
    (tmp_path / "m.ckpt").write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="followed by other data"):
        read_checkpoint(tmp_path / "m.ckpt")


def test_flipped_bit_is_rejected_or_harmless(tmp_path):
    whole = write_with(tmp_path / "m.ckpt").read_bytes()
    before = read_checkpoint(tmp_path / "m.ckpt")
    generator, refused = random.Random(0), 0
    with zipfile.ZipFile(tmp_path / "m.ckpt") as file:
        header_offsets = [record.header_offset for record in file.infolist()]
    offsets = [generator.randrange(len(whole)) for _ in range(100)]
    offsets += [generator.choice(header_offsets) + generator.randrange(30) for _ in range(60)]
    offsets += [len(whole) - 1 - generator.randrange(3000) for _ in range(140)]
    for offset in offsets:
        content = bytearray(whole)
        content[offset] ^= 1 << generator.randrange(8)
        (tmp_path / "m.ckpt").write_bytes(content)
        try:
            after = read_checkpoint(tmp_path / "m.ckpt")
        except InputError:
            refused += 1
            continue
        state = after.pop("state_dict")
        for name, value in before["state_dict"].items():
            assert torch.equal(value, state[name]), offset
        assert after == {key: value for key, value in before.items() if key != "state_dict"}
    assert refused > len(offsets) // 3


BILLION_LAUGHS: list[Any] = ["ha"]
for _ in range(40):
    BILLION_LAUGHS = [BILLION_LAUGHS] * 10
DEEP: list[Any] = []
for _ in range(200):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_channels": 9}, r"is float \[2, 2, 8\], but its hyper-parameters describe"),
        ({"head_channels": 0, "passthrough_channels": 0}, "but its hyper-parameters describe"),
        ({"head_channels": "8"}, r"layer 5 \(conv\): filters is 8; allowed: 1 … 65,536"),
        ({"head_channels": float("nan")}, "filters is nan; allowed: 1 … 65,536"),
        ({"reorg": "x" * 10**6}, r"layer 9 \(reorg\): kind is 'xxx"),
        ({"backbone": [["conv", 10**9], *BACKBONE]}, "filters is 1000000000; allowed: 1 … 65,536"),
        ({"backbone": [["conv", 65_536]] * 2 + BACKBONE}, "hyper-parameters describe .*65536"),
        ({"backbone": [["conv", 10**300], *BACKBONE]}, "filters is 10+; allowed: 1 … 65,536"),
        ({"backbone": [["conv", "8"], *BACKBONE]}, "filters is 8; allowed: 1 … 65,536"),
        ({"backbone": [["pool"]] * 1001}, "its network has 1,008 layers; allowed: 1,000"),
        ({"backbone": [*BACKBONE, ["pool", 10**6, 1]]}, "layer 5: size is 1000000; allowed: 64"),
        ({"backbone": [["conv", 8, 3, 1, 10**6], *BACKBONE]}, "layer 0: padding is 1000000"),
        ({"backbone": [["route", *range(1000)], *BACKBONE]}, r"layer 0 \(route\): index 0"),
        ({"backbone": "x" * 10**6}, "model.backbone is 'xxx"),
        ({"backbone": "darknet19"}, "but its hyper-parameters describe"),
        ({"backbone": 7}, "model.backbone: "),
        (
            {"backbone": {"class_path": "os.system"}, "passthrough_channels": 0},
            "body.1.conv.weight is missing, but its hyper-parameters describe",
        ),
        ({"anchors_wh_cell": [(1, 1)] * 10**4}, r"hyper-parameters describe float \[10000, 2, 8\]"),
        ({"anchors_wh_cell": [(1, 1), (1, float("nan"))]}, "allowed: pairs of positive numbers"),
        ({"anchors_wh_cell": [(1, 1), (1, float("inf"))]}, "allowed: pairs of positive numbers"),
        ({"anchors_wh_cell": [(1, 1), (1, 1, 1)]}, "not a checkpoint of this version"),
        ({"anchors_wh_cell": 5}, "not a checkpoint of this program"),
        ({"tree": "/etc/hostname"}, "its tree is not a list of up to 100,000"),
        ({"tree": [["a", "-", "a"]] * 100_001}, "its tree is not a list of up to 100,000"),
        ({"tree": [["a", "b", "a"], ["b", "a", "b"]]}, "is in a cycle of parents"),
        ({"tree": [["a", "-"], ["b", "-"]]}, "its tree is not a list"),
        ({"image_size": 2049}, "image_size is 2049; allowed: 1 … 2048 px"),
        ({"image_size": [64, "64"]}, "image_size is"),
        ({"interpolation": "cubic"}, "interpolation is cubic; allowed: area, darknet"),
        ({"interpolation": ["area"]}, "interpolation is"),
        ({"location": "cell"}, "location is cell; allowed: direct, offset"),
        ({"batch_norm": False}, "body.0.conv.bias is missing, but its hyper-parameters describe"),
        ({"resize": "crop"}, "resize is crop; allowed: letterbox, stretch"),
        ({"momentum": BILLION_LAUGHS}, "more than 2,000,000 values"),
        ({"momentum": DEEP}, "more than 50 levels"),
        ({"nonsense": 1}, "not a checkpoint of this version"),
    ],
)
def test_wrong_hyper_parameters_are_rejected_before_building(tmp_path, changes, message):
    path = write_with(tmp_path / "m.ckpt", **changes)
    with limited_memory(), pytest.raises(InputError, match=message) as error:
        load(path)
    assert len(str(error.value)) < 1500


def repeated_pickle(path: Path, start: bytes, each: bytes, times: int, end: bytes) -> Path:
    return archive(path, b"\x80\x02" + start + each * times + end + b".")


ORDERED_DICT = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize(
    ("start", "each", "times", "end", "message"),
    [
        (b"]q\0(", b"\x8f", 3_000_000, b"e", "a pickle of more than 2,000,000 operations"),
        (b"]q\0(", b"h\0", 300_001, b"e", "a pickle with more than 300,000 repeated values"),
        (b"]q\0(", b"K\1", 9_000_000, b"e", "a pickle of 18,000,008 bytes; allowed: 16,777,216"),
        # a dict that is copied repeatedly, in three ways
        (b"}q\0](", ORDERED_DICT + b"h\0\x85R", 10, b"e", "does more than store plain values"),
        (b"}q\0](", ORDERED_DICT + b"(h\0tR", 10, b"e", "does more than store plain values"),
        (b"}q\0](", ORDERED_DICT + b")Rh\0b", 10, b"e", "does more than store plain values"),
        (b"", b"", 0, b"cos\nsystem\n", "uses os.system"),
        (b"", b"", 0, b"X\x02\0\0\0osX\x06\0\0\0system\x93", "not a checkpoint|malformed"),
        (b"", b"", 0, b"X\xff\xff\xff\xffa", "damaged"),
        (b"", b"", 0, b"]", r"no dict"),
        (b"", b"", 0, b"}q\0X\1\0\0\0ah\0s", "more than 50 levels"),
    ],
)
def test_malicious_pickle_is_rejected(tmp_path, start, each, times, end, message):
    path = repeated_pickle(tmp_path / "m.ckpt", start, each, times, end)
    with limited_memory(), pytest.raises(InputError, match=message):
        load(path)


def test_record_smaller_than_its_tensor_is_rejected(tmp_path):
    torch.save({"x": torch.zeros(4, dtype=torch.uint8)}, tmp_path / "m.ckpt")
    with zipfile.ZipFile(tmp_path / "m.ckpt") as file:
        pickled = file.read("m/data.pkl").replace(b"K\x04", b"J\x00\x00\x00\x40")
    archive(tmp_path / "m.ckpt", pickled, {"0": b"1234"})
    with limited_memory(), pytest.raises(InputError, match="record size"):
        load(tmp_path / "m.ckpt")


def duplicate_record(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a/data.pkl", "a/version"):
            file.writestr(name, pickle.dumps({}, protocol=2))
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("a/data.pkl", b"another")
    return path


def overlapping_records(path: Path) -> Path:
    """Let every entry of the directory point to the same bytes."""
    with zipfile.ZipFile(path, "w") as file:
        for number in range(100):
            file.writestr(f"a/data/{number:03}", bytes(1000) if number == 0 else b"")
        first = file.filelist[0]
        for record in file.filelist[1:]:
            record.header_offset, record.CRC = first.header_offset, first.CRC
            record.file_size, record.compress_size = first.file_size, first.compress_size
    return path


def two_folders(path: Path) -> Path:
    """Put the pickle outside of the folder of the first record, where PyTorch looks for it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/version", b"3\n")
        file.writestr("../data.pkl", pickle.dumps({}, protocol=2))
    return path


def two_pickles(path: Path) -> Path:
    """PyTorch reads the first one, because it ignores case."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/DATA.pkl", b"\x80\x02c__builtin__\nbytearray\nK\1\x85R.")
        file.writestr("b/data.pkl", pickle.dumps({}, protocol=2))
    return path


def renamed_pickle(path: Path) -> Path:
    """Give the pickle another name in an extra field, which newer versions of Python prefer."""
    with zipfile.ZipFile(path, "w") as file:
        for name, other in (("a/data.pkl", b"a/x"), ("a/y", b"a/data.pkl")):
            record = zipfile.ZipInfo(name)
            crc = zlib.crc32(name.encode())
            record.extra = struct.pack("<HHBL", 0x7075, 5 + len(other), 1, crc) + other
            file.writestr(record, b"\x80\x02c__builtin__\nbytearray\nK\1\x85R.")
    return path


def appended_archive(path: Path) -> Path:
    """Append an archive: `zipfile` corrects its offsets, other readers read the first one."""
    write_with(path)
    with path.with_name("other").open("wb") as other, zipfile.ZipFile(other, "w") as file:
        file.writestr("m/data.pkl", pickle.dumps({}, protocol=2))
    path.write_bytes(path.read_bytes() + path.with_name("other").read_bytes())
    return path


def no_pickle(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/version", b"3\n")
    return path


def huge_directory(path: Path) -> Path:
    length = 9 << 20
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, length, 4, 0)
    path.write_bytes(b"PK\3\4" + bytes(length) + end)
    return path


def archive_in_an_archive(path: Path) -> Path:
    inner = write_with(path.with_name("inner")).read_bytes()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/inner/data.pkl", inner)
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (duplicate_record, "duplicate records"),
        (overlapping_records, r"records of 100,000 bytes in a file of [\d,]+$"),
        (two_folders, "not a checkpoint of this program|damaged"),
        (two_pickles, "2 records data.pkl"),
        (renamed_pickle, "its pickle uses __builtin__.bytearray"),
        (appended_archive, "truncated, or followed by other data"),
        (no_pickle, r"0 records data.pkl"),
        (huge_directory, "a directory of 9,437,184 bytes; allowed: 8,388,608"),
        (archive_in_an_archive, "damaged|malformed|not a checkpoint"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_malformed_archive_is_rejected(tmp_path, write, message):
    path = write(tmp_path / "m.ckpt")
    with limited_memory(), pytest.raises(InputError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("network.box_conv.bias"), "box_conv.bias is missing, but"),
        (
            lambda state: state.update({"network.x": torch.zeros(2)}),
            r"network.x is float \[2\], but",
        ),
        (lambda state: state.update({"network.box_conv.bias": 5}), "not a checkpoint of this"),
        (
            lambda state: state.update({"network.box_conv.bias": torch.zeros(10).int()}),
            r"box_conv.bias is int32 \[10\], but its hyper-parameters describe float \[10\]",
        ),
        (lambda state: state.update(boxed=torch.zeros(10)), "not a checkpoint of this version"),
        (lambda state: state.clear(), "is missing, but its hyper-parameters describe"),
    ],
)
def test_state_dict_of_another_network_is_rejected(tmp_path, change, message):
    checkpoint = build_checkpoint(module(), {})
    change(checkpoint["state_dict"])
    torch.save(checkpoint, tmp_path / "m.ckpt")
    with limited_memory(), pytest.raises(InputError, match=message):
        load(tmp_path / "m.ckpt")


def test_layers_that_share_their_weights_are_rejected(tmp_path):
    """300 convolutions of 4 MB each, stored once, would need 1.2 GB."""
    backbone = [["conv", 1024, 1, 1, 0, False]] * 300
    shared = torch.zeros(1024, 1024, 1, 1)
    state = {f"network.body.{k}.conv.weight": shared for k in range(300)}
    state |= {f"network.body.{k}.conv.bias": torch.zeros(1024) for k in range(300)}
    state["network.body.0.conv.weight"] = torch.zeros(1024, 3, 1, 1)
    state["network.class_conv.weight"] = torch.zeros(1, 1024, 1, 1)
    state["network.class_conv.bias"] = torch.zeros(1)
    hparams = {"tree": [["a", "-", "a"]], "backbone": backbone, "image_size": 32}
    hparams["batch_norm"] = True
    checkpoint = {"module": "ClassifierModule", "state_dict": state, "hyper_parameters": hparams}
    torch.save(checkpoint, tmp_path / "m.ckpt")
    with limited_memory(), pytest.raises(InputError, match="weights that share their data"):
        load(tmp_path / "m.ckpt")


def test_weights_of_half_precision_are_accepted(tmp_path):
    checkpoint = build_checkpoint(module(), {})
    state = checkpoint["state_dict"]
    state |= {k: v.half() for k, v in state.items() if v.is_floating_point()}
    torch.save(checkpoint, tmp_path / "m.ckpt")
    loaded = load(tmp_path / "m.ckpt").state_dict()
    assert torch.equal(
        loaded["network.class_weight"], module().network.class_weight.detach().half().float()
    )


def test_valid_checkpoints_are_accepted(tmp_path):
    modules: tuple[DetectorModule | ClassifierModule, ...] = (
        module(),
        DetectorModule(["a"], [(1, 1)], "small", 8, None, "space_to_depth"),
        DetectorModule(["a", "b"], [(1, 1)], BACKBONE, 0, 0),
        ClassifierModule(["a", "b", "c"], BACKBONE),
        ClassifierModule(["a"], [["conv", 4, 3, 2, 1, False, "relu"], ["dropout", 0.5]]),
    )
    for number, original in enumerate(modules):
        path = tmp_path / f"{number}.ckpt"
        checkpoint = build_checkpoint(original, {})
        checkpoint["optimizer_states"] = [{"state": {0: {"momentum_buffer": torch.zeros(3)}}}]
        checkpoint["current_model_state"] = OrderedDict(original.state_dict())
        torch.save(checkpoint, path)
        verify(path)
        loaded = load(path)
        for name, value in original.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name])


@pytest.mark.parametrize(
    "changes",
    [{"mlflow_run_id": "../../victim"}, {"mlflow_run_id": "/victim"}, {"mlflow_run_id": ["a"]},
     {"mlflow_run_id": ".."}, {"global_step": -5}, {"global_step": "x"}],
    ids=str,
)  # fmt: skip
def test_run_id_or_step_that_is_none_is_rejected(tmp_path, changes):
    """The run id is the name of the folder into which `validate` writes its journal."""
    torch.save(build_checkpoint(module(), {}) | changes, tmp_path / "m.ckpt")
    with pytest.raises(InputError, match=f"its {next(iter(changes))} is "):
        read_checkpoint(tmp_path / "m.ckpt")


def test_checkpoint_cannot_name_files_to_remove(tmp_path):
    """`ModelCheckpoint` removes the worst of the best checkpoints, by the path in its state."""
    folder = tmp_path / "checkpoints"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "victim").mkdir()
    state = {"dirpath": str(folder), "best_model_path": "", "best_k_models": {}}
    check_removable_paths({"ModelCheckpoint": {**state, "last_model_path": f"{folder}/a.ckpt"}})
    for outside in (f"{folder}/../victim", str(tmp_path / "victim/a.ckpt"), f"{folder}/sub"):
        for name in ("best_k_models", "kth_best_model_path", "last_model_path"):
            value = {outside: 1.0} if name == "best_k_models" else outside
            with pytest.raises(InputError, match="one of the best checkpoints; allowed: files in"):
                check_removable_paths({"ModelCheckpoint": state | {name: value}})
    del state["dirpath"]  # Lightning would take its own
    with pytest.raises(InputError, match="one of the best checkpoints"):
        check_removable_paths({"M": {**state, "last_model_path": str(folder / "a.ckpt")}})


def test_state_that_cannot_be_restored_names_the_checkpoint(workplace, capsys):
    """The drills have more such states."""
    options = [*QUICK, *TINY, "--trainer.max_steps=1", "--trainer.logger=false"]
    assert main(["fit", *options, "--trainer.limit_val_batches=0"]) == 0
    (path,) = workplace.glob("outputs/quickstart/*/checkpoints/last.ckpt")
    torch.save(torch.load(path, weights_only=True) | {"loops": {}}, workplace / "m.ckpt")
    assert main(["fit", *options, "--ckpt_path", "m.ckpt"]) == 2
    assert "error: m.ckpt: the state of its training cannot be restored" in capsys.readouterr().err
