"""DECREE: the smallest stamp that makes the embeddings of all images coincide, without labels."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cupel.errors import UsageError, did_you_mean
from cupel.inference import device_of
from cupel.inversion import (
    Budget,
    CostSchedule,
    Form,
    Frequency,
    Inverted,
    Linf,
    Stamp,
    concentration,
    frozen,
    invert,
    stamp,
)
from cupel.protocols import Encoder
from cupel.scan.admission import LEAST_IMAGES, admit, named
from cupel.scan.passes import Passes, peak_memory_mib
from cupel.scan.reference import Decision, against, check_reference
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, canonical, digest, settings
from cupel.types import Dataset, Evidence, Need, Reference, Verdict

__all__ = ["Decree", "decide"]

BUDGETS, VARIANTS = ("smoke", "standard", "paper"), ("stamp", "linf", "frequency")
FORMS: Mapping[str, Form] = {"stamp": Stamp(), "linf": Linf(), "frequency": Frequency()}
TESTED = {
    "stamp": "small universal stamps (mask-and-pattern inversion)",
    "linf": "universal perturbations of every pixel (bounded inversion)",
    "frequency": "universal colour patterns (inversion on the cosine spectrum)",
}
BANDS = {"linf": 12 / 255, "frequency": 0.03}
"""Sizes below which an uncalibrated variant says suspicious (our choice): those of triggers that eyes overlook."""
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

    Two variants look for what is no stamp: `linf` for a perturbation of all pixels with the smallest maximum, and
    `frequency` for colours of the smallest energy in the cosine spectrum. Their size stands for the PL1-norm.

    Args:
        variant: What the trigger may look like.
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
    budgets `smoke` and `standard`, which do not stop early; verdicts by five or more references of the same recipe;
    the variants, which without references say `suspicious` at most.
    """

    variant: Literal["stamp", "linf", "frequency"] = "stamp"

    num_seeds: PositiveInt = 3
    steps: PositiveInt = 600
    batch_size: Annotated[int, Field(ge=2)] = 64
    images: Annotated[int, Field(ge=32)] = 1000
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
    def preset(cls, budget: str, variant: Literal["stamp", "linf", "frequency"] = "stamp") -> Decree:
        """Settings of a budget: `smoke` (seconds), `standard`, `paper` (as published, on about 1000 images).

        Args:
            budget: One of these.
            variant: `linf` and `frequency` take two starts of 100 steps; the paper has no budget for them.

        Raises:
            UsageError: no such budget.

        Example:
            >>> Decree.preset("smoke").steps
            300
        """
        if budget not in BUDGETS:
            raise UsageError("budget", f"unknown '{budget}'", did_you_mean(budget, BUDGETS))
        if variant != "stamp":
            starts, steps = {"smoke": (2, 60), "standard": (2, 100), "paper": (3, 600)}[budget]
            precision: Literal["bf16", "fp32"] = "fp32" if budget == "paper" else "bf16"
            return cls(variant=variant, num_seeds=starts, steps=steps, precision=precision)
        if budget == "smoke":
            return cls(steps=300, batch_size=48)
        if budget == "standard":
            return cls()
        # 1000 epochs of 7 batches; rates fall at epochs 30 and 50
        return cls(steps=7000, batch_size=128, images=1256, lr_drops=(0.03, 0.05), patience=10, precision="fp32")

    @property
    def name(self) -> str:
        """Method and budget, as references state it: `decree/smoke`, `decree/linf-smoke`; others get a digest.

        Fields that a later release adds with a default change no name of a budget, so calibrations stay valid.
        """
        kind = "" if self.variant == "stamp" else f"{self.variant}-"
        for budget in BUDGETS:
            if self == Decree.preset(budget, self.variant):
                return f"decree/{kind}{budget}"
        return f"decree/{kind}" + digest(canonical(self, lambda path: path))[:8]

    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
        """Look for a small universal trigger.

        Args:
            model: Encoder; its weights, flags and modes are as before afterwards.
            clean: Images of its input size. Labels are not read.
            seed: Choice of images, starts, batches.
            reference: Sizes for clean encoders of the same recipe, found with the same settings.

        Returns:
            One `Evidence` per start; those of the variants are blends that do about the same. `inconclusive` when no
            start converged, when fewer than 64 images can be used, or when clean embeddings coincide already.

        Raises:
            CupelError: the model holds or gives NaN or infinite values.
            DataError: images of another size or scale; a reference of another scanner or budget.
        """
        check_reference(reference, self.name)
        device = device_of(model.module)
        if (reason := admit(model, clean, LEAST_IMAGES)) is not None:
            return self._inconclusive(reason, device)
        rows = torch.randperm(len(clean), generator=seed.child("images").torch())[: self.images]
        num_held = min(MOST_HELD_OUT, len(rows) // 5)
        fit, held = clean.inputs[rows[num_held:]].to(device), clean.inputs[rows[:num_held]].to(device)
        form = FORMS[self.variant]
        with frozen(model.module):
            passes = Passes(model, fit, self.precision)
            embeddings = passes.embed(fit)
            origin = embeddings.mean(dim=0) if self.center else torch.zeros((), device=device)
            conc_clean = float(concentration(embeddings - origin))
            details = {"conc_clean": conc_clean, "images": float(len(fit)), "images_held_out": float(len(held))}
            if conc_clean > COLLAPSED:
                what = "embeddings of clean images coincide already" + ("" if self.center else "; try center = true")
                return self._inconclusive(f"{what} (concentration {conc_clean:.3f})", device, details | passes.costs())

            def objective(stamped: Tensor, starts: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
                z = passes(stamped.flatten(0, 1)).reshape(*stamped.shape[:2], -1)
                conc = concentration(z - origin)
                return -conc, conc

            found = invert(
                objective, fit, self.num_seeds, self._budget(), seed.child("invert"), "decree", named(model), form
            )
            best = int(found.size.argmin())
            mask, pattern = found.mask[best].to(device), found.pattern[best].to(device)
            changed = passes.embed(held, lambda x: stamp(x, mask, pattern))
            details["transfer"] = float(concentration(changed - origin))
        return self._verdict(found, details | passes.costs(), reference, device)

    def _budget(self) -> Budget:
        """The same settings in the words of the inversion."""
        schedule = CostSchedule(self.cost, self.cost_factor, self.cost_low, self.cost_high, self.cost_patience)
        rates = (self.lr, self.lr / 5, self.lr / 10)
        return Budget(
            self.steps, self.batch_size, rates, self.lr_drops, goal=self.success, patience=self.patience, cost=schedule
        )

    def _verdict(
        self, found: Inverted, details: dict[str, float], reference: Reference | None, device: torch.device
    ) -> Verdict:
        sizes = found.size.tolist()
        evidence = tuple(
            Evidence(
                found.mask[s].numpy(),
                found.pattern[s].numpy(),
                float(found.mask[s].mean()) if self.variant != "stamp" else sizes[s],
                bool(found.found[s]),
                f"{self.name} start {s}",
            )
            for s in range(self.num_seeds)
        )
        least, unit = min(sizes), "pl1" if self.variant == "stamp" else "size"
        details |= {unit: least, f"{unit}_median": statistics.median(sizes)}
        for s, (size, reach, steps) in enumerate(zip(sizes, found.reach.tolist(), found.steps.tolist(), strict=True)):
            details |= {f"{unit}_{s}": size, f"conc_{s}": reach, f"steps_{s}": float(steps)}
        if not bool(found.found.any()):
            top = float(found.reach.max())
            why = f"no start reached concentration {self.success:g} within {self.steps} steps (best {top:.3f})"
            return self._inconclusive(why, device, details, evidence)
        said = self._decide(least, details["transfer"], reference)
        details |= {} if said.z is None else {"z": said.z}
        return Verdict(
            said.verdict,
            1 - least,
            1 - said.threshold,
            TESTED[self.variant],
            evidence,
            details,
            said.reason,
            said.false_alarm,
            peak_memory_mib(device),
        )

    def _decide(self, least: float, transfer: float, reference: Reference | None) -> Decision:
        if self.variant == "stamp":
            return decide(least, transfer, reference)
        words = f"smallest {self.variant} change that makes embeddings coincide: {least:.4f}"
        said, band = against(least, reference, words), BANDS[self.variant]
        if isinstance(said, Decision):
            return said
        return Decision("suspicious" if least < band else "clean-by-test", band, f"{said}: {words}")

    def _inconclusive(
        self,
        why: str,
        device: torch.device,
        details: Mapping[str, float] | None = None,
        evidence: tuple[Evidence, ...] = (),
    ) -> Verdict:
        """Nothing can be said: score 0, as for a trigger as large as the image."""
        threshold, peak = 1 - BANDS.get(self.variant, DOUBTFUL), peak_memory_mib(device)
        return Verdict(
            "inconclusive", 0.0, threshold, TESTED[self.variant], evidence, details or {}, why, peak_memory_mib=peak
        )


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
    words = f"smallest stamp covers {pl1:.3f} of the image"
    said = against(pl1, reference, words)
    if isinstance(said, Decision):
        return said
    reason = f"{said}: {words}"
    if pl1 < CERTAIN:
        return Decision("backdoored", DOUBTFUL, reason)
    if pl1 < DOUBTFUL:
        transfers = transfer > TRANSFERS
        reason += f" and {'works' if transfers else 'fails'} on held-out images (concentration {transfer:.3f})"
        return Decision("backdoored" if transfers else "suspicious", DOUBTFUL, reason)
    return Decision("clean-by-test", DOUBTFUL, reason)
