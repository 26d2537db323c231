"""Reading video files, cameras and streams frame by frame, with PyAV; audio is ignored."""

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from yolo_lightning.errors import InputError, mask_secrets
from yolo_lightning.images import MAX_PIXELS, Image

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg",
    ".wmv", ".flv", ".3gp", ".ogv",
)  # fmt: skip

# FFmpeg's demuxers of these files
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg"

STREAM_SCHEMES = ("http", "https", "rtmp", "rtmps", "rtsp", "rtsps", "tcp", "udp")

TIMEOUT_S = 10.0  # for connecting to a stream, and for its next packet

_TIME_TOLERANCE_S = 0.0005  # Matroska stores timestamps in milliseconds
_DEFAULT_RATE = Fraction(25)
_EXACT_DURATION = {"matroska", "mp4", "avi", "flv", "asf"}  # other containers only estimate it
_MAX_HEADER = 1024  # bytes between two packets in Matroska; other formats store them far apart
_ATTACHED_PICTURE = 0x400  # disposition of the cover image of an audio file


class VideoFrame(NamedTuple):
    """One frame of a video, with a strictly increasing timestamp."""

    image: Image
    time_s: float  # from the start of the file, or the first frame of a camera or stream


def is_video(path: str | Path) -> bool:
    """Return whether the suffix is that of a supported video file."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def is_stream(location: str) -> bool:
    """Return whether this is a URL such as ``rtsp://host/path``."""
    return re.match(r"[a-z][a-z0-9+.-]*://", location, re.IGNORECASE) is not None


def without_secrets(location: str) -> str:
    """Return a path, a camera number, or a URL without its user, password and tokens."""
    return mask_secrets(location) if is_stream(location) else location


def is_camera(location: str) -> bool:
    """Return whether this is a camera number: ``0`` is ``/dev/video0``."""
    return re.fullmatch(r"[0-9]{1,4}", location) is not None


