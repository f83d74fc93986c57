"""MNTD: a meta-classifier that was trained on shadow models asks a classifier a few questions."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from cupel.cost import peak_memory_mib
from cupel.errors import DataError
from cupel.inference import device_of
from cupel.inversion import frozen
from cupel.metrics import check_labels
from cupel.probe import PROBES, Linear
from cupel.protocols import Encoder, Probe
from cupel.scan.admission import some_rows
from cupel.scan.judging import Judging
from cupel.scan.mntd_meta import MetaTraining, standardised, train_meta
from cupel.scan.mntd_reference import Answer, MetaReference, threshold_at
from cupel.scan.mntd_shadows import ShadowNets, train_shadows
from cupel.seeds import Seed
from cupel.settings import OneOf, Positive, PositiveInt, settings
from cupel.types import Dataset, Need
from cupel.verdicts import Reference, Verdict, VerdictWord

__all__ = ["INFORMATIVE", "MNTD", "checked", "judged"]

TESTED = (
    "trojans of the jumbo family: random patches of 2 to 5 pixels, opaque or blended, and faint whole-image patterns"
)
INFORMATIVE = 0.7
"""Area under the curve on held-out shadow models below which a meta-classifier says nothing (our choice)."""


@settings
class MNTD(Judging, MetaTraining):
    """A meta-classifier on the logits of encoder and probe for tuned queries.

    Shadow classifiers are trained on the labelled images, half of them with a random trojan; a small network learns,
    together with Q query images, to tell from their logits which have one. Then it is asked about the inspected model.
    Training the shadow models takes minutes: `train_reference` does it once for all models of a task.

    Args:
        probe: Classifier that is fitted on the labelled images and inspected together with the encoder.
        shadows: Shadow classifiers, every second one with a trojan.
        images: Labelled images used at most for the shadow models.
        steps: Of the training of each shadow model.
        batch_size: Images per shadow model and step.
        width: Channels of the first convolution of a shadow model.
        shadow_lr: Of Adam, for the shadow models.
        queries, hidden, epochs, repeats, lr, tune_queries, one_class, nu, validation, false_alarms: See `MetaTraining`.

    Budgets: `smoke` (under half a minute), `standard` (64 shadow models), `paper` (as published).

    Source: Xu et al., MNTD, IEEE S&P 2021, arXiv:1910.03137, and its code; on the classifiers of attacked encoders as
    in Jia et al., BadEncoder, IEEE S&P 2022, arXiv:2108.00352.
    Deviations: far fewer and smaller shadow models, trained side by side; they are of another architecture than the
    inspected model, so logits are standardised per query; models answer in evaluation. The paper's threshold is the
    median of the inspected models, half of them trojaned; ours comes from clean encoders, without which, or with a
    meta-classifier that is no better than 0.7 on held-out shadow models, there is a score but no verdict.
    """

    probe: Annotated[Probe, OneOf(PROBES)] = Linear()
    shadows: Annotated[int, Field(ge=16)] = 64
    images: Annotated[int, Field(ge=2)] = 2000
    steps: PositiveInt = 150
    batch_size: PositiveInt = 100
    width: PositiveInt = 16
    shadow_lr: Positive = 1e-3
    epochs: PositiveInt = 60

    method: ClassVar[str] = "mntd"
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"shadows": 24, "steps": 80, "width": 8, "epochs": 60, "repeats": 2},
        "standard": {},
        "paper": {"shadows": 4608, "validation": 0.11, "images": 50_000, "steps": 2000, "width": 32, "epochs": 10},
    }
    tested: ClassVar[str] = TESTED
    limit: ClassVar[float] = 0.0
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def train_reference(
        self, data: Dataset, seed: Seed, *, device: torch.device | str = "cpu", checkpoint: Path | None = None
    ) -> MetaReference:
        """The meta-classifier for one task.

        Args:
            data: Labelled images of the task, of the size that the inspected encoders take.
            seed: Shadow models and meta-classifier.
            device: Where to work.
            checkpoint: File that keeps the state of the shadow models' training for a resume.

        Raises:
            DataError: images without labels, or too few shadow models.
            LabelsWithheld: labels are kept from scanners.
        """
        check_labels(data.labels, data.num_classes, data.name)
        some = data.subset(some_rows(data, self.images, seed))
        nets, trojans = train_shadows(
            some,
            data.num_classes,
            self.shadows,
            steps=self.steps,
            batch_size=self.batch_size,
            width=self.width,
            lr=self.shadow_lr,
            seed=seed.child("shadows"),
            device=device,
            checkpoint=checkpoint,
        )
        pixels = some.inputs[torch.arange(len(some))].to(device).float().div_(255)
        return train_meta(
            [_shadow_answer(nets, m) for m in range(self.shadows)],
            [one is not None for one in trojans],
            pixels,
            self,
            seed.child("meta"),
            scanner=self.name,
            recipe=f"{self.shadows} shadow classifiers of {data.name}",
            device=device,
        )

    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
        """Fit the probe, put the queries to the classifier, and let the meta-classifier judge.

        Args:
            model: Encoder; its weights, flags and modes are as before afterwards.
            clean: Labelled images of a downstream task, of the encoder's input size.
            seed: Probe; without a reference shadow models and meta-classifier too.
            reference: A `MetaReference` from `train_reference` with the same settings; None = it is made here.

        Returns:
            `inconclusive` with fewer than 64 different images, with an encoder that gives one embedding for all of
            them, where the meta-classifier cannot tell held-out shadow models apart, and always with a score only
            where the reference was not calibrated on clean encoders (`MetaReference.calibrated_on`).

        Raises:
            DataError: images of another size, or without labels; a reference of another scanner, kind or task.
            LabelsWithheld: labels are kept from scanners.
        """
        if (unfit := self.unfit(model, clean)) is not None:
            return unfit
        check_labels(clean.labels, clean.num_classes, clean.name)
        device = device_of(model.module)
        with frozen(model.module):
            classifier = self.probe.fit(model, clean, seed.child("probe"))  # first: it refuses images of another size
            if reference is None:
                reference = self.train_reference(clean, seed.child("reference"), device=device)
            known = checked(reference, self.name)
            with frozen(classifier.head), frozen(classifier.encoder.module):
                score = known.score(lambda x: standardised(classifier(x).float()), device)
        return dataclasses.replace(judged(score, known, TESTED), peak_memory_mib=peak_memory_mib(device))


def _shadow_answer(nets: ShadowNets, m: int) -> Answer:
    def answer(queries: Tensor) -> Tensor:
        return standardised(nets.logits(queries[None], slice(m, m + 1), None)[0])

    return answer


def checked(reference: Reference, name: str) -> MetaReference:
    """A reference that is a meta-classifier of the given scanner.

    Raises:
        DataError: it is not.
    """
    if not isinstance(reference, MetaReference):
        raise DataError(f"reference '{reference.recipe}'", "is no meta-classifier", "make one with `train_reference`")
    if reference.scanner != name:
        what = f"was made with '{reference.scanner}', this scan is '{name}'"
        raise DataError(f"reference '{reference.recipe}'", what, "make it with the same settings")
    return reference


def judged(score: float, reference: MetaReference, tested: str) -> Verdict:
    """The verdict on a score.

    `inconclusive` where the meta-classifier cannot tell held-out shadow models apart, or was not calibrated on clean
    encoders; else backdoored from the threshold on.

    Args:
        score: Of the inspected model.
        reference: What gave it.
        tested: See `Verdict`.
    """
    known, told = reference.scores, f"its AUC is {reference.auc:.2f} on held-out models among {reference.recipe}"
    middle, limit = statistics.median(known), reference.threshold
    details = {
        "auc_shadows": reference.auc,
        "shadows": float(reference.shadows),
        "references": float(len(known)),
        "references_median": middle,
    }
    if reference.auc < INFORMATIVE:
        why = f"the meta-classifier says nothing: {told}, less than {INFORMATIVE:g}"
        return Verdict("inconclusive", score, limit, tested, (), details, why)
    if not reference.calibrated:
        why = (
            f"score {score:.2f}, benign shadow models {middle:.2f} in the middle, but they are of another kind, and no "
            f"scores of clean encoders were given; {told}"
        )
        return Verdict("inconclusive", score, limit, tested, (), details, why)
    rate = reference.false_alarms
    alarms = sum(s >= threshold_at([*known[:i], *known[i + 1 :]], rate) for i, s in enumerate(known))
    word: VerdictWord = "backdoored" if score >= limit else "clean-by-test"
    reason = f"score {score:.2f}, threshold {limit:.2f} from {len(known)} clean encoders; {told}"
    return Verdict(word, score, limit, tested, (), details, reason, (alarms / len(known), len(known)))
