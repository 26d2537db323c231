"""Sources whose images are files: an index of their annotations, and reading by number."""

from abc import abstractmethod
from collections import Counter
from pathlib import Path
from time import time_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules.index import Index, cache_file, load_fresh, save
from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource, Source, digest
from yolo_lightning.errors import InputError
from yolo_lightning.images import Image, read_image
from yolo_lightning.tree.wordtree import WordTree


class FileSource(Source):
    """A source whose images are files; subclasses find and parse their annotations."""

    def __init__(self, mapping: dict[str, str] | None) -> None:
        self.mapping = dict(mapping or {})
        self.faults = []
        self._index: Index | None = None

    @abstractmethod
    def _cache_key(self) -> tuple[Path, dict[str, Any]]:
        """Return the dataset's folder, and the options that its index depends on."""

    @abstractmethod
    def _parse(self, root: Path) -> Index:
        """Parse the dataset in this folder."""

    def load_index(self) -> Index:
        """Return the index: from the cache if it is fresh, else by parsing. Needs no tree."""
        if self._index is None:
            root, options = self._cache_key()
            file = cache_file(root, {"source": type(self).__name__, **options})
            self._index = load_fresh(file) if file is not None else None
            if self._index is None:
                parsing_since_ns = time_ns()
                index = self._parse(root)
                self._index = save(index, file, parsing_since_ns) if file is not None else index
        return self._index

    def bind(self, tree: WordTree) -> None:
        """Load the index and map label names to nodes; see `Source.bind`."""
        metadata = self.load_index().metadata
        self.faults = list(metadata["faults"])
        if not len(self):
            hint = f": {self.faults[0]}" if self.faults else ""
            raise InputError(f"{self.name}: contains no images{hint}")
        counts, errors = self.name_counts(), []
        learned = np.bincount(self._learned_classes(), minlength=len(counts)).tolist()
        self._nodes = np.full(len(counts), -1, dtype=np.int64)
        self._node_counts: dict[int, Counter[str]] = {}
        for number, (name, origin) in enumerate(
            zip(metadata["names"], metadata["origins"], strict=True)
        ):
            if not counts[name]:
                continue
            try:
                node = tree.find_node(self.mapping.get(name, name), origin)
            except InputError as error:
                errors.append(str(error))
                continue
            self._nodes[number] = node
            if learned[number]:
                self._node_counts.setdefault(node, Counter())[name] += learned[number]
        if errors:
            raise InputError(
                "\n  ".join(errors) + "\n  add the missing labels to the tree, or map them to its "
                "nodes: mapping: {label: node} on the source"
            )

    def name_counts(self) -> Counter[str]:
        """Return the number of objects, or images, by label name. Needs no tree."""
        index = self.load_index()
        names = index.metadata["names"]
        counts = np.bincount(index.arrays["classes"], minlength=len(names))
        return Counter(dict(zip(names, counts.tolist(), strict=True)))

    def _learned_classes(self) -> NDArray[np.int64]:
        """Return the number of the label name of each object, or image, that is trained on."""
        return self.load_index().arrays["classes"]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.load_index().arrays["paths_offsets"]) - 1

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return by node the number of objects, or images, of each label name; see `Source`."""
        return self._node_counts

    def fingerprint(self) -> str:
        """Return a hash of file names, labels and boxes; no image is read."""
        index = self.load_index()
        arrays = (part for item in sorted(index.arrays.items()) for part in item)
        return digest(list(index.metadata["names"]), *arrays)

    def image_path(self, index: int) -> Path:
        """Return the path of an image."""
        dataset = self.load_index()
        start, end = dataset.arrays["paths_offsets"][index : index + 2]
        encoded = bytes(dataset.arrays["paths"][start:end])
        return Path(dataset.metadata["root"]) / encoded.decode("utf-8", "surrogateescape")

    def image_name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.image_path(index))


class AnnotatedImages(FileSource, DetectionSource):
    """A detection source whose images are files."""

    def __init__(self, mapping: dict[str, str] | None, exclusive_names: bool = True) -> None:
        super().__init__(mapping)
        self.exclusive_names = exclusive_names

    @property
    def exclusive_nodes(self) -> list[int]:
        """The nodes of all names that occur, unless ``exclusive_names`` is false."""
        return sorted(set(self._nodes[self._nodes >= 0].tolist())) if self.exclusive_names else []

    def read(self, index: int, min_side: int | None = None) -> DetectionSample:
        """Return one sample, its boxes clipped to the image."""
        dataset = self.load_index()
        arrays, normalized = dataset.arrays, dataset.metadata["normalized"]
        path = self.image_path(index)
        image, (height, width) = read_image(path, min_side)
        start, end = arrays["box_offsets"][index : index + 2]
        boxes = np.array(arrays["boxes_xyxy"][start:end])
        annotated_wh = tuple(arrays["sizes_wh"][index].tolist())
        faults = []
        if all(annotated_wh) and annotated_wh != (width, height) and not normalized:
            faults.append(
                f"{path}: is {width} x {height}, but annotated as "
                f"{annotated_wh[0]} x {annotated_wh[1]}"
            )
        if normalized:
            boxes *= [width, height, width, height]
        boxes = boxes.clip(0, [width, height, width, height])
        valid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        if not valid.all():
            faults.append(f"{path}: {int((~valid).sum())} boxes outside it, skipped")
        scale = [image.shape[1] / width, image.shape[0] / height] * 2
        crowd = np.array(arrays["crowd"][start:end][valid])
        return DetectionSample(
            image,
            (boxes[valid] * scale).astype(np.float32),
            self._nodes[arrays["classes"][start:end]][valid],
            arrays["difficult"][start:end][valid] | crowd,
            faults,
            (height, width),
            crowd,
            arrays["areas_px2"][start:end][valid],
        )

    def _learned_classes(self) -> NDArray[np.int64]:
        arrays = self.load_index().arrays
        return arrays["classes"][~(arrays["difficult"] | arrays["crowd"])]

    def shapes_wh_px(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the sizes of boxes and of their images; no image is read."""
        index = self.load_index()
        arrays = index.arrays
        boxes = np.array(arrays["boxes_xyxy"][:, 2:] - arrays["boxes_xyxy"][:, :2])
        counts = np.diff(arrays["box_offsets"])
        sizes = np.repeat(arrays["sizes_wh"], counts, axis=0).astype(np.float32)
        if index.metadata["normalized"]:
            boxes *= sizes
        easy = ~(arrays["difficult"] | arrays["crowd"]) & (sizes > 0).all(axis=1)
        return boxes[easy], sizes[easy]


class LabelledImages(FileSource, ImageLabelSource):
    """An image-label source whose images are files."""

    def read(self, index: int, min_side: int | None = None) -> tuple[Image, int]:
        """Return one image and its node."""
        image, _ = read_image(self.image_path(index), min_side)
        return image, int(self._nodes[self.load_index().arrays["classes"][index]])
