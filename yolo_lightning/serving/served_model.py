"""What MLflow executes to load a model: encoded images in, a table of what they show out.

Not to be imported: `mlflow_model.save_model` names this file as a model's code.
"""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.types.schema import DataType

from yolo_lightning.detector import DetectorModule
from yolo_lightning.errors import InputError
from yolo_lightning.images import UnreadableSample
from yolo_lightning.inference.classification import classify, read_image
from yolo_lightning.inference.loading import load
from yolo_lightning.serving.mlflow_model import CHECKPOINT, COLUMNS, IMAGE


class ServedModel(PythonModel):
    """A checkpoint that answers as `load` and, of a classifier, `yolo-lightning classify` do."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the checkpoint, verified; it goes to a GPU where there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module = load(context.artifacts[CHECKPOINT], device)
        self.iou_threshold = getattr(self.module, "iou_threshold", None)
        self.turn = threading.Lock()  # servers ask from several threads

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Return a row for each object, best first, or for each of a classifier's names.

        Args:
            context: not used.
            model_input: column `image`, bytes of an image file a row.
            params: of a detector `score_threshold`, `tree_threshold`, `iou_threshold`, 0…1; of a
                classifier `top`, 1 or more.

        Returns:
            `COLUMNS`; `image` counts the input's rows from 0, `path` has the names from the tree's
            top down, corners are px of the original image.

        Raises:
            MlflowException: a parameter out of range, or an image that cannot be read; names it.
        """
        given = _checked(params or {})
        with self.turn, tempfile.TemporaryDirectory() as place:
            file = Path(place) / "image"
            if isinstance(self.module, DetectorModule):
                self.module.iou_threshold = given.pop("iou_threshold", self.iou_threshold)
            rows = [
                row
                for number, data in enumerate(model_input[IMAGE])
                for row in self._rows(number, data, file, given)
            ]
        columns = COLUMNS[type(self.module).__name__]
        table = pd.DataFrame(rows, columns=list(columns))  # without rows, of no types
        types = {k: v.to_pandas() for k, v in columns.items() if isinstance(v, DataType)}
        return table.astype(types)

    def _rows(
        self, number: int, data: Any, file: Path, given: dict[str, Any]
    ) -> list[dict[str, Any]]:
        try:
            if not isinstance(data, bytes | bytearray):
                raise InputError(f"{type(data).__name__}; expected the bytes of an image file")
            file.write_bytes(data)  # both ways of decoding begin with a file
            return [{IMAGE: number, **row} for row in self._found(file, given)]
        except (UnreadableSample, InputError) as error:
            reason = str(error).removeprefix(f"{file}: ")
            raise MlflowException.invalid_parameter_value(
                f"row {number}, counted from 0: {reason}"
            ) from None

    def _found(self, file: Path, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
        module = self.module
        if isinstance(module, DetectorModule):
            for one in module(file, **given):
                corners = dict(zip(("x1", "y1", "x2", "y2"), one.box_xyxy_orig_px, strict=True))
                yield {**self._named(one.node, one.score), **corners}
            return
        size = module.hparams["image_size"]
        size_hw = (size, size) if isinstance(size, int) else (size[0], size[1])
        found = classify(module, read_image(file), size_hw, "letterbox", given.get("top", 5))
        for row in found["classes"]:
            yield self._named(module.tree.keys.index(row["key"]), row["probability"])

    def _named(self, node: int, score: float) -> dict[str, Any]:
        tree = self.module.tree
        path = [tree.names[k] for k in tree.paths[node].tolist() if k >= 0]
        named = {"name": tree.names[node], "key": tree.keys[node], "node": node}
        return {**named, "score": score, "path": path[::-1]}


def _checked(params: dict[str, Any]) -> dict[str, Any]:
    """Return parameters of one's own, in their ranges."""
    for name, value in params.items():
        if name == "top" and value < 1:
            raise MlflowException.invalid_parameter_value(f"top is {value}; allowed: 1 or more")
        if name != "top" and not 0 <= value <= 1:
            raise MlflowException.invalid_parameter_value(f"{name} is {value}; allowed: 0 … 1")
    return dict(params)


set_model(ServedModel())
