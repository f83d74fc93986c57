"""Triggers: what an attacker puts on an image. One file per kind; the table is the place that shows all."""

from __future__ import annotations

from cupel.settings import registry
from cupel.triggers.additive import Additive
from cupel.triggers.blend import Blend
from cupel.triggers.checker import Checker
from cupel.triggers.color_checker import ColorChecker
from cupel.triggers.learned_filter import LearnedFilter
from cupel.triggers.overlay import Overlay
from cupel.triggers.patch import Patch
from cupel.triggers.random_patch import RandomPatch
from cupel.triggers.sinusoid import Sinusoid
from cupel.triggers.spectral import Spectral
from cupel.triggers.sticker import Sticker

__all__ = [
    "TRIGGERS",
    "Additive",
    "Blend",
    "Checker",
    "ColorChecker",
    "LearnedFilter",
    "Overlay",
    "Patch",
    "RandomPatch",
    "Sinusoid",
    "Spectral",
    "Sticker",
]

TRIGGERS: dict[str, type] = registry(
    "triggers",
    {
        "patch": Patch,
        "blend": Blend,
        "random_patch": RandomPatch,
        "checker": Checker,
        "overlay": Overlay,
        "additive": Additive,
        "sinusoid": Sinusoid,
        "spectral": Spectral,
        "color_checker": ColorChecker,
        "sticker": Sticker,
        "learned_filter": LearnedFilter,
    },
)
