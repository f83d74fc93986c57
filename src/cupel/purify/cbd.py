"""CBD: contrastive adversaries stand in for triggered images and are pulled back to their clean embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from cupel.augment import SimCLRAugment
from cupel.errors import DataError, SettingsError
from cupel.folding import inference_copy
from cupel.inference import device_of, features
from cupel.losses.pulling import PullName
from cupel.optimizers import NonNegative
from cupel.protocols import Encoder
from cupel.purify.base import BatchSize, Job, OptimizerName, TrainedPurifier, copied
from cupel.purify.cbd_learner import CBDLearner
from cupel.purify.evidence import usable_evidence
from cupel.purify.screening import screened
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.train import History, fit

__all__ = ["CBD"]

Mode = Literal["pgd-linf", "patch", "universal", "inverted", "mix"]

Count = Annotated[int, Field(ge=0)]


@settings
class CBD(TrainedPurifier):
    """Adversarial fine-tuning without labels: L = λ_pull · pull(f(x̃), t(x)) + λ_anchor · pull(f(x), t(x)).

    x̃ are stand-ins for triggered images, t(x) the clean target embedding of image x. A backdoor is a shortcut: from
    many images a small change moves the embedding far. Images that were moved far from their own clean embedding, by
    gradient ascent on a contrastive loss or by a trigger that a scanner inverted, are pulled back to it.

    Args:
        mode: Kind of stand-ins. `pgd-linf` = a perturbation per image in an L∞ ball; `patch` = free content in small
            windows; `universal` = one L∞ perturbation for all images, kept over the steps; `inverted` = triggers that a
            scanner inverted; `mix` = shares of them as in `mix`.
        mix: Shares of a batch under `mix`: (inverted, or universal where there is no evidence; patch; pgd-linf).
        epsilon: Radius of the L∞ ball, in [0, 1].
        alpha: Step size of the ascent in the ball; None = 2.5 · epsilon / pgd_steps.
        pgd_steps: Steps of the ascent.
        inner: What the ascent enlarges: `infonce` = contrastive loss against the clean embeddings of the batch;
            `neg_cos` = 1 − cosine with the own clean embedding, no negatives.
        temperature: τ of `infonce`.
        keys: Clean embeddings of the ascent: the `current` encoder's, or the `frozen` one's (saves a forward pass).
        window: Smallest and largest side of a patch, as shares of the image's side.
        window_alpha: Step size of the ascent in a patch.
        num_patches: Different patches per step, each shared by several images as a real trigger is; None = one for
            each image.
        boost, shift, dilation: How inverted triggers are varied: factor on the mask, largest move and growth in pixels.
        evidence_ratio: Inverted triggers more than this many times as large as the smallest are left out: most are no
            part of the backdoor and hide much of the image; None = all are used.
        screen: For images of unknown origin: those that lie where an inverted trigger sends images may bear it, and are
            left out, up to this share of all; 0 = all are used. One triggered image in twenty is enough for the anchor
            to hold the backdoor; but clean images of the target class go too.
        pull: Distance of both terms: `cosine`, `nmse` (squared distance over the mean squared norm), their sum, or
            `whitened` (cosine of embeddings standardised per dimension).
        anchor: Targets t(x): `frozen` = the given encoder's; `self` = the current one's without gradient, an ablation
            that can collapse.
        augmented_anchor: In the anchor term every second image is replaced by an augmented view of it, with the frozen
            encoder's embedding of that view as its target. It keeps accuracy, and keeps the backdoor wherever a view
            happens to look like the trigger.
        anchor_views: Further augmented views per image in the anchor term; none where `augmented_anchor` is off.
        augment: How views are made. Without crops by default: a zoomed stroke can look like a patch trigger, and the
            anchor then defends the backdoor.
        lambda_pull, lambda_anchor: λ ≥ 0.
        batch_norm: BatchNorm runs on its stored statistics, which never move: half of a batch are stand-ins. `frozen` =
            its affine part is fixed too.

    Raises:
        SettingsError: a range is upside down, shares do not add up to 1, or `augment` changes the size of images.

    Source: Rethinking the Necessity of Labels in Backdoor Removal, ICLR 2023 workshop BANDS (OpenReview Noj1Fydegod),
    for contrastive adversaries and pulling them to their clean counterparts. No code was published.
    Deviations: a re-implementation of the idea. The form of the anchor term, all numbers, and everything but
    `mode="pgd-linf", pull="cosine"` are our choice; images are not shifted or flipped unless by `augmented_anchor`.
    """

    mode: Mode = "mix"
    mix: tuple[Fraction, Fraction, Fraction] = (0.5, 0.25, 0.25)
    epsilon: Fraction = 64 / 255
    alpha: Positive | None = None
    pgd_steps: Count = 5
    inner: Literal["infonce", "neg_cos"] = "infonce"
    temperature: Positive = 0.5
    keys: Literal["current", "frozen"] = "frozen"
    window: tuple[Fraction, Fraction] = (0.05, 0.2)
    window_alpha: Positive = 0.25
    num_patches: PositiveInt | None = 4
    boost: tuple[NonNegative, NonNegative] = (0.7, 3.0)
    shift: Count = 2
    dilation: Count = 1
    evidence_ratio: Annotated[float, Field(ge=1)] | None = 4.0
    screen: Fraction = 0.0
    pull: PullName = "whitened"
    anchor: Literal["frozen", "self"] = "frozen"
    augmented_anchor: bool = True
    anchor_views: Count = 1
    augment: SimCLRAugment = SimCLRAugment(crop=False)
    lambda_pull: NonNegative = 1.0
    lambda_anchor: NonNegative = 1.0
    batch_norm: Literal["frozen", "eval_affine"] = "frozen"

    steps: Count | None = 600
    batch_size: BatchSize = 64
    optimizer: OptimizerName = "sgd"
    lr: Positive = 0.05

    title: ClassVar[str] = "CBD (re-implementation)"
    revision: ClassVar[int] = 2
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 250, "batch_size": 48},
        "standard": {},
        "paper": {  # L∞ adversaries alone
            "mode": "pgd-linf", "epsilon": 8 / 255, "alpha": 2 / 255, "pgd_steps": 10, "keys": "current",
            "pull": "cosine+nmse", "augmented_anchor": False, "batch_norm": "eval_affine", "steps": None, "epochs": 20,
            "batch_size": 128, "lr": 0.01, "weight_decay": 5e-4,
        },
    }  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("window", "boost"):
            low, high = getattr(self, name)
            if low > high:
                raise SettingsError(f"CBD.{name}", f"{low:g} is above {high:g}", "give the smaller number first")
        if abs(sum(self.mix) - 1) > 1e-6:
            raise SettingsError("CBD.mix", f"the shares {list(self.mix)} add up to {sum(self.mix):g}", "make it 1")
        if self.augment.render_size is not None:
            raise SettingsError("CBD.augment.render_size", "views must have the size of the images", "leave it out")

    def work(self, job: Job) -> tuple[Encoder, History]:
        """Train under L; the history has per step `loss`, `pull`, `anchor` and `feature_std` (spread of the clean
        embeddings, see `cupel.losses.pulling.spread`).

        Triggers that did not converge are left out: their masks cover most of the image, and what hides the image
        cannot be pulled back to it.

        Raises:
            CupelError: the embeddings collapse (`feature_std` below a twentieth of the frozen encoder's on the same
                images), or the loss is not finite.
            DataError: images or evidence of another size, fewer images than a batch, or mode `inverted` without a
                converged trigger.
        """
        encoder, clean = job.encoder, job.clean
        usable = usable_evidence(job.evidence, encoder.input_size, self.evidence_ratio)
        if self.mode == "inverted" and usable is None:
            raise DataError("cbd", "mode 'inverted' got no converged trigger", "scan first, or use another mode")
        if usable is not None:
            clean = screened(encoder, clean, usable, self.screen)
        frozen = copied(encoder)
        frozen.module.requires_grad_(False)
        exact = self.precision == "fp32"
        targets = features(frozen, clean, dtype=torch.float32 if exact else None)
        quick = inference_copy(frozen, torch.float32 if exact else torch.bfloat16)
        learner = CBDLearner(self, encoder, quick, targets, usable, job.seed)
        where = device_of(encoder.module)
        history = fit(learner, clean, self, job.seed, label="purify cbd", device=where, checkpoint=job.checkpoint)
        learner.check_spread()
        return encoder, history
