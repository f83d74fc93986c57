"""INACTIVE: a backdoor in a trained encoder that answers to an inconspicuous, learned change of colours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, SettingsError, UsageError, did_you_mean
from cupel.folding import inference_copy
from cupel.implanting import Aim, ImplantLearner, aims_of
from cupel.inference import device_of, features
from cupel.losses.adaptive import AdaptiveCost, CostRule
from cupel.losses.distribution import sinkhorn_distance
from cupel.losses.perceptual import colour_distance, psnr, ssim
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Batch, Encoder, Images
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import History, fit
from cupel.triggers.learned_filter import FilterNet, filter_of
from cupel.types import Dataset, Implanted, Knowledge, Need

__all__ = ["INACTIVE", "FilterLearner", "FilterTraining", "JointLearner", "rounded"]

_RAISED, _LOWERED = 1.5, 2.0  # factor and divisor of stage 1's cost


def rounded(x: Images) -> Images:
    """Whole grey levels, as an image file has them; the gradient is that of the identity.

    Example:
        >>> (rounded(torch.tensor([0.5])) * 255).tolist()
        [128.0]
    """
    return x + ((x.detach() * 255).round() / 255 - x.detach())


class _Scaled(torch.autograd.Function):
    """The identity; its gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0] * ctx.factor, None


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
        recipe = _TwoRates(self, sum(p.numel() > 0 for net in filters if net for p in net.parameters()))
        history |= fit(learner, shadow, recipe, seed, label="implant inactive", device=device, checkpoint=checkpoint)
        for path in asides:
            path.unlink(missing_ok=True)
        encoder.module.eval().requires_grad_(True)
        goals = tuple(
            aim.goal if net is None else dataclasses.replace(aim.goal, trigger=filter_of(net))
            for aim, net in zip(aims, filters, strict=True)
        )
        return Implanted(encoder, goals, history)

    def _filter(
        self, clean: ImageEncoder, shadow: Dataset, seed: Seed, device: torch.device, checkpoint: Path | None
    ) -> tuple[FilterNet, History]:
        """Stage 1."""
        net = FilterNet(self.filter_width, seed).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        training = self.filter_training
        if training.steps == 0:
            return net, {}
        if len(shadow) < training.batch_size:  # the published batch is larger than many shadow sets
            training = dataclasses.replace(training, batch_size=len(shadow))
        per_epoch = training.steps_per_epoch(len(shadow), shadow.name)
        learner = FilterLearner(self, net, inference_copy(clean), per_epoch)
        found = fit(learner, shadow, training, seed, label="learn filter", device=device, checkpoint=checkpoint)
        return net, found


def _likeness(
    attack: INACTIVE, x: Images, y: Images, encoder: Encoder
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """L_sim, mean SSIM and mean PSNR."""
    alike, noise = ssim(x, y).mean(), psnr(x, y, attack.psnr_cap).mean()
    loss = 1 - alike - attack.psnr_weight * noise
    if attack.transport_weight:
        with torch.no_grad():
            of_x = encoder(x)
        of_y = encoder(y)
        with torch.autocast(x.device.type, enabled=False):
            loss = loss + attack.transport_weight * sinkhorn_distance(of_x.to(x.dtype), of_y.to(x.dtype))
    return loss, alike, noise


class _Course(nn.Module):
    """Where stage 1 stands: the step, sums over the epoch, and the cost."""

    step: Tensor
    cost: Tensor
    sums: Tensor

    def __init__(self, cost: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))  # on the CPU: read in every step
        self.register_buffer("cost", torch.tensor([cost, 0, 0], dtype=torch.float64))
        self.register_buffer("sums", torch.zeros(2, dtype=torch.float64, device=device))


