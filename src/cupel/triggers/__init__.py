"""Triggers: what an attacker puts on an image. One file per kind; the table is the place that shows all."""

from __future__ import annotations

from cupel.settings import registry
from cupel.triggers.blend import Blend
from cupel.triggers.patch import Patch
from cupel.triggers.random_patch import RandomPatch

__all__ = ["TRIGGERS", "Blend", "Patch", "RandomPatch"]

TRIGGERS: dict[str, type] = registry("triggers", {"patch": Patch, "blend": Blend, "random_patch": RandomPatch})
