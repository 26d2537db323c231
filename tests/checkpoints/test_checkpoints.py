"""Durable checkpoints: full disks, errors between two renames, damaged files, resuming."""

import ast
import errno
import os
import resource
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers.paths import REPO
from tests.helpers.recipes import QUICK, TINY
from yolo_lightning import DetectorModule, load
from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint
from yolo_lightning.checkpoints import io as checkpoint_io
from yolo_lightning.checkpoints.io import (
    load_file,
    rotate,
    verify,
    write_checkpoint,
)
from yolo_lightning.checkpoints.pretrained import load_pretrained
from yolo_lightning.checkpoints.validation import resumable_checkpoint
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint, export_model


class TinyModule(pl.LightningModule):
    """A minimal module with checkpoints of some kilobytes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(40, 20)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.linear(batch[0]).square().mean()
        self.log("score", float(self.global_step))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(24, 40)), batch_size=4)


def fit(
    folder: Path,
    max_steps: int,
    *callbacks: pl.Callback,
    max_epochs: int = -1,
    ckpt_path: Path | None = None,
) -> pl.Trainer:
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(TinyModule(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def last_checkpoint(folder: Path) -> Path:
    return folder / "checkpoints/last.ckpt"


def saved_step(path: Path) -> int:
    return int(load_file(path)["global_step"])


@contextmanager
def limited_file_size(size: int | None) -> Iterator[None]:
    """Let writes fail beyond a file size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class FullDisk(LastCheckpoint):
    """Save at every step, with a full disk at some; record the checkpoints after each failure."""

    def __init__(self, free_bytes: dict[int, int]) -> None:
        super().__init__(every_n_steps=1)
        self.free_bytes = free_bytes
        self.contents: dict[int, bytes] = {}
        self.after_failure: list[tuple[int, int, int]] = []

    def _save(self, trainer: pl.Trainer, publish: bool = True, in_background: bool = False) -> str:
        step, last = trainer.global_step, self.path(trainer)
        if self._last_saved[0] == step:
            return ""
        with limited_file_size(self.free_bytes.get(step)):
            error = super()._save(trainer, publish, in_background) or self._wait(trainer)
        if not error:
            self.contents[step] = last.read_bytes()
        else:
            assert last.read_bytes() == self.contents[max(self.contents)]
            assert sorted(os.listdir(last.parent)) == ["last.ckpt", "previous.ckpt"]
            previous = saved_step(last.with_name("previous.ckpt"))
            self.after_failure.append((step, saved_step(last), previous))
        return error


