"""Read and write Darknet's `.weights` files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from yolo_lightning.errors import InputError, require_file
from yolo_lightning.models.networks import ConvBlock

VERSION = (0, 2, 0)
"""Version of written files; since 0.2, the number of images is a 64-bit integer."""


@dataclass
class Weights:
    """A `.weights` file."""

    path: Path
    version: tuple[int, int, int]
    images_seen: int  # during training
    header_bytes: int
    values: NDArray[np.float32]  # (N,), memory-mapped


def read_weights(path: str | Path) -> Weights:
    """Memory-map a `.weights` file and read its header.

    Raises:
        InputError: missing, too short, an invalid header, or an incomplete value; names the byte.
    """
    file = require_file(path, "weights file")
    size = file.stat().st_size
    if size < 16:
        raise InputError(f"{file}: {size} bytes; expected a header of 16 or 20 bytes and values")
    with file.open("rb") as handle:
        head = handle.read(20)
    major, minor, revision = (int(n) for n in np.frombuffer(head[:12], dtype="<i4"))
    if not (0 <= major < 1000 and 0 <= minor < 1000 and revision >= 0):
        raise InputError(
            f"{file}, byte 0: version {major}.{minor}.{revision}; expected three small numbers: "
            "not a Darknet weights file"
        )
    is_64_bit = major * 10 + minor >= 2
    header_bytes = 20 if is_64_bit else 16
    if size < header_bytes:
        raise InputError(
            f"{file}, byte {size}: expected a header of 20 bytes, as in version {major}.{minor}"
        )
    images_seen = int(np.frombuffer(head[12:header_bytes], dtype="<i8" if is_64_bit else "<i4")[0])
    if images_seen < 0:
        raise InputError(f"{file}, byte 12: {images_seen} images seen; expected 0 or more")
    extra = (size - header_bytes) % 4
    if extra:
        raise InputError(
            f"{file}, byte {size - extra}: {extra} bytes after the last complete value; "
            "the file is truncated, or not a weights file"
        )
    count = (size - header_bytes) // 4
    values: NDArray[np.float32] = (
        np.memmap(file, dtype="<f4", mode="r", offset=header_bytes, shape=(count,))
        if count
        else np.zeros(0, dtype=np.float32)
    )
    return Weights(file, (major, minor, revision), images_seen, header_bytes, values)


class WeightsReader:
    """Read tensors from a `.weights` file in sequence."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.position = weights, 0

    @property
    def remaining(self) -> int:
        """Number of values left."""
        return len(self.weights.values) - self.position

    @property
    def byte(self) -> int:
        """Offset of the next value in the file."""
        return self.weights.header_bytes + 4 * self.position

    def take(self, shape: Sequence[int]) -> Tensor:
        """Return the next values as a float32 tensor of this shape.

        Raises:
            InputError: too few values, or a value that is not finite; names the byte.
        """
        count = int(np.prod(shape))
        if count > self.remaining:
            raise InputError(
                f"{self.weights.path}, byte {self.byte}: expected {count} more values, "
                f"found {self.remaining}"
            )
        values = np.array(self.weights.values[self.position : self.position + count], np.float32)
        invalid = np.flatnonzero(~np.isfinite(values))
        if len(invalid):
            raise InputError(
                f"{self.weights.path}, byte {self.byte + 4 * int(invalid[0])}: "
                f"the value {values[invalid[0]]}; expected finite numbers"
            )
        self.position += count
        return torch.from_numpy(values.reshape(tuple(shape)))

    @torch.no_grad()
    def fill(self, block: ConvBlock) -> None:
        """Fill a convolution: bias, then scale, mean and variance of batch norm, then kernels.

        Raises:
            InputError: see `take`; also a negative variance; names the byte.
        """
        for tensor in conv_tensors(block):
            values = self.take(tensor.shape)
            if block.norm is not None and tensor is block.norm.running_var and values.min() < 0:
                offset = self.byte - 4 * values.numel() + 4 * int((values < 0).int().argmax())
                raise InputError(
                    f"{self.weights.path}, byte {offset}: the variance {values.min():g}; expected "
                    "0 or more: the weights belong to another network"
                )
            tensor.copy_(values)


def conv_tensors(block: ConvBlock) -> list[Tensor]:
    """Return the tensors of a convolution in the order of the file."""
    if block.norm is None:
        assert block.conv.bias is not None
        return [block.conv.bias, block.conv.weight]
    norm = block.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return [norm.bias, norm.weight, norm.running_mean, norm.running_var, block.conv.weight]


def conv_blocks(body: nn.ModuleList) -> list[tuple[int, ConvBlock]]:
    """Return the convolutions of a network with their layer indices."""
    return [(k, layer) for k, layer in enumerate(body) if isinstance(layer, ConvBlock)]


def write_weights(path: Path, tensors: Iterable[Tensor], images_seen: int) -> None:
    """Write a `.weights` file of version 0.2."""
    with path.open("wb") as handle:
        np.array(VERSION, dtype="<i4").tofile(handle)
        np.array([images_seen], dtype="<i8").tofile(handle)
        for tensor in tensors:
            tensor.detach().cpu().contiguous().float().numpy().astype("<f4").tofile(handle)
