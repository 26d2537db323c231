"""Image and video sources for `detect`: files, folders, globs, lists, cameras and streams."""

import contextlib
import glob
import os
import re
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from yolo_lightning.errors import InputError, expand, read_text
from yolo_lightning.images import (
    Image,
    NetworkInput,
    UnreadableSample,
    decoding_side,
    fit,
    is_image,
    read_image,
)
from yolo_lightning.inference.video import (
    VIDEO_SUFFIXES,
    VideoFrame,
    VideoReader,
    is_camera,
    is_stream,
    is_video,
    without_secrets,
)
from yolo_lightning.models.preparation import Interpolation, Resize

T = TypeVar("T")
Kind = Literal["image", "video", "live"]

_MAX_PATH, _MAX_NAME = 2048, 255  # bytes, as file systems allow
_RESULTS = re.compile(r"/outputs/detect-[^/]*/")  # of earlier calls, in a searched folder


@dataclass(frozen=True)
class FrameSource:
    """An image file, a video file, a camera or a stream."""

    location: str  # path, URL, or camera number
    display_name: str  # location without secrets
    output_name: str  # unique relative path without a suffix, for output files
    kind: Kind  # live: a camera or URL, whose frames are processed one at a time


@dataclass
class Frame:
    """One image or one frame of a video."""

    source: FrameSource
    image: Image  # may be smaller than the original if it will not be drawn on
    network_input: NetworkInput
    size_hw_orig: tuple[int, int]  # px
    index: int = 0  # position in the video
    time_s: float = 0.0  # timestamp in the video
    frames_per_second: float = 0.0


def find_sources(locations: Sequence[str]) -> list[FrameSource]:
    """Find the images and videos of paths, globs, lists (.txt), URLs and camera numbers.

    Folders are searched recursively; duplicates are removed.

    Raises:
        InputError: a location does not exist, has an unsupported type, or holds no images.
    """
    sources: dict[str, FrameSource] = {}
    used_names: set[str] = set()

    def add(location: str, stem: str, kind: Kind) -> None:
        key = location if kind == "live" else str(Path(location).resolve())
        if key in sources:
            return
        name, number = stem, 2
        while name in used_names:
            name, number = f"{stem}-{number}", number + 1
        used_names.add(name)
        sources[key] = FrameSource(location, without_secrets(location), name, kind)

    for location in locations:
        path = expand(location)
        if not path.exists() and is_stream(location):
            add(location, "stream", "live")
        elif not path.exists() and is_camera(location):
            add(location, f"camera{location}", "live")
        else:
            for file in _find_files(path):
                relative = file.relative_to(path) if path.is_dir() else Path(file.name)
                add(str(file), str(relative.with_suffix("")), media_kind(file))
    return list(sources.values())


def media_kind(file: Path) -> Literal["image", "video"]:
    """Return whether a file is an image or a video, by its suffix; else raise `InputError`."""
    if is_image(file):
        return "image"
    if is_video(file):
        return "video"
    raise InputError(
        f"{str(file)!r}: neither an image nor a video with a supported suffix; allowed: image "
        f"files, videos ({' '.join(VIDEO_SUFFIXES)}), and lists of paths (.txt)"
    )


def _find_files(path: Path) -> list[Path]:
    """Return the files of a folder, a list of paths, a file or a glob."""
    if path.is_file():
        return _read_list(path) if path.suffix.lower() == ".txt" else [path]
    found: Iterable[Path]
    if path.is_dir():
        found = (file for file in path.rglob("*") if not _RESULTS.search(str(file.resolve())))
        problem = "holds no images and no videos"
    else:
        found = map(Path, glob.glob(str(path), recursive=True))
        problem = f"no such file or folder (working folder: {Path.cwd()})"
    media = (file for file in found if is_image(file) or is_video(file))
    files = sorted(file for file in media if not file.is_dir())
    if not files:
        raise InputError(f"{str(path)!r}: {problem}")
    return files


def _read_list(file: Path) -> list[Path]:
    """Read a list of paths, relative to the working folder or else to the folder of the list."""
    lines = [line.strip() for line in read_text(file, "list of paths").splitlines()]
    paths = [expand(line) for line in lines if line and not line.startswith("#")]
    if not paths:
        raise InputError(f"{file}: lists no paths")
    for path in paths:
        if len(os.fsencode(path)) > _MAX_PATH or len(os.fsencode(path.name)) > _MAX_NAME:
            raise InputError(f"{file}: the path {str(path)[:80]!r} … is too long")
    return [path if path.exists() else file.parent / path for path in paths]


