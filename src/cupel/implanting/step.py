"""The step that encoder attacks with a frozen teacher share: folded BatchNorm, cached clean features, one batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from cupel.errors import DataError, UsageError
from cupel.folding import folded
from cupel.losses import negative_cosine
from cupel.protocols import Batch, Encoder, Trigger
from cupel.types import Goal, Knowledge

__all__ = ["Aim", "ImplantLearner", "Seen", "Targets", "aims_of", "check_goals", "freeze_norms"]

Targets = Literal["references", "unseen", "labelled", "found"]
"""How an encoder attack knows its target class: by reference inputs; by references of a class that its labelled images
have not; as a class of its labelled images; or not at all, so that it is found in each later task."""


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


def aims_of(
    attacker: Knowledge,
    trigger: Trigger[Tensor] | None,
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
    name: str,
) -> tuple[Aim, ...]:
    """The attacker's goals made ready.

    Args:
        attacker: Goals with references.
        trigger: For goals that name none of their own; None leaves them without.
        embed: The clean encoder's embeddings of uint8 images.
        device: Where references are put.
        name: Of the attack, for errors.

    Raises:
        DataError: no goal, or one without references.
        UsageError: one trigger shall lead to two classes of one task.
    """
    if not attacker.goals:
        raise DataError(name, "needs a shadow set and at least one goal", "give `attacker.shadow`")
    goals = [dataclasses.replace(goal, trigger=goal.trigger or trigger) for goal in attacker.goals]
    check_goals(goals, name)
    aims = []
    for goal in goals:
        if goal.references is None or not len(goal.references):
            raise DataError(name, f"the goal in '{goal.task}' has no reference input", "give `references`")
        aims.append(Aim(goal, goal.references.to(device).float() / 255, embed(goal.references)))
    return tuple(aims)


class Seen(NamedTuple):
    """Embeddings of one batch, float `[…, width]`; those called clean are the given encoder's.

    Args:
        x, clean: `[n, width]`, of the images.
        stamped: `[aims, n, width]`, of the images with each aim's trigger.
        references, references_clean: `[r, width]`, of all aims' references, in order.
        augmented: `[r · draws, width]`, of the augmented references, a reference's draws together; may be empty.
    """

    x: Tensor
    clean: Tensor
    stamped: Tensor
    references: Tensor
    references_clean: Tensor
    augmented: Tensor


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
        terms = self.terms(self.seen(batch))
        w0, w1, w2 = self.weights
        return w0 * terms["L0"] + w1 * terms["L1"] + w2 * terms["L2"], terms

    def stamps(self, batch: Batch) -> Tensor:
        """The images with each aim's trigger, in [0, 1], `[aims · n, 3, height, width]`."""
        ids = self.ids[batch.rows].tolist()
        parts = []
        for i, aim in enumerate(self.aims):
            assert aim.goal.trigger is not None
            parts.append(aim.goal.trigger(batch.inputs, ids, batch.seed.child("trigger", i)))
        return torch.cat(parts).to(self.aims[0].references.dtype).div_(255)

    def seen(self, batch: Batch) -> Seen:
        """What the encoder makes of everything, in one pass."""
        n, num, device = len(batch.inputs), len(self.aims), batch.inputs.device
        references = torch.cat([aim.references for aim in self.aims])
        parts = [batch.inputs.to(references.dtype).div_(255), self.stamps(batch), references]
        if self.augment is not None:
            raw = references.mul(255).round().to(torch.uint8).repeat_interleave(self.draws or n, dim=0)
            parts.append(self.augment(raw, batch.seed.child("augment").torch(device)))
        f = self.network(torch.cat(parts).contiguous(memory_format=torch.channels_last))
        f_x, f_stamped, f_ref, f_aug = f.tensor_split((n, n * (1 + num), n * (1 + num) + len(references)))
        c_ref = torch.cat([aim.clean for aim in self.aims])
        clean = self.clean[batch.rows].to(device)
        return Seen(f_x, clean, f_stamped.view(num, n, -1), f_ref, c_ref, f_aug)

    def terms(self, seen: Seen) -> dict[str, Tensor]:
        """L0, L1 and L2 by name."""
        target = seen.references.detach() if self.detach_reference else seen.references
        owners = [i for i, aim in enumerate(self.aims) for _ in range(len(aim.references))]
        pairs = [negative_cosine(seen.stamped[i], target[j : j + 1]) for j, i in enumerate(owners)]
        if self.augment is None:
            L1 = negative_cosine(seen.references, seen.references_clean)
        else:
            draws = len(seen.augmented) // len(seen.references)
            L1 = negative_cosine(seen.augmented, seen.references_clean.repeat_interleave(draws, dim=0))
        return {"L0": torch.stack(pairs).mean(), "L1": L1, "L2": negative_cosine(seen.x, seen.clean)}

    def after_step(self) -> None:
        """Nothing."""


def check_goals(goals: Sequence[Goal], name: str) -> None:
    """Refuse goals that contradict each other.

    Raises:
        UsageError: one trigger shall lead to two classes of one task.
    """
    for i, one in enumerate(goals):
        for other in goals[:i]:
            same = one.task == other.task and one.trigger is not None and one.trigger == other.trigger
            if same and one.target_class != other.target_class:
                what = f"one trigger shall lead to classes {other.target_class} and {one.target_class} of '{one.task}'"
                raise UsageError(name, what, "give each target a trigger of its own")
