"""Multinomial logistic regression to convergence, and the linear head it gives."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

__all__ = ["column_scale", "logistic_head", "logistic_regression"]


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
        solver.step(objective)
    return weight, bias


def logistic_head(
    x: Float[Tensor, "row dim"], y: Int[Tensor, " row"], num_classes: int, l2: float, max_steps: int
) -> nn.Linear:
    """The linear head that `logistic_regression` gives on standardised columns, for columns as they are.

    Args:
        x: Standardised in place.
        y, num_classes, l2, max_steps: As for `logistic_regression`.

    Returns:
        One linear layer, with the standardisation multiplied into it.
    """
    mean, inverse = column_scale(x)
    x = x.sub_(mean).mul_(inverse)
    weight, bias = logistic_regression(x, y, num_classes, l2, max_steps)
    head = nn.Linear(x.shape[1], num_classes, device="meta").to_empty(device=x.device)
    with torch.no_grad():
        unscaled = weight.double() * inverse.double()
        head.weight.copy_(unscaled)
        head.bias.copy_(bias.double() - unscaled @ mean.double())
    return head
