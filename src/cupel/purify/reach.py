"""Whether stand-ins for triggered images come to where a backdoor sends really triggered ones; an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cupel.errors import DataError, SettingsError
from cupel.folding import folded
from cupel.inference import device_of, features
from cupel.losses.pulling import EmbeddingScale, whitened_pull
from cupel.protocols import Encoder, Images
from cupel.purify.base import BatchSize, copied
from cupel.purify.cbd import CBD
from cupel.purify.cbd_learner import CBDLearner
from cupel.purify.cupellation import Cupellation
from cupel.purify.evidence import usable_evidence
from cupel.purify.unlabelled import shown
from cupel.seeds import Seed
from cupel.settings import PositiveInt, settings
from cupel.types import Dataset
from cupel.verdicts import Evidence

__all__ = ["Reach", "Reached", "centroid", "climbing_blends", "reach"]

Steps = Annotated[int, Field(ge=0)]


def centroid(embeddings: Float[Tensor, "row dim"]) -> Float[Tensor, " dim"]:
    """Unit vector in the direction of the mean of unit embeddings.

    Example:
        >>> centroid(torch.tensor([[2.0, 0.0], [5.0, 0.0]])).tolist()
        [1.0, 0.0]
    """
    return F.normalize(F.normalize(embeddings.float(), dim=1).mean(dim=0), dim=0)


def reach(embeddings: Float[Tensor, "row dim"], centre: Float[Tensor, " dim"]) -> Float[Tensor, " row"]:
    """Cosine of each embedding with the centroid of triggered ones; 1 = it lies where triggered images do.

    Example:
        >>> reach(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 0.0])).tolist()
        [1.0, 0.0]
    """
    return F.cosine_similarity(embeddings.float(), centre.float()[None], dim=1)


class Reached(NamedTuple):
    """Embeddings of the same images: as they are, really triggered, and as each kind of stand-in.

    Args:
        embeddings: float32 `[images, width]` by name: `clean`, `triggered`, `linf-8` (radius in 255ths), ….
    """

    embeddings: Mapping[str, Tensor]

    def numbers(self) -> dict[str, dict[str, float]]:
        """By name: `reach` = mean cosine with the centroid of the triggered ones; `centred` = the same with the mean of
        the clean ones, all of unit length, as the origin, for embeddings may share a large common part; `inside` =
        share that lies as near to the centroid as 95 % of the triggered ones do; `moved` = mean of 1 − cosine with the
        own clean embedding.

        Example:
            >>> there = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
            >>> found = Reached({"clean": torch.tensor([[1.0, 0.0], [2.0, 0.0]]), "triggered": there}).numbers()
            >>> {name: round(value, 6) for name, value in found["triggered"].items()}
            {'reach': 1.0, 'centred': 1.0, 'inside': 1.0, 'moved': 1.0}
        """
        clean, triggered = self.embeddings["clean"], self.embeddings["triggered"]
        centre = centroid(triggered)
        edge = reach(triggered, centre).quantile(0.05) - 1e-6  # rounding shall leave nobody out
        origin = F.normalize(clean.float(), dim=1).mean(dim=0)
        made = {}
        for name, h in self.embeddings.items():
            cosine = reach(h, centre)
            moved = 1 - F.cosine_similarity(h.float(), clean.float(), dim=1)
            made[name] = {
                "reach": float(cosine.mean()),
                "centred": float(reach(F.normalize(h.float(), dim=1) - origin, centre - origin).mean()),
                "inside": float((cosine >= edge).double().mean()),
                "moved": max(0.0, float(moved.mean())),
            }
        return made


@settings
class Reach:
    """Stand-ins of every kind, found on an encoder as CBD finds them in its first step, and where they come to lie.

    CBD rests on the claim that contrastive adversaries, found without trigger and labels, land near the embeddings of
    triggered images. This measures it. It is an evaluation: the centroid needs the true trigger. Compare with the same
    numbers for clean images, and with those of the clean twin, which has no backdoor to be reached.

    Args:
        epsilons: Radii of the L∞ balls, in 255ths.
        shown: The radius whose stand-ins a map shows; one of `epsilons`.
        images: How many images; fewer where there are fewer.
        batch_size: Images that are each other's negatives.
        universal_rounds: Times that the universal perturbation, with the largest radius, sees all images.
        blend_steps: Steps for which the patterns of Cupellation's blends climb; 0 = there are none.
        cbd: All else about the stand-ins; its mode and radius are set here.

    Raises:
        SettingsError: `shown` is none of `epsilons`, or there are no radii.

    Source: the claim is that of Rethinking the Necessity of Labels in Backdoor Removal, ICLR 2023 workshop BANDS
    (OpenReview Noj1Fydegod); the measure and all numbers are our choice.
    """

    epsilons: tuple[Annotated[int, Field(ge=1, le=255)], ...] = (4, 8, 16, 32, 51)
    shown: PositiveInt = 8
    images: BatchSize = 128
    batch_size: BatchSize = 64
    universal_rounds: PositiveInt = 4
    blend_steps: Steps = 40
    cbd: CBD = CBD(pgd_steps=10)

    def __post_init__(self) -> None:
        if not self.epsilons:
            raise SettingsError("Reach.epsilons", "is empty", "name at least one radius, in 255ths")
        if self.shown not in self.epsilons:
            raise SettingsError("Reach.shown", f"{self.shown} is none of epsilons", f"take one of {self.epsilons}")

    def measure(
        self, encoder: Encoder, clean: Dataset, triggered: Dataset, seed: Seed, evidence: Sequence[Evidence] = ()
    ) -> Reached:
        """Find stand-ins on a copy of `encoder` and embed them.

        Args:
            encoder: Left as it is.
            clean: Images without trigger; labels are not read.
            triggered: The same images with the true trigger.
            seed: Choice of the images, and starts of the searches.
            evidence: Triggers that a scanner inverted; without converged ones there is no `inverted`.

        Raises:
            DataError: the two data sets differ in length, images are of another size than the encoder takes, or there
                are fewer than two.
        """
        if len(clean) != len(triggered):
            what = f"{len(triggered)} triggered images beside {len(clean)} clean ones"
            raise DataError(triggered.name, what, "stamp the same images")
        if len(clean) < 2:
            raise DataError(clean.name, "has fewer than two images", "reach is a mean: give more")
        rows = torch.randperm(len(clean), generator=seed.child("images").torch())[: self.images]
        raw, hit = torch.as_tensor(clean.inputs[rows]), torch.as_tensor(triggered.inputs[rows])
        own = features(encoder, raw, dtype=torch.float32)
        found = {"clean": own, "triggered": features(encoder, hit, dtype=torch.float32)}
        for name, images in self.stand_ins(encoder, raw, own, seed, evidence).items():
            found[name] = features(encoder, images, dtype=torch.float32)
        return Reached(found)

    def stand_ins(
        self,
        encoder: Encoder,
        images: Tensor,
        own: Float[Tensor, "row dim"],
        seed: Seed,
        evidence: Sequence[Evidence] = (),
    ) -> dict[str, Images]:
        """The stand-ins by name: `linf-…`, `patch`, `universal`, `blends`, and `inverted` where there is evidence.

        Args:
            encoder: Left as it is.
            images: uint8 `[row, 3, height, width]`.
            own: Their embeddings.
            seed: Starts of the searches.
            evidence: Triggers that a scanner inverted.

        Returns:
            Images in [0, 1], row by row those of `images`.
        """
        model = copied(encoder)
        cbd = self.cbd
        kinds = {f"linf-{e}": replace(cbd, mode="pgd-linf", epsilon=e / 255) for e in self.epsilons}
        kinds["patch"] = replace(cbd, mode="patch")
        kinds["universal"] = replace(cbd, mode="universal", epsilon=max(self.epsilons) / 255)
        triggers = usable_evidence(evidence, encoder.input_size, cbd.evidence_ratio)
        if triggers is not None:
            kinds["inverted"] = replace(cbd, mode="inverted")
        x, made = shown(images.to(device_of(encoder.module))), {}
        blocks = torch.split(torch.arange(len(x)), self.batch_size)
        for name, method in kinds.items():
            learner = CBDLearner(method, model, model, own, triggers, seed.child(name))
            model.module.requires_grad_(False)
            for turn in range(self.universal_rounds if name == "universal" else 1):
                draw = seed.child(name, turn)
                parts = [learner.adversaries(x[rows], own[rows], draw.child(i)) for i, rows in enumerate(blocks)]
            made[name] = torch.cat(parts)
        if self.blend_steps:
            made["blends"] = climbing_blends(
                folded(model), x, own, self.blend_steps, seed.child("blends"), batch_size=self.batch_size
            )
        return made


def climbing_blends(
    encoder: Encoder,
    x: Images,
    own: Float[Tensor, "row dim"],
    steps: int,
    seed: Seed,
    *,
    method: Cupellation | None = None,
    batch_size: int = 64,
) -> Images:
    """The blends that Cupellation undoes, (1 − α) x + α p, with patterns that climb while the encoder stands still.

    Args:
        encoder: In eval mode; its weights collect no gradient.
        x: Images in [0, 1], two or more.
        own: Their embeddings.
        steps: Steps of the ascent on `whitened_pull` to `own`; Cupellation's patterns climb on `decorrelated_pull`.
        seed: Patterns, α and the images of each step.
        method: Number of patterns, α and step size; None = defaults.
        batch_size: Images per step.

    Returns:
        Each image with one of the patterns.
    """
    s = Cupellation() if method is None else method
    scale, draw = EmbeddingScale.of(own), seed.torch()
    p = torch.rand((s.patterns, *x.shape[1:]), generator=draw).to(x.device)

    def blended(rows: Tensor) -> Images:
        alpha = s.alpha[0] + (s.alpha[1] - s.alpha[0]) * torch.rand(len(rows), 1, 1, 1, generator=draw)
        which = torch.randint(s.patterns, (len(rows),), generator=draw)
        return torch.lerp(x[rows.to(x.device)], p[which.to(x.device)], alpha.to(x.device))

    for _ in range(steps):
        rows = torch.randperm(len(x), generator=draw)[:batch_size]
        with torch.enable_grad():
            p.requires_grad_(True)
            distance = whitened_pull(encoder(blended(rows)), own[rows.to(own.device)], scale)
            (gradient,) = torch.autograd.grad(distance, p)
        p = (p.detach() + s.pattern_step * gradient.sign()).clamp(0, 1)
    with torch.no_grad():
        return blended(torch.arange(len(x)))
