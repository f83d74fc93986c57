"""A classifier by masked local evidence, what it certifies of a data set, and how it fares against a real trigger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cupel.certify.masking import CERTIFIED, WRONG, masked_prediction, outcomes
from cupel.certify.windows import Windows
from cupel.errors import DataError
from cupel.inference import device_of, evaluating
from cupel.metrics import Count, attack_success_rate, check_labels, robust_accuracy
from cupel.types import Dataset

__all__ = ["Certificate", "MaskedClassifier", "certified_accuracy", "measure"]


@dataclass(frozen=True, eq=False)
class MaskedClassifier:
    """Local evidence with robust masking against one square patch.

    Args:
        local: Images in [0, 1] → evidence `[n, cells, classes]`.
        windows: What a patch of `patch` pixels can touch.
        patch: Largest side of the patch in pixels.
        input_size: Side of the images in pixels.
        threshold: Share of a class's evidence above which its strongest window is masked.
        name: Of the method.
    """

    local: nn.Module
    windows: Windows
    patch: int
    input_size: int
    threshold: float = 0.0
    name: str = "patchguard"

    @torch.no_grad()
    def evidence(self, data: Dataset, *, batch_size: int = 128) -> Float[Tensor, "n cells classes"]:
        """Evidence of all images, at least 0, on the CPU.

        Raises:
            DataError: the images are of another size.
        """
        if tuple(data.inputs.shape[-2:]) != (self.input_size, self.input_size):
            got = "×".join(str(side) for side in data.inputs.shape[-2:])
            what = f"images are {got}, the classifier takes {self.input_size}×{self.input_size}"
            raise DataError(data.name, what, "load the data at its size")
        device, parts = device_of(self.local), []
        with evaluating(self.local):
            for rows in torch.split(torch.arange(len(data)), batch_size):
                x = data.inputs[rows].to(device).float().div_(255).contiguous(memory_format=torch.channels_last)
                parts.append(self.local(x).float().clamp_min(0).cpu())
        return torch.cat(parts)

    def predict(self, data: Dataset) -> Int[Tensor, " n"]:
        """Classes by robust masking, on the CPU."""
        evidence = self.evidence(data)
        blocks = evidence.split(256)
        return torch.cat([masked_prediction(block, self.windows, self.threshold) for block in blocks])


@dataclass(frozen=True, eq=False)
class Certificate:
    """What is certain of a classifier on a data set. It holds for one square patch of at most `patch` pixels.

    It says nothing of poisoned weights: only that what one patch shows at test time cannot change these answers.

    Args:
        outcomes: 0, 1 or 2 for each image: wrong without a patch, right, right whatever a patch shows.
        patch: Side in pixels.
        window: Cells along one axis that are masked, in prediction and certificate alike.
        threshold: As in the prediction.
        method: Name of it.
    """

    outcomes: Int[Tensor, " n"]
    patch: int
    window: int
    threshold: float
    method: str

    @property
    def certified(self) -> Count:
        """Images classified rightly whatever a patch shows."""
        return int((self.outcomes == CERTIFIED).sum()), len(self.outcomes)

    @property
    def correct(self) -> Count:
        """Images classified rightly without a patch, certified or not."""
        return int((self.outcomes != WRONG).sum()), len(self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the outcome of each image."""
        return {
            "method": self.method,
            "patch": self.patch,
            "window": self.window,
            "threshold": self.threshold,
            "certified": self.certified[0],
            "correct": self.correct[0],
            "images": len(self.outcomes),
        }


def certified_accuracy(classifier: MaskedClassifier, test: Dataset) -> Certificate:
    """Certify a classifier on clean labelled images.

    Args:
        classifier: Fitted.
        test: Images of its input size.

    Raises:
        DataError: images of another size, or without labels.
        UsageError: labels outside of its classes.
    """
    evidence = classifier.evidence(test)
    check_labels(test.labels, evidence.shape[2], test.name)
    found = outcomes(evidence, test.labels, classifier.windows, classifier.threshold)
    return Certificate(found, classifier.patch, classifier.windows.size, classifier.threshold, classifier.name)


def measure(
    classifier: MaskedClassifier, test: Dataset, triggered: Dataset | None = None, target_class: int | None = None
) -> Mapping[str, Count]:
    """One row of a table: `clean_accuracy` and `certified_accuracy`; under a trigger `attack_success_rate` and
    `robust_accuracy` besides.

    Args:
        classifier: Fitted.
        test: Clean labelled images.
        triggered: The same images with the real trigger, for what the certificate promises is worth nothing where the
            trigger is larger than `classifier.patch`.
        target_class: The attacker's.
    """
    certificate = certified_accuracy(classifier, test)
    found = {"clean_accuracy": certificate.correct, "certified_accuracy": certificate.certified}
    if triggered is not None and target_class is not None:
        hit = classifier.predict(triggered)
        found["attack_success_rate"] = attack_success_rate(hit, test.labels, target_class)
        found["robust_accuracy"] = robust_accuracy(hit, test.labels, target_class)
    return found
