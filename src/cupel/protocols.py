"""The nouns of Cupel, as structural types. A method implements one of them by shape; there is nothing to inherit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cupel.seeds import Seed
from cupel.types import Dataset, Implanted, Knowledge, Need, Poisoned
from cupel.verdicts import Evidence, Reference, Verdict

__all__ = [
    "Batch",
    "Certified",
    "Certifier",
    "Classifier",
    "DataAttack",
    "Encoder",
    "EncoderAttack",
    "Filter",
    "Images",
    "Learner",
    "Objective",
    "Probe",
    "Purifier",
    "Scanner",
    "Training",
    "Trigger",
]

Images = Float[Tensor, "batch channel height width"]  # in [0, 1]
R = TypeVar("R")


class Batch(NamedTuple):
    """What one training step gets.

    Args:
        inputs: uint8 `[b, 3, height, width]`, on the device.
        rows: int64 `[b]`, the rows of the data set these inputs are.
        seed: Randomness of this step alone.
    """

    inputs: Tensor
    rows: Tensor
    seed: Seed


class Encoder(Protocol):
    """A frozen or trainable feature extractor. Inputs in [0, 1]; normalisation is inside."""

    @property
    def width(self) -> int: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def input_size(self) -> int: ...
    def __call__(self, x: Images, /) -> Float[Tensor, "batch width"]: ...


class Classifier(Protocol):
    """An encoder with a head: `[batch, 3, height, width]` in [0, 1] → logits."""

    @property
    def encoder(self) -> Encoder: ...
    @property
    def head(self) -> nn.Module: ...
    def __call__(self, x: Images, /) -> Float[Tensor, "batch classes"]: ...


class Certified(Protocol):
    """A classifier with a certificate: no patch of a size can change what it says of an image that is certified."""

    @property
    def patch(self) -> int: ...
    def predict(self, data: Dataset) -> Int[Tensor, " row"]: ...


class Certifier(Protocol):
    """Fits a certified classifier on an encoder."""

    def fit(self, encoder: Encoder, train: Dataset, seed: Seed) -> Certified: ...


class Trigger(Protocol[R]):
    """Puts the trigger on raw inputs (uint8 images); returns a new object; draws from (seed, id) alone."""

    def __call__(self, raw: R, ids: Sequence[int], seed: Seed, /) -> R: ...


class Learner(Protocol):
    """Everything that is trained together (encoder, projector, momentum copy, queue), with its loss."""

    @property
    def state(self) -> nn.Module: ...
    def parameters(self) -> list[nn.Parameter]: ...
    def loss(self, batch: Batch, /) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """The loss of one step, and scalars worth a look (detached; read only now and then)."""
        ...

    def after_step(self) -> None: ...


class Training(Protocol):
    """How long and with what optimiser something is trained; `Recipe` is one."""

    @property
    def epochs(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def precision(self) -> str: ...
    def steps_per_epoch(self, n: int, name: str) -> int: ...
    def total_steps(self, n: int, name: str) -> int: ...
    def lr_at(self, step: int, total: int) -> float: ...
    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer: ...


class Objective(Training, Protocol):
    """A pre-training method: settings only. `data` is what it will be trained on; labels only where it `needs` them."""

    @property
    def needs(self) -> frozenset[Need]: ...
    def learner(self, encoder: Encoder, data: Dataset, seed: Seed) -> Learner: ...


class DataAttack(Protocol):
    """Poisons the training data. It never sees the encoder."""

    @property
    def needs(self) -> frozenset[Need]: ...
    def poison(self, clean: Dataset, attacker: Knowledge, seed: Seed) -> Poisoned: ...


class EncoderAttack(Protocol):
    """Implants a backdoor in a trained encoder; leaves `clean` as it was."""

    @property
    def needs(self) -> frozenset[Need]: ...
    def implant(self, clean: Encoder, attacker: Knowledge, seed: Seed) -> Implanted: ...


class Filter(Protocol):
    """Tells which training images to keep; True = keep. `encoder` was trained on them, poisoned ones included."""

    @property
    def needs(self) -> frozenset[Need]: ...
    def keep(self, train: Dataset, encoder: Encoder, seed: Seed) -> Bool[Tensor, " row"]: ...


class Probe(Protocol):
    """Fits a downstream classifier on an encoder."""

    def fit(self, encoder: Encoder, train: Dataset, seed: Seed) -> Classifier: ...


class Scanner(Protocol):
    """Looks for a backdoor; leaves the model as it was."""

    @property
    def needs(self) -> frozenset[Need]: ...
    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict: ...


class Purifier(Protocol):
    """Removes a backdoor from a copy of the model."""

    @property
    def needs(self) -> frozenset[Need]: ...
    def purify(self, model: Encoder, clean: Dataset, seed: Seed, evidence: Sequence[Evidence] = ()) -> Encoder: ...
