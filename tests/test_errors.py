"""Checks of files, and files that are replaced as a whole."""

import os
import time

import pytest

from yolo_lightning.cli.main import main
from yolo_lightning.errors import (
    MAX_LINE,
    InputError,
    compose_yaml,
    csv_cell,
    mask_secrets,
    nearest,
    printable,
    read_text,
    require_file,
    require_folder,
    require_name,
    require_path,
    short,
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
    with pytest.raises(InputError, match="^list '.*' is a folder, not a file; take b$"):
        require_file(tmp_path, "list", "take b")
    with pytest.raises(InputError, match="not found"):
        require_folder(file, "folder")


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")
    assert read_text("~/a.txt") == "café\n"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"latin\.txt: not readable as UTF-8 text"):
        read_text("~/latin.txt")


def test_the_home_of_an_unknown_user_is_no_file(tmp_path, monkeypatch, capsys):
    """A dataset may name any user, and Python raises RuntimeError for those that do not exist."""
    monkeypatch.chdir(tmp_path)
    for text in ("names: ~nobody-here/n.txt", "path: ~nobody-here\nnames: [a]"):
        (tmp_path / "data.yaml").write_text(f"train: images\n{text}\n")
        assert main(["check-data", "data.yaml"]) == 2
        assert "not found" in capsys.readouterr().err
    assert main(["classify", "a.ckpt", "~nobody-here/a.jpg"]) == 2
    assert "'~nobody-here/a.jpg' not found" in capsys.readouterr().err


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


