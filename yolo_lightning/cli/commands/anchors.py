"""`yolo-lightning anchors`: anchors from the boxes of a dataset, and how well they match."""

import argparse
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from yolo_lightning.errors import InputError
from yolo_lightning.models.anchors import (
    CELL_PX,
    MAX_CLUSTERS,
    as_yaml_values,
    average_iou,
    cluster,
    elbow,
    hand_picked,
    letterboxed_wh,
    shorter_side_wh,
)
from yolo_lightning.visualization.figures import (
    AnchorsPicture,
    ElbowCurve,
    save_anchors,
    save_elbow,
)

KEYS = ("model", "init_args", "anchors_wh_cell")
PAPER = {
    "sum-squared clusters, 5": 58.7,
    "IoU clusters, 5": 61.0,
    "hand-picked anchors, 9": 60.9,
    "IoU clusters, 9": 67.2,
}
"""Average IoU on VOC 2007, percent. Source: YOLO9000, table 1."""


@dataclass
class Shapes:
    """Widths and heights of the boxes of a dataset, and of the grid that they are learnt on.

    Attributes:
        boxes_wh_px: float (N, 2), px of the network input, letterboxed.
        boxes_wh_600: float (N, 2), px of images whose shorter side is 600 px.
        image_size: side of the network input, px.
        cell_px: side of a grid cell, px.
        anchors_wh_cell: float (A, 2), the anchors that a recipe has so far.
    """

    boxes_wh_px: NDArray[np.float64]
    boxes_wh_600: NDArray[np.float64]
    image_size: int
    cell_px: int = CELL_PX
    anchors_wh_cell: NDArray[np.float64] | None = None


def shapes_of(place: str, image_size: int | None = None, overrides: Sequence[str] = ()) -> Shapes:
    """Return the shapes of the training boxes of a recipe or a dataset.

    Args:
        place: a recipe, or a dataset's folder or file.
        image_size: side of the network input, px; by default the recipe's, 416 for a dataset.
        overrides: options of the recipe, such as ``--data.detection.root``.

    Raises:
        InputError: nothing there, no boxes, or an option of a recipe beside a dataset.
    """
    size, cell_px, anchors, stretched = 416, CELL_PX, None, False
    if is_recipe(place):
        from yolo_lightning.cli.data import DataCLI

        run = DataCLI([place, *overrides])
        data = run.datamodule
        if data.detection is None:
            raise InputError(f"{place}: names no data.detection, so it has no boxes")
        source, size, stretched = data.detection, data.image_size, data.resize == "stretch"
        source.bind(data.tree)
        cell_px, anchors = _grid_of(run.recipe.model.init_args)
    else:
        if overrides:
            raise InputError(f"{overrides[0]}: {place!r} is no recipe and has no such option")
        from yolo_lightning.datamodules.autodetect import detection_source

        source = detection_source(place)
        source.open()
    boxes, images = source.shapes_wh_px()
    if not len(boxes):
        raise InputError(f"{place}: has no boxes")
    size = image_size or size
    fitted = boxes / images * size if stretched else letterboxed_wh(boxes, images, size)
    return Shapes(fitted, shorter_side_wh(boxes, images), size, cell_px, anchors)


def _grid_of(model: Any) -> tuple[int, NDArray[np.float64] | None]:
    """Return the backbone's px per cell, and the anchors that a model's options name."""
    from yolo_lightning.models.backbones import backbone_layers
    from yolo_lightning.models.layers import extents

    backbone, values = model.get("backbone"), model.get("anchors_wh_cell")
    stride = extents(backbone_layers(backbone))[-1].stride if backbone else CELL_PX
    return stride, np.array(values, dtype=np.float64) if values else None


def is_recipe(place: str) -> bool:
    """Return whether something is a recipe: YAML with a class path under `data`.

    Raises:
        InputError: nothing there, or a file with the ending of YAML that is none.
    """
    path = Path(place).expanduser()
    if not path.exists():
        raise InputError(f"{place!r}: no such recipe or dataset (working folder: {Path.cwd()})")
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        return False
    return _member(_document(_text(path), path), ("data", "class_path")) is not None


