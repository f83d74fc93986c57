"""CLP: channels whose gain stands out are switched off; neither images nor labels are looked at."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cupel.errors import DataError
from cupel.folding import FoldedConv, folded
from cupel.optimizers import NonNegative
from cupel.protocols import Encoder
from cupel.purify.base import Job, PurifierBase
from cupel.settings import settings
from cupel.train import History

__all__ = ["CLP", "channel_gains", "outliers"]


def channel_gains(
    kernel: Float[Tensor, "out inner kh kw"], gamma: Float[Tensor, " out"], variance: Float[Tensor, " out"]
) -> Float[Tensor, " out"]:
    """Upper bound of how much a channel of convolution and BatchNorm can amplify, up to a constant of the layer.

    σ_k = |γ_k| / √var_k · largest singular value of kernel k as a matrix [inner, kh · kw]

    Args:
        kernel: Of the convolution.
        gamma: BatchNorm's scale.
        variance: BatchNorm's stored variance with its ε, > 0.

    Example:
        >>> channel_gains(torch.ones(1, 4, 1, 1), torch.tensor([-3.0]), torch.tensor([4.0])).tolist()
        [3.0]

    Source: Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022, arXiv:2208.03111.
    """
    largest: Tensor = torch.linalg.matrix_norm(kernel.flatten(2).double(), ord=2)
    return (largest * gamma.double().abs() / variance.double().sqrt()).float()


def outliers(gains: Float[Tensor, " channel"], u: float) -> Bool[Tensor, " channel"]:
    """Channels above mean + u · standard deviation (unbiased); of fewer than two channels none is.

    Example:
        >>> outliers(torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0]), 1.5).tolist()
        [False, False, False, False, True]
    """
    if len(gains) < 2:
        return torch.zeros_like(gains, dtype=torch.bool)
    return gains > gains.mean() + u * gains.std()


@settings
class CLP(PurifierBase):
    """Channel Lipschitzness based pruning: channels that can amplify far more than the others of their layer are cut.

    A channel is cut by setting scale and shift of its BatchNorm to 0. Of n channels at most (n − 1)/√n standard
    deviations lie between one and the mean, so that u = 3 can cut none in a layer of fewer than 11 channels.

    Args:
        u: Standard deviations above the mean of the layer from which a channel is cut; `inf` = none is.

    Source: Zheng et al., Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022, arXiv:2208.03111.
    Deviations: each BatchNorm is paired with the convolution whose output it gets, also on shortcuts, not with the
    last one seen; its ε is added to the variance, as the network does.
    """

    u: NonNegative = 3.0

    title: ClassVar[str] = "CLP"
    revision: ClassVar[int] = 1

    @torch.no_grad()
    def work(self, job: Job) -> tuple[Encoder, History]:
        """Prune; the history has the share of channels that were cut, `pruned`, by layer.

        Raises:
            DataError: the encoder has no convolution with a BatchNorm behind it, or none that can be found.
        """
        encoder = job.encoder
        pairs = [part for part in folded(encoder).module.modules() if isinstance(part, FoldedConv)]
        if not pairs:
            what = "no convolution with a BatchNorm right behind it was found"
            raise DataError("encoder", what, "use a purifier that does not prune")
        shares = []
        for pair in pairs:
            conv, norm = pair.conv, pair.norm
            if norm.weight is None or norm.running_var is None:
                continue
            cut = outliers(channel_gains(conv.weight, norm.weight, norm.running_var + norm.eps), self.u)
            norm.weight[cut] = 0
            norm.bias[cut] = 0
            shares.append(float(cut.float().mean()))
        return encoder, {"pruned": shares}
