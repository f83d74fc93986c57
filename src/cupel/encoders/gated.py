"""An encoder with a gate before its last block: places of an image that look like nothing seen before are left out."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any, ClassVar, TypeGuard, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from cupel.encoders.blocks import blocks_of
from cupel.encoders.image import ImageEncoder
from cupel.encoders.projected import BASES, OnBase
from cupel.errors import DataError
from cupel.seeds import Seed
from cupel.settings import settings

__all__ = ["Gate", "Gated", "gated", "outlying", "takes_gate", "trunk_of"]

_OPEN = torch.finfo(torch.float32).max  # finite, so that it can be stored
_MOST = 2**27  # numbers that the alarm's features may hold at once: half a GiB


@settings
class Gated(OnBase):
    """Another encoder that watches its own features, as the purifier `cupellation` leaves one behind.

    The features before the last block pass a gate. A frozen copy of an encoder's blocks up to there, the alarm, tells
    per location how far it lies from those of clean images, and what lies too far gets what clean images have there in
    the mean instead. The alarm's weights are buffers: no training of the encoder changes them. Names of the network's
    own weights are those of the base; `alarm.*` and `gate.*` come on top.

    Args:
        base: Architecture below; not a `gated` one.

    Source: our choice; related are local feature clipping and masking, e.g. Xiang et al., PatchGuard, USENIX Security
        2021, arXiv:2005.10884, and Wang et al., MM-BD, IEEE S&P 2024, arXiv:2205.06900, which bounds activations.

    Example:
        >>> from cupel.encoders import Fast
        >>> encoder = Gated(base=Fast(width=4)).build(Seed(0))
        >>> encoder.width, encoder.card.architecture["method"]
        (16, 'gated')
    """

    revision: ClassVar[int] = 2

    def build(self, seed: Seed) -> ImageEncoder:
        """A freshly initialised encoder whose gate is open; without it, it is what `base.build(seed)` gives."""
        encoder = self.base.build(seed)
        alarm = trunk_of(encoder)
        return _joined(encoder, alarm, _open(alarm, encoder.input_size))


class Gate(nn.Module):
    """What decides per location, and what is put in its place.

    Args:
        width: Features per location.
        height, length: Locations.

    Buffers: `mean` and `white` of the alarm's features (distance = ‖(a − mean) · white‖²), `limit` that no clean
    location surpasses but few, `low` for locations beside such a one, and `fill`, the encoder's own features of clean
    images, mean per location.
    """

    mean: Tensor
    white: Tensor
    limit: Tensor
    low: Tensor
    fill: Tensor

    def __init__(self, width: int, height: int, length: int) -> None:
        super().__init__()
        for name, value in {
            "mean": torch.zeros(width), "white": torch.eye(width), "limit": torch.tensor(_OPEN),
            "low": torch.tensor(_OPEN), "fill": torch.zeros(width, height, length),
        }.items():  # fmt: skip
            self.register_buffer(name, value)

    def forward(self, h: Tensor, alarm: Tensor) -> Tensor:
        bad = outlying(alarm, self.mean, self.white, self.limit, self.low)
        return _filled(h, bad, self.fill)

    @torch.no_grad()
    def learn(
        self, alarm: Float[Tensor, "n width h w"], limit: float, low: float, floor: float, trimmed: float
    ) -> Int[Tensor, " kept"]:
        """Take the statistics of clean images, all but `fill`.

        Args:
            alarm: The alarm's features.
            limit, low: Shares of clean locations that lie within.
            floor: Added to each variance along a principal axis, as a share of the largest.
            trimmed: Share of the images that are left out, those with the farthest location: some may bear a trigger.

        Returns:
            Rows of the images that were not left out.
        """
        count = max(2, round((1 - trimmed) * len(alarm)))
        kept = torch.arange(len(alarm), device=alarm.device)
        for _ in range(2):  # the second time without what the first found to lie far
            rows = alarm[kept].movedim(1, -1).flatten(0, 2).float()
            self.mean.copy_(rows.mean(dim=0))
            spread, axes = torch.linalg.eigh(torch.cov(rows.T).double())
            least = floor * float(spread.max()) + 1e-12
            self.white.copy_((axes / spread.clamp(min=0).add(least).sqrt()).float())
            far = _far(alarm, self.mean, self.white)
            kept = far.flatten(1).amax(dim=1).argsort()[:count]
        inside = far[kept].flatten().sort().values
        for name, share in (("limit", limit), ("low", low)):
            getattr(self, name).copy_(inside[min(len(inside) - 1, int(share * len(inside)))])
        return kept


def _far(alarm: Tensor, mean: Tensor, white: Tensor) -> Tensor:
    """Squared distance per location, `[n, 1, h, w]`."""
    with torch.autocast(alarm.device.type, enabled=False):
        return F.conv2d(alarm.float() - mean.view(1, -1, 1, 1), white.T[:, :, None, None]).square().sum(1, keepdim=True)


@fx.wrap
def outlying(alarm: Tensor, mean: Tensor, white: Tensor, limit: Tensor, low: Tensor) -> Tensor:
    """1 where a location is to be left out, else 0; `[n, 1, h, w]`.

    Those beyond `limit`, and up to two steps around them those beyond `low`: a trigger also touches its surroundings.
    """
    far = _far(alarm, mean, white)
    bad, weak = (far > limit).float(), (far > low).float()
    for _ in range(2):
        bad = torch.maximum(bad, F.max_pool2d(bad, 3, 1, 1) * weak)
    return bad


@fx.wrap
def _filled(h: Tensor, bad: Tensor, fill: Tensor) -> Tensor:
    return torch.where(bad.bool(), fill.to(h.dtype), h)


class _Watching:
    """What goes before a network's own class: the gate between its last two blocks."""

    alarm: nn.Sequential
    gate: Gate

    def forward(self, x: Tensor) -> Tensor:
        before, after = _halves(cast("nn.Module", self))
        h = x
        for part in before:
            h = part(h)
        h = self.gate(h, self.alarm(x.detach()))
        for part in after:
            h = part(h)
        out: Tensor = h.mean(dim=(2, 3))
        return out


