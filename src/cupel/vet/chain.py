"""Scan → decide; purify → re-scan → again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cupel import metrics
from cupel.encoders import Card, ImageEncoder
from cupel.inference import features
from cupel.progress import say
from cupel.protocols import Scanner
from cupel.purify import CBD
from cupel.scan import shipped_reference
from cupel.seeds import Seed
from cupel.types import Dataset, Evidence, Reference, Verdict

__all__ = ["Vetted", "purify_encoder", "reference_for", "scan_encoder", "scan_evidence"]

_ORDER = ("clean-by-test", "inconclusive", "suspicious", "backdoored")


def reference_for(scanner: Any, card: Card) -> Reference | None:
    """The calibration that ships for encoders of this architecture and recipe; None = the published thresholds count.

    The recipe is what the card claims. A card can lie: the verdict names the calibration that was used.
    """
    recipe = card.recipe.get("id")
    if not isinstance(recipe, str):
        return None
    return shipped_reference(scanner.name, str(card.architecture.get("method")), recipe)


def scan_evidence(verdict: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> list[Evidence]:
    """Inverted triggers from a stored verdict and its arrays `inverted/<i>/mask` and `/pattern`."""
    return [
        Evidence(arrays[f"inverted/{i}/mask"], arrays[f"inverted/{i}/pattern"], e["size"], e["converged"], e["source"])
        for i, e in enumerate(verdict["evidence"])
    ]


def scan_encoder(
    encoder: ImageEncoder, images: Dataset, scanners: Sequence[Scanner], seed: Seed
) -> tuple[Verdict, list[tuple[str, Verdict]]]:
    """Run the scanners in turn; the worst verdict counts.

    Args:
        encoder: Left as it is.
        images: Unlabelled images of the encoder's input size.
        scanners: At least one; each must need no labels.
        seed: Starts of the inversions.

    Returns:
        The verdict that counts, and each scanner's own by name.
    """
    each = []
    for scanner in scanners:
        name = type(scanner).__name__
        reference = reference_for(scanner, encoder.card)
        verdict = scanner.scan(encoder, images.without_labels(name), seed.child(name), reference)
        say(f"  {name.lower()}: {verdict.verdict}  score {verdict.score:.3f}  threshold {verdict.threshold:.3f}")
        each.append((name.lower(), verdict))
    return max((v for _, v in each), key=lambda v: _ORDER.index(v.verdict)), each


@dataclass(frozen=True)
class Vetted:
    """What purification made of an encoder.

    Args:
        encoder: The purified encoder.
        before, after: Verdicts of the scans around it.
        rounds: How many rounds of purify and re-scan were run.
        drift: Mean 1 − cosine between purified and given embeddings of the images.
        residue: Concentration of images under the boosted old evidence: given encoder, purified encoder. A clean
            re-scan alone proves little: what the first scan found must have lost its effect too.
        history: Numbers of the last round's training.
    """

    encoder: ImageEncoder
    before: Verdict
    after: Verdict
    rounds: int
    drift: float
    residue: tuple[float, float] | None
    history: Mapping[str, Sequence[float]]


def _stamped(images: Tensor, evidence: Evidence, boost: float = 2.0) -> Tensor:
    mask = torch.from_numpy(np.array(evidence.mask)).mul(boost).clamp(0, 1)
    pattern = torch.from_numpy(np.array(evidence.pattern))
    return (images.float() / 255 * (1 - mask) + pattern * mask).clamp(0, 1).mul(255).round().to(torch.uint8)


def purify_encoder(
    encoder: ImageEncoder,
    images: Dataset,
    purifier: CBD,
    scanners: Sequence[Scanner],
    seed: Seed,
    *,
    before: Verdict | None = None,
    max_rounds: int = 3,
) -> Vetted:
    """Purify, scan again, and repeat while a trigger is still found: each round looks for what the last one left.

    Args:
        encoder: Left as it is.
        images: Unlabelled images of the encoder's input size.
        purifier: Settings.
        scanners: For evidence and for the re-scan.
        seed: Everything random; each round scans from new starts.
        before: A scan that was already made; None = scan first.
        max_rounds: At least 1.
    """
    if before is None:
        before, _ = scan_encoder(encoder, images, scanners, seed.child("scan", 0))
    evidence, current, after = list(before.evidence), encoder, before
    history: Mapping[str, Sequence[float]] = {}
    done = 0
    unlabelled = images.without_labels(type(purifier).__name__)
    for done in range(1, max_rounds + 1):
        say(f"  purify, round {done}")
        made, history = purifier.purify_with_history(current, unlabelled, seed.child("purify", done), evidence)
        assert isinstance(made, ImageEncoder)  # it returns the kind it was given
        current = made
        after, _ = scan_encoder(current, images, scanners, seed.child("scan", done))
        if after.verdict not in ("backdoored", "suspicious"):
            break
        evidence += [e for e in after.evidence if e.converged]
    some = images.inputs[torch.arange(min(len(images), 256))]
    drift = 1 - float(metrics.mean_cosine(features(encoder, some), features(current, some)))
    residue = None
    found = [e for e in before.evidence if e.converged]
    if found:
        stamped = _stamped(some, min(found, key=lambda e: e.size))
        residue = tuple(float(metrics.concentration(features(one, stamped))) for one in (encoder, current))
    source = {**current.card.source, "purified_with": type(purifier).__name__}
    result = dataclasses.replace(current, card=dataclasses.replace(current.card, source=source))
    return Vetted(result, before, after, done, drift, residue, history)  # type: ignore[arg-type]  # two by construction
