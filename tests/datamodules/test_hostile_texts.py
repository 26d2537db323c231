"""Hostile text files end in a message that names them: no traceback, no hang, no secret shown."""

import re
import signal
import warnings
from collections.abc import Iterator

import pytest

from tests.helpers import hostile_files
from yolo_lightning.cli.main import main

_LIMIT_S = 10  # a tenth of this is usual; the drills measure


class TooSlow(BaseException):
    """Not caught as an error of the file."""


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    def fail(*_: object) -> None:
        raise TooSlow(f"more than {_LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(_LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("known_step_time")
@pytest.mark.parametrize("name", hostile_files.CASES)
def test_hostile_files_are_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, word = hostile_files.CASES[name](tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of numbers that overflow
        code = main(argv)
    shown = "".join(capsys.readouterr())
    assert word in shown, shown[:2000]
    assert code in (0, 2)
    assert hostile_files.SECRET not in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert max(map(len, shown.splitlines())) < 3_000