def test_full_disk_at_any_byte_keeps_both_checkpoints(tmp_path):
    fit(tmp_path / "first", 3, LastCheckpoint(1))
    size = last_checkpoint(tmp_path / "first").stat().st_size
    free_bytes = {4 + k: k * size // 10 for k in range(9)} | {13: size - 1}
    callback = FullDisk(free_bytes)
    with pytest.warns(
        UserWarning, match=r"last.ckpt: File too large; training continues"
    ) as caught:
        fit(tmp_path, 14, callback)
    assert len([one for one in caught if "not written" in str(one.message)]) == 1
    assert callback.after_failure == [(step, 3, 2) for step in range(4, 14)]
    assert saved_step(last_checkpoint(tmp_path)) == 14
    assert saved_step(last_checkpoint(tmp_path).with_name("previous.ckpt")) == 3


def test_full_device_raises_its_error_message(tmp_path):
    write_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint({"step": 2, "x": torch.rand(10_000)}, tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert load_file(tmp_path / "a.ckpt") == {"step": 1}


def test_full_file_system_keeps_the_existing_checkpoint(tmp_path):
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount_point)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        write_checkpoint({"x": torch.zeros(50_000)}, mount_point / "a.ckpt")
        with pytest.raises(OSError, match="No space left on device"):
            write_checkpoint({"x": torch.ones(50_000)}, mount_point / "a.ckpt")
        assert os.listdir(mount_point) == ["a.ckpt"]
        assert torch.equal(load_file(mount_point / "a.ckpt")["x"], torch.zeros(50_000))
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


@pytest.mark.parametrize(
    ("call", "number", "expected"),
    [
        ("fsync", 1, (2, 1)),
        ("replace", 1, (2, 1)),  # of the temporary file
        ("link", 1, None),  # as on a file system without hard links
        ("replace", 3, (2, 2)),  # of the new checkpoint
    ],
)
def test_disk_error_loses_no_checkpoint(tmp_path, monkeypatch, call, number, expected):
    fit(tmp_path, 2, LastCheckpoint(1))
    last, calls, real = last_checkpoint(tmp_path), [0], getattr(os, call)

    def fails(*args: Any, **options: Any) -> Any:
        calls[0] += "checkpoints" in str(args[0]) or call == "fsync"
        if calls[0] == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **options)

    monkeypatch.setattr(os, call, fails)
    callback = LastCheckpoint(1)
    checkpoints: list[tuple[int, int]] = []

    class Inspect(LastCheckpoint):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.strategy.checkpoint_io.teardown()  # waits for the thread that writes
            checkpoints.append((saved_step(last), saved_step(last.with_name("previous.ckpt"))))
            assert not list(last.parent.glob("*.part"))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, 4, callback, Inspect(), ckpt_path=last)
    errors = [one for one in caught if "Input/output error; training continues" in str(one.message)]
    assert len(errors) == (expected is not None)
    assert checkpoints == ([(3, 2), (4, 3)] if expected is None else [expected, (4, expected[0])])


def test_a_checkpoint_is_loadable_after_every_system_call(tmp_path, monkeypatch):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    loaded: list[tuple[int, int | None]] = []

    def inspected(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            loaded.append((load_file(last)["n"], load_file(previous)["n"]))
            return result

        return call

    write_checkpoint({"n": 1}, last)
    write_checkpoint({"n": 0}, previous)
    write_checkpoint({"n": 2}, tmp_path / "new")
    # the state of a run that was killed between the two renames
    os.link(last, tmp_path / "previous.ckpt.part")
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, inspected(getattr(os, name)))
    rotate(tmp_path / "new", last)
    assert loaded == [(1, 0), (1, 1), (2, 1)]
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]
    # after a kill before the last rename, both names are the same file
    os.unlink(previous)
    os.link(last, previous)
    write_checkpoint({"n": 3}, tmp_path / "new")
    rotate(tmp_path / "new", last)
    assert (load_file(last)["n"], load_file(previous)["n"]) == (3, 2)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize(("steps", "epochs"), [(6, -1), (-1, 1)])
def test_unsaved_final_state_is_an_error_that_lists_earlier_checkpoints(tmp_path, steps, epochs):
    class FullAtTheEnd(LastCheckpoint):
        def save_now(self, trainer: pl.Trainer) -> None:
            assert not self._wait(trainer)  # step 4 is complete when the disk is full
            with limited_file_size(2000):
                super().save_now(trainer)

    with (
        pytest.warns(UserWarning, match="not written"),
        pytest.raises(
            InputError, match=r"could not be saved: .*last.ckpt: File too large"
        ) as caught,
    ):
        fit(tmp_path, steps, FullAtTheEnd(4), max_epochs=epochs)
    assert str(caught.value).endswith(
        f"earlier steps are in {last_checkpoint(tmp_path).parent}: last.ckpt"
    )
    assert saved_step(last_checkpoint(tmp_path)) == 4
    assert os.listdir(last_checkpoint(tmp_path).parent) == ["last.ckpt"]


