"""Every file source: mapping of labels, and the cached index."""

import json
import mmap
import os
import pickle
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.miniatures import (
    BOXES,
    FRENCH,
    FRUIT,
    GOOD_YOLO,
    SOURCES,
    WNIDS,
    bind_source,
    build_coco,
    build_folders,
    build_voc,
    build_yolo,
    save_grey,
    write,
    write_devkit,
    write_ilsvrc,
)
from yolo_lightning import CombinedDataModule
from yolo_lightning.datamodules import (
    COCOJson,
    ILSVRCDetection,
    ImageFolder,
    VOCFolder,
    files,
    index,
)
from yolo_lightning.datamodules.annotations import ImageLabels
from yolo_lightning.errors import InputError

# --- labels and the tree


@pytest.mark.parametrize("kind", SOURCES)
def test_mapping_gives_the_nodes_of_labels(tmp_path, kind):
    source = bind_source(SOURCES[kind](tmp_path)(mapping=FRENCH))
    assert source.node_counts() == {0: {"pomme": 1}, 1: {"banane": 1}}
    assert source.nodes.tolist() == [0, 1]
    for k in range(2):
        found = source.read(k)
        (label,) = found.labels.tolist() if kind in BOXES else [found[1]]
        assert label == (0 if source.image_path(k).stem[-1] in "a1" else 1)


