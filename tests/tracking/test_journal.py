"""The journal: no line is lost or reordered by a full disk or a crash."""

import fcntl
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
from yolo_lightning.tracking.entries import UNREADABLE
from yolo_lightning.tracking.journal import JOURNAL_FOLDER, Journal, find_journals
from yolo_lightning.tracking.logger import RunLogger
from yolo_lightning.tracking.segments import Segment


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
    st.lists(st.dictionaries(texts, st.floats() | st.integers(-(2**53), 2**53), max_size=4)),
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
        '{"op": "remove", "path": "../x"}', '{"op": "image", "file": "x"}', '{"op": "status"}',
        "\x00\x00\x00\x00", "\ufffd",
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
    journal.record_upload("sqlite:///a", "run", journal.end, deferred=[3])
    recorded = Journal(journal.folder).uploads
    assert recorded == {"sqlite:///a": {"run_id": "run", "offset": size, "deferred": [3]}}
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
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "SEGMENT_BYTES", 2000)


def segment_files(journal: Journal, suffix: str) -> list[Path]:
    return sorted(journal.folder.glob(f"journal-*{suffix}"))


def test_a_journal_in_segments_reads_like_one_file(journal, small_segments):
    written = [metrics(step) for step in range(300)]
    for number, entry in enumerate(written):
        journal.append(entry)
        if number == 150:
            journal.compress()
    assert len(segment_files(journal, ".jsonl.gz")) > 3
    assert len(segment_files(journal, ".jsonl")) > 3
    for reader in (journal, Journal(journal.folder)):
        entries = list(reader.entries())
        assert [entry for entry, _ in entries] == written
        assert entries[-1][1] == reader.end
        for number in (0, 7, 99, 150, 298):
            assert steps(reader, entries[number][1]) == list(range(number + 1, 300))
    journal.compress()
    assert segment_files(journal, ".jsonl") == []
    assert steps(journal) == list(range(300))
    assert not list(journal.folder.glob("*.part"))
    for file in journal.folder.glob("journal.jsonl"):
        file.unlink()
    assert find_journals(journal.folder.parent) == [journal.folder]


def test_state_and_points_are_the_same_with_and_without_indices(journal, small_segments):
    for step in range(200):
        journal.append(metrics(step))
        if step % 20 == 0:
            journal.append({"op": "tags", "t": 1, "values": {"step": str(step)}})
            journal.append(metrics(step // 20) | {"system": True})
            journal.append({"op": "image", "t": 1, "file": "i", "key": "k", "step": step})
    before = list(journal.state("tags"))
    tail = [entry for entry in journal.points(180) if entry["step"] >= 180]
    middle = [entry for entry in journal.points(90, 95) if 90 <= entry["step"] <= 95]
    assert len(before) == 10
    journal.compress()
    assert list(journal.state("tags")) == before
    opened: list[str] = []
    lines = Segment.lines

    def traced(self: Segment, offset: int) -> Any:
        opened.append(self.file.name)
        return lines(self, offset)

    Segment.lines = traced  # type: ignore[method-assign]
    try:
        points = list(journal.points(180))
        assert [entry for entry in points if entry["step"] >= 180] == tail
        assert max(entry["step"] for entry in points if entry.get("system")) == 9
        assert len(opened) <= 2, "only the end is read"
        assert [e for e in journal.points(90, 95) if 90 <= e["step"] <= 95] == middle
        opened.clear()
        assert list(journal.state("tags")) == before
        assert opened == []
    finally:
        Segment.lines = lines  # type: ignore[method-assign]
    for file in segment_files(journal, ".index"):
        file.write_text('{"first": "x"}\n')
    assert list(journal.state("tags")) == before, "a damaged index is not used"


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
    journal._retry_at = 0.0
    journal.append(metrics(4))
    ops = [entry["op"] for entry, _ in journal.entries()]
    assert ops == ["metrics"] * 5
    assert sorted(steps(journal)) == [0, 1, 2, 3, 4]


def test_a_segment_is_compressed_by_one_process_and_after_a_kill_by_the_next(
    journal, small_segments
):
    for step in range(50):
        journal.append(metrics(step))
    (segment,) = segment_files(journal, ".jsonl")
    for suffix in (".index.part", ".jsonl.gz.part"):
        segment.with_suffix(suffix).write_text("left by a killed process")
    with segment.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        journal.compress()
        assert segment.exists()
    journal.compress()
    assert not segment.exists()
    assert not list(journal.folder.glob("*.part"))
    assert steps(journal) == list(range(50))


def test_a_segment_closed_while_it_is_opened_for_reading_is_read(journal, small_segments):
    for step in range(10):
        journal.append(metrics(step))
    open_current = journal._open_current

    def close_segment_before() -> Any:
        journal._open_current = open_current
        for step in range(10, 60):
            journal.append(metrics(step))
        return open_current()

    reader = journal.entries(0, "metrics", end=journal.end)
    journal._open_current = close_segment_before
    assert [entry["step"] for entry, _ in reader] == list(range(10))
    assert segment_files(journal, ".jsonl")


def test_a_damaged_segment_hides_no_other(journal, small_segments):
    for step in range(100):
        journal.append(metrics(step))
    journal.compress()
    first = segment_files(journal, ".jsonl.gz")[0]
    first.write_bytes(first.read_bytes()[:50])
    entries = [entry for entry, _ in journal.entries()]
    (damaged,) = [entry for entry in entries if entry["op"] == UNREADABLE]
    assert damaged["line"].startswith("damaged: journal-0")
    assert steps(journal)[-50:] == list(range(50, 100))


def test_two_processes_and_a_compressing_thread_lose_no_line(journal):
    code = (
        "import sys\nfrom yolo_lightning.tracking.journal import Journal\n"
        "Journal.SEGMENT_BYTES = 5000\njournal = Journal(sys.argv[1])\n"
        "for step in range(600):\n"
        "    values = {sys.argv[2]: 1.0}\n"
        "    journal.append({'op': 'metrics', 't': 1, 'step': step, 'values': values})\n"
        "    assert not journal.write_error\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, journal.folder, name * 100], cwd=REPO)
        for name in "ab"
    ]
    while any(process.poll() is None for process in processes):
        journal.compress()
        for _ in journal.entries():
            pass
    assert [process.returncode for process in processes] == [0, 0]
    journal.compress()
    assert len(segment_files(journal, ".jsonl.gz")) > 10
    entries = [(*entry["values"], entry["step"]) for entry, _ in journal.entries()]
    for name in "ab":
        assert [step for key, step in entries if key == name * 100] == list(range(600))


def test_compressing_is_skipped_on_a_full_disk(journal, small_segments, monkeypatch):
    for step in range(100):
        journal.append(metrics(step))

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("yolo_lightning.tracking.segments.shutil.copyfileobj", refuse)
        journal.compress()
    assert steps(journal) == list(range(100))
    assert not list(journal.folder.glob("*.part"))


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
    journal._retry_at = 0.0
    journal.append(metrics(2))
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
