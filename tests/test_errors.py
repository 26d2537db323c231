"""Checks of files, and files that are replaced as a whole."""

import os

import pytest

from yolo_lightning.errors import (
    InputError,
    read_text,
    require_file,
    require_folder,
    require_path,
    write_atomically,
)


@pytest.mark.parametrize("require", [require_file, require_folder, read_text])
def test_missing_paths_are_named_with_the_working_folder(require, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        require("gone.txt", "list")
    assert str(caught.value) == f"list 'gone.txt' not found (working folder: {tmp_path})"
    with pytest.raises(InputError, match=r"file or folder 'gone.txt' not found"):
        require_path("gone.txt")


def test_a_folder_is_no_file_and_a_file_is_no_folder(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x")
    assert require_file(file, "list") == require_path(file) == file
    assert require_folder(tmp_path, "folder") == tmp_path
    with pytest.raises(InputError, match="not found"):
        require_file(tmp_path, "list")
    with pytest.raises(InputError, match="not found"):
        require_folder(file, "folder")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")
    assert read_text("~/a.txt") == "café\n"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"latin\.txt: not readable as UTF-8 text"):
        read_text("~/latin.txt")


def test_a_file_is_replaced_with_its_mode_and_no_other_file_remains(tmp_path):
    file = tmp_path / "new" / "a.txt"
    write_atomically(file, "old")
    file.chmod(0o600)
    write_atomically(file, "neu\r\n")
    assert file.read_bytes() == b"neu\r\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_links_and_pipes_are_written_directly(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "link.part").write_text("somebody's own")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link.part").read_text() == "somebody's own"
    (tmp_path / "link.part").unlink()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", "through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]


def test_a_file_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder' cannot be written"):
        write_atomically(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
