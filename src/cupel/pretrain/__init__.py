"""Pre-training objectives, and the one function that trains an encoder with any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from cupel.encoders import Architecture, ImageEncoder
from cupel.pretrain.simclr import SimCLR
from cupel.seeds import Seed
from cupel.settings import method_name, registry
from cupel.train import History, fit
from cupel.types import Dataset

__all__ = ["OBJECTIVES", "SimCLR", "pretrain_encoder"]

OBJECTIVES: Mapping[str, type] = registry("objectives", {"simclr": SimCLR})


def pretrain_encoder(
    objective: SimCLR,
    architecture: Architecture,
    data: Dataset,
    seed: Seed,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    watch: Callable[[ImageEncoder], Mapping[str, float]] | None = None,
    watch_every: int = 0,
) -> tuple[ImageEncoder, History]:
    """Train a fresh encoder on unlabelled images.

    Args:
        objective: What is learnt and for how long.
        architecture: What is built.
        data: Unlabelled images of the encoder's input size; pass `data.without_labels(…)`.
        seed: Initialisation, order and views.
        device: Where to train.
        checkpoint: Where the state is kept for a resume.
        watch: Monitor of the encoder, called every `watch_every` steps; for the log alone, nothing is chosen by it.
        watch_every: 0 = never.

    Returns:
        The encoder in eval mode, and the numbers of every step.
    """
    encoder = architecture.build(seed.child("init"))
    encoder.module.to(device)
    learner = objective.learner(encoder, seed)
    name = method_name(objective, OBJECTIVES)
    history = fit(
        learner,
        data,
        objective,
        seed,
        label=f"pretrain {name}",
        device=device,
        checkpoint=checkpoint,
        watch=(lambda: watch(encoder)) if watch else None,
        watch_every=watch_every,
    )
    encoder.module.eval()
    return encoder, history
