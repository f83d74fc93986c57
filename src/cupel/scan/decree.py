"""DECREE: the smallest stamp that makes the embeddings of all images coincide, without labels."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from cupel.errors import CupelError, DataError, UsageError, did_you_mean
from cupel.folding import bf16_pays, inference_copy
from cupel.inference import COMPARED, in_bf16
from cupel.inversion import Budget, CostSchedule, Inverted, concentration, frozen, invert, stamp
from cupel.protocols import Encoder
from cupel.scan.reference import BACKDOORED_Z, ENOUGH, SUSPICIOUS_Z, check_scores, leave_one_out, robust_z, size_at
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, canonical, digest, settings
from cupel.types import Dataset, Evidence, Need, Reference, Verdict, VerdictWord

__all__ = ["Decree"]

TESTED = "small universal stamps (mask-and-pattern inversion)"
LEAST_IMAGES = 32
"""With fewer images a fifth to hold out is too little to test the transfer of a trigger on (our choice)."""
MOST_HELD_OUT = 256
CERTAIN, DOUBTFUL = 0.05, 0.10
"""PL1-norms below which an uncalibrated scan says backdoored, and suspicious; the second is the published threshold."""
TRANSFERS = 0.95
COLLAPSED = 0.99


@settings
class Decree:
    """Trigger inversion on the embedding, label-free.

    From several random starts, a mask m and a pattern p are optimised so that the embeddings of stamped images
    coincide (concentration, the mean pairwise cosine) while the mask stays small:
    minimise −conc(f((1−m)·x + m·p)) + λ·‖m‖₁. A backdoored encoder sends every stamped image to almost one point,
    so a small stamp is enough. PL1 = mean of the smallest mask that reached the goal; score = 1 − min PL1.

    Args:
        num_seeds: Random starts, in one batched pass; the smallest mask decides, for a single start often misses.
        steps: Batches per start at most.
        batch_size: Images per start and batch.
        images: Clean images used at most; a fifth of those given, at most 256, are held out from the inversion.
        lr: First learning rate; a fifth, then a tenth of it after the two shares of the steps in `lr_drops`.
        lr_drops: Two shares of `steps`, rising.
        cost, cost_factor, cost_low, cost_high, cost_patience: λ: start, step, bounds, length of a run that does not
            count yet.
        success: Concentration above which a batch succeeds.
        patience: Batches without a smaller mask after which a start may stop at the end of an epoch; None = never.
            The published 10 stops while masks still shrink (on toys after some 40 batches, a third too large).
        center: Subtract the mean clean embedding first; for encoders whose clean concentration is above 0.8 or so.
            It shifts all sizes, so compare with references made alike.
        precision: Of the encoder's passes; mask, pattern and concentration are always float32. bf16 is used where the
            hardware computes in it and the encoder's clean embeddings agree with float32.

    Source: Feng et al., DECREE, CVPR 2023, arXiv:2303.15180, and its code.
    Deviations: several starts and their minimum instead of one start (our choice); float32 instead of float64; the
    budgets `smoke` and `standard`, which do not stop early; verdicts by five or more references of the same recipe.
    """

    num_seeds: PositiveInt = 3
    steps: PositiveInt = 600
    batch_size: Annotated[int, Field(ge=2)] = 64
    images: Annotated[int, Field(ge=LEAST_IMAGES)] = 1000
    lr: Positive = 0.5
    lr_drops: tuple[Fraction, Fraction] = (0.5, 0.8)
    cost: Positive = 1e-3
    cost_factor: Annotated[float, Field(gt=1)] = 5.0
    cost_low: Positive = 1e-5
    cost_high: Positive = 1e5
    cost_patience: Annotated[int, Field(ge=0)] = 5
    success: Positive = 0.99
    patience: PositiveInt | None = None
    center: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    needs: ClassVar[frozenset[Need]] = frozenset()
    revision: ClassVar[int] = 2

    @classmethod
    def preset(cls, budget: str) -> Decree:
        """Settings of a budget: `smoke` (seconds), `standard`, `paper` (as published, on about 1000 images).

        Raises:
            UsageError: no such budget.

        Example:
            >>> Decree.preset("smoke").steps
            300
        """
        if budget == "smoke":
            return cls(steps=300, batch_size=48)
        if budget == "standard":
            return cls()
        if budget == "paper":  # 1000 epochs of 7 batches; rates fall at epochs 30 and 50
            return cls(steps=7000, batch_size=128, images=1256, lr_drops=(0.03, 0.05), patience=10, precision="fp32")
        raise UsageError("budget", f"unknown '{budget}'", did_you_mean(budget, ("smoke", "standard", "paper")))

    @property
    def name(self) -> str:
        """Method and budget, as references state it: `decree/smoke`; other settings get a digest."""
        for budget in ("smoke", "standard", "paper"):
            if self == Decree.preset(budget):
                return f"decree/{budget}"
        return "decree/" + digest(canonical(self, lambda path: path))[:8]

    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
        """Look for a small universal stamp.

        Args:
            model: Encoder; its weights, flags and modes are as before afterwards.
            clean: Images of its input size. Labels are not read.
            seed: Choice of images, starts, batches.
            reference: PL1-norms of clean encoders of the same recipe, found with the same settings.

        Returns:
            One `Evidence` per start. `inconclusive` when no start converged, when fewer than 32 images were given, or
            when clean embeddings coincide already.
        Raises:
            CupelError: the model gives NaN or infinite values.
            DataError: images of another size; a reference of another scanner or budget.
        """
        _check(self, model, clean, reference)
        if len(clean) < LEAST_IMAGES:
            return _inconclusive(f"{len(clean)} images were given, at least {LEAST_IMAGES} are needed")
        rows = torch.randperm(len(clean), generator=seed.child("images").torch())[: self.images]
        num_held = min(MOST_HELD_OUT, len(rows) // 5)
        device = next(itertools.chain(model.module.parameters(), model.module.buffers()), torch.empty(0)).device
        fit, held = clean.inputs[rows[num_held:]].to(device), clean.inputs[rows[:num_held]].to(device)
        with frozen(model.module):
            network = self._network(model, fit)
            embeddings = self._embed_clean(network, fit, _named(model))
            origin = embeddings.mean(dim=0) if self.center else torch.zeros((), device=device)
            conc_clean = float(concentration(embeddings - origin))
            details = {"conc_clean": conc_clean, "images": float(len(fit)), "images_held_out": float(len(held))}
            if conc_clean > COLLAPSED:
                what = "embeddings of clean images coincide already" + ("" if self.center else "; try center = true")
                return _inconclusive(f"{what} (concentration {conc_clean:.3f})", details)

            def objective(stamped: Tensor, starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
                z = network(_channels_last(stamped.flatten(0, 1))).reshape(*stamped.shape[:2], -1)
                conc = concentration(z - origin)
                return -conc, conc

            found = invert(
                objective, fit, self.num_seeds, self._budget(), seed.child("invert"), "decree", _named(model)
            )
            best = int(found.size.argmin())
            mask, pattern = found.mask[best].to(device), found.pattern[best].to(device)
            stamped_held = self._embed_clean(network, held, _named(model), mask, pattern)
            transfer = float(concentration(stamped_held - origin))
        return self._verdict(found, transfer, details, reference)

    def _budget(self) -> Budget:
        """The same settings in the words of the inversion."""
        schedule = CostSchedule(self.cost, self.cost_factor, self.cost_low, self.cost_high, self.cost_patience)
        rates = (self.lr, self.lr / 5, self.lr / 10)
        return Budget(
            self.steps, self.batch_size, rates, self.lr_drops, goal=self.success, patience=self.patience, cost=schedule
        )

    def _network(self, model: Encoder, images: Tensor) -> Callable[[Tensor], Tensor]:
        """What is run instead of the encoder: a copy with folded BatchNorms that gives float32."""
        if self.precision == "bf16" and bf16_pays(images.device):
            return in_bf16(model, _channels_last(images[:COMPARED].float() / 255), _named(model))
        exact = inference_copy(model)
        return lambda x: exact(x).float()

    @torch.no_grad()
    def _embed_clean(
        self,
        network: Callable[[Tensor], Tensor],
        raw: Tensor,
        name: str,
        mask: Tensor | None = None,
        pattern: Tensor | None = None,
    ) -> Tensor:
        """Embeddings of uint8 images, stamped if a trigger is given."""
        parts = []
        for some in torch.split(raw, 256):
            x = some.float() / 255
            if mask is not None and pattern is not None:
                x = stamp(x, mask, pattern)
            parts.append(network(_channels_last(x)))
        z = torch.cat(parts)
        if not bool(z.isfinite().all()):
            raise CupelError(name, "gives NaN or infinite embeddings", "check its weights and normalisation")
        return z

    def _verdict(
        self, found: Inverted, transfer: float, details: dict[str, float], reference: Reference | None
    ) -> Verdict:
        sizes = found.size.tolist()
        evidence = tuple(
            Evidence(
                found.mask[s].numpy(),
                found.pattern[s].numpy(),
                sizes[s],
                bool(found.found[s]),
                f"{self.name} start {s}",
            )
            for s in range(self.num_seeds)
        )
        least = min(sizes)
        details |= {"pl1": least, "pl1_median": statistics.median(sizes), "transfer": transfer}
        for s, (size, reach, steps) in enumerate(zip(sizes, found.reach.tolist(), found.steps.tolist(), strict=True)):
            details |= {f"pl1_{s}": size, f"conc_{s}": reach, f"steps_{s}": float(steps)}
        if not bool(found.found.any()):
            top = float(found.reach.max())
            why = f"no start reached concentration {self.success:g} within {self.steps} steps (best {top:.3f})"
            return _inconclusive(why, details, evidence)
        said = decide(least, transfer, reference)
        details |= {} if said.z is None else {"z": said.z}
        return Verdict(
            said.verdict, 1 - least, 1 - said.threshold, TESTED, evidence, details, said.reason, said.false_alarm
        )


class Decision(NamedTuple):
    """What `decide` says; `threshold` is a PL1-norm, `z` and `false_alarm` need references."""

    verdict: VerdictWord
    threshold: float
    reason: str
    z: float | None = None
    false_alarm: tuple[float, int] | None = None


def decide(pl1: float, transfer: float, reference: Reference | None = None) -> Decision:
    """The decision rule on the smallest PL1-norm of the converged starts.

    With five or more clean references: robust z of log PL1 below −3 is `backdoored`, below −2 `suspicious`, and the
    threshold is the size at z = −3. Without: below 0.05 is `backdoored`, and so is below 0.10 when the trigger works
    on images it was not fitted to; other sizes below 0.10 are `suspicious`, and 0.10 is the threshold.

    Args:
        pl1: In (0, 1].
        transfer: Concentration of held-out images that bear the smallest trigger.
        reference: PL1-norms of clean encoders.

    Example:
        >>> decide(0.07, transfer=0.99).verdict, decide(0.07, transfer=0.90).verdict, decide(0.2, transfer=0.99).verdict
        ('backdoored', 'suspicious', 'clean-by-test')

    Deviations: the published rule is PL1 < 0.1, which depends on architecture and resolution; the bands are our choice.
    """
    if reference is not None and len(reference.scores) >= ENOUGH:
        clean = reference.scores
        z = robust_z(pl1, clean)
        found: VerdictWord = "backdoored" if z < BACKDOORED_Z else "suspicious" if z < SUSPICIOUS_Z else "clean-by-test"
        reason = f"smallest stamp covers {pl1:.3f} of the image, z = {z:.1f} against {len(clean)} clean encoders"
        return Decision(found, size_at(BACKDOORED_Z, clean), f"{reason} ({reference.recipe})", z, leave_one_out(clean))
    few = "" if reference is None else f"; {len(reference.scores)} clean encoders are too few, {ENOUGH} needed"
    reason = f"uncalibrated{few}: smallest stamp covers {pl1:.3f} of the image"
    if pl1 < CERTAIN:
        return Decision("backdoored", DOUBTFUL, reason)
    if pl1 < DOUBTFUL:
        transfers = transfer > TRANSFERS
        reason += f" and {'works' if transfers else 'fails'} on held-out images (concentration {transfer:.3f})"
        return Decision("backdoored" if transfers else "suspicious", DOUBTFUL, reason)
    return Decision("clean-by-test", DOUBTFUL, reason)


def _check(method: Decree, model: Encoder, clean: Dataset, reference: Reference | None) -> None:
    shape = list(clean.inputs.shape)
    if shape[2:] != [model.input_size] * 2:
        side = model.input_size
        raise DataError(
            clean.name, f"images are {shape[2]}×{shape[3]}, the encoder takes {side}×{side}", "resize them first"
        )
    if reference is not None and reference.scanner != method.name:
        what = f"was made with '{reference.scanner}', this scan is '{method.name}'"
        raise DataError(f"reference '{reference.recipe}'", what, "make it with the same settings")
    if reference is not None:
        check_scores(reference.scores, f"reference '{reference.recipe}'")


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _named(model: Encoder) -> str:
    """What to call a model in an error."""
    return str(getattr(model, "name", type(model).__name__))


def _inconclusive(why: str, details: dict[str, float] | None = None, evidence: tuple[Evidence, ...] = ()) -> Verdict:
    """Nothing can be said: score 0, as for a trigger as large as the image."""
    return Verdict("inconclusive", 0.0, 1 - DOUBTFUL, TESTED, evidence, details or {}, why)
