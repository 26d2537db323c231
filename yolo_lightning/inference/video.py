"""Reading video files, cameras and streams frame by frame, with PyAV; audio is ignored."""

import contextlib
import itertools
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from yolo_lightning.errors import InputError
from yolo_lightning.images import Image

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg",
    ".wmv", ".flv", ".3gp", ".ogv",
)  # fmt: skip

STREAM_SCHEMES = ("http", "https", "rtmp", "rtmps", "rtsp", "rtsps", "tcp", "udp")

TIMEOUT_S = 10.0  # for connecting to a stream, and for its next packet

_TIME_TOLERANCE_S = 0.0005  # Matroska stores timestamps in milliseconds
_DEFAULT_RATE = Fraction(25)
_DATA_DAMAGED = "the data are damaged there"
_EXACT_DURATION = {"matroska", "mp4", "avi", "flv", "asf"}  # other containers only estimate it
_MAX_HEADER = 1024  # bytes between two packets in Matroska; other formats store them far apart
_ATTACHED_PICTURE = 0x400  # disposition of the cover image of an audio file


class VideoFrame(NamedTuple):
    """One frame of a video, with a strictly increasing timestamp."""

    image: Image
    time_s: float  # from the start of the file, or the first frame of a camera or stream


class BrokenVideo(InputError):
    """A video that cannot be read to its end; `time_s` is that of the last yielded frame."""

    def __init__(self, source: str, frames_read: int, time_s: float | None, reason: str) -> None:
        self.source, self.frames_read, self.time_s = source, frames_read, time_s
        position = "before the first frame" if time_s is None else f"after {time_s:.3f} s"
        super().__init__(f"{source}: breaks off {position}; frames read: {frames_read} ({reason})")


class _DecodingError(Exception):
    """Reason why decoding stopped."""


def is_video(path: str | Path) -> bool:
    """Return whether the suffix is that of a supported video file."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def is_stream(location: str) -> bool:
    """Return whether this is a URL such as ``rtsp://host/path``."""
    return re.match(r"[a-z][a-z0-9+.-]*://", location, re.IGNORECASE) is not None


def without_password(location: str) -> str:
    """Remove user name and password from a URL."""
    return re.sub(r"(?<=://)[^/]*@", "", location)


def is_camera(location: str) -> bool:
    """Return whether this is a camera number: ``0`` is ``/dev/video0``."""
    return re.fullmatch(r"[0-9]{1,4}", location) is not None


