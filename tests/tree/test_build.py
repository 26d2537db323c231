"""WordNet inside, what names mean, and the trees that come of it."""

import time
from pathlib import Path
from xml.etree import ElementTree

import cv2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.images import write_image
from tests.helpers.paths import REPO
from yolo_lightning.cli.main import main
from yolo_lightning.darknet.config import COCO_NAMES, VOC_NAMES
from yolo_lightning.errors import InputError
from yolo_lightning.tree.build import build
from yolo_lightning.tree.labels import resolve, reviewed, table_of
from yolo_lightning.tree.wordnet import LICENCE, TABLE, WordNet, wordnet
from yolo_lightning.tree.wordtree import WordTree
from yolo_lightning.visualization.tree import depth_for, layout

CAT, DOG, MOUSE, CRANE = "n02121808", "n02084071", "n03793489", "n02012849"


def test_wordnet_knows_words_hypernyms_and_glosses():
    table = wordnet()
    assert len(table) == 82_115
    assert table.lemmas(CAT)[:2] == ["domestic cat", "house cat"]
    assert table.hypernyms(CAT) == ["n02121620", "n01317541"]
    assert table.gloss(CAT) == "any domesticated member of the genus Felis"
    assert table.senses("Domestic_Cat") == [CAT]
    assert CRANE in table.senses("crane")
    assert table.senses("dog")[0] == DOG  # the most frequent one first
    assert table.senses("no such word") == []
    assert "raccoon" in table.nearest("rackoon")
    assert all(len(table.gloss(wnid)) <= 60 for wnid in table.wnids[::50])


def test_every_hypernym_is_there_and_leads_to_entity():
    table = wordnet()
    for wnid in table.wnids[::20]:
        path = [wnid]
        while table.hypernyms(path[-1]):
            path.append(table.hypernyms(path[-1])[0])
        assert path[-1] == "n00001740"


def test_the_table_is_small_quick_and_licensed():
    assert TABLE.stat().st_size < 3_000_000
    started = time.process_time()
    WordNet(["1\n2", "\n1", "a\nb", "x\ny"])
    wordnet.cache_clear()
    wordnet()
    assert time.process_time() - started < 2  # measured: 0.2 s; this only guards the order
    assert "Princeton University" in LICENCE.read_text()
    assert "provided that you agree to comply" in LICENCE.read_text()


def test_coco_voc_and_imagenet_detection_resolve_out_of_the_box():
    coco, voc = resolve(COCO_NAMES), resolve(VOC_NAMES)
    assert (len(set(coco.values())), len(set(voc.values()))) == (80, 20)
    assert coco["mouse"] == MOUSE
    assert set(voc.values()) <= set(coco.values())
    det = resolve(reviewed()["ilsvrc_det"])
    assert len(set(det.values())) == 200
    # the authors' maps have 38 of them in common with COCO
    assert len(set(det.values()) & set(coco.values())) == 38
    for table in reviewed().values():
        assert all(wnid in wordnet() for wnid in table.values())


def test_a_few_names_of_a_dataset_are_not_the_dataset():
    assert table_of(COCO_NAMES) == "coco"
    assert table_of(VOC_NAMES) == "voc"
    assert table_of(["mouse", "zebra"]) is None
    hint = rf"several things.*\(of the reviewed tables: coco {MOUSE}; --table coco takes it\):"
    with pytest.raises(InputError, match=hint):
        resolve(["mouse", "zebra"])
    assert resolve(["mouse", "zebra"], table="coco")["mouse"] == MOUSE
    assert resolve(["mouse"], {"mouse": "computer mouse"}) == {"mouse": MOUSE}


def test_all_trouble_is_told_at_once():
    with pytest.raises(InputError) as caught:
        resolve(["crane", "rackoon", "n99999999", "zebra"], where=lambda name: "birds")
    text = str(caught.value)
    assert text.startswith("birds: 'crane' means several things")
    assert f"{CRANE} crane: large long-necked wading bird" in text
    assert "birds: 'rackoon' is no noun of WordNet 3.0; did you mean" in text
    assert "'n99999999': n99999999 is no noun" in text
    assert "zebra" not in text


def test_nodes_with_a_single_child_go_unless_they_are_labels():
    tree = build([CAT, DOG, "n02123045"])  # domestic cat, dog, tabby
    assert tree.rows == [
        ("n01317541", "-", "domestic animal"), (DOG, "n01317541", "dog"),
        (CAT, "n01317541", "domestic cat"), ("n02123045", CAT, "tabby"),
    ]  # fmt: skip


