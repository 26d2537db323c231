"""Checkpoints that survive: full disks, faults between two renames, damage, and the way back."""

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
from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint
from yolo_lightning.checkpoints import io as checkpoint_io
from yolo_lightning.checkpoints.io import (
    load_file,
    rotate,
    verify,
    write_checkpoint,
)
from yolo_lightning.checkpoints.validation import sound_checkpoint
from yolo_lightning.cli.main import main
from yolo_lightning.errors import InputError


class Line(pl.LightningModule):
    """As little as can be trained; its checkpoints are some kilobytes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = torch.nn.Linear(40, 20)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.line(batch[0]).square().mean()
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
    trainer.fit(Line(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def last_of(folder: Path) -> Path:
    return folder / "checkpoints/last.ckpt"


def step_of(path: Path) -> int:
    return int(load_file(path)["global_step"])


@contextmanager
def no_file_above(size: int | None) -> Iterator[None]:
    """Let the system refuse every byte of a file beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Full(LastCheckpoint):
    """Save at every step, at some of them onto a disk without room; look at what is left."""

    def __init__(self, room: dict[int, int]) -> None:
        super().__init__(every_n_steps=1)
        self.room = room
        self.kept: dict[int, bytes] = {}
        self.found: list[tuple[int, int, int]] = []

    def _save(self, trainer: pl.Trainer) -> str:
        step, last = trainer.global_step, self.path(trainer)
        if self._saved_at[0] == step:
            return ""
        with no_file_above(self.room.get(step)):
            problem = super()._save(trainer)
        if not problem:
            self.kept[step] = last.read_bytes()
        else:
            saved = self._saved_at[0]
            assert last.read_bytes() == self.kept[saved]
            assert sorted(os.listdir(last.parent)) == ["last.ckpt", "previous.ckpt"]
            previous = step_of(last.with_name("previous.ckpt"))
            self.found.append((step, step_of(last), previous))
        return problem


