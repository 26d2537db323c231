"""The journal: what is written down stays, in its order, whatever the disk or a crash does."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.paths import REPO
from yolo_lightning.tracking import logger as tracking
from yolo_lightning.tracking.journal import FOLDER, UNREADABLE, Journal, journals_under
from yolo_lightning.tracking.logger import RunLogger


def metrics(step: int, **values: float) -> dict[str, Any]:
    return {"op": "metrics", "t": 1000 + step, "step": step, "values": values or {"loss": 1.0}}


def steps(journal: Journal, offset: int = 0) -> list[int]:
    return [entry["step"] for entry, _ in journal.entries(offset, "metrics")]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "run" / FOLDER)


@pytest.fixture
def full(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A disk that takes so many bytes more."""
    left = {"bytes": 10**9}
    write = os.write

    def limited(descriptor: int, data: bytes) -> int:
        taken = data[: left["bytes"]]
        if data and not taken:
            raise OSError(28, "No space left on device")
        left["bytes"] -= len(taken)
        return write(descriptor, taken)

    monkeypatch.setattr("yolo_lightning.tracking.journal.os.write", limited)
    return left


texts = st.text(max_size=20)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.dictionaries(texts, st.floats() | st.integers(-(2**53), 2**53), max_size=4)),
    st.dictionaries(texts, texts),
)
def test_every_entry_comes_back_and_each_offset_leads_to_the_rest(tmp_path_factory, values, named):
    journal = Journal(tmp_path_factory.mktemp("journal"))
    written = [metrics(step) | {"values": some} for step, some in enumerate(values)]
    written.append({"op": "tags", "t": 1, "values": named})
    for entry in written:
        journal.append(entry)
        assert not journal.problem
    found = list(journal.entries())
    assert repr([entry for entry, _ in found]) == repr(written)  # NaN is not itself
    for number, (_, offset) in enumerate(found):
        rest = [entry for entry, _ in journal.entries(offset)]
        assert repr(rest) == repr(written[number + 1 :])
    assert found[-1][1] == journal.end


def test_half_a_surrogate_and_a_strange_object_are_written_too(journal):
    journal.append({"op": "tags", "values": {"folder": "a\udcffb"}})
    journal.append({"op": "inputs", "datasets": [{"path": Path("x")}]})
    assert [entry["op"] for entry, _ in journal.entries()] == ["tags", "inputs"]
    assert next(journal.entries())[0]["values"] == {"folder": "a?b"}


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_that_a_crash_cut_off_takes_no_other_one_along(journal, cut):
    for step in range(3):
        journal.append(metrics(step))
    file = journal.folder / "journal.jsonl"
    os.truncate(file, file.stat().st_size - cut)
    assert steps(journal) == [0, 1]
    again = Journal(journal.folder)
    untouched = file.read_bytes()
    assert steps(again) == [0, 1]
    assert file.read_bytes() == untouched, "who only reads changes nothing"
    again.append(metrics(7))
    # without its newline alone, the cut line is whole
    assert steps(again) == ([0, 1, 2, 7] if cut == 1 else [0, 1, 7])
    ops = [entry["op"] for entry, _ in again.entries()]
    assert ops.count(UNREADABLE) == (0 if cut == 1 else 1)


@pytest.mark.parametrize(
    "line",
    [
        "not json", "[1, 2]", '"text"', "{}", '{"op": 3}', '{"op": "unknown"}', "[" * 99_999,
        '{"op": "metrics"}', '{"op": "metrics", "t": 1, "step": 1, "values": [1]}',
        '{"op": "metrics", "t": 1, "step": 1, "values": {"a": "x"}}',
        '{"op": "metrics", "t": 1, "step": "1", "values": {"a": 1}}',
        '{"op": "metrics", "t": -1, "step": 1, "values": {"a": 1}}',
        '{"op": "metrics", "t": 1, "step": 99999999999999999999, "values": {"a": 1}}',
        '{"op": "metrics", "t": 1, "step": 1, "values": {"a": null}}',
        '{"op": "params", "values": {"a": 1}}', '{"op": "tags"}', '{"op": "open", "store": 1}',
        '{"op": "file", "file": "../../secret", "folder": "x"}', '{"op": "file", "file": "/etc/x"}',
        '{"op": "remove", "path": "../x"}', '{"op": "picture", "file": "x"}', '{"op": "status"}',
        "\x00\x00\x00\x00", "\ufffd",
    ],
)  # fmt: skip
def test_a_line_that_makes_no_sense_is_told_as_such_and_hides_nothing(journal, line):
    journal.append(metrics(1))
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    journal.append(metrics(2))
    assert steps(journal) == [1, 2]
    (strange,) = [entry for entry, _ in journal.entries() if entry["op"] == UNREADABLE]
    assert strange["line"][:50] == line[:50]


