"""Pre-training objectives, and the one function that trains an encoder with any of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from cupel.encoders import Architecture, ImageEncoder
from cupel.pretrain.barlow import BarlowTwins
from cupel.pretrain.byol import BYOL
from cupel.pretrain.moco import MoCo
from cupel.pretrain.simclr import SimCLR
from cupel.pretrain.simclr_v2 import SimCLRv2
from cupel.pretrain.simsiam import SimSiam
from cupel.pretrain.supervised import Supervised
from cupel.protocols import Objective
from cupel.seeds import Seed
from cupel.settings import method_name, registry
from cupel.train import History, fit
from cupel.types import Dataset

__all__ = [
    "BYOL",
    "OBJECTIVES",
    "BarlowTwins",
    "MoCo",
    "SimCLR",
    "SimCLRv2",
    "SimSiam",
    "Supervised",
    "pretrain_encoder",
]

OBJECTIVES: Mapping[str, type] = registry(
    "objectives",
    {
        "simclr": SimCLR,
        "simclr_v2": SimCLRv2,
        "moco": MoCo,
        "byol": BYOL,
        "simsiam": SimSiam,
        "barlow_twins": BarlowTwins,
        "supervised": Supervised,
    },
)


def pretrain_encoder(
    objective: Objective,
    architecture: Architecture,
    data: Dataset,
    seed: Seed,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    watch: Callable[[ImageEncoder], Mapping[str, float]] | None = None,
    watch_every: int = 0,
) -> tuple[ImageEncoder, History]:
    """Train a fresh encoder.

    Args:
        objective: What is learnt and for how long.
        architecture: What is built.
        data: Images of the encoder's input size; pass `data.without_labels(…)` unless the objective needs labels.
        seed: Initialisation, order and views.
        device: Where to train.
        checkpoint: Where the state is kept for a resume.
        watch: Monitor of the encoder, called every `watch_every` steps; for the log alone, nothing is chosen by it.
        watch_every: 0 = never.

    Returns:
        The encoder in eval mode, with the manifest of poisoned images, and the numbers of every step.
    """
    encoder = architecture.build(seed.child("init"))
    encoder.module.to(device)
    learner = objective.learner(encoder, data, seed)
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
    return ImageEncoder(encoder.module, dataclasses.replace(encoder.card, manifest=data.manifest)), history
