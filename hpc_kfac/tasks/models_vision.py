"""Image networks, written out in plain PyTorch layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """A multilayer perceptron with ReLU between its layers; the inputs are flattened.

    Args:
        widths: input size, hidden sizes, output size.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths = {list(widths)}: give at least an input and an output size, all positive")
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += ([nn.ReLU()] if i else []) + [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


def cnn(channels: int = 1, size: int = 28, classes: int = 10) -> nn.Sequential:
    """A small convolutional net: 16, 32 and 64 channels, each pooled by two, and one linear layer.

    About 29 000 parameters for images of 28 x 28; no normalisation, so its result does not depend on the rank count.
    Pooling comes before the ReLU: the same function, with a quarter of the work.

    Args:
        channels: of the images, ``[n, channels, size, size]``.
        size: pixels of a side, at least 8.
        classes: outputs.

    Raises:
        ValueError: smaller images.
    """
    if size < 8:
        raise ValueError(f"size = {size}: the network halves its images three times and needs 8 pixels or more")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 16, 3, padding=1),
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(32, 64, 3, padding=1),
            pool3=nn.MaxPool2d(2),
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            linear=nn.Linear(64 * (size // 8) ** 2, classes),
        )
    )


def autoencoder(widths: Sequence[int] = (784, 500, 250, 100, 30)) -> nn.Sequential:
    """A deep autoencoder: tanh between the layers, a linear code and linear outputs.

    Args:
        widths: from the input to the code; the decoder mirrors them.
    """
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths = {list(widths)}: give at least an input and a code size, all positive")
    sizes = [*widths, *reversed(widths[:-1])]
    code = len(widths) - 2  # this layer's output is the code
    last = len(sizes) - 2
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layer = nn.Linear(inputs, outputs)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer] if i in (code, last) else [layer, nn.Tanh()]
    return nn.Sequential(*layers)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class PadShortcut(nn.Module):
    """Option A of He et al. 2016: every second position, new channels zero; no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class ProjectionShortcut(nn.Sequential):
    """Option B of He et al. 2016: a 1 x 1 convolution and its normalisation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(OrderedDict(conv=_convolution(inputs, outputs, 1, stride), norm=nn.BatchNorm2d(outputs)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, width, 3, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions around a shortcut; the 3 x 3 one takes the stride."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: type[nn.Module]) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _convolution(inputs, width, 1)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = _convolution(width, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = _convolution(width, outputs, 1)
        self.norm3 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        return functional.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network (He et al. 2016).

    Args:
        block: BasicBlock or Bottleneck.
        depths: blocks of each stage; a stage after the first halves the image and doubles the width.
        width: channels of the first stage.
        stem: layers before the first stage; gives `width` channels.
        shortcut: what a block's shortcut does where the shape changes.
        classes: outputs.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        width: int,
        stem: nn.Sequential,
        shortcut: type[nn.Module],
        classes: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        stages: list[nn.Module] = []
        inputs = width
        for stage, depth in enumerate(depths):
            blocks: list[nn.Module] = []
            for i in range(depth):
                blocks.append(block(inputs, width << stage, 2 if stage and not i else 1, shortcut))
                inputs = (width << stage) * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.stages(self.stem(x))
        outputs: Tensor = self.linear(torch.flatten(functional.adaptive_avg_pool2d(features, 1), 1))
        return outputs


def cifar_resnet(depth: int, channels: int = 3, classes: int = 10) -> ResNet:
    """The CIFAR ResNets of He et al. 2016, section 4.2: 16, 32 and 64 channels, option A shortcuts.

    Args:
        depth: 6 n + 2 weight layers: 20, 32, 44, 56, 110.
        channels: of the images.
        classes: outputs.

    Raises:
        ValueError: a depth that is not 6 n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth = {depth}: CIFAR ResNets have 6 n + 2 layers, such as 20, 32 or 56")
    stem = nn.Sequential(OrderedDict(conv=_convolution(channels, 16, 3), norm=nn.BatchNorm2d(16), relu=nn.ReLU()))
    return ResNet(BasicBlock, [(depth - 2) // 6] * 3, 16, stem, PadShortcut, classes)


def imagenet_resnet(depth: int, classes: int = 1000) -> ResNet:
    """The ImageNet ResNets of He et al. 2016, table 1, with projection shortcuts.

    Args:
        depth: 18 or 50.
        classes: outputs.

    Raises:
        ValueError: another depth.
    """
    plans: dict[int, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
        18: (BasicBlock, [2, 2, 2, 2]),
        50: (Bottleneck, [3, 4, 6, 3]),
    }
    if depth not in plans:
        raise ValueError(f"depth = {depth}: the ImageNet ResNets here have 18 or 50 layers")
    block, depths = plans[depth]
    stem = nn.Sequential(
        OrderedDict(
            conv=_convolution(3, 64, 7, 2), norm=nn.BatchNorm2d(64), relu=nn.ReLU(), pool=nn.MaxPool2d(3, 2, padding=1)
        )
    )
    return ResNet(block, depths, 64, stem, ProjectionShortcut, classes)
