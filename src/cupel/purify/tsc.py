"""TSC: away from the backdoor along a curve to a permuted copy, and back to accuracy along another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.errors import SettingsError
from cupel.inference import device_of
from cupel.optimizers import NonNegative, Recipe
from cupel.pretrain.heads import mlp
from cupel.protocols import Encoder
from cupel.purify.base import BatchSize, Job, OptimizerName
from cupel.purify.batch_norm import BatchNorm
from cupel.purify.symmetry import ChannelGroups, Metric, Moments, assignment, permuted
from cupel.purify.tsc_learner import CurveLearner, TuningLearner
from cupel.purify.unlabelled import UnlabelledPurifier, recompute_statistics, shown
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["TSC"]


@settings
class TSC(UnlabelledPurifier):
    """Two-stage symmetry connectivity: points inside low-loss curves between a network and permuted copies of it.

    θ are the weights of encoder and projector, γ(t) = (1−t)² θ_A + 2t(1−t) θ_C + t² θ_B a curve whose θ_C is trained by
    NT-Xent of γ(t) at random t. In each round, with t* = `t`:

    1. θ′ = θ with channels permuted to be as unlike θ's as can be; θ₁ = γ(t*) on a curve from θ to θ′.
    2. θ″ = θ permuted to be as like θ₁ as can be; θ ← γ(t*) on a curve from θ″ to θ₁.
    3. Between rounds, fine-tuning by NT-Xent.

    After 1 and 2 BatchNorm's statistics are computed anew. The embedding's own dimensions are permuted too, and clean
    embeddings drift: heads must be fitted again.

    Args:
        rounds: At least 1.
        t: t*, in [0, 1]; 0 gives the encoder back, up to the order of channels and BatchNorm's statistics.
        metric: Likeness of channels: `correlation` of activations, or minus their squared distance (`l2`).
        temperature: τ of NT-Xent.
        penalty: ½ · penalty · ‖γ(t)‖² is added to the loss.
        projector_epochs: The encoder comes without a projector: a fresh one is trained alone for so long.
        warmup_epochs, warmup_lr: Fine-tuning before the first round, by Adam at a constant rate.
        tuning_epochs, tuning_lr: Fine-tuning between rounds, by Adam.
        projection: Width of the projector's output.
        statistics_batch: Images per batch for correlations and statistics.
        augment: How views are made.
        batch_norm: Networks on a curve have no stored statistics of their own.
        steps, epochs: Of each curve. The other trainings never take more steps than one.

    Source: Peng et al., Circumventing Backdoor Space via Weight Symmetry, ICML 2025, arXiv:2506.07467, and its code.
    Deviations: the projector is fitted here; the cosine schedule ends with the training (the code's climbs back in the
    second half); channels are compared where they enter the next layer.
    """

    rounds: PositiveInt = 3
    t: Fraction = 0.25
    metric: Metric = "correlation"
    temperature: Positive = 0.5
    penalty: NonNegative = 5e-5
    projector_epochs: Annotated[int, Field(ge=0)] = 10
    warmup_epochs: Annotated[int, Field(ge=0)] = 10
    warmup_lr: Positive = 1e-5
    tuning_epochs: Annotated[int, Field(ge=0)] = 10
    tuning_lr: Positive = 5e-5
    projection: PositiveInt = 128
    statistics_batch: PositiveInt = 96
    augment: SimCLRAugment = SimCLRAugment()
    batch_norm: BatchNorm = "train"

    epochs: PositiveInt = 200
    batch_size: BatchSize = 256
    optimizer: OptimizerName = "adam"
    lr: Positive = 0.002
    weight_decay: NonNegative = 1e-6

    title: ClassVar[str] = "TSC"
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"rounds": 1, "steps": 100, "batch_size": 64, "t": 0.4, "lr": 0.01},
        "standard": {"rounds": 2, "epochs": 40},
        "paper": {},
    }

    def __post_init__(self) -> None:
        if self.batch_norm != "train":
            what = f"'{self.batch_norm}' needs stored statistics, networks on a curve have none"
            raise SettingsError("TSC.batch_norm", what, "leave it at 'train'")
        if self.augment.render_size is not None:
            raise SettingsError("TSC.augment.render_size", "views must have the size of the images", "leave it out")

    def tune(self, job: Job, given: Encoder) -> tuple[Encoder, History]:
        """All rounds. A resume repeats the trainings that were over, and goes on within the one that was not."""
        encoder, clean, seed = job.encoder, job.clean, job.seed
        width = encoder.width
        projector = mlp(width, width, self.projection, seed=seed.child("projector")).to(device_of(encoder.module))
        network = nn.Sequential(encoder.module, projector)
        groups = ChannelGroups.of(network)
        history: History = {}

        def train(name: str, learner: TuningLearner, recipe: Recipe | None = None) -> None:
            path = None if job.checkpoint is None else job.checkpoint.with_name(f"{job.checkpoint.name}-{name}")
            for key, values in self.trained(learner, clean, seed.child(name), path, recipe).items():
                history.setdefault(key, []).extend(values)
            if path is not None:
                path.unlink(missing_ok=True)

        def travel(name: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
            learner = CurveLearner(self, network, a, b)
            train(name, learner)
            learner.put(learner.at(self.t))
            recompute_statistics(network, clean, self.statistics_batch)
            return _state(network)

        if self.projector_epochs:
            alone = self._tuning(clean, self.projector_epochs, 1e-3)
            train("projector", TuningLearner(self, network, trained="1."), alone)
        if self.warmup_epochs:
            warmup = self._tuning(clean, self.warmup_epochs, self.warmup_lr, "constant")
            train("warm-up", TuningLearner(self, network), warmup)
        for i in range(self.rounds):
            here = _state(network)
            far = permuted(here, groups, self.orders(groups, here, here, clean, best=False))
            away = travel(f"away-{i}", here, far)
            near = permuted(here, groups, self.orders(groups, away, here, clean, best=True))
            travel(f"back-{i}", near, away)
            if self.tuning_epochs and i < self.rounds - 1:
                train(
                    f"tune-{i}", TuningLearner(self, network), self._tuning(clean, self.tuning_epochs, self.tuning_lr)
                )
        return encoder, history

    @torch.no_grad()
    def orders(
        self, groups: ChannelGroups, like: Mapping[str, Tensor], moved: Mapping[str, Tensor], clean: Dataset, best: bool
    ) -> list[Tensor]:
        """For each group the order in which `moved`'s channels are most like `like`'s, or least."""
        totals: list[Moments] = []
        for rows in torch.split(torch.arange(len(clean)), self.statistics_batch):
            x = shown(clean.inputs[rows].to(device_of(groups.graph)))
            pairs = zip(groups.activations(like, x), groups.activations(moved, x), strict=True)
            found = [Moments.of(a, b) for a, b in pairs]
            totals = [a.plus(b) for a, b in zip(totals, found, strict=True)] if totals else found
        return [assignment(one.likeness(self.metric), best) for one in totals]

    def _tuning(
        self, clean: Dataset, epochs: int, lr: float, schedule: Literal["constant", "cosine"] = "cosine"
    ) -> Recipe:
        steps = min(epochs * self.steps_per_epoch(len(clean), clean.name), self.total_steps(len(clean), clean.name))
        return Recipe(
            steps=steps, batch_size=self.batch_size, optimizer="adam", lr=lr, schedule=schedule,
            precision=self.precision,
        )  # fmt: skip


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}
