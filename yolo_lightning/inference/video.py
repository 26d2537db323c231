"""Video files, cameras and streams, frame by frame, and writing video: through PyAV.

Sound is left out, in reading and in writing. PyAV comes with the extra `video` and is imported when
a video is opened.
"""

import contextlib
import itertools
import math
import os
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

TIMEOUT_S = 10.0
"""How long a stream may take to answer, or to send its next packet."""

_SLACK_S = 0.0005  # times are compared to the millisecond: Matroska keeps no finer ones
_USUAL_RATE = Fraction(25)
_DAMAGED = "its data are damaged there"
_STATE_THEIR_LENGTH = {"matroska", "mp4", "avi", "flv", "asf"}  # the others' lengths are estimates
_MAX_HEADER = 1024  # bytes between two packets of Matroska; others store them far apart
_ATTACHED_PICTURE = 0x400  # the cover of a song counts as a video stream

# encoder, clock, its options, the container's options: fast ones, since a network runs beside them
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
        # frames that are stored out of order can make the file state too short a length
        {"preset": "veryfast", "crf": "23", "bf": "0"},
        {"movflags": "faststart"},
    ),
}


class VideoFrame(NamedTuple):
    """One frame of a video.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        time_s: when it is shown, seconds from the beginning of the file, or from the first frame of
            a camera or stream; strictly increasing.
    """

    image: Image
    time_s: float


class BrokenVideo(InputError):
    """A video that cannot be read to its end; the frames before were yielded.

    Attributes:
        place: the file, camera or stream.
        frames_read: how many frames were yielded.
        time_s: of the last of them, None if there was none.
    """

    def __init__(self, place: str, frames_read: int, time_s: float | None, why: str) -> None:
        self.place, self.frames_read, self.time_s = place, frames_read, time_s
        where = "before the first frame" if time_s is None else f"after {time_s:.3f} s"
        super().__init__(f"{place}: breaks off {where}; frames read: {frames_read} ({why})")


class _Damaged(Exception):
    """Why decoding stops here."""


def is_video(path: str | Path) -> bool:
    """Tell by its ending whether a file is a video that can be read."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def is_stream(place: str) -> bool:
    """Tell whether this is an address with a scheme, such as ``rtsp://host/path``."""
    return re.match(r"[a-z][a-z0-9+.-]*://", place, re.IGNORECASE) is not None


def without_password(place: str) -> str:
    """Return an address without user name and password."""
    return re.sub(r"(?<=://)[^/]*@", "", place)


def is_camera(place: str) -> bool:
    """Tell whether this is the number of a camera: ``0`` is ``/dev/video0``."""
    return re.fullmatch(r"[0-9]{1,4}", place) is not None