# where the labels first occur in each source, relative to its folder
ORIGINS = {
    "VOC": ("a.xml: object 1", "b.xml: object 1"),
    "VOC devkit": ("Annotations/a.xml: object 1", "Annotations/b.xml: object 1"),
    "ILSVRC": (
        "Annotations/DET/train/a/a.xml: object 1",
        "Annotations/DET/train/b/b.xml: object 1",
    ),
    "COCO": ("ann.json", "ann.json"),
    "YOLO": ("labels/a.txt:1", "labels/b.txt:1"),
    "YOLO folder": ("labels/a.txt:1", "labels/b.txt:1"),
    "YOLO in one folder": ("a.txt:1", "b.txt:1"),
    "class folders": ("pomme", "banane"),
    "table": ("table.csv:2", "table.csv:3"),
    "ImageNet": ("train/pomme", "train/banane"),
    "ImageNet validation": ("val_synsets.txt", "val_synsets.txt"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_unknown_labels_are_reported_in_one_message(tmp_path, kind):
    source = SOURCES[kind](tmp_path)()
    with pytest.raises(InputError) as caught:
        source.bind(FRUIT)
    message = str(caught.value)
    for name, place in zip(("pomme", "banane"), ORIGINS[kind], strict=True):
        assert f"{tmp_path / place}: label {name!r} is not in the tree" in message
    assert "did you mean 'banana'?" in message
    assert "mapping: {label: node}" in message
    with pytest.raises(InputError) as caught:
        SOURCES[kind](tmp_path)(mapping={"pomme": "apple", "banane": "kiwi"}).bind(FRUIT)
    assert "'kiwi' is not in the tree" in str(caught.value)
    assert "'pomme'" not in str(caught.value)


@pytest.mark.parametrize("kind", ["VOC", "COCO", "YOLO", "class folders", "table"])
def test_source_without_images_raises(tmp_path, kind):
    make = SOURCES[kind](tmp_path)
    for file in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.xml")]:
        file.unlink()
    with pytest.raises(
        InputError, match="no annotated images|contains no images|images are in none"
    ):
        make().bind(FRUIT)


# --- when a source is parsed again


@pytest.mark.parametrize("kind", SOURCES)
def test_second_load_does_not_parse(tmp_path, monkeypatch, kind):
    make = SOURCES[kind](tmp_path)
    cache = tmp_path / index.CACHE_FOLDER
    cache.mkdir()
    os.utime(cache, ns=(10**18, 10**18))  # saving a file in it then changes its time
    first = make().load_index()
    source = make()

    def parse(self: Any, root: Path) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(type(source), "_parse", parse)
    second = source.load_index()
    assert second.metadata == first.metadata
    for name, array in first.arrays.items():
        assert np.array_equal(second.arrays[name], array), name


def count_parses(monkeypatch: pytest.MonkeyPatch, source: Any) -> list[str]:
    parse, found = type(source)._parse, []

    def counted(self: Any, root: Path) -> Any:
        found.append(self.name)
        return parse(self, root)

    monkeypatch.setattr(type(source), "_parse", counted)
    return found


def touch(path: Path) -> None:
    """Set the modification time of a file or folder one second later."""
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def rewrite(file: Path, old: str, new: str) -> None:
    """Change a file but not its size, so that only the modification time differs."""
    assert len(old) == len(new)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    touch(file)


@pytest.mark.parametrize(
    ("kind", "file", "old", "new"),
    [
        ("VOC", "a.xml", "pomme", "poire"),
        ("VOC devkit", "Annotations/a.xml", "pomme", "poire"),
        ("VOC devkit", "ImageSets/Main/trainval.txt", "a\nb", "b\nb"),
        ("ILSVRC", "Annotations/DET/train/a/a.xml", "pomme", "poire"),
        ("COCO", "ann.json", "pomme", "poire"),
        ("YOLO", "labels/a.txt", "0 0.078125", "1 0.078125"),
        ("YOLO", "data.yaml", "pomme", "poire"),
        ("YOLO folder", "labels/a.txt", "0 0.078125", "1 0.078125"),
        ("YOLO folder", "data.yaml", "pomme", "poire"),
        ("YOLO in one folder", "classes.txt", "pomme", "poire"),
        ("table", "table.csv", "pomme", "poire"),
        ("ImageNet validation", "val_synsets.txt", "pomme", "poire"),
    ],
)
def test_changed_annotation_is_parsed_again(tmp_path, kind, file, old, new):
    make = SOURCES[kind](tmp_path)
    assert make().name_counts()["pomme"] == 1
    rewrite(tmp_path / file, old, new)
    assert make().name_counts()["pomme"] == 0


def test_changed_ilsvrc_image_set_is_parsed_again(tmp_path):
    write_ilsvrc(tmp_path)
    assert bind_source(ILSVRCDetection(str(tmp_path), "val_part"), WNIDS).nodes.tolist() == [0]
    rewrite(tmp_path / "ImageSets/DET/val_part.txt", "v_2", "v_1")
    assert bind_source(ILSVRCDetection(str(tmp_path), "val_part"), WNIDS).nodes.tolist() == [1]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("VOC", "c.xml"),
        ("ILSVRC", "Annotations/DET/train/a/c.xml"),
        ("YOLO", "images/c.jpg"),
        ("YOLO folder", "images/deeper/c.jpg"),
        ("class folders", "pomme/c.jpg"),
        ("class folders", "pomme/deeper/c.jpg"),
        ("class folders", "poire/c.jpg"),
        ("ImageNet", "train/pomme/c.jpg"),
        ("ImageNet", "train/poire/c.jpg"),
    ],
)
def test_new_file_in_a_folder_is_found(tmp_path, kind, file):
    make = SOURCES[kind](tmp_path)
    before = make()
    before.load_index()
    place = tmp_path / file
    if place.suffix == ".xml":
        shutil.copy(place.with_name("a.xml"), place)
        data = str(place.parent).replace("Annotations", "Data")
        save_grey(Path(data) / "c.jpg")
    else:
        save_grey(place)
    for folder in (place.parent, place.parent.parent):
        touch(folder)
    assert (len(before), len(make())) == (2, 3)


def test_new_label_file_is_found(tmp_path):
    make = build_yolo(tmp_path)
    (tmp_path / "labels/a.txt").unlink()
    assert make().name_counts()["banane"] == 1
    write(tmp_path / "labels/a.txt", GOOD_YOLO)
    os.utime(tmp_path / "labels", ns=(2 * 10**18, 2 * 10**18))
    assert make().name_counts()["banane"] == 2


@pytest.mark.parametrize("option", ["COCO images", "table root"])
def test_relative_folder_depends_on_the_working_folder(tmp_path, monkeypatch, option):
    kind, name = option.split()
    make = SOURCES[kind](tmp_path / "set")
    for place in ("one", "two"):
        save_grey(tmp_path / place / "pictures/a.jpg")
        save_grey(tmp_path / place / "pictures/b.jpg")
        monkeypatch.chdir(tmp_path / place)
        source = make(**{name: "pictures"})
        assert source.image_path(0) == tmp_path / place / "pictures/a.jpg"


def test_each_set_of_options_has_its_own_index(tmp_path, write_voc):
    write_devkit(tmp_path, write_voc, 2007, {"train": "a", "val": "b"})
    root = str(tmp_path / "VOC2007")
    for split, name in (("train", "2007_a"), ("val", "2007_b"), ("train", "2007_a")):
        assert VOCFolder(root, split).image_path(0).stem == name


