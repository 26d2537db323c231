"""A pretend GPU: arithmetic on the CPU, under CUDA's rules of devices and of waiting.

Inside `PretendDevice()`, tensors on `DEVICE` refuse to meet tensors of the CPU, and operations that
would make the host wait for a GPU are counted by line, as are kernels. It says nothing of speed, of
streams or of CUDA's rounding. It is PyTorch's PrivateUse1 backend, so a process can have one.
"""

import contextlib
import traceback
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.helpers.paths import REPO

_setup_privateuseone_for_python_backend("pretend")
DEVICE, CPU = torch.device("pretend", 0), torch.device("cpu")

# kernels of operations whose result has a size that the host does not know
_WAITS = {"nonzero": 5, "_unique2": 8, "unique_dim": 8, "unique_consecutive": 8, "bincount": 4,
          "equal": 3, "masked_select": 4}  # fmt: skip
_VIEWS = {
    "view", "_unsafe_view", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze",
    "squeeze", "split", "split_with_sizes", "unbind", "as_strided", "alias", "detach",
    "_reshape_alias", "diagonal", "unfold", "lift_fresh", "empty", "empty_like", "new_empty",
    "empty_strided", "new_empty_strided", "set_", "resize_", "is_same_size", "is_pinned",
    "_has_compatible_shallow_copy_type",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_TAKES_CPU = {"_to_copy", "copy_", "set_", "equal", *_INDEXING}


class PretendTensor(torch.Tensor):
    """A tensor that says it is on `DEVICE`."""

    _real: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> "PretendTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(),
            dtype=real.dtype, device=DEVICE,
        )  # fmt: skip
        made._real = real
        return made

    def __init__(self, real: torch.Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        assert _active, "a tensor of the pretend device is used outside of it"
        return _active[-1].run(func, args, kwargs or {})

    def __reduce_ex__(self, protocol):
        return self.to("cpu").__reduce_ex__(protocol)

    def tolist(self) -> Any:
        """Return numbers; the copy is counted."""
        return self.to("cpu").tolist()


_active: list["PretendDevice"] = []


class PretendDevice(TorchDispatchMode):
    """Makes `DEVICE` usable, and counts what its host would do."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.waits: Counter[str] = Counter()  # operation and line

    def __enter__(self):
        _active.append(self)
        self._patches = contextlib.ExitStack()
        self._patches.enter_context(patch.object(torch, "tensor", _tensor))
        self._patches.enter_context(patch.object(torch.Tensor, "new_tensor", _new_tensor))
        return super().__enter__()

    def __exit__(self, *error):
        _active.remove(self)
        self._patches.close()
        return super().__exit__(*error)

    def clear(self) -> None:
        """Forget the counts."""
        self.kernels = 0
        self.waits.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        """Run an operation on the CPU, and count it if it belongs to the device."""
        name = func._schema.name.split("::")[-1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, PretendTensor)]
        device = kwargs.get("device")
        on_device = bool(ours) if device is None else torch.device(device).type == DEVICE.type
        if ours or on_device:
            self._count(name, args, kwargs, on_device)
            others = [x for x in tensors if not isinstance(x, PretendTensor) and x.dim()]
            if ours and others and name not in _TAKES_CPU:
                shapes = [tuple(x.shape) for x in others]
                raise RuntimeError(f"{name} got tensors {shapes} of the CPU at {_line()}")
        with _disable_current_modes():
            out = func(*tree_map(_to_real, args), **tree_map(_to_real, kwargs))
        if on_device and name not in ("_local_scalar_dense", "equal", "is_same_size"):
            out = tree_map(lambda x: PretendTensor(x) if isinstance(x, torch.Tensor) else x, out)
            if ours:
                return return_and_correct_aliasing(func, args, kwargs, out)
        return out

    def _count(self, name, args, kwargs, on_device):
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], None)
            from_device = isinstance(source, PretendTensor)
            to_device = on_device if target is None else isinstance(target, PretendTensor)
            is_free = kwargs.get("non_blocking", False) or (name == "copy_" and True in args[2:])
            if from_device == to_device:
                self.kernels += 1
            elif source.numel() and not (is_free and to_device):
                self.waits[f"copy to the {'device' if to_device else 'host'} at {_line()}"] += 1
        elif name == "_local_scalar_dense" or name in _WAITS:
            self.waits[f"{name} at {_line()}"] += 1
            self.kernels += _WAITS.get(name, 0)
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.waits[f"{name} at {_line()}"] += 1
        elif name in _INDEXING:
            indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
            masks = [x for x in indices if x.dtype == torch.bool]
            fills = name != "index" and len(masks) == 1 and args[2].numel() == 1
            if (masks and not fills) or not all(isinstance(x, PretendTensor) for x in indices):
                self.waits[f"{name} at {_line()}"] += 1
            self.kernels += 1
        elif name not in _VIEWS:
            self.kernels += 1


def _tensor(data: Any, *, device: Any = None, make: Any = torch.tensor, **options: Any) -> Any:
    """Make a tensor on the host and copy it, as PyTorch does where no mode sees it."""
    if device is None or torch.device(device).type != DEVICE.type:
        return make(data, device=device, **options)
    return make(data, **options).to(DEVICE)


def _new_tensor(self: torch.Tensor, data: Any, *, dtype: Any = None, device: Any = None) -> Any:
    return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)


def _to_real(x: Any) -> Any:
    if isinstance(x, PretendTensor):
        return x._real
    return CPU if isinstance(x, torch.device) and x.type == DEVICE.type else x


def _line() -> str:
    """Return the innermost line of this repository, and of the innermost library below it."""
    own, library = "", ""
    for frame in traceback.extract_stack():
        path = frame.filename
        if "/site-packages/" in path:
            if "/torch/utils/_pytree" not in path and "/torch/_" not in path:
                library = f" in {path.partition('/site-packages/')[2]}:{frame.lineno}"
        elif path.startswith(str(REPO)) and not path.endswith("pretend_device.py"):
            own, library = f"{path.removeprefix(f'{REPO}/')}:{frame.lineno}", ""
    return own + library


class PretendAccelerator(Accelerator):
    """Lightning's view of the device."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return devices

    @staticmethod
    def get_parallel_devices(devices):
        return [DEVICE]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "pretend"


def strategy() -> SingleDeviceStrategy:
    """Return the strategy of a trainer on the device."""
    return SingleDeviceStrategy(device=DEVICE, accelerator=PretendAccelerator())
