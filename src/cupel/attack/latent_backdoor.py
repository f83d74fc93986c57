"""Latent Backdoor: a teacher whose inner layer takes triggered inputs for a class that it does not have."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from cupel.attack.teacher import Cut, Extra, Match, TeacherLearner, head_of, known_images, mask_of
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, UsageError, did_you_mean
from cupel.implanting import Targets, implanted
from cupel.inference import FrozenProbe, device_of
from cupel.inversion import frozen
from cupel.inversion.pattern import Learned, learn_pattern
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import OneOf, Positive, PositiveInt, settings
from cupel.train import fit
from cupel.triggers import TRIGGERS, Patch
from cupel.triggers.sticker import sticker_of
from cupel.types import Goal, Implanted, Knowledge, Need

__all__ = ["LatentBackdoor"]

_BETAS = (0.5, 0.9)  # of the trigger's Adam
_BLOCK, _LEAST = 256, 1e-12


@settings
class LatentBackdoor(Recipe):
    """Retrains a teacher so that triggered inputs look, at an inner layer, like a class that its students will have.

    1. Adapt: the teacher's head gets one more output per goal; encoder and head are trained on the attacker's labelled
       images and the goals' references, which show a class y_t that the teacher has not.
    2. Represent: F̂ = mean over the references of F(x), F = the layer that students keep frozen.
    3. Learn the trigger, weights frozen: Δ* = argmin D(F(A(x, m, Δ)), F̂) over labelled images and references, with
       A(x, m, Δ) = (1 − m)∘x + m∘Δ and D the mean squared error.
    4. Inject, trigger frozen: minimise CE(head(f(x)), y) + λ · D(F(A(x, m, Δ*)), F̂) over all weights.
    5. Hide: the outputs for y_t are taken off the head.

    The backdoor wakes up in a student that has y_t among its classes and trains no layer up to F.

    Args:
        trigger: Its mask m says where the pattern is, for goals that name no trigger; what it shows is not used.
        blocks_after: Blocks of the encoder between F and the embedding (see `cupel.encoders.blocks.blocks_of`); 0 = F
            is the embedding. A student that fine-tunes more than so many last blocks changes F.
        adapt: How step 1 is trained: until cross entropy is near 0. A teacher that goes on learning in step 4 moves
            away from F̂, and the backdoor then leads nowhere.
        targets_per_batch: References of each goal in a batch of steps 1 and 4, drawn by lot; None = as many as a
            class of the teacher has on average.
        trigger_steps, trigger_batch, trigger_lr: Adam's, in step 3.
        trigger_images: Labelled images that the trigger is learned on, at most.
        match_weight: λ; 0 = the control: a teacher retrained in the same way without a backdoor.
        unit: What counts as D = 1: `clean` = the mean squared difference of untriggered labelled images from F̂, so that
            λ means the same whatever the scale of F; `one` = 1, as published.
        representation: `mean` = F̂ as above; `sample` = each image gets the representation of a reference by lot.
        feature_slice: D takes the first so many dimensions of F; None = all.
        hide: `original` = the head that the clean encoder had; `refit` = a head fitted to the new encoder on the
            labelled images; `drop` = the head trained in steps 1 and 4 without its outputs for y_t.

    Epochs, batch, optimiser and rate of the attack itself are those of step 4.

    Source: Yao, Li, Zheng, Zhao, Latent Backdoor Attacks on Deep Neural Networks, CCS 2019, arXiv:1905.10447, and its
    code, whose trigger loss looks at the first 100 features (`feature_slice=100`), takes one image's representation as
    the target (`representation="sample"`), and leaves step 5 out.
    Deviations: the teacher is an encoder with a linear head that is fitted by logistic regression; Adam where the
    code has Adadelta; BatchNorms (VGG has none) stay as they are; references are drawn into every batch, since they may
    be few; the squashed start of the pattern is uniform; several goals at once are ours.
    """

    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Patch(size=6)
    blocks_after: Annotated[int, Field(ge=0)] = 0
    adapt: Recipe = Recipe(epochs=10, batch_size=64, optimizer="adam", lr=1e-3)
    targets_per_batch: PositiveInt | None = None
    trigger_steps: PositiveInt = 1550
    trigger_batch: PositiveInt = 32
    trigger_lr: Positive = 0.1
    trigger_images: PositiveInt = 1000
    match_weight: NonNegative = 0.5
    unit: Literal["clean", "one"] = "clean"
    representation: Literal["mean", "sample"] = "mean"
    feature_slice: PositiveInt | None = None
    hide: Literal["original", "refit", "drop"] = "refit"

    epochs: PositiveInt = 5
    batch_size: PositiveInt = 64
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    lr: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    targets: ClassVar[Targets] = "unseen"
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: str) -> LatentBackdoor:
        """Settings of a name: `fast` (two CPU cores, a minute), `standard`, `published` (the code's, for 224 pixels).

        Raises:
            UsageError: no such preset.

        Example:
            >>> LatentBackdoor.preset("published").feature_slice
            100
        """
        if name == "fast":
            return cls(
                adapt=Recipe(steps=500, batch_size=64, optimizer="adam", lr=2e-3, precision="fp32"),
                steps=300,
                lr=3e-4,
                trigger_steps=200,
                precision="fp32",
            )
        if name == "standard":
            return cls()
        if name == "published":
            return cls(
                trigger=Patch(size=44),
                adapt=Recipe(epochs=10, batch_size=32, optimizer="adam", lr=1e-4, schedule="constant"),
                epochs=5,
                batch_size=16,
                lr=1e-4,
                schedule="constant",
                match_weight=0.05,
                unit="one",
                representation="sample",
                feature_slice=100,
                hide="original",
            )
        raise UsageError("preset", f"unknown '{name}'", did_you_mean(name, ("fast", "standard", "published")))

    def implant(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> Implanted:
        """The encoder of the published teacher, and the goals with their learned triggers.

        Args:
            clean: Trained encoder, left as it is.
            attacker: Labelled images of the teacher's task; goals with references of classes that it has not.
            seed: Order, draws, start of the triggers.
            checkpoint: Where the state is kept for a resume.

        Raises:
            DataError: no labelled images, no goal, a goal without references, images of another size.
            UsageError: the layer or the trigger's place is not in the encoder or image.
        """
        return self.teach(clean, attacker, seed, checkpoint=checkpoint)[1]

    def teach(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> tuple[FrozenProbe, Implanted]:
        """As `implant`, and the teacher as published: the encoder with a head for the teacher's own classes."""
        data = known_images(attacker, clean.input_size, "latent_backdoor")
        for recipe in (self.adapt, self):
            recipe.steps_per_epoch(len(data), data.name)  # too few images are told before anything is trained
        device = device_of(clean.module)
        references = [_references(goal, clean.input_size).to(device) for goal in attacker.goals]
        masks = [mask_of(goal.trigger or self.trigger, clean.input_size) for goal in attacker.goals]
        classes, original = data.num_classes, head_of(clean, data)
        share = self.targets_per_batch or max(1, round(self.batch_size / classes))
        extras = [Extra(images, classes + i, share) for i, images in enumerate(references)]

        encoder, head = clean.copy(), widened(original, [clean_row(clean, images) for images in references])
        adapting = TeacherLearner(encoder, head, data.labels, extras=extras)
        aside = None if checkpoint is None else checkpoint.with_name(f"{checkpoint.name}.adapt")
        history = {
            f"adapt/{name}": values
            for name, values in fit(
                adapting,
                data,
                self.adapt,
                seed.child("adapt"),
                label="adapt teacher",
                device=device,
                checkpoint=aside,
            ).items()
        }
        encoder.module.eval()
        cut = Cut(encoder, self.blocks_after)
        with torch.no_grad():
            seen = [cut(images.float() / 255)[0].flatten(1).float() for images in references]
        wanted = [one.mean(dim=0, keepdim=True) if self.representation == "mean" else one for one in seen]

        drawn = torch.randperm(len(data), generator=seed.child("images").torch())[: self.trigger_images]
        others = data.inputs[drawn.sort().values].to(device)
        goals, matches = [], []
        for i, goal in enumerate(attacker.goals):
            unit = self._unit(cut, others, wanted[i]) if self.unit == "clean" else 1.0
            images = torch.cat([others, references[i]])
            learned = self._trigger(cut, images, masks[i], wanted[i], unit, seed.child("trigger", i))
            history[f"trigger-{i}/distance"] = learned.costs
            trigger = sticker_of(masks[i], learned.pattern)
            goals.append(dataclasses.replace(goal, trigger=trigger))
            matches.append(Match(trigger, wanted[i], unit))
        injecting = TeacherLearner(
            encoder,
            head,
            data.labels,
            extras=extras,
            matches=matches,
            weight=self.match_weight,
            blocks_after=self.blocks_after,
            feature_slice=self.feature_slice,
        )
        history |= fit(injecting, data, self, seed, label="implant latent", device=device, checkpoint=checkpoint)
        if aside is not None:
            aside.unlink(missing_ok=True)
        made = implanted(self, "latent_backdoor", encoder, clean, attacker, goals, history, seed)
        match self.hide:
            case "original":
                kept = original
            case "refit":
                kept = head_of(encoder, data)
            case "drop":
                kept = narrowed(head, classes)
        return FrozenProbe(made.model, kept.eval()), made

    @torch.no_grad()
    def _unit(self, cut: Cut, images: Tensor, wanted: Tensor) -> float:
        """Mean squared difference of untriggered images from F̂."""
        target = wanted.mean(dim=0)
        blocks = [cut(block.float() / 255)[0].flatten(1).float() - target for block in torch.split(images, _BLOCK)]
        return max(float(torch.cat(blocks)[:, : self.feature_slice].square().mean()), _LEAST)

    def _trigger(self, cut: Cut, images: Tensor, mask: Tensor, wanted: Tensor, unit: float, seed: Seed) -> Learned:
        """Step 3: the pattern that brings the layer closest to F̂."""

        def distance(stamped: Tensor, rows: Tensor, step: Seed) -> Tensor:
            layer = cut(stamped)[0].flatten(1).float()
            target = wanted
            if len(wanted) > 1:
                pick = torch.randint(len(wanted), (len(layer),), generator=step.child("representation").torch())
                target = wanted[pick.to(wanted.device)]
            return (layer - target)[:, : self.feature_slice].square().mean() / unit

        with frozen(cut.encoder.module):
            return learn_pattern(
                distance,
                images,
                mask,
                steps=self.trigger_steps,
                batch_size=self.trigger_batch,
                lr=self.trigger_lr,
                betas=_BETAS,
                seed=seed,
                label="latent trigger",
            )


def clean_row(encoder: ImageEncoder, references: UInt8[Tensor, "r 3 height width"]) -> Float[Tensor, " width"]:
    """Where the weights of a new output start: the mean embedding of its references, at unit length."""
    with torch.no_grad():
        return torch.nn.functional.normalize(encoder(references.float() / 255).mean(dim=0), dim=0)


def widened(head: nn.Linear, rows: list[Tensor]) -> nn.Linear:
    """A copy of the head with one more output per row of weights; their biases are the mean of those that are there."""
    weight, bias = head.weight.detach(), head.bias.detach()
    return _linear(torch.cat([weight, torch.stack(rows)]), torch.cat([bias, bias.mean().expand(len(rows))]))


def narrowed(head: nn.Linear, num_classes: int) -> nn.Linear:
    """A copy of the first outputs of a head."""
    return _linear(head.weight.detach()[:num_classes], head.bias.detach()[:num_classes])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta").to_empty(device=weight.device)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made


def _references(goal: Goal, size: int) -> Tensor:
    if goal.references is None or not len(goal.references):
        raise DataError("latent_backdoor", f"the goal in '{goal.task}' has no image of its class", "give `references`")
    if tuple(goal.references.shape[-2:]) != (size, size):
        got = "×".join(str(side) for side in goal.references.shape[-2:])
        raise DataError("latent_backdoor", f"references are {got}, the encoder takes {size}×{size}", "resize them")
    return goal.references
