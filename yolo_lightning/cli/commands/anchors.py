"""`yolo-lightning anchors`: cluster the boxes of a dataset into anchors."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from yolo_lightning.errors import (
    InputError,
    compose_yaml,
    expand,
    read_text,
    require_path,
    write_atomically,
)
from yolo_lightning.models.anchors import (
    CELL_PX,
    MAX_CLUSTERS,
    as_yaml_values,
    average_iou,
    cluster_anchors,
    cluster_for_each_count,
    faster_rcnn_anchors,
    released_anchors,
    scale_to_input,
    scale_to_shorter_side,
)
from yolo_lightning.visualization.figures import (
    AnchorPlot,
    ElbowCurve,
    save_anchor_plot,
    save_elbow_plot,
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
class BoxShapes:
    """Widths and heights of the boxes of a dataset, and the grid of the network."""

    boxes_wh_px: NDArray[np.float64]  # (N, 2), px of the network input
    boxes_wh_600: NDArray[np.float64]  # (N, 2), px of images whose shorter side is 600 px
    image_size: int  # side of the network input, px
    cell_px: int = CELL_PX
    anchors_wh_cell: NDArray[np.float64] | None = None  # (A, 2), those of the recipe


def load_box_shapes(
    source: str,
    image_size: int | None = None,
    overrides: Sequence[str] = (),
    allow_outside: bool = False,
) -> BoxShapes:
    """Return the shapes of the training boxes of a recipe or a dataset.

    The default image size is that of the recipe, or 416 px.

    Raises:
        InputError: `source` is missing, has no boxes, or is a dataset with options of a recipe.
    """
    size, cell_px, anchors, resize = 416, CELL_PX, None, "letterbox"
    if is_recipe(source):
        from yolo_lightning.cli.data import DataCLI

        cli = DataCLI([source, *overrides])
        data = cli.datamodule
        if data.detection is None:
            raise InputError(f"{source}: has no data.detection, so it has no boxes")
        dataset, size, resize = data.detection, data.image_size, data.resize
        dataset.bind(data.tree)
        cell_px, anchors = _grid(cli.recipe.model.init_args)
    else:
        if overrides:
            raise InputError(f"{overrides[0]}: {source!r} is no recipe, so it has no such option")
        from yolo_lightning.datamodules.autodetect import detection_source

        dataset = detection_source(source, allow_outside=allow_outside)
        dataset.load_index()
    boxes, images = dataset.shapes_wh_px()
    if not len(boxes):
        raise InputError(f"{source}: has no boxes")
    size = image_size or size
    fitted = scale_to_input(boxes, images, size, resize)
    return BoxShapes(fitted, scale_to_shorter_side(boxes, images), size, cell_px, anchors)


def _grid(model: Any) -> tuple[int, NDArray[np.float64] | None]:
    """Return px per cell of the backbone, and the anchors in the options of a model."""
    from yolo_lightning.models.backbones import backbone_layers
    from yolo_lightning.models.layers import layer_outputs

    backbone, values = model.get("backbone"), model.get("anchors_wh_cell")
    stride = layer_outputs(backbone_layers(backbone))[-1].stride if backbone else CELL_PX
    if isinstance(values, str):
        values = released_anchors(values, stride)
    return stride, np.array(values, dtype=np.float64) if values else None


def is_recipe(source: str) -> bool:
    """Return whether a path is a recipe: YAML with a class path under `data`.

    Raises:
        InputError: the path does not exist, or is an invalid YAML file.
    """
    path = require_path(source, "recipe or dataset")
    if path.suffix not in (".yaml", ".yml") or path.is_dir():
        return False
    return _find_node(compose_yaml(read_text(path), path), ("data", "class_path")) is not None


def average_iou_rows(
    shapes: BoxShapes, curve: Sequence[NDArray[np.float64]], num: int, restarts: int, seed: int
) -> dict[str, float]:
    """Return average IoUs in percent by kind and number of anchors.

    `curve` are IoU clusters for 1, 2, … anchors; restarts and seed are for squared error.
    """
    boxes = shapes.boxes_wh_px
    rows = {"hand-picked anchors, 9": 100 * average_iou(shapes.boxes_wh_600, faster_rcnn_anchors())}
    if len(curve) >= 5:
        squared = cluster_anchors(boxes, 5, restarts, seed, "squared_error")
        rows["sum-squared clusters, 5"] = 100 * average_iou(boxes, squared)
    for k in (5, 9, num):
        if k <= len(curve):
            rows[f"IoU clusters, {k}"] = 100 * average_iou(boxes, curve[k - 1])
    return rows


def table(rows: Mapping[str, float]) -> str:
    """Return average IoUs as text, next to those of the paper."""
    lines = [
        f"{'average IoU with the closest anchor, %':<40}{'here':>6}{'VOC 2007 in the paper':>24}"
    ]
    for name in [*PAPER, *(name for name in rows if name not in PAPER)]:
        here = f"{rows[name]:.1f}" if name in rows else "-"
        paper = f"{PAPER[name]:.1f}" if name in PAPER else "-"
        lines.append(f"  {name:<38}{here:>6}{paper:>24}")
    return "\n".join(lines)


def write_anchors(path: Path, values: Sequence[Sequence[float]]) -> None:
    """Replace the anchors, in grid cells, in a recipe, without any other change to the file.

    Raises:
        InputError: the recipe has no anchors, or not as a plain list; the file is unchanged.
    """
    path = path.resolve()  # keeps a symbolic link
    text = _read_text(path)
    start, end = _anchors_span(text, path)
    pairs = [f"[{', '.join(map(repr, pair))}]" for pair in values]
    new_text = f"[{', '.join(pairs)}]"
    if text[start] == "-":  # a block sequence remains one
        column = start - text.rfind("\n", 0, start) - 1
        line_break = "\r\n" if "\r\n" in text else "\n"
        new_text = (line_break + " " * column).join(f"- {pair}" for pair in pairs)
    write_atomically(path, text[:start] + new_text + text[end:])


def _anchors_span(text: str, path: Path) -> tuple[int, int]:
    """Return start and end of the list of anchors, in characters."""
    location = f"{path}: {'.'.join(KEYS)}"
    node = _find_node(_parse_yaml(text, path), KEYS)
    if node is None:
        raise InputError(f"{location}: no such key to write to; add the printed line by hand")
    start, end = node.start_mark.index, _end(node)
    if not isinstance(node, yaml.SequenceNode):
        raise InputError(
            f"{location} is {text[start:end]!r}; --write replaces a list of [w, h] only"
        )
    if set(text[start:end]) & set("#&*!$"):  # an alias has the position of its YAML anchor
        raise InputError(
            f"{location} contains more than numbers (a comment, a YAML anchor or a reference), "
            "which --write would lose; replace the line by hand"
        )
    return start, end


def _end(node: yaml.Node) -> int:
    """Return the end of a node's text; the mark of a block sequence is after later comments."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style and node.value:
        return _end(node.value[-1])
    return int(node.end_mark.index)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # read_text would change line endings
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None


