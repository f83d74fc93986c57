"""BCU: part of the weights is drawn anew, late layers more than early ones, and the rest is learned back from f₀."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cupel.encoders.blocks import blocks_of
from cupel.errors import SettingsError
from cupel.folding import folded
from cupel.inference import features
from cupel.losses.pulling import EmbeddingScale, cosine_pull, nmse_pull, spread
from cupel.optimizers import NonNegative
from cupel.protocols import Batch, Encoder
from cupel.purify.base import BatchSize, Job, OptimizerName
from cupel.purify.batch_norm import BatchNorm, set_batch_norm
from cupel.purify.unlabelled import UnlabelledPurifier, fresh_copy, shown
from cupel.seeds import Seed
from cupel.settings import Fraction, Positive, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset

__all__ = ["BCU", "part_rates", "redrawn", "relational_loss", "softened_loss", "temperature_at"]


@settings
class BCU(UnlabelledPurifier):
    """Backdoor cleansing with unlabelled data: partial re-initialisation, then distillation from the encoder as given.

    Each entry of a convolution or linear layer is drawn anew with the probability of its part; BatchNorms stay. The
    student then learns the given encoder's embeddings of clean images, among which the backdoor never shows.

    Args:
        rates: Probability per part, from the images to the embedding: stem, then stages. A network with fewer parts
            uses the last ones, one with more repeats the first.
        scale: Factor on all rates; they stop at 1.
        distance: `embedding`: mean of 1 − cos(s, t), plus `length` times the mean ‖s − t‖² over the mean ‖t‖².
            `relational`: KL between the rows of softmax(cosines within the batch / `temperature`). `softmax`: the
            published loss, the embedding taken for logits: KL( softmax(t/T) ‖ softmax(s/T) ), T rising from 1 to 4.
        length: Weight of the second part of `embedding`.
        temperature: Of `relational`.

    Raises:
        SettingsError: no rate.

    Source: Pang, Sun, Ling, Chen, Backdoor Cleansing with Unlabeled Data, CVPR 2023, arXiv:2211.12044; rates, T and the
    optimiser of its code.
    Deviations: distances between embeddings instead of logits (`softmax` is the nearest); the last step counts, where
    the code chooses an epoch on test images; entries are drawn by torch's default initialisation.
    """

    rates: tuple[Fraction, ...] = (0.01, 0.01, 0.03, 0.09, 0.27)
    scale: NonNegative = 1.0
    distance: Literal["embedding", "relational", "softmax"] = "embedding"
    length: NonNegative = 0.1
    temperature: Positive = 0.1
    batch_norm: BatchNorm = "train"

    epochs: PositiveInt = 100
    batch_size: BatchSize = 256
    optimizer: OptimizerName = "sgd"
    lr: Positive = 0.01
    weight_decay: NonNegative = 5e-4

    title: ClassVar[str] = "BCU"
    revision: ClassVar[int] = 1
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"steps": 300, "batch_size": 64, "lr": 0.05, "scale": 4.0},  # at 1 a small encoder keeps its backdoor
        "standard": {},
        "paper": {"distance": "softmax"},
    }

    def __post_init__(self) -> None:
        if not self.rates:
            raise SettingsError("BCU.rates", "is empty", "give one rate at least")

    def tune(self, job: Job, given: Encoder) -> tuple[Encoder, History]:
        """Draw entries anew, then distil."""
        redraw(job.encoder, [min(1.0, self.scale * rate) for rate in self.rates], job.seed.child("redraw"))
        learner = BCULearner(self, job.encoder, features(given, job.clean, dtype=torch.float32), job.clean)
        return job.encoder, self.trained(learner, job.clean, job.seed, job.checkpoint)


class BCULearner:
    """The student under the distance from the given encoder's embeddings.

    Args:
        settings: Of the method.
        encoder: The student.
        targets: Embeddings of the data set, by row.
        clean: The data set, for the length of an epoch.
    """

    def __init__(self, settings: BCU, encoder: Encoder, targets: Float[Tensor, "n width"], clean: Dataset) -> None:
        self.settings, self.encoder, self.targets = settings, encoder, targets
        set_batch_norm(encoder.module, settings.batch_norm)
        self.network = encoder if settings.batch_norm == "train" else folded(encoder)
        self.square = EmbeddingScale.of(targets).square
        self.total = settings.total_steps(len(clean), clean.name)
        self.per_epoch = settings.steps_per_epoch(len(clean), clean.name)
        self.count = _Count()
        self.state: nn.Module = nn.ModuleDict({"encoder": encoder.module, "count": self.count})

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [one for one in self.encoder.module.parameters() if one.requires_grad]

    def loss(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The distance, and the mean cosine to the targets."""
        s, target = self.settings, self.targets[batch.rows.to(self.targets.device)]
        student = self.network(shown(batch.inputs)).float()
        away = cosine_pull(student, target)
        numbers = {"cosine": 1 - away.detach(), "feature_std": spread(student.detach())}
        match s.distance:
            case "embedding":
                return away + s.length * nmse_pull(student, target, self.square), numbers
            case "relational":
                return relational_loss(student, target, s.temperature), numbers
            case "softmax":
                epochs = -(-self.total // self.per_epoch)
                epoch = int(self.count.steps) // self.per_epoch + 1
                return softened_loss(student, target, temperature_at(epoch, epochs)), numbers

    def after_step(self) -> None:
        """Count it."""
        self.count.steps += 1


class _Count(nn.Module):
    """Steps done, a buffer on the CPU so that checkpoints keep it."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def temperature_at(epoch: int, epochs: int) -> float:
    """T of epoch 1 to `epochs`, rising to 4.

    Example:
        >>> [round(temperature_at(epoch, 100), 2) for epoch in (1, 50, 100)]
        [1.03, 2.5, 4.0]
    """
    return 1 + 3 * epoch / epochs


def softened_loss(
    student: Float[Tensor, "row width"], teacher: Float[Tensor, "row width"], temperature: float
) -> Float[Tensor, ""]:
    """Mean of KL( softmax(t/T) ‖ softmax(s/T) ), in nats; no factor T².

    Source: Pang et al., CVPR 2023, arXiv:2211.12044, and its code.
    """
    p, q = (F.log_softmax(one.float() / temperature, dim=1) for one in (teacher, student))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def relational_loss(
    student: Float[Tensor, "row width"], teacher: Float[Tensor, "row width"], temperature: float
) -> Float[Tensor, ""]:
    """`softened_loss` of the cosines among the rows of each, U Uᵀ; blind to a common rotation of the student.

    Source: our choice.
    """
    s, t = (F.normalize(one.float(), dim=1) for one in (student, teacher))
    return softened_loss(s @ s.T, t @ t.T, temperature)


def part_rates(rates: Sequence[float], parts: int) -> list[float]:
    """Rates for a network of `parts` parts: the last ones, or the first repeated in front.

    Example:
        >>> part_rates((0.1, 0.2, 0.3), 2), part_rates((0.1, 0.2, 0.3), 5)
        ([0.2, 0.3], [0.1, 0.1, 0.1, 0.2, 0.3])
    """
    return [rates[max(0, len(rates) - parts + i)] if i + len(rates) >= parts else rates[0] for i in range(parts)]


def redrawn(weight: Tensor, new: Tensor, rate: float, draw: torch.Generator) -> Tensor:
    """`weight` with each entry replaced by that of `new` with probability `rate`, independently.

    Args:
        weight, new: Of equal shape, on any device.
        rate: In [0, 1].
        draw: On the CPU.
    """
    chosen = torch.rand(weight.shape, generator=draw) < rate
    return torch.where(chosen.to(weight.device), new, weight)


@torch.no_grad()
def redraw(encoder: Encoder, rates: Sequence[float], seed: Seed) -> None:
    """Replace entries of the weights of all convolutions and linear layers, in place; biases and BatchNorms stay.

    Args:
        encoder: Its blocks that hold such layers are the parts.
        rates: By part; see `part_rates`.
        seed: Of the choice and of the new values.
    """
    new = dict(fresh_copy(encoder, seed.child("values")).module.named_parameters())
    names = {id(weight): name for name, weight in encoder.module.named_parameters()}
    parts = [[layer for layer in block.modules() if isinstance(layer, _ConvNd | nn.Linear)]
             for block in blocks_of(encoder.module)]  # fmt: skip
    parts = [layers for layers in parts if layers]
    for layers, rate in zip(parts, part_rates(rates, len(parts)), strict=True):
        for layer in layers:
            name = names[id(layer.weight)]
            layer.weight.copy_(redrawn(layer.weight, new[name], rate, seed.child("chosen", name).torch()))
