"""MNTD's meta-classifier as it is kept: the network, its queries, its threshold, and the file they are written to."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from cupel.errors import DataError
from cupel.files import atomic_file
from cupel.scan.reference import ENOUGH
from cupel.seeds import Seed
from cupel.verdicts import Reference

__all__ = ["Answer", "Meta", "MetaReference", "read_meta_reference", "threshold_at"]

_VALUES = ("scanner", "recipe", "one_class", "auc", "threshold", "shadows", "calibrated", "false_alarms")

Answer = Callable[[Tensor], Tensor]
"""Queries `[q, 3, height, width]` in [0, 1] → what is read off a model, one vector; gradients flow to the queries."""


class Meta(nn.Module):
    """Queries, and `Linear → ReLU → Linear` on what models answer to them.

    Args:
        queries: `[q, 3, height, width]` in [0, 1].
        features: Length of an answer.
        hidden: Units.
        seed: Of the weights, uniform in ±1/√(inputs).
    """

    def __init__(self, queries: Tensor, features: int, hidden: int, seed: Seed) -> None:
        super().__init__()
        draw = seed.torch()

        def uniform(*shape: int, inputs: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=draw))

        self.queries = nn.Parameter(queries.clone())
        self.fc_weight, self.fc_bias = uniform(hidden, features, inputs=features), uniform(hidden, inputs=features)
        self.out_weight, self.out_bias = uniform(1, hidden, inputs=hidden), uniform(1, inputs=hidden)
        self.register_buffer("bound", torch.ones(()))  # r of the one-class loss

    bound: Tensor

    def forward(self, answer: Float[Tensor, " features"], one_class: bool = False) -> Float[Tensor, ""]:
        """The score of one model, larger = worse: a logit, or r − s of the one-class form."""
        h = linear(answer, self.fc_weight, self.fc_bias).relu()
        if one_class:
            return self.bound - (self.out_weight[0] * h).sum()
        return linear(h, self.out_weight, self.out_bias)[0]


@dataclass(frozen=True, eq=False)
class MetaReference(Reference):
    """A trained meta-classifier.

    `scores` are those of benign shadow models that it was not trained on, or after `calibrated_on` those of clean
    encoders. Shadow models are of another kind than what is inspected, and clean encoders may score far above them.

    Args:
        arrays: float32 weights and queries by name.
        one_class: Which form it has.
        auc: Area under the curve on held-out shadow models.
        threshold: Score from which a model counts as backdoored.
        shadows: Models it was made from.
        calibrated: `scores` and `threshold` are those of clean encoders.
        false_alarms: Share of `scores` that the threshold may call backdoored.
    """

    arrays: Mapping[str, np.ndarray[Any, Any]]
    one_class: bool
    auc: float
    threshold: float
    shadows: int
    calibrated: bool = False
    false_alarms: float = 0.05

    def meta(self, device: torch.device | str = "cpu") -> Meta:
        """The network."""
        found = {name: torch.from_numpy(np.array(value)) for name, value in self.arrays.items()}
        hidden, features = found["fc_weight"].shape
        made = Meta(found["queries"], features, hidden, Seed(0))
        made.load_state_dict(found)
        return made.to(device).requires_grad_(False)

    @torch.no_grad()
    def score(self, answer: Answer, device: torch.device | str = "cpu") -> float:
        """The score of a model, larger = worse.

        Raises:
            DataError: its answer is of another length or not finite.
        """
        meta = self.meta(device)
        told = answer(meta.queries)
        if told.shape != (meta.fc_weight.shape[1],):
            what = f"the model answers with {told.numel()} numbers, the shadow models with {meta.fc_weight.shape[1]}"
            raise DataError(f"reference '{self.recipe}'", what, "make it from images of the same task")
        if not bool(told.isfinite().all()):
            raise DataError(f"reference '{self.recipe}'", "the model answers with NaN or infinite values")
        return float(meta(told, self.one_class))

    def calibrated_on(self, scores: Sequence[float]) -> MetaReference:
        """The same with a threshold from clean encoders of the kind that is inspected.

        Args:
            scores: What verdicts on them say; five or more.

        Raises:
            DataError: fewer, or not finite.
        """
        if len(scores) < ENOUGH or not all(math.isfinite(score) for score in scores):
            what = f"scores of {ENOUGH} clean encoders are needed, got {len(scores)}"
            raise DataError(f"reference '{self.recipe}'", what, "scan more clean encoders")
        limit = threshold_at(scores, self.false_alarms)
        return dataclasses.replace(self, scores=tuple(scores), threshold=limit, calibrated=True)

    def values(self) -> dict[str, Any]:
        """Everything but the arrays, as plain JSON values."""
        return {**{name: getattr(self, name) for name in _VALUES}, "scores": list(self.scores)}

    @staticmethod
    def of(values: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> MetaReference:
        """What `values` and `arrays` tell of."""
        rest = {name: values[name] for name in _VALUES}
        return MetaReference(scores=tuple(values["scores"]), arrays=dict(arrays), **rest)

    def write(self, path: str | Path) -> None:
        """Write to a `.safetensors` file, atomically."""
        with atomic_file(path) as part:
            arrays = {name: np.ascontiguousarray(one) for name, one in self.arrays.items()}
            save_file(arrays, part, {"cupel_mntd": json.dumps(self.values(), allow_nan=False)})


def read_meta_reference(path: str | Path) -> MetaReference:
    """Read what `MetaReference.write` wrote.

    Raises:
        DataError: not such a file.
    """
    try:
        with safe_open(path, "numpy") as file:
            values = json.loads((file.metadata() or {})["cupel_mntd"])
            names = file.keys()
            found = MetaReference.of(values, {name: file.get_tensor(name) for name in names})
        found.meta()
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(path, f"holds no meta-classifier ({type(error).__name__})", "train it again") from error
    return found


def threshold_at(benign: Sequence[float], rate: float) -> float:
    """The smallest threshold at or above which at most a share `rate` of benign scores lies.

    Example:
        >>> 4.0 < threshold_at([1.0, 2.0, 3.0, 4.0], 0.05) < 4.001
        True
        >>> 3.0 < threshold_at([1.0, 2.0, 3.0, 4.0], 0.25) < 3.001
        True
    """
    ordered = sorted(benign, reverse=True)
    allowed = min(int(rate * len(ordered) + 1e-9), len(ordered) - 1)
    return math.nextafter(ordered[allowed], math.inf)
