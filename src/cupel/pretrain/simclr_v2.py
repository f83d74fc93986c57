"""SimCLR v2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cupel.encoders.projected import kept_layers, middle_layer
from cupel.errors import SettingsError
from cupel.losses import nt_xent
from cupel.losses.pulling import spread
from cupel.pretrain.views import TwoViews
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.types import Dataset

__all__ = ["SimCLRv2", "last_layer"]


def last_layer(width: int, projection: int, seed: Seed) -> nn.Sequential:
    """The last layer of SimCLR v2's projector: Linear without bias, BatchNorm with a scale and without a shift.

    Args:
        width, projection: Dimensions of input and output.
        seed: Of the initialisation; the global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed.value)
        norm = nn.BatchNorm1d(projection)
        norm.register_parameter("bias", None)
        return nn.Sequential(nn.Linear(width, projection, bias=False), norm)


@settings
class SimCLRv2(TwoViews):
    """SimCLR with a deeper projector, whose first layers may stay with the encoder.

    On an encoder of the architecture `projected` the layers it keeps are the projector's first ones, and only the
    remaining ones are made anew and thrown away after; on any other encoder all of them are.

    Args:
        temperature: τ > 0.
        projection: Output dimensions of the projector.
        projector_layers: Its linear layers, BatchNorm after each and ReLU between them; all but the last are as wide as
            the encoder's embedding.

    Presets: `fast` (minutes on two CPU cores) and `google_cifar` (the authors' recipe for CIFAR-10, for ResNet-18).

    Source: Chen et al., Big Self-Supervised Models are Strong Semi-Supervised Learners, NeurIPS 2020, arXiv:2006.10029,
        section 2. Fine-tuning is the probe `finetune`, distillation is `cupel.probe.distil`.
    Deviations: those of `SimCLR`; torch's initial weights for the projector; no momentum memory; no selective kernels.
    """

    temperature: Positive = 0.5
    projection: PositiveInt = 128
    projector_layers: Annotated[int, Field(ge=2)] = 3
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, name: Literal["fast", "google_cifar"]) -> SimCLRv2:
        """Settings of a published recipe, or ours for two CPU cores."""
        match name:
            case "fast":
                return cls(optimizer="adamw", lr=2e-3, batch_size=128, steps=600, temperature=0.2)
            case "google_cifar":  # lr = 1.0 · batch / 256; 10 of 1000 epochs of warm-up, 97 steps each
                return cls(optimizer="lars", lr=2.0, weight_decay=1e-4, batch_size=512, epochs=1000, warmup_steps=970)

    def learner(self, encoder: Encoder, data: Dataset, seed: Seed) -> SimCLRv2Learner:
        """Encoder and the fresh rest of the projector, ready to train.

        Raises:
            SettingsError: the encoder keeps as many layers as the projector has.
        """
        return SimCLRv2Learner(self, encoder, seed)


class SimCLRv2Learner:
    """Encoder and the rest of its projector under NT-Xent."""

    def __init__(self, settings: SimCLRv2, encoder: Encoder, seed: Seed) -> None:
        self.settings = settings
        layers, kept, width = settings.projector_layers, kept_layers(encoder.module), encoder.width
        if kept >= layers:
            what = f"the encoder keeps {kept} layers of a projector that has {layers}"
            raise SettingsError("simclr_v2.projector_layers", what, f"set `layers` of the encoder below {layers}")
        draw = seed.child("projector")
        middle = (middle_layer(width, draw.child(i)) for i in range(kept, layers - 1))
        projector = nn.Sequential(*middle, last_layer(width, settings.projection, draw.child("last")))
        self.projector = projector.to(next(encoder.module.parameters()).device)
        self.encode = settings.prepared(encoder.module)
        self.state = nn.ModuleDict({"encoder": encoder.module, "projector": self.projector}).train()

    def parameters(self) -> list[nn.Parameter]:
        """Weights of encoder and projector."""
        return list(self.state.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """NT-Xent of one batch, and the embeddings' standard deviation (about 1 healthy, towards 0 collapsed)."""
        settings = self.settings
        h = settings.forward(self.encode, settings.views(batch))
        z1, z2 = settings.forward(self.projector, h).chunk(2)
        with torch.no_grad():
            numbers = {"feature_std": spread(h)}
        return nt_xent(z1, z2, settings.temperature), numbers

    def after_step(self) -> None:
        """Nothing."""