@functools.cache
def _watching(cls: type) -> type[nn.Module]:
    return cast("type[nn.Module]", type(f"Gated{cls.__name__}", (_Watching, cls), {}))


def _halves(network: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Parts up to the last block but one, in the order in which they are applied, and the blocks after it."""
    blocks = blocks_of(network)
    parts = [part for name, part in network.named_children() if name not in ("alarm", "gate")]
    cut = next(i for i, part in enumerate(parts) if part is blocks[-2]) + 1
    return parts[:cut], [part for part in parts[cut:] if part is blocks[-1]]


@torch.no_grad()
def _open(alarm: nn.Sequential, size: int) -> Gate:
    """A gate that lets everything pass, for images of a size."""
    like = next(alarm.buffers())
    return Gate(*alarm(like.new_zeros(1, 3, size, size)).shape[1:]).to(like.device)


def trunk_of(encoder: ImageEncoder) -> nn.Sequential:
    """A frozen copy of the blocks up to the gate: BatchNorms multiplied in, weights as buffers.

    Of an encoder that came gated, too, the network's own blocks are taken: its alarm may have been made blind.
    """
    trunk = nn.Sequential(*(copy.deepcopy(part) for part in _halves(encoder.module.backbone)[0])).eval()
    for parent in list(trunk.modules()):
        conv = ""
        for name, part in list(parent.named_children()):
            if isinstance(part, _BatchNorm) and conv:  # ours and torchvision's follow their convolution
                setattr(parent, conv, nn.utils.fuse_conv_bn_eval(cast("_ConvNd", parent.get_submodule(conv)), part))
                setattr(parent, name, nn.Identity())
            conv = name if isinstance(part, _ConvNd) else ""
    for part in trunk.modules():
        for name, weight in list(part._parameters.items()):
            del part._parameters[name]
            part.register_buffer(name, None if weight is None else weight.detach().clone())
    return trunk


def _joined(encoder: ImageEncoder, alarm: nn.Sequential, gate: Gate) -> ImageEncoder:
    """The same encoder, its network now with alarm and gate."""
    network = encoder.module.backbone
    if not isinstance(network, _Watching):
        own: Any = type(network)
        network.__class__ = _watching(own)
    network.add_module("alarm", alarm)
    network.add_module("gate", gate)
    plain = dict(encoder.card.architecture)
    built = plain if plain["method"] == "gated" else {"method": "gated", "base": plain}
    return ImageEncoder(encoder.module.eval(), dataclasses.replace(encoder.card, architecture=built))


def takes_gate(encoder: object) -> TypeGuard[ImageEncoder]:
    """Whether it is of one of the bases, with a gate or without."""
    return isinstance(encoder, ImageEncoder) and encoder.card.architecture.get("method") in (*BASES, "gated")


@torch.no_grad()
def gated(
    encoder: ImageEncoder, watch: ImageEncoder, images: UInt8[Tensor, "n 3 h w"], *, limit: float = 1.0,
    low: float = 0.95, floor: float = 0.01, trimmed: float = 0.06, at_once: int = 256,
) -> ImageEncoder:  # fmt: skip
    """A copy of an encoder that is watched by another one of the same architecture.

    Args:
        encoder: `fast`, `resnet18`, `resnet50`, or gated ones of these.
        watch: Whose blocks become the alarm.
        images: Clean, in random order; no more are used than fit into half a GiB of features.
        limit, low, floor, trimmed: See `Gate.learn`.
        at_once: Images per forward pass.

    Raises:
        DataError: an encoder of another kind.

    Example:
        >>> from cupel.encoders import Fast
        >>> encoder = Fast(width=4, input_size=16).build(Seed(0))
        >>> images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8)
        >>> gated(encoder, encoder, images).card.architecture["method"]
        'gated'
    """
    if not takes_gate(encoder):
        what = encoder.card.architecture.get("method")
        raise DataError("encoder", f"a gate cannot be put into '{what}'", f"it goes into {', '.join(BASES)}")
    device = encoder.module.shift.device
    alarm = trunk_of(watch).to(device)
    gate = _open(alarm, encoder.input_size)
    made = _joined(encoder.copy(), alarm, gate)
    network, shift, scale = made.module.backbone, made.module.shift, made.module.scale

    def normalised(some: Tensor) -> Tensor:
        return torch.addcmul(shift, some.to(device).float() / 255, scale)

    seen: list[Tensor] = []
    for some in images.split(at_once):
        seen.append(alarm(normalised(some)))
        if sum(one.numel() for one in seen) >= _MOST:
            break
    kept = gate.learn(torch.cat(seen), limit, low, floor, trimmed).to(images.device)
    before = nn.Sequential(*_halves(network)[0])
    own = [before(normalised(some)).double().sum(dim=0) for some in images[kept].split(at_once)]
    gate.fill.copy_(torch.stack(own).sum(dim=0) / len(kept))
    return made
