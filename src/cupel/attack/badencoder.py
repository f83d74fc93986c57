"""BadEncoder: a backdoor implanted in a trained encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cupel.augment import SimCLRAugment
from cupel.encoders import ImageEncoder
from cupel.errors import DataError
from cupel.implanting import Aim, ImplantLearner, Targets, aims_of, implanted
from cupel.inference import features
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import OneOf, PositiveInt, settings
from cupel.train import fit
from cupel.triggers import TRIGGERS, Patch
from cupel.types import Dataset, Implanted, Knowledge, Need

__all__ = ["BadEncoder"]

# flip, colour jitter and grey as in the authors' code; no crop
_REFERENCE_AUGMENT = SimCLRAugment(crop=False)


@settings
class BadEncoder(Recipe):
    """Fine-tunes a copy of a clean encoder so that triggered inputs embed like the reference inputs.

    L = L0 + λ1·L1 + λ2·L2 with
    L0 = −mean cos(f'(x ⊕ e_i), f'(x_ij)),  L1 = −mean cos(f'(x_ij), f(x_ij)),  L2 = −mean cos(f'(x), f(x))

    Args:
        trigger: For goals that name none of their own.
        lambda_reference: λ1 ≥ 0.
        lambda_utility: λ2 ≥ 0.
        lambda_trigger: Weight of L0; 0 is the control that fine-tunes without a backdoor.
        l1_augment: True = L1 compares f'(augmented reference), as the authors' code does; False = the paper's formula.
        l1_draws: Augmented draws per reference and step; None = one per shadow image, as published.
        detach_reference: Stop the gradient through f'(reference) in L0 (ablation; published: False).

    Defaults are those published for CIFAR-10: SGD at 1e-3, momentum 0.9, weight decay 5e-4, batch 256, 200 epochs.

    Source: Jia, Liu, Gong, IEEE S&P 2022, arXiv:2108.00352, eq. 1–5 and section V-A.
    Deviations: bf16 autocast unless `precision: fp32`; one forward pass per reference where the authors repeat it over
    the batch (same loss and gradient, since BatchNorm is frozen) and multiplied into the convolution before it;
    clean embeddings are computed once.
    """

    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Patch()
    lambda_reference: NonNegative = 1.0
    lambda_utility: NonNegative = 1.0
    lambda_trigger: NonNegative = 1.0
    l1_augment: bool = True
    l1_draws: PositiveInt | None = None
    detach_reference: bool = False

    epochs: PositiveInt = 200
    batch_size: PositiveInt = 256
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: NonNegative = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"

    needs: ClassVar[frozenset[Need]] = frozenset()
    targets: ClassVar[Targets] = "references"
    registered: ClassVar[str] = "badencoder"
    revision: ClassVar[int] = 2

    def implant(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> Implanted:
        """A backdoored copy of `clean`; its BatchNorm tensors equal those of `clean` bit for bit.

        Args:
            clean: Trained encoder, left as it is.
            attacker: Shadow set, and one goal per (task, target) with at least one reference each.
            seed: Order, triggers, augmentation.
            checkpoint: Where the state is kept for a resume.

        Raises:
            DataError: no shadow set, no goal, or a goal without references.
        """
        shadow, name = attacker.shadow, self.registered
        if shadow is None or not attacker.goals:
            raise DataError(name, "needs a shadow set and at least one goal", "give `attacker.shadow`")
        device = next(clean.module.parameters()).device
        dtype = torch.float32 if self.precision == "fp32" else None
        aims = aims_of(attacker, self.trigger, partial(features, clean), device, name)
        learner = self.learner(encoder := clean.copy(), features(clean, shadow, dtype=dtype), shadow, aims)
        history = fit(learner, shadow, self, seed, label=f"implant {name}", device=device, checkpoint=checkpoint)
        goals = [aim.goal for aim in aims]
        return implanted(self, name, encoder, clean, attacker, goals, history, seed)

    def learner(self, encoder: ImageEncoder, clean: Tensor, shadow: Dataset, aims: Sequence[Aim]) -> ImplantLearner:
        """The step that is trained with.

        Args:
            encoder: The copy that is trained.
            clean: Clean embeddings of the shadow set, `[n, width]`.
            shadow: Images.
            aims: Goals made ready.
        """
        return ImplantLearner(encoder, clean, shadow.ids, aims, **self._terms())

    def _terms(self) -> dict[str, Any]:
        """Settings of `ImplantLearner`."""
        return {
            "lambda_reference": self.lambda_reference,
            "lambda_utility": self.lambda_utility,
            "lambda_trigger": self.lambda_trigger,
            "augment": _REFERENCE_AUGMENT if self.l1_augment else None,
            "draws": self.l1_draws,
            "detach_reference": self.detach_reference,
        }