@dataclass
class FrameReader:
    """Read frames and collect errors of unreadable sources."""

    size_hw: tuple[int, int]  # of the network input, px
    resize: Resize
    start_s: float  # to skip at the start of videos
    duration_s: float | None  # to read from videos; None reads to the end
    full_resolution: bool  # whether `Frame.image` must have the original size
    errors: list[str]  # one message per source that could not be read completely
    interpolation: Interpolation = "area"
    reading_s: float = 0.0  # time spent reading and resizing
    frame_count: int | None = None  # total number of frames, if known

    def frames(self, sources: Sequence[FrameSource]) -> Generator[Frame, None, None]:
        """Yield the frames of all sources, one source after the other."""
        if all(source.kind == "image" for source in sources):
            self.frame_count = len(sources)
        self._single_source = len(sources) == 1
        for source in sources:
            is_image_file = source.kind == "image"
            frames = self._read_image(source) if is_image_file else self._read_video(source)
            while True:
                started = time.perf_counter()
                try:
                    frame = next(frames, None)
                except (UnreadableSample, InputError) as error:
                    self.errors.append(str(error))  # contains the source, without its password
                    break
                self.reading_s += time.perf_counter() - started
                if frame is None:
                    break
                yield frame

    def _read_image(self, source: FrameSource) -> Iterator[Frame]:
        path = Path(source.location)
        min_side = decoding_side(max(self.size_hw), self.interpolation)
        image, size_hw_orig = read_image(path, min_side)
        network_input, *_ = fit(image, self.size_hw, self.resize, size_hw_orig, self.interpolation)
        if self.full_resolution and image.shape[:2] != size_hw_orig:  # was decoded at reduced size
            image, _ = read_image(path)
        yield Frame(source, image, network_input, size_hw_orig)

    def _read_video(self, source: FrameSource) -> Iterator[Frame]:
        with contextlib.ExitStack() as stack:
            video = stack.enter_context(VideoReader(source.location, self.start_s, self.duration_s))
            rate = float(video.frames_per_second)
            if self._single_source:
                self.frame_count = video.frame_count
            # a live source continues while the network is busy: process its most recent frame
            live = source.kind == "live" and video.frame_count is None
            frames: Iterable[VideoFrame] = video
            if live:  # the reading thread ends before the stream is closed
                ahead = prefetch(video, 1, drop_oldest=True)
                frames = stack.enter_context(contextlib.closing(ahead))
            for index, (image, time_s) in enumerate(frames):
                size_hw = (image.shape[0], image.shape[1])
                network_input, *_ = fit(
                    image, self.size_hw, self.resize, size_hw, self.interpolation
                )
                yield Frame(source, image, network_input, size_hw, index, time_s, rate)


def batched(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Yield batches of frames; a frame of a live source completes its batch at once."""
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size or frame.source.kind == "live":
            yield batch
            batch = []
    if batch:
        yield batch


def prefetch(items: Iterable[T], depth: int, drop_oldest: bool = False) -> Generator[T, None, None]:
    """Yield items that a background thread reads in advance, at most `depth` of them.

    While `depth` items wait, the thread waits too, or replaces the oldest with `drop_oldest`.
    An error of `items` is raised after the items before it.
    """
    buffer: deque[T] = deque(maxlen=depth)
    changed = threading.Condition()
    ended = stopped = False
    errors: list[BaseException] = []

    def read() -> None:
        nonlocal ended
        try:
            for item in items:
                with changed:
                    changed.wait_for(lambda: stopped or drop_oldest or len(buffer) < depth)
                    if stopped:
                        break
                    buffer.append(item)
                    changed.notify()
        except BaseException as error:
            errors.append(error)
        with changed:
            ended = True
            changed.notify()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: buffer or ended)
                if not buffer:
                    break
                item = buffer.popleft()
                changed.notify()
            yield item
        if errors:
            raise errors[0]
    finally:
        with changed:
            stopped = True
            changed.notify()
        thread.join(timeout=10)
