"""`yolo-lightning detect`: detect objects in images, videos and streams."""

import argparse
import contextlib
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from yolo_lightning.cli.arguments import CommandParser
from yolo_lightning.cli.commands.darknet import add_darknet_options
from yolo_lightning.errors import InputError, expand, printable

if TYPE_CHECKING:
    from yolo_lightning.detections import Detection
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.sources import Frame, FrameReader
    from yolo_lightning.inference.writers import ResultWriter
    from yolo_lightning.tree.wordtree import WordTree

PREFETCH_BATCHES, QUEUED_WRITES = 3, 3
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells
_RATE_WINDOW = 30


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="yolo-lightning detect",
        usage="yolo-lightning detect CHECKPOINT SOURCE… [options]\n"
        "       yolo-lightning detect --cfg F --weights F --data F SOURCE… [options]",
        description="Detect objects in images, videos and streams.",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="CHECKPOINT SOURCE",
        help="a detector checkpoint; images, videos, folders, globs, lists of paths (.txt), camera "
        "numbers, stream URLs",
    )
    add = parser.add_argument
    add("--output", metavar="FOLDER", help="empty or new folder (default: a new one in outputs/)")
    add(
        "--score-threshold",
        type=float,
        default=0.25,
        help="minimum score, objectness x P(class), 0…1 (default: 0.25)",
    )
    add(
        "--iou-threshold",
        type=float,
        help="of non-maximum suppression, 0…1 (default: the model's own, usually 0.45)",
    )
    add(
        "--tree-threshold",
        type=float,
        default=0.5,
        help="minimum P(class) to report a more specific class, 0…1 (default: 0.5)",
    )
    add("--image-size", type=int, metavar="PX", help="a multiple of 32 (default: the model's own)")
    add(
        "--resize",
        choices=("letterbox", "stretch"),
        help="keep the aspect ratio with grey borders, or not (default: as in training)",
    )
    add(
        "--interpolation",
        choices=("area", "darknet"),
        help="of resized images: averaging, or as the original program (default: the model's own)",
    )
    add(
        "--classes",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="report only these classes and their descendants; place it after the sources",
    )
    add("--start", type=float, metavar="S", help="seconds to skip at the start of videos")
    add("--duration", type=float, metavar="S", help="seconds of video to process")
    add("--batch-size", type=int, default=8, help="images per batch (default: 8; live sources: 1)")
    add("--device", help="cpu, cuda, cuda:1 … (default: a GPU if available)")
    add("--half", action="store_true", help="float16 on GPUs, bfloat16 on CPUs")
    add(
        "--format",
        nargs="+",
        action="extend",
        choices=("coco", "yolo", "csv"),
        help="detections.json, one text file per image, detections.csv (default: coco); place it "
        "after the sources",
    )
    add("--quiet", action="store_true", help="print no line for each image, and no progress bar")
    add("--no-pictures", action="store_true", help="write no annotated images and videos")
    add(
        "--video-format",
        choices=("webm", "mp4"),
        default="webm",
        help="VP9 or H.264 (default: webm)",
    )
    add("--no-fps-overlay", action="store_true", help="do not draw the frame rate on videos")
    add_darknet_options(parser.add_argument_group("Darknet files instead of a checkpoint"), False)
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


