"""Sharpness-aware steps: the gradient at the worst point nearby, applied at the weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cupel.purify.batch_norm import statistics_kept

__all__ = ["ascent", "sharp_loss"]


def ascent(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float, *, adaptive: bool) -> list[Tensor]:
    """The step e to the worst point nearby, to first order.

    e = ρ · g / ‖g‖₂; adaptive: e = ρ · w² ⊙ g / ‖|w| ⊙ g‖₂, which does not change when weights of one layer are scaled
    up and those of the next down. Norms are over all weights together; where all gradients are zero, e = 0.

    Args:
        weights: w.
        gradients: g, one per weight.
        rho: ρ ≥ 0.
        adaptive: Which.

    Example:
        >>> w, g = [torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 2.0])]
        >>> [round(float(v), 2) for v in ascent(w, g, 1.0, adaptive=True)[0]]
        [0.6, 1.6]

    Source: Foret et al., SAM, ICLR 2021, equation 2, arXiv:2010.01412; Kwon et al., ASAM, ICML 2021, equation 9,
    arXiv:2102.11600, without the constant that the latter's code adds to |w|.
    """
    scaled = [w.abs() * g if adaptive else g for w, g in zip(weights, gradients, strict=True)]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one) for one in scaled]))
    rate = torch.where(norm > 0, rho / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
    return [rate * (w.abs() * s if adaptive else s) for w, s in zip(weights, scaled, strict=True)]


def sharp_loss(
    network: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor], rho: float, *, adaptive: bool
) -> tuple[Tensor, Tensor]:
    """The loss at w + e, whose gradient in w is the gradient at w + e: e counts as constant.

    The weights themselves are never moved, so there is nothing to restore; statistics of BatchNorms in train mode
    move in the first pass alone.

    Args:
        network: Its weights that require a gradient are w.
        x: Its input.
        loss: Of its output.
        rho, adaptive: As for `ascent`.

    Returns:
        The loss at w + e, and the detached output at w.
    """
    named = {name: w for name, w in network.named_parameters() if w.requires_grad}
    weights = list(named.values())
    out = network(x)
    gradients = torch.autograd.grad(loss(out), weights, allow_unused=True)
    known = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, gradients, strict=True)]
    with torch.no_grad():
        steps = ascent(weights, known, rho, adaptive=adaptive)
    moved = {name: w + e for (name, w), e in zip(named.items(), steps, strict=True)}
    with statistics_kept(network):
        return loss(functional_call(network, moved, (x,))), out.detach()