def test_command_line_gives_one_message_if_nothing_can_be_saved(workplace, monkeypatch, capsys):
    def full(checkpoint: Any, path: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", full)
    with pytest.warns(UserWarning, match="No space left on device; training continues"):
        assert main(["fit", *QUICK, *TINY, "--trainer.logger=false"]) == 2
    message = capsys.readouterr().err
    assert "yolo-lightning: error: step 4 could not be saved: " in message
    assert "No space left on device; earlier steps are in " in message


class RecordErrors(LastCheckpoint):
    """Write the error of each rank to a file."""

    def save_now(self, trainer: pl.Trainer) -> None:
        try:
            super().save_now(trainer)
        except InputError as error:
            folder = Path(trainer.default_root_dir)
            (folder / f"rank{trainer.global_rank}").write_text(str(error))


def test_full_disk_raises_on_both_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    write = write_checkpoint

    def full(checkpoint: Any, path: Any) -> None:
        if "last.ckpt" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(checkpoint, path)  # the results of the forked ranks

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", full)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=3, accelerator="cpu", devices=2,
        strategy="ddp_fork", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[RecordErrors(2)],
    )  # fmt: skip
    trainer.fit(TinyModule())
    for rank in (0, 1):
        assert "No space left on device" in (tmp_path / f"rank{rank}").read_text()


def test_model_checkpoint_keeps_the_old_file_if_the_new_one_fails(tmp_path):
    ranking = ModelCheckpoint(
        tmp_path, "{step}", monitor="score", mode="max", every_n_train_steps=1, save_top_k=1
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FullAtTwo(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            limit = 2000 if trainer.global_step == 1 else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    with pytest.warns(UserWarning, match=r"step=2.ckpt: File too large; training continues"):
        fit(tmp_path, 3, FullAtTwo(), LastCheckpoint(10), ranking)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=3.ckpt"]
    assert ranking.best_model_path == str(tmp_path / "step=3.ckpt")
    verify(tmp_path / "step=1.ckpt")


def test_partial_and_damaged_files_of_a_killed_run_are_removed(tmp_path):
    fit(tmp_path, 2, LastCheckpoint(1))
    last = last_checkpoint(tmp_path)
    previous = last.with_name("previous.ckpt")
    (last.parent / "best.ckpt.part").write_bytes(b"half")
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        verify(last)
    assert resumable_checkpoint(last) == previous
    fit(tmp_path, 2, LastCheckpoint(1), ckpt_path=previous)
    # the damaged file has not replaced the valid one
    assert (saved_step(last), saved_step(previous)) == (2, 1)
    assert sorted(os.listdir(last.parent)) == ["last.ckpt", "previous.ckpt"]


def test_resuming_falls_back_to_the_previous_checkpoint(tmp_path, capsys):
    last, previous, best = (tmp_path / f"{name}.ckpt" for name in ("last", "previous", "best"))
    write_checkpoint({"n": 2}, last)
    assert resumable_checkpoint(last) == last
    write_checkpoint({"n": 1}, previous)
    shutil.copy(last, best)
    assert capsys.readouterr().out == ""
    damaged = bytearray(last.read_bytes())
    damaged[damaged.index(b"n", 64)] ^= 4  # the key in the pickle
    last.write_bytes(damaged)
    best.write_bytes(damaged)
    assert resumable_checkpoint(last) == previous
    output = capsys.readouterr().out
    assert f"{last}: damaged (Bad CRC-32 for file 'archive/data.pkl')" in output
    assert f"resuming from {previous}" in output
    with pytest.raises(InputError, match=r"best.ckpt: damaged"):  # no fallback for this name
        resumable_checkpoint(best)
    last.unlink()
    assert resumable_checkpoint(last) == previous
    previous.write_bytes(b"")
    with pytest.raises(InputError, match=r"last.ckpt' not found .*previous.ckpt: not a checkpoint"):
        resumable_checkpoint(last)


def test_trainer_verifies_checkpoints_and_unpickles_no_objects(tmp_path):
    trainer = fit(tmp_path, 1, LastCheckpoint(1))
    io = trainer.strategy.checkpoint_io
    torch.save({"module": TinyModule()}, tmp_path / "objects.ckpt")
    with pytest.raises(InputError, match=r"uses tests.checkpoints.test_checkpoints.TinyModule"):
        io.load_checkpoint(tmp_path / "objects.ckpt", weights_only=False)
    damaged = bytearray(last_checkpoint(tmp_path).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last_checkpoint(tmp_path).write_bytes(damaged)
    with pytest.raises(InputError, match="Bad CRC-32"):
        fit(tmp_path, 2, LastCheckpoint(1), ckpt_path=last_checkpoint(tmp_path))


def test_values_that_could_not_be_loaded_are_rejected_on_writing(tmp_path):
    write_checkpoint({"n": 1}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"its pickle uses __builtin__.set; allowed: plain values"):
        write_checkpoint({"n": {1, 2}}, tmp_path / "a.ckpt")
    assert load_file(tmp_path / "a.ckpt") == {"n": 1}
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_writing_needs_no_second_copy_in_memory(tmp_path):
    """Limit the address space: Lightning needs the size of the file once more."""
    checkpoint = {"x": torch.zeros(50 << 20, dtype=torch.uint8)}
    status = Path("/proc/self/status").read_text()
    used = int(status.split("VmSize:")[1].split()[0]) << 10
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), before[1]))
    try:
        write_checkpoint(checkpoint, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert (tmp_path / "a.ckpt").stat().st_size > 50 << 20


def test_a_checkpoint_keeps_the_options_of_the_network(tmp_path):
    torch.manual_seed(0)
    options: dict[str, Any] = {"batch_norm": False, "location": "offset"}
    saved = DetectorModule(["a"], [(1.0, 1.0)], "small", 8, 4, **options).eval()
    torch.save(build_checkpoint(saved, {}), tmp_path / "m.ckpt")
    loaded = load(tmp_path / "m.ckpt")
    assert loaded.network.location == "offset"
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded.network(images).box_logits, saved.network(images).box_logits)
    # the x and y of an offset mean something else in a cell; layers without batch norm do not fit
    direct = DetectorModule(["a"], [(1.0, 1.0)], "small", 8, 4, batch_norm=False)
    report = load_pretrained(direct.network, direct.tree, tmp_path / "m.ckpt", 12)
    assert report.initialized == ["boxes and objectness"]
    usual = DetectorModule(["a"], [(1.0, 1.0)], "small", 8, 4)
    message = "the checkpoint has no batch norm, the network has; model.batch_norm is true"
    with pytest.raises(InputError, match=message):
        load_pretrained(usual.network, usual.tree, tmp_path / "m.ckpt", 12)


