"""WordNet, the resolution of names, and the trees built from them."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.images import write_image
from tests.helpers.paths import REPO
from yolo_lightning.checkpoints.io import write_checkpoint
from yolo_lightning.cli.main import main
from yolo_lightning.cli.tree_inputs import build_class_tree
from yolo_lightning.darknet.released import COCO_NAMES, VOC_NAMES
from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.export.darknet import build_checkpoint
from yolo_lightning.tree.build import build_tree
from yolo_lightning.tree.labels import find_table, load_reviewed_labels, resolve_labels
from yolo_lightning.tree.wordnet import LICENCE, TABLE, WordNet, wordnet
from yolo_lightning.tree.wordtree import WordTree

CAKE, SANDWICH = "n07628870", "n07695965"
CAT, DOG, MOUSE, CRANE = "n02121808", "n02084071", "n03793489", "n02012849"


def test_wordnet_words_hypernyms_and_glosses():
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
    # things, nothing vulgar
    assert table.nearest("Shi-Tzu") == "did you mean 'shih-tzu' or 'shirt' or 'shift'?"
    assert table.nearest("fuk") == "did you mean 'fur'?"
    assert all(len(table.gloss(wnid)) <= 60 for wnid in table.wnids[::50])


def test_every_synset_is_below_entity():
    table = wordnet()
    for wnid in table.wnids[::20]:
        path = [wnid]
        while table.hypernyms(path[-1]):
            path.append(table.hypernyms(path[-1])[0])
        assert path[-1] == "n00001740"


def test_size_loading_time_and_licence_of_the_wordnet_table():
    assert TABLE.stat().st_size < 3_000_000
    started = time.process_time()
    WordNet(["1\n2", "\n1", "a\nb", "x\ny"])
    wordnet.cache_clear()
    wordnet()
    assert time.process_time() - started < 2  # measured: 0.2 s; this only guards the order
    assert "Princeton University" in LICENCE.read_text()
    assert "provided that you agree to comply" in LICENCE.read_text()


def test_classes_of_coco_voc_and_imagenet_detection_are_resolved():
    coco, voc = resolve_labels(COCO_NAMES), resolve_labels(VOC_NAMES)
    assert (len(set(coco.values())), len(set(voc.values()))) == (80, 20)
    assert coco["mouse"] == MOUSE
    assert set(voc.values()) <= set(coco.values())
    det = resolve_labels(load_reviewed_labels()["ilsvrc_det"])
    assert det["swimming trunks"] == "n04371563"
    assert len(set(det.values())) == 200
    # the authors' maps have 38 of them in common with COCO
    assert len(set(det.values()) & set(coco.values())) == 38
    for table in load_reviewed_labels().values():
        assert all(wnid in wordnet() for wnid in table.values())


def test_a_leaf_for_what_is_none_of_the_other_labels():
    # of COCO's classes, donut is the only one below cake, hot dog the only one below sandwich
    alone = build_class_tree({"coco": COCO_NAMES}, exclusive=["coco"])
    others = [alone.rows[k] for k in alone.is_other.nonzero().flatten().tolist()]
    assert others == [
        (f"{CAKE}/other", CAKE, "other cake"),
        (f"{SANDWICH}/other", SANDWICH, "other sandwich"),
    ]
    without = build_class_tree({"coco": COCO_NAMES})
    assert [row for row in alone.rows if row not in others] == without.rows
    # a club sandwich is a sandwich and no hot dog
    club = {"coco": COCO_NAMES, "images": ["club sandwich", "n07630089"]}
    assert build_class_tree(club, exclusive=["coco"]).is_other.sum() == 0
    # labels of images do not exclude each other
    both = {"images": COCO_NAMES, "coco": [CAKE]}
    assert build_class_tree(both, exclusive=["coco"]).rows == without.rows


def test_a_leaf_above_several_levels_of_labels():
    custom = {"a": "-", "b": "a", "c": "b", "d": "b", "e": "a", "z": "-"}
    rows = build_tree(custom, custom, exclusive=[["a", "c", "d", "e"]]).rows
    assert [key for key, *_ in rows] == ["a", "z", "a/other", "b", "e", "c", "d"]
    rows = build_tree(custom, custom, exclusive=[["a", "c", "e"], ["b", "d"]]).rows
    assert [key for key, *_ in rows] == ["a", "z", "b", "e", "c", "d"]


def test_a_subset_of_the_names_does_not_identify_a_dataset():
    assert find_table(COCO_NAMES) == "coco"
    assert find_table(VOC_NAMES) == "voc"
    assert find_table(["mouse", "zebra"]) is None
    hint = rf"is ambiguous.*\(in the reviewed tables: coco {MOUSE}; --table coco uses it\):"
    with pytest.raises(InputError, match=hint):
        resolve_labels(["mouse", "zebra"])
    assert resolve_labels(["mouse", "zebra"], table="coco")["mouse"] == MOUSE
    assert resolve_labels(["mouse"], {"mouse": "computer mouse"}) == {"mouse": MOUSE}


def test_all_errors_are_reported_together():
    with pytest.raises(InputError) as caught:
        resolve_labels(["crane", "rackoon", "n99999999", "zebra"], where=lambda name: "birds")
    text = str(caught.value)
    assert text.startswith("birds: 'crane' is ambiguous")
    assert f"{CRANE} crane: large long-necked wading bird" in text
    assert "birds: 'rackoon' is not a noun of WordNet 3.0; did you mean" in text
    assert "'n99999999': n99999999 is not a noun" in text
    assert "zebra" not in text


def test_labels_below_it_say_which_meaning_of_a_word_is_meant(capsys):
    tree = build_class_tree({"boxes": ["crane"], "folders": ["whooping crane", "zebra"]})
    assert CRANE in tree.keys
    printed = capsys.readouterr().out
    assert printed == (
        f"'crane' is {CRANE} crane: large long-necked wading bird of marshes and plains in…"
        " (other labels are below it)\n"
    )
    with pytest.raises(InputError, match="'mouse' is ambiguous"):
        build_class_tree({"boxes": ["crane", "mouse"], "folders": ["whooping crane"]})
    datasets = {"boxes": ["crane"], "folders": ["whooping crane"]}
    with pytest.raises(InputError, match="is not below the root"):  # what the user says goes first
        build_class_tree(datasets, meanings={"crane": "n03126707"}, root="n00015388")


def test_a_meaning_on_which_reviewed_tables_agree_is_taken(capsys):
    folders = ["n02085620", "n02124313"]  # Chihuahua, Abyssinian cat
    tree = build_class_tree({"boxes": ["cat", "dog"], "folders": folders})
    assert [parent for key, parent, _ in tree.rows if key in folders] == [DOG, CAT]
    assert capsys.readouterr().out.count(" (as in COCO, Pascal VOC or ILSVRC)\n") == 2


def test_nodes_with_a_single_child_are_removed_unless_they_are_labels():
    tree = build_tree([CAT, DOG, "n02123045"])  # domestic cat, dog, tabby
    assert tree.rows == [
        ("n01317541", "-", "domestic animal"), (DOG, "n01317541", "dog"),
        (CAT, "n01317541", "domestic cat"), ("n02123045", CAT, "tabby"),
    ]  # fmt: skip


def test_synsets_with_one_path_come_first_then_the_shortest_addition():
    # a dog has two hypernyms, canine and domestic animal; alone the first wnid of equal ones wins
    wolf, dog = "n02114100", DOG
    by_wolf = build_tree([wolf, dog])  # wolf has one path, over canine: dog joins it there
    assert by_wolf.keys[0] == "n02083346"  # canine
    assert set(by_wolf.keys) == {"n02083346", wolf, dog}
    assert build_tree([dog]).keys == (dog,)


IN1K = (REPO / "recipes/trees/imagenet1k.wnids").read_text().split()


def test_imagenet_1k_tree_has_the_size_of_the_paper_in_any_order():
    started = time.process_time()
    tree = build_tree(IN1K)
    assert time.process_time() - started < 10  # measured: 0.5 s
    assert len(tree) == 1371  # the paper reports 1,369
    assert len(tree.leaves) == 1000
    assert build_tree(IN1K[::-1]).rows == tree.rows
    assert build_tree(IN1K, exclusive=[IN1K]).rows == tree.rows  # none is above another one
    parents = tree.parents.tolist()
    assert all(parent < node for node, parent in enumerate(parents))  # as Darknet needs it
    singles = [p for p in set(parents) if parents.count(p) == 1 and p >= 0]
    assert {tree.keys[p] for p in singles} <= set(IN1K)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(IN1K), min_size=1, max_size=12), st.randoms())
def test_the_tree_of_any_labels_contains_them(labels, shuffle):
    tree = build_tree(labels)
    assert set(labels) <= set(tree.keys)
    again = list(labels)
    shuffle.shuffle(again)
    assert build_tree(again).rows == tree.rows
    table = wordnet()

    def ancestors(wnid: str) -> set[str]:
        return {wnid}.union(*(ancestors(up) for up in table.hypernyms(wnid)))

    for key, parent, _ in tree.rows:
        assert parent == "-" or parent in ancestors(key) - {key}


def test_custom_classes_have_the_given_parents():
    tree = build_tree(
        ["bengal", "toaster"], {"bengal": CAT, "toaster": "kitchen", "kitchen": "-"},
        {"bengal": "Bengal cat"},
    )  # fmt: skip
    # domestic cat has one child, but is the parent of a custom class
    assert tree.rows == [
        ("kitchen", "-", "kitchen"), (CAT, "-", "domestic cat"),
        ("toaster", "kitchen", "toaster"), ("bengal", CAT, "Bengal cat"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "own", "root", "message"),
    [
        (["x"], {}, "n00001740", "class 'x' is not a wnid and has no parent"),
        ([], {"a": "b", "b": "a"}, "n00001740", "a cycle of parents: a under b under a"),
        ([], {"a": "b"}, "n00001740", "has the parent 'b', which has no parent itself"),
        (["n00001741"], {}, "n00001740", "'n00001741' is not a noun synset"),
        (["n06794110"], {}, "n00001930", "is not below the root"),
        ([CAT], {}, "n00000001", "root 'n00000001' is not a noun synset"),
    ],
)
def test_invalid_labels_and_parents(labels, own, root, message):
    with pytest.raises(InputError, match=message):
        build_tree(labels, own, root=root)


# --- the command


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


BUILD = ["wordtree", "build", "--output", "tree.tsv"]


def build_rows(*argv: str) -> list[tuple[str, str, str]]:
    assert main([*BUILD, *argv]) == 0
    return WordTree.from_file("tree.tsv").rows


def test_build_merges_boxes_labels_and_custom_classes(workdir, write_voc, capsys):
    write_voc(workdir / "boxes", "a", [("cat", 1, 1, 9, 9), ("cat", 1, 1, 5, 5)])
    write_voc(workdir / "boxes", "b", [("dog", 1, 1, 9, 9)])
    for name in ("bengal", "pug"):
        write_image(workdir / "images" / name / "1.png")
    (workdir / "own.yaml").write_text("bengal: domestic cat\n")
    (workdir / "map.yaml").write_text(f"cat: domestic cat\ndog: {DOG}\npug: n02110958\n")
    data = ["--detection", "boxes", "--classification", "images"]
    rows = build_rows(*data, "--hierarchy", "own.yaml", "--mapping", "map.yaml")
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


def test_build_adds_a_leaf_to_names_that_exclude_each_other(workdir):
    (workdir / "own.yaml").write_text("cake: [doughnut]\n")
    (workdir / "n.names").write_text("cake\ndoughnut\n")
    rows = build_rows("--names", "n.names", "--hierarchy", "own.yaml")
    assert [key for key, *_ in rows] == ["cake", "cake/other", "doughnut"]
    (workdir / "tree.tsv").rename("first.tsv")
    rows = build_rows("--names", "n.names", "--hierarchy", "own.yaml", "--mixed-names")
    assert [key for key, *_ in rows] == ["cake", "doughnut"]
    # the leaf stays when a class is added that could hold the rest
    (workdir / "own.yaml").write_text("cake: [doughnut, cheesecake]\n")
    grow = ["--names", "n.names", "--hierarchy", "own.yaml"]
    assert [key for key, *_ in build_rows(*grow)] == ["cake", "cheesecake", "doughnut"]
    keys = [key for key, *_ in build_rows(*grow, "--previous", "first.tsv")]
    assert keys == ["cake", "cake/other", "cheesecake", "doughnut"]


def test_build_accepts_coco_names_wnids_and_hierarchies(workdir):
    (workdir / "a.json").write_text(
        '{"categories": [{"id": 7, "name": "zebra"}, {"id": 3, "name": "giraffe"}],'
        ' "annotations": [{"category_id": 7}]}'
    )
    (workdir / "n.names").write_text("zebra\n")
    (workdir / "w.txt").write_text("n02391049\n")
    zebra = ("n02391049", "n01886756", "zebra")
    assert (
        zebra in build_rows("--detection", "a.json")
        or len(build_rows("--detection", "a.json")) == 3
    )
    assert (
        build_rows("--names", "n.names")
        == build_rows("--wnids", "w.txt")
        == [("n02391049", "-", "zebra")]
    )
    (workdir / "h.csv").write_text("child,parent\ncar,thing\nthing,\ncup,thing\n")
    nested = "thing:\n  car:\n  cup: []\n"
    (workdir / "h.yaml").write_text(nested)
    expected = [("thing", "-", "thing"), ("car", "thing", "car"), ("cup", "thing", "cup")]
    assert build_rows("--hierarchy", "h.csv") == build_rows("--hierarchy", "h.yaml") == expected
    (workdir / "h.csv").write_bytes(b"\xef\xbb\xbf" + (workdir / "h.csv").read_bytes())
    assert build_rows("--hierarchy", "h.csv") == expected
    (workdir / "l.yaml").write_text("thing: [car, cup]\n")
    assert build_rows("--hierarchy", "l.yaml") == expected


def test_two_names_of_one_meaning_share_a_node(workdir):
    (workdir / "a.names").write_text("sofa\n")
    (workdir / "b.names").write_text("couch\n")
    (workdir / "map.csv").write_text("couch,n04256520\n")
    (row,) = build_rows("--names", "a.names", "--names", "b.names", "--mapping", "map.csv")
    assert row == ("n04256520", "-", "couch | sofa")
    tree = WordTree.from_file("tree.tsv")
    assert tree.find_node("couch") == tree.find_node("sofa") == tree.find_node("n04256520") == 0
    assert tree.names == ("couch",)


def test_a_name_of_a_dataset_is_not_used_for_another_node(workdir):
    # WordNet says car first for both
    automobile, railway = "n02958343", "n02959942"
    (workdir / "d.yaml").write_text(f"car: {automobile}\n")
    (workdir / "a.names").write_text("car\n")
    (workdir / "w.txt").write_text(railway + "\n")
    rows = build_rows("--names", "a.names", "--mapping", "d.yaml", "--wnids", "w.txt")
    assert {row[0]: row[2] for row in rows if row[0] in (automobile, railway)} == {
        automobile: "car", railway: "railcar",
    }  # fmt: skip
    assert WordTree.from_file("tree.tsv").find_node("car") == [row[0] for row in rows].index(
        automobile
    )


def test_top_adds_the_most_frequent_synsets_to_the_detection_labels(workdir):
    (workdir / "counts.csv").write_text(
        "wnid,count\nn02391049,5\nn02439033,9\nn02503517,9\nn04507155,1\n"
    )
    (workdir / "d.names").write_text("skateboard\n")
    options = ["--classification", "counts.csv", "--top", "2", "--names", "d.names"]
    keys = {row[0] for row in build_rows(*options)}
    assert {"n02439033", "n02503517", "n04225987"} <= keys
    assert "n02391049" not in keys


def test_darknet_tree_files_round_trip(workdir):
    (workdir / "w.txt").write_text("\n".join(IN1K[::50]))
    assert main(["wordtree", "build", "--wnids", "w.txt", "--output", "t.tree"]) == 0
    rows = build_rows("--wnids", "w.txt")
    assert main(["wordtree", "show", "t.tree"]) == 0
    from yolo_lightning.cli.commands.wordtree import read

    assert read("t.tree").rows == rows


def test_the_tree_of_a_checkpoint_is_printed_and_written(workdir, capsys):
    rows = [("pet", "-", "pet"), ("cat", "pet", "cat"), ("dog", "pet", "dog")]
    module = DetectorModule(rows, [(1.0, 1.0)], "small", 0, 0)
    write_checkpoint(build_checkpoint(module, {}), workdir / "m.ckpt")
    assert main(["wordtree", "show", "m.ckpt"]) == 0
    assert capsys.readouterr().out == "pet\n  cat\n  dog\n"
    assert main(["wordtree", "show", "m.ckpt", "--output", "new/t.tsv"]) == 0
    assert capsys.readouterr().out == "new/t.tsv: 3 nodes\n"
    assert WordTree.from_file("new/t.tsv").rows == WordTree(rows).rows
    (workdir / "bad.ckpt").write_bytes(b"PK\x03\x04 no archive")
    assert main(["wordtree", "show", "bad.ckpt"]) == 2
    assert main(["wordtree", "show", "gone.ckpt"]) == 2
    assert "tree file 'gone.ckpt' not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "argv", "message"),
    [
        ({}, [], "no input; use --wnids"),
        ({"w": "n02391049\nzebra\n"}, ["--wnids", "w"], "w:2: 'zebra' is not a wnid"),
        ({"n": "crane\n"}, ["--names", "n"], "'crane' is ambiguous"),
        ({"n": ""}, ["--names", "n"], "n: empty"),
        ({}, ["--names", "gone"], "'gone' not found"),
        (
            {"h.csv": "a,b\na,c\n"}, ["--hierarchy", "h.csv"],
            "h.csv:2: 'a' has the parent 'c', but line 1 gives it 'b'",
        ),
        ({"h.csv": "a\n"}, ["--hierarchy", "h.csv"], "h.csv:1: expected child,parent"),
        ({"h.csv": "a,b\nb,a\n"}, ["--hierarchy", "h.csv"], "h.csv:2: a cycle of parents: a under"),
        (
            {"h.yaml": "a:\n- b\n- a: [b]\n"}, ["--hierarchy", "h.yaml"],
            "h.yaml:3: 'a' has the parent",
        ),
        (
            {"h.yaml": "x: [b]\ny: [b]\n"}, ["--hierarchy", "h.yaml"],
            "h.yaml:2: 'b' has the parent 'y', but line 1 gives it 'x'",
        ),
        (
            {"h.yaml": "x: 1\nx: 2\n"}, ["--hierarchy", "h.yaml"],
            "h.yaml:2: 'x' has the parent '2', but line 1 gives it '1'",
        ),
        ({"h.yaml": "a: &a\n- *a\n"}, ["--hierarchy", "h.yaml"], "h.yaml:2: alias *a; allowed: "),
        ({"n": "zebra\nlove\n"}, ["--names", "n", "--root", "n00001930"], "n:2: 'love'"),
        ({"n": "zebra\ncrane\n"}, ["--names", "n"], "n:2: 'crane' is ambiguous"),
        ({"m.csv": "a,b\na,c\n", "n": "a\n"}, ["--names", "n", "--mapping", "m.csv"], "m.csv:2: "),
        ({"h.csv": "a,qqq\n"}, ["--hierarchy", "h.csv"], "parent 'qqq': 'qqq' is not a noun"),
        ({"h.yaml": "a: [\n"}, ["--hierarchy", "h.yaml"], "h.yaml:2: not YAML"),
        ({"h.yaml": ""}, ["--hierarchy", "h.yaml"], "h.yaml: contains no classes"),
        ({"m.yaml": "[a]\n", "n": "a\n"}, ["--names", "n", "--mapping", "m.yaml"], "expected li"),
        ({"x.json": "{}"}, ["--detection", "x.json"], "not a COCO annotation file"),
        ({"c.csv": "zebra,3\n"}, ["--classification", "c.csv", "--top", "1"], "c.csv:1: expect"),
        ({"n": "zebra\n"}, ["--names", "n", "--table", "pets"], "table 'pets'; allowed: coco"),
        ({"n": "zebra\n"}, ["--names", "n", "--root", "n1"], "root 'n1' is not a noun synset"),
    ],
)  # fmt: skip
def test_invalid_input_gives_one_message_and_no_file(workdir, capsys, files, argv, message):
    for name, text in files.items():
        (workdir / name).write_text(text)
    assert main([*BUILD, *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (workdir / "tree.tsv").exists()


def test_ambiguous_and_supported_dataset_layouts(workdir, capsys):
    for name in ("a", "b"):
        text = '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "zebra"}]}'
        (workdir / f"{name}.json").write_text(text)
    assert main([*BUILD, "--detection", "."]) == 2
    assert "several COCO files; name one of" in capsys.readouterr().err
    for part in ("train", "val"):  # the folders are parts, not classes
        write_image(workdir / f"parted/{part}/zebra/1.png")
    assert build_rows("--classification", "parted") == [("n02391049", "-", "zebra")]
    write_image(workdir / "text/images/train/1.jpg")
    (workdir / "text/labels/train").mkdir(parents=True)
    (workdir / "text/labels/train/1.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (workdir / "text/classes.txt").write_text("giraffe\n")
    assert build_rows("--detection", "text") == [("n02439033", "-", "giraffe")]