class VideoReader:
    """Iterate once over the frames of a video file, a camera or a stream, upright and in RGB.

    Rotation metadata is applied, pixels are made square, and all frames are scaled to `size_hw`,
    the size of the first one. `frame_count` is approximate, or None if the duration is unknown.

    A file that is damaged or shorter than its duration is an error, after its frames before the
    damage. Cameras and live streams continue after damage, end when the connection closes, and
    fail after `TIMEOUT_S` without data. Not all damage can be detected: a few wrong bytes may
    decode to a wrong image, and a transport stream (.ts), which has no duration, may lack frames.

    Args:
        source: a path, a URL or a camera number.
        start_s: seconds to skip; for cameras and live streams, counted from the first frame.
        duration_s: seconds to read; None reads to the end. Consecutive windows share no frame and
            lose none.

    Raises:
        InputError: missing, not a video, a window outside of it; on iteration also damage.
    """

    def __init__(
        self, source: str | Path, start_s: float = 0.0, duration_s: float | None = None
    ) -> None:
        self.source = without_secrets(str(source))
        self._location, self._start_s = str(source), start_s
        self._end_s = math.inf if duration_s is None else start_s + duration_s
        self.frames_read = 0
        self._last_s: float | None = None  # timestamp of the last decoded frame
        self._bytes_missing = False
        self._container: Any = None
        try:
            self._first = self._seek_to_start()
        except BaseException:
            self.close()
            raise
        self._coded_hw = self._first.height, self._square_width(self._first)
        self._quarter_turns = round(self._first.rotation / 90) % 4  # counterclockwise
        self.size_hw = self._coded_hw if self._quarter_turns % 2 == 0 else self._coded_hw[::-1]
        window_s = min(self._end_s, self._duration_s) - start_s
        self.frame_count = (
            max(1, round(window_s * self.frames_per_second)) if window_s < math.inf else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, camera or stream."""
        if self._container is not None:
            self._container.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        for frame in itertools.chain([self._first], self._frames):
            time_s = self._last_s = self._increasing_time_s(frame)
            if time_s + _TIME_TOLERANCE_S >= self._end_s:
                break
            if time_s + _TIME_TOLERANCE_S >= self._start_s:
                self.frames_read += 1
                yield VideoFrame(self._to_upright_rgb(frame), time_s)
        if not self.frames_read:
            raise InputError(
                f"{self.source}: no frame between {self._start_s:g} and {self._end_s:g} s"
            )

    def _seek_to_start(self) -> Any:
        """Open the source and return the first decoded frame, at or before the start."""
        # some containers seek to the keyframe after the requested time: try again earlier
        for margin_s in (0.0, 10.0, math.inf):
            self._open()
            seek_s = 0.0 if self._live else max(0.0, self._start_s - margin_s)
            if seek_s:
                offset = round((seek_s + self._origin_s) / self._stream.time_base)
                with contextlib.suppress(self._ffmpeg_error):
                    self._container.seek(offset, stream=self._stream)
            self._frames = self._decode()
            try:
                first = next(self._frames, None)
            except InputError:
                if not seek_s:
                    raise
                continue
            time_s = None if first is None else self._time_s(first)
            if not seek_s or (time_s is not None and time_s <= self._start_s + _TIME_TOLERANCE_S):
                break
        if first is None:
            raise InputError(f"{self.source}: no frame in it can be decoded")
        if self._live:
            self._origin_s += time_s or 0.0
        return first

    def _open(self) -> None:
        self.close()
        self._ffmpeg_error = import_pyav().FFmpegError
        self._container = _open_container(self._location, self.source)
        streams = [
            stream
            for stream in self._container.streams.video
            if stream.codec_context is not None and not int(stream.disposition) & _ATTACHED_PICTURE
        ]
        if not streams:
            raise InputError(f"{self.source}: no video in it that can be decoded")
        self._stream = streams[0]
        self._square_width(self._stream)
        rate = self._stream.average_rate or self._stream.guessed_rate or _DEFAULT_RATE
        self.frames_per_second = Fraction(rate) if 0 < rate < 1000 else _DEFAULT_RATE
        duration = self._container.duration or 0
        self._duration_s = duration / 1e6 if duration > 0 else math.inf
        if self._start_s >= self._duration_s:
            raise InputError(
                f"{self.source}: the start, {self._start_s:g} s, lies beyond its end; it is "
                f"{self._duration_s:.3f} s long"
            )
        endless = is_stream(self._location) and self._duration_s == math.inf
        self._live = is_camera(self._location) or endless
        self._origin_s = float((self._stream.start_time or 0) * self._stream.time_base)

    def _square_width(self, size: Any) -> int:
        """Return the width of a frame, or of a stream, once its pixels are square."""
        width: int = max(1, round(size.width * (self._stream.sample_aspect_ratio or 1)))
        for side in (size.width, width):
            if side * size.height > MAX_PIXELS:
                raise InputError(
                    f"{self.source}: frames of {side} x {size.height} px; allowed: at most "
                    f"{MAX_PIXELS // 1_000_000} million pixels"
                )
        return width

    def _decode(self) -> Iterator[Any]:
        """Yield intact frames in presentation order, and fail at the first damage."""
        # live streams and recordings of them start with frames whose references are missing
        tolerant = self._live or self._container.format.name == "mpegts"
        for packet in self._packets():
            frames: Iterable[Any] = []
            damaged = packet.is_corrupt and not tolerant
            if not damaged:
                try:
                    frames = packet.decode()
                except self._ffmpeg_error:
                    damaged = not tolerant
            for frame in self._frames_before(packet) if damaged else frames:
                if not frame.is_corrupt:
                    tolerant = self._live
                    self._check_gap(frame)
                    yield frame
                elif not tolerant:
                    damaged = True
                    break
            if damaged:
                raise self._broken("the data are damaged there")

    def _packets(self) -> Iterator[Any]:
        """Yield the packets of the video; fail if the file ends before its duration."""
        formats = set(self._container.format.name.split(","))
        end_s, longest_step_s, end_byte = -math.inf, 0.0, math.inf
        try:
            for packet in self._container.demux():  # audio may be longer than the video
                if packet.pts is not None:
                    until_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                    if end_s > -math.inf:  # the first packet may follow a seek
                        longest_step_s = max(longest_step_s, until_s - end_s)
                    end_s = max(end_s, until_s)
                if "matroska" in formats and packet.pos is not None and packet.size:
                    self._bytes_missing |= packet.pos - end_byte > _MAX_HEADER
                    end_byte = packet.pos + packet.size
                if packet.stream.index == self._stream.index:
                    yield packet
        except self._ffmpeg_error as error:
            raise self._broken(error_reason(error)) from None
        duration_s = self._duration_s if formats & _EXACT_DURATION else 0.0
        if "avi" in formats:  # FFmpeg computes its duration from the truncated file
            duration_s = max(duration_s, float(self._stream.frames / self.frames_per_second))
        if end_s + longest_step_s + 0.05 < duration_s < math.inf:
            raise self._broken(f"its duration should be {duration_s:.3f} s")

    def _check_gap(self, frame: Any) -> None:
        """Fail on a time gap where bytes are missing, which the decoder may not notice."""
        time_s = self._time_s(frame)
        if self._bytes_missing and time_s is not None and self._last_s is not None:
            gap_s = time_s - self._last_s
            if gap_s * self.frames_per_second > 1.5:
                raise self._broken(f"{gap_s:.3f} s are missing there")

    def _frames_before(self, packet: Any) -> Iterator[Any]:
        """Yield the frames that the decoder still holds and that precede a damaged packet."""
        with contextlib.suppress(self._ffmpeg_error):
            for frame in self._stream.decode(None):
                if frame.pts is None or packet.pts is None or frame.pts >= packet.pts:
                    return
                yield frame

    def _broken(self, reason: str) -> InputError:
        return InputError(
            f"{self.source}: breaks off after {self._last_s or 0.0:.3f} s; "
            f"frames read: {self.frames_read} ({reason})"
        )

    def _time_s(self, frame: Any) -> float | None:
        if frame.pts is None:
            return None
        return float(frame.pts * self._stream.time_base) - self._origin_s

    def _increasing_time_s(self, frame: Any) -> float:
        """Return the timestamp of a frame, estimated if missing, after that of the last one."""
        time_s, last_s = self._time_s(frame), self._last_s
        if time_s is None:
            return 0.0 if last_s is None else last_s + float(1 / self.frames_per_second)
        return time_s if last_s is None else max(time_s, last_s + 2 * _TIME_TOLERANCE_S)

    def _to_upright_rgb(self, frame: Any) -> Image:
        height, width = self._coded_hw
        image = frame.to_ndarray(format="rgb24", width=width, height=height)
        return np.ascontiguousarray(np.rot90(image, self._quarter_turns))


def import_pyav() -> Any:
    """Import PyAV when a video is opened; it is installed with the extra `video`."""
    try:
        import av
    except ImportError:
        raise InputError("video needs PyAV: pip install 'yolo-lightning[video]'") from None
    return av


def _open_container(location: str, display_name: str) -> Any:
    """Open a camera number, a URL or a file."""
    av = import_pyav()
    options: dict[str, Any]
    hint = ""
    if is_camera(location):
        path, options = f"/dev/video{int(location)}", {"format": "v4l2"}
        cameras = " ".join(sorted(file.name[5:] for file in Path("/dev").glob("video[0-9]*")))
        display_name = f"camera {location} ({path})"
        hint = f"; available cameras: {cameras or 'none'}; cameras are read on Linux, with v4l2"
    elif is_stream(location):
        path, scheme = location, location.split(":", 1)[0].lower()
        if scheme not in STREAM_SCHEMES:
            raise InputError(
                f"{display_name}: not a supported stream; allowed: {', '.join(STREAM_SCHEMES)}"
            )
        # TCP neither loses packets nor needs an open port on this machine
        protocol = {"rtsp_transport": "tcp"} if scheme.startswith("rtsp") else {}
        options = {"timeout": (TIMEOUT_S, TIMEOUT_S), "options": protocol}
    else:
        file = Path(location)
        if file.exists() and not (
            file.is_file() or file.is_dir()
        ):  # a named pipe or a device may block
            raise InputError(f"{display_name}: not a regular file")
        # colons in a file name are no scheme; a playlist of that name would open other files
        limits = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        path, options = f"file:{location}", {"options": limits}
    try:
        return av.open(path, metadata_errors="replace", **options)
    except (av.FFmpegError, ValueError) as error:
        damaged = isinstance(error, av.InvalidDataError)
        reason = "no video, or its header is damaged" if damaged else error_reason(error)
        raise InputError(f"{display_name}: cannot be opened ({reason}){hint}") from None


def error_reason(error: Exception) -> str:
    """Return the message of an error of FFmpeg or the disk."""
    if type(error).__name__ == "ExitError":  # FFmpeg's name for an interrupt by PyAV's timeout
        return f"timed out after {TIMEOUT_S:g} s"
    return getattr(error, "strerror", None) or str(error)
