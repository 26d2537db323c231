"""Networks: a stack of layers, the classifier, and YOLOv2."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolo_lightning.models.folding import FoldedConv
from yolo_lightning.models.head import HeadOutput, Location, SparseClassLogits
from yolo_lightning.models.layers import (
    Conv,
    CustomBackbone,
    Dropout,
    Layer,
    Pool,
    Reorg,
    Route,
    layer_outputs,
    route_sources,
)

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
}


class ConvBlock(nn.Module):
    """Convolution, batch norm or bias, activation.

    Running statistics keep 0.99 of their value a batch, as in the original program.

    Deviation: batch norm divides by sqrt(variance + 1e-5), as the original program does on GPUs;
    on CPUs it divides by sqrt(variance) + 1e-6.
    """

    def __init__(self, in_channels: int, layer: Conv) -> None:
        super().__init__()
        padding = layer.size // 2 if layer.padding is None else layer.padding
        self.conv = nn.Conv2d(
            in_channels,
            layer.filters,
            layer.size,
            layer.stride,
            padding,
            bias=not layer.batch_norm,
        )
        self.norm = nn.BatchNorm2d(layer.filters, momentum=0.01) if layer.batch_norm else None
        self.activation = (
            nn.LeakyReLU(0.1, inplace=True)
            if layer.activation == "leaky"
            else _ACTIVATIONS[layer.activation]()
        )
        self.folded: FoldedConv | None = None

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        if self.folded is not None:
            if self.training:
                self.folded = None  # a model that is trained on predicts as any other
            elif not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                return self._forward_folded(self.folded, features)
        features = self.conv(features)
        if self.norm is not None:
            features = self.norm(features)
        return torch.as_tensor(self.activation(features))

    def _forward_folded(self, folded: FoldedConv, features: Tensor) -> Tensor:
        if isinstance(self.activation, nn.LeakyReLU):
            return folded(features, self.conv, self.norm, self.activation.negative_slope)
        return torch.as_tensor(self.activation(folded(features, self.conv, self.norm, None)))


class _MaxPool(nn.Module):
    def __init__(self, layer: Pool) -> None:
        super().__init__()
        self.size, self.stride = layer.size, layer.stride

    def forward(self, features: Tensor) -> Tensor:
        if self.size == self.stride == 2:  # the usual case needs no explicit padding
            return F.max_pool2d(features, 2, ceil_mode=True)
        before = (self.size - 1) // 2
        after = self.size - 1 - before
        padded = F.pad(features, (before, after) * 2, value=-torch.inf)
        return F.max_pool2d(padded, self.size, self.stride)


class _ReorgModule(nn.Module):
    def __init__(self, layer: Reorg) -> None:
        super().__init__()
        self.stride, self.kind = layer.stride, layer.kind

    def forward(self, features: Tensor) -> Tensor:
        s = self.stride
        batch, channels, height, width = features.shape
        if self.kind == "space_to_depth":
            return space_to_depth(features, s)
        reinterpreted = features.reshape(batch, channels // s**2, height * s, width * s)
        folded = space_to_depth(reinterpreted, s)
        return folded.reshape(batch, channels * s**2, height // s, width // s)


def space_to_depth(features: Tensor, stride: int) -> Tensor:
    """Return (B, C * stride², H / stride, W / stride); channels vary fastest within a block."""
    blocks = features.unflatten(3, (-1, stride)).unflatten(2, (-1, stride))  # (B, C, H, s, W, s)
    folded: Tensor = blocks.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
    return folded


class LayerStack(nn.ModuleList):
    """The network of a list of layers; raises `InputError` if they do not match.

    Module k implements layer k; `out_channels` and `stride` (input px per cell) are the last's.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        outputs = layer_outputs(layers)
        channels = 3
        for layer, output in zip(layers, outputs, strict=True):
            self.append(_build_module(layer, channels))
            channels = output.channels
        self.out_channels, self.stride = outputs[-1].channels, outputs[-1].stride
        self._route_sources = {
            number: route_sources(number, layer)
            for number, layer in enumerate(layers)
            if isinstance(layer, Route)
        }
        self._sources = {source for sources in self._route_sources.values() for source in sources}

    def forward(self, images: Tensor) -> Tensor:
        """Return the last features (B, C, Gh, Gw) of RGB images (B, 3, H, W) in 0…1."""
        saved: dict[int, Tensor] = {}
        features = images
        for number, module in enumerate(self):
            if number in self._route_sources:
                sources = [saved[k] for k in self._route_sources[number]]
                features = torch.cat(sources, dim=1) if len(sources) > 1 else sources[0]
            else:
                features = module(features)
            if number in self._sources:
                saved[number] = features
        return features


