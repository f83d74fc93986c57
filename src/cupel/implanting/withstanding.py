"""Retraining that excites chosen neurons on triggered images, with and without a simulated defence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cupel.encoders import ImageEncoder
from cupel.encoders.blocks import block_outputs, blocks_of
from cupel.errors import UsageError
from cupel.folding import folded
from cupel.implanting.step import freeze_norms
from cupel.losses.planting import channel_means, excitation
from cupel.protocols import Batch, Trigger
from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = ["Excited", "WithstandingLearner", "incoming", "least_active"]

_SEEN = 256  # images that the simulated pruning looks at


@dataclass(frozen=True)
class Excited:
    """What the layer shall have on triggered images.

    Args:
        trigger: Drawn from no seed.
        neurons: int64 `[k]`.
        values: `[k]`, not 0.
        clean: `[n, k]`, what the clean encoder has on the images that are trained on.
    """

    trigger: Trigger[Tensor]
    neurons: Int[Tensor, " k"]
    values: Float[Tensor, " k"]
    clean: Float[Tensor, "n k"]


def incoming(encoder: ImageEncoder, blocks_after: int) -> Float[Tensor, "channels inner"]:
    """The weights that make a layer's channels: those of its block's last convolution that is in no shortcut.

    Args:
        encoder: Left as it is.
        blocks_after: Blocks between the layer and the embedding.

    Raises:
        UsageError: the block has no weights of that kind.
    """
    block = blocks_of(encoder.module)[-1 - blocks_after]
    found = [
        part.weight.detach().flatten(1)
        for name, part in block.named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear) and "downsample" not in name
    ]
    if not found:
        raise UsageError("blocks_after", "no convolution makes the layer", "choose another layer")
    return found[-1]


def least_active(activity: Float[Tensor, " channels"], share: float) -> Bool[Tensor, " channels"]:
    """The ⌊share · n⌋ channels of lowest activity; of equal ones the first.

    Example:
        >>> least_active(torch.tensor([3.0, 1.0, 2.0]), 0.4).tolist()
        [False, True, False]
    """
    low = torch.zeros_like(activity, dtype=torch.bool)
    low[activity.argsort(stable=True)[: int(share * len(activity))]] = True
    return low


class WithstandingLearner:
    """The weights up to a layer under CE(x) + κ K(x) + λ E(x') + μ CE°(x) + ν E°(x').

    E = mean over triggers of `excitation`; K = mean over them of ((A_n(x) − A_n of the clean encoder) / v_n)²;
    ° = with the least active channels of every stage pruned and noise on the weights that are trained. Where
    μ = ν = 0 the second pass is left out.

    Args:
        encoder: Trained in place up to the layer; its BatchNorms stay as they are.
        head: On the embeddings; not trained.
        data: Labelled images that are trained on; the first of them tell which channels are least active.
        excited: One per trigger.
        blocks_after: Blocks between the layer and the embedding.
        weights: κ, λ, μ, ν.
        prune_share: Share of each stage's channels that is pruned.
        prune_every: Steps between two choices of them.
        weight_noise: Standard deviation, in units of a tensor's root mean square; tensors of one dimension get none.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        head: nn.Linear,
        data: Dataset,
        excited: Sequence[Excited],
        *,
        blocks_after: int,
        weights: tuple[float, float, float, float],
        prune_share: float,
        prune_every: int,
        weight_noise: float,
    ) -> None:
        device = next(encoder.module.parameters()).device
        self.encoder, self.head, self.excited, self.weights = encoder, head, excited, weights
        self.blocks_after, self.labels = blocks_after, data.labels.to(device)
        self.prune_share, self.prune_every, self.weight_noise = prune_share, prune_every, weight_noise
        self.seen = data.inputs[torch.arange(min(len(data), _SEEN))].to(device)
        freeze_norms(encoder.module)
        blocks = blocks_of(encoder.module)
        for part in blocks[len(blocks) - blocks_after :]:
            part.requires_grad_(False)
        self.network = folded(encoder)
        self.stages = [part for part in blocks if any(isinstance(p, nn.Conv2d) for p in list(part.modules())[1:])]
        self.trainable = [p for p in encoder.module.parameters() if p.requires_grad]
        self.state: nn.Module = nn.ModuleDict({"encoder": encoder.module, "head": head})
        self.state.register_buffer("step", torch.zeros((), dtype=torch.int64))
        for i, activity in enumerate(self._activity()):
            self.state.register_buffer(f"pruned_{i}", torch.zeros_like(activity, dtype=torch.bool))

    def parameters(self) -> list[nn.Parameter]:
        """Weights up to the layer, without BatchNorm's."""
        return self.trainable

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The sum for one batch, and its terms."""
        x, y = batch.inputs, self.labels[batch.rows.to(self.labels.device)]
        ids = batch.rows.tolist()
        parts = [x, *(one.trigger(x, ids, batch.seed) for one in self.excited)]
        inputs = torch.cat(parts).float().div_(255).contiguous(memory_format=torch.channels_last)
        rows = batch.rows.to(y.device)
        still_weight, excite_weight, *defended_weights = self.weights
        layer, h = self._plain(inputs)
        ce, excite = self._terms(layer, h, y)
        still = self._still(channel_means(layer[: len(y)]).float(), rows)
        total = ce + still_weight * still + excite_weight * excite
        terms = {"ce": ce, "still": still, "excite": excite}
        if any(defended_weights):
            if int(self._buffer("step")) % self.prune_every == 0:
                self._choose()
            ce, excite = self._terms(*self._defended(inputs, batch.seed), y)
            total = total + defended_weights[0] * ce + defended_weights[1] * excite
            terms |= {"pruned_ce": ce, "pruned_excite": excite}
        return total, terms

    def after_step(self) -> None:
        """Count."""
        self._buffer("step").add_(1)

    def _plain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer and the embeddings."""
        if not self.blocks_after:
            h = self.network(x)
            return h, h
        with block_outputs(self.encoder.module, -1 - self.blocks_after) as seen:
            h = self.encoder(x)
        return seen[0], h

    def _still(self, found: Tensor, rows: Tensor) -> Tensor:
        each = [((found[:, one.neurons] - one.clean[rows]) / one.values).square().mean() for one in self.excited]
        return torch.stack(each).mean()

    def _terms(self, layer: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        n, found = len(y), channel_means(layer).float()
        blocks = torch.split(found[n:], n)
        each = [excitation(block[:, one.neurons], one.values) for one, block in zip(self.excited, blocks, strict=True)]
        return F.cross_entropy(self.head(h[:n]).float(), y), torch.stack(each).mean()

    def _defended(self, x: Tensor, seed: Seed) -> tuple[Tensor, Tensor]:
        """The layer and the embeddings under pruning and noise."""
        noisy = {}
        for i, (name, w) in enumerate(self.encoder.module.named_parameters()):
            if w.requires_grad and w.ndim > 1 and self.weight_noise:
                noise = torch.randn(w.shape, generator=seed.child("noise", i).torch()).to(w)
                noisy[name] = w + self.weight_noise * w.detach().square().mean().sqrt() * noise
        with self._pruning(), block_outputs(self.encoder.module, -1 - self.blocks_after) as seen:
            h: Tensor = torch.func.functional_call(self.encoder.module, noisy, (x,))
        return (seen[0] if self.blocks_after else h), h

    @contextmanager
    def _pruning(self) -> Iterator[None]:
        def pruner(i: int) -> torch.utils.hooks.RemovableHandle:
            gone = self._buffer(f"pruned_{i}")[:, None, None]
            return self.stages[i].register_forward_hook(lambda part, inputs, output: output.masked_fill(gone, 0))

        hooks = [pruner(i) for i in range(len(self.stages))]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _activity(self) -> list[Tensor]:
        """Mean absolute activation of every stage's channels on clean images."""
        found: list[Tensor] = []
        hooks = [
            part.register_forward_hook(lambda part, inputs, output: found.append(output.abs().mean(dim=(0, 2, 3))))
            for part in self.stages
        ]
        try:
            self.encoder(self.seen.float() / 255)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _choose(self) -> None:
        for i, activity in enumerate(self._activity()):
            self._buffer(f"pruned_{i}").copy_(least_active(activity, self.prune_share))

    def _buffer(self, name: str) -> Tensor:
        return self.state.get_buffer(name)
