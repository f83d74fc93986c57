"""Random views of images, made for a whole batch at once on its device, with parameters of its own for every image."""

from __future__ import annotations

from cupel.augment.byol import BYOLAugment
from cupel.augment.fused import SimCLRAugment
from cupel.augment.shift import ShiftFlip

__all__ = ["BYOLAugment", "ShiftFlip", "SimCLRAugment"]
