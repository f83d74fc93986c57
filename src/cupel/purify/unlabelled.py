"""What purifiers without labels share: they tune a copy of an encoder beside the encoder as it was given."""

from __future__ import annotations

import abc
import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from cupel.errors import CupelError, DataError
from cupel.inference import device_of, features
from cupel.losses.pulling import spread
from cupel.protocols import Encoder
from cupel.purify.base import BatchSize, Job, TrainedPurifier, copied
from cupel.purify.batch_norm import BatchNorm, batch_norms
from cupel.purify.cbd_learner import COLLAPSED
from cupel.seeds import Seed
from cupel.settings import settings
from cupel.train import History
from cupel.types import Dataset

__all__ = [
    "UnlabelledPurifier",
    "fresh_copy",
    "recompute_statistics",
    "shown",
]


_ALIKE = 1e-6  # spread below which embeddings differ by rounding alone


@settings
class UnlabelledPurifier(TrainedPurifier):
    """Settings and verbs of a purifier that tunes an encoder on clean images without labels.

    Args:
        batch_norm: How the BatchNorms are run while the copy is tuned: `frozen` = stored statistics, affine part fixed;
            `eval_affine` = stored statistics, affine part trained; `train` = statistics of the batch, and the stored
            ones move.
    """

    batch_norm: BatchNorm = "eval_affine"

    batch_size: BatchSize = 128
    precision: Literal["fp32", "bf16"] = "fp32"

    def work(self, job: Job) -> tuple[Encoder, History]:
        """Tune beside a frozen copy of the encoder, then compare the spread of embeddings.

        Raises:
            DataError: images of another size, fewer than two, or all alike.
            CupelError: the loss is not finite, or the embeddings collapse: their spread on clean images falls below a
                twentieth of the given encoder's.
        """
        clean = job.clean
        if len(clean) < 2:
            raise DataError(clean.name, f"holds {len(clean)} images, two are needed", "give it more images")
        given = copied(job.encoder)
        given.module.requires_grad_(False)
        recipe = dataclasses.replace(self, batch_size=min(self.batch_size, len(clean)))
        some = clean.subset(torch.arange(min(len(clean), 256)))
        before = spread(features(given, some, dtype=torch.float32))
        if float(before) <= _ALIKE:
            raise DataError(clean.name, "its images all look alike to the encoder", "give it images that differ")
        made, history = recipe.tune(job, given)
        relative = float(spread(features(made, some, dtype=torch.float32, store=False)) / before)
        if relative < COLLAPSED:
            what = f"the embeddings collapse: their spread fell to {relative:.1%} of the given encoder's"
            raise CupelError(self.title, what, "use a smaller lr, or more images")
        return made, history

    @abc.abstractmethod
    def tune(self, job: Job, given: Encoder) -> tuple[Encoder, History]:
        """Purify `job.encoder` in place, or another in its stead; modes and flags are put right by the caller.

        Args:
            job: See there.
            given: The encoder as it was, frozen.
        """


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
            if callable(reset) and any(True for _ in part.parameters(recurse=False)):
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