class VideoReader:
    """Yield the frames of a video file, a camera or a stream in order, upright, in RGB.

    Use it as a context manager, and iterate once. Frames are turned as the file says, pixels made
    square, and frames that change their size midway scaled to that of the first.

    What breaks a file: a packet or frame that is damaged, blocks that are missing, or data that
    end before the length that the container states. Cameras and live streams go on after damage,
    and end with the connection, or break after `TIMEOUT_S` without data. Some loss leaves no trace:
    a few wrong bytes may decode to a wrong picture, and a transport stream (.ts), which states no
    length, may lack whole frames.

    Args:
        place: a path; as text also an address or the number of a camera.
        start_s: seconds to skip; for cameras and live streams, counted from the first frame.
        duration_s: length of what is read, s; None reads to the end. Two windows that follow each
            other share no frame and lose none.

    Attributes:
        place: the place, without user name and password.
        size_hw: height and width of the images, px.
        frames_per_second: as the container says or implies, 25 where it does not.
        frame_count: how many frames to expect, roughly; None where the length is unknown.
        frames_read: how many were yielded.

    Raises:
        InputError: no such file, camera or stream; not a video; no picture in it; a window outside
            of it. `BrokenVideo`, while it is read, where a file breaks off.
    """

    def __init__(
        self, place: str | Path, start_s: float = 0.0, duration_s: float | None = None
    ) -> None:
        self.place = without_password(str(place))
        if not 0 <= start_s < math.inf:
            raise InputError(f"{self.place}: the start is {start_s:g} s; allowed: 0 or more")
        if duration_s is not None and not 0 < duration_s < math.inf:
            raise InputError(f"{self.place}: the duration is {duration_s:g} s; allowed: above 0")
        self._from, self._start_s = place, start_s
        self._end_s = math.inf if duration_s is None else start_s + duration_s
        self.frames_read = 0
        self._last_s: float | None = None
        self._decoder: _Decoder | None = None
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, or leave the camera or stream."""
        if self._decoder is not None:
            self._decoder.container.close()

    def __iter__(self) -> Iterator[VideoFrame]:
        """Yield the frames from the start on, and before the end.

        Raises:
            BrokenVideo: the file is damaged or cut off, or the stream does not go on.
            InputError: the start lies behind the last frame.
        """
        shown_s = None
        try:
            for frame in self._frames:
                time_s = self._increasing(frame)
                if time_s + _SLACK_S < self._start_s:
                    continue
                if time_s + _SLACK_S >= self._end_s:
                    break
                shown_s = time_s
                self.frames_read += 1
                yield VideoFrame(self._upright(frame), time_s)
        except _Damaged as damage:
            raise BrokenVideo(self.place, self.frames_read, shown_s, str(damage)) from None
        if not self.frames_read:
            raise InputError(
                f"{self.place}: no frame between {self._start_s:g} and {self._end_s:g} s; the last "
                f"one that was seen is at {self._last_s or 0.0:.3f} s"
            )

    def _begin(self) -> None:
        """Decode the first frame, the one at or before the start where the container can seek."""
        av = _pyav()
        for earlier_s in (0.0, 10.0, math.inf):  # some containers land behind, at the next keyframe
            seek_s = max(0.0, self._start_s - earlier_s)
            self.close()
            self._decoder = decoder = _Decoder(av, self._from, self.place)
            if self._start_s >= decoder.length_s:
                raise InputError(
                    f"{self.place}: the start, {self._start_s:g} s, lies beyond its end; it is "
                    f"{decoder.length_s:.3f} s long"
                )
            surely = seek_s == 0 or decoder.live
            if not surely:
                decoder.seek(seek_s)
            self._frames = decoder.frames()
            try:
                first = next(self._frames, None)
            except _Damaged as damage:
                if surely:
                    raise BrokenVideo(self.place, 0, None, str(damage)) from None
                continue
            time_s = None if first is None else decoder.time_s(first)
            if surely or (time_s is not None and time_s <= self._start_s + _SLACK_S):
                break
        if first is None:
            raise InputError(f"{self.place}: no frame in it can be decoded")
        if decoder.live:
            decoder.origin_s += time_s or 0.0
        self._frames = itertools.chain([first], self._frames)
        self._measure(decoder, first)

    def _measure(self, decoder: "_Decoder", first: Any) -> None:
        """Note the size of the images, their rate, and how many to expect."""
        shape = decoder.stream.sample_aspect_ratio or 1
        self._coded_hw = first.height, max(1, round(first.width * shape))
        self._turns = round(first.rotation / 90) % 4  # counterclockwise
        self.size_hw = self._coded_hw if self._turns % 2 == 0 else self._coded_hw[::-1]
        self.frames_per_second = decoder.frames_per_second
        self.frame_count: int | None = None
        seconds = min(self._end_s, decoder.length_s) - self._start_s
        if decoder.stream.frames and seconds == decoder.length_s:
            self.frame_count = int(decoder.stream.frames)
        elif seconds < math.inf:
            self.frame_count = max(1, round(seconds * self.frames_per_second))

    def _increasing(self, frame: Any) -> float:
        """Return when a frame is shown; what lacks a time of its own follows the one before."""
        assert self._decoder is not None
        time_s, last_s = self._decoder.time_s(frame), self._last_s
        if time_s is None:
            time_s = 0.0 if last_s is None else last_s + float(1 / self.frames_per_second)
        elif last_s is not None:
            time_s = max(time_s, last_s + 2 * _SLACK_S)
        self._last_s = time_s
        return time_s

    def _upright(self, frame: Any) -> Image:
        height, width = self._coded_hw
        image = frame.to_ndarray(format="rgb24", width=width, height=height)
        return np.ascontiguousarray(np.rot90(image, self._turns))


class _Decoder:
    """The frames of a container in order of time, up to its end or the first damage."""

    def __init__(self, av: Any, place: str | Path, shown: str) -> None:
        name = "" if isinstance(place, Path) else place
        self._av, self.container = av, _opened(av, name, place, shown)
        videos = (one for one in self.container.streams.video)
        self.stream: Any = next(
            (one for one in videos if not int(one.disposition) & _ATTACHED_PICTURE), None
        )
        if self.stream is None or self.stream.codec_context is None:
            kinds = " and ".join(sorted({one.type for one in self.container.streams}))
            self.container.close()
            what = f"only {kinds or 'nothing'}" if self.stream is None else "an unknown codec"
            raise InputError(f"{shown}: no video in it that can be decoded: {what}")
        rate = self.stream.average_rate or self.stream.guessed_rate or _USUAL_RATE
        self.frames_per_second = Fraction(rate) if 0 < rate < 1000 else _USUAL_RATE
        duration = self.container.duration or 0
        self.length_s = duration / 1e6 if duration > 0 else math.inf
        self.live = is_camera(name) or (is_stream(name) and self.length_s == math.inf)
        self.origin_s = float((self.stream.start_time or 0) * self.stream.time_base)
        self._formats = set(self.container.format.name.split(","))
        self._packets_end_s = self._longest_s = 0.0
        self._skipped_bytes = False
        self._last_s: float | None = None

    def time_s(self, frame: Any) -> float | None:
        """Return when a frame is shown, as far as the container says."""
        if frame.pts is None:
            return None
        return float(frame.pts * self.stream.time_base) - self.origin_s

    def seek(self, time_s: float) -> None:
        """Go to a keyframe about there; stay where the container cannot."""
        with contextlib.suppress(self._av.FFmpegError):
            offset = round((time_s + self.origin_s) / self.stream.time_base)
            self.container.seek(offset, stream=self.stream)

    def frames(self) -> Iterator[Any]:
        """Decode in order of time.

        Raises:
            _Damaged: after the last good frame.
        """
        begun = False
        for packet in self._packets():
            # live streams and recordings of them begin anywhere, with what refers to earlier frames
            lenient = self.live or ("mpegts" in self._formats and not begun)
            try:
                if packet.is_corrupt and not lenient:
                    raise _Damaged(_DAMAGED)
                frames = packet.decode()
            except (self._av.FFmpegError, _Damaged) as error:
                if lenient:
                    continue
                yield from self._waiting(packet.pts)
                raise _Damaged(_why(error)) from None
            for frame in frames:
                if not frame.is_corrupt:
                    begun = True
                    self._note_gap(frame)
                    yield frame
                elif not lenient:
                    raise _Damaged(_DAMAGED)
        self._check_end()

    def _packets(self) -> Iterator[Any]:
        """Yield the packets of the video; those of sound tell where the file ends, too."""
        end = None
        try:
            for packet in self.container.demux():
                if packet.pts is not None:
                    until = (packet.pts + (packet.duration or 0)) * packet.time_base
                    self._packets_end_s = max(self._packets_end_s, float(until))
                if "matroska" in self._formats and packet.pos is not None and packet.size:
                    self._skipped_bytes |= end is not None and packet.pos - end > _MAX_HEADER
                    end = packet.pos + packet.size
                if packet.stream.index == self.stream.index:
                    yield packet
        except self._av.FFmpegError as error:
            raise _Damaged(_why(error)) from None

    def _waiting(self, pts: int | None) -> Iterator[Any]:
        """Yield the good frames before `pts` that the decoder still holds back."""
        with contextlib.suppress(self._av.FFmpegError):
            for frame in self.stream.decode(None):
                if frame.is_corrupt or frame.pts is None or pts is None or frame.pts >= pts:
                    return
                yield frame

    def _note_gap(self, frame: Any) -> None:
        """Refuse a gap in time where bytes were skipped; remember the longest one."""
        time_s = self.time_s(frame)
        if time_s is not None and self._last_s is not None:
            gap_s = time_s - self._last_s
            if self._skipped_bytes and gap_s * self.frames_per_second > 1.5:
                raise _Damaged(f"{gap_s:.3f} s are missing there")
            self._longest_s = max(self._longest_s, gap_s)
        self._last_s = time_s

    def _check_end(self) -> None:
        """Refuse data that end before the length that the container states."""
        stated_s = self.length_s
        if "avi" in self._formats:  # its length is computed from what is left of the file
            stated_s = max(stated_s, float(self.stream.frames / self.frames_per_second))
        tolerance_s = 0.05 + self._longest_s
        known = stated_s < math.inf and self._formats & _STATE_THEIR_LENGTH
        if known and self._packets_end_s + tolerance_s < stated_s:
            raise _Damaged(f"it states a length of {stated_s:.3f} s")


class VideoWriter:
    """Write a video that browsers play: VP9 in .webm, H.264 in .mp4; 8 bits, 4:2:0, BT.709.

    Use it as a context manager. The file appears under its name when it is closed, also after an
    error elsewhere or an interrupt, and then holds what was written; without a frame, there is
    none. Both codecs halve the colours' resolution: an odd side grows by one pixel, a copy of the
    last. The video begins with the first frame; sound is not carried over.

    Args:
        path: ends in .webm or .mp4; its folder exists.
        size_hw: height and width of the images, px.
        frames_per_second: the usual rate; what counts is the time of each frame.

    Raises:
        InputError: another ending, no such folder, no encoder, or a disk that refuses.
    """

    def __init__(
        self, path: str | Path, size_hw: tuple[int, int], frames_per_second: float | Fraction
    ) -> None:
        self.path, self.size_hw = Path(path), size_hw
        suffix = self.path.suffix.lower()
        if suffix not in _ENCODERS:
            raise InputError(f"{self.path}: cannot be written; allowed: {' '.join(_ENCODERS)}")
        if self.path.is_dir() or not self.path.parent.is_dir():
            raise InputError(f"{self.path}: not a file in a folder that exists")
        self._av = _pyav()
        encoder, self._tick, options, container_options = _ENCODERS[suffix]
        try:
            self._av.Codec(encoder, "w")
        except ValueError:
            others = " ".join(set(_ENCODERS) - {suffix})
            raise InputError(
                f"{self.path}: this FFmpeg has no encoder {encoder}; try {others}"
            ) from None
        self._fresh = self.path.with_name(self.path.name + ".fresh")
        self._first_s: float | None = None
        self._last_tick = -1
        self._last_s = -math.inf
        with self._complaints():
            self._container: Any = self._av.open(
                f"file:{self._fresh}", "w", format=suffix[1:], container_options=container_options
            )
        rate = Fraction(frames_per_second).limit_denominator(1001)
        self._stream = self._container.add_stream(encoder, rate=rate, options=options)
        self._stream.height, self._stream.width = (side + side % 2 for side in size_hw)
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.time_base = self._tick
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # 16 … 235

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, image: Image, time_s: float) -> None:
        """Append a frame.

        Args:
            image: uint8 (H, W, 3), RGB, of the size given at the beginning.
            time_s: when it is shown; later than the frame before. Differences count alone.

        Raises:
            ValueError: another size, or a time that does not increase.
            InputError: the disk refuses.
        """
        if image.shape != (*self.size_hw, 3) or image.dtype != np.uint8:
            raise ValueError(f"{image.dtype} {image.shape} where {(*self.size_hw, 3)} was expected")
        if time_s <= self._last_s:
            raise ValueError(f"a frame at {time_s} s cannot follow one at {self._last_s} s")
        self._first_s = time_s if self._first_s is None else self._first_s
        self._last_s = time_s
        tick = round((time_s - self._first_s) / self._tick)
        self._last_tick = max(tick, self._last_tick + 1)
        padding = [(0, side % 2) for side in self.size_hw]
        if any(side for _, side in padding):
            image = np.pad(image, [*padding, (0, 0)], mode="edge")
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = self._last_tick, self._tick
        with self._complaints():
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file and put it under its name; without a frame, leave nothing.

        Raises:
            InputError: the disk refuses.
        """
        if self._container is None:
            return
        if self._first_s is None:
            self._abandon()
            return
        with self._complaints():
            self._container.mux(self._stream.encode(None))
            self._container.close()
            os.replace(self._fresh, self.path)
        self._container = None

    @contextlib.contextmanager
    def _complaints(self) -> Iterator[None]:
        """Turn what FFmpeg and the disk refuse into a message, and remove what is half done."""
        try:
            yield
        except (self._av.FFmpegError, OSError) as error:
            self._abandon()
            raise InputError(f"{self.path}: cannot be written ({_why(error)})") from None

    def _abandon(self) -> None:
        if (container := getattr(self, "_container", None)) is not None:
            with contextlib.suppress(self._av.FFmpegError, OSError):
                container.close()
        self._container = None
        self._fresh.unlink(missing_ok=True)


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise InputError("video needs PyAV: pip install 'yolo-lightning[video]'") from None
    return av


