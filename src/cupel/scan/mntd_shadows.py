"""MNTD's shadow models: many tiny classifiers trained side by side, half of them with a trojan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy

from cupel.optimizers import Recipe
from cupel.protocols import Batch
from cupel.scan.mntd_jumbo import Trojan, draw_trojan, num_poisoned
from cupel.seeds import Seed
from cupel.train import fit
from cupel.types import Dataset

__all__ = ["ShadowNets", "poisoned_rows", "train_shadows"]

_DROPOUT = 0.5
_TOGETHER = 16  # models in one pass: more of them leave the caches


class ShadowNets(nn.Module):
    """M independent small CNNs whose layers are stacked, so that one pass runs them all.

    Conv 4×4 stride 2 → conv 3×3 stride 2 → conv 3×3 → Linear → ReLU → dropout → Linear, ReLUs between.

    Args:
        count: M.
        size: Side of the images in pixels.
        num_classes: Logits of each.
        width: Channels of the first convolution; the others have twice as many.
        seed: Model m starts from `seed.child("init", m)`, whatever the others are.

    Source: our choice, smaller than the CIFAR-10 network of Xu et al. (two pairs of convolutions with max-pooling).
    """

    def __init__(self, count: int, size: int, num_classes: int, width: int, seed: Seed) -> None:
        super().__init__()
        side, hidden = math.ceil((size // 2) / 2), 4 * width
        self.count, self.size, self.hidden = count, size, hidden
        shapes = {
            "conv1": (width, 3, 4, 4),
            "conv2": (2 * width, width, 3, 3),
            "conv3": (2 * width, 2 * width, 3, 3),
            "fc1": (hidden, 2 * width * side * side),
            "fc2": (num_classes, hidden),
        }
        draws = [seed.child("init", m).torch() for m in range(count)]
        for name, shape in shapes.items():
            bound = math.prod(shape[1:]) ** -0.5
            for part, dims in (("weight", shape), ("bias", shape[:1])):
                made = torch.stack([torch.empty(dims).uniform_(-bound, bound, generator=draw) for draw in draws])
                # biases follow the ReLUs of many units that must not be dead: Kaiming's gain for the weights alone
                self.register_parameter(f"{name}_{part}", nn.Parameter(made * (6**0.5 if part == "weight" else 1.0)))

    def forward(self, x: Float[Tensor, "models n 3 height width"]) -> Float[Tensor, "models n classes"]:
        """Logits of each model's own images, in evaluation."""
        return self.logits(x, slice(None), None)

    def logits(self, x: Tensor, which: slice, keep: Tensor | None) -> Tensor:
        """Logits of some of the models; `keep` is multiplied onto the hidden layer."""
        models, n = x.shape[:2]
        h = (x - 0.5).mul(2).transpose(0, 1).flatten(1, 2)
        for name, stride in (("conv1", 2), ("conv2", 2), ("conv3", 1)):
            weight, bias = self._part(name, which)
            h = conv2d(h, weight.flatten(0, 1), bias.flatten(), stride, 1, groups=models).relu()
        h = h.view(n, models, -1).transpose(0, 1)
        for name in ("fc1", "fc2"):
            weight, bias = self._part(name, which)
            h = torch.baddbmm(bias[:, None], h, weight.transpose(1, 2))
            if name == "fc1":
                h = h.relu() if keep is None else h.relu() * keep
        return h

    def _part(self, name: str, which: slice) -> tuple[Tensor, Tensor]:
        weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
        assert isinstance(weight, Tensor)
        assert isinstance(bias, Tensor)
        return weight[which], bias[which]


def poisoned_rows(n: int, trojan: Trojan | None, seed: Seed) -> tuple[Int[Tensor, " m"], Bool[Tensor, " m"]]:
    """The training set of a shadow model: rows of the clean data, and which of them bear the trojan.

    All n clean rows come first; num_poisoned(n, rate) rows, drawn without repetition, follow with the trojan.

    Example:
        >>> rows, bears = poisoned_rows(100, None, Seed(0))
        >>> len(rows), int(bears.sum())
        (100, 0)
    """
    clean = torch.arange(n)
    more = 0 if trojan is None else num_poisoned(n, trojan.rate)
    rows = torch.cat([clean, torch.randperm(n, generator=seed.torch())[:more]])
    return rows, torch.arange(len(rows)) >= n


