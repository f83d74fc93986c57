"""Mask-DS for an encoder: it sees one band of columns at a time, and runs of bands are masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cupel.certify.certificate import MaskedClassifier
from cupel.certify.windows import bands
from cupel.inference import device_of, features
from cupel.metrics import check_labels
from cupel.probe import Linear
from cupel.protocols import Encoder
from cupel.seeds import Seed
from cupel.settings import Budgets, Fraction, PositiveInt, settings
from cupel.types import Dataset, Need

__all__ = ["BandEvidence", "MaskDS", "banded"]


def banded(
    x: Float[Tensor, "n 3 height width"], start: int, band: int, fill: float
) -> Float[Tensor, "n 3 height width"]:
    """Images of which only `band` columns from `start` on are seen, around the edge; the rest is one grey.

    Example:
        >>> banded(torch.ones(1, 3, 1, 4), 3, 2, 0.5)[0, 0].tolist()
        [[1.0, 0.5, 0.5, 1.0]]
    """
    seen = (torch.arange(x.shape[3], device=x.device) - start) % x.shape[3] < band
    return torch.where(seen, x, torch.full_like(x, fill))


class BandEvidence(nn.Module):
    """Confidences of a head on the embeddings of every band of an image."""

    def __init__(self, encoder: Encoder, head: nn.Module, band: int, fill: float) -> None:
        super().__init__()
        self.network, self.head, self.band, self.fill = encoder.module, head, band, fill

    def forward(self, x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n bands classes"]:
        each = [self.head(self.network(banded(x, i, self.band, self.fill)).float()) for i in range(x.shape[3])]
        return torch.stack(each, dim=1).softmax(dim=2)


@settings
class MaskDS(Budgets):
    """A certified classifier on a frozen encoder that is shown single bands of columns.

    Every start of a band, around the edge, gives a vote in the form of its confidences; p + b − 1 neighbouring bands
    can see a patch of p pixels, so robust masking takes away runs of that length. It needs no other network than the
    encoder, which was never trained on bands: accuracy is low.

    Args:
        patch: p, largest side of the patch in pixels, for prediction and certificate.
        band: b, columns of a band.
        fill: Grey of the columns that are not seen, in [0, 1].
        training_bands: Bands per training image that the head is fitted on, evenly spaced; None = all.
        threshold: Share of a class's evidence above which its strongest run is masked.
        head: How the head is fitted.

    Source: Xiang et al., PatchGuard, USENIX Security 2021, arXiv:2005.10884, section 4 (Mask-DS); Levine & Feizi,
    NeurIPS 2020, arXiv:2002.10733. Bands of 4 columns are theirs for CIFAR-10.
    Deviations: the encoder is not trained on bands, only the head; columns that are not seen are grey, not a channel of
    their own.
    """

    patch: PositiveInt = 10
    band: PositiveInt = 4
    fill: Fraction = 0.5
    training_bands: PositiveInt | None = 8
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    head: Linear = Linear()

    title: ClassVar[str] = "Mask-DS"
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"training_bands": 4},
        "standard": {},
        "paper": {"training_bands": None},
    }

    def fit(self, encoder: Encoder, train: Dataset, seed: Seed) -> MaskedClassifier:
        """Fit the head on bands of labelled images.

        Args:
            encoder: Left as it is.
            train: Labelled images of its input size.
            seed: Of the head.

        Raises:
            SettingsError: a patch can be seen by every band.
            DataError, UsageError: no images, of another size, or labels that do not fit.
        """
        check_labels(train.labels, train.num_classes, train.name)
        side = encoder.input_size
        windows = bands(side, self.patch + self.band - 1)
        count = min(self.training_bands or side, side)
        starts = [round(i * side / count) for i in range(count)]
        raw = train.inputs[torch.arange(len(train))]
        grey = round(255 * self.fill)
        seen = [features(encoder, banded(raw, start, self.band, grey), dtype=torch.float32) for start in starts]
        head = self.head.fit_features(torch.cat(seen), train.labels.repeat(count), train.num_classes, seed)
        local = BandEvidence(encoder, head.to(device_of(encoder.module)), self.band, grey / 255)
        return MaskedClassifier(local, windows, self.patch, side, self.threshold, "mask_ds")