def _opened(av: Any, name: str, place: str | Path, shown: str) -> Any:
    """Return the open container of a file, camera or stream; only a file has no `name`."""
    keywords: dict[str, Any]
    if is_camera(name):
        place, keywords = f"/dev/video{int(name)}", {"format": "v4l2"}
    elif is_stream(name):
        scheme = name.split(":", 1)[0].lower()
        if scheme not in STREAM_SCHEMES:
            raise InputError(f"{shown}: streams begin with {', '.join(STREAM_SCHEMES)}")
        # over TCP, which neither loses packets nor needs an open port here
        options = {"rtsp_transport": "tcp"} if scheme.startswith("rtsp") else {}
        keywords = {"timeout": (TIMEOUT_S, TIMEOUT_S), "options": options}
    else:
        # a file is a file, whatever colons its name has, and a playlist in it opens nothing else
        place, keywords = f"file:{place}", {"options": {"protocol_whitelist": "file"}}
    try:
        return av.open(place, metadata_errors="replace", **keywords)
    except (av.FFmpegError, ValueError) as error:
        if is_camera(name):
            there = " ".join(sorted(path.name[5:] for path in Path("/dev").glob("video[0-9]*")))
            raise InputError(
                f"camera {name}: {place} cannot be opened ({_why(error)}); there is: "
                f"{there or 'none'}; cameras are read on Linux, through v4l2"
            ) from None
        what = "the stream" if is_stream(name) else "the file"
        if isinstance(error, av.InvalidDataError):
            raise InputError(f"{shown}: not a video, or its beginning or index is broken") from None
        raise InputError(f"{shown}: {what} cannot be opened ({_why(error)})") from None


def _why(error: Exception) -> str:
    name = type(error).__name__
    if name == "ExitError":  # how FFmpeg calls an interrupt by PyAV's timeout
        return f"no answer within {TIMEOUT_S:g} s"
    if name == "InvalidDataError":
        return _DAMAGED
    return getattr(error, "strerror", None) or str(error)