def _parse_yaml(text: str, path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None


def _find_node(node: yaml.Node | None, keys: Sequence[str]) -> yaml.Node | None:
    """Return the node at a path of keys, or None."""
    for key in keys:
        pairs: list[Any] = node.value if isinstance(node, yaml.MappingNode) else []
        node = {name.value: value for name, value in pairs if isinstance(name.value, str)}.get(key)
    return node


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last two parts of each path, or whole paths if those are not unique."""
    names = ["/".join(Path(path).parts[-2:]) for path in paths]
    return names if len(set(names)) == len(paths) else list(paths)


def cluster_boxes(
    source: str, options: argparse.Namespace, overrides: Sequence[str]
) -> tuple[BoxShapes, list[NDArray[np.float64]]]:
    """Cluster the boxes of one source and print average IoUs; return shapes and clusters."""
    shapes = load_box_shapes(source, options.image_size, overrides, options.allow_outside)
    boxes = shapes.boxes_wh_px
    grid = f"network input of {shapes.image_size} px, cells of {shapes.cell_px} px"
    print(f"{source}: {len(boxes)} boxes, {grid}", flush=True)
    curve = cluster_for_each_count(
        boxes, max(options.num, MAX_CLUSTERS), options.restarts, options.seed
    )
    if options.num > len(curve):
        raise InputError(
            f"{source}: --num is {options.num}; allowed: 1 … {len(curve)}, its distinct boxes"
        )
    rows = average_iou_rows(shapes, curve, options.num, options.restarts, options.seed)
    if (present := shapes.anchors_wh_cell) is not None:
        rows[f"in the recipe, {len(present)}"] = 100 * average_iou(boxes, present * shapes.cell_px)
    print(table(rows), flush=True)
    return shapes, curve


def main(argv: Sequence[str]) -> None:
    """Print average IoUs and anchors of every source, and write anchors and plots."""
    options, overrides = _parse(argv)
    recipe = expand(options.sources[0])
    if options.write:  # check first
        if len(options.sources) > 1 or not is_recipe(options.sources[0]):
            sources = ", ".join(options.sources)
            raise InputError(f"--write needs one recipe; given: {sources}")
        _anchors_span(_read_text(recipe), recipe)
    curves, plots = {}, {}
    for source, name in zip(options.sources, short_names(options.sources), strict=True):
        shapes, curve = cluster_boxes(source, options, overrides)
        anchors = curve[options.num - 1]
        values = as_yaml_values(anchors / shapes.cell_px)
        print(f"\nanchors_wh_cell: {values}\n")
        ious = [average_iou(shapes.boxes_wh_px, clusters) for clusters in curve]
        curves[name] = ElbowCurve(ious, average_iou(shapes.boxes_wh_600, faster_rcnn_anchors()))
        plots[name] = AnchorPlot(anchors.tolist(), shapes.image_size, shapes.cell_px)
    if options.write:
        write_anchors(recipe, values)
        print(f"written into {recipe}")
    elbow_png, anchors_png = options.output / "elbow.png", options.output / "anchors.png"
    save_elbow_plot(curves, options.num, elbow_png)
    save_anchor_plot(plots, anchors_png)
    print(f"plots: {elbow_png}, {anchors_png}")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options, validated, and the options of the recipe."""
    parser = argparse.ArgumentParser(
        prog="yolo-lightning anchors",
        description="Cluster the widths and heights of training boxes into anchors.",
        epilog="Other options override values of the recipe, such as --data.detection.root PATH.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "sources", nargs="+", metavar="RECIPE", help="a recipe, or the folder or file of a dataset"
    )
    parser.add_argument("--num", type=int, default=5, help="number of anchors (5)")
    parser.add_argument(
        "--restarts", type=int, default=10, help="runs of k-means, of which the best is used (10)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of k-means (0)")
    parser.add_argument(
        "--image-size", type=int, metavar="PX", help="network input (that of the recipe, or 416)"
    )
    parser.add_argument(
        "--output", default="outputs/anchors", type=Path, help="folder for the plots"
    )
    parser.add_argument(
        "--allow-outside", action="store_true", help="let the dataset name files outside its folder"
    )
    parser.add_argument("--write", action="store_true", help="write the anchors to the recipe")
    options, overrides = parser.parse_known_args(list(argv))
    options.sources = list(dict.fromkeys(options.sources))
    for name, minimum in (("num", 1), ("restarts", 1), ("seed", 0)):
        if getattr(options, name) < minimum:
            raise InputError(f"--{name} is {getattr(options, name)}; allowed: {minimum} or more")
    size = options.image_size
    if size is not None and (size < 1 or size % CELL_PX):
        raise InputError(f"--image-size is {size}; allowed: positive multiples of {CELL_PX}")
    return options, overrides
