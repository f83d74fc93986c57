"""Neural Cleanse, pruning: the dimensions of the embedding that the reversed trigger excites are silenced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cupel.encoders import ImageEncoder
from cupel.encoders.blocks import blocks_of
from cupel.errors import DataError, UsageError, did_you_mean
from cupel.inference import classify, features
from cupel.inversion.classwise import ClassSearch
from cupel.metrics import check_labels
from cupel.probe import PROBES, Linear
from cupel.protocols import Encoder, Probe
from cupel.purify.reversed_trigger import reversed_triggers
from cupel.seeds import Seed
from cupel.settings import Fraction, OneOf, PositiveInt, settings
from cupel.train import History
from cupel.types import Dataset, Evidence, Need

__all__ = ["NeuralCleansePrune", "pruning_order", "silence"]

_SEARCH = ClassSearch(steps=60, images_per_step=128)
_FAR_BELOW = -1e4  # what a shortcut adds cannot lift it over zero


@settings
class NeuralCleansePrune:
    """Silences the dimensions of the embedding that the reversed trigger raises most, until it no longer works.

    Dimensions are ranked by the mean difference of their activation on triggered and on clean images, and set to zero
    from the top. The trigger no longer works when at most `success` of the images that were not of its class before are
    still taken for it; the head stays as it was fitted.

    Args:
        probe: Head that tells whether the trigger still works.
        success: Share of triggered images at which pruning ends.
        most: Share of the dimensions that are pruned at most.
        num_triggers: Reversed triggers, smallest first; each has its own ranking and is pruned in turn.
        search: How they are searched for where no scanner gives any.

    Source: Wang et al., Neural Cleanse, IEEE S&P 2019, section VI-B.
    Deviations: the embedding is taken as the penultimate layer of encoder and head; `success` and `most` are our
    choice, for the paper says "until the model is no longer responsive to the reversed trigger".
    """

    probe: Annotated[Probe, OneOf(PROBES)] = Linear()
    success: Fraction = 0.1
    most: Fraction = 0.5
    num_triggers: PositiveInt = 1
    search: ClassSearch = _SEARCH

    title: ClassVar[str] = "Neural Cleanse, pruning"
    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
    revision: ClassVar[int] = 1

    @classmethod
    def preset(cls, budget: str) -> NeuralCleansePrune:
        """Settings of a budget, which tells how long a trigger is searched for: `smoke`, `standard`, `paper`.

        Raises:
            UsageError: no such budget.

        Example:
            >>> NeuralCleansePrune.preset("paper").search.steps
            1000
        """
        if budget == "smoke":
            return cls()
        if budget == "standard":
            return cls(search=ClassSearch(steps=150, images_per_step=256))
        if budget == "paper":
            return cls(search=ClassSearch())
        raise UsageError("budget", f"unknown '{budget}'", did_you_mean(budget, ("smoke", "standard", "paper")))

    def purify(self, model: Encoder, clean: Dataset, seed: Seed, evidence: Sequence[Evidence] = ()) -> Encoder:
        """A purified copy of `model`; see `purify_with_history`."""
        return self.purify_with_history(model, clean, seed, evidence)[0]

    def purify_with_history(
        self,
        model: Encoder,
        clean: Dataset,
        seed: Seed,
        evidence: Sequence[Evidence] = (),
        *,
        checkpoint: Path | None = None,
    ) -> tuple[Encoder, History]:
        """A purified copy of `model`, and how success of the trigger and clean accuracy went with each dimension.

        Args:
            model: Left as it is; its last block must end in a BatchNorm and a ReLU.
            clean: Labelled images of its input size, presumably without trigger.
            seed: Head and search.
            evidence: Triggers that a scanner inverted; those that did not converge are left out.
            checkpoint: Not used: this is done in seconds.

        Raises:
            DataError: images without labels or of another size; evidence of another size; no trigger was found; an
                architecture whose dimensions cannot be silenced.
            LabelsWithheld: labels are kept from purifiers.
        """
        encoder = model.copy() if isinstance(model, ImageEncoder) else copy.deepcopy(model)
        encoder.module.eval()
        check_labels(clean.labels, clean.num_classes, clean.name)
        classifier = self.probe.fit(encoder, clean, seed.child("probe"))
        encoder, head = classifier.encoder, classifier.head
        triggers = reversed_triggers(
            encoder, head, clean, evidence, self.search, self.num_triggers, seed.child("search")
        )
        images = clean.inputs[torch.arange(len(clean))].to(triggers.masks.device)
        plain = features(encoder, images, dtype=torch.float32, store=False)
        keep = torch.ones(plain.shape[1], device=plain.device)
        history: History = {"success": [], "accuracy": []}
        for i in range(len(triggers.masks)):
            hit = torch.cat(
                [
                    encoder_pass(encoder, triggers._replace(masks=triggers.masks[i : i + 1],
                                                            patterns=triggers.patterns[i : i + 1]).on(some))
                    for some in torch.split(images.float() / 255, 256)
                ]
            )  # fmt: skip
            self._prune(head, plain, hit, clean.labels, keep, history)
        gone = (keep == 0).nonzero().flatten()
        silence(encoder, gone, images[:32])
        return encoder, history

    def _prune(
        self, head: nn.Module, plain: Tensor, hit: Tensor, labels: Tensor, keep: Tensor, history: History
    ) -> None:
        """Set entries of `keep` to 0, one after the other."""
        before, after = classify(head, plain * keep), classify(head, hit * keep)
        target = int(after.mode().values)
        others = before != target
        limit = round(self.most * len(keep))
        for dim in pruning_order(plain, hit).tolist():
            if int((keep == 0).sum()) >= limit:
                return
            keep[dim] = 0
            now, right = classify(head, (hit * keep)[others]), classify(head, plain * keep)
            history["success"].append(float((now == target).float().mean()) if bool(others.any()) else 0.0)
            history["accuracy"].append(float((right == labels).float().mean()))
            if history["success"][-1] <= self.success:
                return


def pruning_order(
    plain: Float[Tensor, "n width"], triggered: Float[Tensor, "n width"]
) -> Int[Tensor, " width"]:  # fmt: skip
    """Dimensions by how much the trigger raises them, most first; ties by number.

    Example:
        >>> pruning_order(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0, 3.0]])).tolist()
        [2, 0, 1]
    """
    return (triggered - plain).mean(dim=0).argsort(descending=True, stable=True)


@torch.no_grad()
def encoder_pass(encoder: Encoder, x: Tensor) -> Tensor:
    """Embeddings of images in [0, 1], float32."""
    return encoder(x.contiguous(memory_format=torch.channels_last)).float()


@torch.no_grad()
def silence(encoder: Encoder, dims: Int[Tensor, " dims"], images: Tensor) -> None:
    """Make dimensions of the embedding zero for every image, in place; the others stay as they are.

    It works on encoders whose last block ends in BatchNorm (and shortcut) and ReLU: scale 0 and a shift far below zero.

    Args:
        encoder: In eval mode.
        dims: Which.
        images: uint8, on its device, to check the result with.

    Raises:
        DataError: the architecture is of another kind; the encoder is then as it was.
    """
    x = images.float() / 255
    before = encoder_pass(encoder, x)
    norm = _last_norm(encoder.module)
    if norm is not None and norm.weight.shape == (before.shape[1],):
        weight, bias = norm.weight.clone(), norm.bias.clone()
        norm.weight[dims], norm.bias[dims] = 0.0, _FAR_BELOW
        wanted = before.clone()
        wanted[:, dims] = 0
        if torch.allclose(encoder_pass(encoder, x), wanted, rtol=1e-4, atol=1e-5):
            return
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    what = f"dimensions of a {type(encoder.module).__name__} cannot be silenced"
    raise DataError("neural_cleanse_prune", what, "use neural_cleanse_unlearn")


def _last_norm(module: nn.Module) -> nn.modules.batchnorm._BatchNorm | None:
    """The last BatchNorm before the embedding that is not in a shortcut."""
    parts = blocks_of(module)
    norms = [
        part
        for name, part in (parts[-1].named_modules() if parts else ())
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine and "downsample" not in name
    ]
    return norms[-1] if norms else None
