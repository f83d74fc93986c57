"""Digests of models and data, to show that a method left them as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cupel.types import Dataset

__all__ = ["data_print", "model_print", "norm_tensors", "same_state"]


def model_print(module: nn.Module) -> str:
    """Weights, buffers, modes, gradient flags and gradients."""
    total = hashlib.sha256()
    for name, value in module.state_dict().items():
        total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    for name, part in module.named_modules():
        total.update(f"{name} {part.training}".encode())
    for name, weight in module.named_parameters():
        total.update(f"{name} {weight.requires_grad} {weight.grad is None}".encode())
    return total.hexdigest()


def norm_tensors(module: nn.Module) -> Mapping[str, Tensor]:
    """Every tensor of every BatchNorm."""
    norms = [name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)]
    return {k: v.clone() for k, v in module.state_dict().items() if any(k.startswith(f"{name}.") for name in norms)}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether all weights and buffers are equal bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def data_print(data: Dataset) -> str:
    """Images, labels and ids as they are now; `Dataset.sha256` remembers what they were."""
    assert isinstance(data.inputs, Tensor)
    parts = (data.inputs, data.labels_, data.ids)
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()
