"""How long and with what optimiser something is trained; LARS, which torch lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cupel.errors import DataError
from cupel.settings import Positive, PositiveInt, settings

__all__ = ["LARS", "NonNegative", "Recipe"]

NonNegative = Annotated[float, Field(ge=0)]


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a learning rate scaled per tensor by trust·‖w‖ / ‖g + wd·w‖.

    Tensors with one dimension (biases, BatchNorm) get plain SGD without weight decay.

    Args:
        params: Tensors to train.
        lr, momentum, weight_decay: As in SGD.
        trust: η.
        clip: The form of solo-learn's wrapper instead: the factor of (g + wd·w) is min(η‖w‖ / (‖g‖ + wd·‖w‖) / lr, 1),
            so lr times the factor is at most lr; a tensor whose weights or gradients are all 0 gets no weight decay.

    Source: You et al., arXiv:1708.03888; the exclusions are those of Chen et al., SimCLR, 2020.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        clip: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "clip": clip}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update; `closure` is not supported and must be None."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                update = w.grad
                if w.ndim > 1 and group["clip"]:
                    update = _clipped(w, update, group)
                elif w.ndim > 1:
                    update = update + group["weight_decay"] * w
                    size, length = torch.linalg.vector_norm(w), torch.linalg.vector_norm(update)
                    trust = torch.where((size > 0) & (length > 0), group["trust"] * size / length, 1.0)
                    update = trust * update
                state = self.state[w]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                w.sub_(group["lr"] * buffer)


def _clipped(w: Tensor, g: Tensor, group: Mapping[str, Any]) -> Tensor:
    """(g + wd·w) times solo-learn's clipped trust ratio."""
    decay, size, length = group["weight_decay"], torch.linalg.vector_norm(w), torch.linalg.vector_norm(g)
    factor = (group["trust"] * size / (length + decay * size + 1e-8) / group["lr"]).clamp_max(1.0)
    return torch.where((size > 0) & (length > 0), factor * (g + decay * w), g)


@settings
class Recipe:
    """Settings that every trained method shares.

    Args:
        epochs: Passes over the data; ignored where `steps` is given.
        steps: Optimiser steps; counts instead of `epochs`.
        batch_size: Images per step; the last short batch of an epoch is dropped.
        optimizer: `adam`, `adamw`, `sgd`, `lars` (trust 0.001) or `lars_clip` (solo-learn's: trust 0.02, clipped).
        lr: Peak learning rate.
        momentum: Of SGD and LARS.
        weight_decay: L2 penalty (decoupled for AdamW).
        schedule: `constant`, or `cosine` to 0.
        warmup_steps: Linear increase from 0 before the schedule begins.
        precision: `bf16` = autocast of the network's forward pass; weights and losses stay float32.
    """

    epochs: PositiveInt = 1
    steps: Annotated[int, Field(ge=0)] | None = None
    batch_size: PositiveInt = 128
    optimizer: Literal["adam", "adamw", "sgd", "lars", "lars_clip"] = "adamw"
    lr: Positive = 1e-3
    momentum: NonNegative = 0.9
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "bf16"

    def steps_per_epoch(self, n: int, name: str) -> int:
        """Full batches in `n` images.

        Raises:
            DataError: fewer images than one batch.
        """
        if n < self.batch_size:
            raise DataError(name, f"has {n} images, one batch needs {self.batch_size}", "lower `batch_size`")
        return n // self.batch_size

    def total_steps(self, n: int, name: str) -> int:
        """Steps of the whole training on `n` images."""
        return self.steps if self.steps is not None else self.epochs * self.steps_per_epoch(n, name)

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step `step` of `total`.

        Example:
            >>> Recipe(lr=1.0, steps=10, warmup_steps=2).lr_at(0, 10)
            0.5
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser over `parameters`."""
        match self.optimizer:
            case "adam":
                return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay, fused=True)
            case "adamw":
                return torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay, fused=True)
            case "sgd":
                return torch.optim.SGD(
                    parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
                )
            case "lars":
                return LARS(parameters, self.lr, self.momentum, self.weight_decay)
            case "lars_clip":
                return LARS(parameters, self.lr, self.momentum, self.weight_decay, trust=0.02, clip=True)
