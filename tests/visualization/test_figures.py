"""Figures do not depend on the settings of the user or of the working folder."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from yolo_lightning.visualization import figures as drawn
from yolo_lightning.visualization.figures import LabelPlot, new_figure, save_label_plot


def test_settings_of_the_working_folder_are_not_used(monkeypatch):
    """Matplotlib reads a matplotlibrc there, whose `text.usetex` runs LaTeX on its preamble."""
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    figure = new_figure(2, 2)
    assert not figure.text(0, 0, "a").get_usetex()


def test_boxes_of_one_shape_have_its_aspect(tmp_path, monkeypatch):
    """In images of 4:3, with sides that differ by rounding, as those read from YOLO texts."""
    figures: list[Figure] = []
    monkeypatch.setattr(drawn, "save_figure", lambda figure, path: figures.append(figure))
    boxes_px = np.array([[128, 64]] * 9, np.float32)
    boxes_px[::2, 0] *= np.float32(1 + 1e-6)
    sizes = np.array([[640, 480]])
    norm = boxes_px / sizes
    save_label_plot(LabelPlot({"a": 9}, norm, boxes_px, norm, np.array([9]), sizes), tmp_path)
    bars = [bar for bar in figures[0].axes[4].containers[0] if bar.get_height()]
    assert sum(bar.get_height() for bar in bars) == 9
    assert all(bar.get_x() == pytest.approx(1, abs=0.2) for bar in bars)  # log2