class VideoReader:
    """Iterate once over the frames of a video file, a camera or a stream, upright and in RGB.

    Rotation metadata is applied, pixels are made square, and all frames are scaled to `size_hw`,
    the size of the first one. `frame_count` is approximate, or None if the duration is unknown.

    A file that is damaged or shorter than its duration is an error. Cameras and live streams
    continue after damage, end when the connection closes, and fail after `TIMEOUT_S` without data.
    Not all damage can be detected: a few wrong bytes may decode to a wrong image, and a transport
    stream (.ts), which has no duration, may lack whole frames.

    Args:
        source: a path, or as a string also a URL or a camera number.
        start_s: seconds to skip; for cameras and live streams, counted from the first frame.
        duration_s: seconds to read. Consecutive windows share no frame and lose none.

    Raises:
        InputError: missing, not a video, or a window outside of it; `BrokenVideo` on iteration.
    """

    def __init__(
        self, source: str | Path, start_s: float = 0.0, duration_s: float | None = None
    ) -> None:
        self.source = without_password(str(source))
        if not 0 <= start_s < math.inf:
            raise InputError(f"{self.source}: the start is {start_s:g} s; allowed: 0 or more")
        if duration_s is not None and not 0 < duration_s < math.inf:
            raise InputError(f"{self.source}: the duration is {duration_s:g} s; allowed: above 0")
        self._location, self._start_s = source, start_s
        self._end_s = math.inf if duration_s is None else start_s + duration_s
        self.frames_read = 0
        self._last_s: float | None = None
        self._decoder: _Decoder | None = None
        try:
            self._open_at_start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, camera or stream."""
        if self._decoder is not None:
            self._decoder.container.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        yielded_s = None
        try:
            for frame in self._frames:
                time_s = self._increasing_time_s(frame)
                if time_s + _TIME_TOLERANCE_S < self._start_s:
                    continue
                if time_s + _TIME_TOLERANCE_S >= self._end_s:
                    break
                yielded_s = time_s
                self.frames_read += 1
                yield VideoFrame(self._to_upright_rgb(frame), time_s)
        except _DecodingError as error:
            raise BrokenVideo(self.source, self.frames_read, yielded_s, str(error)) from None
        if not self.frames_read:
            raise InputError(
                f"{self.source}: no frame between {self._start_s:g} and {self._end_s:g} s; the "
                f"last frame that was read is at {self._last_s or 0.0:.3f} s"
            )

    def _open_at_start(self) -> None:
        """Open the source and decode one frame, at or before the start if the container seeks."""
        av = import_pyav()
        # some containers seek to the keyframe after the requested time: try again earlier
        for margin_s in (0.0, 10.0, math.inf):
            seek_s = max(0.0, self._start_s - margin_s)
            self.close()
            self._decoder = decoder = _Decoder(av, self._location, self.source)
            if self._start_s >= decoder.duration_s:
                raise InputError(
                    f"{self.source}: the start, {self._start_s:g} s, lies beyond its end; it is "
                    f"{decoder.duration_s:.3f} s long"
                )
            from_beginning = seek_s == 0 or decoder.live
            if not from_beginning:
                decoder.seek(seek_s)
            self._frames = decoder.frames()
            try:
                first = next(self._frames, None)
            except _DecodingError as error:
                if from_beginning:
                    raise BrokenVideo(self.source, 0, None, str(error)) from None
                continue
            time_s = None if first is None else decoder.time_s(first)
            before_start = time_s is not None and time_s <= self._start_s + _TIME_TOLERANCE_S
            if from_beginning or before_start:
                break
        if first is None:
            raise InputError(f"{self.source}: no frame in it can be decoded")
        if decoder.live:
            decoder.origin_s += time_s or 0.0
        self._frames = itertools.chain([first], self._frames)
        self._set_properties(decoder, first)

    def _set_properties(self, decoder: "_Decoder", first: Any) -> None:
        pixel_aspect = decoder.stream.sample_aspect_ratio or 1
        self._coded_hw = first.height, max(1, round(first.width * pixel_aspect))
        self._quarter_turns = round(first.rotation / 90) % 4  # counterclockwise
        self.size_hw = self._coded_hw if self._quarter_turns % 2 == 0 else self._coded_hw[::-1]
        self.frames_per_second = decoder.frames_per_second
        self.frame_count: int | None = None
        window_s = min(self._end_s, decoder.duration_s) - self._start_s
        if decoder.stream.frames and window_s == decoder.duration_s:
            self.frame_count = int(decoder.stream.frames)
        elif window_s < math.inf:
            self.frame_count = max(1, round(window_s * self.frames_per_second))

    def _increasing_time_s(self, frame: Any) -> float:
        """Return the timestamp of a frame, estimated if missing, after that of the last one."""
        assert self._decoder is not None
        time_s, last_s = self._decoder.time_s(frame), self._last_s
        if time_s is None:
            time_s = 0.0 if last_s is None else last_s + float(1 / self.frames_per_second)
        elif last_s is not None:
            time_s = max(time_s, last_s + 2 * _TIME_TOLERANCE_S)
        self._last_s = time_s
        return time_s

    def _to_upright_rgb(self, frame: Any) -> Image:
        height, width = self._coded_hw
        image = frame.to_ndarray(format="rgb24", width=width, height=height)
        return np.ascontiguousarray(np.rot90(image, self._quarter_turns))


class _Decoder:
    """Decode the frames of a container in presentation order, up to its end or the first error."""

    def __init__(self, av: Any, location: str | Path, display_name: str) -> None:
        address = "" if isinstance(location, Path) else location
        self._av = av
        self.container = _open_container(av, address, location, display_name)
        self.stream: Any = next(
            (
                stream
                for stream in self.container.streams.video
                if not int(stream.disposition) & _ATTACHED_PICTURE
            ),
            None,
        )
        if self.stream is None or self.stream.codec_context is None:
            kinds = " and ".join(sorted({stream.type for stream in self.container.streams}))
            self.container.close()
            content = f"only {kinds or 'nothing'}" if self.stream is None else "an unknown codec"
            raise InputError(f"{display_name}: no video in it that can be decoded: {content}")
        rate = self.stream.average_rate or self.stream.guessed_rate or _DEFAULT_RATE
        self.frames_per_second = Fraction(rate) if 0 < rate < 1000 else _DEFAULT_RATE
        duration = self.container.duration or 0
        self.duration_s = duration / 1e6 if duration > 0 else math.inf
        self.live = is_camera(address) or (is_stream(address) and self.duration_s == math.inf)
        self.origin_s = float((self.stream.start_time or 0) * self.stream.time_base)
        self._formats = set(self.container.format.name.split(","))
        self._packets_end_s = self._longest_gap_s = 0.0
        self._bytes_missing = False
        self._last_s: float | None = None

    def time_s(self, frame: Any) -> float | None:
        if frame.pts is None:
            return None
        return float(frame.pts * self.stream.time_base) - self.origin_s

    def seek(self, time_s: float) -> None:
        with contextlib.suppress(self._av.FFmpegError):
            offset = round((time_s + self.origin_s) / self.stream.time_base)
            self.container.seek(offset, stream=self.stream)

    def frames(self) -> Iterator[Any]:
        """Decode in presentation order; raise `_DecodingError` after the last intact frame."""
        started = False
        for packet in self._packets():
            # live streams and recordings of them start with frames whose references are missing
            lenient = self.live or ("mpegts" in self._formats and not started)
            try:
                if packet.is_corrupt and not lenient:
                    raise _DecodingError(_DATA_DAMAGED)
                frames = packet.decode()
            except (self._av.FFmpegError, _DecodingError) as error:
                if lenient:
                    continue
                yield from self._buffered_frames(packet.pts)
                raise _DecodingError(error_reason(error)) from None
            for frame in frames:
                if not frame.is_corrupt:
                    started = True
                    self._check_gap(frame)
                    yield frame
                elif not lenient:
                    raise _DecodingError(_DATA_DAMAGED)
        self._check_end()

    def _packets(self) -> Iterator[Any]:
        """Yield the video packets; audio packets also count for the end of the file."""
        end = None
        try:
            for packet in self.container.demux():
                if packet.pts is not None:
                    until = (packet.pts + (packet.duration or 0)) * packet.time_base
                    self._packets_end_s = max(self._packets_end_s, float(until))
                if "matroska" in self._formats and packet.pos is not None and packet.size:
                    self._bytes_missing |= end is not None and packet.pos - end > _MAX_HEADER
                    end = packet.pos + packet.size
                if packet.stream.index == self.stream.index:
                    yield packet
        except self._av.FFmpegError as error:
            raise _DecodingError(error_reason(error)) from None

    def _buffered_frames(self, pts: int | None) -> Iterator[Any]:
        """Flush the decoder and yield its intact frames before `pts`."""
        with contextlib.suppress(self._av.FFmpegError):
            for frame in self.stream.decode(None):
                if frame.is_corrupt or frame.pts is None or pts is None or frame.pts >= pts:
                    return
                yield frame

    def _check_gap(self, frame: Any) -> None:
        """Fail on a time gap where bytes are missing; record the longest gap."""
        time_s = self.time_s(frame)
        if time_s is not None and self._last_s is not None:
            gap_s = time_s - self._last_s
            if self._bytes_missing and gap_s * self.frames_per_second > 1.5:
                raise _DecodingError(f"{gap_s:.3f} s are missing there")
            self._longest_gap_s = max(self._longest_gap_s, gap_s)
        self._last_s = time_s

    def _check_end(self) -> None:
        """Fail if the data end before the duration in the container."""
        expected_s = self.duration_s
        if "avi" in self._formats:  # FFmpeg computes its duration from the truncated file
            expected_s = max(expected_s, float(self.stream.frames / self.frames_per_second))
        tolerance_s = 0.05 + self._longest_gap_s
        known = expected_s < math.inf and self._formats & _EXACT_DURATION
        if known and self._packets_end_s + tolerance_s < expected_s:
            raise _DecodingError(f"its duration should be {expected_s:.3f} s")


def import_pyav() -> Any:
    """Import PyAV when a video is opened; it is installed with the extra `video`."""
    try:
        import av
    except ImportError:
        raise InputError("video needs PyAV: pip install 'yolo-lightning[video]'") from None
    return av


def _open_container(av: Any, address: str, location: str | Path, display_name: str) -> Any:
    """Open a camera or stream, or a file if the location is a path and `address` is empty."""
    options: dict[str, Any]
    if is_camera(address):
        location, options = f"/dev/video{int(address)}", {"format": "v4l2"}
    elif is_stream(address):
        scheme = address.split(":", 1)[0].lower()
        if scheme not in STREAM_SCHEMES:
            raise InputError(
                f"{display_name}: not a supported stream; allowed: {', '.join(STREAM_SCHEMES)}"
            )
        # TCP neither loses packets nor needs an open port on this machine
        protocol = {"rtsp_transport": "tcp"} if scheme.startswith("rtsp") else {}
        options = {"timeout": (TIMEOUT_S, TIMEOUT_S), "options": protocol}
    else:
        # colons in a file name are no scheme, and a playlist must not open anything but files
        location, options = f"file:{location}", {"options": {"protocol_whitelist": "file"}}
    try:
        return av.open(location, metadata_errors="replace", **options)
    except (av.FFmpegError, ValueError) as error:
        if is_camera(address):
            cameras = " ".join(sorted(path.name[5:] for path in Path("/dev").glob("video[0-9]*")))
            raise InputError(
                f"camera {address}: {location} cannot be opened ({error_reason(error)}); available "
                f"cameras: {cameras or 'none'}; cameras are read on Linux, with v4l2"
            ) from None
        if isinstance(error, av.InvalidDataError):
            raise InputError(
                f"{display_name}: not a video, or its header or index is damaged"
            ) from None
        kind = "stream" if is_stream(address) else "file"
        raise InputError(
            f"{display_name}: the {kind} cannot be opened ({error_reason(error)})"
        ) from None


def error_reason(error: Exception) -> str:
    """Return the message of an error of FFmpeg or the disk."""
    name = type(error).__name__
    if name == "ExitError":  # FFmpeg's name for an interrupt by PyAV's timeout
        return f"timed out after {TIMEOUT_S:g} s"
    if name == "InvalidDataError":
        return _DATA_DAMAGED
    return getattr(error, "strerror", None) or str(error)
