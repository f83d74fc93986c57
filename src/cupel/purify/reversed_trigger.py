"""The trigger that Neural Cleanse's mitigations work against: a scanner's, or one found here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cupel.errors import DataError
from cupel.folding import inference_copy
from cupel.inference import device_of
from cupel.inversion import frozen
from cupel.inversion.classwise import ClassSearch, invert_classes
from cupel.protocols import Encoder
from cupel.purify.evidence import usable_evidence
from cupel.seeds import Seed
from cupel.types import Dataset
from cupel.verdicts import Evidence

__all__ = ["ReversedTriggers", "reversed_triggers"]


class ReversedTriggers(NamedTuple):
    """Masks and patterns, smallest first.

    Args:
        masks: `[triggers, 1, height, width]` in [0, 1].
        patterns: `[triggers, 3, height, width]` in [0, 1].
    """

    masks: Float[Tensor, "triggers 1 height width"]
    patterns: Float[Tensor, "triggers 3 height width"]

    def on(self, x: Tensor, first: int = 0) -> Tensor:
        """Images in [0, 1] with the triggers, dealt in turn from trigger `first` on."""
        which = (torch.arange(len(x), device=x.device) + first) % len(self.masks)
        return torch.lerp(x, self.patterns[which], self.masks[which])


def reversed_triggers(
    encoder: Encoder,
    head: nn.Module,
    clean: Dataset,
    evidence: Sequence[Evidence],
    search: ClassSearch,
    count: int,
    seed: Seed,
) -> ReversedTriggers:
    """The smallest triggers of the evidence; without evidence those of the classes that are reached most easily.

    Args:
        encoder, head: The classifier, for the search.
        clean: Images of its input size; their labels say which classes there are.
        evidence: Of a scanner; what did not converge is left out.
        search: Settings, where there is no evidence.
        count: Triggers wanted.
        seed: Of the search.

    Raises:
        DataError: evidence of another size; nothing was found.
    """
    device, side = device_of(encoder.module), encoder.input_size
    usable = usable_evidence(sorted(evidence, key=lambda one: one.size), side, None)
    if usable is not None:
        masks, patterns = (one[:count].to(device) for one in usable)
        return ReversedTriggers(masks[:, None], patterns)
    images = clean.inputs[torch.arange(min(len(clean), 1000))].to(device)
    with frozen(encoder.module), frozen(head):
        quick = inference_copy(encoder)
        found = invert_classes(
            lambda x: head(quick(x.contiguous(memory_format=torch.channels_last))),
            images,
            torch.unique(clean.labels),
            search,
            seed,
        )
    rows = [i for i in found.size.argsort().tolist() if bool(found.found[i])][:count]
    if not rows:
        what = f"no trigger was found within {search.steps} steps"
        raise DataError("neural_cleanse", what, "scan first, or raise `search.steps`")
    return ReversedTriggers(found.mask[rows][:, None].to(device), found.pattern[rows].to(device))
