"""The encoder as scanners run it: a frozen copy, in bfloat16 where that pays, with every image counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cupel.errors import CupelError
from cupel.folding import bf16_pays, inference_copy
from cupel.inference import COMPARED, in_bf16
from cupel.protocols import Encoder
from cupel.scan.admission import LOOKED_AT, named

__all__ = ["Passes"]

_LARGE = 2.0**30  # squares of longer embeddings leave float32; those of the inverse fall below 1e-12
_TOGETHER = 256  # images of a pass without gradients


class Passes:
    """A copy of the encoder with folded BatchNorms that gives float32, and how many images went through it.

    Embeddings that are huge or tiny are scaled by a power of two, which changes no angle.

    Args:
        model: In evaluation, its weights without gradients (`cupel.inversion.frozen`).
        sample: uint8 `[n, 3, height, width]` on its device: bf16 is compared with float32 on some of them.
        precision: `bf16` is used where the hardware computes in it and the embeddings agree with float32.

    Attributes:
        forward, backward: Images so far; those of `admit` are counted.

    Raises:
        CupelError: the embeddings are NaN or infinite.
    """

    def __init__(
        self, model: Encoder, sample: UInt8[Tensor, "n 3 height width"], precision: Literal["bf16", "fp32"]
    ) -> None:
        self.name, self.device = named(model), sample.device
        self.forward, self.backward = min(LOOKED_AT, len(sample)), 0
        self._factor = 1.0
        self._network: Callable[[Tensor], Tensor]
        if precision == "bf16" and bf16_pays(sample.device):
            self._network = in_bf16(model, channels_last(sample[:COMPARED].float() / 255), self.name)
            self.forward += 2 * min(COMPARED, len(sample))
        else:
            exact = inference_copy(model)
            self._network = lambda x: exact(x).float()
        largest = float(self.embed(sample[:COMPARED]).abs().amax())
        if largest > 0 and not 1 / _LARGE < largest < _LARGE:
            self._factor = 2.0 ** -torch.frexp(torch.tensor(largest))[1].item()

    def __call__(self, x: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n width"]:
        """Embeddings of images in [0, 1]; gradients flow to the images alone."""
        self.forward += len(x)
        if torch.is_grad_enabled() and x.requires_grad:
            self.backward += len(x)
        z = self._network(channels_last(x))
        return z if self._factor == 1 else z * self._factor

    @torch.no_grad()
    def embed(
        self, raw: UInt8[Tensor, "n 3 height width"], change: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "n width"]:
        """Embeddings of uint8 images, changed if asked for.

        Args:
            raw: On the device.
            change: Takes and gives images in [0, 1].

        Raises:
            CupelError: NaN or infinite values.
        """
        parts = []
        for some in torch.split(raw, _TOGETHER):
            x = some.float() / 255
            parts.append(self(x if change is None else change(x)))
        return self.checked(torch.cat(parts))

    def checked(self, values: Tensor) -> Tensor:
        """The values.

        Raises:
            CupelError: NaN or infinite ones.
        """
        if not bool(values.isfinite().all()):
            raise CupelError(self.name, "gives NaN or infinite embeddings", "check its weights and normalisation")
        return values

    def costs(self) -> dict[str, float]:
        """The counts, for the details of a verdict."""
        return {"forward_images": float(self.forward), "backward_images": float(self.backward)}


def channels_last(x: Tensor) -> Tensor:
    """The same images in the memory layout that convolutions are fastest in."""
    return x.contiguous(memory_format=torch.channels_last)
