"""The step that encoder attacks with a frozen teacher share: folded BatchNorm, cached clean features, one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cupel.folding import folded
from cupel.losses import negative_cosine
from cupel.protocols import Batch, Encoder
from cupel.types import Goal

__all__ = ["Aim", "ImplantLearner", "freeze_norms"]


def freeze_norms(module: nn.Module) -> list[nn.Parameter]:
    """Train mode with every BatchNorm in eval mode and its affine part fixed; returns the parameters left to train."""
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval().requires_grad_(False)
    return [p for p in module.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Aim:
    """A goal made ready: its trigger, its references and what the clean encoder says of them.

    Args:
        goal: With trigger and references set.
        references: float32 `[r, 3, height, width]` in [0, 1], on the device.
        clean: float32 `[r, width]`, the clean encoder's embeddings of them.
    """

    goal: Goal
    references: Tensor
    clean: Tensor


class ImplantLearner:
    """BadEncoder's three terms on one batch of all inputs: [x, x ⊕ e_1 …, references, augmented references].

    Args:
        encoder: The copy that is trained.
        clean: Clean embeddings of the whole shadow set, float32 `[n, width]`, by row; may be a memory map.
        ids: int64 `[n]`, the shadow images' ids, for triggers that draw by image.
        aims: One per (task, target).
        lambda_reference, lambda_utility: λ1 and λ2.
        lambda_trigger: Weight of L0; 1 as published, 0 for the control without a backdoor.
        augment: Makes the augmented references of L1 (raw uint8 in, [0, 1] out); None = the references as they are.
        draws: Augmented draws per reference and step; None = one per shadow image, as published.
        detach_reference: Stop the gradient through f'(reference) in L0.
    """

    def __init__(
        self,
        encoder: Encoder,
        clean: Tensor,
        ids: Tensor,
        aims: Sequence[Aim],
        *,
        lambda_reference: float = 1.0,
        lambda_utility: float = 1.0,
        lambda_trigger: float = 1.0,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        draws: int | None = None,
        detach_reference: bool = False,
    ) -> None:
        self.encoder, self.clean, self.ids, self.aims = encoder, clean, ids, aims
        self.weights = (lambda_trigger, lambda_reference, lambda_utility)
        self.augment, self.draws, self.detach_reference = augment, draws, detach_reference
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
        """L0 + λ1·L1 + λ2·L2.

        L0 = −mean cos(f'(x ⊕ e_i), f'(x_ij)),  L1 = −mean cos(f'(x_ij), f(x_ij)),  L2 = −mean cos(f'(x), f(x))

        BatchNorm is frozen, so a reference needs one row, not one per image: same loss, same gradient.
        """
        x, n = batch.inputs, len(batch.inputs)
        device = x.device
        ids = self.ids[batch.rows].tolist()
        parts = [x]
        for i, aim in enumerate(self.aims):
            assert aim.goal.trigger is not None
            parts.append(aim.goal.trigger(x, ids, batch.seed.child("trigger", i)))
        inputs = torch.cat(parts).to(self.aims[0].references.dtype).div_(255)
        references = torch.cat([aim.references for aim in self.aims])
        repeats = self.draws if self.draws is not None else n
        tail = [references]
        if self.augment is not None:
            raw = references.mul(255).round().to(torch.uint8).repeat_interleave(repeats, dim=0)
            tail.append(self.augment(raw, batch.seed.child("augment").torch(device)))
        inputs = torch.cat([inputs, *tail]).contiguous(memory_format=torch.channels_last)

        f = self.network(inputs)
        num, r = len(self.aims), len(references)
        f_x, f_stamped = f[:n], f[n : n * (1 + num)].view(num, n, -1)
        f_ref, f_aug = f[n * (1 + num) : n * (1 + num) + r], f[n * (1 + num) + r :]
        target = f_ref.detach() if self.detach_reference else f_ref
        c_ref = torch.cat([aim.clean for aim in self.aims])

        owners = [i for i, aim in enumerate(self.aims) for _ in range(len(aim.references))]
        pairs = [negative_cosine(f_stamped[i], target[j : j + 1]) for j, i in enumerate(owners)]
        L0 = torch.stack(pairs).mean()
        if self.augment is None:
            L1 = negative_cosine(f_ref, c_ref)
        else:
            L1 = negative_cosine(f_aug, c_ref.repeat_interleave(repeats, dim=0))
        L2 = negative_cosine(f_x, self.clean[batch.rows].to(device))
        w0, w1, w2 = self.weights
        return w0 * L0 + w1 * L1 + w2 * L2, {"L0": L0, "L1": L1, "L2": L2}

    def after_step(self) -> None:
        """Nothing."""
