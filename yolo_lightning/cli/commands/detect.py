"""`yolo-lightning detect`: find objects in images, video, and streams."""

import argparse
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolo_lightning.cli.commands.darknet_options import add_options
from yolo_lightning.errors import InputError

if TYPE_CHECKING:
    from yolo_lightning.detections import Detection
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.sources import Frame, FrameReader
    from yolo_lightning.inference.writers import Output

READ_AHEAD, WRITE_BEHIND = 3, 3
_RECENT, _BAR = 30, 30
STOPPED = 130
"""Exit code where somebody ended it before its end, as shells have it."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="yolo-lightning detect",
        usage="yolo-lightning detect CHECKPOINT SOURCE… [options]\n"
        "       yolo-lightning detect --cfg F --weights F --data F SOURCE… [options]",
        description="Find objects in images, video, and streams.",
    )
    parser.add_argument(
        "places",
        nargs="+",
        metavar="CHECKPOINT SOURCE",
        help="a detector; images, videos, folders, globs, lists of paths (.txt), the number of a "
        "camera, addresses of streams",
    )
    add = parser.add_argument
    add("--output", metavar="FOLDER", help="an empty or new folder; a fresh one under outputs/")
    add("--score-threshold", type=float, default=0.25, help="0…1, of objectness x P(class); 0.25")
    add("--iou-threshold", type=float, help="0…1, of suppression; the model's own, 0.45")
    add(
        "--tree-threshold",
        type=float,
        default=0.5,
        help="0…1, least P(class) of a name; 0.5",
    )
    add("--image-size", type=int, metavar="PX", help="a multiple of 32; the model's own")
    add(
        "--resize",
        choices=("letterbox", "stretch"),
        help="whole on grey, or each side by itself; as the model was trained",
    )
    add(
        "--classes",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="only these, each with all that lies below it; after the sources",
    )
    add("--start", type=float, metavar="S", help="of videos: seconds to skip")
    add("--duration", type=float, metavar="S", help="of videos: seconds to do")
    add("--batch-size", type=int, default=8, help="images at a time; 8; live sources: 1")
    add("--device", help="cpu, cuda, cuda:1 …; a GPU where there is one")
    add("--half", action="store_true", help="float16 on GPUs, bfloat16 on CPUs")
    add(
        "--format",
        nargs="+",
        action="extend",
        choices=("coco", "yolo", "csv"),
        help="detections.json, a text an image, detections.csv; coco; after the sources",
    )
    add("--no-pictures", action="store_true", help="write no annotated images and videos")
    add("--video-format", choices=("webm", "mp4"), default="webm", help="VP9 or H.264; webm")
    add("--no-fps-overlay", action="store_true", help="do not write frames a second on videos")
    add_options(parser.add_argument_group("straight from Darknet's files"), required=False)
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in ("score_threshold", "iou_threshold", "tree_threshold"):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}; allowed: 0 … 1")
    if options.batch_size < 1:
        raise InputError(f"--batch-size is {options.batch_size}; allowed: 1 or more")
    if options.start is not None and not options.start >= 0:
        raise InputError(f"--start is {options.start}; allowed: 0 seconds or more")
    if options.duration is not None and not options.duration > 0:
        raise InputError(f"--duration is {options.duration}; allowed: more than 0 seconds")


def _sources(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Return the checkpoint, if one is meant, and the sources."""
    from_darknet = options.cfg or options.layout or options.weights
    if from_darknet and not options.weights:
        raise InputError("--cfg and --layout need --weights FILE")
    if from_darknet:
        return None, list(options.places)
    if len(options.places) < 2:
        raise InputError("name a checkpoint, then images, videos, folders, a camera or a stream")
    return options.places[0], options.places[1:]


def _model(options: argparse.Namespace, checkpoint: str | None) -> "DetectorModule":
    """Return the detector, on its device, with the options that change how it predicts."""
    import torch

    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.loading import load, ready

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if checkpoint is not None:
        module, name = load(checkpoint, device), checkpoint
    else:
        from yolo_lightning.export.darknet import module_of

        imported = module_of(options)
        module, name = ready(imported.module, device), options.weights
        for note in imported.notes:
            print(note)
    if not isinstance(module, DetectorModule):
        raise InputError(f"{name}: holds a classifier; detect takes a detector")
    if options.iou_threshold is not None:
        module.iou_threshold = options.iou_threshold
    if options.resize is not None:
        module.hparams["resize"] = options.resize
    return module


def named_folder(output: str) -> Path:
    """Return a folder that somebody named to write to.

    Raises:
        InputError: it holds files, or is a file.
    """
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {output!r} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--output {output!r} holds files; nothing is overwritten: name another")
    return folder


@dataclass
class Done:
    """A batch on its way from the network to the files."""

    frames: list["Frame"]
    found: list[list["Detection"]]
    frames_per_second: float


@dataclass
class RunStats:
    """What was done, and how long each stage took.

    Attributes:
        frames, detections: how many.
        stopped: whether somebody ended it.
        network_s, writing_s: seconds that each stage worked; reading is told by `FrameReader`.
        started: when.
    """

    frames: int = 0
    detections: int = 0
    network_s: float = 0.0
    writing_s: float = 0.0
    stopped: bool = False
    started: float = field(default_factory=time.perf_counter)
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def count(self, frames: int, detections: int) -> float:
        """Add a batch; return frames per second over the last ones."""
        self.frames, self.detections = self.frames + frames, self.detections + detections
        now = time.perf_counter()
        since, before = self._recent[0] if self._recent else (self.started, 0)
        self._recent.append((now, self.frames))
        return (self.frames - before) / max(now - since, 1e-9)

    def summary(self, reading_s: float) -> str:
        """Return how many, how fast, and the average of each stage."""
        seconds, count = time.perf_counter() - self.started, max(1, self.frames)
        stages = (
            ("reading", reading_s), ("network", self.network_s), ("writing", self.writing_s),
        )  # fmt: skip
        each = ", ".join(f"{name} {1000 * value / count:.1f}" for name, value in stages)
        return (
            f"{self.frames} images, {self.detections} detections in {seconds:.1f} s: "
            f"{self.frames / seconds:.1f} a second\n"
            f"milliseconds an image, the stages beside each other: {each}"
        )


