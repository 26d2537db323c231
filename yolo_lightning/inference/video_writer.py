"""Writing video files with PyAV."""

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np

from yolo_lightning.errors import InputError
from yolo_lightning.images import Image
from yolo_lightning.inference.video import error_reason, import_pyav

# encoder, time base, encoder options, container options: fast presets, the network needs the CPU
_ENCODERS: dict[str, tuple[str, Fraction, dict[str, str], dict[str, str]]] = {
    ".webm": (
        "libvpx-vp9",
        Fraction(1, 1000),
        {"deadline": "realtime", "cpu-used": "7", "row-mt": "1", "crf": "32", "b": "0"},
        {},
    ),
    ".mp4": (
        "libx264",
        Fraction(1, 90_000),
        # B-frames can make the duration in the file too short
        {"preset": "veryfast", "crf": "23", "bf": "0"},
        {"movflags": "faststart"},
    ),
}


class VideoWriter:
    """Write a video that browsers can play: VP9 in .webm, H.264 in .mp4; 8 bits, 4:2:0, BT.709.

    Use it as a context manager. Frames are written to a temporary file, which `close` renames, also
    after an exception or an interrupt; without a frame, no file is written. Chroma is subsampled:
    an odd side grows by one pixel, a copy of the last. The first frame gets timestamp 0.

    Raises:
        InputError: missing folder, missing encoder, or a write error.
    """

    def __init__(
        self, path: Path, size_hw: tuple[int, int], frames_per_second: float | Fraction
    ) -> None:
        self.path = path
        encoder, self._time_base, options, container_options = _ENCODERS[path.suffix]
        self._av = import_pyav()
        self._temporary = path.with_name(path.name + ".part")
        self._padding = [(0, side % 2) for side in size_hw] + [(0, 0)]
        self._first_s: float | None = None
        self._last_pts = -1
        self._container: Any = None
        rate = Fraction(frames_per_second).limit_denominator(1001)
        with self._report_errors():
            self._container = self._av.open(
                f"file:{self._temporary}",
                "w",
                format=path.suffix[1:],
                container_options=container_options,
            )
            self._stream = self._container.add_stream(encoder, rate=rate, options=options)
        self._stream.height, self._stream.width = (side + side % 2 for side in size_hw)
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.time_base = self._time_base
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited range, 16 … 235

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, image: Image, time_s: float) -> None:
        """Append a frame of size `size_hw`; timestamps increase."""
        if self._first_s is None:
            self._first_s = time_s
        pts = round((time_s - self._first_s) / self._time_base)
        self._last_pts = max(pts, self._last_pts + 1)
        frame = self._av.VideoFrame.from_ndarray(
            np.pad(image, self._padding, mode="edge"), format="rgb24"
        )
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = self._last_pts, self._time_base
        with self._report_errors():
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file and rename it; remove it if there was no frame."""
        if self._container is None:
            return
        if self._first_s is None:
            self._discard()
            return
        with self._report_errors():
            self._container.mux(self._stream.encode(None))
            self._container.close()
            os.replace(self._temporary, self.path)
        self._container = None

    @contextlib.contextmanager
    def _report_errors(self) -> Iterator[None]:
        """Convert errors of FFmpeg and the disk to `InputError`, and remove the temporary file."""
        try:
            yield
        except self._av.codec.codec.UnknownCodecError as error:
            self._discard()
            raise InputError(
                f"{self.path}: this FFmpeg has no encoder {error}; choose another --video-format"
            ) from None
        except (self._av.FFmpegError, OSError) as error:
            self._discard()
            raise InputError(f"{self.path}: cannot be written ({error_reason(error)})") from None

    def _discard(self) -> None:
        if self._container is not None:
            with contextlib.suppress(self._av.FFmpegError, OSError):
                self._container.close()
        self._container = None
        self._temporary.unlink(missing_ok=True)
