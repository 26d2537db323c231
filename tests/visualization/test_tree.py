"""Plots of trees."""

import re
from itertools import combinations
from xml.etree import ElementTree

import cv2
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tests.helpers.paths import REPO
from yolo_lightning.cli.main import main
from yolo_lightning.tree.build import build_tree
from yolo_lightning.tree.wordtree import WordTree
from yolo_lightning.visualization.tree import layout_tree, plot_tree, visible_depth


def test_plots_show_every_node_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.yaml").write_text("thing:\n  car: [taxi, van]\n  cup:\nanimal: [cat]\n")
    (tmp_path / "boxes.names").write_text("car\ncat\n")
    (tmp_path / "labels.names").write_text("taxi\nvan\ncat\n")
    hierarchy = ["--hierarchy", "h.yaml", "--output", "tree.tsv"]
    assert main(["wordtree", "build", *hierarchy]) == 0
    data = ["--detection", "boxes.names", "--classification", "labels.names"]
    assert main(["wordtree", "plot", "tree.tsv", "--output", "t.svg", *data]) == 0
    assert "t.svg: 3 of 3 levels" in capsys.readouterr().out
    root = ElementTree.parse("t.svg").getroot()
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    names = ["thing", "animal", "car", "cup", "cat", "taxi", "van"]
    legend = ["boxes: 1", "image labels: 2", "both: 1", "neither: 3"]
    assert sorted(str(t) for t in texts) == sorted([*names, *legend])
    assert main(["wordtree", "plot", "tree.tsv", "--output", "t.png", "--depth", "1"]) == 0
    picture = cv2.imread("t.png")
    assert picture is not None
    assert (picture != 255).any(axis=2).mean() > 0.001
    assert main(["wordtree", "plot", "tree.tsv", "--output", "t.gif"]) == 2
    assert "allowed extensions: .svg, .png" in capsys.readouterr().err


def test_the_depth_of_plots_of_large_trees_is_limited():
    tree = build_tree((REPO / "recipes/trees/imagenet1k.wnids").read_text().split())
    assert visible_depth(tree) == tree.paths.shape[1]
    assert visible_depth(tree, 300) < tree.paths.shape[1]
    levels = (tree.paths >= 0).sum(dim=1)
    assert int((levels <= visible_depth(tree, 300)).sum()) <= 300
    layout = layout_tree(tree, visible_depth(tree, 300))
    assert len(layout.names) <= 300
    hidden = [
        int(number) for name in layout.names.values() for number in re.findall(r"\+(\d+)", name)
    ]
    assert len(layout.names) + sum(hidden) == len(tree)


def overlapping_texts(figure):
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    return [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]


def test_names_from_left_to_right_overlap_neither_each_other_nor_the_edge():
    tree = WordTree.from_file(REPO / "recipes/trees/shapes.tsv")
    layout = layout_tree(tree, 9)
    figure = plot_tree(layout, {0: "detection"}, {})
    assert not overlapping_texts(figure)
    assert len(figure.axes[0].texts) == len(tree)
    for text in figure.axes[0].texts:
        assert figure.bbox.contains(*text.get_window_extent().max)
    for node, shown in layout.children.items():  # parents amid their children
        rows = [layout.rows[child] for child in shown]
        assert not rows or layout.rows[node] == (min(rows) + max(rows)) / 2


def test_larger_trees_are_wheels_and_names_are_no_formulas():
    rows = [(f"n{k}", "-", f"$x_{k}") for k in range(101)]
    for count, shape in ((100, (False, 100)), (101, (True, 101))):
        figure = plot_tree(layout_tree(WordTree(rows[:count]), 1), {}, {})
        width, height = figure.get_size_inches()
        texts = figure.axes[0].texts
        assert (width == height, len(texts)) == shape
        assert not any(text.get_parse_math() for text in texts)
