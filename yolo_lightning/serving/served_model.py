"""The code of a saved MLflow model; do not import it: `mlflow_model.save_model` saves the file."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import DEADLINE_EXCEEDED
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types.schema import DataType

from yolo_lightning.detector import DetectorModule
from yolo_lightning.images import UnreadableSample, check_image
from yolo_lightning.inference.classification import classify, prepare
from yolo_lightning.inference.loading import load, select_device
from yolo_lightning.serving.mlflow_model import CHECKPOINT, COLUMNS, IMAGE, LIMITS

_logger = logging.getLogger(__name__)


class ServedModel(PythonModel):
    """A detector that predicts as `load` does, or a classifier as `yolo-lightning classify`."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load and verify the checkpoint, on a GPU if there is one."""
        self.module = load(context.artifacts[CHECKPOINT], select_device(None))
        self.iou_threshold = getattr(self.module, "iou_threshold", None)
        self.interpolation = self.module.hparams["interpolation"]
        # Servers call from several threads. One thread takes image after image of all requests, in
        # the order in which they come: no request waits for all images of another one.
        self.worker = ThreadPoolExecutor(1)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Return a row for each object, highest score first, or for each of the top classes.

        Args:
            context: its `model_config` has `LIMITS`, or the user's values.
            model_input: column `image`, the bytes of an image file per row.
            params: for a detector `score_threshold`, `tree_threshold`, `iou_threshold`, 0 to 1; for
                a classifier `top`, 1 or more; `interpolation`, area or darknet.

        Returns:
            `COLUMNS`: `image` is the input row, `path` has the class names from the root down.

        Raises:
            MlflowException: a parameter is out of range, an image cannot be read, or a limit is
                exceeded; the time limit with status 504, others with 400.
        """
        limits = LIMITS | (context.model_config or {})
        deadline = time.monotonic() + limits["max_seconds"]
        params = _check_params(params or {})
        images = _check_images(list(model_input[IMAGE]), limits)
        rows = []
        for number, data in enumerate(images):
            task = self.worker.submit(self._predict_image, data, params)
            try:
                found = task.result(timeout=max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                task.cancel()
                raise MlflowException(
                    f"{number} of {len(images)} images predicted in {limits['max_seconds']} s, the "
                    "longest time of a request; send fewer images in a request",
                    DEADLINE_EXCEEDED,
                ) from None
            except UnreadableSample as error:
                raise _invalid_row(number, str(error)) from None
            except Exception:  # of which MLflow would send the traceback to the client
                _logger.exception("row %d cannot be predicted", number)
                raise MlflowException(
                    f"row {number}, counted from 0: not predicted; the server's log says why"
                ) from None
            rows += [{IMAGE: number, **row} for row in found]
        columns = COLUMNS[type(self.module).__name__]
        table = pd.DataFrame(rows, columns=list(columns))  # has no dtypes if it is empty
        types = {k: v.to_pandas() for k, v in columns.items() if isinstance(v, DataType)}
        return table.astype(types)

    def _predict_image(self, data: bytes, params: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of an image; runs in the worker thread."""
        params = dict(params)
        interpolation = params.pop("interpolation", self.interpolation)
        self.module.hparams["interpolation"] = interpolation
        if isinstance(self.module, DetectorModule):
            self.module.iou_threshold = params.pop("iou_threshold", self.iou_threshold)
        return list(self._rows(data, params))

    def _rows(self, data: bytes, params: dict[str, Any]) -> Iterator[dict[str, Any]]:
        module = self.module
        if isinstance(module, DetectorModule):
            for detection in module(data, **params):
                box = detection.box_xyxy_orig_px
                corners = dict(zip(("x1", "y1", "x2", "y2"), box, strict=True))
                yield {**self._class_columns(detection.node, detection.score), **corners}
            return
        size = module.hparams["image_size"]
        size_hw = (size, size) if isinstance(size, int) else (size[0], size[1])
        network_input = prepare(data, module, size_hw, "crop")
        result = classify(module, network_input, params.get("top", 5))
        for row in result["classes"]:
            yield self._class_columns(module.tree.keys.index(row["key"]), row["probability"])

    def _class_columns(self, node: int, score: float) -> dict[str, Any]:
        tree = self.module.tree
        path = [tree.names[k] for k in tree.paths[node].tolist() if k >= 0]
        names = {"name": tree.names[node], "key": tree.keys[node], "node": node}
        return {**names, "score": score, "path": path[::-1]}


def _check_images(images: list[Any], limits: dict[str, Any]) -> list[bytes]:
    """Return the encoded images of a request that is within the limits."""
    if len(images) > limits["max_rows"]:
        raise MlflowException.invalid_parameter_value(
            f"{len(images)} rows; allowed: at most {limits['max_rows']}"
        )
    checked, pixels = [], 0
    for number, data in enumerate(images):
        if not isinstance(data, bytes | bytearray):
            kind = type(data).__name__
            raise _invalid_row(number, f"{kind}; expected the bytes of an image file")
        if len(data) > limits["max_row_bytes"]:
            size = f"{len(data):,} bytes"
            raise _invalid_row(number, f"{size}; allowed: at most {limits['max_row_bytes']:,}")
        try:
            checked.append(bytes(data))
            height, width = check_image(checked[-1], "image").size_hw
        except UnreadableSample as error:
            raise _invalid_row(number, str(error)) from None
        pixels += height * width
    if pixels > limits["max_pixels"]:
        raise MlflowException.invalid_parameter_value(
            f"{len(images)} images of {pixels:,} px together; allowed: at most "
            f"{limits['max_pixels']:,}; send fewer images in a request"
        )
    return checked


def _invalid_row(number: int, reason: str) -> MlflowException:
    reason = reason.removeprefix("image: ")
    return MlflowException.invalid_parameter_value(f"row {number}, counted from 0: {reason}")


def _check_params(params: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the parameters, after checking their ranges."""
    for name, value in params.items():
        if name == "interpolation":
            if value not in ("area", "darknet"):
                raise MlflowException.invalid_parameter_value(
                    f"interpolation is {value[:60]}; allowed: area, darknet"
                )
        elif name == "top" and value < 1:
            raise MlflowException.invalid_parameter_value(f"top is {value}; allowed: 1 or more")
        elif name != "top" and not 0 <= value <= 1:
            raise MlflowException.invalid_parameter_value(f"{name} is {value}; allowed: 0 … 1")
    return dict(params)


set_model(ServedModel())
