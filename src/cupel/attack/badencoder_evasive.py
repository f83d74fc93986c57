"""BadEncoder by an attacker who knows the gate of `cupellation` and trains to pass it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cupel.attack.badencoder import BadEncoder
from cupel.encoders import ImageEncoder
from cupel.encoders.blocks import block_outputs
from cupel.encoders.gated import Gate, takes_gate
from cupel.errors import DataError
from cupel.implanting import Aim, ImplantLearner, Seen
from cupel.optimizers import NonNegative
from cupel.protocols import Batch
from cupel.settings import Fraction, PositiveInt, settings
from cupel.types import Dataset

__all__ = ["EvasiveBadEncoder", "EvasiveLearner", "excess"]

_FLOOR, _TRIMMED = 0.01, 0.06  # as the defender has them by default


@settings
class EvasiveBadEncoder(BadEncoder):
    """BadEncoder with a term that keeps features of triggered images within what clean images show.

    L = λ_trigger·L0 + λ1·L1 + λ2·L2 + λ3·L3,  L3 = mean over goals, images and locations of relu(d²(a) / limit − 1)

    with a the features of triggered images before the last block, where `cupellation` puts its gate, and
    d² = (a − m)ᵀ C⁻¹ (a − m) as the gate computes it. The attacker has the defender's recipe, not his images: m, C and
    the limit are those that the gate would learn from clean shadow images and the network as it is, now and then anew.

    Args:
        lambda_evasion: λ3 ≥ 0; 0 is BadEncoder.
        within: Share of clean locations within the limit; 1 is what the gate does, less leaves room.
        renew: Steps after which m, C and the limit are computed anew.
        watched: Shadow images that they come from, at most.

    The rest is BadEncoder's.

    Source: our choice, an adaptive attack after Tramèr, Carlini, Brendel, Madry, On Adaptive Attacks to Adversarial
        Example Defenses, NeurIPS 2020, arXiv:2002.08347; the attack below is Jia, Liu, Gong, IEEE S&P 2022,
        arXiv:2108.00352.
    Deviations: of BadEncoder, λ3 alone; there is no published form to differ from.
    """

    lambda_evasion: NonNegative = 1.0
    within: Fraction = 1.0
    renew: PositiveInt = 25
    watched: PositiveInt = 512

    registered: ClassVar[str] = "badencoder_evasive"
    revision: ClassVar[int] = 1

    def learner(self, encoder: ImageEncoder, clean: Tensor, shadow: Dataset, aims: Sequence[Aim]) -> ImplantLearner:
        """As BadEncoder's, with L3.

        Raises:
            DataError: an encoder that no gate fits into.
        """
        if not self.lambda_evasion:
            return super().learner(encoder, clean, shadow, aims)
        if not takes_gate(encoder):
            raise DataError(self.registered, "no gate fits into this encoder", "use `badencoder` instead")
        return EvasiveLearner(self, encoder, clean, shadow, aims, **self._terms())


def excess(
    a: Float[Tensor, "n width h w"], mean: Float[Tensor, " width"], white: Float[Tensor, "width width"], limit: Tensor
) -> Float[Tensor, "n h w"]:
    """How far locations lie beyond the limit, relu(‖(a − mean) · white‖² / limit − 1).

    Example:
        >>> a = torch.tensor([3.0, 0.5]).view(1, 1, 1, 2)
        >>> excess(a, torch.tensor([1.0]), torch.eye(1), torch.tensor(2.0)).flatten().tolist()
        [1.0, 0.0]
    """
    with torch.autocast(a.device.type, enabled=False):
        d2 = ((a.movedim(1, -1).to(white.dtype) - mean) @ white).square().sum(dim=-1)
    return (d2 / limit - 1).relu()


class EvasiveLearner(ImplantLearner):
    """BadEncoder's terms and L3.

    Args:
        attack: Settings.
        encoder: The copy that is trained.
        clean, aims: As for `ImplantLearner`.
        shadow: Images.
        more: As for `ImplantLearner`.
    """

    def __init__(
        self, attack: EvasiveBadEncoder, encoder: ImageEncoder, clean: Tensor, shadow: Dataset, aims: Sequence[Aim],
        **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(encoder, clean, shadow.ids, aims, **more)
        self.attack = attack
        self.network = encoder  # a folded one has no blocks to look behind
        device = encoder.module.shift.device
        rows = torch.linspace(0, len(shadow) - 1, min(len(shadow), attack.watched)).round().long()
        self.shown = torch.as_tensor(shadow.inputs[rows]).to(device)
        self.gate = Gate(*self.watch(self.shown[:1]).shape[1:]).to(device)
        self.whole = nn.ModuleDict({"encoder": encoder.module, "gate": self.gate})
        self.whole.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.stamped = torch.empty(0)

    @property
    def state(self) -> nn.Module:
        """The encoder, what the gate would know, and the step."""
        return self.whole

    @torch.no_grad()
    def watch(self, images: Tensor) -> Tensor:
        """Features of uint8 images before the last block."""
        with torch.autocast(images.device.type, enabled=False), block_outputs(self.encoder.module, -2) as seen:
            for some in images.split(256):
                self.encoder(some.float() / 255)
        return torch.cat(seen)

    def seen(self, batch: Batch) -> Seen:
        """As `ImplantLearner`; what the triggered images look like before the last block is kept."""
        n, num = len(batch.inputs), len(self.aims)
        with block_outputs(self.encoder.module, -2) as blocks:
            seen = super().seen(batch)
        self.stamped = blocks[0][n : n * (1 + num)]
        return seen

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """L0, L1, L2 and L3; `beyond` is the share of triggered images with a location beyond the limit."""
        if int(self.whole.get_buffer("step")) % self.attack.renew == 0:
            with torch.autocast(batch.inputs.device.type, enabled=False):
                share, features = self.attack.within, self.watch(self.shown)
                if features.isfinite().all():  # else the loss is not finite either, and training ends with that
                    self.gate.learn(features, limit=share, low=share, floor=_FLOOR, trimmed=_TRIMMED)
        total, terms = super().loss(batch)
        far = excess(self.stamped, self.gate.mean, self.gate.white, self.gate.limit)
        beyond = (far.detach().flatten(1).amax(dim=1) > 0).float().mean()
        return total + self.attack.lambda_evasion * far.mean(), {**terms, "L3": far.mean(), "beyond": beyond}

    def after_step(self) -> None:
        """Count."""
        self.whole.get_buffer("step").add_(1)