class FilterLearner:
    """Stage 1: L_sim − c · Dis.

    Args:
        attack: Settings.
        net: T.
        encoder: The clean encoder, frozen.
        per_epoch: Steps per epoch.
    """

    def __init__(self, attack: INACTIVE, net: FilterNet, encoder: Encoder, per_epoch: int) -> None:
        self.attack, self.net, self.encoder, self.per_epoch = attack, net, encoder, per_epoch
        self.course = _Course(attack.cost, device_of(net))
        self.state: nn.Module = nn.ModuleDict({"net": net, "course": self.course})

    def parameters(self) -> list[nn.Parameter]:
        """The filter's."""
        return list(self.net.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one batch."""
        x = batch.inputs.to(self.net.enter.weight.dtype) / 255
        y = self.net(x)
        loss, alike, noise = _likeness(self.attack, x, y, self.encoder)
        away = colour_distance(y, self.attack.augment(batch.inputs, batch.seed.child("view").torch(x.device)))
        with torch.no_grad():
            self.course.sums.add_(torch.stack([alike, noise]))
        cost = float(self.course.cost[0])
        return loss - cost * away, {"ssim": alike, "psnr": noise, "dis": away, "cost": self.course.cost[0].clone()}

    def after_step(self) -> None:
        """Counts the step; adapts c where an epoch ends."""
        course = self.course
        course.step += 1
        if int(course.step) % self.per_epoch:
            return
        alike, noise = (course.sums / self.per_epoch).tolist()
        course.sums.zero_()
        cost, up, down = course.cost.tolist()
        rule = CostRule(_RAISED, _LOWERED, self.attack.patience)
        met = alike >= self.attack.min_ssim and noise >= self.attack.min_psnr
        course.cost.copy_(torch.tensor(rule.after(AdaptiveCost(cost, int(up), int(down)), met)))


class JointLearner(ImplantLearner):
    """Stage 2: encoder and filters in one pass, each with the gradient of its own loss.

    Args:
        attack: Settings.
        encoder: The copy that is trained.
        clean, ids, aims: As for `ImplantLearner`.
        filters: One per aim; None = the aim has a trigger.
        frozen: The clean encoder, for the transport term.
    """

    def __init__(
        self,
        attack: INACTIVE,
        encoder: ImageEncoder,
        clean: Tensor,
        ids: Tensor,
        aims: Sequence[Aim],
        filters: Sequence[FilterNet | None],
        frozen: Encoder,
    ) -> None:
        super().__init__(
            encoder,
            clean,
            ids,
            aims,
            lambda_reference=attack.lambda_reference,
            lambda_utility=attack.lambda_utility,
            lambda_trigger=attack.lambda_trigger,
            augment=SimCLRAugment.preset("references") if attack.l1_augment else None,
            draws=attack.l1_draws,
        )
        self.attack, self.filters, self.frozen = attack, filters, frozen
        self.whole = nn.ModuleDict({"encoder": encoder.module, "filters": nn.ModuleList([f for f in filters if f])})
        self.filtered: list[Tensor] = []

    @property
    def state(self) -> nn.Module:
        """Encoder and filters."""
        return self.whole

    def parameters(self) -> list[nn.Parameter]:
        """The encoder's weights but BatchNorm's, then the filters'."""
        return [*self.trainable, *self.whole["filters"].parameters()]

    def stamps(self, batch: Batch) -> Tensor:
        """Filtered images. On the way back the gradient of L0 gets the filter's weight in place of the encoder's."""
        x, ids = batch.inputs.to(self.aims[0].references.dtype).div_(255), self.ids[batch.rows].tolist()
        weight, parts = self.weights[0], []
        self.filtered = []
        for i, (aim, net) in enumerate(zip(self.aims, self.filters, strict=True)):
            if net is None:
                assert aim.goal.trigger is not None
                stamped = aim.goal.trigger(batch.inputs, ids, batch.seed.child("trigger", i))
                parts.append(stamped.to(x.dtype).div_(255))
                continue
            y = net(x)
            self.filtered.append(y)
            seen = rounded(y if weight else y.detach())
            if weight:
                seen = _Scaled.apply(seen, self.attack.attack_weight / weight)
            parts.append(seen)
        return torch.cat(parts)

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """L0 + λ1 L1 + λ2 L2 + L_sim − w_dis · Dis; see `stamps` for the filter's share of L0."""
        total, terms = super().loss(batch)
        if not self.filtered:
            return total, terms
        x = batch.inputs.to(self.filtered[0].dtype).div_(255)
        view = self.attack.augment(batch.inputs, batch.seed.child("view").torch(x.device)).to(x.dtype)
        shown: list[Any] = []
        for y in self.filtered:
            likeness, alike, noise = _likeness(self.attack, x, y, self.frozen)
            away = colour_distance(y, view)
            total = total + likeness - self.attack.distance_weight * away
            shown.append(torch.stack([alike, noise, away]).detach())
        alike, noise, away = torch.stack(shown).mean(dim=0)
        return total, {**terms, "ssim": alike, "psnr": noise, "dis": away}


@dataclasses.dataclass(frozen=True)
class _TwoRates:
    """The attack as a training whose last parameters, the filters', have an optimiser of their own.

    Args:
        attack: Settings.
        num_filter: How many parameters are the filters'.
    """

    attack: INACTIVE
    num_filter: int

    @property
    def epochs(self) -> int:
        return self.attack.epochs

    @property
    def steps(self) -> int | None:
        return self.attack.steps

    @property
    def batch_size(self) -> int:
        return self.attack.batch_size

    @property
    def precision(self) -> str:
        return self.attack.precision

    def steps_per_epoch(self, n: int, name: str) -> int:
        return self.attack.steps_per_epoch(n, name)

    def total_steps(self, n: int, name: str) -> int:
        return self.attack.total_steps(n, name)

    def lr_at(self, step: int, total: int) -> float:
        return self.attack.lr_at(step, total)

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if not self.num_filter:
            return self.attack.make_optimizer(parameters)
        adam = Recipe(optimizer="adam", lr=self.attack.filter_lr)
        encoder, filters = parameters[: -self.num_filter], parameters[-self.num_filter :]
        ratio = self.attack.filter_lr / self.attack.lr
        return _Both(self.attack.make_optimizer(encoder), adam.make_optimizer(filters), ratio)


class _Both(torch.optim.Optimizer):
    """Two optimisers that step together and share one state; the learning rate set is the first one's.

    Args:
        first, second: Over different parameters.
        ratio: Learning rate of the second over that of the first.
    """

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer, ratio: float) -> None:
        super().__init__([*first.param_groups, *second.param_groups], {})
        first.state = second.state = self.state
        self.first, self.second, self.ratio = first, second, ratio

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's own signature has overloads
        """One update of both."""
        for group in self.second.param_groups:
            group["lr"] *= self.ratio
        self.first.step()
        self.second.step()
