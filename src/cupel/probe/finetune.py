"""Fine-tuning: a copy of the encoder, or its last blocks, trained together with a linear head."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cupel.augment import SimCLRAugment
from cupel.encoders import ImageEncoder
from cupel.encoders.blocks import blocks_of
from cupel.errors import DataError, SettingsError
from cupel.implanting import inherited
from cupel.inference import FrozenProbe, device_of, features
from cupel.metrics import check_labels
from cupel.optimizers import Recipe
from cupel.probe.linear import Linear
from cupel.protocols import Batch, Encoder
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.train import fit
from cupel.types import Dataset, Need

__all__ = ["FineTune", "blocks_of"]


@settings
class FineTune(Recipe):
    """Cross entropy on labelled images; the encoder that comes out is the classifier's own.

    Args:
        blocks: Last blocks that are trained (see `blocks_of`); None = all of the encoder, 0 = none of it.
        head: Where the linear head starts: `linear` = at the linear probe's solution, `random` = as `nn.Linear` does.
        batch_norm: `train` = statistics of the batch in the trained blocks, as usual; `frozen` = none of the BatchNorms
            is changed. BatchNorms of blocks that are not trained never change.
        augment: How a training image is shown; None = as it is.
        reinitialise: Last blocks that are drawn anew first, at most `blocks`: weights Xavier uniform, biases 0,
            BatchNorms as new ones. The head starts at what the encoder gives after that.

    A head seed draws the order, the views, a random head and blocks that are drawn anew.

    The tuned encoder carries the manifest of the given one, and that of poisoned images it was tuned on.

    Source: the protocol of Chen et al., SimCLR, ICML 2020, appendix B.5; Kumar et al., ICLR 2022, arXiv:2202.10054, for
        starting at the linear probe; Zhang et al., Red Alarm for Pre-trained Models, Machine Intelligence Research
        2023, arXiv:2101.06969, for drawing the last layers anew as a defence. Steps and rates are our choice.
    """

    blocks: Annotated[int, Field(ge=0)] | None = None
    head: Literal["linear", "random"] = "linear"
    batch_norm: Literal["train", "frozen"] = "train"
    augment: SimCLRAugment | None = None
    reinitialise: Annotated[int, Field(ge=0)] = 0

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 64
    optimizer: Literal["adam", "adamw", "sgd", "lars"] = "sgd"
    lr: Positive = 0.01
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.blocks is not None and self.reinitialise > self.blocks:
            what = f"{self.reinitialise} blocks are drawn anew, but only {self.blocks} trained"
            raise SettingsError("FineTune.reinitialise", what, "raise `blocks`, or leave it out")

    def fit(self, encoder: Encoder, train: Dataset, seed: Seed) -> FrozenProbe:
        """A classifier with an encoder of its own; the given one stays as it is.

        Raises:
            DataError: no rows, or rows without label; the encoder cannot be copied block by block.
            UsageError: a class index outside [0, num_classes).
        """
        check_labels(train.labels, train.num_classes, train.name)
        if self.reinitialise and isinstance(encoder, ImageEncoder):
            encoder = _redrawn(encoder, self.reinitialise, seed.child("reinitialise"))
        return self.tuned(encoder, self._head(encoder, train, seed), train, seed)

    def tuned(self, encoder: Encoder, head: nn.Linear, train: Dataset, seed: Seed) -> FrozenProbe:
        """Copies of an encoder and of a head that is there already, trained together; `reinitialise` plays no part.

        Raises:
            DataError: the encoder cannot be copied block by block.
        """
        if not isinstance(encoder, ImageEncoder):
            raise DataError("finetune", f"cannot train a {type(encoder).__name__}", "use a probe on frozen embeddings")
        own = encoder.copy(manifest=inherited(encoder.card.manifest, train.manifest))
        device = device_of(encoder.module)
        start = copy.deepcopy(head).train().requires_grad_(True).to(device)
        learner = _Learner(self, own, start, train.labels)
        recipe = dataclasses.replace(self, batch_size=min(self.batch_size, len(train)))
        with torch.enable_grad():
            fit(learner, train, recipe, seed, label="finetune", device=device)
        own.module.eval().requires_grad_(True)
        return FrozenProbe(own, learner.head.eval())

    def _head(self, encoder: Encoder, train: Dataset, seed: Seed) -> nn.Linear:
        if self.head == "linear":
            start = Linear(normalise=False, subsample=1.0)
            made = start.fit_features(features(encoder, train), train.labels, train.num_classes, seed)
            assert isinstance(made, nn.Linear)
            return made
        made, draw = nn.Linear(encoder.width, train.num_classes), seed.child("head").torch()
        for part in made.parameters():
            nn.init.uniform_(part, -(encoder.width**-0.5), encoder.width**-0.5, generator=draw)
        return made


def _redrawn(encoder: ImageEncoder, count: int, seed: Seed) -> ImageEncoder:
    """A copy whose last `count` blocks are as new."""
    made, draw = encoder.copy(), seed.torch()
    parts = blocks_of(made.module)
    for block in parts[max(0, len(parts) - count) :]:
        for part in block.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.reset_parameters()
            elif isinstance(part, nn.Conv2d | nn.Linear):
                drawn = torch.empty(part.weight.shape)  # on the CPU, where the generator is
                nn.init.xavier_uniform_(drawn, generator=draw)
                with torch.no_grad():
                    part.weight.copy_(drawn)
                    if part.bias is not None:
                        part.bias.zero_()
    return made


class _Learner:
    """Encoder and head under cross entropy."""

    def __init__(self, settings: FineTune, encoder: ImageEncoder, head: nn.Linear, labels: Tensor) -> None:
        self.settings, self.encoder, self.head = settings, encoder, head
        self.labels = labels.to(head.weight.device)
        self.state: nn.Module = nn.ModuleDict({"encoder": encoder.module, "head": head})
        encoder.module.eval().requires_grad_(False)
        parts = blocks_of(encoder.module)
        count = len(parts) if settings.blocks is None else min(settings.blocks, len(parts))
        for part in parts[len(parts) - count :]:
            part.requires_grad_(True)
            for one in part.modules():
                norm = isinstance(one, nn.modules.batchnorm._BatchNorm)
                one.training = not (norm and settings.batch_norm == "frozen")
                if norm and settings.batch_norm == "frozen":
                    one.requires_grad_(False)

    def parameters(self) -> list[nn.Parameter]:
        """Weights of the trained blocks and the head."""
        return [p for p in self.state.parameters() if p.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean cross entropy, and the share of the batch that is classified rightly."""
        if self.settings.augment is None:
            x = batch.inputs.float().div_(255).contiguous(memory_format=torch.channels_last)
        else:
            x = self.settings.augment(batch.inputs, batch.seed.child("augment").torch(batch.inputs.device))
        y = self.labels[batch.rows.to(self.labels.device)]
        logits = self.head(self.encoder(x)).float()
        return F.cross_entropy(logits, y), {"accuracy": (logits.argmax(1) == y).float().mean()}

    def after_step(self) -> None:
        """Nothing."""
