"""Losses as pure functions that read like the papers."""

from cupel.losses.alignment import negative_cosine
from cupel.losses.contrastive import nt_xent
from cupel.losses.momentum_contrast import queue_nce
from cupel.losses.redundancy import barlow_twins_loss
from cupel.losses.regression import byol_loss, simsiam_loss

__all__ = ["barlow_twins_loss", "byol_loss", "negative_cosine", "nt_xent", "queue_nce", "simsiam_loss"]
