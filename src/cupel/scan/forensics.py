"""Weight forensics: was this encoder fine-tuned from a named clean one with its BatchNorms frozen?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cupel.checkpoint import TensorFile, match_keys, read_tensors
from cupel.cost import peak_memory_mib
from cupel.encoders import ImageEncoder
from cupel.errors import DataError, UsageError
from cupel.inference import device_of
from cupel.protocols import Encoder
from cupel.scan.judging import Judging
from cupel.seeds import Seed
from cupel.settings import DataFile, settings
from cupel.types import Dataset, Need
from cupel.verdicts import Reference, Verdict

__all__ = ["Forensics", "compare_weights"]

_COUNTER = "num_batches_tracked"


@settings
class Forensics(Judging):
    """Compares the weights with those of a clean checkpoint that the user names and trusts.

    An attack on a published encoder that trains with frozen BatchNorms, as BadEncoder does, leaves their statistics
    and affine parts bit by bit as they were and changes the rest. Training of one's own moves the statistics at its
    first step. The same trace is left by honest fine-tuning with frozen BatchNorms: it says where the weights come
    from and that somebody changed them, not what for, so the verdict is at most `suspicious`.

    Args:
        checkpoint: File of the clean encoder: safetensors or a torch checkpoint; nothing in it is executed.

    Budgets: `smoke`, `standard` and `paper` are the same.

    Source: our choice, after what the authors' code of Jia et al., BadEncoder, IEEE S&P 2022, arXiv:2108.00352, trains.
    Deviations: none; the paper has no such test.
    """

    checkpoint: DataFile | None = None
    method: ClassVar[str] = "forensics"
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"smoke": {}, "standard": {}, "paper": {}}
    tested: ClassVar[str] = "fine-tuning of a named clean checkpoint with frozen BatchNorm (comparison of weights)"
    limit: ClassVar[float] = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})
    revision: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """Method and a digest of the settings: there are no references for it to be matched with."""
        return self._name_of_its_own()

    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
        """Compare the weights.

        Args:
            model: Encoder; left as it is.
            clean: Only looked at to see that the encoder works. Labels are not read.
            seed: Not used.
            reference: Refused: there is nothing to calibrate.

        Returns:
            Score = share of the BatchNorm tensors that equal those of the checkpoint, 0 where all weights equal its;
            1 = `suspicious`. `inconclusive` where there is no BatchNorm, or with fewer than 64 usable images.

        Raises:
            UsageError: no checkpoint was named.
            CheckpointError: the file cannot be read or is another architecture's; `UnsafeFile` if it holds code.
            CupelError: the model holds or gives NaN or infinite values.
            DataError: images of another size or scale; a reference is given.
        """
        if self.checkpoint is None:
            raise UsageError("forensics", "names no clean checkpoint", "set `checkpoint` to the file of one you trust")
        if reference is not None:
            raise DataError(f"reference '{reference.recipe}'", "forensics reads none", "leave it out")
        if (unfit := self.unfit(model, clean)) is not None:
            return unfit
        device = device_of(model.module)
        details = compare_weights(_backbone(model), read_tensors(self.checkpoint), self.checkpoint)
        details |= {"forward_images": 0.0, "backward_images": 0.0}
        norms, same = details["norm_tensors"], details["norm_equal"]
        weights, kept = details["other_tensors"], details["other_equal"]
        if norms == 0:
            why = "the encoder has no BatchNorm with statistics, so nothing can be told from them"
            return self.inconclusive(why, device, details)
        share = same / norms
        word: Literal["suspicious", "clean-by-test"] = "clean-by-test"
        counted = f"{same:.0f} of {norms:.0f} BatchNorm tensors equal those of the named checkpoint"
        if share == 1 and kept == weights:
            share, why = 0.0, "all weights are bit by bit those of the named checkpoint"
        elif share == 1:
            word = "suspicious"
            why = f"{counted}, but {weights - kept:.0f} of {weights:.0f} other tensors differ: it was fine-tuned"
        else:
            why = f"{counted}: no sign of fine-tuning from it with frozen BatchNorms"
        peak = peak_memory_mib(device)
        return Verdict(word, share, self.limit, self.tested, (), details, why, peak_memory_mib=peak)


def compare_weights(module: nn.Module, file: TensorFile, where: object) -> dict[str, float]:
    """How many tensors of a network equal, bit by bit, those of a file, for BatchNorms and the rest.

    Args:
        module: Its `state_dict` names the tensors; counters of batches are left out.
        file: Of the clean encoder, with any known prefix.
        where: The file, for errors.

    Returns:
        `norm_tensors`, `norm_equal`, `other_tensors`, `other_equal`, and `relative_change`: ‖w − w₀‖ / ‖w₀‖ over the
        other tensors.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    state: Mapping[str, Tensor] = {k: v for k, v in module.state_dict().items() if not k.endswith(_COUNTER)}
    shapes = {name: tuple(value.shape) for name, value in file.tensors.items()}
    names = match_keys(shapes, {name: tuple(value.shape) for name, value in state.items()}, where).names
    norms = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
        for name in part.state_dict()
    }
    counts = {"norm_tensors": 0.0, "norm_equal": 0.0, "other_tensors": 0.0, "other_equal": 0.0}
    moved = length = 0.0
    for name, value in state.items():
        theirs = torch.from_numpy(np.array(file.tensors[names[name]])).to(value.dtype)
        ours, kind = value.detach().cpu(), "norm" if name in norms else "other"
        counts[f"{kind}_tensors"] += 1
        counts[f"{kind}_equal"] += float(torch.equal(ours, theirs))
        if kind == "other":
            moved += float((ours.double() - theirs.double()).square().sum())
            length += float(theirs.double().square().sum())
    return counts | {"relative_change": (moved / length) ** 0.5 if length > 0 else 0.0}


def _backbone(model: Encoder) -> nn.Module:
    """What encoder files hold: the network without the normalisation before it."""
    if isinstance(model, ImageEncoder):
        return model.module.backbone
    return model.module
