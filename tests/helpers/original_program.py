"""Debian's package `darknet`, the original program, called in a process of its own.

Run as a script, it prints a JSON list of the boxes of an image before suppression: corners in px of
the image, and the score of each class, 0 below the threshold.
"""

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path("/usr/bin/darknet")
LIBRARY = Path("/usr/lib/darknet/libdarknet.so")
FILES = Path("/usr/share/darknet")  # cfg/, data/


class _Image(ctypes.Structure):
    _fields_ = [
        ("w", ctypes.c_int),
        ("h", ctypes.c_int),
        ("c", ctypes.c_int),
        ("data", ctypes.POINTER(ctypes.c_float)),
    ]


class _Detection(ctypes.Structure):
    _fields_ = [
        ("box_cxcywh_px", ctypes.c_float * 4),
        ("classes", ctypes.c_int),
        ("prob", ctypes.POINTER(ctypes.c_float)),
        ("mask", ctypes.POINTER(ctypes.c_float)),
        ("objectness", ctypes.c_float),
        ("sort_class", ctypes.c_int),
    ]


def detect(
    cfg: Path, weights: Path, image: Path, classes: int, threshold: float
) -> list[dict[str, Any]]:
    """Return the boxes of an image, see the module."""
    arguments = map(str, (cfg, weights, image, classes, threshold))
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def classify(cfg: Path, weights: Path, names: Path, image: Path) -> list[tuple[str, float]]:
    """Return the names of the five most probable classes, and their probabilities in percent."""
    data = weights.with_name("classifier.data")
    data.write_text(f"classes=1000\nlabels={names}\nnames={names}\ntop=5\n")
    command = [str(PROGRAM), "classifier", "predict", *map(str, (data, cfg, weights, image))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    rows = (line.partition("%: ") for line in done.stdout.splitlines() if "%: " in line)
    return [(name, float(percent)) for percent, _, name in rows]


def billion_operations(cfg: Path) -> tuple[int, float]:
    """Return the size of a `.cfg`, px, and the sum of what is printed for its layers."""
    data, missing = FILES / "cfg/coco.data", "missing.weights"
    command = [str(PROGRAM), "detector", "test", *map(str, (data, cfg, missing, missing))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    (size,) = re.findall(r"^ +0 conv .*? (\d+) x +\d+ x +3 ", done.stderr, re.M)
    return int(size), sum(map(float, re.findall(r"([\d.]+) BFLOPs", done.stderr)))


def _call_library(
    cfg: str, weights: str, file: str, classes: int, threshold: float
) -> list[dict[str, Any]]:
    library = ctypes.CDLL(str(LIBRARY))
    library.load_network.restype = ctypes.c_void_p
    library.load_image_color.restype = _Image
    library.network_predict_image.argtypes = [ctypes.c_void_p, _Image]
    library.get_network_boxes.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_float, ctypes.c_float,
        ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int),
    ]  # fmt: skip
    library.get_network_boxes.restype = ctypes.POINTER(_Detection)
    network = library.load_network(cfg.encode(), weights.encode(), 0)
    image = library.load_image_color(file.encode(), 0, 0)
    library.network_predict_image(network, image)
    count = ctypes.c_int(0)
    found = library.get_network_boxes(
        network, image.w, image.h, threshold, 0.5, None, 0, ctypes.byref(count)
    )
    rows = []
    for one in found[: count.value]:
        x, y, w, h = one.box_cxcywh_px
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        rows.append({"box_xyxy_px": box, "scores": one.prob[:classes]})
    return rows


if __name__ == "__main__":
    cfg, weights, image, classes, threshold = sys.argv[1:]
    print(json.dumps(_call_library(cfg, weights, image, int(classes), float(threshold))))