def test_weights_with_batch_norm_for_a_network_without_it(tmp_path):
    usual = DetectorModule(["a"], [(1.0, 1.0)], "small", 8, 4).eval()
    plain = DetectorModule(["a"], [(1.0, 1.0)], "small", 8, 4, batch_norm=False)
    torch.save(build_checkpoint(usual, {}), tmp_path / "m.ckpt")
    message = "the network has no batch norm, the checkpoint has; model.batch_norm is false"
    with pytest.raises(InputError, match=message):
        load_pretrained(plain.network, plain.tree, tmp_path / "m.ckpt", 12)
    export_model(usual, {}, tmp_path / "y")
    with pytest.raises(
        InputError, match=r"the network has no batch norm \(model.batch_norm: false"
    ):
        load_pretrained(plain.network, plain.tree, tmp_path / "y.weights", 12)


def test_every_torch_load_uses_weights_only():
    calls = 0
    for folder in ("yolo_lightning", "callbacks", "datamodules", "tests"):
        for file in (REPO / folder).glob("**/*.py"):
            text = file.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)) if "torch.load" in text else ():
                if not isinstance(node, ast.Call) or ast.unparse(node.func) != "torch.load":
                    continue
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert keywords.get("weights_only") == "True", f"{file}:{node.lineno}"
                calls += file.parent.name != "tests"
    assert calls