def _finder(module: "DetectorModule", options: argparse.Namespace) -> Any:
    """Return a function from a batch of frames to what is in each of them."""
    import numpy as np
    import torch

    nodes = None
    if options.classes:
        nodes = torch.tensor([module.tree.node(name, "--classes") for name in options.classes])
    device = module.device
    half = torch.float16 if device.type == "cuda" else torch.bfloat16

    @torch.inference_mode()
    def find(frames: "list[Frame]") -> "list[list[Detection]]":
        images = torch.from_numpy(np.stack([frame.fitted for frame in frames]))
        sizes = torch.tensor([frame.size_hw_orig for frame in frames])
        with torch.autocast(device.type, half, enabled=options.half):
            found = module.describe(
                images.permute(0, 3, 1, 2).to(device),
                sizes,
                options.score_threshold,
                options.tree_threshold,
            )
        if nodes is not None:
            found = [one.below(nodes, module.tree) for one in found]
        return [one.told(module.tree) for one in found]

    return find


def _outputs(folder: Path, module: "DetectorModule", options: argparse.Namespace) -> "list[Output]":
    from yolo_lightning.inference.writers import FORMATS, Pictures

    outputs: list[Output] = []
    for name in dict.fromkeys(options.format):
        outputs.append(FORMATS[name](folder, module.tree))
    if not options.no_pictures:
        suffix = f".{options.video_format}"
        outputs.append(Pictures(folder, module.tree, suffix, not options.no_fps_overlay))
    return outputs


def run(
    batches: "Iterator[list[Frame]]", find: Any, outputs: "Sequence[Output]", reading: "FrameReader"
) -> RunStats:
    """Find objects in every batch and write them; reading, network and writing overlap.

    What was done is kept whatever ends it: an interrupt, which ends cameras, or an error.

    Args:
        batches: of frames.
        find: from a batch to what is in each frame.
        outputs: what is written.
        reading: knows how many frames there are.
    """
    from yolo_lightning.inference.sources import BackgroundWriter, prefetch

    tally = RunStats()

    def write(done: Done) -> None:
        started = time.perf_counter()
        for frame, found in zip(done.frames, done.found, strict=True):
            for output in outputs:
                output.add(frame, found, done.frames_per_second)
        tally.writing_s += time.perf_counter() - started

    writing = BackgroundWriter(write, WRITE_BEHIND)
    try:
        for frames in prefetch(batches, READ_AHEAD):
            started = time.perf_counter()
            found = find(frames)
            tally.network_s += time.perf_counter() - started
            rate = tally.count(len(frames), sum(len(one) for one in found))
            writing.put(Done(frames, found, rate))
            _show(tally.frames, reading.expected, rate)
    except KeyboardInterrupt:
        tally.stopped = True
        print("\nstopped; what was done is kept", file=sys.stderr)
    finally:
        try:
            writing.close()
        finally:
            for output in outputs:
                output.close()
    return tally


def _show(done: int, total: int | None, rate: float) -> None:
    """Show progress where somebody looks."""
    if sys.stderr.isatty():
        bar = f"{done} frames"
        if total:
            full = min(_BAR, done * _BAR // total)
            bar = f"[{'#' * full}{'.' * (_BAR - full)}] {done} of {total}"
        print(f"\r{bar}, {rate:.1f} a second   ", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    """Detect.

    Raises:
        InputError: a bad option or model, and what could not be read, after all else is done.
    """
    options = _parser().parse_intermixed_args(list(argv))
    options.format = options.format or ["coco"]
    _check(options)
    checkpoint, sources = _sources(options)
    folder = named_folder(options.output) if options.output is not None else None

    from yolo_lightning.inference.sources import FrameReader, in_batches, places_in

    places = places_in(sources)
    still = all(place.kind == "image" for place in places)
    if still and (options.start is not None or options.duration is not None):
        raise InputError("--start and --duration cut videos; there are only images")
    module = _model(options, checkpoint)
    size_hw = module.size_hw(options.image_size)
    find = _finder(module, options)
    if folder is None:
        from yolo_lightning.cli.runs import numbered_folder

        folder = numbered_folder(Path("outputs"), "detect")
    reading = FrameReader(
        size_hw,
        module.hparams["resize"],
        options.start or 0.0,
        options.duration,
        whole_images=not options.no_pictures,
        failures=[],
    )
    batches = in_batches(reading.frames(places), options.batch_size)
    outputs = _outputs(folder, module, options)
    # who is told to stop keeps what was done, as after Ctrl-C
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        tally = run(batches, find, outputs, reading)
    except OSError as error:
        said = f"{folder}: cannot be written ({error.strerror or error})"
        raise InputError("\n  ".join([said, *reading.failures])) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    if tally.frames:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # below the progress
        print(tally.summary(reading.seconds))
        print(f"written to {folder}")
    elif options.output is None:
        folder.rmdir()
    if tally.stopped and any(place.kind != "live" for place in places):
        raise SystemExit(STOPPED)
    if reading.failures:
        raise InputError("not read, or not to the end:\n  " + "\n  ".join(reading.failures))
