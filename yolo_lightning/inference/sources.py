"""Where `detect` gets its images from: files, folders, globs, lists, video, cameras, streams."""

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
    BrokenVideo,
    VideoReader,
    is_camera,
    is_stream,
    is_video,
    without_password,
)

T = TypeVar("T")

_DONE = object()


@dataclass(frozen=True)
class Place:
    """Something that frames come from.

    Attributes:
        where: path, address, or number of a camera.
        shown: the same without a password, for files and messages.
        name: what written files are called: a relative path without its ending, no two the same.
        kind: `live` for cameras and addresses, whose frames cannot wait for each other.
    """

    where: str
    shown: str
    name: str
    kind: Literal["image", "video", "live"]


@dataclass
class Frame:
    """One image, on its way to the network and back.

    Attributes:
        place: where it is from.
        image: uint8 (H, W, 3), RGB, as it was taken; smaller where nobody is to see it.
        fitted: uint8 (h, w, 3), the network input.
        size_hw_orig: height and width of the file's own image, px.
        number: of a video's frame, from 0 on.
        time_s: of a video's frame.
        frames_per_second: of the video.
    """

    place: Place
    image: Image
    fitted: Image
    size_hw_orig: tuple[int, int]
    number: int = 0
    time_s: float = 0.0
    frames_per_second: float = 0.0


def places_in(sources: Sequence[str]) -> list[Place]:
    """Return what the sources name: images and videos, each once, those in folders at any depth.

    Args:
        sources: paths, globs, text files with a path a line, addresses, numbers of cameras.

    Raises:
        InputError: nothing of that name, of that kind, or in that folder.
    """
    found: list[tuple[str, Path, Literal["image", "video", "live"]]] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found += [(str(file), file.relative_to(path), kind_of(file)) for file in _below(path)]
        elif path.is_file() and path.suffix.lower() == ".txt":
            found += [(str(file), Path(file.name), kind_of(file)) for file in _listed(path)]
        elif path.is_file():
            found.append((str(path), Path(path.name), kind_of(path)))
        elif is_stream(source):
            found.append((source, Path("stream"), "live"))
        elif is_camera(source):
            found.append((source, Path(f"camera{source}"), "live"))
        else:
            files = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
            chosen = [file for file in files if is_image(file) or is_video(file)]
            if not chosen:
                raise InputError(f"{source!r}: no such file or folder (here: {Path.cwd()})")
            found += [(str(file), Path(file.name), kind_of(file)) for file in chosen]
    return _named_apart(found)


def kind_of(file: Path) -> Literal["image", "video"]:
    """Tell images from videos by their endings.

    Raises:
        InputError: neither.
    """
    if is_image(file):
        return "image"
    if is_video(file):
        return "video"
    raise InputError(
        f"{str(file)!r}: neither an image nor a video that can be read by its ending; a list of "
        f"paths ends in .txt, videos in {' '.join(VIDEO_SUFFIXES)}"
    )


def _below(folder: Path) -> list[Path]:
    found = sorted(
        file
        for file in folder.rglob("*")
        if (is_image(file) or is_video(file)) and not file.is_dir() and not _written_here(file)
    )
    if not found:
        raise InputError(f"{str(folder)!r}: holds no images and no videos")
    return found


def _written_here(file: Path) -> bool:
    """Tell what an earlier call has written by the folder that it chose."""
    whole = file.resolve().parts
    return any(
        first == "outputs" and second.startswith("detect-")
        for first, second in zip(whole, whole[1:], strict=False)
    )


