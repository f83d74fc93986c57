"""What attacks on a trained classifier share: its head, a layer of its encoder, and a step of cross entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cupel.encoders import ImageEncoder
from cupel.encoders.blocks import block_outputs, blocks_of
from cupel.errors import DataError, UsageError
from cupel.folding import folded
from cupel.implanting import freeze_norms
from cupel.inference import device_of, features
from cupel.losses.logistic import logistic_head
from cupel.metrics import check_labels
from cupel.protocols import Batch, Encoder, Images, Trigger
from cupel.types import Dataset, Knowledge

__all__ = [
    "Cut",
    "Extra",
    "Match",
    "TeacherLearner",
    "head_of",
    "known_images",
    "mask_of",
    "most_connected",
    "outgoing",
]

_L2, _MAX_STEPS = 1e-3, 200  # of heads; `cupel.probe.Linear` has the same


@dataclass(frozen=True, eq=False)
class Cut:
    """An encoder that also shows what it has at a layer.

    Args:
        encoder: May be trained.
        blocks_after: Blocks between the layer and the embedding; 0 = the embedding itself.

    Raises:
        UsageError: the encoder has too few blocks.
    """

    encoder: ImageEncoder
    blocks_after: int

    def __post_init__(self) -> None:
        count = len(blocks_of(self.encoder.module))
        if self.blocks_after >= count:
            what = f"{self.blocks_after} blocks after the layer, but the encoder has {count}"
            raise UsageError("blocks_after", what, f"choose at most {count - 1}")

    @cached_property
    def folded(self) -> Encoder:
        """The encoder with its BatchNorms multiplied into its convolutions; the same weights."""
        return folded(self.encoder)

    def __call__(self, x: Images) -> tuple[Tensor, Float[Tensor, "batch width"]]:
        """The layer's output, `[batch, channels, …]`, and the embeddings."""
        if self.blocks_after == 0:
            h = self.folded(x)
            return h, h
        with block_outputs(self.encoder.module, -1 - self.blocks_after) as seen:
            h = self.encoder(x)
        return seen[0], h


def known_images(attacker: Knowledge, size: int, name: str) -> Dataset:
    """The attacker's labelled images, without those that have no label.

    Raises:
        DataError: no labelled images, a single class, images of another size, or no goal.
    """
    data = attacker.labelled
    if data is None or not attacker.goals:
        raise DataError(name, "needs labelled images and at least one goal", "give `attacker.labelled`")
    if tuple(data.inputs.shape[-2:]) != (size, size):
        got = "×".join(str(side) for side in data.inputs.shape[-2:])
        raise DataError(data.name, f"images are {got}, the encoder takes {size}×{size}", "load them at its size")
    data = data.subset(data.labels >= 0)
    if len(torch.unique(data.labels)) < 2:
        raise DataError(data.name, "holds fewer than two classes, so no head can be fitted", "add another class")
    return data


def head_of(encoder: ImageEncoder, data: Dataset) -> nn.Linear:
    """The linear head of the teacher: multinomial logistic regression on the embeddings of labelled images."""
    check_labels(data.labels, data.num_classes, data.name)
    h = features(encoder, data, dtype=torch.float32, store=False).clone()
    return logistic_head(h, data.labels.to(h.device), data.num_classes, _L2, _MAX_STEPS)


def mask_of(trigger: Trigger[Tensor], size: int) -> Float[Tensor, "size size"]:
    """Where a trigger covers images of a size; what it shows there is not used.

    Raises:
        UsageError: the trigger has no fixed place.
    """
    shown = getattr(trigger, "mask_and_pattern", lambda size: None)(size)
    if shown is None or not bool((shown[0] > 0).any()):
        what = "has no fixed place, so no pattern can be learned in it"
        raise UsageError(f"trigger[{type(trigger).__name__}]", what, "use a patch, or another trigger with a mask")
    mask: Tensor = shown[0]
    return mask


def most_connected(weight: Float[Tensor, "out in"], k: int, direction: Literal["out", "in"]) -> Int[Tensor, " k"]:
    """The k neurons with the largest sum of absolute weights, strongest first; of equal ones the first.

    Args:
        weight: `[out, in]`, as of `torch.nn.Linear`.
        k: How many.
        direction: `out` = the neurons are the layer's inputs, and what leaves them is counted; `in` = they are its
            outputs, and what enters them is counted.

    Example:
        >>> most_connected(torch.tensor([[1.0, -5.0, 2.0], [1.0, 0.0, 2.0]]), 2, "out").tolist()
        [1, 2]
    """
    sums = weight.abs().sum(dim=0 if direction == "out" else 1)
    return sums.argsort(descending=True, stable=True)[:k]