def rows_of(
    shapes: Shapes, curve: Sequence[NDArray[np.float64]], num: int, restarts: int, seed: int
) -> dict[str, float]:
    """Return average IoUs in percent by what gave the anchors, those of the paper first.

    Args:
        shapes: of the boxes.
        curve: IoU clusters for 1, 2, … anchors.
        num: how many anchors were asked for.
        restarts: of the clustering by squared error.
        seed: of the clustering by squared error.
    """
    boxes = shapes.boxes_wh_px
    rows = {"hand-picked anchors, 9": 100 * average_iou(shapes.boxes_wh_600, hand_picked())}
    if len(curve) >= 5:
        squared = cluster(boxes, 5, restarts, seed, "squared_error")
        rows["sum-squared clusters, 5"] = 100 * average_iou(boxes, squared)
    for k in (5, 9, num):
        if k <= len(curve):
            rows[f"IoU clusters, {k}"] = 100 * average_iou(boxes, curve[k - 1])
    return rows


def table(rows: Mapping[str, float]) -> str:
    """Return average IoUs as text, with the paper's beside them where it has any."""
    lines = [
        f"{'average IoU with the closest anchor, %':<40}{'here':>6}{'VOC 2007 in the paper':>24}"
    ]
    for name in [*PAPER, *(name for name in rows if name not in PAPER)]:
        here = f"{rows[name]:.1f}" if name in rows else "-"
        paper = f"{PAPER[name]:.1f}" if name in PAPER else "-"
        lines.append(f"  {name:<38}{here:>6}{paper:>24}")
    return "\n".join(lines)


