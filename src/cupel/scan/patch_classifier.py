"""PatchSearch's second stage: a small network that learns to see patches anywhere on an image."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from cupel.encoders import Fast
from cupel.inference import device_of
from cupel.optimizers import NonNegative, Recipe
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import fit
from cupel.types import Dataset

__all__ = ["PatchClassifier", "f1_score", "paste_some"]

_WATCH_EVERY = 20


@settings
class PatchClassifier(Recipe):
    """How the poison classifier is trained.

    Args:
        ensemble: Networks whose logits are averaged.
        width: Channels of the first stage of each.
        sizes: Smallest and largest side of a pasted patch, as shares of the image's side.
        margin: Distance of a pasted patch from the border, as a share of the image's side.

    Source: Tejankar et al., CVPR 2023, arXiv:2304.01482, section 3.3, and its code.
    Deviations: a training runs to its end and its best look at the validation images counts (the code stops after ten
    looks without a better F1); the network is a small residual one of our own.
    """

    ensemble: PositiveInt = 5
    width: PositiveInt = 16
    sizes: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (20 / 224, 80 / 224)
    margin: Annotated[float, Field(ge=0, lt=0.4)] = 10 / 224

    steps: PositiveInt | None = 2000
    batch_size: PositiveInt = 32
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "sgd"
    lr: Positive = 0.01
    weight_decay: NonNegative = 1e-4
    precision: Literal["fp32", "bf16"] = "fp32"

    revision: ClassVar[int] = 1

    def judge(
        self,
        train: Dataset,
        patches: Tensor,
        pool: Bool[Tensor, " n"],
        bad: Int[Tensor, " k"],
        good: Int[Tensor, " k"],
        seed: Seed,
        device: torch.device | str = "cpu",
    ) -> Float[Tensor, " n"]:
        """Logits of all images; above 0 = bears one of the patches.

        Args:
            train: All images.
            patches: uint8 `[k, 3, side, side]`.
            pool: Images to learn from.
            bad, good: Rows to validate with, presumably poisoned and clean; none of them in the pool.
            seed: First weights, order, pasting.
            device: Where to work.

        Raises:
            DataError: the pool holds fewer images than a batch.
        """
        assert not bool(pool[torch.cat([bad, good])].any()), "validation images must not be learned from"
        some = train.subset(pool)
        look, truth = train.inputs[torch.cat([bad, good])].to(device), torch.arange(len(bad) + len(good)) < len(bad)
        total = torch.zeros(len(train))
        for i in range(self.ensemble):
            learner = _Learner(self, patches.to(device), train.inputs.shape[-1], seed.child(i))
            learner.state.to(device)
            best: tuple[float, Mapping[str, Tensor]] = (-1.0, {})

            def watch(learner: _Learner = learner) -> Mapping[str, float]:
                nonlocal best
                f1 = f1_score(learner.logits(look) > 0, truth)
                if f1 > best[0]:
                    best = f1, copy.deepcopy(learner.state.state_dict())
                return {"f1": f1}

            with torch.enable_grad():
                label = f"patchsearch, classifier {i + 1} of {self.ensemble}"
                own = seed.child(i, "fit")
                fit(learner, some, self, own, label=label, device=device, watch=watch, watch_every=_WATCH_EVERY)
            learner.state.load_state_dict(best[1])
            for rows in torch.split(torch.arange(len(train)), 512):
                total[rows] += learner.logits(train.inputs[rows].to(device)) / self.ensemble
        return total


class _Learner:
    """One network under binary cross entropy: half of a batch gets a patch."""

    def __init__(self, settings: PatchClassifier, patches: Tensor, size: int, seed: Seed) -> None:
        self.settings, self.patches = settings, patches
        self.encoder: Encoder = Fast(width=settings.width, input_size=size).build(seed.child("init"))
        head, draw = nn.Linear(self.encoder.width, 1), seed.child("head").torch()
        for part in head.parameters():
            nn.init.uniform_(part, -(self.encoder.width**-0.5), self.encoder.width**-0.5, generator=draw)
        self.head = head
        self.state: nn.Module = nn.ModuleDict({"encoder": self.encoder.module, "head": head}).train()

    def parameters(self) -> list[nn.Parameter]:
        """All weights."""
        return list(self.state.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean binary cross entropy, and the share of the batch that is told rightly."""
        s, device = self.settings, batch.inputs.device
        x, bears = paste_some(batch.inputs, self.patches, s.sizes, s.margin, batch.seed.child("paste").torch())
        logits = self._forward(x.to(device))
        y = bears.to(device).float()
        right = ((logits.detach() > 0) == bears.to(device)).float().mean()
        return binary_cross_entropy_with_logits(logits, y), {"accuracy": right}

    def _forward(self, raw: Tensor) -> Tensor:
        x = (raw.float() / 255).contiguous(memory_format=torch.channels_last)
        out: Tensor = self.head(self.encoder(x).float())
        return out[:, 0]

    @torch.no_grad()
    def logits(self, raw: Tensor) -> Tensor:
        """Of uint8 images, in evaluation, on the CPU."""
        self.state.eval()
        out = self._forward(raw.to(device_of(self.state))).cpu()
        self.state.train()
        return out

    def after_step(self) -> None:
        """Nothing."""


def paste_some(
    raw: Tensor, patches: Tensor, sizes: tuple[float, float], margin: float, generator: torch.Generator
) -> tuple[Tensor, Bool[Tensor, " n"]]:
    """Every image, with probability ½, gets a random patch of a random size at a random place.

    Args:
        raw: uint8 `[n, 3, height, width]`, left as it is.
        patches: uint8 `[k, 3, side, side]`.
        sizes: Smallest and largest side, as shares of the image's side; 2 pixels at least.
        margin: Distance from the border, as a share of the image's side.
        generator: On the CPU.

    Returns:
        The images, and which of them got one.
    """
    out, side = raw.clone(), raw.shape[-1]
    edge = round(margin * side)
    low, high = (max(2, min(side - 2 * edge, round(share * side))) for share in sizes)
    bears = torch.rand(len(raw), generator=generator) < 0.5
    for i in bears.nonzero().flatten().tolist():
        which = int(torch.randint(len(patches), (), generator=generator))
        size = int(torch.randint(low, max(low, high) + 1, (), generator=generator))
        top, left = (edge + torch.randint(side - 2 * edge - size + 1, (2,), generator=generator)).tolist()
        patch = interpolate(patches[which : which + 1].float(), size=(size, size), mode="bilinear", antialias=True)
        out[i, :, top : top + size, left : left + size] = patch[0].round().clamp(0, 255).to(torch.uint8)
    return out, bears


def f1_score(said: Bool[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is found.

    Example:
        >>> round(f1_score(torch.tensor([True, True, False]), torch.tensor([True, False, True])), 3)
        0.5
    """
    hits = int((said & truth).sum())
    return 2 * hits / (int(said.sum()) + int(truth.sum())) if hits else 0.0
