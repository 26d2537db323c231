"""Measure the memory of one evaluation of an untrained detector, in a process of its own.

Run: python -m tests.helpers.evaluation_memory NODES BATCH {validate,detect} [CHILDREN]
"""

import resource
import sys
from typing import Any

import torch

from tests.helpers.golden import detection_batch
from yolo_lightning import DetectorModule

IMAGE_SIZE = 416


def peak_mb() -> float:
    """Return the highest memory use of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tree_rows(nodes: int, children: int) -> list[tuple[str, str, str]]:
    """Return a tree whose inner nodes have so many children; 0 for a flat list."""
    parents = [str((k - 1) // children) if children and k else "-" for k in range(nodes)]
    return [(str(k), parent, str(k)) for k, parent in enumerate(parents)]


@torch.inference_mode()
def main(nodes: int, batch_size: int, use: str, children: int = 8) -> None:
    """Print the memory that the evaluation adds to that of the network and its activations, MB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    anchors = [(1.0, 1.0), (2.0, 3.0), (4.0, 2.0), (6.0, 7.0), (11.0, 9.0)]
    layers: list[list[Any]] = [["conv", 8, 3, 2], *[["pool"]] * 4]
    module = DetectorModule(tree_rows(nodes, children), anchors, layers, 0, 0).eval()
    module.boxed.fill_(True)
    images = torch.randint(0, 256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    module.network(images.float() / 255)
    before = peak_mb()
    if use == "detect":
        sizes = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE]] * batch_size)
        found = module.detect_most_specific(images, sizes, 0.005)
        print("detections", sum(len(one.labels) for one in found))
    else:
        module.evaluation.reset(torch.arange(nodes), module.boxed_ancestors())
        labels = torch.randint(0, nodes, (batch_size, 3))
        boxes = torch.tensor([0.5, 0.5, 0.2, 0.3]).expand(batch_size, 3, 4)
        batch = detection_batch(boxes, labels)
        batch.images, batch.sizes_hw_orig = images, torch.full((batch_size, 2), IMAGE_SIZE)
        batch.sample_ids = torch.arange(batch_size)
        module.validation_step(batch, 0)
        metrics = module.evaluation.compute(module.boxed)
        print("metrics", len(metrics), "classes", len(module.evaluation.per_class))
    print(f"MB {peak_mb() - before:.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