def test_one_path_comes_first_then_the_shortest_addition():
    # a dog has two hypernyms, canine and domestic animal; alone the first wnid of equal ones wins
    wolf, dog = "n02114100", DOG
    by_wolf = build([wolf, dog])  # wolf has one path, over canine: dog joins it there
    assert by_wolf.keys[0] == "n02083346"  # canine
    assert set(by_wolf.keys) == {"n02083346", wolf, dog}
    assert build([dog]).keys == (dog,)


IN1K = (REPO / "tests/golden/imagenet1k.wnids").read_text().split()


def test_imagenet_1k_has_the_paper_s_size_in_any_order():
    started = time.process_time()
    tree = build(IN1K)
    assert time.process_time() - started < 10  # measured: 0.5 s
    assert abs(len(tree) - 1369) <= 5
    assert len(tree.leaves) == 1000
    assert build(IN1K[::-1]).rows == tree.rows
    parents = tree.parents.tolist()
    assert all(parent < node for node, parent in enumerate(parents))  # as Darknet needs it
    singles = [p for p in set(parents) if parents.count(p) == 1 and p >= 0]
    assert {tree.keys[p] for p in singles} <= set(IN1K)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(IN1K), min_size=1, max_size=12), st.randoms())
def test_any_labels_make_a_tree_that_holds_them(labels, shuffle):
    tree = build(labels)
    assert set(labels) <= set(tree.keys)
    again = list(labels)
    shuffle.shuffle(again)
    assert build(again).rows == tree.rows
    table = wordnet()

    def above(wnid: str) -> set[str]:
        return {wnid}.union(*(above(up) for up in table.hypernyms(wnid)))

    for key, parent, _ in tree.rows:
        assert parent == "-" or parent in above(key) - {key}


def test_classes_of_ones_own_hang_where_they_are_put():
    tree = build(
        ["bengal", "toaster"], {"bengal": CAT, "toaster": "kitchen", "kitchen": "-"},
        {"bengal": "Bengal cat"},
    )  # fmt: skip
    # domestic cat has one child, but was named
    assert tree.rows == [
        ("kitchen", "-", "kitchen"), (CAT, "-", "domestic cat"),
        ("toaster", "kitchen", "toaster"), ("bengal", CAT, "Bengal cat"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "own", "root", "message"),
    [
        (["x"], {}, "n00001740", "class 'x' has no place"),
        ([], {"a": "b", "b": "a"}, "n00001740", "a cycle of parents: a under b under a"),
        ([], {"a": "b"}, "n00001740", "hangs under 'b', which has no parent itself"),
        (["n00001741"], {}, "n00001740", "'n00001741' is no noun synset"),
        (["n06794110"], {}, "n00001930", "does not lie below the root"),
        ([CAT], {}, "n00000001", "root 'n00000001' is no noun synset"),
    ],
)
def test_what_makes_no_tree_is_refused(labels, own, root, message):
    with pytest.raises(InputError, match=message):
        build(labels, own, root=root)


# --- the command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


BUILD = ["wordtree", "build", "--output", "tree.tsv"]


def built(*argv: str) -> list[tuple[str, str, str]]:
    assert main([*BUILD, *argv]) == 0
    return WordTree.read("tree.tsv").rows


