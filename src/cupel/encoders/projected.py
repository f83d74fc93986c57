"""An encoder that keeps the first layers of the projector it was pre-trained with, as SimCLR v2 fine-tunes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from cupel.encoders.fast import Fast
from cupel.encoders.image import Card, ImageEncoder
from cupel.encoders.resnet import ResNet18, ResNet50
from cupel.errors import UsageError
from cupel.seeds import Seed
from cupel.settings import OneOf, parse, registry, settings

__all__ = ["BASES", "OnBase", "Projected", "base_encoder", "kept_layers", "middle_layer"]

BASES: Mapping[str, type] = registry("encoders", {"fast": Fast, "resnet18": ResNet18, "resnet50": ResNet50})
"""Architectures that projector layers can be put on."""


class Base(Protocol):
    """What is put below the layers."""

    @property
    def input_size(self) -> int: ...
    def build(self, seed: Seed) -> ImageEncoder: ...


def middle_layer(width: int, seed: Seed) -> nn.Sequential:
    """A layer in the middle of SimCLR v2's projector: Linear, BatchNorm, ReLU; as wide as its input.

    The linear map has no bias, for BatchNorm's shift is one.

    Args:
        width: Dimensions of input and output.
        seed: Of the initialisation; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed.value)
        return nn.Sequential(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())


class _Behind(nn.Module):
    """What goes before a network's own class: `projector` behind its output.

    So the network's blocks and their names stay where they are, with one more block, `projector`, after them.
    """

    projector: nn.Sequential

    def forward(self, x: Tensor) -> Tensor:
        network: Any = super()
        out: Tensor = self.projector(network.forward(x))
        return out


@functools.cache
def _with_projector(cls: type) -> type[nn.Module]:
    return cast("type[nn.Module]", type(f"Projected{cls.__name__}", (_Behind, cls), {}))


@settings
class OnBase:
    """An encoder made of another one.

    Args:
        base: Architecture below.
    """

    base: Annotated[Base, OneOf(BASES)] = Fast()

    @property
    def input_size(self) -> int:
        """Side of the images in pixels: that of the base."""
        return self.base.input_size


@settings
class Projected(OnBase):
    """Another encoder with the first layers of a SimCLR v2 projector behind it; they give the embedding.

    After pre-training with `simclr_v2`, which then adds the remaining layers alone, probes and fine-tuning start at
    that middle layer; `base_encoder` gives the network without it. Its weights and their names are those of the base,
    and `projector.*`, so the file also loads as the base architecture.

    Args:
        base: Architecture below; not a `projected` one.
        layers: Projector layers that are kept, each as wide as the base's embedding; 0 = none, 1 = as SimCLR v2
            fine-tunes (`ft_proj_selector` in the authors' code).

    Example:
        >>> encoder = Projected(base=Fast(width=4)).build(Seed(0))
        >>> encoder.width, encoder.card.architecture["layers"], kept_layers(encoder.module)
        (16, 1, 1)

    Source: Chen et al., Big Self-Supervised Models are Strong Semi-Supervised Learners, NeurIPS 2020,
        arXiv:2006.10029, section 2.
    Deviations: initial weights of the layers are torch's, not normal with standard deviation 0.01 as in the authors'
        code; the BatchNorm behind takes the scale off again.
    """

    layers: Annotated[int, Field(ge=0)] = 1
    revision: ClassVar[int] = 1

    def build(self, seed: Seed) -> ImageEncoder:
        """A freshly initialised encoder; its base is what `base.build(seed)` gives."""
        encoder = self.base.build(seed)
        network = encoder.module.backbone
        if any(name == "projector" for name, _ in network.named_children()):
            raise UsageError("projected", f"{type(self.base).__name__} has a projector of its own", "use it as it is")
        width = encoder.width
        projector = nn.Sequential(*(middle_layer(width, seed.child("projector", i)) for i in range(self.layers)))
        own: Any = type(network)
        network.__class__ = _with_projector(own)
        network.add_module("projector", projector)
        network.eval()
        card = encoder.card
        built = {"method": "projected", "base": dict(card.architecture), "layers": self.layers}
        return ImageEncoder(encoder.module, Card(built, width, card.input_size))


@settings
class _Built:
    """How the base stands in a card."""

    base: Annotated[Base, OneOf(BASES)]


def kept_layers(module: nn.Module) -> int:
    """Projector layers that an encoder's network keeps; 0 for every architecture but `Projected`."""
    network = getattr(module, "backbone", module)
    return len(network.projector) if isinstance(network, _Behind) else 0


def base_encoder(encoder: ImageEncoder) -> ImageEncoder:
    """A copy of an encoder without the projector layers it keeps: the same weights, on the same device.

    Recipe, source and manifest stay on the card.

    Args:
        encoder: Built by `Projected`; any other is copied as it is.

    Example:
        >>> encoder = Projected(base=Fast(width=4, input_size=16)).build(Seed(0))
        >>> x = torch.rand(2, 3, 16, 16)
        >>> torch.equal(encoder.module.backbone.projector(base_encoder(encoder)(x)), encoder(x))
        True
    """
    if not isinstance(encoder.module.backbone, _Behind):
        return encoder.copy()
    plain = encoder.card.architecture["base"]
    made = parse(_Built, {"base": dict(plain)}, "card").base.build(Seed(0))
    state = encoder.module.backbone.state_dict()
    made.module.backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("projector.")})
    made.module.to(next(encoder.module.parameters()).device)
    card = dataclasses.replace(
        encoder.card, architecture=made.card.architecture, width=made.card.width, input_size=made.card.input_size
    )
    return ImageEncoder(made.module, card)
