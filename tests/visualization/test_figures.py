"""Figures do not depend on the settings of the user or of the working folder."""

import matplotlib

from yolo_lightning.visualization.figures import new_figure


def test_settings_of_the_working_folder_are_not_used(monkeypatch):
    """Matplotlib reads a matplotlibrc there, whose `text.usetex` runs LaTeX on its preamble."""
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    figure = new_figure(2, 2)
    assert not figure.text(0, 0, "a").get_usetex()
