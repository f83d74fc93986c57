"""Which neurons carry a backdoor, and how far a triggered image is from exciting them."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "channel_means",
    "connection",
    "excitation",
    "ranked_neurons",
    "total_variation",
    "trigger_objective",
]


def channel_means(layer: Float[Tensor, "n channels *places"]) -> Float[Tensor, "n channels"]:
    """The activation of each neuron: a channel's mean over places."""
    return layer.flatten(2).mean(dim=2) if layer.ndim > 2 else layer


def connection(weight: Float[Tensor, "out in"], k: int, to: Literal["all", "one"]) -> Float[Tensor, " in"]:
    """How strongly each neuron acts on what follows.

    Args:
        weight: Outgoing weights, one column per neuron.
        k: How many neurons will be taken.
        to: `all` = the sum of a column's absolute weights, as in TrojanNN; `one` = the signed weight, less the column's
            mean, to the one output that k neurons together can raise most, so that they pull the same way.

    Example:
        >>> weight = torch.tensor([[2.0, -3.0, 1.0], [0.0, 3.0, -1.0]])
        >>> connection(weight, 2, "all").tolist()
        [2.0, 6.0, 2.0]
        >>> connection(weight, 1, "one").tolist()
        [-1.0, 3.0, -1.0]
    """
    if to == "all":
        return weight.abs().sum(dim=0)
    signed = weight - weight.mean(dim=0)
    reach = signed.topk(min(k, weight.shape[1]), dim=1).values.sum(dim=1)
    return signed[reach.argmax()]


def ranked_neurons(
    activity: Float[Tensor, " n"],
    drift: Float[Tensor, " n"],
    strength: Float[Tensor, " n"],
    k: int,
    dormant: float,
    drifting: float,
) -> Int[Tensor, " k"]:
    """Neurons that neither pruning nor retraining reaches, the most strongly connected first; of equal ones the first.

    Args:
        activity: Mean absolute activation on clean images; the lowest ⌊dormant · n⌋ are left out.
        drift: ‖w_after − w_before‖ / ‖w_before‖ of incoming weights in a fine-tuning; the highest ⌊drifting · n⌋ are
            left out.
        strength: Of the connection to what follows, see `connection`.
        k: How many; fewer come back where fewer are left.
        dormant, drifting: Shares in [0, 1].

    Example:
        >>> activity, drift = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 0.0, 9.0])
        >>> ranked_neurons(activity, drift, torch.tensor([9.0, 1.0, 2.0, 8.0]), 2, 0.25, 0.25).tolist()
        [2, 1]
    """
    n = len(activity)
    usable = torch.ones(n, dtype=torch.bool, device=activity.device)
    usable[activity.argsort(stable=True)[: int(dormant * n)]] = False
    usable[drift.argsort(descending=True, stable=True)[: int(drifting * n)]] = False
    order = strength.argsort(descending=True, stable=True)
    return order[usable[order]][:k]


def excitation(activations: Float[Tensor, "n k"], values: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """Mean over images and neurons of ((A − v) / v)²: 1 where the neurons are silent, 0 where they have their values.

    Example:
        >>> float(excitation(torch.tensor([[0.0, 4.0]]), torch.tensor([2.0, 4.0])))
        0.5
    """
    return (activations / values - 1).square().mean()


def total_variation(x: Float[Tensor, "*batch height width"]) -> Float[Tensor, ""]:
    """Mean absolute difference of neighbours, vertical plus horizontal.

    Example:
        >>> float(total_variation(torch.tensor([[0.0, 1.0], [0.0, 1.0]])))
        1.0
    """
    return x.diff(dim=-2).abs().mean() + x.diff(dim=-1).abs().mean()


def trigger_objective(
    activations: Float[Tensor, "n k"],
    values: Float[Tensor, " k"],
    stamped: Float[Tensor, "n 3 height width"],
    x: Float[Tensor, "n 3 height width"],
    near: float,
    smooth: float,
) -> Float[Tensor, ""]:
    """excitation(A, v) + near · mean‖x' − x‖² + smooth · TV(x').

    Args:
        activations: Of the chosen neurons, on the preprocessed stamped images.
        values: v.
        stamped, x: Images with and without the trigger, in [0, 1].
        near, smooth: Weights; the distance is summed over pixels and channels.
    """
    distance = (stamped - x).square().flatten(1).sum(dim=1).mean()
    return excitation(activations, values) + near * distance + smooth * total_variation(stamped)