def test_two_processes_append_and_no_line_is_torn(journal):
    code = (
        "import sys\nfrom yolo_lightning.tracking.journal import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for step in range(400):\n"
        "    values = {sys.argv[2]: 1.0}\n"
        "    journal.append({'op': 'metrics', 't': 1, 'step': step, 'values': values})\n"
        "    assert not journal.problem\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, journal.folder, name * 300], cwd=REPO)
        for name in "ab"
    ]
    seen = 0
    while any(process.poll() is None for process in both):
        now = [entry["op"] for entry, _ in journal.entries()]
        assert len(now) >= seen
        assert UNREADABLE not in now
        seen = len(now)
    assert [process.returncode for process in both] == [0, 0]
    found = [(*entry["values"], entry["step"]) for entry, _ in journal.entries()]
    for name in "ab":
        assert [step for key, step in found if key == name * 300] == list(range(400))


def test_lines_that_a_full_disk_refuses_wait_in_order_and_land_later(journal, full):
    journal.append(metrics(0))
    on_disk = (journal.folder / "journal.jsonl").read_bytes()
    full["bytes"] = 30  # not even a line
    for step in range(1, 4):
        journal.append(metrics(step))
        assert "space" in journal.problem
        assert str(journal.folder) in journal.problem
    assert (journal.folder / "journal.jsonl").read_bytes() == on_disk, "no half line stays"
    assert steps(journal) == [0, 1, 2, 3]
    offsets = [offset for _, offset in journal.entries()]
    full["bytes"] = 10**9
    journal.append(metrics(4))
    assert not journal.problem
    assert steps(Journal(journal.folder)) == [0, 1, 2, 3, 4]
    # what was read from memory is where it said
    assert [steps(journal, offset) for offset in offsets] == [[1, 2, 3, 4], [2, 3, 4], [3, 4], [4]]


def test_offsets_hold_where_a_cut_off_line_lies_below_the_waiting_ones(journal, full):
    journal.append(metrics(0))
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write('{"op": "metr')
    full["bytes"] = 0
    journal.append(metrics(1))
    journal.append(metrics(2))
    found = list(journal.entries(0, "metrics"))
    assert [entry["step"] for entry, _ in found] == [0, 1, 2]
    full["bytes"] = 10**9
    journal.append(metrics(3))
    assert [steps(journal, offset) for _, offset in found] == [[1, 2, 3], [2, 3], [3]]