def _listed(file: Path) -> list[Path]:
    """Return the paths of a list; relative ones are looked up here, then beside the list."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not a list of paths ({error})") from None
    paths = [Path(line).expanduser() for line in lines if line and not line.startswith("#")]
    if not paths:
        raise InputError(f"{file}: lists no paths")
    return [path if path.exists() else file.parent / path for path in paths]


def _named_apart(
    found: list[tuple[str, Path, Literal["image", "video", "live"]]],
) -> list[Place]:
    """Give every place a name of its own; what is named twice is read once."""
    places: dict[str, Place] = {}
    taken: set[str] = set()
    for where, relative, kind in found:
        same = where if kind == "live" else str(Path(where).resolve())
        if same in places:
            continue
        stem = str(relative.with_suffix("")) if kind != "live" else str(relative)
        name, number = stem, 2
        while name in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(name)
        places[same] = Place(where, without_password(where), name, kind)
    return list(places.values())


@dataclass
class FrameReader:
    """Reads frames, and remembers what could not be read.

    Attributes:
        size_hw: of the network input, px.
        resize: how images are fitted into it.
        start_s, duration_s: of videos; all of them where None.
        whole_images: whether images are to be drawn on.
        failures: a sentence for each place that could not be read, or not to its end.
        seconds: spent reading and fitting.
        expected: frames of all places; None where a length is not known (yet).
    """

    size_hw: tuple[int, int]
    resize: Resize
    start_s: float
    duration_s: float | None
    whole_images: bool
    failures: list[str]
    seconds: float = 0.0
    expected: int | None = None

    def frames(self, places: Sequence[Place]) -> Iterator[Frame]:
        """Yield the frames of all places, one place after the other."""
        if all(place.kind == "image" for place in places):
            self.expected = len(places)
        self._alone = len(places) == 1
        for place in places:
            reading = self._image(place) if place.kind == "image" else self._video(place)
            while True:
                started = time.perf_counter()
                try:
                    frame = next(reading, None)
                except (UnreadableSample, BrokenVideo, InputError) as error:
                    self.failures.append(str(error))  # names the place, without its password
                    break
                self.seconds += time.perf_counter() - started
                if frame is None:
                    break
                yield frame

    def _image(self, place: Place) -> Iterator[Frame]:
        path = Path(place.where)
        image, size_hw_orig = read_image(path, max(self.size_hw))
        fitted, *_ = fit(image, self.size_hw, self.resize, size_hw_orig)
        if self.whole_images and image.shape[:2] != size_hw_orig:  # decoded smaller, to be fitted
            image, _ = read_image(path)
        yield Frame(place, image, fitted, size_hw_orig)

    def _video(self, place: Place) -> Iterator[Frame]:
        with VideoReader(place.where, self.start_s, self.duration_s) as video:
            rate = float(video.frames_per_second)
            if self._alone:
                self.expected = video.frame_count
            # what is live goes on while the network works: it looks at the newest frame
            live = place.kind == "live" and video.frame_count is None
            for number, (image, time_s) in enumerate(newest(video) if live else video):
                fitted, *_ = fit(image, self.size_hw, self.resize)
                size_hw = (image.shape[0], image.shape[1])
                yield Frame(place, image, fitted, size_hw, number, time_s, rate)


def in_batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Yield frames in batches; live ones alone, since they cannot wait."""
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size or frame.place.kind == "live":
            yield batch
            batch = []
    if batch:
        yield batch


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yield items that a thread reads in advance.

    Args:
        items: where from.
        depth: how many wait at most.
    """
    waiting: queue.Queue[Any] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def read() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_DONE)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not _DONE:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=10)


def newest(items: Iterable[T]) -> Iterator[T]:
    """Yield the newest of the items that a thread reads, leaving out those that came too early."""
    came = threading.Condition()
    slot: list[T] = []
    state: dict[str, Any] = {"ended": False, "stopped": False, "error": None}

    def read() -> None:
        try:
            for item in items:
                with came:
                    slot[:] = [item]
                    came.notify()
                    if state["stopped"]:
                        return
        except BaseException as error:
            state["error"] = error
        finally:
            with came:
                state["ended"] = True
                came.notify()

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            with came:
                came.wait_for(lambda: slot or state["ended"])
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
    """Hands items to a function in a thread, in their order; few wait at a time.

    Args:
        function: called with each item.
        depth: how many wait at most.
    """

    def __init__(self, function: Callable[[T], None], depth: int) -> None:
        self._waiting: queue.Queue[Any] = queue.Queue(depth)
        self._function = function
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not _DONE:
            if self._error is None:
                try:
                    self._function(item)
                except BaseException as error:
                    self._error = error

    def put(self, item: T) -> None:
        """Wait for a place, and raise what the function raised."""
        self._waiting.put(item)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for the rest, and raise what the function raised."""
        self._waiting.put(_DONE)
        self._thread.join()
        if self._error is not None:
            raise self._error
