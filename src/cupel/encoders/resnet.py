"""ResNets: with the CIFAR stem and a width multiplier, and torchvision's at 224 pixels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from cupel.encoders.image import ImageEncoder, NormalisationName, assemble
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings

__all__ = ["BasicBlock", "ResNet18", "ResNet50", "downsample"]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al., CVPR 2016, figure 5); names are torchvision's.

    Our own, since importing torchvision's models takes three seconds.
    """

    def __init__(self, inner: int, outer: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + shortcut)
        return out


def downsample(inner: int, outer: int, stride: int) -> nn.Sequential | None:
    """Projection of a shortcut where shapes change, else None (identity)."""
    if stride == 1 and inner == outer:
        return None
    return nn.Sequential(nn.Conv2d(inner, outer, 1, stride=stride, bias=False), nn.BatchNorm2d(outer))


def _stage(inner: int, outer: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inner, outer, stride, downsample(inner, outer, stride))
    return nn.Sequential(first, BasicBlock(outer, outer))


class CifarResNet18(nn.Module):
    """ResNet-18 with a 3×3 stem of stride 1 and no max-pool; key names are torchvision's."""

    def __init__(self, width: int, stem_padding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=stem_padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, 1)
        self.layer2 = _stage(width, 2 * width, 2)
        self.layer3 = _stage(2 * width, 4 * width, 2)
        self.layer4 = _stage(4 * width, 8 * width, 2)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))


@settings
class ResNet18:
    """ResNet-18.

    Args:
        stem: `cifar` = 3×3 stride 1, no max-pool; `imagenet` = torchvision's 7×7 stride 2 and max-pool.
        width_multiplier: Channels relative to 64 (CIFAR stem only); the embedding has 512 times this.
        stem_padding: 1, or 2 as in solo-learn's CIFAR encoders (34×34 maps).
        input_size: Side of the images in pixels; 32 is usual with the CIFAR stem, 224 with the other.
        normalisation: Mean and standard deviation applied inside.

    Source: He et al., CVPR 2016; CIFAR stem as in Chen et al., SimCLR, 2020, appendix B.9.
    """

    stem: Literal["cifar", "imagenet"] = "cifar"
    width_multiplier: Positive = 1.0
    stem_padding: Annotated[int, Field(ge=1, le=2)] = 1
    input_size: PositiveInt = 32
    normalisation: NormalisationName = "cifar10"
    revision: ClassVar[int] = 1

    def build(self, seed: Seed) -> ImageEncoder:
        """A freshly initialised encoder."""
        if self.stem == "imagenet":
            return assemble(self, "resnet18", lambda: _torchvision("resnet18"), 512, seed)
        width = max(1, round(64 * self.width_multiplier))
        return assemble(self, "resnet18", lambda: CifarResNet18(width, self.stem_padding), 8 * width, seed)


@settings
class ResNet50:
    """torchvision's ResNet-50 without its classifier; embedding of 2048 dimensions.

    Args:
        input_size: Side of the images in pixels.
        normalisation: Mean and standard deviation applied inside.
    """

    input_size: PositiveInt = 224
    normalisation: NormalisationName = "imagenet"
    revision: ClassVar[int] = 1

    def build(self, seed: Seed) -> ImageEncoder:
        """A freshly initialised encoder."""
        return assemble(self, "resnet50", lambda: _torchvision("resnet50"), 2048, seed)


def _torchvision(name: str) -> nn.Module:
    import torchvision  # three seconds, which encoders without it need not wait

    net: nn.Module = torchvision.models.get_model(name, weights=None)
    net.fc = nn.Identity()
    return net