@pytest.mark.parametrize("kind", SOURCES)
def test_fingerprint_depends_on_the_content_alone(tmp_path, monkeypatch, kind):
    here = SOURCES[kind](tmp_path / "here")()
    there = SOURCES[kind](tmp_path / "there")()
    assert here.fingerprint() == there.fingerprint()
    monkeypatch.setenv(index.CACHE_VARIABLE, str(write(tmp_path / "no folder", "") / "below"))
    assert SOURCES[kind](tmp_path / "uncached")().fingerprint() == here.fingerprint()


def test_fingerprint_changes_with_labels_and_boxes(tmp_path):
    make = build_yolo(tmp_path)
    found = [make().fingerprint()]
    for old, new in (("0 0.078125", "1 0.078125"), ("0.15625", "0.16625")):
        rewrite(tmp_path / "labels/a.txt", old, new)
        found.append(make().fingerprint())
    assert len(set(found)) == 3


# --- the cache


def index_file_in(root: Path) -> Path:
    (file,) = root.glob("*.index")
    return file


def test_index_of_another_version_is_rebuilt(tmp_path, monkeypatch):
    make = build_folders(tmp_path)
    make().load_index()
    parses = count_parses(monkeypatch, make())
    monkeypatch.setattr(index, "VERSION", index.VERSION + 1)
    assert len(make()) == 2
    assert len(parses) == 1
    assert len(make()) == 2
    assert len(parses) == 1


@pytest.mark.parametrize("share", [0, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999])
def test_truncated_index_is_rebuilt(tmp_path, monkeypatch, share):
    make = build_coco(tmp_path)
    whole = make().load_index()
    file = index_file_in(tmp_path / index.CACHE_FOLDER)
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: int(len(data) * share)])
    parses = count_parses(monkeypatch, make())
    again = make().load_index()
    assert len(parses) == 1
    assert again.metadata == whole.metadata
    assert file.read_bytes()[:10] == data[:10]
    make().load_index()
    assert len(parses) == 1


@pytest.mark.parametrize(
    "record",
    [b"no index", np.array([{"a": 1}] * 9), np.frombuffer(b'{"version": 1}', np.uint8)],
    ids=["text", "objects", "other header"],
)
def test_foreign_file_is_rebuilt(tmp_path, monkeypatch, record):
    make = build_coco(tmp_path)
    make().load_index()
    file = index_file_in(tmp_path / index.CACHE_FOLDER)
    file.unlink()  # it is mapped: truncating it would be fatal
    if isinstance(record, bytes):
        file.write_bytes(record)
    else:
        with file.open("wb") as out:
            np.save(out, record)
    parses = count_parses(monkeypatch, make())
    assert len(make()) == 2
    assert len(make()) == 2
    assert len(parses) == 1


def test_an_index_may_be_saved_several_times_at_once(tmp_path):
    opened = build_coco(tmp_path)().load_index()
    file = index_file_in(tmp_path / index.CACHE_FOLDER)
    with ThreadPoolExecutor(4) as pool:
        saved = list(pool.map(lambda _: index.save(opened, file, 2**62), range(40)))
    for loaded in saved:
        assert loaded.metadata == opened.metadata
        assert np.array_equal(loaded.arrays["boxes_xyxy"], opened.arrays["boxes_xyxy"])
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_no_temporary_file_remains(tmp_path):
    build_coco(tmp_path)().load_index()
    assert [file.suffix for file in (tmp_path / index.CACHE_FOLDER).iterdir()] == [".index"]


