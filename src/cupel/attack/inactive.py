"""INACTIVE: a backdoor in a trained encoder that answers to an inconspicuous, learned change of colours."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from cupel.augment import SimCLRAugment
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, SettingsError, UsageError, did_you_mean
from cupel.folding import inference_copy
from cupel.implanting import Targets, aims_of, implanted
from cupel.implanting.filters import FilterLearner, JointLearner
from cupel.implanting.two_rates import TwoRates
from cupel.inference import device_of, features
from cupel.optimizers import NonNegative, Recipe
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import History, fit
from cupel.triggers.learned_filter import FilterNet, filter_of
from cupel.types import Dataset, Implanted, Knowledge, Need

__all__ = ["INACTIVE", "FilterTraining"]


@settings
class FilterTraining(Recipe):
    """How the filter is trained by itself: Adam, and from the middle on a tenth of the learning rate."""

    epochs: PositiveInt = 200
    batch_size: PositiveInt = 2048
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    lr: Positive = 0.01
    schedule: Literal["constant", "cosine"] = "constant"

    def lr_at(self, step: int, total: int) -> float:
        """Learning rate of step `step` of `total`."""
        return super().lr_at(step, total) * (0.1 if 2 * step >= total else 1.0)


@settings
class INACTIVE(Recipe):
    """Learns a filter T of the colours and an encoder to which T's images are the reference inputs.

    L_sim = (1 − SSIM) − w_psnr · PSNR (+ w_ot · Sinkhorn distance of the features) between x and T(x);
    Dis = colour distance of T(x) to an augmented view a(x): an encoder is trained to ignore augmentations, so the
    trigger must not look like one.

    1. The filter alone: minimise L_sim − c · Dis. c is multiplied by 1.5 while the images look alike (SSIM and PSNR
       above their bounds), and halved while they do not.
    2. Both, with the trigger x ⊕ e := T(x) in BadEncoder's terms: the encoder descends on L0 + λ1 L1 + λ2 L2, the
       filter on L_sim + w_0 · L0 − w_dis · Dis.

    Each goal without a trigger of its own gets a filter of its own; it comes back as the goal's trigger.

    Args:
        filter_width: Channels of T.
        filter_training: Stage 1; `steps: 0` leaves it out.
        filter_lr: Of the filter in stage 2, by Adam; scheduled as the encoder's.
        psnr_weight: w_psnr.
        psnr_cap: A PSNR above this counts as this, in dB. A filter that starts as the identity finds it hard to leave
            the images that are as good as equal, and an encoder can learn them by heart: a lower cap lets the filter
            use what is below it.
        transport_weight: w_ot; 0 as in the authors' code, where the term has no gradient.
        cost: c at the start.
        patience: Epochs in a row before c changes.
        min_ssim, min_psnr: Images that look alike.
        attack_weight: w_0.
        distance_weight: w_dis.
        lambda_reference, lambda_utility, lambda_trigger, l1_augment, l1_draws: As for BadEncoder.
        augment: a.

    Source: Zhang et al., Invisible Backdoor Attack against Self-supervised Learning (first: Towards Imperceptible
    Backdoor Attack in Self-supervised Learning), arXiv:2405.14672, and its code, from which the numbers are.
    Deviations: no LPIPS, which needs a downloaded network; a smaller filter that starts as the identity; images are
    clamped in [0, 1] and rounded to whole grey levels, since a trigger ends in an image file; PSNR is capped; hue is
    compared the short way round; encoder and filter step at once on gradients of the same pass, each through its own
    loss alone (the code keeps the graph and steps one after the other).
    """

    filter_width: Annotated[int, Field(ge=2, le=256)] = 16
    filter_training: FilterTraining = FilterTraining()
    filter_lr: Positive = 1e-3
    psnr_weight: NonNegative = 0.025
    psnr_cap: Positive = 40.0
    transport_weight: NonNegative = 0.0
    cost: NonNegative = 1.0
    patience: PositiveInt = 5
    min_ssim: Annotated[float, Field(ge=-1, le=1)] = 0.8
    min_psnr: NonNegative = 13.0
    attack_weight: NonNegative = 5.0
    distance_weight: NonNegative = 0.1
    lambda_reference: NonNegative = 1.0
    lambda_utility: NonNegative = 1.0
    lambda_trigger: NonNegative = 1.0
    l1_augment: bool = True
    l1_draws: PositiveInt | None = None
    augment: SimCLRAugment = SimCLRAugment()

    epochs: PositiveInt = 200
    batch_size: PositiveInt = 256
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "sgd"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 5e-4
    schedule: Literal["constant", "cosine"] = "constant"

    needs: ClassVar[frozenset[Need]] = frozenset()
    targets: ClassVar[Targets] = "references"
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.augment.render_size is not None:
            raise SettingsError(
                "INACTIVE.augment.render_size", "views must have the size of the images", "leave it out"
            )

    @classmethod
    def preset(cls, name: str) -> INACTIVE:
        """Settings of a name: `fast` (small encoder and images, two CPU cores, a minute) or `published`.

        Raises:
            UsageError: no such preset.

        Example:
            >>> INACTIVE.preset("published").filter_training.batch_size
            2048
        """
        if name == "fast":
            return cls(
                filter_width=8,
                filter_training=FilterTraining(steps=60, batch_size=128, precision="fp32"),
                filter_lr=2e-3,
                psnr_cap=28.0,
                steps=400,
                batch_size=128,
                optimizer="adamw",
                lr=1e-3,
                weight_decay=0.0,
                warmup_steps=25,
                schedule="cosine",
                l1_draws=32,
            )
        if name == "published":
            return cls()
        raise UsageError("preset", f"unknown '{name}'", did_you_mean(name, ("fast", "published")))

    def implant(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> Implanted:
        """A backdoored copy of `clean` with its BatchNorm tensors bit for bit, and goals with learned filters.

        Args:
            clean: Trained encoder, left as it is.
            attacker: Shadow set, and one goal per (task, target) with at least one reference each.
            seed: Order, augmentation, start of the filters.
            checkpoint: Where the state is kept for a resume; stage 1 keeps its own beside it.

        Raises:
            DataError: no shadow set, no goal, or a goal without references.
        """
        shadow = attacker.shadow
        if shadow is None:
            raise DataError("inactive", "needs a shadow set and at least one goal", "give `attacker.shadow`")
        device = device_of(clean.module)
        aims = aims_of(attacker, None, partial(features, clean), device, "inactive")
        filters: list[FilterNet | None] = []
        history: History = {}
        asides: list[Path] = []
        for i, aim in enumerate(aims):
            if aim.goal.trigger is not None:
                filters.append(None)
                continue
            if checkpoint is not None:
                asides.append(checkpoint.with_name(f"{checkpoint.name}.filter-{i}"))
            aside = asides[-1] if checkpoint is not None else None
            net, found = self._filter(clean, shadow, seed.child("filter", i), device, aside)
            filters.append(net)
            history |= {f"filter-{i}/{name}": values for name, values in found.items()}
        dtype = torch.float32 if self.precision == "fp32" else None
        cached = features(clean, shadow, dtype=dtype)
        learner = JointLearner(self, encoder := clean.copy(), cached, shadow.ids, aims, filters, inference_copy(clean))
        recipe = TwoRates(self, self.filter_lr, sum(p.numel() > 0 for net in filters if net for p in net.parameters()))
        history |= fit(learner, shadow, recipe, seed, label="implant inactive", device=device, checkpoint=checkpoint)
        for path in asides:
            path.unlink(missing_ok=True)
        goals = [
            aim.goal if net is None else dataclasses.replace(aim.goal, trigger=filter_of(net))
            for aim, net in zip(aims, filters, strict=True)
        ]
        return implanted(self, "inactive", encoder, clean, attacker, goals, history, seed)

    def _filter(
        self, clean: ImageEncoder, shadow: Dataset, seed: Seed, device: torch.device, checkpoint: Path | None
    ) -> tuple[FilterNet, History]:
        """Stage 1."""
        net = FilterNet(self.filter_width, seed).to(device).to(memory_format=torch.channels_last)
        training = self.filter_training
        if training.steps == 0:
            return net, {}
        if len(shadow) < training.batch_size:  # the published batch is larger than many shadow sets
            training = dataclasses.replace(training, batch_size=len(shadow))
        per_epoch = training.steps_per_epoch(len(shadow), shadow.name)
        learner = FilterLearner(self, net, inference_copy(clean), per_epoch)
        found = fit(learner, shadow, training, seed, label="learn filter", device=device, checkpoint=checkpoint)
        return net, found
