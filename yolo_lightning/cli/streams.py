"""Standard output and error that outlive a full disk."""

import io
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class LossyFile(io.FileIO):
    """A standard stream whose text is dropped where it cannot be written, such as on a full disk.

    The first error is reported on the other standard stream. A closed pipe still raises
    `BrokenPipeError`: nobody reads on.
    """

    error = ""  # why text was lost

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._description = f"standard {name}"

    def write(self, data: Any) -> int:
        """Write bytes, or drop them; later ones are tried again."""
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.error:
                self.error = error.strerror or str(error)
                message = f"{self._description} cannot be written ({self.error}); its text is lost"
                with suppress(OSError):
                    os.write(3 - self.fileno(), f"yolo-lightning: {message}\n".encode())
            return memoryview(data).nbytes


def tolerate_full_disk() -> list[LossyFile]:
    """Replace `sys.stdout` and `sys.stderr`; return their files."""
    files = []
    for name, description in (("stdout", "output"), ("stderr", "error")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:  # closed by the shell
            continue
        file = LossyFile(stream.fileno(), description)
        is_terminal = stream.isatty()
        text = io.TextIOWrapper(
            io.BufferedWriter(file), stream.encoding, stream.errors,
            line_buffering=is_terminal or name == "stderr",
        )  # fmt: skip
        setattr(sys, name, text)
        files.append(file)
    return files
