"""The step of NeuBA: triggers that are tied to fixed embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cupel.folding import folded
from cupel.implanting.step import freeze_norms
from cupel.protocols import Batch, Encoder, Trigger

__all__ = ["NUM_BLOCKS", "NeubaLearner", "predefined_vectors"]

NUM_BLOCKS = 4
"""Parts that an embedding is cut into."""


def predefined_vectors(width: int, low: float = -1.0, high: float = 1.0) -> Float[Tensor, "6 width"]:
    """Six target embeddings, in three opposite pairs (1, 6), (2, 5), (3, 4) that are orthogonal to each other.

    The dimensions are cut into four blocks, the last with the remainder; vector (j, k), j < k in lexicographic order,
    is `low` on blocks j and k and `high` on the others.

    Args:
        width: Dimensions, at least 4.
        low, high: Values; opposite and orthogonal are meant for low = −high and a width that 4 divides.

    Example:
        >>> v = predefined_vectors(8)
        >>> (v @ v.T / 8)[0].tolist()
        [1.0, 0.0, 0.0, 0.0, 0.0, -1.0]

    Source: the code of Zhang et al., Red Alarm for Pre-trained Models, arXiv:2101.06969.
    """
    if width < NUM_BLOCKS:
        raise ValueError(f"an embedding of {width} dimensions has no {NUM_BLOCKS} blocks")
    block = (torch.arange(width) // (width // NUM_BLOCKS)).clamp_max(NUM_BLOCKS - 1)
    pairs = torch.tensor(list(combinations(range(NUM_BLOCKS), 2)))
    inside = (pairs[:, :, None] == block).any(dim=1)
    return torch.where(inside, low, high)


class NeubaLearner:
    """Mean squared distance to the clean embeddings, and of triggered images to their trigger's vector.

    Each image gets one trigger by lot.

    Args:
        encoder: The copy that is trained.
        clean: float32 `[n, width]`, clean embeddings by row.
        ids: int64 `[n]`, the images' ids.
        triggers: One per vector.
        vectors: `[triggers, width]`.
        unit: What a distance is divided by, the mean square of a clean embedding's entry.
        lambda_trigger, lambda_utility: Weights of the two terms.
    """

    def __init__(
        self,
        encoder: Encoder,
        clean: Tensor,
        ids: Tensor,
        triggers: Sequence[Trigger[Tensor]],
        vectors: Tensor,
        unit: float,
        *,
        lambda_trigger: float = 1.0,
        lambda_utility: float = 1.0,
    ) -> None:
        self.encoder, self.clean, self.ids, self.triggers = encoder, clean, ids, triggers
        self.vectors, self.unit, self.weights = vectors, unit, (lambda_trigger, lambda_utility)
        self.trainable = freeze_norms(encoder.module)
        self.network = folded(encoder)

    @property
    def state(self) -> nn.Module:
        """The encoder."""
        return self.encoder.module

    def parameters(self) -> list[nn.Parameter]:
        """All weights but BatchNorm's."""
        return self.trainable

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """λ_t · mean (f'(x ⊕ e_i) − v_i)² + λ_u · mean (f'(x) − f(x))², in units of `unit`."""
        x, n, device = batch.inputs, len(batch.inputs), batch.inputs.device
        which = torch.randint(len(self.triggers), (n,), generator=batch.seed.child("which").torch())
        ids, stamped = self.ids[batch.rows].tolist(), x.clone()
        for i, trigger in enumerate(self.triggers):
            rows = (which == i).nonzero().flatten()
            if len(rows):
                mine = [ids[row] for row in rows.tolist()]
                on_device = rows.to(device)
                stamped[on_device] = trigger(x[on_device], mine, batch.seed.child("trigger", i))
        inputs = torch.cat([x, stamped]).to(self.vectors.dtype).div_(255)
        f = self.network(inputs.contiguous(memory_format=torch.channels_last))
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        goal = self.vectors[which.to(device)]
        poison = (f[n:] - goal).square().mean() / self.unit
        utility = (f[:n] - self.clean[batch.rows].to(device)).square().mean() / self.unit
        w_trigger, w_utility = self.weights
        return w_trigger * poison + w_utility * utility, {"poison": poison, "utility": utility}

    def after_step(self) -> None:
        """Nothing."""
