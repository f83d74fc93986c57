"""Neural Cleanse: is one class of a downstream classifier reached by a far smaller stamp than the others?"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from cupel.cost import peak_memory_mib
from cupel.errors import DataError
from cupel.folding import bf16_pays, inference_copy
from cupel.inference import COMPARED, device_of, in_bf16
from cupel.inversion import Inverted, frozen
from cupel.inversion.classwise import ClassSearch, invert_classes
from cupel.metrics import check_labels
from cupel.probe import PROBES, Linear
from cupel.protocols import Classifier, Encoder, Probe
from cupel.scan.admission import named, some_rows
from cupel.scan.judging import Judging
from cupel.seeds import Seed
from cupel.settings import OneOf, Positive, PositiveInt, settings
from cupel.types import Dataset, Need
from cupel.verdicts import Evidence, Reference, Verdict

__all__ = ["Anomaly", "NeuralCleanse", "anomaly_index", "network_of"]

LEAST_CLASSES = 3
FEW_CLASSES = 5
_NO_SPREAD = 1e-8


class Anomaly(NamedTuple):
    """How far the smallest of some sizes lies from their median.

    Args:
        median, mad: Of the sizes; mad = 1.4826 times the median absolute deviation.
        worst: |min − median| / mad, the anomaly index; 0 where all sizes are equal. None: more than half of them are
            equal and the smallest is not, so there is nothing to measure it by.
        each: (median − size) / mad of each size; 0 where mad is 0. Positive = smaller than the median.
    """

    median: float
    mad: float
    worst: float | None
    each: tuple[float, ...]

    @property
    def spread(self) -> bool:
        """Whether the sizes differ enough for an index."""
        return self.mad >= _NO_SPREAD


def anomaly_index(sizes: Sequence[float]) -> Anomaly:
    """The anomaly index of the smallest size.

    index = |min − med| / (1.4826 · median |s − med|)

    Example:
        >>> found = anomaly_index([60, 62, 64, 66, 68, 70, 15])
        >>> found.median, round(found.mad, 4), round(found.worst, 4)
        (64, 5.9304, 8.2625)

    Raises:
        ValueError: no sizes.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, section IV-B.
    Deviations: none; with an even number of sizes the medians are means of the middle two.
    """
    if not sizes:
        raise ValueError("no sizes")
    median = statistics.median(sizes)
    mad = 1.4826 * statistics.median(abs(size - median) for size in sizes)
    least = min(sizes)
    if mad < _NO_SPREAD:
        return Anomaly(median, mad, 0.0 if least == median else None, (0.0,) * len(sizes))
    return Anomaly(median, mad, abs(least - median) / mad, tuple((median - size) / mad for size in sizes))


@settings
class NeuralCleanse(Judging, ClassSearch):
    """The smallest trigger towards each class, and whether one class is an outlier among them.

    A probe is fitted on the encoder; for each class y a mask m and a pattern Δ are searched that minimise
    CE(classifier((1 − m) x + m Δ), y) + λ ‖m‖₁. Score = anomaly index of the smallest mask; above 2 = backdoored.

    Args:
        probe: Classifier that is fitted on the labelled images and inspected together with the encoder.
        images: Images used at most by the search; the probe is fitted on all that are given.
        precision: Of the encoder's passes; mask, pattern and loss are always float32. bf16 is used where the hardware
            computes in it and the encoder's clean embeddings agree with float32.
        threshold: Anomaly index above which a class counts as an outlier.
        steps, batch_size, images_per_step, num_starts, lr, success, cost, cost_factor, patience, stop_after: See
            `ClassSearch`.

    Budgets: `smoke` (under a minute on a small encoder), `standard`, `paper` (as published).

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, and its code; on the classifiers of attacked encoders as in
    Jia et al., BadEncoder, IEEE S&P 2022, arXiv:2108.00352.
    Deviations: searched on the images that the probe was fitted on, and towards the classes that they show; classes
    for which no trigger was found are left out of the index with a note; the budgets `smoke` and `standard`.
    """

    probe: Annotated[Probe, OneOf(PROBES)] = Linear()
    images: Annotated[int, Field(ge=2)] = 1000
    precision: Literal["bf16", "fp32"] = "bf16"
    threshold: Positive = 2.0
    steps: PositiveInt = 150
    images_per_step: PositiveInt | None = 256

    method: ClassVar[str] = "neural_cleanse"
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 60, "images_per_step": 128},
        "standard": {},
        "paper": {"steps": 1000, "images_per_step": 1000, "precision": "fp32"},
    }
    tested: ClassVar[str] = (
        "one small universal stamp towards one class of a downstream classifier (mask-and-pattern inversion)"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def _limit(self) -> float:
        return self.threshold

    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
        """Fit the probe, then look for a class that is too easy to reach.

        Args:
            model: Encoder; its weights, flags and modes are as before afterwards.
            clean: Labelled images of a downstream task, of the encoder's input size.
            seed: Probe, choice of images, starts, batches.
            reference: None is known to this scanner: its index is relative to the classes of the same model.

        Returns:
            One `Evidence` per outlying class, else the smallest trigger alone. `inconclusive` with fewer than 64
            different images, 3 classes or 3 inverted triggers, with an encoder that gives one embedding for all images,
            or where the sizes do not differ.

        Raises:
            CupelError: the model gives NaN or infinite values.
            DataError: images of another size, or without labels; a reference is given.
            LabelsWithheld: labels are kept from scanners.
        """
        if reference is not None:
            raise DataError(f"reference '{reference.recipe}'", f"{self.name} reads none", "leave it out")
        if (unfit := self.unfit(model, clean)) is not None:
            return unfit
        check_labels(clean.labels, clean.num_classes, clean.name)
        classes, device = torch.unique(clean.labels), device_of(model.module)
        if len(classes) < LEAST_CLASSES:
            return self.inconclusive(f"the images show {len(classes)} classes, {LEAST_CLASSES} are needed", device)
        images = clean.inputs[some_rows(clean, self.images, seed)].to(device)
        with frozen(model.module):
            classifier = self.probe.fit(model, clean, seed.child("probe"))
            with frozen(classifier.head), frozen(classifier.encoder.module):
                found = invert_classes(
                    network_of(classifier, images, self.precision),
                    images,
                    classes,
                    self,
                    seed.child("invert"),
                    "neural_cleanse",
                    named(model),
                )
        return self._verdict(found, clean, classes.tolist(), len(images), device)

    def _verdict(
        self, found: Inverted, clean: Dataset, classes: Sequence[int], used: int, device: torch.device
    ) -> Verdict:
        sizes, ok = found.size.tolist(), found.found.tolist()
        per_step = max(1, min(used, self.images_per_step or used) // min(self.batch_size, used))
        seen = float(found.steps.sum()) * per_step * min(self.batch_size, used)
        details = {"classes": float(len(classes)), "images": float(used), "forward_images": seen}
        details["backward_images"] = seen
        for y, size, reach in zip(classes, sizes, found.reach.tolist(), strict=True):
            details |= {f"size_{y}": size, f"asr_{y}": reach}
        known = [i for i, one in enumerate(ok) if one]
        missing = [str(classes[i]) for i, one in enumerate(ok) if not one]
        note = f"; no trigger was found towards class {', '.join(missing)}" if missing else ""
        if len(known) < LEAST_CLASSES:
            why = f"a trigger was found towards {len(known)} of {len(classes)} classes, {LEAST_CLASSES} are needed"
            return self.inconclusive(why, device, details)
        anomaly = anomaly_index([sizes[i] for i in known])
        details |= {"median": anomaly.median, "mad": anomaly.mad}
        details |= {f"index_{classes[i]}": one for i, one in zip(known, anomaly.each, strict=True)}
        outliers = [i for i, one in zip(known, anomaly.each, strict=True) if one > self.threshold]
        shown = sorted(outliers or [min(known, key=lambda i: sizes[i])], key=lambda i: sizes[i])
        evidence = tuple(
            Evidence(
                found.mask[i].numpy(),
                found.pattern[i].numpy(),
                sizes[i],
                True,
                f"{self.name} class {classes[i]}",
            )
            for i in shown
        )
        if anomaly.worst is None or not anomaly.spread:
            why = f"most sizes are equal, which leaves nothing to compare with{note}"
            return self.inconclusive(why, device, details, evidence)
        least = sizes[shown[0]]
        reason = (
            f"smallest stamp covers {least:.3f} of the image (class {_class_name(clean, classes[shown[0]])}, median of "
            f"the classes {anomaly.median:.3f}), anomaly index {anomaly.worst:.2f}{note}"
        )
        if len(known) <= FEW_CLASSES:
            reason += f"; with {len(known)} classes the index is unreliable"
        word: Literal["backdoored", "clean-by-test"] = "backdoored" if outliers else "clean-by-test"
        return Verdict(
            word, anomaly.worst, self.threshold, self.tested, evidence, details, reason,
            peak_memory_mib=peak_memory_mib(device),
        )  # fmt: skip


def network_of(classifier: Classifier, images: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    """Images in [0, 1] → logits, by a folded copy of the encoder and the head as it is.

    Args:
        classifier: Its parts must be frozen.
        images: uint8, on its device; some are compared where bf16 is asked for.
        precision: `bf16` or `fp32`.
    """
    encoder: Callable[[Tensor], Tensor]
    if precision == "bf16" and bf16_pays(images.device):
        some = images[:COMPARED].float().div_(255).contiguous(memory_format=torch.channels_last)
        encoder = in_bf16(classifier.encoder, some, named(classifier.encoder))
    else:
        encoder = inference_copy(classifier.encoder)

    def network(x: Tensor) -> Tensor:
        logits: Tensor = classifier.head(encoder(x.contiguous(memory_format=torch.channels_last)).float())
        return logits

    return network


def _class_name(clean: Dataset, y: int) -> str:
    return clean.classes[y] if y < len(clean.classes) else str(y)