@pytest.mark.parametrize(("text", "masked"), [
    ("http://ann:pw@host/x", "http://***@host/x"),
    ("http://a:b/c@d@host/x", "http://***@host/x"),
    ("http://ann:p?w#1@host:80/x", "http://***@host:80/x"),
    ('http://ann:p"w@host', "http://***@host"),
    ("https://ghp_0123@host/repo.git", "https://***@host/repo.git"),
    ("postgresql://u:12345678/x@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
    ("http:/a:b@c/x", "http:/***@c/x"),
    ("see http://a:b@c, then 'rtsp://d:e@f'", "see http://***@c, then 'rtsp://***@f'"),
    ("http://h?access_token=ab.c&x=1&api_key=2&sig=a%2Fb",
     "http://h?access_token=***&x=1&api_key=***&sig=***"),
    ("http://cam/v?user=admin&password=pw&channel=1",
     "http://cam/v?user=***&password=***&channel=1"),
    ("rtsp://cam/user=admin&password=pw&channel=1.sdp",
     "rtsp://cam/user=***&password=***&channel=1.sdp"),
    ("https://s3/b?X-Amz-Credential=A/b&X-Amz-Signature=c0",
     "https://s3/b?X-Amz-Credential=***&X-Amz-Signature=***"),
    ("mssql+pyodbc:///?odbc_connect=SERVER%3Dx%3BPWD%3Da%21b%3BUID%3Dsa",
     "mssql+pyodbc:///?odbc_connect=SERVER%3Dx%3BPWD%3D***%3BUID%3Dsa"),
    ("DRIVER={x};UID=sa;PWD={a;b};DATABASE=m", "DRIVER={x};UID=***;PWD=***;DATABASE=m"),
    ("SERVER=x;Password=a b;DATABASE=m", "SERVER=x;Password=***;DATABASE=m"),
    ("fit --logger.api_key=abc --x='http://h?token=t' --y=1",
     "fit --logger.api_key=*** --x='http://h?token=***' --y=1"),
    ("logger:\n  api_key: abc\n  name: x", "logger:\n  api_key: ***\n  name: x"),
    ('{"password": "a, b", "name": "x"}', '{"password": ***, "name": "x"}'),
    ("Authorization: Bearer eyJhbGci.x-y", "Authorization: Bearer ***"),
    ("see http://ann:my pass word@host/x now", "see http://***@host/x now"),
    ("postgresql://ann:a b@db/x and http://c:d@e", "postgresql://***@db/x and http://***@e"),
    (r'{"url": "https:\/\/ann:pw@host\/x"}', r'{"url": "https:\/\/***@host\/x"}'),
    (r"http:\/\/token@host", r"http:\/\/***@host"),
    ("ann:pw@db.example.com/mlflow", "***@db.example.com/mlflow"),
    ("store ann:p!w@127.0.0.1:5000, ann:pw@localhost", "store ***@127.0.0.1:5000, ***@localhost"),
    ("--uri=ann:pw@db:5432/x", "--uri=***@db:5432/x"),
])  # fmt: skip
def test_secrets_are_masked_once(text, masked):
    assert mask_secrets(text) == masked
    assert mask_secrets(masked) == masked


@pytest.mark.parametrize("text", [
    "/home/ann@corp/runs", "sqlite:////home/ann@corp/mlflow.db", "file:///data/a:b@c",
    "http://host:5000/files/ann@corp", "http://[::1]:5000/a@b", "http://host/x?mail=ann@corp",
    "http://host:80?x=a@b", "ann@corp: see http://host", "unknown key: monitor", "--data.user=ann",
    "Unexpected token: <", "author: Ann", "tokens: 5", "a bearer token", "compass=3",
    "basic authentication failed",
    "http://host:5000, see ann@corp.com", "http://host:80 or ann@corp.com", "http://host: a@b.com",
    r"http:\/\/host:5000\/a@b.com", r"https:\/\/host\/ann@corp.com",
    "http://a:b is used by all of ann@b",
    "file:///data/a:b@c.org", "/home/a:b@corp.com/x", "runs/a:b@corp.com", "mailto:ann@corp.com",
    "to: ann@corp.com", "AP:0.5@0.95", "image:v1@sha256:0123456789abcdef", "best:3@step:100",
    "12:30@noon", r"C:\a:b@corp.com", "git@github.com:a/b", "ssh ann@host:22",
    "a bearer of news", '"http://host:80" and ann@corp',
])  # fmt: skip
def test_other_text_is_not_masked(text):
    assert mask_secrets(text) == text


def test_masking_takes_linear_time():
    begin = time.process_time()
    parts = ["a", "://", "a:", "://a:", "token", "token=", "@", '"', "pass-", "://a:b "]
    for part in [*parts, "-", "- ", "\n - ", "http:/", "://a:b c", "a:b", "a:b@c.", "a.", "a:b@1."]:
        mask_secrets(part * (100_000 // len(part)))
    assert time.process_time() - begin < 10  # 0.6 s; hours if it were quadratic


def test_errors_escape_control_characters_and_mask_secrets(capsys):
    assert printable("a\x1b[2J\r\x9b\u202eb\udc80\n\tü") == "a\\x1b[2J\\r\\x9b\\u202eb\\udc80\n\tü"
    assert main(["test", "--config", "http://a:b@c/\x1b[31mred"]) == 2
    message = capsys.readouterr().err
    assert "'http://***@c/\\x1b[31mred'" in message
    assert "\x1b" not in message


def test_long_lines_are_cropped():
    assert printable("a\n" + "b" * 5000 + "\nc") == f"a\n{'b' * MAX_LINE} …\nc"
    assert len(short([["x" * 5000] * 5000] * 5000)) <= 80
    assert short(10**400).startswith("1000000")


def test_hints_do_not_compare_long_words():
    begin = time.perf_counter()
    assert nearest("a" * 100_000, ["a" * 99_999]) == ""
    assert nearest("appel", [*("x" * 90 + str(k) for k in range(100_000)), "apple"]) == ""
    assert time.perf_counter() - begin < 2
    assert nearest("appel", ["apple"]) == "did you mean 'apple'?"


@pytest.mark.parametrize(
    "name", ["a\x1b[31m", "a\rb", "a\nb", "a\tb", "a\u202eb", "\ud800", "a" * 5000]
)
def test_names_that_a_terminal_cannot_show_are_refused(name):
    with pytest.raises(
        InputError, match=r"x:1: name '.*(control characters|5,000 characters)"
    ) as e:
        require_name(name, "x:1")
    assert str(e.value).isprintable()
    for good in ("traffic light", "Straßenbahn", "猫", "क्‍ष", "=a"):
        assert require_name(good, "x:1") == good


@pytest.mark.parametrize(
    ("value", "cell"),
    [("=1+1", "'=1+1"), ("+a", "'+a"), ("-a", "'-a"), ("@a", "'@a"), ("\ta", "'\ta"),
     ("a=b", "a=b"), ("-", "-"), ("", ""), (-1.5, -1.5), (None, None), ("'a", "'a")],
)  # fmt: skip
def test_formulas_in_tables_are_quoted(value, cell):
    assert csv_cell(value) == cell


def test_texts_are_regular_files_of_a_bounded_size(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InputError, match="names '.*fifo' is no regular file"):
        read_text(tmp_path / "fifo", "names")
    with pytest.raises(InputError, match="'/dev/zero' is no regular file"):
        read_text("/dev/zero")
    (tmp_path / "a").write_bytes(b"0\n123\0")
    with pytest.raises(InputError, match="a: 6 bytes; allowed: 5"):
        read_text(tmp_path / "a", max_bytes=5)
    with pytest.raises(InputError, match="a:2: a NUL byte at byte 5"):
        read_text(tmp_path / "a")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="sparse:1: a NUL byte at byte 0"):
        read_text(tmp_path / "sparse", max_bytes=2**41)


def test_yaml_is_composed_within_bounds():
    node = compose_yaml("a: &x 1\nb: [*x, no, 2001-99-99]", "f")
    assert node is not None
    assert [item.value for item in node.value[1][1].value] == ["1", "no", "2001-99-99"]
    assert compose_yaml("", "f") is None
    for text, message in (
        ("a:\n  [b\n", "f:3: not YAML"),
        ("a: &x [1]\nb: *x", r"f:2: alias \*x; allowed: aliases of values"),
        ("a: &x 1\nb: &x [1]\nc: *x", "f:3: alias"),
        ("[" * 201, "f:1: too large; allowed: 200,000 values, 200 levels"),
        ("- 1\n" * 200_001, "f:200000: too large"),
        ("a: \x07", "f: not YAML"),
    ):
        with pytest.raises(InputError, match=message):
            compose_yaml(text, "f")
