"""Image and video sources for `detect`: files, folders, globs, lists, cameras and streams."""

import glob
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from yolo_lightning.errors import InputError
from yolo_lightning.images import Image, Resize, UnreadableSample, fit, is_image, read_image
from yolo_lightning.inference.video import (
    VIDEO_SUFFIXES,
    VideoReader,
    is_camera,
    is_stream,
    is_video,
    without_password,
)

T = TypeVar("T")
Kind = Literal["image", "video", "live"]

_END = object()


@dataclass(frozen=True)
class FrameSource:
    """An image file, a video file, a camera or a stream."""

    location: str  # path, URL, or camera number
    display_name: str  # location without a password
    output_name: str  # unique relative path without a suffix, for output files
    kind: Kind  # live: a camera or URL, whose frames are processed one at a time


@dataclass
class Frame:
    """One image or one frame of a video."""

    source: FrameSource
    image: Image  # may be smaller than the original if it will not be drawn on
    network_input: Image
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
    found: list[tuple[str, Path, Kind]] = []
    for location in locations:
        path = Path(location).expanduser()
        if path.is_dir():
            found += [
                (str(file), file.relative_to(path), media_kind(file)) for file in _media_files(path)
            ]
        elif path.is_file() and path.suffix.lower() == ".txt":
            found += [(str(file), Path(file.name), media_kind(file)) for file in _read_list(path)]
        elif path.is_file():
            found.append((str(path), Path(path.name), media_kind(path)))
        elif is_stream(location):
            found.append((location, Path("stream"), "live"))
        elif is_camera(location):
            found.append((location, Path(f"camera{location}"), "live"))
        else:
            files = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
            files = [file for file in files if is_image(file) or is_video(file)]
            if not files:
                raise InputError(
                    f"{location!r}: no such file or folder (working folder: {Path.cwd()})"
                )
            found += [(str(file), Path(file.name), media_kind(file)) for file in files]
    return _unique_sources(found)


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


def _media_files(folder: Path) -> list[Path]:
    files = sorted(
        file
        for file in folder.rglob("*")
        if (is_image(file) or is_video(file)) and not file.is_dir() and not _is_detect_output(file)
    )
    if not files:
        raise InputError(f"{str(folder)!r}: holds no images and no videos")
    return files


def _is_detect_output(file: Path) -> bool:
    """Return whether a file is in a default output folder of an earlier `detect`."""
    parts = file.resolve().parts
    return any(
        first == "outputs" and second.startswith("detect-")
        for first, second in zip(parts, parts[1:], strict=False)
    )


def _read_list(file: Path) -> list[Path]:
    """Read a list of paths, relative to the working folder or else to the folder of the list."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a list of paths ({error})") from None
    paths = [Path(line).expanduser() for line in lines if line and not line.startswith("#")]
    if not paths:
        raise InputError(f"{file}: lists no paths")
    return [path if path.exists() else file.parent / path for path in paths]


def _unique_sources(found: list[tuple[str, Path, Kind]]) -> list[FrameSource]:
    """Remove duplicates and give each source a unique output name."""
    sources: dict[str, FrameSource] = {}
    used_names: set[str] = set()
    for location, relative, kind in found:
        resolved = location if kind == "live" else str(Path(location).resolve())
        if resolved in sources:
            continue
        stem = str(relative.with_suffix("")) if kind != "live" else str(relative)
        name, number = stem, 2
        while name in used_names:
            name, number = f"{stem}-{number}", number + 1
        used_names.add(name)
        sources[resolved] = FrameSource(location, without_password(location), name, kind)
    return list(sources.values())


@dataclass
class FrameReader:
    """Read frames and collect errors of unreadable sources."""

    size_hw: tuple[int, int]  # of the network input, px
    resize: Resize
    start_s: float  # to skip at the start of videos
    duration_s: float | None  # to read from videos; None reads to the end
    full_resolution: bool  # whether `Frame.image` must have the original size
    errors: list[str]  # one message per source that could not be read completely
    reading_s: float = 0.0  # time spent reading and resizing
    frame_count: int | None = None  # total number of frames, if known

    def frames(self, sources: Sequence[FrameSource]) -> Iterator[Frame]:
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
        image, size_hw_orig = read_image(path, max(self.size_hw))
        network_input, *_ = fit(image, self.size_hw, self.resize, size_hw_orig)
        if self.full_resolution and image.shape[:2] != size_hw_orig:  # was decoded at reduced size
            image, _ = read_image(path)
        yield Frame(source, image, network_input, size_hw_orig)

    def _read_video(self, source: FrameSource) -> Iterator[Frame]:
        with VideoReader(source.location, self.start_s, self.duration_s) as video:
            rate = float(video.frames_per_second)
            if self._single_source:
                self.frame_count = video.frame_count
            # a live source continues while the network is busy: process its most recent frame
            live = source.kind == "live" and video.frame_count is None
            for index, (image, time_s) in enumerate(drop_stale(video) if live else video):
                network_input, *_ = fit(image, self.size_hw, self.resize)
                size_hw = (image.shape[0], image.shape[1])
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


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield items that a background thread reads in advance, at most `depth` of them."""
    buffer: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            try:
                buffer.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_END)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := buffer.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=10)


def drop_stale(items: Iterable[T]) -> Iterator[T]:
    """Yield the most recent item; drop items that arrive while the consumer is busy."""
    changed = threading.Condition()
    slot: list[T] = []
    state: dict[str, Any] = {"ended": False, "stopped": False, "error": None}

    def read() -> None:
        try:
            for item in items:
                with changed:
                    slot[:] = [item]
                    changed.notify()
                    if state["stopped"]:
                        return
        except BaseException as error:
            state["error"] = error
        finally:
            with changed:
                state["ended"] = True
                changed.notify()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: slot or state["ended"])
                if not slot:
                    break
                item = slot.pop()
            yield item
        if state["error"] is not None:
            raise state["error"]
    finally:
        state["stopped"] = True
        thread.join(timeout=10)


class BackgroundWriter(Generic[T]):
    """Call a function with each item in a background thread; `depth` limits the queue."""

    def __init__(self, function: Callable[[T], None], depth: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (item := self._queue.get()) is not _END:
            if self._error is None:
                try:
                    self._function(item)
                except BaseException as error:
                    self._error = error

    def put(self, item: T) -> None:
        """Queue an item, wait while the queue is full, and re-raise errors of the function."""
        self._queue.put(item)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for all queued items and re-raise errors of the function."""
        self._queue.put(_END)
        self._thread.join()
        if self._error is not None:
            raise self._error
