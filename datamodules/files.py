"""Sources whose images are files: paths, folder listings, and reading by index."""

import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import time_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolo_lightning.batches import DetectionSample
from yolo_lightning.datamodules.index import Index, cache_file, load_fresh, save
from yolo_lightning.datamodules.source import DetectionSource, ImageLabelSource, Source, digest
from yolo_lightning.errors import InputError
from yolo_lightning.images import Header, Image, is_image, read_header, read_image
from yolo_lightning.tree.wordtree import WordTree


def require_folder(path: str | Path, description: str) -> Path:
    """Return a folder; raise `InputError` if it is missing."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"{description}: folder {str(path)!r} not found (working folder: {Path.cwd()})"
        )
    return folder


def require_file(path: str | Path, description: str) -> Path:
    """Return a file; raise `InputError` if it is missing."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(
            f"{description}: file {str(path)!r} not found (working folder: {Path.cwd()})"
        )
    return file


def is_below(path: str | Path, folder: Path) -> bool:
    """Return whether a path lies below a folder; symbolic links are not followed."""
    return os.path.normpath(path).startswith(os.path.join(os.path.normpath(folder), ""))


def resolve_inside(path: str, root: Path, allow_outside: bool, location: str) -> str:
    """Return an annotated path relative to the dataset's folder, or absolute if outside it.

    Raises:
        InputError: the path leads out of the folder and `allow_outside` is false.
    """
    # symbolic links are not followed: those in the dataset's folder belong to the dataset
    if ".." not in path and not os.path.isabs(path):
        return path
    absolute = os.path.normpath(os.path.join(root, path))
    if is_below(absolute, root):
        return os.path.relpath(absolute, os.path.normpath(root))
    if allow_outside:
        return absolute
    raise InputError(
        f"{location}: path {path!r} leaves the dataset's folder {str(root)!r}; to allow this, set "
        "allow_outside: true"
    )


def iter_images(folder: Path, watched: list[Path]) -> Iterator[Path]:
    """Yield the images in a folder and below it; append every folder listed to `watched`."""
    # follow links to folders once; skip hidden files and folders
    visited: set[str] = set()
    start = os.path.realpath(folder)
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited or (real != start and start.startswith(os.path.join(real, ""))):
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        watched.append(Path(parent))
        for name in sorted(names):
            if not name.startswith(".") and is_image(Path(name)):
                yield Path(parent) / name


class FolderListing:
    """Names of files by folder; each folder is listed once."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, None]] = {}
        self._images: dict[str, dict[str, str]] = {}

    def names(self, folder: Path) -> dict[str, None]:
        """Return the names in a folder, ascending, as keys; none if it cannot be listed."""
        key = str(folder)
        if key not in self._names:
            try:
                self._names[key] = dict.fromkeys(sorted(os.listdir(folder)))
            except OSError:
                self._names[key] = {}
        return self._names[key]

    def exists(self, path: Path) -> bool:
        """Return whether a file exists."""
        return path.name in self.names(path.parent)

    def find_image(self, folder: Path, stem: str) -> str | None:
        """Return the name of an image given without its suffix; .jpg is preferred."""
        key = str(folder)
        if key not in self._images:
            images = [name for name in self.names(folder) if is_image(Path(name))]
            images.sort(key=lambda name: not name.endswith(".jpg"))
            self._images[key] = {os.path.splitext(name)[0]: name for name in reversed(images)}
        return self._images[key].get(stem)

    @property
    def folders(self) -> list[Path]:
        """The folders listed so far."""
        return [Path(folder) for folder in self._names]


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
    def _parse(self) -> Index:
        """Parse the dataset."""

    def load_index(self) -> Index:
        """Return the index: from the cache if it is fresh, else by parsing. Needs no tree."""
        if self._index is None:
            root, options = self._cache_key()
            file = cache_file(root, {"source": type(self).__name__, **options})
            self._index = load_fresh(file) if file is not None else None
            if self._index is None:
                parsing_since_ns = time_ns()
                index = self._parse()
                self._index = save(index, file, parsing_since_ns) if file is not None else index
        return self._index

    def bind(self, tree: WordTree) -> None:
        """Load the index and map label names to nodes; see `Source.bind`."""
        metadata = self.load_index().metadata
        self.faults = list(metadata["faults"])
        if not len(self):
            hint = f": {self.faults[0]}" if self.faults else ""
            raise InputError(f"{self.name}: contains no images{hint}")
        counts, names = self.name_counts(), metadata["names"]
        origins = dict(zip(names, metadata["origins"], strict=True))
        used = {name: origins[name] for name in names if counts[name]}
        node_by_name = map_names_to_nodes(used, self.mapping, tree)
        self._nodes = np.array([node_by_name.get(name, -1) for name in names], dtype=np.int64)
        self._node_counts: dict[int, Counter[str]] = {}
        for name, node in node_by_name.items():
            self._node_counts.setdefault(node, Counter())[name] += counts[name]

    def name_counts(self) -> Counter[str]:
        """Return the number of objects, or images, by label name. Needs no tree."""
        index = self.load_index()
        names = index.metadata["names"]
        counts = np.bincount(index.arrays["classes"], minlength=len(names))
        return Counter(dict(zip(names, counts.tolist(), strict=True)))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.load_index().arrays["paths_offsets"]) - 1

    def node_counts(self) -> dict[int, Counter[str]]:
        """Return by node the number of objects, or images, of each label name."""
        return self._node_counts

    def fingerprint(self) -> str:
        """Return a hash of file names, labels and boxes; no image is read."""
        index = self.load_index()
        arrays = (part for name in sorted(index.arrays) for part in (name, index.arrays[name]))
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

    def read_header(self, index: int) -> Header:
        """Return size and format of an image without decoding it."""
        return read_header(self.image_path(index))


class AnnotatedImages(FileSource, DetectionSource):
    """A detection source whose images are files."""

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


def map_names_to_nodes(
    origins: Mapping[str, str], mapping: Mapping[str, str], tree: WordTree
) -> dict[str, int]:
    """Return the node of each label name; `origins` says where each name first occurs.

    Raises:
        InputError: names that are not in the tree, all of them in one message.
    """
    nodes: dict[str, int] = {}
    errors: list[str] = []
    for name, origin in origins.items():
        try:
            nodes[name] = tree.find_node(mapping.get(name, name), origin)
        except InputError as error:
            errors.append(str(error))
    if errors:
        raise InputError(
            "\n  ".join(errors) + "\n  add the missing labels to the tree, or map them to its "
            "nodes: mapping: {label: node} on the source"
        )
    return nodes
