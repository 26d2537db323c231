"""The rehearsal of YOLO9000 at its true size, with little data."""

import numpy as np
import pytest

from tests.benchmarks import rehearsal
from tests.benchmarks.rehearsal_data import coco_names, tree_rows
from tests.benchmarks.rehearsal_estimate import Stage, hours
from tests.benchmarks.rehearsal_report import END, HEADING, START, write_section
from yolo_lightning import WordTree


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_rehearsal_with_little_data_passes_its_checks(tmp_path, capsys):
    assert rehearsal.main(["--quick", "--folder", str(tmp_path)]) == 0
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.count(HEADING) == 1
    assert HEADING in capsys.readouterr().out
    assert "0 differ in sample ids" in page


def test_tree_of_the_rehearsal_has_the_shape_of_the_authors_tree():
    tree = WordTree(tree_rows(np.random.default_rng(0)))
    assert len(tree) == 9418
    assert len(tree.leaves) == 7573
    assert tree.num_groups == 1846
    assert tree.groups.bincount().max() == 149
    assert tree.paths.shape[1] == 17
    assert (tree.parents < 0).sum() == 4
    names = [tree.find_node(name) for name in coco_names()]
    assert len(set(names)) == 80
    assert sum(bool(tree.children(node)) for node in names) == 44


def test_section_of_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\ntext\n")
    write_section(page, "old")
    page.write_text(page.read_text() + "\nafter\n")
    write_section(page, "new\n\nlines")
    assert page.read_text() == f"# Page\n\ntext\n\n{START}\nnew\n\nlines\n{END}\n\nafter\n"


def test_hours_of_an_estimate():
    stage = Stage("", images=3_600_000, operations=1e9)
    # 3 passes x 1e9 x 1,000 images a second, of 20 % of the peak; several reach 90 % of their sum
    assert hours(stage, peak=15e12, gpus=1) == pytest.approx(1)
    assert hours(stage, peak=15e12, gpus=10) == pytest.approx(1 / 9)
