"""Writers for the results of `detect`: annotated images and videos, COCO JSON, YOLO text, CSV."""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolo_lightning.detections import Detection, DetectionList
from yolo_lightning.errors import csv_cell
from yolo_lightning.inference.sources import Frame, FrameSource
from yolo_lightning.inference.video_writer import VideoWriter
from yolo_lightning.tree.wordtree import WordTree
from yolo_lightning.visualization.drawing import draw_detections, draw_text, save_image

_MAX_JPEG_SIDE = 65_500  # px, limit of the format


class ResultWriter(ABC):
    """Base class: create the folder, and write the detections of frames, in order."""

    def __init__(self, folder: Path, tree: WordTree) -> None:
        self.folder, self.tree = folder, tree
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def write(self, frame: Frame, detections: Sequence[Detection], frame_rate: float) -> None:
        """Write the detections of a frame; `frame_rate` is the processing rate, frames/s."""

    def close(self) -> None:  # noqa: B027 (YOLO text needs none)
        """Complete the files; also called after an error or an interrupt."""


class AnnotatedMediaWriter(ResultWriter):
    """Write images and videos with boxes; `video_suffix` determines the codec."""

    def __init__(
        self, folder: Path, tree: WordTree, video_suffix: str, show_frame_rate: bool
    ) -> None:
        super().__init__(folder, tree)
        self.video_suffix, self.show_frame_rate = video_suffix, show_frame_rate
        self._video: VideoWriter | None = None
        self._source: FrameSource | None = None

    def write(self, frame: Frame, detections: Sequence[Detection], frame_rate: float) -> None:
        """Write an image, or append a frame to the video of its source."""
        image = draw_detections(frame.image, detections)
        if frame.source.kind == "image":
            suffix = ".jpg" if max(image.shape) <= _MAX_JPEG_SIDE else ".png"
            save_image(self.folder / f"{frame.source.output_name}{suffix}", image)
            return
        if self.show_frame_rate:
            draw_text(image, f"{frame_rate:.1f} frames/s")
        if self._video is None or frame.source != self._source:
            self.close()
            path = self.folder / f"{frame.source.output_name}{self.video_suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._video = VideoWriter(path, frame.size_hw_orig, frame.frames_per_second)
            self._source = frame.source
        self._video.write(image, frame.time_s)

    def close(self) -> None:
        """Complete the current video."""
        if self._video is not None:
            self._video.close()


class COCOWriter(ResultWriter):
    """Write one JSON file in COCO format, frame by frame, whose annotations have a score."""

    def __init__(self, folder: Path, tree: WordTree) -> None:
        super().__init__(folder, tree)
        self._images: list[dict[str, Any]] = []
        self._annotations = 0
        names = dict(zip(tree.keys, tree.names, strict=True))
        categories = [
            {"id": k + 1, "name": names[key], "key": key, "supercategory": names.get(parent, "")}
            for k, (key, parent, _) in enumerate(tree.rows)
        ]
        self._file = (folder / "detections.json").open("w", encoding="utf-8")
        self._file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')

    def write(self, frame: Frame, detections: Sequence[Detection], frame_rate: float) -> None:
        """Append the boxes of a frame."""
        height, width = frame.size_hw_orig
        image_id = len(self._images) + 1
        entry: dict[str, Any] = {
            "id": image_id,
            "file_name": frame.source.display_name,
            "width": width,
            "height": height,
        }
        if frame.source.kind != "image":
            entry |= {"frame": frame.index, "time_s": round(frame.time_s, 6)}
        self._images.append(entry)
        for result in DetectionList(detections).to_coco(image_id):
            self._annotations += 1
            area = round(result["bbox"][2] * result["bbox"][3], 3)
            row = {"id": self._annotations, **result, "area": area, "iscrowd": 0}
            self._file.write(f"{',' if self._annotations > 1 else ''}\n{json.dumps(row)}")

    def close(self) -> None:
        """Write the list of images and close the file."""
        with self._file:
            self._file.write(f'\n],\n"images": {json.dumps(self._images)}}}\n')


class YOLOWriter(ResultWriter):
    """Write one text file per frame: class, relative centre and size, score; and `classes.txt`."""

    def __init__(self, folder: Path, tree: WordTree) -> None:
        super().__init__(folder, tree)
        names = "".join(f"{name}\n" for name in tree.names)
        (folder / "classes.txt").write_text(names, encoding="utf-8")

    def write(self, frame: Frame, detections: Sequence[Detection], frame_rate: float) -> None:
        """Write the file of a frame; it is empty if there are no detections."""
        height, width = frame.size_hw_orig
        lines = []
        for detection in detections:
            box = np.array(detection.box_xyxy_orig_px) / [width, height, width, height]
            centre, size = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
            values = " ".join(f"{v:.6f}" for v in [*centre, *size, detection.score])
            lines.append(f"{detection.node} {values}\n")
        frame_part = "" if frame.source.kind == "image" else f"/{frame.index:06}"
        file = self.folder / "labels" / f"{frame.source.output_name}{frame_part}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), encoding="utf-8")


class CSVWriter(ResultWriter):
    """Write one table with a row per detection; corners in px of the original image."""

    HEADER = ("file", "frame", "time_s", "name", "key", "score", "x1", "y1", "x2", "y2")

    def __init__(self, folder: Path, tree: WordTree) -> None:
        super().__init__(folder, tree)
        self._file = (folder / "detections.csv").open(
            "w", encoding="utf-8", errors="backslashreplace", newline=""
        )
        self._table = csv.writer(self._file)
        self._table.writerow(self.HEADER)

    def write(self, frame: Frame, detections: Sequence[Detection], frame_rate: float) -> None:
        """Append the rows of a frame."""
        is_video = frame.source.kind != "image"
        position = (frame.index, f"{frame.time_s:.3f}") if is_video else ("", "")
        for detection in detections:
            corners = [f"{v:.3f}" for v in detection.box_xyxy_orig_px]
            texts = (frame.source.display_name, detection.name, detection.key)
            file, name, key = map(csv_cell, texts)
            score = f"{detection.score:.6f}"
            self._table.writerow([file, *position, name, key, score, *corners])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


FORMATS: dict[str, Callable[[Path, WordTree], ResultWriter]] = {
    "coco": COCOWriter,
    "yolo": YOLOWriter,
    "csv": CSVWriter,
}
