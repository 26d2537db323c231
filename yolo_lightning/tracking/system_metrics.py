"""How hard the machine works while it trains."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

PREFIX = "system/"


class SystemMetrics:
    """Measures processors, memory, disk, network and GPUs by MLflow's own monitors.

    MLflow's thread around them loses what the store does not take; this one hands it over.

    Args:
        record: takes the figures, named as MLflow's pages know them, ``system/…``.
        every_s: seconds between two measurements.
    """

    def __init__(
        self, record: Callable[[Mapping[str, float]], None], every_s: float = 10.0
    ) -> None:
        self._record, self._every_s = record, every_s
        self._monitors: list[Any] = []
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            try:
                self._monitors.append(kind())
            except Exception:  # no NVIDIA GPU, no library that reads it, or a hidden /proc
                continue
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._measure(_begin)
            ending = self._stop.wait(self._every_s)
            figures = self._measure(_end)
            if figures:
                self._record({PREFIX + name: value for name, value in figures.items()})
            if ending:
                return

    def _measure(self, step: Callable[[Any], Mapping[str, float]]) -> dict[str, float]:
        """Take a step with each monitor; one that fails is left out from then on."""
        figures: dict[str, float] = {}
        for monitor in list(self._monitors):
            try:
                figures |= step(monitor)
            except Exception as error:
                self._monitors.remove(monitor)
                rank_zero_warn(f"{type(monitor).__name__} does not measure any more: {error}")
        return figures

    def stop(self) -> None:
        """Measure a last time and end."""
        self._stop.set()
        self._thread.join(5)


def _begin(monitor: Any) -> Mapping[str, float]:
    monitor.clear_metrics()
    monitor.collect_metrics()
    return {}


def _end(monitor: Any) -> Mapping[str, float]:
    figures: Mapping[str, float] = monitor.aggregate_metrics()
    return figures
