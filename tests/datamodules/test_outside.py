"""Texts outside the folder of a dataset are read only where that is allowed."""

import pytest
import yaml

from tests.helpers.hostile_files import SECRET, init, secret, voc, yolo
from tests.helpers.miniatures import save_grey, write
from yolo_lightning.cli.commands.anchors import load_box_shapes
from yolo_lightning.cli.commands.check_data import load_datamodule
from yolo_lightning.cli.main import main
from yolo_lightning.datamodules import ILSVRCDetection, ImageNet, VOCFolder, YOLOText
from yolo_lightning.datamodules.autodetect import detection_source, label_source
from yolo_lightning.errors import InputError

OUTSIDE = r"is outside the dataset's folder .*; to allow this, set allow_outside: true .*--allow-o"


def test_names_outside_are_read_if_allowed(tmp_path):
    path = yolo(tmp_path, f"train: images\nnames: {secret(tmp_path)}\n")
    with pytest.raises(InputError, match=f"credentials.txt {OUTSIDE}") as caught:
        YOLOText(str(path)).load_index()
    assert SECRET not in str(caught.value)
    assert YOLOText(str(path), allow_outside=True).name_counts() == {f"{SECRET} = {SECRET}": 1}
    with pytest.raises(InputError, match=OUTSIDE):  # not from the index of the line above
        YOLOText(str(path)).load_index()
    names = YOLOText(str(path), names=str(secret(tmp_path)))
    with pytest.raises(InputError, match=OUTSIDE):
        names.load_index()


def test_lists_outside_are_read_if_allowed(tmp_path):
    path = yolo(tmp_path, "train: ../list.txt\nnames: [a]\n")
    write(tmp_path / "list.txt", "images/x.jpg\n")
    with pytest.raises(InputError, match=f"list.txt {OUTSIDE}"):
        YOLOText(str(path)).load_index()
    assert len(YOLOText(str(path), allow_outside=True)) == 1


@pytest.mark.parametrize("folder", ["../train/images", "../train/images/deep", "../pictures"])
def test_folders_of_images_beside_data_yaml_are_read(tmp_path, folder):
    path = yolo(tmp_path, f"train: {folder}\nnames: [a]\n")
    save_grey(path.parent / folder / "y.jpg")
    labels = path.parent / folder.replace("images", "labels")
    label = write(labels / "y.txt", "0 .5 .5 .5 .5\n")
    assert YOLOText(str(path)).name_counts() == {"a": 1}
    label.unlink()
    label.symlink_to(secret(tmp_path / "far"))
    with pytest.raises(InputError, match="y.txt leads to .*credentials.txt, which is outside"):
        YOLOText(str(path)).load_index()


def test_folders_of_images_elsewhere_are_read_if_allowed(tmp_path):
    save_grey(tmp_path / "far/images/y.jpg")
    write(tmp_path / "far/labels/y.txt", "0 .5 .5 .5 .5\n")
    path = yolo(tmp_path / "a/b", f"path: {tmp_path}/far\ntrain: images\nnames: [a]\n")
    with pytest.raises(
        InputError, match="far/images is neither in the dataset's folder nor beside"
    ):
        YOLOText(str(path)).load_index()
    assert YOLOText(str(path), allow_outside=True).name_counts() == {"a": 1}
    folder = str(path.parent)
    with pytest.raises(
        InputError, match="far/images is neither in the dataset's folder nor beside"
    ):
        detection_source(folder).load_index()
    assert detection_source(folder, allow_outside=True).name_counts() == {"a": 1}


def test_linked_texts_are_read_if_allowed_and_linked_images_always(tmp_path):
    root = voc(tmp_path)
    for name, target in (("Annotations/x.xml", "far/x.xml"), ("JPEGImages/x.jpg", "far/x.jpg")):
        (tmp_path / target).parent.mkdir(exist_ok=True)
        (root / name).rename(tmp_path / target)
        (root / name).symlink_to(tmp_path / target)
    with pytest.raises(InputError, match="x.xml leads to .*far/x.xml, which is outside"):
        VOCFolder(str(root)).load_index()
    assert VOCFolder(str(root), allow_outside=True).name_counts() == {"a": 1}
    (root / "Annotations/x.xml").unlink()
    (tmp_path / "far/x.xml").rename(root / "Annotations/x.xml")
    assert VOCFolder(str(root)).name_counts() == {"a": 1}


