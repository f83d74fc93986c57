"""Linear probe: multinomial logistic regression to convergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from cupel.inference import FrozenProbe, features
from cupel.losses.logistic import column_scale, logistic_head, logistic_regression
from cupel.metrics import check_labels
from cupel.protocols import Encoder
from cupel.seeds import Seed
from cupel.settings import PositiveInt, settings
from cupel.types import Dataset, Need

__all__ = ["Linear", "column_scale", "logistic_regression"]


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
        head = logistic_head(x, y, num_classes, self.l2, self.max_steps)  # scales `x`, which is our own copy
        made = (nn.Sequential(UnitLength(), head) if self.normalise else head).eval()
        if watch is not None:
            watch(made)
        return made
