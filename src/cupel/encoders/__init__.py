"""Encoders, and how they are stored."""

from collections.abc import Mapping
from typing import Protocol

from cupel.encoders.fast import Fast
from cupel.encoders.gated import Gated
from cupel.encoders.image import Card, ImageEncoder
from cupel.encoders.projected import BASES, Projected
from cupel.encoders.resnet import ResNet18, ResNet50
from cupel.seeds import Seed

__all__ = ["ENCODERS", "Architecture", "Card", "Fast", "Gated", "ImageEncoder", "Projected", "ResNet18", "ResNet50"]


class Architecture(Protocol):
    """Settings that build an encoder."""

    @property
    def input_size(self) -> int: ...
    def build(self, seed: Seed) -> ImageEncoder: ...


ENCODERS: Mapping[str, type] = {**BASES, "projected": Projected, "gated": Gated}
