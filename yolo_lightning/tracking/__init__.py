"""Experiment tracking with MLflow; `RunLogger` is imported, with Lightning, on first access."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolo_lightning.tracking.logger import RunLogger

__all__ = ["RunLogger"]


def __getattr__(name: str) -> Any:
    if name != "RunLogger":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from yolo_lightning.tracking.logger import RunLogger

    return RunLogger
