"""Callbacks, one class per file."""

if __name__ != "yolo_lightning.callbacks":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'yolo_lightning.callbacks'"
    )

from yolo_lightning.callbacks.batch_digests import BatchDigests
from yolo_lightning.callbacks.compile_network import CompileNetwork
from yolo_lightning.callbacks.data_report import DataReport
from yolo_lightning.callbacks.finite_guard import FiniteGuard
from yolo_lightning.callbacks.label_grid import LabelGrid
from yolo_lightning.callbacks.last_checkpoint import LastCheckpoint
from yolo_lightning.callbacks.multi_scale import MultiScale
from yolo_lightning.callbacks.prediction_grid import PredictionGrid
from yolo_lightning.callbacks.preemption import Preemption
from yolo_lightning.callbacks.results_table import ResultsTable
from yolo_lightning.callbacks.run_record import RunRecord
from yolo_lightning.callbacks.throughput import Throughput
from yolo_lightning.callbacks.training_progress import TrainingProgress
from yolo_lightning.callbacks.validation_report import ValidationReport

__all__ = [
    "BatchDigests",
    "CompileNetwork",
    "DataReport",
    "FiniteGuard",
    "LabelGrid",
    "LastCheckpoint",
    "MultiScale",
    "PredictionGrid",
    "Preemption",
    "ResultsTable",
    "RunRecord",
    "Throughput",
    "TrainingProgress",
    "ValidationReport",
]
