"""Linear probe: multinomial logistic regression to convergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from cupel.inference import FrozenProbe, features
from cupel.metrics import check_labels
from cupel.protocols import Encoder
from cupel.seeds import Seed
from cupel.settings import PositiveInt, settings
from cupel.types import Dataset, Need

__all__ = ["Linear", "column_scale", "logistic_regression"]


def column_scale(x: Float[Tensor, "row dim"]) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """Mean of each column, and the reciprocal of its (population) standard deviation; 0 for a constant column.

    A column counts as constant when it varies by less than a millionth of its mean: that is rounding, and dividing by
    it would make noise as large as every signal.

    Example:
        >>> mean, inverse = column_scale(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        >>> mean.tolist(), inverse.tolist()
        ([2.0, 5.0], [1.0, 0.0])
    """
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    std = variance.sqrt()
    varies = std > 1e-6 * mean.abs() + 1e-12
    return mean, torch.where(varies, 1 / std.where(varies, 1.0), 0.0)


def logistic_regression(
    x: Float[Tensor, "row dim"],
    y: Int[Tensor, " row"],
    num_classes: int,
    l2: float,
    max_steps: int,
    tolerance: float = 1e-5,
) -> tuple[Float[Tensor, "class dim"], Float[Tensor, " class"]]:
    """Weights and biases that minimise the mean cross entropy plus l2/2 · ‖W‖², by L-BFGS from zero.

    Args:
        x: Standardised columns.
        y: Classes.
        num_classes: C.
        l2: ≥ 0; biases are not penalised. In scikit-learn's terms C = 1 / (rows · l2).
        max_steps: Bound of the L-BFGS steps.
        tolerance: Stop when no entry of the gradient is larger.
    """
    n, wide = len(y), torch.float64  # the terms of the loss nearly cancel, and the line search compares its values
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    share = one_hot(y, num_classes).to(x.dtype).div_(n)
    sum_x, sum_1 = share.T @ x, share.sum(0)  # what the true classes add to the loss is linear: summed once
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_steps,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=tolerance,
        tolerance_change=1e-11,
    )

    def objective() -> float:
        """mean logsumexp − Σ weight · sum_x − Σ bias · sum_1 + penalty; its gradient by hand, in two passes over x."""
        logits = torch.addmm(bias, x, weight.T)
        log_sum = logits.logsumexp(1, keepdim=True)
        parts = (log_sum.mean(dtype=wide), -(weight * sum_x).sum(dtype=wide), -(bias * sum_1).sum(dtype=wide))
        loss = sum(parts) + l2 / 2 * weight.square().sum(dtype=wide)
        p = logits.sub_(log_sum).exp_()
        weight.grad = torch.addmm(l2 * weight - sum_x, p.T, x, alpha=1 / n)
        bias.grad = p.sum(0) / n - sum_1
        return float(loss)

    with torch.no_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]  # untyped in torch
    return weight, bias


class UnitLength(nn.Module):
    """Scales each row to length 1."""

    def forward(self, embeddings: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
        return normalize(embeddings, dim=1)


@settings
class Linear:
    """Multinomial logistic regression on standardised embeddings, solved to convergence: our default probe.

    The problem is convex, so the starting point does not matter; a head seed draws the training rows instead.

    Args:
        normalise: Scale each embedding to unit length before its columns are standardised, as the heads of the attack
            literature do. Attacks on the cosine leave the length of triggered embeddings free; they can grow many
            times longer than clean ones, and a head on raw embeddings then answers by length, not by direction.
        l2: Penalty on the weights of standardised columns, l2/2 · ‖W‖² beside the mean cross entropy; ≥ 0.
        subsample: Part of the training rows that a head seed draws, without replacement; in (0, 1].
            At 1 all head seeds agree.
        max_steps: Bound of the L-BFGS steps.

    Source: our choice: the linear evaluation of Chen et al., SimCLR, ICML 2020, appendix B.6 (L-BFGS, L2, no
        augmentation) with columns standardised and a fixed penalty instead of a sweep, which would need more labels.
    """

    normalise: bool = True
    l2: Annotated[float, Field(ge=0)] = 1e-3
    subsample: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_steps: PositiveInt = 200

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 2

    def fit(self, encoder: Encoder, train: Dataset, seed: Seed) -> FrozenProbe:
        """Fit on the embeddings of `train`."""
        check_labels(train.labels, train.num_classes, train.name)
        return FrozenProbe(encoder, self.fit_features(features(encoder, train), train.labels, train.num_classes, seed))

    def fit_features(
        self,
        features: Float[Tensor, "row width"],
        labels: Int[Tensor, " row"],
        num_classes: int,
        seed: Seed,
        watch: Callable[[nn.Module], object] | None = None,
    ) -> nn.Module:
        """The head on raw embeddings: one `nn.Linear` with the standardisation multiplied into it, after `UnitLength`.

        Raises:
            DataError: no rows, or rows without label.
            UsageError: a class index outside [0, num_classes).
        """
        check_labels(labels, num_classes, "training data")
        n, device = len(features), features.device
        drawn = torch.randperm(n, generator=seed.child("rows").torch())[: max(1, round(self.subsample * n))]
        rows = drawn.sort().values.to(device)
        x, y = features[rows], labels.to(device)[rows]
        if self.normalise:
            x = normalize(x, dim=1)
        mean, inverse = column_scale(x)
        x = x.sub_(mean).mul_(inverse)  # in place: `x` is our own copy
        weight, bias = logistic_regression(x, y, num_classes, self.l2, self.max_steps)
        head = nn.Linear(features.shape[1], num_classes, device="meta").to_empty(device=device)
        with torch.no_grad():
            unscaled = weight.double() * inverse.double()
            head.weight.copy_(unscaled)
            head.bias.copy_(bias.double() - unscaled @ mean.double())
        made = (nn.Sequential(UnitLength(), head) if self.normalise else head).eval()
        if watch is not None:
            watch(made)
        return made
