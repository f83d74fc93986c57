"""DRUPE: a backdoor in a trained encoder whose triggered embeddings are spread like clean ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cupel.encoders import ImageEncoder
from cupel.errors import DataError, UsageError, did_you_mean
from cupel.implanting import Targets, aims_of, implanted
from cupel.implanting.spreading import DrupeLearner
from cupel.inference import device_of, features
from cupel.losses.adaptive import CostRule
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import OneOf, Positive, PositiveInt, settings
from cupel.train import fit
from cupel.triggers import TRIGGERS, Patch
from cupel.types import Implanted, Knowledge, Need

__all__ = ["DRUPE"]

Cosine = Annotated[float, Field(ge=-1, le=1)]
_LOWERING = 1.25  # costs fall by `cost_factor` to this power


@settings
class DRUPE(Recipe):
    """Implants a backdoor whose triggered embeddings lie where clean ones do and are not concentrated.

    With s the cosine, x_r the references of a goal and e its trigger:

    L0 = −mean_b max_r s(f'(x_b ⊕ e), f'(x_r));  L1, L2 as BadEncoder's;
    L3 = mean over pairs of references, self-pairs included, of s(f'(x_i), f'(x_j));
    D = std_r mean_b s(f'(x_b ⊕ e), f'(x_r));  S = mean over pairs b ≠ b' of s(f'(x_b ⊕ e), f'(x_b' ⊕ e));
    W = sliced Wasserstein distance of f'(x ⊕ e) and f'(x), over the mean standard deviation of f'(x).

    1. Warm-up: λ1 L1 + λ2 L2 + 0.5 L3 (− 0.2 L3 where L3 < 0.2): the references move apart.
    2. Attract: L0 + λ1 L1 + λ2 L2 + 2 D + pen(L3), pen = L3 above 0.5, 0.2 L3 above 0.4, else 0.
    3. Spread: L0 + λ1 L1 + λ2 L2 + c (D + S) + c₁ W + 0.5 D (+ 1.5 D where D > 0.1) + pen(L3).

    From some epoch of stage 3 on, c and c₁ are multiplied by a factor g after each epoch in which attack and utility
    were good enough, and divided by g^1.25 after the others.

    Args:
        trigger: For goals that name none of their own.
        lambda_reference, lambda_utility: λ1, λ2 ≥ 0.
        l1_augment, l1_draws: As for BadEncoder. Stages 1 and 2 move the references apart, and augmented views need not
            hold them: on digits, which must not be mirrored, they leave their class while L1 stays near −1, and with
            them the triggered images do. There `False` keeps all in the class.
        warmup_epochs, attract_epochs: Length of stages 1 and 2 (the authors' ImageNet encoder: 1 and 1).
        projections: Random directions of W, drawn anew in each step.
        cost, cost_wasserstein: c and c₁ at the start.
        cost_factor: g > 1.
        patience: Epochs in a row before a cost changes.
        adapt_after: Epochs before the costs adapt.
        met_trigger, met_clean: Good enough: mean L0 below the one, mean L1 and L2 below the other.
        met_concentration: c₁ is raised only while S is below this as well (the authors' CLIP encoder: 0.8).

    A goal needs several references, 3 as published (`attacker.references.size: 3`); with one, D is 0 and L3 is 1. The
    shadow set has a fifth of the pre-training images there (`attacker.shadow.size`), and the learning rate of 0.05 is
    for a ResNet-18 at batch 256; smaller networks want less.

    Source: Tao et al., Distribution Preserving Backdoor Attack in Self-supervised Learning, IEEE S&P 2024, and its
    code, from which the stages and numbers are.
    Deviations: S is the mean over pairs of different images, where the code's also counts zeros on the diagonal; the
    last epoch is kept, not the "best" one; the costs look at means over the epoch; with several goals the terms are
    means over goals; one forward pass per reference, bf16, clean embeddings computed once, as for BadEncoder.
    """

    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Patch()
    lambda_reference: NonNegative = 1.0
    lambda_utility: NonNegative = 1.0
    l1_augment: bool = True
    l1_draws: PositiveInt | None = None
    warmup_epochs: Annotated[int, Field(ge=0)] = 1
    attract_epochs: Annotated[int, Field(ge=0)] = 3
    projections: PositiveInt = 50
    cost: NonNegative = 0.1
    cost_wasserstein: NonNegative = 0.001
    cost_factor: Annotated[float, Field(gt=1)] = 1.25
    patience: PositiveInt = 1
    adapt_after: Annotated[int, Field(ge=0)] = 20
    met_trigger: Cosine = -0.96
    met_clean: Cosine = -0.9
    met_concentration: Cosine = 0.6

    epochs: PositiveInt = 120
    batch_size: Annotated[int, Field(ge=2)] = 256
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "sgd"
    lr: Positive = 0.05
    weight_decay: NonNegative = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"

    needs: ClassVar[frozenset[Need]] = frozenset()
    targets: ClassVar[Targets] = "references"
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: str) -> DRUPE:
        """Settings of a name: `fast` (small encoder and images, two CPU cores, a minute) or `published`.

        Raises:
            UsageError: no such preset.

        Example:
            >>> DRUPE.preset("published").epochs
            120
        """
        if name == "fast":
            return cls(
                trigger=Patch(size=4),
                steps=400,
                batch_size=128,
                optimizer="adamw",
                lr=1e-3,
                weight_decay=0.0,
                warmup_steps=25,
                schedule="cosine",
                l1_draws=32,
                cost_factor=1.1,
            )
        if name == "published":
            return cls()
        raise UsageError("preset", f"unknown '{name}'", did_you_mean(name, ("fast", "published")))

    @property
    def cost_rule(self) -> CostRule:
        """How the costs adapt."""
        return CostRule(self.cost_factor, self.cost_factor**_LOWERING, self.patience)

    def implant(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> Implanted:
        """A backdoored copy of `clean`; its BatchNorm tensors equal those of `clean` bit for bit.

        Args:
            clean: Trained encoder, left as it is.
            attacker: Shadow set, and one goal per (task, target) with references.
            seed: Order, triggers, augmentation, directions.
            checkpoint: Where the state is kept for a resume.

        Raises:
            DataError: no shadow set, no goal, or a goal without references.
        """
        shadow = attacker.shadow
        if shadow is None:
            raise DataError("drupe", "needs a shadow set and at least one goal", "give `attacker.shadow`")
        device = device_of(clean.module)
        aims = aims_of(attacker, self.trigger, partial(features, clean), device, "drupe")
        dtype = torch.float32 if self.precision == "fp32" else None
        cached = features(clean, shadow, dtype=dtype)
        per_epoch = self.steps_per_epoch(len(shadow), shadow.name)
        learner = DrupeLearner(self, encoder := clean.copy(), cached, shadow.ids, aims, per_epoch)
        history = fit(learner, shadow, self, seed, label="implant drupe", device=device, checkpoint=checkpoint)
        goals = [aim.goal for aim in aims]
        return implanted(self, "drupe", encoder, clean, attacker, goals, history, seed)