def test_a_disk_full_at_ten_points_of_saving_leaves_the_two_checkpoints_before(tmp_path):
    fit(tmp_path / "first", 3, LastCheckpoint(1))
    size = last_of(tmp_path / "first").stat().st_size
    room = {4 + k: k * size // 10 for k in range(9)} | {13: size - 1}
    keeper = Full(room)
    with pytest.warns(UserWarning, match=r"last.ckpt: File too large; training goes on") as said:
        fit(tmp_path, 14, keeper)
    assert len([one for one in said if "not written" in str(one.message)]) == 1
    assert keeper.found == [(step, 3, 2) for step in range(4, 14)]
    assert step_of(last_of(tmp_path)) == 14
    assert step_of(last_of(tmp_path).with_name("previous.ckpt")) == 3


def test_a_device_without_room_is_an_error_with_its_own_words(tmp_path):
    write_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint({"step": 2, "x": torch.rand(10_000)}, tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert load_file(tmp_path / "a.ckpt") == {"step": 1}


def test_a_file_system_that_fills_up_keeps_the_previous_checkpoint(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        write_checkpoint({"x": torch.zeros(50_000)}, place / "a.ckpt")
        with pytest.raises(OSError, match="No space left on device"):
            write_checkpoint({"x": torch.ones(50_000)}, place / "a.ckpt")
        assert os.listdir(place) == ["a.ckpt"]
        assert torch.equal(load_file(place / "a.ckpt")["x"], torch.zeros(50_000))
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("call", "number", "kept"),
    [
        ("fsync", 1, (2, 1)),
        ("replace", 1, (2, 1)),  # of the part, onto the fresh one
        ("link", 1, None),  # a file system without hard links: nothing is lost
        ("replace", 3, (2, 2)),  # of the fresh one, onto the last one
    ],
)
def test_a_fault_of_the_disk_costs_no_checkpoint(tmp_path, monkeypatch, call, number, kept):
    fit(tmp_path, 2, LastCheckpoint(1))
    last, calls, real = last_of(tmp_path), [0], getattr(os, call)

    def fails(*args: Any, **options: Any) -> Any:
        calls[0] += "checkpoints" in str(args[0]) or call == "fsync"
        if calls[0] == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args, **options)

    monkeypatch.setattr(os, call, fails)
    keeper = LastCheckpoint(1)
    found: list[tuple[int, int]] = []

    class Look(LastCheckpoint):
        def on_train_batch_end(self, *args: Any) -> None:
            found.append((step_of(last), step_of(last.with_name("previous.ckpt"))))
            assert not list(last.parent.glob("*.part"))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fit(tmp_path, 4, keeper, Look(), ckpt_path=last)
    told = [one for one in said if "Input/output error; training goes on" in str(one.message)]
    assert len(told) == (kept is not None)
    assert found == ([(3, 2), (4, 3)] if kept is None else [kept, (4, kept[0])])


def test_one_checkpoint_loads_at_every_moment_between_two_renames(tmp_path, monkeypatch):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    seen: list[tuple[int, int | None]] = []

    def looked(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            done = real(*args, **options)
            seen.append((load_file(last)["n"], load_file(previous)["n"]))
            return done

        return call

    write_checkpoint({"n": 1}, last)
    write_checkpoint({"n": 0}, previous)
    write_checkpoint({"n": 2}, tmp_path / "fresh")
    # as a run leaves it that is killed between the two renames
    os.link(last, tmp_path / "previous.ckpt.part")
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, looked(getattr(os, name)))
    rotate(tmp_path / "fresh", last)
    assert seen == [(1, 0), (1, 1), (2, 1)]
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]
    # killed before the last rename, both are one file
    os.unlink(previous)
    os.link(last, previous)
    write_checkpoint({"n": 3}, tmp_path / "fresh")
    rotate(tmp_path / "fresh", last)
    assert (load_file(last)["n"], load_file(previous)["n"]) == (3, 2)
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize(("steps", "epochs"), [(6, -1), (-1, 1)])
def test_a_last_state_that_cannot_be_saved_is_an_error_that_names_what_there_is(
    tmp_path, steps, epochs
):
    class FullAtTheEnd(LastCheckpoint):
        def save_now(self, trainer: pl.Trainer) -> None:
            with no_file_above(2000):
                super().save_now(trainer)

    with (
        pytest.warns(UserWarning, match="not written"),
        pytest.raises(InputError, match=r"could not be saved: .*last.ckpt: File too large") as said,
    ):
        fit(tmp_path, steps, FullAtTheEnd(4), max_epochs=epochs)
    assert str(said.value).endswith(f"earlier steps are in {last_of(tmp_path).parent}: last.ckpt")
    assert step_of(last_of(tmp_path)) == 4
    assert os.listdir(last_of(tmp_path).parent) == ["last.ckpt"]


def test_the_command_line_ends_in_one_message_where_nothing_can_be_saved(
    workplace, monkeypatch, capsys
):
    def full(checkpoint: Any, path: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", full)
    with pytest.warns(UserWarning, match="No space left on device; training goes on"):
        assert main(["fit", *QUICK, *TINY, "--trainer.logger=false"]) == 2
    said = capsys.readouterr().err
    assert "yolo-lightning: error: step 4 could not be saved: " in said
    assert "No space left on device; earlier steps are in " in said


class Rank(LastCheckpoint):
    """Write down what a rank is told."""

    def save_now(self, trainer: pl.Trainer) -> None:
        try:
            super().save_now(trainer)
        except InputError as error:
            folder = Path(trainer.default_root_dir)
            (folder / f"rank{trainer.global_rank}").write_text(str(error))


def test_both_ranks_are_told_of_a_full_disk_and_neither_waits(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    write = write_checkpoint

    def full(checkpoint: Any, path: Any) -> None:
        if "last.ckpt" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(checkpoint, path)  # what the ranks that were forked leave for this process

    monkeypatch.setattr(checkpoint_io, "write_checkpoint", full)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, max_steps=3, accelerator="cpu", devices=2,
        strategy="ddp_fork", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Rank(2)],
    )  # fmt: skip
    trainer.fit(Line())
    for rank in (0, 1):
        assert "No space left on device" in (tmp_path / f"rank{rank}").read_text()


