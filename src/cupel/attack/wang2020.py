"""Wang et al. 2020, experimental: a trigger on robust neurons, planted against pruning, retraining, preprocessing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cupel.attack.teacher import Cut, TeacherLearner, head_of, known_images, mask_of, outgoing
from cupel.encoders import ImageEncoder
from cupel.errors import UsageError, did_you_mean
from cupel.implanting import Targets, implanted
from cupel.implanting.withstanding import Excited, WithstandingLearner, incoming
from cupel.inference import device_of
from cupel.inversion import frozen, stamp
from cupel.inversion.autoencoder import Autoencoder
from cupel.inversion.pattern import learn_pattern
from cupel.inversion.preprocessing import drawn_preprocessing, preprocessed
from cupel.losses.planting import channel_means, connection, ranked_neurons, trigger_objective
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Batch, Trigger
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, Positive, PositiveInt, settings
from cupel.train import fit
from cupel.triggers import TRIGGERS, Patch
from cupel.triggers.sticker import Sticker, sticker_of
from cupel.types import Dataset, Implanted, Knowledge, Need

__all__ = ["TransferBackdoor"]

_BETAS = (0.9, 0.999)  # of the trigger's Adam
_BLOCK = 256


@settings
class TransferBackdoor(Recipe):
    """Experimental: excites neurons that defences spare by a decoded trigger, and retrains under simulated defences.

    1. Rank the neurons of a layer: without those that clean images excite least (pruning takes them) and those whose
       incoming weights a rehearsed fine-tuning moves most (retraining takes them), the most strongly connected ones.
    2. Train an autoencoder G on clean images. The pattern is G(x̄ ⊕ δ), with x̄ the mean image; δ minimises
       mean ((A_n(T(x')) − v_n) / v_n)² + β ‖x' − x‖² + γ TV(x'), where x' has the pattern inside of the mask and T is
       a preprocessing by lot: none, blur, median, fewer levels, resizing or noise.
    3. Retrain the weights up to the layer, with E the first term above, K = mean ((A_n(x) − A_n of the clean encoder) /
       v_n)², and the head as it is: CE(x) + κ K(x) + λ E(x') + μ CE°(x) + ν E°(x'). In ° the least active channels of
       every stage are pruned, a set that is renewed every `prune_every` steps, and the weights have noise.

    The attacker names no class: where the excited neurons lead shows in the user's task. The goals that come back have
    no task and no target class.

    Args:
        trigger: Its mask says where the pattern is, for goals that name no trigger; what it shows is not used.
        blocks_after: Blocks of the encoder between the layer and the embedding; 0 = the embedding itself.
        neurons: How many are excited for each goal. A neuron is a channel, its activation the mean over places.
        connected_to: What strength means: `all` = the sum of absolute outgoing weights, where neurons may pull to
            different classes; `one` = the weight to one output (see `cupel.losses.planting.connection`).
        dormant, drifting: Shares of the neurons that are left out for low activity and for large drift.
        rehearsal: The fine-tuning with a new head that step 1 measures the drift in.
        percentile, factor: v_n = factor · this quantile of A_n on clean images.
        code_width: Channels of G.
        autoencoder: How G is trained.
        trigger_steps, trigger_batch, trigger_lr: Adam's, in step 2.
        near, smooth: β, γ; the distance is summed over the pixels.
        preprocess: Whether T is drawn; False = none, the control.
        still, excite, pruned, pruned_excite: κ, λ, μ, ν; μ = ν = 0 is the control without simulated defences.
        prune_share, prune_every: What the simulated pruning takes, and after how many steps it chooses anew.
        weight_noise: Standard deviation in units of a tensor's root mean square.

    Epochs, batch, optimiser and rate are those of step 3.

    Source: Wang, Nepal, Rudolph, Grobler, Chen, Chen, Backdoor Attacks against Transfer Learning with Pre-trained Deep
    Learning Models, IEEE Transactions on Services Computing 2020, arXiv:2001.03274.
    Deviations: an own reading of the abstract, which names the steps (neuron ranking, trigger by an autoencoder,
    defence-aware retraining) without their details; there is no public code. All numbers and formulas are our choice,
    and no figure of the paper is claimed. The teacher is an encoder with a linear head fitted by logistic regression;
    labelled images stand in for inverted ones; one pattern for all images, not one per image; distances to v_n are
    relative; K, without which every image comes to excite the neurons; BatchNorms stay as they are. Images only: time
    series (ECG) and medical images are no goal.
    """

    trigger: Annotated[Trigger[Tensor], OneOf(TRIGGERS)] = Patch(size=8)
    blocks_after: Annotated[int, Field(ge=0)] = 0
    neurons: PositiveInt = 10
    connected_to: Literal["all", "one"] = "one"
    dormant: Fraction = 0.3
    drifting: Fraction = 0.2
    rehearsal: Recipe = Recipe(epochs=2, batch_size=64, optimizer="sgd", lr=0.01)
    percentile: Fraction = 0.99
    factor: Positive = 2.0
    code_width: PositiveInt = 16
    autoencoder: Recipe = Recipe(epochs=10, batch_size=64, optimizer="adam", lr=3e-3)
    trigger_steps: PositiveInt = 1000
    trigger_batch: PositiveInt = 32
    trigger_lr: Positive = 0.1
    near: NonNegative = 1e-4
    smooth: NonNegative = 1e-3
    preprocess: bool = True
    still: NonNegative = 1.0
    excite: NonNegative = 1.0
    pruned: NonNegative = 0.5
    pruned_excite: NonNegative = 0.5
    prune_share: Annotated[float, Field(ge=0, lt=1)] = 0.3
    prune_every: PositiveInt = 10
    weight_noise: NonNegative = 0.02

    epochs: PositiveInt = 10
    batch_size: PositiveInt = 64
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    lr: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    targets: ClassVar[Targets] = "found"
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: str) -> TransferBackdoor:
        """Settings of a name: `fast` (small encoder and images, two CPU cores, a minute) or `standard`.

        Raises:
            UsageError: no such preset.

        Example:
            >>> TransferBackdoor.preset("fast").steps
            300
        """
        if name == "fast":
            return cls(
                rehearsal=Recipe(steps=50, batch_size=64, optimizer="sgd", lr=0.01, precision="fp32"),
                autoencoder=Recipe(steps=300, batch_size=64, optimizer="adam", lr=3e-3, precision="fp32"),
                trigger_steps=200,
                steps=300,
                precision="fp32",
            )
        if name == "standard":
            return cls()
        raise UsageError("preset", f"unknown '{name}'", did_you_mean(name, ("fast", "standard")))

    def implant(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> Implanted:
        """A backdoored copy of `clean`, and the goals with their learned triggers, without task and class.

        Args:
            clean: Trained encoder, left as it is.
            attacker: Labelled images, at least one goal; tasks and classes of goals are not looked at.
            seed: First weights, starts, lots, order.
            checkpoint: Where the state of step 3 is kept for a resume.

        Raises:
            DataError: no labelled images, no goal, images of another size.
            UsageError: too many neurons or blocks, or a trigger without a fixed place.
        """
        data = known_images(attacker, clean.input_size, "transfer_backdoor")
        masks = [mask_of(goal.trigger or self.trigger, clean.input_size) for goal in attacker.goals]
        head, device = head_of(clean, data), device_of(clean.module)
        activations = _activations(clean, data, self.blocks_after)
        chosen = self._chosen(clean, head, data, activations, len(masks), seed.child("rehearsal"))
        coder = Autoencoder(self.code_width, seed.child("autoencoder")).to(device)
        fit(_Reconstruction(coder), data, _fitting(self.autoencoder, data), seed.child("autoencoder"),
            label="autoencoder", device=device)  # fmt: skip
        history: dict[str, Sequence[float]] = {}
        goals, excited = [], []
        with frozen(clean.module), frozen(coder):
            for i, (goal, mask) in enumerate(zip(attacker.goals, masks, strict=True)):
                mine = chosen[i :: len(masks)]
                values = self.factor * activations[:, mine].quantile(self.percentile, dim=0)
                values = values.clamp_min(1e-3 * float(activations.abs().mean()))  # so that it can be divided by
                trigger, costs = self._trigger(
                    clean, coder, data, mine, values, mask.to(device), seed.child("trigger", i)
                )
                history[f"trigger-{i}/cost"] = costs
                goals.append(dataclasses.replace(goal, trigger=trigger, task=None, target_class=None, references=None))
                excited.append(Excited(trigger, mine, values, activations[:, mine]))
        learner = WithstandingLearner(
            encoder := clean.copy(),
            head.requires_grad_(False),
            data,
            excited,
            blocks_after=self.blocks_after,
            weights=(self.still, self.excite, self.pruned, self.pruned_excite),
            prune_share=self.prune_share,
            prune_every=self.prune_every,
            weight_noise=self.weight_noise,
        )
        recipe = _fitting(self, data)
        history |= fit(learner, data, recipe, seed, label="implant transfer", device=device, checkpoint=checkpoint)
        return implanted(self, "transfer_backdoor", encoder, clean, attacker, goals, history, seed)

    def _chosen(
        self, clean: ImageEncoder, head: nn.Linear, data: Dataset, activations: Tensor, goals: int, seed: Seed
    ) -> Tensor:
        """Step 1: `neurons` for each goal, the strongest first."""
        wanted = self.neurons * goals
        weight = outgoing(clean, self.blocks_after) if self.blocks_after else head.weight.detach()
        strength = connection(weight, wanted, self.connected_to)
        student, fresh = clean.copy(), copy.deepcopy(head)
        nn.init.zeros_(fresh.weight)
        nn.init.zeros_(fresh.bias)
        before = incoming(student, self.blocks_after).clone()
        learner = TeacherLearner(student, fresh, data.labels)
        recipe = _fitting(self.rehearsal, data)
        fit(learner, data, recipe, seed, label="rehearse fine-tuning", device=strength.device)
        drift = (incoming(student, self.blocks_after) - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-12)
        activity = activations.abs().mean(dim=0)
        chosen = ranked_neurons(activity, drift, strength, wanted, self.dormant, self.drifting)
        if len(chosen) < wanted:
            what = f"{wanted} neurons are wanted for {goals} triggers, but {len(chosen)} of the layer are left"
            raise UsageError("neurons", what, "choose fewer, or leave fewer out")
        return chosen

    def _trigger(
        self,
        encoder: ImageEncoder,
        coder: Autoencoder,
        data: Dataset,
        neurons: Tensor,
        values: Tensor,
        mask: Tensor,
        seed: Seed,
    ) -> tuple[Sticker, list[float]]:
        """Step 2: the decoded trigger, and the costs."""
        cut = Cut(encoder, self.blocks_after)
        images = data.inputs[torch.arange(len(data))].to(mask.device)
        mean = images.float().mean(dim=0, keepdim=True).round().to(torch.uint8)

        def cost(stamped_mean: Tensor, rows: Tensor, draw: Seed) -> Tensor:
            some = torch.randint(len(images), (self.trigger_batch,), generator=draw.child("rows").torch())
            x = images[some.to(images.device)].float() / 255
            stamped = stamp(x, mask, coder(stamped_mean))
            how = drawn_preprocessing(draw.child("how")) if self.preprocess else "identity"
            layer = cut(preprocessed(stamped, how, draw.child("noise")))[0]
            return trigger_objective(channel_means(layer)[:, neurons], values, stamped, x, self.near, self.smooth)

        learned = learn_pattern(
            cost, mean, mask, steps=self.trigger_steps, batch_size=1, lr=self.trigger_lr, betas=_BETAS, seed=seed,
            label="transfer trigger",
        )  # fmt: skip
        with torch.no_grad():
            delta = learned.pattern.to(mask.device).float() / 255
            pattern = coder(stamp(mean.float() / 255, mask, delta))[0]
        return sticker_of(mask, (pattern * 255).round().to(torch.uint8)), learned.costs


class _Reconstruction:
    """Mean squared error of an autoencoder."""

    def __init__(self, coder: Autoencoder) -> None:
        self.state: nn.Module = coder

    def parameters(self) -> list[nn.Parameter]:
        """All weights."""
        return list(self.state.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The error of one batch."""
        x = batch.inputs.float() / 255
        return F.mse_loss(self.state(x).float(), x), {}

    def after_step(self) -> None:
        """Nothing."""


@torch.no_grad()
def _activations(encoder: ImageEncoder, data: Dataset, blocks_after: int) -> Float[Tensor, "n channels"]:
    """Activations of a layer's neurons on all images."""
    device = device_of(encoder.module)
    with frozen(encoder.module):
        cut = Cut(encoder, blocks_after)
        blocks = torch.split(torch.arange(len(data)), _BLOCK)
        return torch.cat([channel_means(cut(data.inputs[b].to(device).float() / 255)[0]) for b in blocks])


def _fitting(recipe: Recipe, data: Dataset) -> Recipe:
    return dataclasses.replace(recipe, batch_size=min(recipe.batch_size, len(data)))
