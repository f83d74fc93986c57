"""A small network that recolours the image: the trigger that an attack learned together with its encoder."""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cupel.errors import DataError, UsageError
from cupel.seeds import Seed
from cupel.settings import settings
from cupel.triggers.draws import check_raw

__all__ = ["FilterNet", "LearnedFilter", "filter_of"]

_BLOCK = 64  # images at a time, always: convolutions round differently for other numbers of images
_LARGEST = 256
_TINT = (0.08, 0.0, -0.08)
_WHERE = "trigger[learned_filter].weights"


class FilterNet(nn.Module):
    """A U-Net with one level: `T(x) = clamp(x + u(x), 0, 1)`, the identity when it is new.

    Args:
        width: Channels at full resolution, twice as many at half; at least 2.
        seed: Of the first weights.
    """

    def __init__(self, width: int, seed: Seed) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed.value)
            self.enter = nn.Conv2d(3, width, 3, padding=1)
            self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            self.inner = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
            self.up = nn.Conv2d(3 * width, width, 3, padding=1)
            self.leave = nn.Conv2d(width, 3, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        """Images in [0, 1] → images in [0, 1], in float32 whatever the caller's precision."""
        with torch.autocast(x.device.type, enabled=False):
            fine = F.relu(self.enter(x * 2 - 1))
            coarse = F.relu(self.inner(F.relu(self.down(fine))))
            wide = F.interpolate(coarse, size=x.shape[-2:], mode="nearest")
            made: Tensor = self.leave(F.relu(self.up(torch.cat([fine, wide], dim=1))))
            return (x + made).clamp(0, 1)


@settings
class LearnedFilter:
    """Recolours the image by a small U-Net, each image in its own way; `x' = round(255 · T(x / 255))`.

    Args:
        weights: The network's tensors as a safetensors file in base64 (see `filter_of`), so that a learned trigger is
            carried by its settings; None = no network but a fixed warm tint: red up and blue down by 20 levels.

    Raises:
        DataError: when applied: `weights` is no safetensors file in base64, or not of such a network.

    Example:
        >>> x = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
        >>> LearnedFilter()(x, [0], Seed(0))[0, :, 0, 0].tolist()
        [120, 100, 80]

    Source: the kind of trigger of Zhang et al., Invisible Backdoor Attack against Self-supervised Learning,
    arXiv:2405.14672.
    Deviations: a smaller network of our own that adds to the image; pixels are clamped in [0, 1], not after the
    encoder's normalisation; the image is rounded to whole grey levels.
    """

    weights: str | None = None
    revision: ClassVar[int] = 1

    def __call__(self, raw: Tensor, ids: Sequence[int], seed: Seed, /) -> Tensor:
        """Filtered images; `ids` and `seed` do not matter."""
        check_raw(raw, ids)
        if self.weights is None:
            tint = torch.tensor(_TINT, device=raw.device).view(3, 1, 1)
            return ((raw.float() / 255 + tint).clamp(0, 1) * 255).round().to(torch.uint8)
        network, made = self.network().to(raw.device), []
        with torch.no_grad():
            for block in torch.split(raw, _BLOCK):
                x = raw.new_zeros((_BLOCK, *raw.shape[1:]))
                x[: len(block)] = block
                made.append((network(x.float() / 255) * 255).round().to(torch.uint8)[: len(block)])
        return torch.cat(made) if made else raw.clone()

    def network(self) -> FilterNet:
        """T, with gradients off; a copy of its own.

        Raises:
            UsageError: no weights.
        """
        if self.weights is None:
            raise UsageError("trigger[learned_filter]", "has no network", "give `weights`")
        tensors = _decoded(self.weights)
        made = FilterNet(len(tensors["enter.weight"]), Seed(0))
        made.load_state_dict({name: value.float() for name, value in tensors.items()})
        return made.requires_grad_(False).eval()

    def mask_and_pattern(self, size: int) -> tuple[Tensor, Tensor] | None:
        """None: the change differs from image to image."""
        return None


def filter_of(network: FilterNet) -> LearnedFilter:
    """The trigger with the weights of a network, rounded to 16 bits, which changes a pixel by one level at most."""
    tensors = {name: value.detach().cpu().half().contiguous() for name, value in network.state_dict().items()}
    return LearnedFilter(weights=base64.b64encode(save(tensors)).decode("ascii"))


@functools.lru_cache(maxsize=16)
def _decoded(weights: str) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load(base64.b64decode(weights, validate=True))
    except (SafetensorError, ValueError, binascii.Error) as error:
        raise DataError(_WHERE, f"is no safetensors file in base64 ({type(error).__name__})") from error
    first = tensors.get("enter.weight")
    width = len(first) if first is not None and first.ndim == 4 else 0
    if not 2 <= width <= _LARGEST:
        raise DataError(_WHERE, "are not those of a filter network", "use what an attack has stored")
    with torch.device("meta"):
        expected = {name: value.shape for name, value in FilterNet(width, Seed(0)).state_dict().items()}
    if {name: value.shape for name, value in tensors.items()} != expected:
        raise DataError(_WHERE, "are not those of a filter network", "use what an attack has stored")
    if not all(value.is_floating_point() and bool(value.isfinite().all()) for value in tensors.values()):
        raise DataError(_WHERE, "hold values that are not finite numbers", "use what an attack has stored")
    return tensors