def write_anchors(path: Path, values: Sequence[Sequence[float]]) -> None:
    """Replace the anchors in a recipe; every byte around them stays.

    Args:
        path: of the recipe.
        values: width and height of each anchor, grid cells.

    Raises:
        InputError: no anchors there, or not as a plain list; the file stays as it is.
    """
    path = path.resolve()  # a link stays one
    text = _text(path)
    start, end = _place_of_anchors(text, path)
    pairs = [f"[{', '.join(map(repr, pair))}]" for pair in values]
    fresh = f"[{', '.join(pairs)}]"
    if text[start] == "-":  # a list of lines stays one
        column = start - text.rfind("\n", 0, start) - 1
        line_break = "\r\n" if "\r\n" in text else "\n"
        fresh = (line_break + " " * column).join(f"- {pair}" for pair in pairs)
    written = path.with_name(path.name + ".fresh")
    try:
        written.write_bytes((text[:start] + fresh + text[end:]).encode())
        shutil.copymode(path, written)
        os.replace(written, path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def _place_of_anchors(text: str, path: Path) -> tuple[int, int]:
    """Return where the list of anchors begins and ends, in characters."""
    where = f"{path}: {'.'.join(KEYS)}"
    node = _member(_document(text, path), KEYS)
    if node is None:
        raise InputError(f"{where}: no such key to write to; paste the line where it belongs")
    start, end = node.start_mark.index, _end(node)
    if not isinstance(node, yaml.SequenceNode):
        raise InputError(f"{where} is {text[start:end]!r}; --write replaces a list of [w, h] only")
    if set(text[start:end]) & set("#&*!$"):  # an alias leads to the text of its anchor
        raise InputError(
            f"{where} holds more than numbers (a comment, an anchor or a reference), which --write "
            "would lose; paste the line by hand"
        )
    return start, end


def _end(node: yaml.Node) -> int:
    """Return where a node's text ends: a block's own mark lies behind the comments after it."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # read_text would change line ends
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _document(text: str, path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def _member(node: yaml.Node | None, keys: Sequence[str]) -> yaml.Node | None:
    """Return what lies under these keys, None where one is missing."""
    for key in keys:
        pairs: list[Any] = node.value if isinstance(node, yaml.MappingNode) else []
        node = {name.value: value for name, value in pairs if isinstance(name.value, str)}.get(key)
    return node


def short_names(places: Sequence[str]) -> list[str]:
    """Return the last two parts of each path, or the whole paths where those are not unique."""
    names = ["/".join(Path(place).parts[-2:]) for place in places]
    return names if len(set(names)) == len(places) else list(places)


def examine(
    place: str, options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[Shapes, list[NDArray[np.float64]]]:
    """Cluster the boxes of one place and print what came out; return also the elbow's clusters."""
    shapes = shapes_of(place, options.image_size, overrides)
    boxes = shapes.boxes_wh_px
    grid = f"network input of {shapes.image_size} px, cells of {shapes.cell_px} px"
    print(f"{place}: {len(boxes)} boxes, {grid}", flush=True)
    curve = elbow(boxes, max(options.num, MAX_CLUSTERS), options.restarts, options.seed)
    if options.num > len(curve):
        raise InputError(
            f"{place}: --num is {options.num}; allowed: 1 … {len(curve)}, its distinct boxes"
        )
    rows = rows_of(shapes, curve, options.num, options.restarts, options.seed)
    if (present := shapes.anchors_wh_cell) is not None:
        rows[f"in the recipe, {len(present)}"] = 100 * average_iou(boxes, present * shapes.cell_px)
    print(table(rows), flush=True)
    return shapes, curve


def main(argv: Sequence[str]) -> None:
    """Print rows and anchors of every place, write them where asked to, and draw both pictures."""
    options, overrides = _parse(argv)
    recipe = Path(options.places[0]).expanduser()
    if options.write:  # refuse before the work
        if len(options.places) > 1 or not is_recipe(options.places[0]):
            given = ", ".join(options.places)
            raise InputError(f"--write fills in one recipe; given: {given}")
        _place_of_anchors(_text(recipe), recipe)
    curves, pictures = {}, {}
    for place, name in zip(options.places, short_names(options.places), strict=True):
        shapes, curve = examine(place, options, overrides)
        anchors = curve[options.num - 1]
        values = as_yaml_values(anchors / shapes.cell_px)
        print(f"\nanchors_wh_cell: {values}\n")
        ious = [average_iou(shapes.boxes_wh_px, some) for some in curve]
        curves[name] = ElbowCurve(ious, average_iou(shapes.boxes_wh_600, hand_picked()))
        pictures[name] = AnchorsPicture(anchors.tolist(), shapes.image_size, shapes.cell_px)
    if options.write:
        write_anchors(recipe, values)
        print(f"written into {recipe}")
    elbow_png, anchors_png = options.output / "elbow.png", options.output / "anchors.png"
    save_elbow(curves, options.num, elbow_png)
    save_anchors(pictures, anchors_png)
    print(f"pictures: {elbow_png}, {anchors_png}")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, checked, and those that are the recipe's."""
    parser = argparse.ArgumentParser(
        prog="yolo-lightning anchors",
        description="Cluster the shapes of training boxes into anchors.",
        epilog="Any other option goes to the recipe, such as --data.detection.root PATH.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "places", nargs="+", metavar="RECIPE", help="a recipe, or a dataset's folder or file"
    )
    parser.add_argument("--num", type=int, default=5, help="how many anchors (5)")
    parser.add_argument("--restarts", type=int, default=10, help="starts to choose from (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the starts (0)")
    parser.add_argument(
        "--image-size", type=int, metavar="PX", help="network input (the recipe's, else 416)"
    )
    parser.add_argument("--output", default="outputs/anchors", type=Path, help="folder of pictures")
    parser.add_argument("--write", action="store_true", help="put the anchors into the recipe")
    options, overrides = parser.parse_known_args(list(argv))
    options.places = list(dict.fromkeys(options.places))
    for name, least in (("num", 1), ("restarts", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} is {getattr(options, name)}; allowed: {least} or more")
    size = options.image_size
    if size is not None and (size < 1 or size % CELL_PX):
        raise InputError(f"--image-size is {size}; allowed: positive multiples of {CELL_PX}")
    return options, overrides
