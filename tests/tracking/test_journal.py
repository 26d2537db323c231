"""The journal: no line is lost or reordered by a full disk or a crash."""

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
from yolo_lightning.tracking import journal as journal_module
from yolo_lightning.tracking.entries import UNREADABLE
from yolo_lightning.tracking.journal import JOURNAL_FOLDER, Journal, find_journals
from yolo_lightning.tracking.logger import RunLogger


def metrics(step: int, **values: float) -> dict[str, Any]:
    return {"op": "metrics", "t": 1000 + step, "step": step, "values": values or {"loss": 1.0}}


def steps(journal: Journal, offset: int = 0) -> list[int]:
    return [entry["step"] for entry, _ in journal.entries(offset, "metrics")]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "run" / JOURNAL_FOLDER)


@pytest.fixture
def disk(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A disk with the given number of free bytes."""
    free = {"bytes": 10**9}
    write = os.write

    def limited(descriptor: int, data: bytes) -> int:
        accepted = data[: free["bytes"]]
        if data and not accepted:
            raise OSError(28, "No space left on device")
        free["bytes"] -= len(accepted)
        return write(descriptor, accepted)

    monkeypatch.setattr("yolo_lightning.tracking.journal.os.write", limited)
    return free


texts = st.text(max_size=20)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.dictionaries(texts, st.floats() | st.integers(-(2**53), 2**53), min_size=1, max_size=4)
    ),
    st.dictionaries(texts, texts),
)
def test_entries_are_read_back_from_every_offset(tmp_path_factory, values, named):
    journal = Journal(tmp_path_factory.mktemp("journal"))
    written = [metrics(step) | {"values": some} for step, some in enumerate(values)]
    written.append({"op": "tags", "t": 1, "values": named})
    for entry in written:
        journal.append(entry)
        assert not journal.write_error
    entries = list(journal.entries())
    assert repr([entry for entry, _ in entries]) == repr(written)  # NaN is not equal to itself
    for number, (_, offset) in enumerate(entries):
        rest = [entry for entry, _ in journal.entries(offset)]
        assert repr(rest) == repr(written[number + 1 :])
    assert entries[-1][1] == journal.end


def test_lone_surrogates_and_unknown_objects_are_written(journal):
    journal.append({"op": "tags", "values": {"folder": "a\udcffb"}})
    journal.append({"op": "inputs", "datasets": [{"path": Path("x")}]})
    assert [entry["op"] for entry, _ in journal.entries()] == ["tags", "inputs"]
    assert next(journal.entries())[0]["values"] == {"folder": "a?b"}


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_truncated_by_a_crash_damages_no_other_line(journal, cut):
    for step in range(3):
        journal.append(metrics(step))
    file = journal.folder / "journal.jsonl"
    os.truncate(file, file.stat().st_size - cut)
    assert steps(journal) == [0, 1]
    reopened = Journal(journal.folder)
    untouched = file.read_bytes()
    assert steps(reopened) == [0, 1]
    assert file.read_bytes() == untouched, "reading does not modify the file"
    reopened.append(metrics(7))
    # if only the newline is missing, the line is complete
    assert steps(reopened) == ([0, 1, 2, 7] if cut == 1 else [0, 1, 7])
    ops = [entry["op"] for entry, _ in reopened.entries()]
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
        '{"op": "image", "file": "x"}', '{"op": "status"}',
        '{"op": "part", "end": 9, "first": 0, "last": 9, "state": []}',
        '{"op": "metrics", "t": 1, "step": 1, "values": {}}', "\x00\x00\x00\x00", "\ufffd",
    ],
)  # fmt: skip
def test_an_invalid_line_is_an_unreadable_entry_and_hides_no_other(journal, line):
    journal.append(metrics(1))
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write(line + "\n")
    journal.append(metrics(2))
    assert steps(journal) == [1, 2]
    (invalid,) = [entry for entry, _ in journal.entries() if entry["op"] == UNREADABLE]
    assert invalid["line"][:50] == line[:50]


def test_two_processes_can_append_at_the_same_time(journal):
    code = (
        "import sys\nfrom yolo_lightning.tracking.journal import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for step in range(400):\n"
        "    values = {sys.argv[2]: 1.0}\n"
        "    journal.append({'op': 'metrics', 't': 1, 'step': step, 'values': values})\n"
        "    assert not journal.write_error\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, journal.folder, name * 300], cwd=REPO)
        for name in "ab"
    ]
    count = 0
    while any(process.poll() is None for process in processes):
        ops = [entry["op"] for entry, _ in journal.entries()]
        assert len(ops) >= count
        assert UNREADABLE not in ops
        count = len(ops)
    assert [process.returncode for process in processes] == [0, 0]
    entries = [(*entry["values"], entry["step"]) for entry, _ in journal.entries()]
    for name in "ab":
        assert [step for key, step in entries if key == name * 300] == list(range(400))


def test_lines_are_buffered_in_order_while_the_disk_is_full(journal, disk):
    journal.append(metrics(0))
    on_disk = (journal.folder / "journal.jsonl").read_bytes()
    disk["bytes"] = 30  # less than one line
    for step in range(1, 4):
        journal.append(metrics(step))
        assert "space" in journal.write_error
        assert str(journal.folder) in journal.write_error
    assert (journal.folder / "journal.jsonl").read_bytes() == on_disk, "no partial line is left"
    assert steps(journal) == [0, 1, 2, 3]
    offsets = [offset for _, offset in journal.entries()]
    disk["bytes"] = 10**9
    journal.append(metrics(4))
    assert "space" in journal.write_error, "one attempt a second"
    journal.sync()
    assert not journal.write_error
    assert steps(Journal(journal.folder)) == [0, 1, 2, 3, 4]
    # offsets of lines that were read from the buffer stay valid
    assert [steps(journal, offset) for offset in offsets] == [[1, 2, 3, 4], [2, 3, 4], [3, 4], [4]]


def test_offsets_of_buffered_lines_after_a_truncated_line_stay_valid(journal, disk):
    journal.append(metrics(0))
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write('{"op": "metr')
    disk["bytes"] = 0
    journal.append(metrics(1))
    journal.append(metrics(2))
    entries = list(journal.entries(0, "metrics"))
    assert [entry["step"] for entry, _ in entries] == [0, 1, 2]
    disk["bytes"] = 10**9
    journal.append(metrics(3))
    journal.sync()
    assert steps(Journal(journal.folder)) == [0, 1, 2, 3]
    assert [steps(journal, offset) for _, offset in entries] == [[1, 2, 3], [2, 3], [3]]


def test_a_real_full_disk_loses_no_lines(tmp_path):
    small_disk = tmp_path / "small"
    small_disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small_disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk requires root")
    try:
        journal = Journal(small_disk / "run" / JOURNAL_FOLDER)
        for step in range(1500):
            journal.append(metrics(step))
        assert "No space left" in journal.write_error or "no space" in journal.write_error
        assert steps(journal) == list(range(1500))
        on_disk = steps(Journal(small_disk / "run" / JOURNAL_FOLDER))
        assert on_disk == list(range(len(on_disk)))
        assert 0 < len(on_disk) < 1500
        with pytest.raises(OSError, match="No space"):
            journal.add_file(REPO / "README.md", "recipe/README.md")
        assert not list((journal.folder / "files").rglob("*.part")), "no partial copy is left"
        subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
        journal.append(metrics(1500))
        journal.sync()
        assert not journal.write_error
        assert steps(Journal(small_disk / "run" / JOURNAL_FOLDER)) == list(range(1501))
    finally:
        subprocess.run(["umount", small_disk], check=True)


def test_the_token_is_shared_by_processes_and_recreated_if_empty(journal):
    assert Journal(journal.folder).token == journal.token
    (journal.folder / "token").write_text("")
    repaired = Journal(journal.folder).token
    assert repaired
    assert Journal(journal.folder).token == repaired


def test_the_recorded_offset_is_limited_to_what_is_on_disk(journal, disk):
    journal.append(metrics(0))
    size = journal.end
    disk["bytes"] = 0
    journal.append(metrics(1))
    assert journal.end > size
    journal.record_upload("sqlite:///a", "run", journal.end, pending=[3])
    recorded = Journal(journal.folder).uploads
    assert recorded == {"sqlite:///a": {"run_id": "run", "offset": size, "pending": [3]}}
    journal.record_upload("sqlite:///b", "other", 1)
    assert journal.uploads.keys() == {"sqlite:///a", "sqlite:///b"}, "stores have separate records"


def test_lines_are_synced_before_the_upload_is_recorded(journal, monkeypatch):
    calls = []
    monkeypatch.setattr("yolo_lightning.tracking.journal.os.fsync", lambda _: calls.append("sync"))
    replace = Path.replace

    def traced_replace(*paths: Any) -> Any:
        calls.append("record")
        return replace(*paths)

    monkeypatch.setattr(Path, "replace", traced_replace)
    journal.append(metrics(0))
    journal.record_upload("s", "r", journal.end)
    assert calls == ["sync", "record"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"s": 3}', '{"s": {"run_id": 1}}'])
def test_an_invalid_upload_record_is_ignored(journal, text):
    (journal.folder / "uploaded.json").write_text(text)
    assert journal.uploads == {}


def test_a_file_is_copied_or_hard_linked(journal, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("first")
    journal.add_file(file, "recipe/a.txt")
    file.write_text("second")
    assert journal.pending_path("recipe/a.txt").read_text() == "first"
    checkpoint = tmp_path / "best.ckpt"
    checkpoint.write_text("weights")
    journal.add_file(checkpoint, "checkpoints/best.ckpt", link=True)
    assert journal.pending_path("checkpoints/best.ckpt").samefile(checkpoint)
    fresh = tmp_path / "fresh"
    fresh.write_text("better")
    fresh.replace(checkpoint)  # as checkpoints are written
    assert journal.pending_path("checkpoints/best.ckpt").read_text() == "weights"


def test_files_are_copied_if_hard_links_are_not_supported(journal, tmp_path, monkeypatch):
    def refuse(*paths: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("yolo_lightning.tracking.journal.os.link", refuse)
    file = tmp_path / "a"
    file.write_text("content")
    journal.add_file(file, "a", link=True)
    assert journal.pending_path("a").read_text() == "content"
    assert not journal.pending_path("a").samefile(file)


def test_an_uploaded_file_is_removed_unless_a_newer_one_replaced_it(journal, tmp_path):
    file = tmp_path / "a"
    file.write_text("1")
    journal.add_file(file, "x/a")
    status = journal.pending_path("x/a").stat()
    file.write_text("2")
    journal.add_file(file, "x/a")
    journal.remove_file("x/a", status)
    assert journal.pending_path("x/a").read_text() == "2"
    journal.remove_file("x/a", journal.pending_path("x/a").stat())
    assert not list((journal.folder / "files/x").iterdir())
    journal.remove_file("x/a")  # a second call does nothing
    (journal.pending_path("model") / "data").mkdir(parents=True)
    journal.remove_file("model", journal.pending_path("model").stat())
    assert not journal.pending_path("model").exists()


def test_adding_a_missing_file_raises_and_keeps_the_pending_one(journal, tmp_path):
    file = tmp_path / "a"
    file.write_text("1")
    journal.add_file(file, "a")
    file.unlink()
    with pytest.raises(OSError, match="No such file"):
        journal.add_file(file, "a")
    assert [path.name for path in (journal.folder / "files").iterdir()] == ["a"]


def test_a_folder_that_cannot_be_created_sets_write_error(tmp_path):
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / JOURNAL_FOLDER)
    journal.append(metrics(3))
    assert "Not a directory" in journal.write_error
    assert steps(journal) == [3]
    assert len(journal.token) == 32


def test_concurrent_reading_and_writing_yields_each_line_once(journal):
    def write() -> None:
        for step in range(3000):
            journal.append(metrics(step))

    writer = threading.Thread(target=write)
    writer.start()
    read_steps, offset = [], 0
    while writer.is_alive() or offset < journal.end:
        for entry, end in journal.entries(offset):
            read_steps.append(entry["step"])
            offset = end
    assert read_steps == list(range(3000))


def test_reading_does_not_hold_the_lock(journal):
    for step in range(3):
        journal.append(metrics(step))
    entries = journal.entries()
    next(entries)  # as during an upload
    writer = threading.Thread(target=journal.append, args=(metrics(3),))
    writer.start()
    writer.join(5)
    assert not writer.is_alive()


def test_find_journals_in_subfolders(tmp_path):
    for name in ("b", "a/deeper"):
        Journal(tmp_path / name / JOURNAL_FOLDER).append(metrics(0))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/journal.jsonl").write_text("")
    journals = [path.relative_to(tmp_path).as_posix() for path in find_journals(tmp_path)]
    assert journals == ["a/deeper/mlflow", "b/mlflow"]
    assert find_journals(tmp_path / "b/mlflow") == [tmp_path / "b/mlflow"]


def test_a_long_journal_does_not_delay_resuming(tmp_path, monkeypatch):
    folder, lines = tmp_path / JOURNAL_FOLDER, 50_000
    folder.mkdir()
    line = '{"op": "metrics", "t": 1, "step": %d, "values": {"train/loss": 0.5, "train/lr": 0.1}}\n'
    text = "".join(line % step for step in range(lines))
    (folder / "journal.jsonl").write_text(text)
    monkeypatch.setattr("yolo_lightning.tracking.upload_thread.UploadThread", lambda uploader: None)
    logger = RunLogger(
        "e", tracking_uri="sqlite:///none.db", folder=str(tmp_path), system_metrics=False
    )
    started = time.process_time()
    logger.start_training(lines - 10)
    assert time.process_time() - started < 5, "200,000 lines take 1.3 s"
    logger.log_metrics({"train/loss": 3.0}, lines - 5)  # already logged by a killed process
    logger.log_metrics({"train/loss": 4.0}, lines)
    written = [
        json.loads(one) for one in (folder / "journal.jsonl").read_text().splitlines()[lines:]
    ]
    assert [entry["op"] for entry in written] == ["open", "status", "metrics"]
    assert written[-1]["values"] == {"train/loss": 4.0}


# --- long journals


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "PART_BYTES", 2000)


@pytest.fixture
def long_journal(journal: Journal, small_parts: None) -> Journal:
    """A journal of 200 steps that is longer than ten parts of an index."""
    for step in range(200):
        journal.append(metrics(step, **{"loss" * 10: 1.0}))
        if step % 20 == 0:
            journal.append({"op": "params", "t": 1, "values": {"step": str(step)}})
            journal.append(metrics(step // 20) | {"system": True})
            journal.append({"op": "image", "t": 1, "file": "i", "key": "k", "step": step})
    return journal


def read_state_and_points(journal: Journal) -> list[Any]:
    tail = [entry for entry in journal.points(180) if entry["step"] >= 180]
    middle = [entry for entry in journal.points(90, 95) if 90 <= entry["step"] <= 95]
    return [list(journal.state("params")), tail, middle]


def index(journal: Journal) -> Path:
    for _ in range(30):
        journal.update_index()
    return journal.folder / "index.jsonl"


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the length of each line that is read from a journal's file."""
    lengths: list[int] = []
    read_lines = journal_module._read_lines

    def traced(path: Path, offset: int, end: int) -> Any:
        for line, after in read_lines(path, offset, end):
            if path.name == "journal.jsonl":
                lengths.append(len(line))
            yield line, after

    monkeypatch.setattr(journal_module, "_read_lines", traced)
    return lengths


def test_with_an_index_only_the_end_is_read(long_journal, bytes_read):
    expected = read_state_and_points(long_journal)
    assert [len(part) for part in expected] == [10, 21, 6]
    assert len(index(long_journal).read_text().splitlines()) > 10
    for journal in (long_journal, Journal(long_journal.folder)):
        assert read_state_and_points(journal) == expected
    bytes_read.clear()
    list(long_journal.state("params"))
    assert sum(bytes_read) < 2500
    list(long_journal.points(190))
    assert sum(bytes_read) < 7500
    long_journal.append({"op": "params", "t": 1, "values": {"step": "200"}})
    assert len(list(long_journal.state("params"))) == 11


def test_an_index_is_continued_and_not_rewritten_without_need(long_journal):
    file = index(long_journal)
    lines, status = file.read_text().splitlines(), file.stat()
    index(long_journal)
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    for step in range(200, 400):
        long_journal.append(metrics(step))
    index(long_journal)
    assert file.read_text().splitlines()[: len(lines)] == lines
    assert len(file.read_text().splitlines()) > len(lines) + 5
    assert [e["step"] for e in long_journal.points(390) if e["step"] > 390] == [*range(391, 400)]


@pytest.mark.parametrize("damage", [
    lambda lines: ["x", *lines],
    lambda lines: [*lines[:4], lines[4][:50], *lines[5:]],
    lambda lines: [*lines, *lines],
    lambda lines: [lines[0].replace('"end": 2', '"end": -2'), *lines[1:3]],
    lambda lines: [lines[0].replace('"end": 2', '"end": 99999992')],
    lambda lines: [lines[0].replace('"first": 0', '"first": []')],
])  # fmt: skip
def test_a_damaged_index_hides_nothing_of_the_end(long_journal, damage, bytes_read):
    expected = read_state_and_points(long_journal)
    file = index(long_journal)
    file.write_text("\n".join(damage(file.read_text().splitlines())) + "\n")
    bytes_read.clear()
    tail, middle = read_state_and_points(long_journal)[1:]
    assert tail == expected[1]
    assert middle == expected[2]
    assert sum(bytes_read) <= 4 * long_journal.end, "each part is read at most once"


def test_the_index_of_a_deleted_journal_is_not_used(long_journal):
    index(long_journal)
    (long_journal.folder / "journal.jsonl").unlink()
    long_journal.append({"op": "params", "t": 1, "values": {"fresh": "1"}})
    assert [entry["values"] for entry in long_journal.state("params")] == [{"fresh": "1"}]
    long_journal.update_index()
    assert list(long_journal.points(0)) == []


def test_an_index_is_not_written_to_a_full_disk(long_journal, monkeypatch):
    expected = read_state_and_points(long_journal)

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("yolo_lightning.tracking.journal.replace_text", refuse)
        long_journal.update_index()
    assert read_state_and_points(long_journal) == expected
    assert index(long_journal).exists()


def test_two_processes_on_a_full_disk_neither_lose_nor_repeat_a_line(journal, monkeypatch):
    journal.append(metrics(0))
    other = Journal(journal.folder)
    write = os.write
    thread = threading.Thread(target=lambda: other.append(metrics(3)))

    def write_a_part(descriptor: int, data: bytes) -> int:
        monkeypatch.setattr("yolo_lightning.tracking.journal.os.write", write)
        written = write(descriptor, data[: data.index(b"\n") + 9])  # a line and a half
        thread.start()
        thread.join(0.3)  # the other process writes before this one truncates
        return written

    journal._buffer += json.dumps(metrics(1)).encode() + b"\n"
    monkeypatch.setattr("yolo_lightning.tracking.journal.os.write", write_a_part)
    journal.append(metrics(2))
    thread.join()
    journal.append(metrics(4))
    journal.sync()
    ops = [entry["op"] for entry, _ in journal.entries()]
    assert ops == ["metrics"] * 5
    assert sorted(steps(journal)) == [0, 1, 2, 3, 4]


def test_two_processes_and_a_thread_that_indexes_lose_no_line(journal, small_parts):
    code = (
        "import sys\nfrom yolo_lightning.tracking.journal import Journal\n"
        "Journal.PART_BYTES = 2000\njournal = Journal(sys.argv[1])\n"
        "for step in range(600):\n"
        "    values = {sys.argv[2]: 1.0}\n"
        "    journal.append({'op': 'metrics', 't': 1, 'step': step, 'values': values})\n"
        "    journal.update_index()\n"
        "    assert not journal.write_error\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, journal.folder, name * 100], cwd=REPO)
        for name in "ab"
    ]
    while any(process.poll() is None for process in processes):
        journal.update_index()
        for _ in journal.points(500):
            pass
    assert [process.returncode for process in processes] == [0, 0]
    index(journal)
    for first in (0, 300, 599):
        points = [(*entry["values"], entry["step"]) for entry in journal.points(first)]
        for name in "ab":
            read = [step for key, *rest in points if key == name * 100 for step in rest]
            assert [step for step in read if step >= first] == list(range(first, 600))


def test_lines_that_cannot_be_parsed_are_one_entry(journal):
    journal.append(metrics(1))
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write("first\n\n" + "x\n" * 20_000)
    journal.append(metrics(2))
    entries = [entry for entry, _ in journal.entries()]
    assert entries == [
        metrics(1), {"op": UNREADABLE, "line": "first", "count": 20_001}, metrics(2),
    ]  # fmt: skip
    assert [end for _, end in journal.entries()][-1] == journal.end
    assert steps(journal, next(end for e, end in journal.entries() if "count" in e)) == [2]


def test_appending_on_a_full_disk_takes_linear_time(journal, disk):
    journal.append(metrics(0))
    disk["bytes"] = 0
    entry = metrics(1) | {"values": {f"train/metric_{k}": 0.123456789 for k in range(20)}}
    started = time.process_time()
    for _ in range(8_000):  # 6 MB
        journal.append(entry)
    assert time.process_time() - started < 2, "writing all of it each time takes 20 s"
    assert "No space" in journal.write_error
    assert sum(1 for _ in journal.entries()) == 8_001
    disk["bytes"] = 10**9
    journal.append(metrics(2))
    journal.sync()
    assert not journal.write_error
    assert sum(1 for _ in Journal(journal.folder).entries()) == 8_002


def test_long_lines_are_written_at_once(journal):
    for step in range(3):
        journal.append(metrics(step, **{f"metric{k}": 1.0 for k in range(9000)}))
        assert steps(Journal(journal.folder)) == list(range(step + 1))


def test_a_buffer_of_the_largest_size_says_that_lines_are_lost(journal, disk, monkeypatch):
    monkeypatch.setattr("yolo_lightning.tracking.journal._MAX_BUFFER_BYTES", 1000)
    disk["bytes"] = 0
    for step in range(30):
        journal.append(metrics(step))
    assert "new lines are lost" in journal.write_error
    kept = steps(journal)
    assert 5 < len(kept) < 30
    assert kept == list(range(len(kept)))
    disk["bytes"] = 10**9
    journal.sync()
    journal.append(metrics(30))
    assert not journal.write_error
    assert steps(Journal(journal.folder)) == [*kept, 30]