@dataclass(eq=False)
class _Shadows:
    """All shadow models under cross entropy, each on a training set of its own."""

    nets: ShadowNets
    images: Tensor
    labels: Tensor
    trojans: Sequence[Trojan | None]
    batch_size: int
    seed: Seed

    def __post_init__(self) -> None:
        n, count = len(self.images), len(self.trojans)
        self.sets = [poisoned_rows(n, one, self.seed.child("poison", m)) for m, one in enumerate(self.trojans)]
        size = self.nets.size
        self.cover, self.pattern = torch.zeros(count, 1, size, size), torch.zeros(count, 3, size, size)
        self.target = torch.zeros(count, dtype=torch.int64)
        for m, one in enumerate(self.trojans):
            if one is not None:
                self.cover[m], self.pattern[m], self.target[m] = one.opacity * one.mask, one.pattern, one.target
        self.clock = _Clock()
        self.state: nn.Module = nn.ModuleDict({"nets": self.nets, "clock": self.clock})

    def parameters(self) -> list[nn.Parameter]:
        """Of all models."""
        return list(self.nets.parameters())

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Sum over the models of their mean cross entropies; the models go through in groups, to stay in the caches."""
        step, device = int(self.clock.step), self.images.device
        drop = batch.seed.child("dropout").torch(device)
        losses, right = [], []
        for first in range(0, self.nets.count, _TOGETHER):
            which = slice(first, min(first + _TOGETHER, self.nets.count))
            models = range(which.start, which.stop)
            picks = [self._pick(m, step) for m in models]
            rows, bears = torch.stack([p[0] for p in picks]).to(device), torch.stack([p[1] for p in picks]).to(device)
            x = self.images[rows].float().div_(255)
            amount = self.cover[which, None].to(device) * bears[..., None, None, None]
            x = torch.lerp(x, self.pattern[which, None].to(device), amount)
            y = torch.where(bears, self.target[which, None].to(device), self.labels[rows])
            keep = torch.empty(len(models), rows.shape[1], self.nets.hidden, device=device)
            keep.bernoulli_(1 - _DROPOUT, generator=drop).div_(1 - _DROPOUT)
            logits = self.nets.logits(x, which, keep)
            losses.append(cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y).mean(1).sum())
            right.append((logits.detach().argmax(2) == y).float().mean(1))
        self.clock.step += 1
        return torch.stack(losses).sum(), {"accuracy": torch.cat(right).mean()}

    def _pick(self, model: int, step: int) -> tuple[Tensor, Tensor]:
        """The next batch of one model: it goes through a permutation of its set, then through the next."""
        rows, bears = self.sets[model]
        per_pass = len(rows) // self.batch_size
        turn, at = divmod(step, per_pass)
        order = torch.randperm(len(rows), generator=self.seed.child("order", model, turn).torch())
        some = order[at * self.batch_size : (at + 1) * self.batch_size]
        return rows[some], bears[some]

    def after_step(self) -> None:
        """Nothing."""


class _Clock(nn.Module):
    """The number of steps done, a buffer so that checkpoints keep it."""

    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))


def train_shadows(
    data: Dataset,
    num_classes: int,
    count: int,
    *,
    steps: int,
    batch_size: int,
    width: int,
    lr: float,
    seed: Seed,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
) -> tuple[ShadowNets, list[Trojan | None]]:
    """`count` shadow classifiers, of which every second one has a trojan of its own.

    Args:
        data: Labelled images.
        num_classes: Logits of each model.
        count: Models.
        steps: Of Adam, for each.
        batch_size: Images per model and step.
        width: See `ShadowNets`.
        lr: Of Adam.
        seed: First weights, trojans, order.
        device: Where to work.
        checkpoint: File that keeps the state for a resume.

    Returns:
        The models in evaluation, without gradients, and each one's trojan; None = benign.

    Source: Xu et al., MNTD, IEEE S&P 2021, arXiv:1910.03137, and its code.
    Deviations: the shadow data are taken as given (the code draws them with replacement); all models are trained side
    by side; a smaller network.
    """
    images = data.inputs[torch.arange(len(data))].to(device)
    size = int(images.shape[-1])
    trojans = [draw_trojan(size, num_classes, seed.child("trojan", m)) if m % 2 else None for m in range(count)]
    nets = ShadowNets(count, size, num_classes, width, seed).to(device)
    batch = min(batch_size, len(data))
    learner = _Shadows(nets, images, data.labels.to(device), trojans, batch, seed.child("data"))
    recipe = Recipe(steps=steps, batch_size=batch, optimizer="adam", lr=lr, schedule="constant", precision="fp32")
    with torch.enable_grad():
        # what a checkpoint must agree with: `fit` knows the recipe, the data and the seed alone
        own = seed.child(count, width, num_classes)
        fit(learner, data, recipe, own, label=f"mntd, {count} shadow models", device=device, checkpoint=checkpoint)
    return nets.eval().requires_grad_(False), trojans
