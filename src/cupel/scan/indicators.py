"""Feature indicators: what random stamps and blends do to the embeddings, by forward passes alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cupel.inference import device_of
from cupel.inversion import concentration, frozen, stamp
from cupel.protocols import Encoder
from cupel.scan.admission import inner_spread, some_rows
from cupel.scan.judging import Judging
from cupel.scan.passes import Passes
from cupel.scan.reference import banded, check_reference
from cupel.seeds import Seed
from cupel.settings import Fraction, PositiveInt, settings
from cupel.types import Dataset, Need
from cupel.verdicts import Evidence, Reference, Verdict

__all__ = ["Indicators", "deviation", "effective_rank", "outlyingness", "random_triggers"]

DOUBTFUL = 0.90
"""Concentration above which an uncalibrated scan says suspicious (our choice)."""
LEAST = 1e-6

Share = Annotated[float, Field(gt=0, le=1)]


@settings
class Indicators(Judging):
    """Concentration, spread and outlyingness of embeddings under random triggers, label-free and without gradients.

    Stamps of random places, sizes and contents, and blends of random pictures are put on the images. A backdoor with a
    broad gate opens for some of them: the embeddings of all images then move to one place. Score = the largest centred
    concentration. It is a cheap first look that sees broad backdoors only; nothing in it is fitted to the encoder.

    Args:
        stamps, blends: How many of each.
        least_side, most_side: Of the stamps, as shares of the image's side.
        opacity: Of the blends.
        batch_size: Images that bear each trigger.
        images: Clean images used at most, for the mean and the spread of clean embeddings.
        precision: Of the encoder's passes; bf16 is used where the hardware computes in it and the encoder's clean
            embeddings agree with float32.

    Budgets: `smoke`, `standard`, and `paper`, which draws several times as many triggers.

    Source: our choice; the concentration is that of Feng et al., DECREE, CVPR 2023, arXiv:2303.15180, centred.
    Deviations: nothing is inverted, and concentration is measured around the clean mean.
    """

    stamps: PositiveInt = 192
    blends: PositiveInt = 16
    least_side: Share = 0.125
    most_side: Share = 0.35
    opacity: Fraction = 0.25
    batch_size: Annotated[int, Field(ge=2)] = 32
    images: Annotated[int, Field(ge=32)] = 512
    precision: Literal["bf16", "fp32"] = "bf16"
    method: ClassVar[str] = "indicators"
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"stamps": 48, "blends": 8},
        "standard": {},
        "paper": {"stamps": 768, "blends": 64, "batch_size": 64, "precision": "fp32"},
    }
    tested: ClassVar[str] = "reactions to random stamps and blends (forward passes alone)"
    limit: ClassVar[float] = DOUBTFUL
    needs: ClassVar[frozenset[Need]] = frozenset()
    revision: ClassVar[int] = 1

    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
        """Try the random triggers.

        Args:
            model: Encoder; its weights, flags and modes are as before afterwards.
            clean: Images of its input size. Labels are not read.
            seed: Choice of images and triggers.
            reference: 1 − concentration of clean encoders of the same recipe, found with the same settings.

        Returns:
            The trigger with the largest concentration as evidence. Details: `conc`, `conc_clean`, `spread` (clean
            spread as a share of the embeddings' length), `effective_rank`, `spread_ratio` (of the stamped embeddings
            to the clean ones, at its smallest) and `z_largest` (how far a trigger moves the mean embedding, in clean
            deviations). Without references at most `suspicious`.

        Raises:
            CupelError: the model holds or gives NaN or infinite values.
            DataError: images of another size or scale; a reference of another scanner or budget.
        """
        check_reference(reference, self.name)
        if (said := self.unfit(model, clean)) is not None:
            return said
        device = device_of(model.module)
        images = clean.inputs[some_rows(clean, self.images, seed)].to(device)
        masks, patterns = random_triggers(
            self.stamps, self.blends, model.input_size, (self.least_side, self.most_side), self.opacity,
            seed.child("triggers"),
        )  # fmt: skip
        with frozen(model.module):
            passes = Passes(model, images, self.precision)
            z = passes.embed(images)
            origin, rounds = z.mean(dim=0), max(1, len(images) // self.batch_size)
            found = []
            for i, (mask, pattern) in enumerate(zip(masks.to(device), patterns.to(device), strict=True)):
                at = i % rounds * self.batch_size
                some = images[at : at + self.batch_size]
                stamped = passes.embed(some, partial(stamp, mask=mask, pattern=pattern))
                ratio = deviation(stamped) / max(deviation(z[at : at + self.batch_size]), 1e-30)
                found.append((float(concentration(stamped - origin)), ratio, outlyingness(stamped, z)))
        conc = [one[0] for one in found]
        best = max(range(len(conc)), key=lambda i: conc[i])
        details = {
            "conc": conc[best],
            "conc_median": float(torch.tensor(conc).median()),
            "conc_clean": float(concentration(z)),
            "spread": inner_spread(z),
            "effective_rank": effective_rank(z),
            "spread_ratio": min(one[1] for one in found),
            "z_largest": max(one[2] for one in found),
            "images": float(len(images)),
        } | passes.costs()
        mask, pattern = masks[best].numpy(), patterns[best].numpy()
        evidence = Evidence(
            mask, pattern, float(masks[best].mean()), conc[best] > DOUBTFUL, f"{self.name} trigger {best}"
        )
        distance = min(1.0, max(1 - conc[best], LEAST))
        words = f"the strongest random trigger makes embeddings coincide to {1 - distance:.3f}"
        decision = banded(distance, reference, words, doubtful=1 - DOUBTFUL)
        return self.concluded(decision, max(0.0, conc[best]), (evidence,), details, device)


def random_triggers(
    stamps: int, blends: int, size: int, sides: tuple[float, float], opacity: float, seed: Seed
) -> tuple[Float[Tensor, "n height width"], Float[Tensor, "n 3 height width"]]:
    """Masks and patterns: square stamps of one colour, of blocks or of noise by turns, then blends of random blocks.

    Args:
        stamps, blends: How many of each.
        size: Side of the images in pixels.
        sides: Least and largest side of a stamp, as shares of `size`.
        opacity: Of the blends.
        seed: Trigger i draws from `seed.child(i)`, whatever the others are.
    """
    masks, patterns = [], []
    low, high = (max(1, round(share * size)) for share in sorted(sides))
    for i in range(stamps + blends):
        draw = seed.child(i).torch()
        mask, pattern = torch.zeros(size, size), torch.zeros(3, size, size)
        if i >= stamps:
            cells = torch.rand(3, 4, 4, generator=draw).round()
            patterns.append(torch.nn.functional.interpolate(cells[None], size=size)[0])
            masks.append(mask + opacity)
            continue
        side = int(torch.randint(low, high + 1, (), generator=draw))
        top, left = torch.randint(size - side + 1, (2,), generator=draw).tolist()
        grain = (1, 2, side)[i % 3]
        cells = torch.rand(3, grain, grain, generator=draw)
        if i % 2:  # saturated colours every second time
            cells = cells.round()
        where = (slice(top, top + side), slice(left, left + side))
        pattern[:, where[0], where[1]] = torch.nn.functional.interpolate(cells[None], size=side)[0]
        mask[where] = 1
        masks.append(mask)
        patterns.append(pattern)
    return torch.stack(masks), torch.stack(patterns)


def effective_rank(z: Float[Tensor, "n dim"]) -> float:
    """(Σ λ)² / Σ λ² over the eigenvalues λ of the covariance: how many directions the embeddings spread in.

    Example:
        >>> round(effective_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])), 3)
        2.0
    """
    x = (z - z.mean(dim=0)).double()
    covariance = x.T @ x
    square = float(covariance.square().sum())
    return float(covariance.trace()) ** 2 / square if square > 0 else 0.0


def outlyingness(moved: Float[Tensor, "m dim"], clean: Float[Tensor, "n dim"]) -> float:
    """Distance of the mean of `moved` from the clean mean, in root mean square distances of clean embeddings from it.

    Example:
        >>> outlyingness(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        3.0
    """
    distance, spread = float((moved.double().mean(dim=0) - clean.double().mean(dim=0)).norm()), deviation(clean)
    return distance / spread if spread > 0 else 0.0


def deviation(z: Float[Tensor, "n dim"]) -> float:
    """Root mean square distance of embeddings from their mean."""
    z = z.double()
    return float((z - z.mean(dim=0)).square().sum(dim=1).mean().sqrt())
