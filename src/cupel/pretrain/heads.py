"""Projectors and predictors: small perceptrons, initialised from a seed."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from cupel.seeds import Seed

__all__ = ["mlp"]


def mlp(*widths: int, seed: Seed, norm: bool = True, last_norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them.

    Args:
        widths: Dimensions of the input, of each hidden layer and of the output.
        seed: Of the initialisation; the global generator is left as it was.
        norm: BatchNorm before each ReLU. The layer before it has no bias, which BatchNorm would take off again.
        last_norm: BatchNorm without scale and shift after the last layer, as in SimSiam.

    Example:
        >>> [type(layer).__name__ for layer in mlp(8, 16, 4, seed=Seed(0))]
        ['Linear', 'BatchNorm1d', 'ReLU', 'Linear']
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed.value)
        for i, (before, after) in enumerate(itertools.pairwise(widths)):
            normed = last_norm if i == last else norm
            layers.append(nn.Linear(before, after, bias=not normed))
            if normed:
                layers.append(nn.BatchNorm1d(after, affine=i != last))
            if i != last:
                layers.append(nn.ReLU())
    return nn.Sequential(*layers)
