"""Cupellation: universal blends are bred and undone, then a gate leaves out what no clean image shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.encoders.gated import gated, takes_gate
from cupel.errors import DataError, SettingsError
from cupel.folding import folded, inference_copy
from cupel.inference import features
from cupel.losses.pulling import Whitening, decorrelated_pull, spread
from cupel.optimizers import NonNegative
from cupel.protocols import Batch, Encoder
from cupel.purify.base import BatchSize, Job, OptimizerName
from cupel.purify.batch_norm import BatchNorm, set_batch_norm
from cupel.purify.unlabelled import UnlabelledPurifier, shown
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["Cupellation"]

_GATE_IMAGES = 2500  # random ones: folders are often sorted by class


@settings
class Cupellation(UnlabelledPurifier):
    """Purification without labels or trigger: one part for triggers all over the image, one for local ones; our own.

    First, universal blends x̃ = (1 − α) x + α p are undone: L = λ_pull pull(f(x̃), f₀(x)) + λ_anchor pull(f(v), f₀(v))
    with f₀ the encoder as given, v half of the images and an augmented view of each, and pull the cosine distance
    between whitened embeddings (see `decorrelated_pull`). Each pattern p starts as noise and ascends on
    L by the sign of its gradient, which the same backward pass gives; one is drawn anew now and then.

    Then the encoder gets a gate (`Gated`). The part of a backdoored network that answers to a small trigger gives
    features there that no clean image gives anywhere; the encoder as given, frozen, tells where, and those locations
    get what clean images have there in the mean. No trigger need be known, and no scan is needed.

    Args:
        patterns: How many p there are.
        alpha: Smallest and largest α, drawn per image.
        pattern_step: Step of a pattern's ascent, of values in [0, 1].
        renew: Steps after which one pattern is drawn anew, in turn.
        augment: How views are made.
        lambda_pull, lambda_anchor: λ ≥ 0.
        gate: Whether there is one; without it the architecture stays. Without `steps` there is none either.
        limit: Share of clean locations within which a location may lie.
        low: The same for locations next to one that lies beyond `limit`.
        floor: Added to the variance of each principal direction, as a share of the largest.
        trimmed: Share of images, those with the farthest locations, that the gate does not learn from: a few of those
            given may bear a trigger.

    Raises:
        SettingsError: `low` above `limit`, or α the wrong way round.
        DataError: `gate` and an encoder that no gate fits into.

    Source: our choice. Ascent in the same pass: Shafahi et al., Universal Adversarial Training, AAAI 2020,
    arXiv:1811.11304.
    Deviations: none; it is ours.
    Limits: a trigger whose features lie among those of clean images passes the gate; an attacker who knows of it can
    train for that, and does so cheaply (`badencoder_evasive`). Where a trigger hides what the picture shows, it stays
    hidden.
    """

    patterns: PositiveInt = 8
    alpha: tuple[Fraction, Fraction] = (0.05, 0.3)
    pattern_step: NonNegative = 0.03
    renew: PositiveInt = 25
    augment: SimCLRAugment = SimCLRAugment(crop=False)
    lambda_pull: NonNegative = 2.0
    lambda_anchor: NonNegative = 1.0
    gate: bool = True
    limit: Fraction = 1.0
    low: Fraction = 0.95
    floor: Positive = 0.01
    trimmed: Annotated[float, Field(ge=0, lt=0.5)] = 0.06
    batch_norm: BatchNorm = "frozen"

    steps: Annotated[int, Field(ge=0)] | None = 250
    batch_size: BatchSize = 48
    optimizer: OptimizerName = "sgd"
    lr: Positive = 0.05
    warmup_steps: Annotated[int, Field(ge=0)] = 50

    title: ClassVar[str] = "Cupellation"
    revision: ClassVar[int] = 5
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"smoke": {"steps": 120}, "standard": {}, "paper": {}}

    def __post_init__(self) -> None:
        if self.low > self.limit:
            raise SettingsError("Cupellation.low", f"{self.low} is above limit, {self.limit}", "lower it")
        if self.alpha[0] > self.alpha[1]:
            raise SettingsError("Cupellation.alpha", f"{self.alpha} is the wrong way round", "smallest first")

    def work(self, job: Job) -> tuple[Encoder, History]:
        """As all purifiers without labels; but a batch must be full, for the gate learns from few images what few show.

        Raises:
            DataError: also fewer images than a batch.
        """
        if self.gate:
            self.steps_per_epoch(len(job.clean), job.clean.name)
        return super().work(job)

    def tune(self, job: Job, given: Encoder) -> tuple[Encoder, History]:
        """Undo blends, then put the gate in; the history has `loss`, `pull`, `anchor` and `feature_std` per step."""
        if self.gate and not takes_gate(job.encoder):
            raise DataError(
                "encoder", "is of a kind that no gate fits into", "set `gate: false`: patches may then stay"
            )
        learner = BlendLearner(self, job.encoder, given, job.clean, job.seed)
        history = self.trained(learner, job.clean, job.seed, job.checkpoint)
        if not self.gate:
            return job.encoder, history
        assert takes_gate(job.encoder)
        assert takes_gate(given)
        rows = torch.randperm(len(job.clean), generator=job.seed.child("gate").torch())[:_GATE_IMAGES]
        made = gated(
            job.encoder, given, torch.as_tensor(job.clean.inputs[rows]), limit=self.limit, low=self.low,
            floor=self.floor, trimmed=self.trimmed,
        )  # fmt: skip
        return made, history


class BlendLearner:
    """The encoder under L, and the patterns.

    Args:
        settings: Of the method.
        encoder: The copy that is trained.
        given: The encoder as it was, frozen.
        clean: Images.
        seed: Of the first patterns.
    """

    def __init__(self, settings: Cupellation, encoder: Encoder, given: Encoder, clean: Dataset, seed: Seed) -> None:
        self.settings, self.encoder = settings, encoder
        exact = settings.precision == "fp32"
        self.given = inference_copy(given, torch.float32 if exact else torch.bfloat16)
        self.targets = features(given, clean, dtype=torch.float32 if exact else None)
        self.white = Whitening.of(self.targets)
        set_batch_norm(encoder.module, settings.batch_norm)
        self.network = encoder if settings.batch_norm == "train" else folded(encoder)
        shape = (settings.patterns, 3, encoder.input_size, encoder.input_size)
        first = torch.rand(shape, generator=seed.child("patterns").torch())
        self.bank = _Bank(first.to(self.targets.device))
        self.state: nn.Module = nn.ModuleDict({"encoder": encoder.module, "bank": self.bank})

    def parameters(self) -> list[nn.Parameter]:
        """What descends; the patterns ascend in `after_step`."""
        return [p for p in self.encoder.module.parameters() if p.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """L; one forward pass for both terms."""
        s, n, bank = self.settings, len(batch.inputs), self.bank
        x, own = shown(batch.inputs), self.targets[batch.rows.to(self.targets.device)]
        done = int(bank.steps)
        if done and done % s.renew == 0:
            bank.renew((done // s.renew - 1) % s.patterns, batch.seed.child("renewed"))
        draw = batch.seed.child("blends").torch()
        alpha = s.alpha[0] + (s.alpha[1] - s.alpha[0]) * torch.rand(n, 1, 1, 1, generator=draw)
        which = torch.randint(s.patterns, (n,), generator=draw)
        blended = torch.lerp(x, bank.patterns[which.to(x.device)], alpha.to(x.device))
        views = s.augment(batch.inputs, batch.seed.child("views").torch(x.device))
        with torch.no_grad():
            there = self.given(views).float()
        f = self.network(torch.cat([blended, x[::2], views]).contiguous(memory_format=torch.channels_last)).float()
        pull = decorrelated_pull(f[:n], own, self.white)
        anchor = decorrelated_pull(f[n:], torch.cat([own[::2], there]), self.white)
        numbers = {"pull": pull.detach(), "anchor": anchor.detach(), "feature_std": spread(f[n:].detach())}
        return s.lambda_pull * pull + s.lambda_anchor * anchor, numbers

    def after_step(self) -> None:
        """Ascend."""
        self.bank.ascend(self.settings.pattern_step)


class _Bank(nn.Module):
    """The patterns; checkpoints keep them."""

    steps: Tensor

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.patterns = nn.Parameter(first)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def renew(self, index: int, seed: Seed) -> None:
        self.patterns[index] = torch.rand(self.patterns.shape[1:], generator=seed.torch()).to(self.patterns.device)

    @torch.no_grad()
    def ascend(self, step: float) -> None:
        if self.patterns.grad is not None:
            self.patterns.add_(self.patterns.grad.sign(), alpha=step).clamp_(0, 1)
            self.patterns.grad = None
        self.steps += 1