def test_build_joins_boxes_labels_and_classes_of_ones_own(place, write_voc, capsys):
    write_voc(place / "boxes", "a", [("cat", 1, 1, 9, 9), ("cat", 1, 1, 5, 5)])
    write_voc(place / "boxes", "b", [("dog", 1, 1, 9, 9)])
    for name in ("bengal", "pug"):
        write_image(place / "images" / name / "1.png")
    (place / "own.yaml").write_text("bengal: domestic cat\n")
    (place / "map.yaml").write_text(f"cat: domestic cat\ndog: {DOG}\npug: n02110958\n")
    data = ["--detection", "boxes", "--classification", "images"]
    rows = built(*data, "--hierarchy", "own.yaml", "--mapping", "map.yaml")
    assert rows == [
        ("n01317541", "-", "domestic animal"), (DOG, "n01317541", "dog"),
        (CAT, "n01317541", "cat"), ("n02110958", DOG, "pug"), ("bengal", CAT, "bengal"),
    ]  # fmt: skip
    assert "tree.tsv: 5 nodes, 2 leaves, 4 groups, 3 levels" in capsys.readouterr().out
    assert main(["wordtree", "show", "tree.tsv", "--data", "boxes", "--data", "images"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "domestic animal [n01317541]", f"  dog [{DOG}]  boxes 1", "    pug [n02110958]  images 1",
        f"  cat [{CAT}]  boxes 2", "    bengal  images 1",
    ]  # fmt: skip
    assert main(["wordtree", "show", "tree.tsv", "--node", "cat", "--depth", "1"]) == 0
    assert capsys.readouterr().out == f"cat [{CAT}]  1 below\n"


def test_build_takes_coco_names_wnids_and_hierarchies(place):
    (place / "a.json").write_text(
        '{"categories": [{"id": 7, "name": "zebra"}, {"id": 3, "name": "giraffe"}],'
        ' "annotations": [{"category_id": 7}]}'
    )
    (place / "n.names").write_text("zebra\n")
    (place / "w.txt").write_text("n02391049\n")
    zebra = ("n02391049", "n01886756", "zebra")
    assert zebra in built("--detection", "a.json") or len(built("--detection", "a.json")) == 3
    assert built("--names", "n.names") == built("--wnids", "w.txt") == [("n02391049", "-", "zebra")]
    (place / "h.csv").write_text("child,parent\ncar,thing\nthing,\ncup,thing\n")
    nested = "thing:\n  car:\n  cup: []\n"
    (place / "h.yaml").write_text(nested)
    expected = [("thing", "-", "thing"), ("car", "thing", "car"), ("cup", "thing", "cup")]
    assert built("--hierarchy", "h.csv") == built("--hierarchy", "h.yaml") == expected
    (place / "l.yaml").write_text("thing: [car, cup]\n")
    assert built("--hierarchy", "l.yaml") == expected


def test_two_names_for_one_thing_meet_in_one_node(place):
    (place / "a.names").write_text("sofa\n")
    (place / "b.names").write_text("couch\n")
    (place / "map.csv").write_text("couch,n04256520\n")
    (row,) = built("--names", "a.names", "--names", "b.names", "--mapping", "map.csv")
    assert row == ("n04256520", "-", "couch | sofa")
    tree = WordTree.read("tree.tsv")
    assert tree.node("couch") == tree.node("sofa") == tree.node("n04256520") == 0
    assert tree.names == ("couch",)


def test_a_dataset_s_name_is_no_other_node_s(place):
    # WordNet says car first for both
    automobile, railway = "n02958343", "n02959942"
    (place / "d.yaml").write_text(f"car: {automobile}\n")
    (place / "a.names").write_text("car\n")
    (place / "w.txt").write_text(railway + "\n")
    rows = built("--names", "a.names", "--mapping", "d.yaml", "--wnids", "w.txt")
    assert {row[0]: row[2] for row in rows if row[0] in (automobile, railway)} == {
        automobile: "car", railway: "railcar",
    }  # fmt: skip
    assert WordTree.read("tree.tsv").node("car") == [row[0] for row in rows].index(automobile)


def test_the_most_frequent_synsets_then_the_detection_labels(place):
    (place / "counts.csv").write_text(
        "wnid,count\nn02391049,5\nn02439033,9\nn02503517,9\nn04507155,1\n"
    )
    (place / "d.names").write_text("skateboard\n")
    options = ["--classification", "counts.csv", "--top", "2", "--names", "d.names"]
    keys = {row[0] for row in built(*options)}
    assert {"n02439033", "n02503517", "n04225987"} <= keys
    assert "n02391049" not in keys


def test_darknet_s_form_goes_both_ways(place):
    (place / "w.txt").write_text("\n".join(IN1K[::50]))
    assert main(["wordtree", "build", "--wnids", "w.txt", "--output", "t.tree"]) == 0
    rows = built("--wnids", "w.txt")
    assert main(["wordtree", "show", "t.tree"]) == 0
    from yolo_lightning.cli.commands.wordtree import read

    assert read("t.tree").rows == rows


def test_plots_show_every_node_once(place, capsys):
    (place / "h.yaml").write_text("thing:\n  car: [taxi, van]\n  cup:\nanimal: [cat]\n")
    (place / "boxes.names").write_text("car\ncat\n")
    (place / "labels.names").write_text("taxi\nvan\ncat\n")
    built("--hierarchy", "h.yaml")
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
    assert "allowed endings: .svg, .png" in capsys.readouterr().err


def test_large_trees_are_drawn_as_deep_as_they_stay_readable():
    tree = build(IN1K)
    assert depth_for(tree) == tree.paths.shape[1]
    assert depth_for(tree, 300) < tree.paths.shape[1]
    levels = (tree.paths >= 0).sum(dim=1)
    assert int((levels <= depth_for(tree, 300)).sum()) <= 300
    drawing = layout(tree, {}, depth_for(tree, 300))
    assert len(drawing.dots) <= 300
    assert any("(+" in text[-1] for text in drawing.texts)


@pytest.mark.parametrize(
    ("files", "argv", "message"),
    [
        ({}, [], "nothing to build from; name --wnids"),
        ({"w": "n02391049\nzebra\n"}, ["--wnids", "w"], "w:2: 'zebra' is no wnid"),
        ({"n": "crane\n"}, ["--names", "n"], "'crane' means several things"),
        ({"n": ""}, ["--names", "n"], "n: empty"),
        ({}, ["--names", "gone"], "'gone' not found"),
        ({"h.csv": "a,b\na,c\n"}, ["--hierarchy", "h.csv"], "h.csv:2: 'a' lies under 'b' already"),
        ({"h.csv": "a\n"}, ["--hierarchy", "h.csv"], "h.csv:1: expected child,parent"),
        ({"h.csv": "a,b\nb,a\n"}, ["--hierarchy", "h.csv"], "h.csv:2: a cycle of parents: a under"),
        ({"h.yaml": "a:\n- b\n- a: [b]\n"}, ["--hierarchy", "h.yaml"], "h.yaml:3: 'a' lies under"),
        ({"h.yaml": "x: [b]\ny: [b]\n"}, ["--hierarchy", "h.yaml"], "h.yaml:2: 'b' lies under 'x'"),
        ({"h.yaml": "x: 1\nx: 2\n"}, ["--hierarchy", "h.yaml"], "h.yaml:2: 'x' lies under '1'"),
        ({"h.yaml": "a: &a\n- *a\n"}, ["--hierarchy", "h.yaml"], "h.yaml: nested more than"),
        ({"n": "zebra\nlove\n"}, ["--names", "n", "--root", "n00001930"], "n:2: 'love'"),
        ({"n": "zebra\ncrane\n"}, ["--names", "n"], "n:2: 'crane' means several things"),
        ({"m.csv": "a,b\na,c\n", "n": "a\n"}, ["--names", "n", "--mapping", "m.csv"], "m.csv:2: "),
        ({"h.csv": "a,qqq\n"}, ["--hierarchy", "h.csv"], "parent 'qqq': 'qqq' is no noun"),
        ({"h.yaml": "a: [\n"}, ["--hierarchy", "h.yaml"], "h.yaml:2: not YAML"),
        ({"h.yaml": ""}, ["--hierarchy", "h.yaml"], "h.yaml: holds no classes"),
        ({"m.yaml": "[a]\n", "n": "a\n"}, ["--names", "n", "--mapping", "m.yaml"], "expected li"),
        ({"x.json": "{}"}, ["--detection", "x.json"], "not a COCO annotation file"),
        ({"c.csv": "zebra,3\n"}, ["--classification", "c.csv", "--top", "1"], "c.csv:1: expect"),
        ({"n": "zebra\n"}, ["--names", "n", "--table", "pets"], "table 'pets'; allowed: coco"),
        ({"n": "zebra\n"}, ["--names", "n", "--root", "n1"], "root 'n1' is no noun synset"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message_and_no_file(place, capsys, files, argv, message):
    for name, text in files.items():
        (place / name).write_text(text)
    assert main([*BUILD, *argv]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (place / "tree.tsv").exists()


def test_a_folder_of_several_datasets_is_refused_and_other_layouts_are_recognised(place, capsys):
    for name in ("a", "b"):
        text = '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "zebra"}]}'
        (place / f"{name}.json").write_text(text)
    assert main([*BUILD, "--detection", "."]) == 2
    assert "several COCO files; name one of" in capsys.readouterr().err
    for part in ("train", "val"):  # the folders are parts, not classes
        write_image(place / f"parted/{part}/zebra/1.png")
    assert built("--classification", "parted") == [("n02391049", "-", "zebra")]
    write_image(place / "text/images/train/1.jpg")
    (place / "text/labels/train").mkdir(parents=True)
    (place / "text/labels/train/1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (place / "text/classes.txt").write_text("giraffe\n")
    assert built("--detection", "text") == [("n02439033", "-", "giraffe")]
