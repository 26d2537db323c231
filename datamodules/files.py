"""Sources whose images are files: an index of their annotations, and reading by number."""

import copy
from abc import abstractmethod
from collections import Counter
from pathlib import Path
from time import time_ns
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules.index import Index, cache_file, keep_images, load_fresh, save
from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource, Source, digest
from yolo_lightning.errors import MAX_ANNOTATION_BYTES, InputError, read_text
from yolo_lightning.images import Image, read_image
from yolo_lightning.tree.wordtree import WordTree

_MAX_LABEL_ERRORS = 20


class FileSource(Source):
    """A source whose images are files; subclasses find and parse their annotations."""

    has_boxes = False
    allow_outside = False  # whether the dataset may name files outside its folder

    def __init__(self, mapping: dict[str, str] | None, skip_unknown: bool = False) -> None:
        self.mapping, self.skip_unknown = dict(mapping or {}), skip_unknown
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
            self._index = load_fresh(file, self.has_boxes) if file is not None else None
            if self._index is None:
                parsing_since_ns = time_ns()
                index = self._parse(root)
                # of 0.6 GB for 14 million images, which no rank reads again
                index.metadata["fingerprint"] = _fingerprint(index)
                self._index = save(index, file, parsing_since_ns) if file is not None else index
        return self._index

    def prepare(self) -> None:
        """Parse the dataset, unless the cache has a fresh index."""
        self.load_index()

    def bind(self, tree: WordTree) -> None:
        """Load the index and map label names to nodes; see `Source.bind`."""
        metadata = self.load_index().metadata
        self.faults = list(metadata["faults"])
        if not len(self):
            hint = f": {self.faults[0]}" if self.faults else ""
            raise InputError(f"{self.name}: contains no images{hint}")
        counts = self.name_counts()
        learned = np.bincount(self._learned_classes(), minlength=len(counts)).tolist()
        self._nodes = self._find_nodes(tree, counts)
        self._node_counts: dict[int, Counter[str]] = {}
        for node, name, number in zip(
            self._nodes.tolist(), metadata["names"], learned, strict=True
        ):
            if node >= 0 and number:
                self._node_counts.setdefault(node, Counter())[name] += number

    def _find_nodes(self, tree: WordTree, counts: Counter[str]) -> NDArray[np.int64]:
        """Return the node of each label name; -1 if it does not occur, or is left out."""
        metadata, wrong = self.load_index().metadata, []
        nodes = np.full(len(metadata["names"]), -1, dtype=np.int64)
        for number, name in enumerate(metadata["names"]):
            label = self.mapping.get(name, name)
            matches = tree.matching_nodes(label) if counts[name] else []
            if len(matches) == 1:
                nodes[number] = matches[0]
            elif counts[name] and (matches or name in self.mapping or not self.skip_unknown):
                wrong.append((label, metadata["origins"][number]))
        if wrong:
            raise InputError(f"{_label_errors(tree, wrong)}\n  {self._label_hint}")
        return nodes

    @property
    def _label_hint(self) -> str:
        return (
            "add the missing labels to the tree, or map them to its nodes: mapping: {label: node} "
            "on the source"
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
        return str(self.load_index().metadata["fingerprint"])

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
    """A detection source whose images are files.

    Args:
        mapping: nodes by label name.
        exclusive_names: see the sources.
        only: a text file that lists the images to use, one path a line, relative to the folder of
            the dataset (of the images, for COCO and tables); all by default.
        without: a text file that lists the images to leave out.
    """

    has_boxes = True

    def __init__(
        self,
        mapping: dict[str, str] | None,
        exclusive_names: bool = True,
        only: str | None = None,
        without: str | None = None,
    ) -> None:
        super().__init__(mapping)
        self.exclusive_names, self.only, self.without = exclusive_names, only, without

    def load_index(self) -> Index:
        """Return the index of the images that `only` and `without` leave; see `FileSource`."""
        if self._index is None:
            index = super().load_index()
            for file, is_kept in ((self.only, True), (self.without, False)):
                if file is not None:
                    index = _keep_listed(index, file, is_kept, self.name)
            self._index = index
        return self._index

    def with_list(self, only: str | None = None, without: str | None = None) -> Self:
        """Return a copy that is not bound, with these lists of images."""
        other = copy.copy(self)
        other.only, other.without, other.mapping = only, without, dict(self.mapping)
        other._index = None
        return other

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

    _kept: NDArray[np.int32] | None = None  # positions of the images in the index; None for all

    def bind(self, tree: WordTree) -> None:
        """Load the index, map label names to nodes, and leave out unknown ones; see `Source`."""
        self._kept = None
        super().bind(tree)
        classes, is_known = self.load_index().arrays["classes"], self._nodes >= 0
        keep = is_known[classes]
        if keep.all():
            return
        counts = self.name_counts()
        unknown = [name for name, known in zip(counts, is_known, strict=True) if not known]
        unknown = [name for name in unknown if counts[name]]
        if not keep.any():
            raise InputError(
                f"{self.name}: none of its {len(unknown):,} labels is in the tree, such as "
                f"{', '.join(unknown[:3])}; is it the tree of another dataset?"
            )
        self._kept = np.arange(len(classes), dtype=np.int32)[keep]
        self.faults = [
            f"{self.name}: {len(classes) - len(self._kept):,} images of {len(unknown):,} labels "
            f"that are not in the tree, left out: {', '.join(unknown[:3])}"
            + (" …" if len(unknown) > 3 else ""),
            *self.faults,
        ]

    @property
    def _label_hint(self) -> str:
        return f"{super()._label_hint}; skip_unknown: true leaves out their images"

    def __len__(self) -> int:
        """Return the number of images, without those left out."""
        return super().__len__() if self._kept is None else len(self._kept)

    def name_counts(self) -> Counter[str]:
        """Return the number of images by label name; once bound, without those left out."""
        counts = super().name_counts()
        if self._kept is None:
            return counts
        return Counter(
            {n: c for (n, c), k in zip(counts.items(), self._nodes, strict=True) if k >= 0}
        )

    def fingerprint(self) -> str:
        """Return a hash of file names and labels, and of which images are left out."""
        whole = super().fingerprint()
        return whole if self._kept is None else digest(whole, self._kept)

    def image_path(self, index: int) -> Path:
        """Return the path of an image."""
        return super().image_path(self._position(index))

    def _position(self, index: int) -> int:
        """Return the position of an image in the index."""
        return index if self._kept is None else int(self._kept[index])

    def read(self, index: int, min_side: int | None = None) -> tuple[Image, int]:
        """Return one image and its node."""
        image, _ = read_image(self.image_path(index), min_side)
        return image, int(self._nodes[self.load_index().arrays["classes"][self._position(index)]])


def _fingerprint(index: Index) -> str:
    arrays = (part for item in sorted(index.arrays.items()) for part in item)
    return digest(list(index.metadata["names"]), *arrays)


def _keep_listed(index: Index, file: str, is_kept: bool, name: str) -> Index:
    """Return the index of the images that a list names, or of all others."""
    lines = read_text(file, "list of images", max_bytes=MAX_ANNOTATION_BYTES).splitlines()
    listed = {line.strip() for line in lines} - {""}
    paths = [index.path(row) for row in range(len(index.arrays["paths_offsets"]) - 1)]
    missing = len(listed - set(paths))
    if missing == len(listed):  # without a line of it, which may be that of another file
        raise InputError(f"{file}: none of its {missing:,} lines is an image of {name}")
    selected = keep_images(index, np.array([(path in listed) == is_kept for path in paths]))
    if missing:
        fault = f"{file}: {missing:,} of {len(listed):,} lines are no images of {name}, skipped"
        selected.metadata["faults"] = [*selected.metadata["faults"], fault]
    selected.metadata["fingerprint"] = _fingerprint(selected)
    return selected


def _label_errors(tree: WordTree, labels: list[tuple[str, str]]) -> str:
    """Return why these labels, with the place of each, are no nodes; not all of a long list."""
    errors = []
    for label, origin in labels[:_MAX_LABEL_ERRORS]:  # a hint compares a label with all names
        try:
            tree.find_node(label, origin)
        except InputError as error:
            errors.append(str(error))
    if len(labels) > _MAX_LABEL_ERRORS:
        errors.append(f"… and {len(labels) - _MAX_LABEL_ERRORS:,} more labels")
    return "\n  ".join(errors)
