"""Losses as pure functions that read like the papers."""

from cupel.losses.alignment import negative_cosine
from cupel.losses.contrastive import nt_xent

__all__ = ["negative_cosine", "nt_xent"]