def _split_inputs(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Return the checkpoint, None with Darknet files, and the sources."""
    from_darknet = options.cfg or options.layout or options.weights
    if from_darknet and not options.weights:
        raise InputError("--cfg and --layout need --weights FILE")
    if from_darknet:
        return None, list(options.inputs)
    if len(options.inputs) < 2:
        raise InputError("name a checkpoint, then images, videos, folders, a camera or a stream")
    return options.inputs[0], options.inputs[1:]


def _load_detector(options: argparse.Namespace, checkpoint: str | None) -> "DetectorModule":
    """Load the detector on its device and apply the options that change its predictions."""
    from yolo_lightning.detector import DetectorModule
    from yolo_lightning.inference.loading import load, prepare_for_inference, select_device

    device = select_device(options.device)
    if checkpoint is not None:
        module, name = load(checkpoint, device), checkpoint
    else:
        from yolo_lightning.export.darknet import import_from_options

        imported = import_from_options(options)
        module, name = prepare_for_inference(imported.module, device), options.weights
        for note in imported.notes:
            print(printable(note))
    if not isinstance(module, DetectorModule):
        raise InputError(f"{name}: holds a classifier; detect takes a detector")
    if options.iou_threshold is not None:
        module.iou_threshold = options.iou_threshold
    if options.resize is not None:
        module.hparams["resize"] = options.resize
    if options.interpolation is not None:
        module.hparams["interpolation"] = options.interpolation
    return module


def check_output_folder(output: str) -> Path:
    """Return the folder of ``--output``, which must be empty or not exist yet."""
    folder = expand(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {output!r} is a file; expected a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--output {output!r} holds files; nothing is overwritten: name another")
    return folder


@dataclass
class RunStats:
    """Counts and time per stage; `FrameReader.reading_s` is the time of reading."""

    frames: int = 0
    detections: int = 0
    network_s: float = 0.0
    writing_s: float = 0.0
    interrupted: bool = False
    started: float = field(default_factory=time.perf_counter)
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RATE_WINDOW))

    def add_batch(self, frames: int, detections: int) -> float:
        """Count a batch; return the frames per second of the recent batches."""
        self.frames, self.detections = self.frames + frames, self.detections + detections
        now = time.perf_counter()
        since, before = self._recent[0] if self._recent else (self.started, 0)
        self._recent.append((now, self.frames))
        return (self.frames - before) / max(now - since, 1e-9)

    def summary(self, reading_s: float) -> str:
        """Return counts, speed, and the mean time of each stage."""
        seconds, count = time.perf_counter() - self.started, max(1, self.frames)
        stages = {"reading": reading_s, "network": self.network_s, "writing": self.writing_s}
        times = ", ".join(f"{name} {1000 * value / count:.1f}" for name, value in stages.items())
        return (
            f"{self.frames} images, {self.detections} detections in {seconds:.1f} s: "
            f"{self.frames / seconds:.1f} images/s\n"
            f"milliseconds per image, stages run in parallel: {times}"
        )


Predictor = Callable[[list["Frame"]], list[list["Detection"]]]
Show = Callable[[list["Frame"], list[list["Detection"]], float], None]  # of a batch, its seconds


def _make_predictor(module: "DetectorModule", options: argparse.Namespace) -> Predictor:
    """Return a function from a batch of frames to the detections of each frame."""
    import numpy as np
    import torch

    nodes = None
    if options.classes:
        asked = [module.tree.find_node(name, "--classes") for name in options.classes]
        nodes = module.tree.reported[asked]
    device = module.device
    half = torch.float16 if device.type == "cuda" else torch.bfloat16

    @torch.inference_mode()
    def predict(frames: "list[Frame]") -> "list[list[Detection]]":
        images = torch.from_numpy(np.stack([frame.network_input for frame in frames]))
        sizes = torch.tensor([frame.size_hw_orig for frame in frames])
        with torch.autocast(device.type, half, enabled=options.half):
            results = module.detect_most_specific(
                images.permute(0, 3, 1, 2).to(device),
                sizes,
                options.score_threshold,
                options.tree_threshold,
            )
        if nodes is not None:
            results = [detections.select_subtree(nodes, module.tree) for detections in results]
        return [detections.to_list(module.tree) for detections in results]

    return predict


def _make_writers(
    folder: Path, tree: "WordTree", options: argparse.Namespace
) -> "list[ResultWriter]":
    from yolo_lightning.inference.writers import FORMATS, AnnotatedMediaWriter

    writers = [FORMATS[name](folder, tree) for name in dict.fromkeys(options.format)]
    if not options.no_pictures:
        suffix, show_frame_rate = f".{options.video_format}", not options.no_fps_overlay
        writers.append(AnnotatedMediaWriter(folder, tree, suffix, show_frame_rate))
    return writers


def run(
    batches: "Iterator[list[Frame]]",
    predict: Predictor,
    make_writers: "Callable[[], Sequence[ResultWriter]]",
    show: Show,
) -> RunStats:
    """Detect, write and show batch by batch; reading, network and writing run in parallel."""
    from yolo_lightning.inference.sources import prefetch

    stats = RunStats()
    writers: list[ResultWriter] = []
    complete = True  # whether all batches before are written

    def write(frames: "list[Frame]", detections: "list[list[Detection]]", rate: float) -> None:
        nonlocal complete
        if not complete:
            return
        started, complete = time.perf_counter(), False
        if not writers:  # no files without a frame
            writers.extend(make_writers())
        for frame, found in zip(frames, detections, strict=True):
            for writer in writers:
                writer.write(frame, found, rate)
        stats.writing_s += time.perf_counter() - started
        complete = True

    pending: deque[Future[None]] = deque()
    try:
        with ThreadPoolExecutor(max_workers=1) as executor:  # completes what it was given
            for frames in prefetch(batches, PREFETCH_BATCHES):
                started = time.perf_counter()
                detections = predict(frames)
                seconds = time.perf_counter() - started
                stats.network_s += seconds
                rate = stats.add_batch(len(frames), sum(len(found) for found in detections))
                pending.append(executor.submit(write, frames, detections, rate))
                if len(pending) > QUEUED_WRITES:
                    pending.popleft().result()
                show(frames, detections, seconds)
    except KeyboardInterrupt:  # the usual end of a camera
        stats.interrupted = True
        print("\ninterrupted; the results so far are written", file=sys.stderr)
    finally:
        with contextlib.ExitStack() as stack:  # closes all, also after an error
            for writer in writers:
                stack.callback(writer.close)
    for future in pending:
        future.result()
    return stats


@contextlib.contextmanager
def _display(reader: "FrameReader", only_images: bool, quiet: bool) -> "Iterator[Show]":
    """Return a function that shows each batch: a line an image, or a progress bar of frames."""
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

    hidden = quiet or only_images or not sys.stderr.isatty()
    with Tqdm(desc="frames", leave=False, dynamic_ncols=True, miniters=1, disable=hidden) as bar:

        def show(frames: "list[Frame]", results: "list[list[Detection]]", seconds: float) -> None:
            bar.total = reader.frame_count
            bar.update(len(frames))
            if only_images and not quiet:
                for frame, found in zip(frames, results, strict=True):
                    print(_line(frame, found, seconds / len(frames)), flush=True)

        yield show


def _line(frame: "Frame", found: "list[Detection]", seconds: float) -> str:
    counts = Counter(detection.name for detection in found)
    objects = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    name = frame.source.display_name
    return printable(f"{name}: {objects or 'nothing found'}, {1000 * seconds:.1f} ms")


def main(argv: Sequence[str]) -> None:
    """Run `detect`; unreadable sources raise `InputError` after all others are done."""
    options = _parser().parse_intermixed_args(list(argv))
    options.format = options.format or ["coco"]
    _check(options)
    checkpoint, locations = _split_inputs(options)
    folder = check_output_folder(options.output) if options.output is not None else None

    from yolo_lightning.inference.sources import FrameReader, batched, find_sources

    sources = find_sources(locations)
    only_images = all(source.kind == "image" for source in sources)
    if only_images and (options.start is not None or options.duration is not None):
        raise InputError("--start and --duration apply to videos; there are only images")
    module = _load_detector(options, checkpoint)
    size_hw = module.input_size_hw(options.image_size)
    predict = _make_predictor(module, options)
    if folder is None:
        from yolo_lightning.cli.runs import make_numbered_folder

        folder = make_numbered_folder(Path("outputs"), "detect")
    reader = FrameReader(
        size_hw,
        module.hparams["resize"],
        options.start or 0.0,
        options.duration,
        full_resolution=not options.no_pictures,
        errors=[],
        interpolation=module.hparams["interpolation"],
    )
    batches = batched(reader.frames(sources), options.batch_size)
    # SIGTERM also keeps the results so far, as Ctrl-C does
    previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _display(reader, only_images, options.quiet) as show:
            stats = run(batches, predict, lambda: _make_writers(folder, module.tree, options), show)
    except OSError as error:
        message = f"{folder}: cannot be written ({error.strerror or error})"
        raise InputError("\n  ".join([message, *reader.errors])) from None
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    if stats.frames:
        print(stats.summary(reader.reading_s))
        print(f"written to {folder}")
    elif options.output is None:
        folder.rmdir()
    if stats.interrupted and any(source.kind != "live" for source in sources):
        raise SystemExit(EXIT_INTERRUPTED)
    if reader.errors:
        raise InputError("not read, or not to the end:\n  " + "\n  ".join(reader.errors))