def test_a_ranking_never_removes_a_checkpoint_for_one_that_was_not_written(tmp_path):
    ranking = ModelCheckpoint(
        tmp_path, "{step}", monitor="score", mode="max", every_n_train_steps=1, save_top_k=1
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FullAtTwo(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
            room = 2000 if trainer.global_step == 1 else before[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

    with pytest.warns(UserWarning, match=r"step=2.ckpt: File too large; training goes on"):
        fit(tmp_path, 3, FullAtTwo(), LastCheckpoint(10), ranking)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=3.ckpt"]
    assert ranking.best_model_path == str(tmp_path / "step=3.ckpt")
    verify(tmp_path / "step=1.ckpt")


def test_what_a_killed_run_left_half_written_is_removed_and_its_damage_not_kept(tmp_path):
    fit(tmp_path, 2, LastCheckpoint(1))
    last = last_of(tmp_path)
    previous = last.with_name("previous.ckpt")
    (last.parent / "best.ckpt.part").write_bytes(b"half")
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(InputError, match="cut short"):
        verify(last)
    assert sound_checkpoint(last) == previous
    fit(tmp_path, 2, LastCheckpoint(1), ckpt_path=previous)
    # the damaged one has not pushed the sound one out
    assert (step_of(last), step_of(previous)) == (2, 1)
    assert sorted(os.listdir(last.parent)) == ["last.ckpt", "previous.ckpt"]


def test_resuming_falls_back_to_the_previous_checkpoint_and_says_so(tmp_path, capsys):
    last, previous, best = (tmp_path / f"{name}.ckpt" for name in ("last", "previous", "best"))
    write_checkpoint({"n": 2}, last)
    assert sound_checkpoint(last) == last
    write_checkpoint({"n": 1}, previous)
    shutil.copy(last, best)
    assert capsys.readouterr().out == ""
    damaged = bytearray(last.read_bytes())
    damaged[damaged.index(b"n", 64)] ^= 4  # the key in the pickle
    last.write_bytes(damaged)
    best.write_bytes(damaged)
    assert sound_checkpoint(last) == previous
    said = capsys.readouterr().out
    assert f"{last}: damaged (Bad CRC-32 for file 'archive/data.pkl')" in said
    assert f"going on from {previous}" in said
    with pytest.raises(InputError, match=r"best.ckpt: damaged"):  # no other file takes its place
        sound_checkpoint(best)
    last.unlink()
    assert sound_checkpoint(last) == previous
    previous.write_bytes(b"")
    with pytest.raises(InputError, match=r"last.ckpt' not found .*previous.ckpt: not a checkpoint"):
        sound_checkpoint(last)


def test_lightning_s_own_reading_verifies_too_and_never_unpickles_objects(tmp_path):
    trainer = fit(tmp_path, 1, LastCheckpoint(1))
    io = trainer.strategy.checkpoint_io
    torch.save({"module": Line()}, tmp_path / "objects.ckpt")
    with pytest.raises(InputError, match=r"asks for tests.checkpoints.test_checkpoints.Line"):
        io.load_checkpoint(tmp_path / "objects.ckpt", weights_only=False)
    damaged = bytearray(last_of(tmp_path).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    last_of(tmp_path).write_bytes(damaged)
    with pytest.raises(InputError, match="Bad CRC-32"):
        fit(tmp_path, 2, LastCheckpoint(1), ckpt_path=last_of(tmp_path))


def test_what_could_not_be_read_back_is_refused_when_it_is_written(tmp_path):
    write_checkpoint({"n": 1}, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=r"it asks for __builtin__.set; allowed: plain values"):
        write_checkpoint({"n": {1, 2}}, tmp_path / "a.ckpt")
    assert load_file(tmp_path / "a.ckpt") == {"n": 1}
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_checkpoint_is_written_without_a_second_copy_in_memory(tmp_path):
    """A limit on address space: Lightning's own way needs the file's size once more."""
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


def test_every_read_of_a_pickle_by_torch_takes_weights_only():
    calls = 0
    for folder in ("yolo_lightning", "callbacks", "datamodules", "tests"):
        for file in (REPO / folder).glob("**/*.py"):
            text = file.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)) if "torch.load" in text else ():
                if not isinstance(node, ast.Call) or ast.unparse(node.func) != "torch.load":
                    continue
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given.get("weights_only") == "True", f"{file}:{node.lineno}"
                calls += file.parent.name != "tests"
    assert calls
