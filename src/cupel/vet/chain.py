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
from cupel.cost import Cost, counting
from cupel.encoders import Card, ImageEncoder
from cupel.inference import features
from cupel.progress import say
from cupel.protocols import Encoder, Purifier, Scanner
from cupel.scan import SCANNERS, Decree, PScan, shipped_reference
from cupel.seeds import Seed
from cupel.types import Dataset
from cupel.verdicts import ORDER, Evidence, Reference, Verdict

__all__ = [
    "Vetted",
    "default_chain",
    "evidence_arrays",
    "purify_encoder",
    "reference_for",
    "scan_encoder",
    "scan_evidence",
    "scanner_label",
    "together",
]


def default_chain(budget: str = "standard") -> list[Scanner]:
    """The label-free scanners that complement each other, in the order they are run.

    A mask over the whole image finds large and faint stamps, windows find small sharp ones and their place, and the
    variants look for what is no stamp. Measured on the calibration half of three zoos (results/zoo): the frequency
    variant and the windows raise the AUROC, DECREE's stamps decide where there are no clean encoders to compare with,
    and the L∞ variant alone found a DRUPE encoder. SSL-Cleanse is left out: among few clusters its index calls clean
    encoders suspicious. So are the feature indicators: what they see, windows see too.

    Args:
        budget: `smoke`, `standard` or `paper`.

    Raises:
        UsageError: no such budget.

    Example:
        >>> [scanner_label(one) for one in default_chain("smoke")]
        ['decree', 'pscan', 'decree-linf', 'decree-frequency']
    """
    variants = (Decree.preset(budget, "linf"), Decree.preset(budget, "frequency"))
    return [Decree.preset(budget), PScan.preset(budget), *variants]


def scanner_label(scanner: Any) -> str:
    """A scanner's name in a chain: its method, and its variant where that is not the usual one.

    Example:
        >>> scanner_label(Decree(variant="linf"))
        'decree-linf'
    """
    return _method(scanner) + _variant(scanner)


def _method(scanner: Any) -> str:
    known = [name for name, cls in SCANNERS.items() if type(scanner) is cls]
    return known[0] if known else type(scanner).__name__.lower()


def _variant(scanner: Any) -> str:
    variant = getattr(scanner, "variant", "stamp")
    return "" if variant == "stamp" else f"-{variant}"


def together(each: Sequence[tuple[str, Verdict]]) -> Verdict:
    """One verdict for several scanners: the worst, with all that was tested and every trigger that was found.

    Score and threshold are those of the scanner that decided, the first of the worst; its triggers come first. Of the
    others, those of scanners that found something follow.

    Args:
        each: At least one, by name.
    """
    if len(each) == 1:
        return each[0][1]
    worst = max((v for _, v in each), key=lambda v: ORDER.index(v.verdict))
    others = [v for _, v in each if v is not worst and v.verdict in ("backdoored", "suspicious")]
    found = [one for v in others for one in v.evidence if one.converged]
    deciding = next(name for name, v in each if v is worst)
    costs = {
        key: sum(v.details.get(key, 0.0) for _, v in each) for key in ("forward_images", "backward_images")
    }  # fmt: skip
    peaks = [v.peak_memory_mib for _, v in each if v.peak_memory_mib is not None]
    return dataclasses.replace(
        worst,
        tested="; ".join(dict.fromkeys(v.tested for _, v in each)),
        evidence=(*worst.evidence, *found),
        details={**worst.details, **costs},
        reason=f"{deciding}: {worst.reason}",
        peak_memory_mib=max(peaks, default=None),
    )


def reference_for(scanner: Any, card: Card) -> Reference | None:
    """The calibration that ships for encoders of this architecture and recipe; None = the published thresholds count.

    A gated encoder counts as one of its base, and the recipe is what the card claims. A card can lie: the verdict names
    the calibration that was used.
    """
    recipe = card.recipe.get("id")
    if not isinstance(recipe, str):
        return None
    built = card.architecture if card.architecture.get("method") != "gated" else card.architecture["base"]
    return shipped_reference(scanner.name, str(built.get("method")), recipe)


