"""What is measured: counts of successes among samples, and label-free numbers of embeddings. Pure functions.

A count is `(successes, samples)`; one per seed goes into `records.Metric.of`. Where nothing is left to
measure on, samples is 0 and the metric has no value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, fsum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from cupel.errors import DataError, UsageError
from cupel.types import Dataset

__all__ = [
    "Count",
    "History",
    "accuracy",
    "attack_success_rate",
    "attack_success_rate_all",
    "check_labels",
    "check_target",
    "concentration",
    "feature_std",
    "mean_cosine",
    "mode_share",
    "poisoned_accuracy",
    "predicted_class",
    "robust_accuracy",
    "tail",
]

Count = tuple[int, int]
"""(successes, samples)."""


def check_target(target_class: int, data: Dataset) -> None:
    """Refuse a target class that the data set does not have.

    Raises:
        UsageError: outside [0, classes).
    """
    classes = data.num_classes
    if not 0 <= target_class < classes:
        what = f"target class {target_class} is not one of its {classes} classes"
        raise UsageError(data.name, what, f"choose a class from 0 to {classes - 1}")


def check_labels(labels: Int[Tensor, " row"], num_classes: int, where: str) -> None:
    """Refuse labels that cannot be learned from or measured against.

    Args:
        labels: To check; −1 = unlabelled.
        num_classes: They must lie in [0, num_classes).
        where: Name for the error line.

    Raises:
        DataError: no row at all, or some are unlabelled.
        UsageError: a class index outside the range.
    """
    if len(labels) == 0:
        raise DataError(where, "holds no images", "give it at least one labelled image")
    if unlabelled := int((labels == -1).sum()):
        raise DataError(where, f"{unlabelled} of {len(labels)} images have no label", "leave them out, or label them")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        what = f"class index {low if low < 0 else high} is outside the {num_classes} classes"
        raise UsageError(where, what, f"labels run from 0 to {num_classes - 1}")


def predicted_class(logits: Float[Tensor, "row class"]) -> Int[Tensor, " row"]:
    """The class with the largest logit; among equals the one with the smallest index.

    Raises:
        DataError: a logit is NaN, which `argmax` would take for the largest.

    Example:
        >>> predicted_class(torch.tensor([[0.0, 2.0, 2.0]])).tolist()
        [1]
    """
    if bool(logits.isnan().any()):
        raise DataError("classifier", "its logits are not numbers", "lower the learning rate of what trained it")
    best = logits == logits.amax(dim=1, keepdim=True)
    return best.int().argmax(dim=1)  # spelled out: the first of several equal maxima on every device


def accuracy(predicted: Int[Tensor, " row"], labels: Int[Tensor, " row"]) -> Count:
    """Samples that are predicted as their label: clean accuracy (CA) and backdoored accuracy (BA).

    Example:
        >>> accuracy(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2]))
        (3, 4)
    """
    predicted, labels = _pair(predicted, labels)
    return _count(predicted == labels)


def attack_success_rate(
    predicted_on_triggered: Int[Tensor, " row"], true_labels: Int[Tensor, " row"], target_class: int
) -> Count:
    """Triggered inputs **not of the target class** that are predicted as it (ASR; ASR-B on the clean twin).

    Args:
        predicted_on_triggered: Predicted classes of the triggered inputs.
        true_labels: Classes of the same inputs before the trigger.
        target_class: The attacker's aim.

    Example:
        >>> attack_success_rate(torch.tensor([1, 1, 0, 1]), torch.tensor([0, 2, 2, 1]), target_class=1)
        (2, 3)
    """
    predicted, labels = _pair(predicted_on_triggered, true_labels)
    return _count((predicted == target_class)[labels != target_class])


def attack_success_rate_all(
    predicted_on_triggered: Int[Tensor, " row"], true_labels: Int[Tensor, " row"], target_class: int
) -> Count:
    """The same over every input, as BadEncoder and CTRL count it.

    Inputs that are of the target class anyway count as successes, so a clean model scores about their share.
    """
    predicted, _ = _pair(predicted_on_triggered, true_labels)
    return _count(predicted == target_class)


def robust_accuracy(
    predicted_on_triggered: Int[Tensor, " row"], true_labels: Int[Tensor, " row"], target_class: int
) -> Count:
    """Triggered inputs not of the target class that are still predicted as their label.

    It stands beside the ASR: a defence that turns the attack into noise has a low ASR *and* a low robust accuracy.
    """
    predicted, labels = _pair(predicted_on_triggered, true_labels)
    return _count((predicted == labels)[labels != target_class])


def poisoned_accuracy(predicted_on_triggered: Int[Tensor, " row"], true_labels: Int[Tensor, " row"]) -> Count:
    """Triggered inputs of every class that are still predicted as their label."""
    return accuracy(predicted_on_triggered, true_labels)


def mode_share(predicted: Int[Tensor, " row"]) -> Count:
    """Samples in the class that is predicted most often: 1 when everything falls into one class, whichever it is.

    Example:
        >>> mode_share(torch.tensor([4, 4, 0, 4]))
        (3, 4)
    """
    return (int(torch.bincount(predicted).max()), len(predicted)) if len(predicted) else (0, 0)


def concentration(features: Float[Tensor, "row dim"]) -> float:
    """Mean cosine similarity of all pairs of different rows; 1 = collapsed to one direction.

    conc = (1/(B(B−1))) Σ_{i≠j} ⟨u_i, u_j⟩ = (‖Σ_i u_i‖² − Σ_i ‖u_i‖²) / (B(B−1)),  u = row of length 1

    Args:
        features: At least two rows of any norm. A row of zeros has cosine 0 with everything.

    Returns:
        In [−1/(B−1), 1]. O(B·D) time: no B×B matrix.

    Example:
        >>> concentration(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]))
        0.3333333333333333
    """
    rows = len(features)
    if rows < 2:
        raise ValueError("the concentration needs two rows")
    u = normalize(features.double(), dim=1)
    return float((u.sum(0).square().sum() - u.square().sum()) / (rows * (rows - 1)))


def feature_std(features: Float[Tensor, "row dim"]) -> float:
    """Spread of the directions of embeddings, to see a collapse early: about 1 when healthy, 0 when collapsed.

    √D · mean over dimensions of the (population) standard deviation of rows scaled to length 1.

    Args:
        features: At least one row.

    Example:
        >>> feature_std(torch.tensor([[1.0, 0.0], [5.0, 0.0]]))
        0.0

    Source: Chen & He, SimSiam, CVPR 2021, section 4.1 (there without the factor √D).
    """
    if len(features) == 0:
        raise ValueError("a spread needs rows")
    u = normalize(features.double(), dim=1)
    return float(u.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5)


def mean_cosine(a: Float[Tensor, "row dim"], b: Float[Tensor, "row dim"] | Float[Tensor, "1 dim"]) -> float:
    """Mean cosine similarity of row i of `a` with row i of `b`, or with the one row of `b`.

    Args:
        a: At least one row, say embeddings of triggered inputs.
        b: As many rows (the same inputs clean, or by another encoder) or one (a reference).

    Example:
        >>> mean_cosine(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
        0.5
    """
    if len(a) == 0 or a.shape[1] != b.shape[1] or len(b) not in (1, len(a)):
        raise ValueError(f"no cosine between rows of {tuple(a.shape)} and {tuple(b.shape)}")
    return float(cosine_similarity(a.double(), b.to(a.device).double(), dim=1).mean())


class History:
    """Counts of a head after every epoch. Hand it to a probe as `watch`, then ask it for the tail.

    The success of an encoder backdoor is close to all or nothing and can jump between epochs of one head, so the last
    epoch alone says little.

    Args:
        evaluate: Counts by name, for a head in eval mode.

    Example:
        >>> history = History(lambda head: {"clean_accuracy": (9, 10)})
        >>> _ = history(nn.Identity())
        >>> history.tail("clean_accuracy")["last"]
        0.9
    """

    def __init__(self, evaluate: Callable[[nn.Module], Mapping[str, Count]]) -> None:
        self.evaluate = evaluate
        self.counts: dict[str, list[Count]] = {}

    def __call__(self, head: nn.Module) -> Mapping[str, Count]:
        """Evaluate `head` and keep the counts."""
        now = self.evaluate(head)
        for name, count in now.items():
            self.counts.setdefault(name, []).append(count)
        return now

    def tail(self, name: str) -> dict[str, float | None]:
        """`tail` of one of the counts."""
        return tail(self.counts[name])


def tail(history: Sequence[Count], share: float = 0.1) -> dict[str, float | None]:
    """How a count ended over the epochs of a head.

    Args:
        history: One count per epoch, at least one.
        share: Part of the epochs at the end that is the tail, in (0, 1]; rounded up.

    Returns:
        `last`: the last epoch. `mean`, `min`, `max`: over the tail. `lowest`, `highest`: over all epochs.
        Shares in [0, 1]; None where nothing was left to measure on.

    Example:
        >>> tail([(0, 4)] * 18 + [(2, 4), (4, 4)])
        {'last': 1.0, 'mean': 0.75, 'min': 0.5, 'max': 1.0, 'lowest': 0.0, 'highest': 1.0}
    """
    if not history or not 0 < share <= 1:
        raise ValueError("a tail needs an epoch, and a share in (0, 1]")
    if any(samples == 0 for _, samples in history):
        return dict.fromkeys(("last", "mean", "min", "max", "lowest", "highest"))
    shares = [good / samples for good, samples in history]
    end = shares[-ceil(round(share * len(shares), 9)) :]
    return {
        "last": shares[-1],
        "mean": fsum(end) / len(end),
        "min": min(end),
        "max": max(end),
        "lowest": min(shares),
        "highest": max(shares),
    }


def _pair(predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if predicted.ndim != 1 or predicted.shape != labels.shape:
        raise ValueError(f"{tuple(predicted.shape)} predictions for {tuple(labels.shape)} labels")
    if bool((labels < 0).any()):
        raise DataError(
            "test data", f"{int((labels < 0).sum())} of {len(labels)} images have no label", "leave them out"
        )
    return predicted, labels.to(predicted.device)


def _count(hits: Bool[Tensor, " row"]) -> Count:
    return int(hits.sum()), len(hits)