def test_a_dataset_below_a_link_is_inside(tmp_path):
    root = voc(tmp_path)
    (tmp_path / "link").symlink_to(root)
    assert VOCFolder(str(tmp_path / "link")).name_counts() == {"a": 1}


def test_listed_annotations_outside_are_read_if_allowed(tmp_path):
    root, xml = tmp_path / "data", voc(tmp_path / "far") / "Annotations/x.xml"
    save_grey(root / "Data/DET/train/x.jpg")
    write(root / "Annotations/DET/readme.txt", "")
    write(root / "ImageSets/DET/train.txt", f"{xml.with_suffix('')} 1\n")
    with pytest.raises(InputError, match=r"train.txt:1: path .*x.xml' leaves"):
        ILSVRCDetection(str(root)).load_index()
    source = ILSVRCDetection(str(root), allow_outside=True)
    assert source.load_index().metadata["faults"] == [f"{xml}: its image is missing, skipped"]


def test_labels_of_imagenet_in_their_usual_places(tmp_path):
    save_grey(tmp_path / "a/set/val/ILSVRC2012_val_00000001.jpg")
    text = "ImageId,PredictionString\nILSVRC2012_val_00000001,n01\n"
    above = write(tmp_path / "a/LOC_val_solution.csv", text)
    root = str(tmp_path / "a/set")
    assert ImageNet(root, "val").name_counts() == {"n01": 1}  # two levels above
    other = write(tmp_path / "mine.csv", f"{text}\n")
    above.unlink()
    above.symlink_to(other)
    with pytest.raises(InputError, match="LOC_val_solution.csv leads to .*mine.csv, which is"):
        ImageNet(root, "val").load_index()
    with pytest.raises(InputError, match=f"mine.csv {OUTSIDE}"):
        ImageNet(root, "val", labels=str(other)).load_index()
    assert ImageNet(root, "val", str(other), allow_outside=True).name_counts() == {"n01": 1}


def test_autodetected_sources_take_the_option(tmp_path):
    path = yolo(tmp_path, "train: ../list.txt\nnames: [a]\n")
    write(tmp_path / "list.txt", "images/x.jpg\n")
    assert len(detection_source(str(path), allow_outside=True)) == 1
    save_grey(tmp_path / "labelled/a/x.jpg")
    assert label_source(str(tmp_path / "labelled"), allow_outside=True).allow_outside


@pytest.mark.usefixtures("known_step_time")
def test_commands_take_the_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = yolo(tmp_path, "train: ../list.txt\nnames: [a]\n")
    write(tmp_path / "list.txt", "images/x.jpg\n")
    hierarchy = str(write(tmp_path / "h.yaml", "a: goldfish\n"))
    commands = [
        init(tmp_path, path),
        ["benchmark", str(path), "--image-size", "32"],
        ["wordtree", "build", "--detection", str(path), "--output", "tree.tsv",
         "--hierarchy", hierarchy],
        ["anchors", str(path)],
        ["check-data", str(path)],
    ]  # fmt: skip
    for command in commands:
        assert main(command) == 2, command
        assert "list.txt is outside" in capsys.readouterr().err
    for command in commands[:3]:
        assert main([*command, "--allow-outside"]) == 0, capsys.readouterr().err
    # those that draw
    assert len(load_box_shapes(str(path), allow_outside=True).boxes_wh_px) == 1
    assert load_datamodule(str(path), [], allow_outside=True)[0].detection is not None
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert recipe["data"]["init_args"]["detection"]["init_args"]["allow_outside"] is True
    capsys.readouterr()
    assert main(["check-data", "recipe.yaml", "--data.detection.allow_outside=false"]) == 2
    assert "list.txt is outside" in capsys.readouterr().err