def test_index_of_a_read_only_folder_is_in_the_user_cache(tmp_path, monkeypatch):
    root = tmp_path / "set"
    make = build_folders(root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(index.CACHE_VARIABLE, raising=False)
    root.chmod(0o555)
    try:
        assert len(make()) == 2
        assert index_file_in(tmp_path / "cache/yolo-lightning").is_file()
        assert not (root / index.CACHE_FOLDER).exists()
        parses = count_parses(monkeypatch, make())
        assert len(make()) == 2
        assert parses == []
    finally:
        root.chmod(0o755)


@pytest.mark.parametrize("kind", ["of another user", "writable by others", "link to a folder"])
def test_index_of_somebody_else_is_rebuilt_in_the_user_cache(tmp_path, monkeypatch, kind):
    root = tmp_path / "set"
    make = build_folders(root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(index.CACHE_VARIABLE, raising=False)
    make().load_index()
    file = index_file_in(root / index.CACHE_FOLDER)
    before = file.read_bytes()
    if kind == "of another user":
        status = os.lstat

        def foreign(path: Any) -> os.stat_result:
            found = list(status(path))
            found[4] += (Path(path) == file) * 12345  # the owner
            return os.stat_result(found)

        monkeypatch.setattr(os, "lstat", foreign)
    elif kind == "writable by others":
        file.chmod(0o666)
    else:
        (root / index.CACHE_FOLDER).rename(tmp_path / "elsewhere")
        (root / index.CACHE_FOLDER).symlink_to(tmp_path / "elsewhere")
        file = tmp_path / "elsewhere" / file.name
    parses = count_parses(monkeypatch, make())
    assert [len(make()), len(make())] == [2, 2]
    assert len(parses) == 1
    assert index_file_in(tmp_path / "cache/yolo-lightning").is_file()
    assert file.read_bytes() == before


def test_file_of_another_user_is_not_mapped(tmp_path, monkeypatch):
    make = build_folders(tmp_path)
    make().load_index()
    file = index_file_in(tmp_path / index.CACHE_FOLDER)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if file.stat().st_uid:
        with pytest.raises(ValueError, match="not a regular file of this user"):
            index.load(file)
    else:
        assert len(index.load(file).metadata["names"]) == 2  # the superuser's are trusted
    file.chmod(0o666)
    with pytest.raises(ValueError, match="not a regular file of this user"):
        index.load(file)


def wrong_contents(good: index.Index) -> dict[str, index.Index]:
    """Return indices whose parts do not fit each other, by what is wrong."""
    arrays, metadata = good.arrays, good.metadata
    images = len(arrays["paths_offsets"]) - 1
    changes: dict[str, Any] = {
        "no boxes": {"boxes_xyxy": None},
        "floats as classes": {"classes": arrays["classes"].astype(np.float32)},
        "class without a name": {"classes": arrays["classes"] + 90},
        "negative class": {"classes": arrays["classes"] - 90},
        "offsets that end too late": {"box_offsets": np.array([0] * images + [2**40])},
        "offsets that decrease": {"paths_offsets": np.array([0, 2**40, arrays["paths"].size])},
        "one size": {"sizes_wh": arrays["sizes_wh"][:1]},
        "one column": {"boxes_xyxy": arrays["boxes_xyxy"][:, :1]},
        "names of numbers": {"names": [1, 2]},
        "names of no list": {"names": "ab"},
        "no root": {"root": None},
        "unknown unit": {"normalized": 2},
    }
    wrong = {}
    for name, change in changes.items():
        part = arrays | {k: v for k, v in change.items() if k in arrays}
        rest = metadata | {k: v for k, v in change.items() if k in metadata}
        part = {k: v for k, v in part.items() if v is not None}
        wrong[name] = index.Index(part, rest, good.watched)
    return wrong


def test_index_with_wrong_content_is_named_and_rebuilt(tmp_path, monkeypatch, capsys):
    make = build_voc(tmp_path)
    good = make()._parse(tmp_path)
    good.metadata["fingerprint"] = "x"
    make().load_index()
    file = index_file_in(tmp_path / index.CACHE_FOLDER)
    index.save(good, file, 2**62)
    parses = count_parses(monkeypatch, make())
    assert len(make()) == 2
    assert parses == []  # what is wrong below is not the way it is written
    for name, wrong in wrong_contents(good).items():
        index.save(wrong, file, 2**62)
        assert len(make()) == 2
        assert f"{file}: not an index (" in capsys.readouterr().err, name
        assert len(parses) == 1, name
        parses.clear()


def test_cache_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(index.CACHE_VARIABLE, str(tmp_path / "my/indices"))
    make = build_folders(tmp_path / "set")
    build_voc(tmp_path / "other")().load_index()
    make().load_index()
    assert len(list((tmp_path / "my/indices").glob("*.index"))) == 2
    assert not (tmp_path / "set" / index.CACHE_FOLDER).exists()
    parses = count_parses(monkeypatch, make())
    assert len(make()) == 2
    assert parses == []


def test_source_works_without_a_writable_cache(tmp_path, monkeypatch):
    in_the_way = write(tmp_path / "file", "")
    monkeypatch.setenv(index.CACHE_VARIABLE, str(in_the_way / "below"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way / "below"))
    make = build_folders(tmp_path / "set")
    source = bind_source(make(mapping=FRENCH))
    assert len(source) == 2
    again = pickle.loads(pickle.dumps(source))
    assert again.image_name(1) == source.image_name(1)


def test_source_is_pickled_as_the_path_of_its_index(tmp_path):
    (tmp_path / "pomme").mkdir()
    for k in range(400):
        (tmp_path / "pomme" / f"a picture with a long name, number {k}.jpg").touch()
    source = bind_source(ImageFolder(str(tmp_path), mapping=FRENCH))
    opened = source.load_index()
    assert sum(array.nbytes for array in opened.arrays.values()) > 15_000
    packed = pickle.dumps(opened)
    assert len(packed) < 600
    assert len(pickle.dumps(source)) < 3000
    again = pickle.loads(packed)
    assert again.file == opened.file
    assert again.metadata == opened.metadata
    assert again.arrays.keys() == opened.arrays.keys()
    for name, array in opened.arrays.items():
        assert again.arrays[name].dtype == array.dtype
        assert np.array_equal(again.arrays[name], array)
    assert pickle.loads(pickle.dumps(source)).image_path(7) == source.image_path(7)


@pytest.mark.parametrize("kind", SOURCES)
def test_index_is_memory_mapped(tmp_path, kind):
    opened = SOURCES[kind](tmp_path)().load_index()
    for name, array in opened.arrays.items():
        base: Any = array
        while not isinstance(base, mmap.mmap):
            assert base is not None, name
            base = base.base
        assert not array.flags.writeable


# --- size of datasets such as COCO and ImageNet-22k


def peak_bytes(function, *arguments) -> int:
    """Return the peak memory of Python objects while a function runs."""
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_image_labels_take_little_memory_while_they_are_parsed(tmp_path):
    def parse():
        labels = ImageLabels(tmp_path)
        for k in range(20_000):
            labels.add(f"n{k % 100:08d}/n{k % 100:08d}_{k}.JPEG", f"n{k % 100:08d}", "folder")
        arrays = labels.build_index().arrays
        assert len(arrays["classes"]) == 20_000
        assert bytes(arrays["paths"][: arrays["paths_offsets"][1]]) == b"n00000000/n00000000_0.JPEG"

    # 30 bytes of the path, 8 of its offset, 8 of lengths and labels, and what growing arrays
    # reserve; lists of strings take 200
    assert peak_bytes(parse) < 20_000 * 100


def test_outlines_are_freed_while_coco_is_parsed(tmp_path):
    file = build_coco(tmp_path)(mapping=FRENCH).annotations
    data = json.loads(Path(file).read_text())
    data["annotations"] *= 500
    for item in data["annotations"]:
        item["segmentation"] = [[k + 0.5 for k in range(100)]]
    Path(file).write_text(json.dumps(data))
    size = Path(file).stat().st_size
    # bytes, then text as well, and what is kept of an annotation; all outlines take 5 times more
    assert peak_bytes(COCOJson(file).load_index) < 3 * size


def test_one_rank_of_a_machine_parses_and_the_others_open_the_index(tmp_path, monkeypatch):
    make = SOURCES["class folders"](tmp_path)
    missing = ImageFolder(str(tmp_path / "missing"))
    first = CombinedDataModule(list(FRUIT.names), classification=[make(mapping=FRENCH), missing])
    first.prepare_data()  # the missing folder is reported by setup, on every rank
    monkeypatch.setattr(ImageFolder, "_parse", lambda self, root: pytest.fail("parsed again"))
    with pytest.raises(InputError, match="missing"):
        first.setup("fit")
    data = CombinedDataModule(list(FRUIT.names), classification=make(mapping=FRENCH))
    data.setup("fit")
    assert len(data.order.plan(0).indices) == 64


def test_fingerprint_is_computed_when_a_dataset_is_parsed(tmp_path, monkeypatch):
    make = SOURCES["class folders"](tmp_path)
    expected = bind_source(make(mapping=FRENCH)).fingerprint()
    monkeypatch.setattr(files, "digest", lambda *parts: pytest.fail("all arrays are read again"))
    assert bind_source(make(mapping=FRENCH)).fingerprint() == expected
