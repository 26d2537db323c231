"""Labels that are not in the tree: left out on request, else named."""

import pytest

from tests.helpers.miniatures import FRUIT, LABELS, bind_source, build_folders, write
from yolo_lightning.datamodules import LabelCSV
from yolo_lightning.errors import InputError
from yolo_lightning.tree.wordtree import WordTree


@pytest.mark.parametrize("kind", LABELS)
def test_images_of_unknown_labels_can_be_left_out(tmp_path, kind):
    make = LABELS[kind](tmp_path)
    tree = WordTree.from_names(["pear", "banane"])
    with pytest.raises(InputError, match="'pomme' is not in the tree(?s:.*)skip_unknown: true"):
        make().bind(tree)
    source = bind_source(make(skip_unknown=True), tree)
    assert len(source) == 1
    assert source.name_counts() == {"banane": 1}
    assert source.node_counts() == {1: {"banane": 1}}
    assert source.read(0)[1] == 1
    whole = bind_source(make(), WordTree.from_names(["pomme", "banane"]))
    (kept,) = (k for k in range(2) if whole.read(k)[1] == 1)
    assert source.image_path(0) == whole.image_path(kept)
    assert source.fingerprint() != whole.fingerprint()
    expected = f"{source.name}: 1 images of 1 labels that are not in the tree, left out: pomme"
    assert source.faults == [expected]
    # another tree brings them back
    assert len(bind_source(source, WordTree.from_names(["pomme", "banane"]))) == 2
    assert source.fingerprint() == whole.fingerprint()
    assert source.faults == []


def test_a_tree_of_other_data_is_named(tmp_path):
    make = build_folders(tmp_path)
    with pytest.raises(InputError, match="none of its 2 labels is in the tree, such as banane"):
        make(skip_unknown=True).bind(WordTree.from_names(["car"]))
    with pytest.raises(InputError, match="label 'bnaana' is not in the tree"):  # not left out
        make(skip_unknown=True, mapping={"banane": "bnaana"}).bind(FRUIT)
    rows = [("n1", "-", "banane"), ("n2", "-", "banane"), ("n3", "-", "pomme")]
    with pytest.raises(InputError, match="label 'banane' is ambiguous"):
        make(skip_unknown=True).bind(WordTree(rows))


def test_only_some_of_many_unknown_labels_are_listed(tmp_path):
    table = "".join(f"{k}.jpg,class {k}\n" for k in range(50))
    for k in range(50):
        (tmp_path / f"{k}.jpg").touch()
    source = LabelCSV(str(write(tmp_path / "table.csv", table)))
    with pytest.raises(InputError, match="… and 30 more labels") as caught:
        source.bind(FRUIT)
    assert str(caught.value).count("is not in the tree") == 20