def evidence_arrays(verdict: Verdict, under: str = "inverted") -> dict[str, np.ndarray[Any, Any]]:
    """Inverted triggers as arrays `<under>/<i>/mask`, `/pattern` and, if recorded, `/path`. See `scan_evidence`."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for i, one in enumerate(verdict.evidence):
        arrays |= {f"{under}/{i}/mask": one.mask, f"{under}/{i}/pattern": one.pattern}
        if one.path is not None:
            arrays[f"{under}/{i}/path"] = one.path
    return arrays


def scan_evidence(verdict: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> list[Evidence]:
    """Inverted triggers from a stored verdict and its arrays `inverted/<i>/…`; see `evidence_arrays`."""
    return [
        Evidence(
            arrays[f"inverted/{i}/mask"], arrays[f"inverted/{i}/pattern"], e["size"], e["converged"], e["source"],
            arrays.get(f"inverted/{i}/path"),
        )
        for i, e in enumerate(verdict["evidence"])
    ]  # fmt: skip


def scan_encoder(
    encoder: ImageEncoder, images: Dataset, scanners: Sequence[Scanner], seed: Seed
) -> tuple[Verdict, list[tuple[str, Verdict]]]:
    """Run the scanners in turn; the worst verdict counts: see `together`.

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
        method, label = type(scanner).__name__, scanner_label(scanner)
        reference = reference_for(scanner, encoder.card)
        draw = seed.child(method, label) if _variant(scanner) else seed.child(method)
        verdict = scanner.scan(encoder, images.without_labels(method), draw, reference)
        say(f"  {label}: {verdict.verdict}  score {verdict.score:.3f}  threshold {verdict.threshold:.3f}")
        each.append((label, verdict))
    return together(each), each


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
        cost: Images through an encoder, forward and backward, of purification without the scans, and the most memory
            that the process held.
    """

    encoder: ImageEncoder
    before: Verdict
    after: Verdict
    rounds: int
    drift: float
    residue: tuple[float, float] | None
    history: Mapping[str, Sequence[float]]
    cost: Mapping[str, float | None]


def _stamped(images: Tensor, evidence: Evidence, boost: float = 2.0) -> Tensor:
    mask = torch.from_numpy(np.array(evidence.mask)).mul(boost).clamp(0, 1)
    pattern = torch.from_numpy(np.array(evidence.pattern))
    return (images.float() / 255 * (1 - mask) + pattern * mask).clamp(0, 1).mul(255).round().to(torch.uint8)


def _purified(
    purifier: Any, encoder: ImageEncoder, images: Dataset, seed: Seed, evidence: Sequence[Evidence]
) -> tuple[Encoder, Mapping[str, Sequence[float]]]:
    """The purified encoder, and numbers of its training where the purifier tells any."""
    if not hasattr(purifier, "purify_with_history"):
        return purifier.purify(encoder, images, seed, evidence), {}
    made: tuple[Encoder, Mapping[str, Sequence[float]]] = purifier.purify_with_history(encoder, images, seed, evidence)
    return made


def purify_encoder(
    encoder: ImageEncoder,
    images: Dataset,
    purifier: Purifier,
    scanners: Sequence[Scanner],
    seed: Seed,
    *,
    before: Verdict | None = None,
    labelled: Dataset | None = None,
    max_rounds: int = 3,
) -> Vetted:
    """Purify, scan again, and repeat while a trigger is still found: each round looks for what the last one left.

    Args:
        encoder: Left as it is.
        images: Of the encoder's input size; labels are kept from scanners, and from purifiers that need none.
        purifier: Settings.
        scanners: For evidence and for the re-scan.
        seed: Everything random; each round scans from new starts.
        before: A scan that was already made; None = scan first.
        labelled: What a purifier that needs labels works on; None = `images`. No other purifier sees it.
        max_rounds: At least 1.
    """
    if before is None:
        before, _ = scan_encoder(encoder, images, scanners, seed.child("scan", 0))
    evidence, current, after = list(before.evidence), encoder, before
    history: Mapping[str, Sequence[float]] = {}
    costs: list[Cost] = []
    done = 0
    given = images.without_labels(type(purifier).__name__)
    if "labels" in purifier.needs:
        given = images if labelled is None else labelled
    for done in range(1, max_rounds + 1):
        say(f"  purify, round {done}")
        with counting() as cost:
            made, history = _purified(purifier, current, given, seed.child("purify", done), evidence)
        costs.append(cost)
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
        there, left = (float(metrics.concentration(features(one, stamped))) for one in (encoder, current))
        residue = there, left
    source = {**current.card.source, "purified_with": type(purifier).__name__}
    result = dataclasses.replace(current, card=dataclasses.replace(current.card, source=source))
    return Vetted(result, before, after, done, drift, residue, history, Cost.of(costs).to_json())
