"""The image encoder: a backbone with its normalisation inside and a card that says what it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cupel.protocols import Images
from cupel.seeds import Seed

__all__ = ["NORMALISATIONS", "Card", "ImageEncoder", "NormalisationName", "assemble"]

NormalisationName = Literal["none", "half", "cifar10", "stl10", "imagenet", "clip"]

# mean and standard deviation per channel, of inputs in [0, 1]
NORMALISATIONS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "stl10": ((0.4409, 0.4279, 0.3868), (0.2551, 0.2480, 0.2564)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


@dataclass(frozen=True)
class Card:
    """What an encoder file says of itself. Read from a file it is a claim, not a fact.

    Args:
        architecture: Settings of the encoder with `method`, enough to build it again.
        width: Dimensions of the embedding.
        input_size: Side of the images in pixels.
        recipe: How it was trained (objective, data, steps; no seed); empty where unknown.
        source: Where the weights come from: file, SHA-256, key map, earlier cards' digests.
        manifest: The backdoor manifest; None for an encoder nobody is known to have attacked.
    """

    architecture: Mapping[str, Any]
    width: int
    input_size: int
    recipe: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema": 1, **dataclasses.asdict(self)}


class Normalised(nn.Module):
    """Maps [0, 1] to what the backbone was trained on, then applies it."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: nn.Module, normalisation: str) -> None:
        super().__init__()
        mean, std = (torch.tensor(one, dtype=torch.float64).view(1, 3, 1, 1) for one in NORMALISATIONS[normalisation])
        self.backbone = backbone
        self.register_buffer("scale", (1 / std).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # (x − mean) / std in one pass over the pixels
        out: Tensor = self.backbone(torch.addcmul(self.shift, x, self.scale))
        return out


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """Images in [0, 1] → embeddings.

    Args:
        module: The network, normalisation included.
        card: What it is.
    """

    module: Normalised
    card: Card

    @property
    def width(self) -> int:
        """Dimensions of the embedding."""
        return self.card.width

    @property
    def input_size(self) -> int:
        """Side of the images in pixels."""
        return self.card.input_size

    def __call__(self, x: Images, /) -> Float[Tensor, "batch width"]:
        """Embeddings."""
        out: Tensor = self.module(x)
        return out

    def copy(self, **card: Any) -> ImageEncoder:
        """An independent copy; keywords replace fields of the card."""
        return ImageEncoder(copy.deepcopy(self.module), dataclasses.replace(self.card, **card))


def assemble(made_by: Any, method: str, backbone: Callable[[], nn.Module], width: int, seed: Seed) -> ImageEncoder:
    """Initialise a backbone from `seed` (the global generator stays as it was) and put it behind its normalisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed.value)
        net = backbone()
    module = Normalised(net, made_by.normalisation).to(memory_format=torch.channels_last)
    architecture = {"method": method, **dataclasses.asdict(made_by)}
    return ImageEncoder(module.eval(), Card(architecture, width, made_by.input_size))
