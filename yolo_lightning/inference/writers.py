"""What `detect` writes: annotated images and videos; COCO JSON, YOLO text, CSV."""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from yolo_lightning.detections import Detection
from yolo_lightning.inference.sources import Frame, Place
from yolo_lightning.inference.video import VideoWriter
from yolo_lightning.tree.wordtree import WordTree
from yolo_lightning.visualization.drawing import annotated, save, stamp

_MAX_JPEG_SIDE = 65_500


class Output(ABC):
    """Takes frames in their order; `close` makes what was done whole, however it ends.

    Args:
        folder: where its files go; made by the first one.
        tree: of the classes.
    """

    def __init__(self, folder: Path, tree: WordTree) -> None:
        self.folder, self.tree = folder, tree

    @abstractmethod
    def add(self, frame: Frame, found: Sequence[Detection], frames_per_second: float) -> None:
        """Write what was found in a frame."""

    @abstractmethod
    def close(self) -> None:
        """Finish its files."""


class Pictures(Output):
    """Images and videos with boxes and names.

    Args:
        folder: where they go.
        tree: of the classes.
        suffix: of videos, which says the codec.
        overlay: whether frames of videos show how many are done a second.
    """

    def __init__(self, folder: Path, tree: WordTree, suffix: str, overlay: bool) -> None:
        super().__init__(folder, tree)
        self.suffix, self.overlay = suffix, overlay
        self._video: VideoWriter | None = None
        self._place: Place | None = None

    def add(self, frame: Frame, found: Sequence[Detection], frames_per_second: float) -> None:
        """Write an image, or a video's next frame."""
        image = annotated(frame.image, found)
        if frame.place.kind == "image":
            # JPEG ends at 65,500 px a side
            suffix = ".jpg" if max(image.shape) <= _MAX_JPEG_SIDE else ".png"
            save(self.folder / f"{frame.place.name}{suffix}", image)
            return
        if self.overlay:
            stamp(image, f"{frames_per_second:.1f} frames/s")
        if frame.place != self._place:
            self.close()
            path = self.folder / f"{frame.place.name}{self.suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._video = VideoWriter(path, frame.size_hw_orig, frame.frames_per_second)
            self._place = frame.place
        assert self._video is not None
        self._video.write(image, frame.time_s)

    def close(self) -> None:
        """Finish the video."""
        if self._video is not None:
            self._video.close()
        self._video = None


class COCOFile(Output):
    """One JSON file in COCO's form: images, categories, and annotations with a score.

    Its `annotations` are a list of results as COCO's own tools load it; they are written as frames
    come, so that hours of video take little memory.
    """

    def __init__(self, folder: Path, tree: WordTree) -> None:
        super().__init__(folder, tree)
        self._file: IO[str] | None = None
        self._images: list[dict[str, Any]] = []
        self._count = 0

    def add(self, frame: Frame, found: Sequence[Detection], frames_per_second: float) -> None:
        """Write the boxes of a frame."""
        if self._file is None:
            self._file = self._begin()
        height, width = frame.size_hw_orig
        number = len(self._images) + 1
        entry: dict[str, Any] = {
            "id": number, "file_name": frame.place.shown, "width": width, "height": height,
        }  # fmt: skip
        if frame.place.kind != "image":
            entry |= {"frame": frame.number, "time_s": round(frame.time_s, 6)}
        self._images.append(entry)
        for one in found:
            x1, y1, x2, y2 = one.box_xyxy_orig_px
            box = [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)]
            self._count += 1
            row = {
                "id": self._count, "image_id": number, "category_id": one.node + 1, "bbox": box,
                "area": round(box[2] * box[3], 3), "iscrowd": 0, "score": round(one.score, 6),
            }  # fmt: skip
            self._file.write(f"{',' if self._count > 1 else ''}\n{json.dumps(row)}")

    def _begin(self) -> IO[str]:
        parents = [self.tree.rows[k][1] for k in range(len(self.tree))]
        names = dict(zip(self.tree.keys, self.tree.names, strict=True))
        categories = [
            {"id": k + 1, "name": name, "key": key, "supercategory": names.get(parent, "")}
            for k, (key, name, parent) in enumerate(
                zip(self.tree.keys, self.tree.names, parents, strict=True)
            )
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        file = (self.folder / "detections.json").open("w", encoding="utf-8")
        file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')
        return file

    def close(self) -> None:
        """Write the images, which end the file."""
        if self._file is not None:
            self._file.write(f'\n],\n"images": {json.dumps(self._images)}}}\n')
            self._file.close()
        self._file = None


class YOLOFiles(Output):
    """A text an image: class, centre and size relative to the image, score; `classes.txt`.

    Texts of a video's frames have a folder of their own.
    """

    def add(self, frame: Frame, found: Sequence[Detection], frames_per_second: float) -> None:
        """Write the boxes of a frame; an image where nothing was found gets an empty text."""
        folder = self.folder / "labels"
        if not (self.folder / "classes.txt").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            names = "".join(f"{name}\n" for name in self.tree.names)
            (self.folder / "classes.txt").write_text(names, encoding="utf-8")
        part = "" if frame.place.kind == "image" else f"/{frame.number:06}"
        height, width = frame.size_hw_orig
        lines = []
        for one in found:
            box = np.array(one.box_xyxy_orig_px) / [width, height, width, height]
            centre, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
            values = " ".join(f"{v:.6f}" for v in [*centre, *size, one.score])
            lines.append(f"{one.node} {values}\n")
        file = folder / f"{frame.place.name}{part}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), encoding="utf-8")

    def close(self) -> None:
        """Do nothing: every text is whole when it is written."""


class CSVFile(Output):
    """One table, a row for each detection."""

    HEAD = ("file", "frame", "time_s", "name", "key", "score", "x1", "y1", "x2", "y2")

    def __init__(self, folder: Path, tree: WordTree) -> None:
        super().__init__(folder, tree)
        self._file: IO[str] | None = None

    def add(self, frame: Frame, found: Sequence[Detection], frames_per_second: float) -> None:
        """Write the rows of a frame; corners in px of the original image."""
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / "detections.csv").open(
                "w", encoding="utf-8", errors="backslashreplace", newline=""
            )
            csv.writer(self._file).writerow(self.HEAD)
        moment = ("", "") if frame.place.kind == "image" else (frame.number, f"{frame.time_s:.3f}")
        rows = csv.writer(self._file)
        for one in found:
            corners = [f"{v:.3f}" for v in one.box_xyxy_orig_px]
            told = (one.name, one.key, f"{one.score:.6f}")
            rows.writerow([frame.place.shown, *moment, *told, *corners])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None


Format = Callable[[Path, WordTree], Output]

FORMATS: dict[str, Format] = {"coco": COCOFile, "yolo": YOLOFiles, "csv": CSVFile}
