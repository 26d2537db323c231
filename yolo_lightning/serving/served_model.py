"""The code of a saved MLflow model; do not import it: `mlflow_model.save_model` saves the file."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types.schema import DataType

from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.images import UnreadableSample
from yolo_lightning.inference.classification import classify, prepare
from yolo_lightning.inference.loading import load, select_device
from yolo_lightning.serving.mlflow_model import CHECKPOINT, COLUMNS, IMAGE


class ServedModel(PythonModel):
    """A detector that predicts as `load` does, or a classifier as `yolo-lightning classify`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load and verify the checkpoint, on a GPU if there is one."""
        self.module = load(context.artifacts[CHECKPOINT], select_device(None))
        self.iou_threshold = getattr(self.module, "iou_threshold", None)
        self.interpolation = self.module.hparams["interpolation"]
        self.lock = threading.Lock()  # servers call from several threads

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Return a row for each object, highest score first, or for each of the top classes.

        Args:
            context: not used.
            model_input: column `image`, the bytes of an image file per row.
            params: for a detector `score_threshold`, `tree_threshold`, `iou_threshold`, 0 to 1; for
                a classifier `top`, 1 or more; `interpolation`, area or darknet.

        Returns:
            `COLUMNS`: `image` is the input row, `path` has the class names from the root down.

        Raises:
            MlflowException: a parameter is out of range, or an image cannot be read.
        """
        params = _check_params(params or {})
        with self.lock, tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image"
            interpolation = params.pop("interpolation", self.interpolation)
            self.module.hparams["interpolation"] = interpolation
            if isinstance(self.module, DetectorModule):
                self.module.iou_threshold = params.pop("iou_threshold", self.iou_threshold)
            rows = [
                row
                for number, data in enumerate(model_input[IMAGE])
                for row in self._rows(number, data, file, params)
            ]
        columns = COLUMNS[type(self.module).__name__]
        table = pd.DataFrame(rows, columns=list(columns))  # has no dtypes if it is empty
        types = {k: v.to_pandas() for k, v in columns.items() if isinstance(v, DataType)}
        return table.astype(types)

    def _rows(
        self, number: int, data: Any, file: Path, params: dict[str, Any]
    ) -> list[dict[str, Any]]:
        try:
            if not isinstance(data, bytes | bytearray):
                raise InputError(f"{type(data).__name__}; expected the bytes of an image file")
            file.write_bytes(data)  # both decoders read a file
            return [{IMAGE: number, **row} for row in self._predict_file(file, params)]
        except (UnreadableSample, InputError) as error:
            reason = str(error).removeprefix(f"{file}: ")
            raise MlflowException.invalid_parameter_value(
                f"row {number}, counted from 0: {reason}"
            ) from None

    def _predict_file(self, file: Path, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        module = self.module
        if isinstance(module, DetectorModule):
            for detection in module(file, **params):
                box = detection.box_xyxy_orig_px
                corners = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
                yield {**self._class_columns(detection.node, detection.score), **corners}
            return
        size = module.hparams["image_size"]
        size_hw = (size, size) if isinstance(size, int) else (size[0], size[1])
        network_input = prepare(file, module, size_hw, "crop")
        result = classify(module, network_input, params.get("top", 5))
        for row in result["classes"]:
            yield self._class_columns(module.tree.keys.index(row["key"]), row["probability"])

    def _class_columns(self, node: int, score: float) -> dict[str, Any]:
        tree = self.module.tree
        path = [tree.names[k] for k in tree.paths[node].tolist() if k >= 0]
        names = {"name": tree.names[node], "key": tree.keys[node], "node": node}
        return {**names, "score": score, "path": path[::-1]}


def _check_params(params: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the parameters, after checking their ranges."""
    for name, value in params.items():
        if name == "interpolation":
            if value not in ("area", "darknet"):
                raise MlflowException.invalid_parameter_value(
                    f"interpolation is {value}; allowed: area, darknet"
                )
        elif name == "top" and value < 1:
            raise MlflowException.invalid_parameter_value(f"top is {value}; allowed: 1 or more")
        elif name != "top" and not 0 <= value <= 1:
            raise MlflowException.invalid_parameter_value(f"{name} is {value}; allowed: 0 … 1")
    return dict(params)


set_model(ServedModel())
