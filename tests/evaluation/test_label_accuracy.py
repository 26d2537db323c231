"""Top-1 and top-5 of image labels, at several levels of a tree."""

import math
import subprocess
import sys

import pytest
import torch

from tests.helpers.paths import REPO
from yolo_lightning import WordTree
from yolo_lightning.errors import InputError
from yolo_lightning.evaluation import label_accuracy
from yolo_lightning.evaluation.label_accuracy import LabelAccuracy

TREE = WordTree([
    ("animal", "-", "animal"), ("car", "-", "car"), ("cat", "animal", "cat"),
    ("dog", "animal", "dog"), ("manx", "cat", "Manx"), ("bengal", "cat", "Bengal"),
    *((f"dog{k}", "dog", f"dog {k}") for k in range(6)),
])  # fmt: skip
# animal, car; cat, dog; Manx, Bengal; six dogs: P(node | parent)
CONDITIONAL = [0.9, 0.1, 0.6, 0.4, 0.75, 0.25, *[1 / 6] * 6]


def test_labels_at_several_levels_exclude_each_other():
    accuracy = LabelAccuracy(TREE)
    accuracy.set_labels(torch.tensor([4, 0, 3, 0]))
    assert accuracy.nodes.tolist() == [0, 3, 4]
    logits = torch.tensor([CONDITIONAL]).log()
    # dog .36, Manx .405; an animal that is neither .9 - .36 - .405, the Bengal's
    torch.testing.assert_close(accuracy.class_probs(logits), torch.tensor([[0.135, 0.36, 0.405]]))
    accuracy.update(logits.repeat(4, 1), torch.tensor([4, 3, 0, -1]))
    assert accuracy.compute() == pytest.approx({"top1": 1 / 3, "top5": 1})
    assert accuracy.per_class["manx"] == {"name": "Manx", "images": 1, "top1": 1, "top5": 1}
    assert accuracy.per_class["animal"]["top1"] == accuracy.per_class["dog"]["top1"] == 0
    # a label is subtracted from the nearest one above it only: dog 0 from dog, dog from animal
    accuracy.set_labels(torch.tensor([0, 3, 6]))
    torch.testing.assert_close(accuracy.class_probs(logits), torch.tensor([[0.54, 0.3, 0.06]]))


def test_a_class_and_its_only_child_count_as_one():
    tree = WordTree([("pet", "-", "pet"), ("dog", "pet", "dog"), ("car", "-", "car")])
    accuracy = LabelAccuracy(tree)
    accuracy.set_labels(torch.tensor([0, 1, 2]))
    logits = torch.tensor([[0.8, 1.0, 0.2], [0.3, 1.0, 0.7]]).log()
    accuracy.update(logits[[0, 0, 1]], torch.tensor([0, 1, 0]))
    assert accuracy.compute()["top1"] == pytest.approx(2 / 3)
    assert (accuracy.per_class["pet"]["top1"], accuracy.per_class["dog"]["top1"]) == (0.5, 1)


def test_leaves_compete_with_all_leaves(monkeypatch):
    accuracy = LabelAccuracy(TREE)
    accuracy.set_labels(torch.tensor([4, 6]))
    assert accuracy.nodes.tolist() == TREE.leaves.tolist()
    logits = torch.tensor([CONDITIONAL, CONDITIONAL, CONDITIONAL]).log()
    # Manx .405, Bengal .135, car .1, and dogs of .06 each: dog 0 is among the first five or not
    logits[1, 6] += 1
    logits[2, 6] -= 1
    for max_logits in (2**21, 1):
        monkeypatch.setattr(label_accuracy, "_MAX_LOGITS", max_logits)
        accuracy.update(logits, torch.tensor([4, 6, 6]))
        assert accuracy.compute() == pytest.approx({"top1": 1 / 3, "top5": 2 / 3})
        assert accuracy.per_class["dog0"] == {"name": "dog 0", "images": 2, "top1": 0, "top5": 0.5}
        accuracy.reset()
    accuracy.update(logits[:1], torch.tensor([-1]))
    assert all(math.isnan(value) for value in accuracy.compute().values())  # no images


def test_a_label_that_is_no_class_is_an_error():
    accuracy = LabelAccuracy(TREE)
    with pytest.raises(InputError, match="an image has the label 'dog', which is not"):
        accuracy.update(torch.zeros(2, 12), torch.tensor([4, 3]))


MEMORY = """
import resource, torch
from tests.helpers.evaluation_memory import peak_mb, tree_rows
from yolo_lightning import WordTree
from yolo_lightning.evaluation.label_accuracy import LabelAccuracy
accuracy = LabelAccuracy(WordTree(tree_rows(100_000, 8)))
logits = torch.randn(128, 100_000)
before = peak_mb()
accuracy.set_labels(torch.arange(100_000))
accuracy.update(logits, torch.arange(128))
accuracy.compute()
print(int(peak_mb() - before))
"""


@pytest.mark.slow
def test_128_images_of_100_000_classes_need_300_mb():
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 300
