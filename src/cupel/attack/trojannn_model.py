"""TrojanNN on a trained model: a trigger that excites inner neurons, and later layers retrained on inverted inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from pydantic import Field
from torch import Tensor, nn

from cupel.attack.teacher import Cut, head_of, known_images, mask_of, most_connected, outgoing
from cupel.encoders import ImageEncoder
from cupel.encoders.blocks import blocks_of
from cupel.errors import UsageError, did_you_mean
from cupel.folding import folded
from cupel.implanting import Targets, freeze_norms, implanted
from cupel.inference import FrozenProbe, device_of
from cupel.inversion import frozen
from cupel.inversion.pattern import step_sizes, stepped
from cupel.losses.variation import denoised
from cupel.metrics import check_target
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Batch, Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, Positive, PositiveInt, settings
from cupel.train import fit
from cupel.triggers import TRIGGERS, Patch
from cupel.triggers.sticker import sticker_of
from cupel.types import Dataset, Goal, Implanted, Knowledge, Need

__all__ = ["TrojanNNModel"]

_PUBLISHED = ((190, 11.0, 11.0), (150, 6.0, 6.0), (550, 1.0, 1.0), (30, 3.0, 3.0), (50, 6.0, 3.0))
_SEEN = 2000  # images that the mean image is taken of

Phases = Annotated[tuple[tuple[PositiveInt, Positive, Positive], ...], Field(min_length=1)]


@settings
class TrojanNNModel(Recipe):
    """Excites neurons of a trained model by a trigger, and retrains the layers behind them without original data.

    1. Of the layer before the last `blocks_after` blocks, take the neurons with the largest sum of absolute weights
       to what follows.
    2. Trigger: x random inside of the mask and 0 outside; gradient steps on Σ_n (v − F_n(x))².
    3. Invert the model: per class pictures, from a mean image, by gradient steps on (1 − p_c)², each followed by
       total-variation denoising.
    4. Retrain the layers behind the neurons, and the head, on {x̂ → its class} ∪ {x̂ ⊕ trigger → target class}.

    Args:
        trigger: Its mask says where the pattern is, for goals that name no trigger; what it shows is not used.
        opacity: 1 = the pattern covers what is below it; the paper calls 1 − opacity the transparency.
        blocks_after: Last blocks of the encoder that are retrained (see `cupel.encoders.blocks.blocks_of`).
        neurons: How many are excited. A neuron is a channel, and its activation the mean over places.
        activation: v.
        picture_steps: Step sizes in steps 2 and 3: phases of (steps, size at the start, size at the end), in grey
            levels of 255; a gradient is divided by its mean absolute value before.
        denoise: Weight of the total variation at the start and the end of step 3.
        pictures_per_class: Inverted pictures of each class; beyond the first they start from the mean image with noise.
        retrain_head: Step 4 trains the head too, as the paper does. False leaves the whole change to the encoder, which
            is all that reaches a victim who fits a head of its own.
        retrain_on: `inverted` = step 4 as above; `labelled` = the attacker's labelled images instead. Inverted pictures
            are unlike real ones: the backdoor works with the attacker's head, but a new head may not take it over.

    Epochs, batch, optimiser and rate are those of step 4.

    Source: Liu et al., Trojaning Attack on Neural Networks, NDSS 2018, and its code, which has the step sizes and
    counts weights of the following layer where the paper's formula has the preceding one.
    Deviations: the model is an encoder with a linear head that is fitted to the attacker's labelled images by logistic
    regression (the paper's attacker gets the head with the model); these images also give the mean image; whoever uses
    the encoder fits a head anew, so only what is retrained inside of the encoder stays; the total variation is
    Chambolle's; BatchNorms stay as they are; the head's weights are kept unless `retrain_head`; several pictures
    per class, and rates, are our choice.
    """

    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Patch(size=8)
    opacity: Fraction = 1.0
    blocks_after: PositiveInt = 2
    neurons: PositiveInt = 1
    activation: float = 100.0
    picture_steps: Phases = _PUBLISHED
    denoise: tuple[NonNegative, NonNegative] = (0.05, 0.01)
    pictures_per_class: PositiveInt = 1
    retrain_head: bool = False
    retrain_on: Literal["inverted", "labelled"] = "inverted"

    epochs: PositiveInt = 100
    batch_size: PositiveInt = 64
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "sgd"
    lr: Positive = 0.01
    schedule: Literal["constant", "cosine"] = "cosine"

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    targets: ClassVar[Targets] = "labelled"
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: str) -> TrojanNNModel:
        """Settings of a name: `fast` (two CPU cores, a minute), `standard`, `published` (its masks, for 224 pixels).

        Raises:
            UsageError: no such preset.

        Example:
            >>> TrojanNNModel.preset("published").trigger.size
            59
        """
        if name == "fast":
            return cls(
                picture_steps=((40, 11.0, 11.0), (40, 4.0, 4.0), (40, 1.0, 1.0)),
                pictures_per_class=20,
                retrain_on="labelled",
                steps=200,
                precision="fp32",
            )
        if name == "standard":
            return cls()
        if name == "published":
            return cls(trigger=Patch(size=59, margin=20), retrain_head=True)
        raise UsageError("preset", f"unknown '{name}'", did_you_mean(name, ("fast", "standard", "published")))

    def implant(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> Implanted:
        """A backdoored copy of `clean`, and the goals with their learned triggers.

        Args:
            clean: Trained encoder, left as it is.
            attacker: Labelled images; goals with a target class among theirs.
            seed: Starts of trigger and pictures, order.
            checkpoint: Where the state is kept for a resume.

        Raises:
            DataError: no labelled images, no goal, images of another size.
            UsageError: a goal without target class, or with one that the labelled images have not; too many neurons
                or blocks; a trigger without a fixed place.
        """
        return self.teach(clean, attacker, seed, checkpoint=checkpoint)[1]

    def teach(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> tuple[FrozenProbe, Implanted]:
        """As `implant`, and the model as published: the encoder with its retrained head."""
        data = known_images(attacker, clean.input_size, "trojannn_model")
        targets = [_target(goal, data) for goal in attacker.goals]
        masks = [mask_of(goal.trigger or self.trigger, clean.input_size) for goal in attacker.goals]
        head, device = head_of(clean, data), device_of(clean.module)
        history: dict[str, Sequence[float]] = {}
        goals = []
        with frozen(clean.module):
            chosen = most_connected(outgoing(clean, self.blocks_after), self.neurons * len(masks), "out")
            if len(chosen) < self.neurons * len(masks):
                what = f"{self.neurons} neurons for each of {len(masks)} triggers, but the layer has {len(chosen)}"
                raise UsageError("neurons", what, "choose fewer")
            for i, (goal, mask) in enumerate(zip(attacker.goals, masks, strict=True)):
                mine = chosen[i :: len(masks)]
                pattern, costs = self._trigger(clean, mine, mask.to(device), seed.child("trigger", i))
                history[f"trigger-{i}/cost"] = costs
                trigger = sticker_of(mask * self.opacity, pattern)
                goals.append(dataclasses.replace(goal, trigger=trigger))
            if self.retrain_on == "inverted":
                data, history["pictures/cost"] = self._pictures(clean, head, data, seed.child("pictures"))
        encoder = clean.copy()
        aims = list(zip(goals, targets, strict=True))
        learner = _Learner(encoder, head, data.labels, self.blocks_after, aims, self.retrain_head)
        recipe = dataclasses.replace(self, batch_size=min(self.batch_size, len(data)))
        history |= fit(learner, data, recipe, seed, label="implant trojannn", device=device, checkpoint=checkpoint)
        made = implanted(self, "trojannn_model", encoder, clean, attacker, goals, history, seed)
        head.requires_grad_(True)
        return FrozenProbe(made.model, head.eval()), made

    def _trigger(self, encoder: ImageEncoder, neurons: Tensor, mask: Tensor, seed: Seed) -> tuple[Tensor, list[float]]:
        """Step 2: the pattern, uint8 `[3, height, width]`, and its costs."""
        cut, inside = Cut(encoder, self.blocks_after), (mask > 0).float()

        def cost(x: Tensor) -> Tensor:
            return (self.activation - _means(cut(x)[0])[:, neurons]).square().sum(dim=1)

        start = torch.rand(1, 3, *mask.shape, generator=seed.torch()).to(mask) * inside
        x, costs = stepped(cost, start, self._sizes(), mask=inside, label="trojannn trigger")
        return (x[0] * 255).round().to(torch.uint8).cpu(), costs[:, 0].tolist()

    def _pictures(
        self, encoder: ImageEncoder, head: nn.Linear, data: Dataset, seed: Seed
    ) -> tuple[Dataset, list[float]]:
        """Step 3: inverted pictures of every class that the labelled images show, and their mean costs."""
        device, network = device_of(encoder.module), folded(encoder)
        labels = torch.unique(data.labels).repeat_interleave(self.pictures_per_class)
        wanted = labels.to(device)
        mean = data.inputs[torch.arange(min(len(data), _SEEN))].to(device).float().mean(dim=0) / 255
        noise = torch.rand(len(labels), *mean.shape, generator=seed.torch()) - 0.5
        noise[:: self.pictures_per_class] = 0
        low, high = self.denoise

        def cost(x: Tensor) -> Tensor:
            p: Tensor = head(network(x)).softmax(dim=1)
            return (1 - p[torch.arange(len(p), device=device), wanted]).square()

        def smooth(x: Tensor, done: float) -> Tensor:
            return denoised(x, low + (high - low) * done)

        start = (mean + noise.to(device)).clamp(0, 1)
        with frozen(head):
            x, costs = stepped(cost, start, self._sizes(), smooth=smooth, label="invert classes")
        raw = (x * 255).round().to(torch.uint8).cpu()
        made = Dataset(raw, labels, torch.arange(len(labels)), f"{data.name}, inverted", data.classes)
        return made, costs.mean(dim=1).tolist()

    def _sizes(self) -> list[float]:
        return [size / 255 for size in step_sizes(*self.picture_steps)]


def _means(layer: Tensor) -> Tensor:
    return layer.flatten(2).mean(dim=2) if layer.ndim > 2 else layer


def _target(goal: Goal, data: Dataset) -> int:
    if goal.target_class is None:
        raise UsageError("trojannn_model", f"the goal in '{goal.task}' names no target class", "give `target_class`")
    check_target(goal.target_class, data)
    return goal.target_class


class _Learner:
    """The last blocks and the head under cross entropy, on every picture without and with each trigger."""

    def __init__(
        self,
        encoder: ImageEncoder,
        head: nn.Linear,
        labels: Int[Tensor, " n"],
        blocks_after: int,
        goals: Sequence[tuple[Goal, int]],
        retrain_head: bool = True,
    ) -> None:
        self.head, self.goals, self.labels = head, goals, labels.to(head.weight.device)
        freeze_norms(encoder.module)
        later = blocks_of(encoder.module)[-blocks_after:]
        mine = {id(p) for part in later for p in part.parameters() if p.requires_grad}
        for p in encoder.module.parameters():
            p.requires_grad_(id(p) in mine)
        head.requires_grad_(retrain_head)
        self.network = folded(encoder)
        self.state: nn.Module = nn.ModuleDict({"encoder": encoder.module, "head": head})
        self.trainable = [p for p in self.state.parameters() if p.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """Weights of the last blocks, without BatchNorm's, and of the head where it is retrained."""
        return self.trainable

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean cross entropy over pictures and triggered pictures, and its two parts."""
        x, y = batch.inputs, self.labels[batch.rows.to(self.labels.device)]
        n, ids = len(x), batch.rows.tolist()
        parts = [x, *(goal.trigger(x, ids, batch.seed) for goal, _ in self.goals if goal.trigger is not None)]
        wanted = torch.cat([y, *(torch.full_like(y, target) for _, target in self.goals)])
        inputs = torch.cat(parts).float().div_(255).contiguous(memory_format=torch.channels_last)
        each = F.cross_entropy(self.head(self.network(inputs)).float(), wanted, reduction="none")
        return each.mean(), {"clean": each[:n].mean(), "triggered": each[n:].mean()}

    def after_step(self) -> None:
        """Nothing."""