def test_a_real_full_disk_loses_nothing(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root mounts a small disk")
    try:
        journal = Journal(place / "run" / FOLDER)
        for step in range(1500):
            journal.append(metrics(step))
        assert "No space left" in journal.problem or "no space" in journal.problem
        assert steps(journal) == list(range(1500))
        on_disk = steps(Journal(place / "run" / FOLDER))
        assert on_disk == list(range(len(on_disk)))
        assert 0 < len(on_disk) < 1500
        with pytest.raises(OSError, match="No space"):
            journal.keep(REPO / "README.md", "recipe/README.md")
        assert not list((journal.folder / "files").rglob("*.part")), "half a copy stays on no disk"
        subprocess.run(["mount", "-o", "remount,size=4m", place], check=True)
        journal.append(metrics(1500))
        assert not journal.problem
        assert steps(Journal(place / "run" / FOLDER)) == list(range(1501))
    finally:
        subprocess.run(["umount", place], check=True)


def test_the_token_is_one_for_all_processes_and_mended_where_a_crash_emptied_it(journal):
    assert Journal(journal.folder).token == journal.token
    (journal.folder / "token").write_text("")
    mended = Journal(journal.folder).token
    assert mended
    assert Journal(journal.folder).token == mended


def test_what_is_noted_as_shipped_is_never_more_than_the_disk_holds(journal, full):
    journal.append(metrics(0))
    size = journal.end
    full["bytes"] = 0
    journal.append(metrics(1))
    assert journal.end > size
    journal.note_shipped("sqlite:///a", "run", journal.end, put_off=[3])
    noted = Journal(journal.folder).shipped
    assert noted == {"sqlite:///a": {"run_id": "run", "offset": size, "put_off": [3]}}
    journal.note_shipped("sqlite:///b", "other", 1)
    assert journal.shipped.keys() == {"sqlite:///a", "sqlite:///b"}, "stores do not share a note"


def test_lines_reach_the_disk_before_they_are_noted_as_shipped(journal, monkeypatch):
    done = []
    monkeypatch.setattr("yolo_lightning.tracking.journal.os.fsync", lambda _: done.append("sync"))
    replace = Path.replace

    def noting(*paths: Any) -> Any:
        done.append("note")
        return replace(*paths)

    monkeypatch.setattr(Path, "replace", noting)
    journal.append(metrics(0))
    journal.note_shipped("s", "r", journal.end)
    assert done == ["sync", "note"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"s": 3}', '{"s": {"run_id": 1}}'])
def test_a_broken_note_is_no_note(journal, text):
    (journal.folder / "shipped.json").write_text(text)
    assert journal.shipped == {}


def test_a_kept_file_is_as_it_was_and_a_linked_one_takes_no_space(journal, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("first")
    journal.keep(file, "recipe/a.txt")
    file.write_text("second")
    assert journal.pending("recipe/a.txt").read_text() == "first"
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_text("weights")
    journal.keep(checkpoint, "checkpoints/best.ckpt", link=True)
    assert journal.pending("checkpoints/best.ckpt").samefile(checkpoint)
    fresh = tmp_path / "fresh"
    fresh.write_text("better")
    fresh.replace(checkpoint)  # as checkpoints are written
    assert journal.pending("checkpoints/best.ckpt").read_text() == "weights"


def test_a_file_system_without_hard_links_gets_copies(journal, tmp_path, monkeypatch):
    def refuse(*paths: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("yolo_lightning.tracking.journal.os.link", refuse)
    file = tmp_path / "a"
    file.write_text("held")
    journal.keep(file, "a", link=True)
    assert journal.pending("a").read_text() == "held"
    assert not journal.pending("a").samefile(file)


def test_a_shipped_file_goes_unless_a_newer_one_took_its_place(journal, tmp_path):
    file = tmp_path / "a"
    file.write_text("1")
    journal.keep(file, "x/a")
    shipped = journal.pending("x/a").stat()
    file.write_text("2")
    journal.keep(file, "x/a")
    journal.release("x/a", shipped)
    assert journal.pending("x/a").read_text() == "2"
    journal.release("x/a", journal.pending("x/a").stat())
    assert not list((journal.folder / "files/x").iterdir())
    journal.release("x/a")  # twice is once
    (journal.pending("model") / "data").mkdir(parents=True)
    journal.release("model", journal.pending("model").stat())
    assert not journal.pending("model").exists()


def test_a_file_that_is_not_there_is_an_error_and_leaves_what_waits(journal, tmp_path):
    file = tmp_path / "a"
    file.write_text("1")
    journal.keep(file, "a")
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        journal.keep(file, "a")
    assert [path.name for path in (journal.folder / "files").iterdir()] == ["a"]


def test_a_folder_that_cannot_be_made_is_a_problem_and_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / FOLDER)
    journal.append(metrics(3))
    assert "Not a directory" in journal.problem
    assert steps(journal) == [3]
    assert len(journal.token) == 32


def test_reading_and_writing_at_once_gives_each_line_once(journal):
    def write() -> None:
        for step in range(3000):
            journal.append(metrics(step))

    writer = threading.Thread(target=write)
    writer.start()
    found, read = [], 0
    while writer.is_alive() or read < journal.end:
        for entry, end in journal.entries(read):
            found.append(entry["step"])
            read = end
    assert found == list(range(3000))


def test_no_lock_of_the_journal_is_held_while_somebody_reads(journal):
    for step in range(3):
        journal.append(metrics(step))
    entries = journal.entries()
    next(entries)  # as while a batch is on its way to a store
    writer = threading.Thread(target=journal.append, args=(metrics(3),))
    writer.start()
    writer.join(5)
    assert not writer.is_alive()


def test_journals_are_found_below_a_folder(tmp_path):
    for name in ("b", "a/deeper"):
        Journal(tmp_path / name / FOLDER).append(metrics(0))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/journal.jsonl").write_text("")
    found = [path.relative_to(tmp_path).as_posix() for path in journals_under(tmp_path)]
    assert found == ["a/deeper/mlflow", "b/mlflow"]
    assert journals_under(tmp_path / "b/mlflow") == [tmp_path / "b/mlflow"]


def test_a_long_journal_does_not_hold_a_resumed_training_up(tmp_path, monkeypatch):
    folder, lines = tmp_path / FOLDER, 50_000
    folder.mkdir()
    line = '{"op": "metrics", "t": 1, "step": %d, "values": {"train/loss": 0.5, "train/lr": 0.1}}\n'
    text = "".join(line % step for step in range(lines))
    (folder / "journal.jsonl").write_text(text)
    monkeypatch.setattr(tracking, "ShippingThread", lambda shipper: None)
    logger = RunLogger(
        "e", tracking_uri="sqlite:///none.db", folder=str(tmp_path), system_metrics=False
    )
    started = time.process_time()
    logger.begin(lines - 10)
    assert time.process_time() - started < 5, "200,000 lines take 1.3 s"
    logger.log_metrics({"train/loss": 3.0}, lines - 5)  # logged before, by a killed process
    logger.log_metrics({"train/loss": 4.0}, lines)
    written = [
        json.loads(one) for one in (folder / "journal.jsonl").read_text().splitlines()[lines:]
    ]
    assert [entry["op"] for entry in written] == ["open", "status", "metrics"]
    assert written[-1]["values"] == {"train/loss": 4.0}
