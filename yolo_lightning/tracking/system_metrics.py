"""System metrics: use of CPUs, memory, disk, network and GPUs during training."""

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
    """Measures CPUs, memory, disk, network and GPUs with MLflow's monitors, in a thread.

    `record` is called with each sample; names start with ``system/``. MLflow's own thread loses
    samples that the store rejects.
    """

    def __init__(
        self, record: Callable[[Mapping[str, float]], None], interval_s: float = 10.0
    ) -> None:
        self._record, self._interval_s = record, interval_s
        self._monitors: list[Any] = []
        for monitor_class in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            try:
                self._monitors.append(monitor_class())
            except Exception:  # no NVIDIA GPU, no library to read it, or no /proc
                continue
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._for_each_monitor(_start_sample)
            stopped = self._stop.wait(self._interval_s)
            metrics = self._for_each_monitor(_finish_sample)
            if metrics:
                self._record({PREFIX + name: value for name, value in metrics.items()})
            if stopped:
                return

    def _for_each_monitor(self, function: Callable[[Any], Mapping[str, float]]) -> dict[str, float]:
        """Merge the results of a function over all monitors; remove a monitor that fails."""
        metrics: dict[str, float] = {}
        for monitor in list(self._monitors):
            try:
                metrics |= function(monitor)
            except Exception as error:
                self._monitors.remove(monitor)
                rank_zero_warn(f"{type(monitor).__name__} failed and is disabled: {error}")
        return metrics

    def stop(self) -> None:
        """Record a last sample and stop the thread."""
        self._stop.set()
        self._thread.join(5)


def _start_sample(monitor: Any) -> Mapping[str, float]:
    monitor.clear_metrics()
    monitor.collect_metrics()
    return {}


def _finish_sample(monitor: Any) -> Mapping[str, float]:
    metrics: Mapping[str, float] = monitor.aggregate_metrics()
    return metrics
