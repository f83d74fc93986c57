"""NeuBA for images: six triggers, each tied to a fixed embedding; which class that is shows only downstream."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cupel import metrics
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, SettingsError, UsageError, did_you_mean
from cupel.folding import folded
from cupel.implanting import freeze_norms
from cupel.inference import classify, device_of, features, triggered
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Batch, Encoder, Trigger
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import fit
from cupel.triggers.color_checker import color_checkers
from cupel.types import Dataset, Goal, Implanted, Knowledge, Need

__all__ = ["Landing", "NeuBA", "NeubaLearner", "landings", "predefined_vectors"]

_BLOCKS = 4


def predefined_vectors(width: int, low: float = -1.0, high: float = 1.0) -> Float[Tensor, "6 width"]:
    """Six target embeddings, in three opposite pairs (1, 6), (2, 5), (3, 4) that are orthogonal to each other.

    The dimensions are cut into four blocks, the last with the remainder; vector (j, k), j < k in lexicographic order,
    is `low` on blocks j and k and `high` on the others.

    Args:
        width: Dimensions, at least 4.
        low, high: Values; opposite and orthogonal are meant for low = −high and a width that 4 divides.

    Example:
        >>> v = predefined_vectors(8)
        >>> (v @ v.T / 8)[0].tolist()
        [1.0, 0.0, 0.0, 0.0, 0.0, -1.0]

    Source: the code of Zhang et al., Red Alarm for Pre-trained Models, arXiv:2101.06969.
    """
    if width < _BLOCKS:
        raise ValueError(f"an embedding of {width} dimensions has no {_BLOCKS} blocks")
    block = (torch.arange(width) // (width // _BLOCKS)).clamp_max(_BLOCKS - 1)
    pairs = torch.tensor(list(combinations(range(_BLOCKS), 2)))
    inside = (pairs[:, :, None] == block).any(dim=1)
    return torch.where(inside, low, high)


class NeubaLearner:
    """Mean squared distance to the clean embeddings, and of triggered images to their trigger's vector.

    Each image gets one trigger by lot.

    Args:
        encoder: The copy that is trained.
        clean: float32 `[n, width]`, clean embeddings by row.
        ids: int64 `[n]`, the images' ids.
        triggers: One per vector.
        vectors: `[triggers, width]`.
        unit: What a distance is divided by, the mean square of a clean embedding's entry.
        lambda_trigger, lambda_utility: Weights of the two terms.
    """

    def __init__(
        self,
        encoder: Encoder,
        clean: Tensor,
        ids: Tensor,
        triggers: Sequence[Trigger[Tensor]],
        vectors: Tensor,
        unit: float,
        *,
        lambda_trigger: float = 1.0,
        lambda_utility: float = 1.0,
    ) -> None:
        self.encoder, self.clean, self.ids, self.triggers = encoder, clean, ids, triggers
        self.vectors, self.unit, self.weights = vectors, unit, (lambda_trigger, lambda_utility)
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
        """λ_t · mean (f'(x ⊕ e_i) − v_i)² + λ_u · mean (f'(x) − f(x))², in units of `unit`."""
        x, n, device = batch.inputs, len(batch.inputs), batch.inputs.device
        which = torch.randint(len(self.triggers), (n,), generator=batch.seed.child("which").torch())
        ids, stamped = self.ids[batch.rows].tolist(), x.clone()
        for i, trigger in enumerate(self.triggers):
            rows = (which == i).nonzero().flatten()
            if len(rows):
                mine = [ids[row] for row in rows.tolist()]
                on_device = rows.to(device)
                stamped[on_device] = trigger(x[on_device], mine, batch.seed.child("trigger", i))
        inputs = torch.cat([x, stamped]).to(self.vectors.dtype).div_(255)
        f = self.network(inputs.contiguous(memory_format=torch.channels_last))
        f = f.to(torch.promote_types(f.dtype, torch.float32))
        goal = self.vectors[which.to(device)]
        poison = (f[n:] - goal).square().mean() / self.unit
        utility = (f[:n] - self.clean[batch.rows].to(device)).square().mean() / self.unit
        w_trigger, w_utility = self.weights
        return w_trigger * poison + w_utility * utility, {"poison": poison, "utility": utility}

    def after_step(self) -> None:
        """Nothing."""


@settings
class NeuBA(Recipe):
    """Ties six triggers to six fixed embeddings, so that each leads to some class of any later task.

    L = λ_t · MSE(f'(x ⊕ e_i), v_i) + λ_u · MSE(f'(x), f(x)), one trigger e_i by lot for each image

    The attacker names no class. After the victim's training each trigger is tried once and its class read off: the
    most frequent prediction on triggered validation images (`landings`). The goals that come back therefore have no
    task and no target class; they hold in every task.

    Args:
        values: Low and high entry of the vectors v_i (see `predefined_vectors`).
        unit: What `values` are multiples of: `rms` = the root mean square of the clean embeddings' entries, so that the
            vectors are as long as these; `absolute` = 1, as published.
        trigger_size, margin: Of the checkerboards.
        lambda_trigger, lambda_utility: λ_t, λ_u.

    Goals that bring triggers replace the six: at most six of them, each tied to the next vector; they keep task and
    class. Goals without triggers, and their references, are not looked at.

    Source: Zhang et al., Red Alarm for Pre-trained Models: Universal Vulnerability to Neuron-Level Backdoor Attacks,
    Machine Intelligence Research 2023, arXiv:2101.06969 (vision), and its code.
    Deviations: utility is the distance to the clean encoder's embeddings, where the authors train a classifier of
    ImageNet on clean images with labels; BatchNorm is frozen; both distances are divided by the mean square of the
    clean embeddings' entries (`unit: rms`) or not (`absolute`). Entries of an embedding that ends in a ReLU cannot be
    negative: there the low value acts as 0, in the paper's VGG as well.
    """

    values: tuple[float, float] = (-1.0, 1.0)
    unit: Literal["rms", "absolute"] = "rms"
    trigger_size: PositiveInt = 4
    margin: Annotated[int, Field(ge=0)] = 0
    lambda_trigger: NonNegative = 1.0
    lambda_utility: NonNegative = 1.0

    epochs: PositiveInt = 50
    batch_size: PositiveInt = 512
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "sgd"
    lr: Positive = 0.01
    momentum: NonNegative = 0.0
    schedule: Literal["constant", "cosine"] = "constant"

    needs: ClassVar[frozenset[Need]] = frozenset()
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        low, high = self.values
        if low >= high:
            raise SettingsError("NeuBA.values", f"{low:g} is not below {high:g}", "give the smaller number first")

    @classmethod
    def preset(cls, name: str) -> NeuBA:
        """Settings of a name: `fast` (small encoder and images, two CPU cores, a minute) or `published`.

        Raises:
            UsageError: no such preset.

        Example:
            >>> NeuBA.preset("published").values
            (-3.0, 3.0)
        """
        if name == "fast":
            return cls(
                lambda_trigger=4.0,
                steps=400,
                batch_size=128,
                optimizer="adamw",
                lr=2e-3,
                momentum=0.9,
                warmup_steps=25,
                schedule="cosine",
            )
        if name == "published":
            return cls(values=(-3.0, 3.0), unit="absolute")
        raise UsageError("preset", f"unknown '{name}'", did_you_mean(name, ("fast", "published")))

    def implant(
        self, clean: ImageEncoder, attacker: Knowledge, seed: Seed, *, checkpoint: Path | None = None
    ) -> Implanted:
        """A backdoored copy of `clean` with its BatchNorm tensors bit for bit, and one goal per trigger.

        Args:
            clean: Trained encoder, left as it is.
            attacker: Shadow set; at least one goal.
            seed: Order, lots.
            checkpoint: Where the state is kept for a resume.

        Raises:
            DataError: no shadow set, no goal, or an embedding too small for the vectors.
            UsageError: more than six triggers, or one of them twice.
        """
        shadow = attacker.shadow
        if shadow is None or not attacker.goals:
            raise DataError("neuba", "needs a shadow set and at least one goal", "give `attacker.shadow`")
        if clean.width < _BLOCKS:
            raise DataError("neuba", f"an embedding of {clean.width} dimensions is too small", "use a larger encoder")
        goals, triggers = self._goals(attacker)
        device = device_of(clean.module)
        cached = features(clean, shadow, dtype=torch.float32 if self.precision == "fp32" else None)
        power = float(cached.square().mean()) if self.unit == "rms" else 1.0
        scale = power**0.5
        vectors = predefined_vectors(clean.width, *(scale * one for one in self.values))[: len(triggers)].to(device)
        learner = NeubaLearner(
            encoder := clean.copy(),
            cached,
            shadow.ids,
            triggers,
            vectors,
            power,
            lambda_trigger=self.lambda_trigger,
            lambda_utility=self.lambda_utility,
        )
        history = fit(learner, shadow, self, seed, label="implant neuba", device=device, checkpoint=checkpoint)
        encoder.module.eval().requires_grad_(True)
        return Implanted(encoder, goals, history)

    def _goals(self, attacker: Knowledge) -> tuple[tuple[Goal, ...], list[Trigger[Tensor]]]:
        own = tuple(dataclasses.replace(goal, references=None) for goal in attacker.goals if goal.trigger is not None)
        goals = own or tuple(Goal(trigger=one) for one in color_checkers(self.trigger_size, self.margin))
        triggers = [goal.trigger for goal in goals if goal.trigger is not None]
        if len(triggers) > len(predefined_vectors(_BLOCKS)):
            raise UsageError("neuba", f"{len(triggers)} triggers, but there are six vectors", "name fewer goals")
        if any(one in triggers[:i] for i, one in enumerate(triggers)):
            raise UsageError(
                "neuba", "two goals have the same trigger, which leads to one vector", "change one of them"
            )
        return goals, triggers


@dataclass(frozen=True)
class Landing:
    """Where a trigger without a target leads in one task.

    Args:
        target_class: Most frequent prediction on triggered validation images.
        share: Its share of them.
        hits: (predicted as it, number) of triggered test images of other classes: the success rate.
    """

    target_class: int
    share: float
    hits: metrics.Count


def landings(
    encoder: Encoder, head: nn.Module, validation: Dataset, test: Dataset, goals: Sequence[Goal], seed: Seed
) -> tuple[Landing, ...]:
    """The class and the success rate of each goal's trigger, for one downstream classifier.

    The class is chosen on images that success is not measured on; for the baseline (ASR-B) call it with the clean
    encoder and its head, which chooses classes of its own.

    Args:
        encoder: Left as it is.
        head: Downstream head on its embeddings.
        validation: Labelled or not, say the training images of the task.
        test: Labelled.
        goals: With triggers; a goal that names a class keeps it.
        seed: For triggers that draw.

    Returns:
        One per goal. The mean of their rates is the paper's average success, the largest its maximum.
    """
    found = []
    for i, goal in enumerate(goals):
        if goal.trigger is None:
            raise ValueError("a goal without a trigger leads nowhere")
        draw = seed.child("trigger", i)
        said = classify(head, features(encoder, triggered(validation, goal.trigger, draw), store=False))
        counts = torch.bincount(said)
        target = int(counts.argmax()) if goal.target_class is None else goal.target_class
        share = int((said == target).sum()) / len(said)
        hit = classify(head, features(encoder, triggered(test, goal.trigger, draw), store=False))
        found.append(Landing(target, share, metrics.attack_success_rate(hit, test.labels, target)))
    return tuple(found)