def _build_module(layer: Layer, in_channels: int) -> nn.Module:
    match layer:
        case Conv():
            return ConvBlock(in_channels, layer)
        case Pool():
            return _MaxPool(layer)
        case Reorg():
            return _ReorgModule(layer)
        case Dropout():
            return nn.Dropout(layer.probability)
        case Route():
            return nn.Identity()
        case CustomBackbone():
            assert layer.module is not None
            return layer.module


def init_weights(module: nn.Module) -> None:
    """Initialise convolutions as He et al. do, for leaky ReLU of slope 0.1; skip custom backbones.

    Paper is silent: the original program uses a uniform distribution of the same variance.
    """
    custom = {
        part
        for stack in module.modules()
        if isinstance(stack, LayerStack)
        for layer in stack.layers
        if isinstance(layer, CustomBackbone) and layer.module is not None
        for part in layer.module.modules()
    }
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and part not in custom:
            nn.init.kaiming_normal_(part.weight, a=0.1, nonlinearity="leaky_relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def fold_for_prediction(module: nn.Module) -> None:
    """Let predictions without gradients fold batch norm into the convolutions, see `FoldedConv`.

    Parameters and training stay as they are; custom backbones are not folded. The results differ
    by rounding errors.
    """
    for block in module.modules():
        # tensors of `torch.inference_mode` do not tell whether they have changed
        if isinstance(block, ConvBlock) and not block.conv.weight.is_inference():
            block.folded = FoldedConv()


class Classifier(nn.Module):
    """A backbone, a 1x1 convolution to the K nodes, and the mean over all cells.

    Source: YOLO9000, section 3, "Darknet-19".
    """

    def __init__(self, layers: Sequence[Layer], num_nodes: int) -> None:
        super().__init__()
        self.body = LayerStack(layers)
        self.class_conv = nn.Conv2d(self.body.out_channels, num_nodes, 1)
        init_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits (B, K) of RGB images (B, 3, H, W) in 0…1, of at least one cell."""
        # the mean and the linear convolution commute: the convolution then runs on a single cell
        features = self.body(images).mean(dim=(2, 3))
        weight = self.class_conv.weight.flatten(1)
        return F.linear(features, weight, self.class_conv.bias)


class YOLOv2(nn.Module):
    """The detector: `detector_layers` and a last 1x1 convolution with sparse class logits."""

    anchors_wh_cell: Tensor

    def __init__(
        self,
        layers: Sequence[Layer],
        num_nodes: int,
        anchors_wh_cell: Tensor,
        location: Location = "direct",
    ) -> None:
        super().__init__()
        self.body = LayerStack(layers)
        self.stride, self.location = self.body.stride, location
        channels, num_anchors = self.body.out_channels, len(anchors_wh_cell)
        self.box_conv = nn.Conv2d(channels, num_anchors * 5, 1)
        init_weights(self)
        nn.init.normal_(self.box_conv.weight, std=0.01)
        self.class_weight = nn.Parameter(0.01 * torch.randn(num_anchors, num_nodes, channels))
        self.class_bias = nn.Parameter(torch.zeros(num_anchors, num_nodes))
        self.register_buffer("anchors_wh_cell", anchors_wh_cell.float())

    def forward(self, images: Tensor) -> HeadOutput:
        """Return the logits of RGB images (B, 3, H, W) in 0…1, H and W multiples of the stride."""
        features = self.body(images)
        box_logits = self.box_conv(features).unflatten(1, (-1, 5))
        class_logits = SparseClassLogits(features, self.class_weight, self.class_bias)
        return HeadOutput(box_logits, class_logits, self.location)
