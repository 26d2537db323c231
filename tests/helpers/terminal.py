"""Pseudo-terminals, and what is left on their screens."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Iterator

import pytest


def open_terminal(columns: int) -> tuple[int, int]:
    """Return the descriptors of a pseudo-terminal: the screen, and that of the program."""
    screen, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    return screen, program


def read_all(screen: int) -> bytes:
    """Return what is written to a terminal until it is closed."""
    chunks = []
    with contextlib.suppress(OSError):  # EIO: closed
        while chunk := os.read(screen, 65536):
            chunks.append(chunk)
    os.close(screen)
    return b"".join(chunks)


@contextlib.contextmanager
def terminal(patch: pytest.MonkeyPatch, columns: int = 80) -> Iterator[list[str]]:
    """Let this process write to a terminal; the list gets all its output at the end."""
    screen, program = open_terminal(columns)
    written: list[bytes] = []
    reader = threading.Thread(target=lambda: written.append(read_all(screen)))
    reader.start()
    output: list[str] = []
    with patch.context() as context, open(program, "w", encoding="utf-8", buffering=1) as file:
        context.setattr(sys, "stdout", file)
        context.setattr(sys, "stderr", file)
        yield output
    reader.join()
    output.append(written[0].decode())


def visible_lines(output: str) -> list[str]:
    """Return the lines of a screen: what follows a carriage return covers what stood there."""
    lines = []
    for line in output.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines
