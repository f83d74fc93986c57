"""Robust masking and its certificate: what is decided by local evidence, and what one patch can change of it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cupel.certify.windows import Windows

__all__ = ["CERTIFIED", "CORRECT", "WRONG", "masked_prediction", "masked_scores", "outcomes", "votes_certified"]

WRONG, CORRECT, CERTIFIED = 0, 1, 2
"""Outcomes of an image: misclassified without any patch; classified rightly; rightly whatever one patch shows."""

Evidence = Float[Tensor, "n cells classes"]


def masked_scores(evidence: Evidence, windows: Windows, threshold: float = 0.0) -> Float[Tensor, "n classes"]:
    """For each class the evidence without that of its strongest window, where this holds more than T of all.

    t_k = Σ E_k,  v_k = largest window sum,  score_k = t_k − v_k where v_k / t_k > T, else t_k;  0/0 = 0

    Args:
        evidence: E; what is below 0 counts as 0, or the certificate would not hold.
        windows: Of as many cells.
        threshold: T in [0, 1).

    Returns:
        float64.

    Source: Xiang et al., PatchGuard, USENIX Security 2021, arXiv:2005.10884, algorithm 1.
    """
    e = _clipped(evidence)
    total, strongest = e.sum(dim=1), _window_sums(e, windows).amax(dim=1)
    masked = strongest > threshold * total
    return torch.where(masked, total - strongest, total)


def masked_prediction(evidence: Evidence, windows: Windows, threshold: float = 0.0) -> Int[Tensor, " n"]:
    """The class with the largest masked score; among equals the one with the **highest** index, as in `outcomes`."""
    return _last_largest(masked_scores(evidence, windows, threshold))


def outcomes(
    evidence: Evidence, labels: Int[Tensor, " n"], windows: Windows, threshold: float = 0.0
) -> Int[Tensor, " n"]:
    """What is known of each image: `WRONG`, `CORRECT`, or `CERTIFIED` against one patch.

    The attacker may set the cells of any one window to anything ≥ 0. For each window W a wrong class has at most the
    evidence outside of W over 1 − T; the true class has at least its evidence outside of W without the strongest window
    of that. Where T > 0 and that window's share is at most T, only windows that meet W can be masked.

    Args:
        evidence: Of clean images.
        labels: True classes.
        windows, threshold: Those of the prediction.

    Source: Xiang et al., PatchGuard, USENIX Security 2021, arXiv:2005.10884, algorithm 2; at T = 0 the bounds are
    reached.
    """
    e = _clipped(evidence)
    labels = labels.to(e.device)
    found = torch.full((len(e),), WRONG, device=e.device)
    right = _last_largest(masked_scores(e, windows, threshold)) == labels
    found[right] = CORRECT
    for row in right.nonzero().flatten().tolist():  # one at a time: windows × windows numbers each
        if _holds(e[row], int(labels[row]), windows, threshold):
            found[row] = CERTIFIED
    return found.cpu()


def _holds(e: Float[Tensor, "cells classes"], label: int, windows: Windows, threshold: float) -> bool:
    """Whether the label wins for every window that the attacker may hold."""
    covers = windows.covers.to(e)
    outside = (1 - covers) @ e  # not as a difference: an exact tie must stay one
    rest = ((1 - covers) * e[:, label]) @ covers.T  # [attacked, masked]
    strongest = rest.amax(dim=1)
    if threshold > 0:
        meets = (covers @ covers.T) > 0
        near = rest.masked_fill(~meets, 0).amax(dim=1)
        strongest = torch.where(strongest > threshold * outside[:, label], strongest, near)
    least = outside[:, label] - strongest
    most = outside / (1 - threshold)
    classes = torch.arange(e.shape[1], device=e.device)
    wins = (least[:, None] > most) | ((least[:, None] == most) & (classes < label))
    wins[:, label] = True
    return bool(wins.all())


def votes_certified(votes: Int[Tensor, "n classes"], labels: Int[Tensor, " n"], touched: int) -> Bool[Tensor, " n"]:
    """Whether a plurality of votes stands when `touched` of the voters are in the attacker's hands.

    The label must lead each other class by more than 2 · touched, or by that much and have the higher index.

    Args:
        votes: Per class.
        labels: True classes.
        touched: Voters that one patch can touch: p + b − 1 for bands of b pixels.

    Example:
        >>> votes_certified(torch.tensor([[20, 4], [21, 4]]), torch.tensor([0, 0]), 8).tolist()
        [False, True]

    Source: Levine & Feizi, (De)Randomized Smoothing for Certifiable Defense against Patch Attacks, NeurIPS 2020,
    arXiv:2002.10733, section 4.
    """
    own = votes.gather(1, labels[:, None])
    lead = own - votes
    lower = torch.arange(votes.shape[1], device=votes.device) < labels[:, None]
    stands = (lead > 2 * touched) | ((lead == 2 * touched) & lower)
    return stands.scatter(1, labels[:, None], True).all(dim=1)


def _clipped(evidence: Tensor) -> Tensor:
    return evidence.double().clamp_min(0)


def _window_sums(e: Tensor, windows: Windows) -> Float[Tensor, "n windows classes"]:
    return torch.einsum("mc,nck->nmk", windows.covers.to(e), e)


def _last_largest(scores: Float[Tensor, "n classes"]) -> Int[Tensor, " n"]:
    best = scores == scores.amax(dim=1, keepdim=True)
    return scores.shape[1] - 1 - best.flip(1).int().argmax(dim=1)
