"""Reading and writing video: frames and timestamps, damaged files, temporary files."""

import contextlib
import http.server
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.hostile_images import fifo
from yolo_lightning.errors import InputError
from yolo_lightning.images import Image
from yolo_lightning.inference import sources, video, video_writer
from yolo_lightning.inference.sources import find_sources
from yolo_lightning.inference.video import (
    VideoReader,
    is_camera,
    is_stream,
    is_video,
)
from yolo_lightning.inference.video_writer import VideoWriter

av = pytest.importorskip("av")

FRAMES, RATE, HEIGHT, WIDTH = 30, 10, 48, 64
TICK = Fraction(1, 10_000)
ENCODERS = {
    "mp4": ("libx264", {"g": "10", "bf": "2"}, {"movflags": "faststart"}),
    "webm": ("libvpx-vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}, {}),
    "mkv": ("libx264", {"g": "10", "bf": "2"}, {}),
    "ts": ("libx264", {"g": "10", "bf": "2"}, {}),
    "avi": ("mpeg4", {"g": "10", "b": "9000000"}, {}),
}


def numbered(number: int, noise: np.random.Generator) -> Image:
    """Return noise, so that frames are large, with the number encoded in the upper left quarter."""
    image = noise.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image[: HEIGHT // 2, : WIDTH // 2] = 4 + 8 * number
    return image


def number_of(image: Image) -> int:
    return round((float(image[8:16, 8:24].mean()) - 4) / 8)


def generate(
    path: Path, times_s: Sequence[float] = (), audio_s: float = 0.0, codec_of: str = ""
) -> Path:
    """Write numbered frames with PyAV, at a constant rate or at given times."""
    codec, options, _ = ENCODERS[codec_of or path.suffix[1:]]
    *_, container_options = ENCODERS[path.suffix[1:]]
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", container_options=container_options) as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        if times_s:
            stream.codec_context.time_base = TICK
        audio = container.add_stream("libopus", rate=48000, layout="mono") if audio_s else None
        for number in range(len(times_s) or FRAMES):
            frame = av.VideoFrame.from_ndarray(numbered(number, noise), format="rgb24")
            frame.pts = round(times_s[number] / TICK) if times_s else number
            frame.time_base = TICK if times_s else Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            for _ in range(round(audio_s * 50)):
                silence = np.zeros((1, 960), np.float32)
                frame = av.AudioFrame.from_ndarray(silence, format="flt", layout="mono")
                frame.sample_rate = 48000
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("intact")
    return {suffix: generate(folder / f"video.{suffix}") for suffix in ENCODERS}


def read(source: str | Path, *window: float) -> tuple[list[int], list[float]]:
    with VideoReader(source, *window) as reader:
        frames = list(reader)
    return [number_of(image) for image, _ in frames], [time_s for _, time_s in frames]


def read_broken(source: str | Path) -> tuple[list[int], str]:
    """Read up to the damage; check that the frames before it are complete and in order."""
    numbers: list[int] = []
    with VideoReader(source) as reader, pytest.raises(InputError) as caught:
        numbers.extend(number_of(image) for image, _ in reader)  # keeps those before the error
    assert numbers == list(range(len(numbers)))
    assert reader.frames_read == len(numbers)
    last_s = (len(numbers) - 1) / RATE
    expected = f"{source}: breaks off after {last_s:.3f} s; frames read: {len(numbers)} ("
    assert str(caught.value).startswith(expected)
    return numbers, str(caught.value)


def with_bytes(source: Path, target: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(source.read_bytes())
    change(data)
    target.write_bytes(data)
    return target


def overwrite_middle(data: bytearray) -> None:
    middle, noise = len(data) // 2, np.random.default_rng(1)
    data[middle : middle + 4000] = noise.integers(0, 256, 4000, dtype=np.uint8).tobytes()


def cut_between_keyframes(data: bytes) -> bytes:
    return data[len(data) // 6 // 188 * 188 :]


def test_source_types_are_detected_by_name():
    assert is_video("a/b.MP4")
    assert is_video(Path("b.webm"))
    assert not is_video("b.jpg")
    locations = ("rtsp://h/x", "HTTP://h", "C:\\x", "x/y.mp4", "0")
    assert [is_stream(location) for location in locations] == [True, True, False, False, False]
    assert [is_camera(location) for location in ("0", "12", "-1", "0.mp4", "")] == [
        True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ENCODERS)
def test_every_frame_is_read_once_in_order_with_its_time(intact, suffix):
    with VideoReader(intact[suffix]) as reader:
        assert reader.size_hw == (HEIGHT, WIDTH)
        assert reader.frames_per_second == RATE
        assert reader.frame_count == FRAMES
        frames = list(reader)
    assert [number_of(image) for image, _ in frames] == list(range(FRAMES))
    assert [time_s for _, time_s in frames] == pytest.approx([k / RATE for k in range(FRAMES)])
    assert {(image.shape, image.dtype.name) for image, _ in frames} == {
        ((HEIGHT, WIDTH, 3), "uint8")
    }


@pytest.mark.parametrize("suffix", ENCODERS)
@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((1.3, 1.0), range(13, 23)),
        ((0.95, 0.1), range(10, 11)),
        ((2.5,), range(25, 30)),
        ((0.0, 0.5), range(5)),
        ((2.9, 60.0), range(29, 30)),
    ],
)
def test_window_contains_exactly_its_frames(intact, suffix, window, expected):
    numbers, times_s = read(intact[suffix], *window)
    assert numbers == list(expected)
    assert times_s == pytest.approx([k / RATE for k in expected])


def test_consecutive_windows_share_no_frame_and_lose_none(tmp_path):
    thirds = [round(k / 3, 3) for k in range(20)]  # as Matroska rounds them: 0.333, 0.667 …
    path = generate(tmp_path / "thirds.mkv", thirds)
    edges = [0, 1 / 3, 1.0, 5 / 3, 3.1, 4, 7]
    found = [read(path, start, end - start)[0] for start, end in itertools.pairwise(edges)]
    assert [len(numbers) for numbers in found] == [1, 2, 2, 5, 2, 8]
    assert sum(found, []) == list(range(20))


def test_frame_count_of_a_window(intact):
    with VideoReader(intact["mp4"], 1.0, 0.5) as reader:
        assert reader.frame_count == 5
    with VideoReader(intact["webm"], 2.0, 60.0) as reader:
        assert reader.frame_count == 10


def test_rotated_video_is_read_upright(intact, tmp_path):
    def turn(data: bytearray) -> None:  # by 90 degrees clockwise, as phones held upright do
        matrix = data.index(b"tkhd") + 44
        data[matrix : matrix + 20] = np.array([0, 65536, 0, -65536, 0], ">i4").tobytes()

    with VideoReader(with_bytes(intact["mp4"], tmp_path / "turned.mp4", turn)) as reader:
        assert reader.size_hw == (WIDTH, HEIGHT)
        image, _ = list(reader)[20]
    assert image.shape == (WIDTH, HEIGHT, 3)
    upright = image[: WIDTH // 2, HEIGHT // 2 :]  # the quarter was top left and is now top right
    assert number_of(upright) == 20
    assert upright.std() < 5 < image[WIDTH // 2 :].std()


def test_pixels_become_square(tmp_path, monkeypatch):
    with av.open(str(tmp_path / "wide.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        image = np.full((HEIGHT, WIDTH, 3), 99, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        container.mux(stream.encode(None))
    with VideoReader(tmp_path / "wide.mkv") as reader:
        assert reader.size_hw == (HEIGHT, 96)
        assert [image.shape for image, _ in reader] == [(HEIGHT, 96, 3)]
    monkeypatch.setattr(video, "MAX_PIXELS", HEIGHT * 96 - 1)
    with pytest.raises(InputError, match=r"wide\.mkv: frames of 96 x 48 px; allowed: at most"):
        VideoReader(tmp_path / "wide.mkv")


def test_audio_may_be_longer_than_the_video(tmp_path):
    assert read(generate(tmp_path / "song.mkv", audio_s=5.0))[0] == list(range(FRAMES))


@pytest.mark.parametrize("suffix", ["mkv", "webm", "mp4"])
def test_long_gaps_between_timestamps_are_allowed(tmp_path, suffix):
    times_s = [0, 0.1, 0.2, 0.3, 2.8, 2.9]
    path = generate(tmp_path / f"still.{suffix}", times_s, audio_s=3.0)
    assert read(path)[1] == pytest.approx(times_s)


def packets(path: Path) -> list[tuple[int, int, int]]:
    """Return frame number, first and last byte of each packet, in file order."""
    with av.open(str(path)) as container:
        (stream,) = container.streams
        step = float(RATE * stream.time_base)
        found = [one for one in container.demux(stream) if one.size]
        return [(round(one.pts * step), one.pos, one.pos + one.size) for one in found]


@pytest.mark.parametrize("suffix", ["mp4", "webm", "mkv", "avi"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("between", [False, True], ids=["in a packet", "between two"])
def test_truncated_file_yields_its_frames_and_reports_the_end(
    intact, tmp_path, suffix, part, between
):
    all_packets = packets(intact[suffix])
    count = int(part * FRAMES)
    end = all_packets[count][1] if between else sum(all_packets[count][1:]) // 2
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(intact[suffix].read_bytes()[:end])
    complete = {number for number, *_ in all_packets[:count]}
    numbers, _ = read_broken(path)
    assert len(numbers) == next(number for number in itertools.count() if number not in complete)


def test_truncated_file_is_reported_after_a_start(intact, tmp_path):
    path = tmp_path / "cut.mkv"
    path.write_bytes(intact["mkv"].read_bytes()[: packets(intact["mkv"])[25][1]])
    with pytest.raises(InputError, match="its duration should be 3.000 s"):
        read(path, 1.5)


def test_incomplete_last_frame_is_not_read(tmp_path):
    path = generate(tmp_path / "vp9.mp4", codec_of="webm")  # VP9 decodes most of a packet
    _, start, end = packets(path)[12]
    path.write_bytes(path.read_bytes()[: end - (end - start) // 8])
    assert len(read_broken(path)[0]) == 12


@pytest.mark.parametrize("suffix", ["mp4", "webm", "mkv", "avi"])
def test_damaged_file_yields_the_frames_before_the_damage(intact, tmp_path, suffix):
    numbers, _ = read_broken(
        with_bytes(intact[suffix], tmp_path / f"bad.{suffix}", overwrite_middle)
    )
    assert 10 <= len(numbers) < 20


def test_damage_outside_the_window_is_ignored(intact, tmp_path):
    path = with_bytes(intact["mp4"], tmp_path / "bad.mp4", overwrite_middle)
    assert read(path, 0.0, 1.0)[0] == list(range(10))
    assert read(path, 2.0)[0] == list(range(20, FRAMES))


def damage_a_few_bytes(data: bytearray) -> None:
    middle = len(data) // 2
    data[middle : middle + 20] = b"wrong" * 4


def test_transport_stream_fails_at_damage_but_may_start_anywhere(intact, tmp_path):
    numbers, _ = read_broken(with_bytes(intact["ts"], tmp_path / "bad.ts", damage_a_few_bytes))
    assert 10 <= len(numbers) < 20
    data = intact["ts"].read_bytes()
    (tmp_path / "late.ts").write_bytes(cut_between_keyframes(data))
    assert read(tmp_path / "late.ts")[0][-20:] == list(range(10, FRAMES))


def test_equal_timestamps_become_increasing(tmp_path):
    path = generate(tmp_path / "equal.webm", [0, 0.1, 0.1004, 0.2])  # stored as 0, 100, 100, 200 ms
    assert read(path)[1] == pytest.approx([0, 0.1, 0.101, 0.2], abs=1e-4)


def copy_frames(source: Path, target: Path) -> None:
    with VideoReader(source) as reader, VideoWriter(target, reader.size_hw, RATE) as writer:
        for image, time_s in reader:
            writer.write(image, time_s)


def test_output_is_playable_after_damaged_input(intact, tmp_path):
    path = with_bytes(intact["mp4"], tmp_path / "bad.mp4", overwrite_middle)
    with pytest.raises(InputError, match="frames read: 1[0-9]") as caught:
        copy_frames(path, tmp_path / "out.webm")
    numbers, _ = read(tmp_path / "out.webm")
    assert numbers == list(range(len(numbers)))
    assert f"frames read: {len(numbers)}" in str(caught.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.mp4", "out.webm"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.mp4", b"no video\n" * 99),
        ("empty.webm", b""),
        ("noise.mkv", np.random.default_rng(2).bytes(9999)),
        ("index_at_the_end.mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2\0\0\x40\0mdat"),
    ],
)
def test_other_files_are_rejected(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: cannot be opened \(no video, or"):
        VideoReader(tmp_path / name)


def test_files_without_decodable_video_are_rejected(intact, tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        audio = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux([*audio.encode(frame), *audio.encode(None)])
    with pytest.raises(InputError, match=r"song\.mp4: no video in it"):
        VideoReader(tmp_path / "song.mp4")
    with av.open(str(tmp_path / "cover.mp4"), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        image = av.VideoFrame.from_ndarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8))
        container.mux([*cover.encode(image), *cover.encode(None)])
    with pytest.raises(InputError, match=r"cover\.mp4: no video in it"):
        VideoReader(tmp_path / "cover.mp4")

    def rename(data: bytearray) -> None:
        data[:] = data.replace(b"avc1", b"zzzz")

    with pytest.raises(InputError, match=r"odd\.mp4: no video in it that can be decoded"):
        VideoReader(with_bytes(intact["mp4"], tmp_path / "odd.mp4", rename))
    for source, message in ((tmp_path / "none.mp4", "No such file"), (tmp_path, "directory")):
        with pytest.raises(InputError, match=message):
            VideoReader(source)


@pytest.mark.parametrize("start_s", [3.0, float("inf")])
def test_start_beyond_the_end_is_rejected(intact, start_s):
    message = rf"the start, {start_s:g} s, lies beyond its end; it is 3\.000 s long"
    with pytest.raises(InputError, match=message):
        VideoReader(intact["mp4"], start_s)


def test_window_without_frames_is_rejected(intact):
    with pytest.raises(InputError, match=r"no frame between 2\.95 and 3\.95 s"):
        read(intact["webm"], 2.95, 1.0)


def test_without_pyav_the_message_names_the_extra(intact, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    for create in (
        lambda: VideoReader(intact["mp4"]),
        lambda: VideoWriter(tmp_path / "x.webm", (48, 64), 10),
    ):
        with pytest.raises(InputError, match=r"pip install 'yolo-lightning\[video\]'"):
            create()


def test_missing_camera_is_rejected():
    with pytest.raises(
        InputError, match=r"camera 99 \(/dev/video99\): cannot be opened.* available"
    ):
        VideoReader("99")


@pytest.mark.parametrize("scheme", ["rtsp", "http", "tcp", "rtmp"])
def test_closed_port_fails_fast_without_printing_the_password(scheme):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    started = time.perf_counter()
    with pytest.raises(InputError, match="cannot be opened") as caught:
        VideoReader(f"{scheme}://user:secret@127.0.0.1:{port}/x")
    assert f"{scheme}://***@127.0.0.1:{port}/x" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert time.perf_counter() - started < 5


def test_unsupported_url_scheme_is_rejected():
    with pytest.raises(InputError, match="ftp://host/x: not a supported stream; allowed: http, "):
        VideoReader("ftp://host/x")


@contextlib.contextmanager
def serving(content: bytes, stated: int | None = None) -> Iterator[str]:
    """Serve bytes over HTTP; `stated` overrides the content length."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(stated or len(content)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/video"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_video_over_http_is_read_to_its_end(intact, suffix):
    with serving(intact[suffix].read_bytes()) as address:
        assert read(address)[0] == list(range(FRAMES))
        assert read(address, 1.5, 0.5)[0] == list(range(15, 20))


def test_closed_http_connection_is_an_error(intact):
    content = intact["webm"].read_bytes()
    with serving(content[: len(content) // 2], len(content)) as address:
        numbers, _ = read_broken(address)
    assert 10 <= len(numbers) < 20


@contextlib.contextmanager
def sending(content: bytes, keep_open: bool = False) -> Iterator[str]:
    """Send bytes to the first client as a live stream; keep the connection open or close it."""
    done = threading.Event()

    def send(listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            with connection:
                connection.sendall(content)
                if keep_open:
                    done.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=send, args=(listening,))
        thread.start()
        yield f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        done.set()
        thread.join()


def test_live_stream_may_start_anywhere(intact):
    with (
        sending(cut_between_keyframes(intact["ts"].read_bytes())) as address,
        VideoReader(address) as reader,
    ):
        assert reader.frame_count is None
        frames = list(reader)
    assert [number_of(image) for image, _ in frames][-20:] == list(range(10, FRAMES))
    assert 20 <= len(frames) < 25
    assert [time_s for _, time_s in frames] == pytest.approx([k / RATE for k in range(len(frames))])


def test_window_of_a_live_stream_starts_at_its_first_frame(intact):
    data = cut_between_keyframes(intact["ts"].read_bytes())
    with sending(data) as address:
        numbers, _ = read(address)
    with sending(data) as address:
        assert read(address, 0.5, 1.0)[0] == numbers[5:15]


def test_live_stream_continues_after_damage(intact):
    data = bytearray(intact["ts"].read_bytes())
    damage_a_few_bytes(data)
    with sending(bytes(data)) as address:
        numbers, times_s = read(address)
    assert numbers[:10] == list(range(10))
    assert numbers[-10:] == list(range(20, FRAMES))
    assert times_s == sorted(set(times_s))


def test_closed_live_stream_is_not_read_any_more(monkeypatch):
    events = []

    class EndlessReader:
        frames_per_second, frame_count = Fraction(RATE), None

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            events.append("closed")

        def __iter__(self):
            for number in itertools.count():
                time.sleep(0.02)
                events.append("read")
                yield video.VideoFrame(np.zeros((32, 32, 3), np.uint8), number / RATE)

    monkeypatch.setattr(sources, "VideoReader", EndlessReader)
    reader = sources.FrameReader((32, 32), "letterbox", 0.0, None, False, [])
    url = "rtsp://camera"
    frames = reader.frames([sources.FrameSource(url, url, "stream", "live")])
    next(frames)
    frames.close()
    time.sleep(0.1)
    assert events[-1] == "closed"
    assert "read" in events


def test_silent_stream_times_out(intact, monkeypatch):
    monkeypatch.setattr(video, "TIMEOUT_S", 1.0)
    with (
        sending(b"", keep_open=True) as address,
        pytest.raises(InputError, match=r"cannot be opened \(timed out after 1 s\)"),
    ):
        VideoReader(address)
    content = intact["webm"].read_bytes()
    with sending(content[: len(content) // 2], keep_open=True) as address:
        numbers, error = read_broken(address)
    assert 10 <= len(numbers) < 20
    assert "timed out after 1 s" in error


@pytest.mark.parametrize(("suffix", "codec"), [("webm", "vp9"), ("mp4", "h264")])
def test_written_video_is_playable_in_browsers(tmp_path, suffix, codec):
    path = tmp_path / f"out.{suffix}"
    colour = np.array([200, 30, 60], np.uint8)
    with VideoWriter(path, (HEIGHT, WIDTH), RATE) as writer:
        for number in range(FRAMES):
            image = np.full((HEIGHT, WIDTH, 3), 4 + 8 * number, np.uint8)
            image[HEIGHT // 2 :] = colour
            writer.write(image, number / RATE)
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == codec
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 1  # BT.709
        assert stream.average_rate == RATE
        assert container.duration == pytest.approx(1e6 * FRAMES / RATE, abs=1000)
        assert container.metadata.get("ENCODER", container.metadata.get("encoder"))
    if suffix == "mp4":  # can be played before it is complete
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
    with VideoReader(path) as reader:
        frames = list(reader)
    assert [number_of(image) for image, _ in frames] == list(range(FRAMES))
    assert np.abs(frames[9].image[36:44].astype(int) - colour).max() < 8


@pytest.mark.parametrize("suffix", ["webm", "mp4"])
@pytest.mark.parametrize("size_hw", [(47, 63), (48, 63), (1, 1)])
def test_odd_sides_grow_by_a_copy_of_the_last_pixel(tmp_path, suffix, size_hw):
    height, width = size_hw
    image = np.zeros((height, width, 3), np.uint8)
    image[-1], image[:, -1] = 200, 200
    with VideoWriter(tmp_path / f"odd.{suffix}", size_hw, RATE) as writer:
        writer.write(image, 0.0)
    with VideoReader(tmp_path / f"odd.{suffix}") as reader:
        assert reader.size_hw == (height + height % 2, width + width % 2)
        (frame,) = reader
    assert frame.image[-1].min() > 150
    assert frame.image[:, -1].min() > 150


@pytest.mark.parametrize("suffix", ["webm", "mp4"])
def test_timestamps_are_relative_to_the_first_frame(tmp_path, suffix):
    times_s = [0.0, 0.1, 0.2, 1.2, 1.25, 3.0]
    path = tmp_path / f"uneven.{suffix}"
    noise = np.random.default_rng(0)
    with VideoWriter(path, (HEIGHT, WIDTH), RATE) as writer:
        for number, time_s in enumerate(times_s):
            writer.write(numbered(number, noise), 60 + time_s)
    numbers, read_s = read(path)
    assert numbers == list(range(6))
    assert read_s == pytest.approx(times_s, abs=0.001)
    with av.open(str(path)) as container:  # the last frame is shown, too
        assert container.duration == pytest.approx(3.1e6, abs=1000)


def test_file_is_replaced_only_when_complete(tmp_path):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"from before")
    with VideoWriter(path, (HEIGHT, WIDTH), RATE) as writer:
        for number in range(FRAMES):
            writer.write(np.full((HEIGHT, WIDTH, 3), number, np.uint8), number / RATE)
        assert path.read_bytes() == b"from before"
    assert read(path)[1] == pytest.approx([k / RATE for k in range(FRAMES)])
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_no_file_without_frames(tmp_path):
    with VideoWriter(tmp_path / "out.webm", (HEIGHT, WIDTH), RATE) as writer:
        pass
    writer.close()  # closing twice is allowed
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("suffix", ["webm", "mp4"])
def test_full_disk_is_reported_and_leaves_no_file(intact, tmp_path, suffix):
    (tmp_path / f"out.{suffix}.part").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        copy_frames(intact["mp4"], tmp_path / f"out.{suffix}")
    assert os.listdir(tmp_path) == []


def test_invalid_output_paths_are_rejected(tmp_path, monkeypatch):
    (tmp_path / "folder.mp4").mkdir()
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for name, reason in (("none/out.mp4", "No such file"), ("folder.mp4", "Is a directory")):
        with (
            pytest.raises(InputError, match=rf"{name}: cannot be written \({reason}"),
            VideoWriter(tmp_path / name, (HEIGHT, WIDTH), RATE) as writer,
        ):
            writer.write(image, 0.0)
    encoder: Any = ("no_such_encoder", Fraction(1, 1000), {}, {})
    monkeypatch.setitem(video_writer._ENCODERS, ".mp4", encoder)
    with pytest.raises(InputError, match="has no encoder no_such_encoder; choose another"):
        VideoWriter(tmp_path / "out.mp4", (HEIGHT, WIDTH), RATE)
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_frames_less_than_a_tick_apart_stay_in_order(tmp_path):
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    with VideoWriter(tmp_path / "out.webm", (HEIGHT, WIDTH), RATE) as writer:
        writer.write(image, 1.0)
        writer.write(image, 1.0001)
    with av.open(str(tmp_path / "out.webm")) as container:
        assert [frame.pts for frame in container.decode(video=0)] == [0, 1]


# --- hostile sources


@pytest.mark.parametrize("query", ["", "?user=ann&password=s3cret", "?channel=1&token=s3cret"])
def test_names_of_streams_contain_no_secrets(query):
    (source,) = find_sources([f"rtsp://ann:s3cret@127.0.0.1:1/live{query}"])
    assert source.location.endswith(f"/live{query}")
    assert source.display_name.startswith("rtsp://***@127.0.0.1:1/live")
    assert "s3cret" not in source.display_name
    with pytest.raises(InputError, match="127.0.0.1:1/live.*: cannot be opened") as caught:
        VideoReader(source.location)
    assert "s3cret" not in str(caught.value)


def test_names_of_files_are_not_masked(intact, tmp_path):
    file = tmp_path / "a@b?password=c.mkv"
    file.write_bytes(intact["mkv"].read_bytes())
    (source,) = find_sources([str(file)])
    assert source.display_name == str(file)


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:1,\n{other}\n", "ffconcat version 1.0\nfile '{other}'\n"]
)
def test_a_playlist_is_no_video(tmp_path, text):
    """It would open other files, or itself, again and again."""
    other = generate(tmp_path / "other.ts")
    for name in ("x.mp4", "x.ts", "x.mkv"):
        (tmp_path / name).write_text(text.format(other=other.name))
        with pytest.raises(InputError, match=f"{name}: cannot be opened"):
            VideoReader(tmp_path / name)


@pytest.mark.parametrize("line", ["a" * 2**20, "/" + "a" * 256])
def test_a_list_of_impossible_paths_is_named(tmp_path, line):
    (tmp_path / "list.txt").write_text(line + "\n")
    with pytest.raises(InputError, match="list.txt: the path .* too long"):
        find_sources([str(tmp_path / "list.txt")])


def test_a_named_pipe_is_no_video(tmp_path):
    file = fifo(tmp_path / "a.mp4")
    with pytest.raises(InputError, match=r"a\.mp4: not a regular file$"):
        VideoReader(file)


def test_size_of_frames_is_bounded(intact, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", HEIGHT * WIDTH)
    assert read(intact["mkv"])[0] == list(range(FRAMES))
    monkeypatch.setattr(video, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(InputError, match=r"video\.mkv: frames of 64 x 48 px; allowed: at most"):
        VideoReader(intact["mkv"])
