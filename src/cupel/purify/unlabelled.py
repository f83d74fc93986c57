"""What purifiers without labels share: they tune a copy of an encoder beside the encoder as it was given."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from cupel.encoders import ImageEncoder
from cupel.errors import CupelError, DataError, UsageError, did_you_mean
from cupel.inference import device_of, features
from cupel.losses.pulling import spread
from cupel.optimizers import Recipe
from cupel.protocols import Encoder, Learner
from cupel.purify.batch_norm import BatchNorm, batch_norms
from cupel.purify.cbd_learner import COLLAPSED
from cupel.seeds import Seed
from cupel.settings import settings
from cupel.train import History, fit
from cupel.types import Dataset, Evidence, Need

__all__ = [
    "UnlabelledPurifier",
    "copied",
    "fresh_copy",
    "recompute_statistics",
    "shown",
    "usable_evidence",
]


@settings
class UnlabelledPurifier(Recipe, abc.ABC):
    """Settings and verbs of a purifier that tunes an encoder on clean images without labels.

    Args:
        batch_norm: How the BatchNorms are run while the copy is tuned: `frozen` = stored statistics, affine part fixed;
            `eval_affine` = stored statistics, affine part trained; `train` = statistics of the batch, and the stored
            ones move.
    """

    batch_norm: BatchNorm = "eval_affine"

    batch_size: Annotated[int, Field(ge=2)] = 128
    precision: Literal["fp32", "bf16"] = "fp32"

    title: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls, budget: str) -> Self:
        """Settings of a budget: `smoke` (seconds on a small encoder), `standard`, `paper`.

        Raises:
            UsageError: no such budget.
        """
        if budget not in cls.budgets:
            raise UsageError("budget", f"unknown '{budget}'", did_you_mean(budget, cls.budgets))
        return cls(**cls.budgets[budget])

    def purify(self, model: Encoder, clean: Dataset, seed: Seed, evidence: Sequence[Evidence] = ()) -> Encoder:
        """A purified copy of `model`; see `purify_with_history`."""
        return self.purify_with_history(model, clean, seed, evidence)[0]

    def purify_with_history(
        self,
        model: Encoder,
        clean: Dataset,
        seed: Seed,
        evidence: Sequence[Evidence] = (),
        *,
        device: torch.device | str | None = None,
        checkpoint: Path | None = None,
    ) -> tuple[Encoder, History]:
        """A purified copy of `model`, and what the losses did.

        Args:
            model: Left as it is, weights, modes and flags.
            clean: Images of its input size, presumably without trigger. Labels are not read.
            seed: Order, draws, initialisation.
            evidence: Triggers that a scanner inverted; used by the methods that say so.
            device: Where to work, and where the copy stays; None = where `model` is.
            checkpoint: File that keeps the state for a resume.

        Returns:
            The copy in eval mode, and the numbers of each step. Without steps the copy is the encoder as given.

        Raises:
            DataError: images of another size, or fewer than two.
            CupelError: the loss is not finite, or the embeddings collapse: their spread on clean images falls below a
                twentieth of the given encoder's.
        """
        encoder = copied(model)
        where = device_of(model.module) if device is None else torch.device(device)
        encoder.module.to(where)
        if self.steps == 0:
            return encoder, {}
        if len(clean) < 2:
            raise DataError(clean.name, f"holds {len(clean)} images, two are needed", "give it more images")
        given = copied(encoder)
        given.module.requires_grad_(False)
        recipe = dataclasses.replace(self, batch_size=min(self.batch_size, len(clean)))
        some = clean.subset(torch.arange(min(len(clean), 256)))
        before = spread(features(given, some, dtype=torch.float32))
        with torch.enable_grad():
            made, history = recipe.tune(encoder, given, clean, seed, evidence, checkpoint)
        made.module.eval().requires_grad_(True)
        made.module.zero_grad(set_to_none=True)
        relative = float(spread(features(made, some, dtype=torch.float32, store=False)) / before)
        if relative < COLLAPSED:
            what = f"the embeddings collapse: their spread fell to {relative:.1%} of the given encoder's"
            raise CupelError(self.title, what, "use a smaller lr, or more images")
        return made, history

    @abc.abstractmethod
    def tune(
        self,
        encoder: Encoder,
        given: Encoder,
        clean: Dataset,
        seed: Seed,
        evidence: Sequence[Evidence],
        checkpoint: Path | None,
    ) -> tuple[Encoder, History]:
        """Purify `encoder` in place and return it; modes and flags are put right by the caller.

        Args:
            encoder: A copy, in eval mode, on the device.
            given: The encoder as it was, frozen.
            clean, seed, evidence, checkpoint: As handed to `purify_with_history`.
        """

    def trained(
        self, learner: Learner, clean: Dataset, seed: Seed, checkpoint: Path | None, recipe: Recipe | None = None
    ) -> History:
        """Run `learner` with these settings, or those of `recipe`."""
        label, device = f"purify {self.title}", device_of(learner.state)
        return fit(learner, clean, recipe or self, seed, label=label, device=device, checkpoint=checkpoint)


def copied(model: Encoder) -> Encoder:
    """An independent copy in eval mode whose weights can be trained."""
    made = model.copy() if isinstance(model, ImageEncoder) else copy.deepcopy(model)
    made.module.eval().requires_grad_(True)
    return made


def fresh_copy(model: Encoder, seed: Seed) -> Encoder:
    """The same architecture on the same device, all layers initialised anew by torch's defaults.

    The global generator is left as it was. Weights outside of torch's layers are kept.
    """
    made, device = copied(model), device_of(model.module)
    made.module.cpu()  # one generator for all devices
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed.value)
        for part in made.module.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
    made.module.to(device)
    return made


@torch.no_grad()
def recompute_statistics(module: nn.Module, clean: Dataset, batch_size: int) -> None:
    """Replace the stored statistics of all BatchNorms: the mean of those of the batches, in the data's order.

    What was stored before does not count. A short last batch is left out unless it is the only one. Modes are kept.

    Args:
        module: Images in [0, 1] → anything.
        clean: Images.
        batch_size: Images per batch.
    """
    norms, device = list(batch_norms(module).values()), device_of(module)
    modes = [(part, part.training) for part in module.modules()]
    momenta = [norm.momentum for norm in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    n = len(clean)
    for start in range(0, max(1, n - n % batch_size), batch_size):
        rows = torch.arange(start, min(start + batch_size, n))
        module(shown(clean.inputs[rows].to(device)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for part, mode in modes:
        part.training = mode


def shown(raw: Tensor) -> Tensor:
    """uint8 images as the encoder takes them, in [0, 1]."""
    return raw.float().div_(255).contiguous(memory_format=torch.channels_last)


def usable_evidence(evidence: Sequence[Evidence], side: int, ratio: float | None) -> tuple[Tensor, Tensor] | None:
    """Masks `[triggers, side, side]` and patterns `[triggers, 3, side, side]` of converged triggers; None = there are
    none.

    Args:
        evidence: Of a scanner.
        side: Of the images the encoder takes.
        ratio: Triggers more than so many times as large as the smallest are left out; None = all are used.

    Raises:
        DataError: a trigger of another size.
    """
    usable = [one for one in evidence if one.converged]
    if not usable:
        return None
    if ratio is not None:
        limit = ratio * min(one.size for one in usable)
        usable = [one for one in usable if one.size <= limit]
    for one in usable:
        if one.mask.shape != (side, side):
            what = f"a trigger of {'×'.join(map(str, one.mask.shape))}, the encoder takes {side}"
            raise DataError(f"evidence {one.source}", what, "scan the same encoder that is purified")
    masks = torch.stack([torch.as_tensor(one.mask) for one in usable])
    return masks, torch.stack([torch.as_tensor(one.pattern) for one in usable])
