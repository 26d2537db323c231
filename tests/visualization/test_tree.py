"""Plots of trees."""

from xml.etree import ElementTree

import cv2

from tests.helpers.paths import REPO
from yolo_lightning.cli.main import main
from yolo_lightning.tree.build import build_tree
from yolo_lightning.visualization.tree import layout_tree, visible_depth


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
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == len(names) + len(legend)
    places = [(c.get("cx"), c.get("cy")) for c in circles]
    assert len(set(places)) == len(places)
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
    drawing = layout_tree(tree, {}, visible_depth(tree, 300))
    assert len(drawing.dots) <= 300
    assert any("(+" in text[-1] for text in drawing.texts)
