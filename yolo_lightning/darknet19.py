"""Trunks: a readable list of layers each, and the one module that builds them."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

Layer = tuple[int, int] | Literal["pool", "tap"]
"""(output channels, kernel size) of a convolution; ``pool`` halves; ``tap`` marks the features
that the passthrough takes, just before the last pool."""

DARKNET19: tuple[Layer, ...] = (
    (32, 3), "pool",
    (64, 3), "pool",
    (128, 3), (64, 1), (128, 3), "pool",
    (256, 3), (128, 1), (256, 3), "pool",
    (512, 3), (256, 1), (512, 3), (256, 1), (512, 3), "tap", "pool",
    (1024, 3), (512, 1), (1024, 3), (512, 1), (1024, 3),
)  # fmt: skip
"""Source: YOLO9000, section 3, table 6, without the classifier's last convolution."""

SMALL: tuple[Layer, ...] = (
    (16, 3), "pool",
    (32, 3), "pool",
    (64, 3), "pool",
    (128, 3), "tap", "pool",
    (256, 3), (128, 1), (256, 3),
)  # fmt: skip
"""Our own, for CPUs and small images: Darknet-19's pattern with one level less, stride 16."""

TRUNKS: dict[str, tuple[Layer, ...]] = {"darknet19": DARKNET19, "small": SMALL}


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, leaky ReLU of slope 0.1; keeps height and width."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(0.1, inplace=True),
        )


class Trunk(nn.Module):
    """The convolutional trunk that a list of layers describes.

    Args:
        layers: see `Layer`; exactly one ``tap``.

    Attributes:
        out_channels, tap_channels: channels of the last features and of the tapped ones.
        stride: network input px per cell of the last features; the tap has half of it.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        channels, self.stride = 3, 1
        parts: list[list[nn.Module]] = [[], []]
        tapped = 0
        for layer in layers:
            if layer == "tap":
                self.tap_channels, tapped = channels, tapped + 1
            elif layer == "pool":
                parts[tapped].append(nn.MaxPool2d(2))
                self.stride *= 2
            else:
                parts[tapped].append(ConvBlock(channels, *layer))
                channels = layer[0]
        self.before_tap, self.after_tap = nn.Sequential(*parts[0]), nn.Sequential(*parts[1])
        self.out_channels = channels

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last features (B, C, Gh, Gw) and the tapped ones (B, C', 2 Gh, 2 Gw).

        Args:
            images: float (B, 3, H, W), RGB in 0…1; H and W multiples of the stride.
        """
        tap = self.before_tap(images)
        return self.after_tap(tap), tap


def init_weights(module: nn.Module) -> None:
    """Draw convolution kernels as He et al. do, for leaky ReLU of slope 0.1.

    Paper is silent: the original program draws uniformly with the same variance.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, a=0.1, nonlinearity="leaky_relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