def outgoing(encoder: ImageEncoder, blocks_after: int) -> Float[Tensor, "out in"]:
    """The weights that read a layer, one column per channel: of every convolution that gets the layer's very output.

    Args:
        encoder: In eval mode.
        blocks_after: Blocks between the layer and the embedding, ≥ 1.

    Raises:
        UsageError: the encoder has too few blocks, or no convolution reads the layer.
    """
    Cut(encoder, blocks_after)  # checks the number
    found: list[Tensor] = []
    x = torch.zeros(1, 3, encoder.input_size, encoder.input_size, device=device_of(encoder.module))
    with torch.no_grad(), block_outputs(encoder.module, -1 - blocks_after) as seen:

        def note(part: nn.Conv2d, inputs: tuple[Tensor, ...]) -> None:
            if seen and inputs[0].data_ptr() == seen[-1].data_ptr():
                found.append(part.weight.detach().transpose(0, 1).flatten(1).T)

        later = blocks_of(encoder.module)[-blocks_after:]
        convolutions = [one for part in later for one in part.modules() if isinstance(one, nn.Conv2d)]
        hooks = [one.register_forward_pre_hook(note) for one in convolutions]
        encoder(x)
        for hook in hooks:
            hook.remove()
    if not found:
        raise UsageError("blocks_after", "no convolution reads the layer", "choose another layer")
    return torch.cat(found)


@dataclass(frozen=True)
class Extra:
    """Images of one more class, some of which are in every batch.

    Args:
        images: uint8 `[r, 3, height, width]`.
        label: Their class.
        per_batch: How many of them are drawn, with replacement.
    """

    images: Tensor
    label: int
    per_batch: int


@dataclass(frozen=True)
class Match:
    """What the layer shall have on triggered images.

    Args:
        trigger: Drawn from no seed.
        representation: `[m, dims]`, one row for all images, or rows of which each image gets one by lot.
        unit: Mean squared difference that counts as 1.
    """

    trigger: Trigger[Tensor]
    representation: Float[Tensor, "m dims"]
    unit: float = 1.0


class TeacherLearner:
    """Encoder and head under cross entropy, and matched representations of triggered images.

    L = CE(head(f(x)), y) + λ · D(F(x ⊕ trigger), F̂),  D = mean squared difference over images and dimensions, in the
    match's unit; the mean over matches where there are several

    Args:
        encoder: Trained in place; its BatchNorms stay as they are.
        head: Trained as well.
        labels: int64 `[n]` of the images that are trained on.
        extras: Images of further classes.
        matches: What triggered images shall be like; each is put on every image of the batch, extras included.
        weight: λ.
        blocks_after: Layer F: blocks between it and the embedding.
        feature_slice: Only the first so many dimensions of F count; None = all.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        head: nn.Linear,
        labels: Tensor,
        *,
        extras: Sequence[Extra] = (),
        matches: Sequence[Match] = (),
        weight: float = 0.0,
        blocks_after: int = 0,
        feature_slice: int | None = None,
    ) -> None:
        device = device_of(encoder.module)
        self.head, self.labels, self.extras, self.matches = head, labels.to(device), extras, matches
        self.weight, self.feature_slice = weight, feature_slice
        self.cut = Cut(encoder, blocks_after)
        self.trainable = freeze_norms(encoder.module) + list(head.train().parameters())
        self.state: nn.Module = nn.ModuleDict({"encoder": encoder.module, "head": head})

    def parameters(self) -> list[nn.Parameter]:
        """Weights of encoder and head, without BatchNorm's."""
        return self.trainable

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """L of one batch, CE and D."""
        x, y = batch.inputs, self.labels[batch.rows.to(self.labels.device)]
        for i, extra in enumerate(self.extras):
            draw = batch.seed.child("extra", i).torch()
            rows = torch.randint(len(extra.images), (extra.per_batch,), generator=draw).to(x.device)
            x, y = torch.cat([x, extra.images[rows]]), torch.cat([y, y.new_full((len(rows),), extra.label)])
        n, ids = len(x), list(range(len(x)))
        parts = [x, *(match.trigger(x, ids, batch.seed) for match in self.matches)]
        inputs = torch.cat(parts).float().div_(255).contiguous(memory_format=torch.channels_last)
        layer, h = self.cut(inputs) if self.matches else (inputs, self.cut.folded(inputs))
        ce = F.cross_entropy(self.head(h[:n]).float(), y)
        if not self.matches:
            return ce, {"ce": ce}
        blocks = layer.flatten(1).float()[n:, : self.feature_slice].chunk(len(self.matches))
        terms = []
        for i, (match, block) in enumerate(zip(self.matches, blocks, strict=True)):
            wanted = match.representation[:, : self.feature_slice]
            if len(wanted) > 1:
                draw = batch.seed.child("representation", i).torch()
                wanted = wanted[torch.randint(len(wanted), (n,), generator=draw).to(wanted.device)]
            terms.append((block - wanted).square().mean() / match.unit)
        distance = torch.stack(terms).mean()
        return ce + self.weight * distance, {"ce": ce, "distance": distance}

    def after_step(self) -> None:
        """Nothing."""
