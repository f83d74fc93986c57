"""Windowed inversion: does some small window, filled with the right pixels, make all embeddings coincide?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from cupel.inference import device_of
from cupel.inversion import concentration, frozen
from cupel.inversion.pattern import step_sizes
from cupel.inversion.windows import fill_windows, paste, window_corners
from cupel.protocols import Encoder
from cupel.scan.admission import some_rows
from cupel.scan.judging import Judging
from cupel.scan.passes import Passes
from cupel.scan.reference import banded, check_reference
from cupel.seeds import Seed
from cupel.settings import Positive, PositiveInt, settings
from cupel.types import Dataset, Need
from cupel.verdicts import Evidence, Reference, Verdict

__all__ = ["PScan"]

CERTAIN, DOUBTFUL = 0.95, 0.90
"""Concentrations above which an uncalibrated scan says backdoored, and suspicious (our choice)."""
LEAST = 1e-6
_SHOWN = 3
_TOGETHER = 512

Share = Annotated[float, Field(gt=0, le=1)]


@settings
class PScan(Judging):
    """Trigger inversion inside local windows, label-free.

    For every window of a grid, its content p is optimised so that the embeddings of images that bear it coincide:
    maximise conc(f(x with p in the window) − mean f(x)). A mask over the whole image starts out hiding all of it, and
    its gradient never meets a trigger of a few sharp pixels; a window that lies on it does. Score = the largest
    concentration of held-out images over the windows.

    Args:
        side, stride: Of the windows, as shares of the image's side; at least one pixel.
        steps: Per window.
        step: Size of the first step along the gradient's sign, for pixels in [0, 1]; it falls to a tenth in equal
            parts.
        batch_size: Images per window and step.
        images: Clean images used at most; half of them, at most `held_out`, are held out.
        held_out: Images that the score is measured on.
        precision: Of the encoder's passes; bf16 is used where the hardware computes in it and the encoder's clean
            embeddings agree with float32.

    Budgets: `smoke`, `standard`, and `paper`, which is several times as thorough.

    Source: our choice; the concentration is that of Feng et al., DECREE, CVPR 2023, arXiv:2303.15180, centred.
    Deviations: fixed windows instead of a mask that is optimised, and concentration around the clean mean.
    """

    side: Share = 0.25
    stride: Share = 0.125
    steps: PositiveInt = 25
    step: Positive = 0.2
    batch_size: Annotated[int, Field(ge=2)] = 16
    images: Annotated[int, Field(ge=32)] = 512
    held_out: Annotated[int, Field(ge=2)] = 64
    precision: Literal["bf16", "fp32"] = "bf16"
    method: ClassVar[str] = "pscan"
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"stride": 0.25, "steps": 15, "batch_size": 8},
        "standard": {},
        "paper": {"stride": 0.0625, "steps": 60, "batch_size": 32, "precision": "fp32"},
    }
    tested: ClassVar[str] = "universal stamps inside one small window (windowed inversion)"
    limit: ClassVar[float] = CERTAIN
    needs: ClassVar[frozenset[Need]] = frozenset()
    revision: ClassVar[int] = 1

    def scan(self, model: Encoder, clean: Dataset, seed: Seed, reference: Reference | None = None) -> Verdict:
        """Look for a universal stamp in every window.

        Args:
            model: Encoder; its weights, flags and modes are as before afterwards.
            clean: Images of its input size. Labels are not read.
            seed: Choice of images, first contents, batches.
            reference: 1 − concentration of clean encoders of the same recipe, found with the same settings.

        Returns:
            The best windows as evidence, with solid masks. `inconclusive` when fewer than 64 images can be used or
            clean embeddings coincide.

        Raises:
            CupelError: the model holds or gives NaN or infinite values.
            DataError: images of another size or scale; a reference of another scanner or budget.
        """
        check_reference(reference, self.name)
        if (said := self.unfit(model, clean)) is not None:
            return said
        device, size = device_of(model.module), model.input_size
        side, stride = max(1, round(self.side * size)), max(1, round(self.stride * size))
        rows = some_rows(clean, self.images, seed)
        num_held = min(self.held_out, len(rows) // 2)
        fit, held = clean.inputs[rows[num_held:]].to(device), clean.inputs[rows[:num_held]].to(device)
        corners = window_corners(size, size, side, stride)
        sizes = step_sizes((self.steps, self.step, self.step / 10))
        with frozen(model.module):
            passes = Passes(model, fit, self.precision)
            embeddings = passes.embed(fit)
            origin = embeddings.mean(dim=0)

            def reach(x: Tensor) -> Tensor:
                return concentration(passes(x.flatten(0, 1)).reshape(*x.shape[:2], -1) - origin)

            contents = fill_windows(reach, fit, corners, side, sizes, self.batch_size, seed.child("fill"), "pscan")
            found = self._held_out(reach, held, contents, corners)
        passes.checked(found)
        details = {
            "conc_clean": float(concentration(embeddings)),
            "images": float(len(fit)),
            "images_held_out": float(len(held)),
            "windows": float(len(corners)),
            "conc": float(found.max()),
            "conc_median": float(found.median()),
        } | passes.costs()
        order = found.argsort(descending=True, stable=True)[:_SHOWN].tolist()
        evidence = tuple(self._evidence(corners[i], contents[i], size, float(found[i])) for i in order)
        for rank, i in enumerate(order):
            top, left = corners[i].tolist()
            details |= {f"conc_{rank}": float(found[i]), f"top_{rank}": float(top), f"left_{rank}": float(left)}
        distance = max(1 - details["conc"], LEAST)
        words = f"the best window makes embeddings coincide to {1 - distance:.3f}"
        decision = banded(distance, reference, words, certain=1 - CERTAIN, doubtful=1 - DOUBTFUL)
        return self.concluded(decision, max(0.0, details["conc"]), evidence, details, device)

    @torch.no_grad()
    def _held_out(
        self, reach: Callable[[Tensor], Tensor], held: Tensor, contents: Tensor, corners: Tensor
    ) -> Float[Tensor, " windows"]:
        """Concentration of the held-out images for each window, on the CPU."""
        x = held.float().div(255)
        groups = torch.split(torch.arange(len(corners)), max(1, _TOGETHER // len(held)))
        return torch.cat([reach(paste(x, contents[some], corners[some])) for some in groups]).cpu()

    def _evidence(self, corner: Tensor, content: Tensor, size: int, conc: float) -> Evidence:
        side, (top, left) = content.shape[-1], corner.tolist()
        mask, pattern = torch.zeros(size, size), torch.zeros(3, size, size)
        mask[top : top + side, left : left + side] = 1
        pattern[:, top : top + side, left : left + side] = content.cpu()
        source = f"{self.name} window at row {top}, column {left}"
        return Evidence(mask.numpy(), pattern.numpy(), float(mask.mean()), conc > CERTAIN, source)
