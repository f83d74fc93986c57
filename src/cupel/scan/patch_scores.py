"""PatchSearch's scores: what an image's cluster hangs on, and how many other images it draws into that cluster."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from cupel.encoders.blocks import blocks_of
from cupel.errors import DataError
from cupel.folding import inference_copy
from cupel.inference import device_of
from cupel.protocols import Encoder
from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = ["Scorer", "best_windows", "k_means"]


def best_windows(
    maps: Float[Tensor, "n height width"], side: int
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:  # fmt: skip
    """Top and left of the window with the largest sum in each map; of equal ones the first, row by row.

    Args:
        maps: Non-negative.
        side: Of the window, at most that of the map.

    Example:
        >>> m = torch.zeros(1, 4, 4)
        >>> m[0, 2, 3] = 1.0
        >>> [int(x) for x in best_windows(m, 2)]
        [1, 2]
    """
    table = torch.nn.functional.pad(maps.double().cumsum(1).cumsum(2), (1, 0, 1, 0))
    sums = table[:, side:, side:] - table[:, :-side, side:] - table[:, side:, :-side] + table[:, :-side, :-side]
    flat = sums.flatten(1)
    # sums of the same pixels differ by rounding: what is equal to the last digits counts as equal
    slack = 1e-9 * flat.abs().amax(1, keepdim=True)
    first = (flat >= flat.amax(1, keepdim=True) - slack).int().argmax(1)
    return first // sums.shape[2], first % sums.shape[2]


def k_means(
    points: Float[Tensor, "n dim"], clusters: int, seed: Seed, steps: int = 20
) -> tuple[Float[Tensor, "clusters dim"], Int[Tensor, " n"]]:
    """Spherical k-means: centres of length 1, and the centre nearest to each point.

    A cluster that loses all its points keeps its centre.

    Args:
        points: Of length 1.
        clusters: At most n.
        seed: First centres, different points.
        steps: Rounds.
    """
    centres = points[torch.randperm(len(points), generator=seed.torch())[:clusters].to(points.device)].clone()
    for _ in range(steps):
        own = (points @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, own, points)
        used = torch.bincount(own, minlength=clusters) > 0
        centres = torch.where(used[:, None], normalize(sums, dim=1), centres)
    return centres, (points @ centres.T).argmax(1)


class Scorer:
    """Cuts out candidate patches and counts what they do to the test images.

    Args:
        window: Side of the patches as a share of the image's side.
        cam_side: Least side of the maps that class activations are taken from.
        encoder: Frozen.
        data: Training images.
        centres, own: Clusters, and the cluster of each image.
        tests: Rows of the images that patches are pasted on.
        seed: Places.
    """

    def __init__(
        self,
        window: float,
        cam_side: int,
        encoder: Encoder,
        data: Dataset,
        centres: Tensor,
        own: Tensor,
        tests: Tensor,
        seed: Seed,
    ) -> None:
        self.encoder, self.data, self.centres, self.own, self.seed = encoder, data, centres, own, seed
        self.device = device_of(encoder.module)
        self.side = max(2, round(window * encoder.input_size))
        self.tests = data.inputs[tests].to(self.device)
        self.before = own[tests.to(own.device)]
        self.quick = inference_copy(encoder)
        self.block = _map_block(encoder, self.tests[:1], cam_side)

    def patch(self, row: int) -> Tensor:
        """uint8 `[1, 3, side, side]`: the window that the image's own cluster hangs on most (Grad-CAM)."""
        raw = self.data.inputs[torch.tensor([row])].to(self.device)
        top, left = best_windows(self._cam(raw, self.own[row : row + 1]), self.side)
        y, x = int(top), int(left)
        return raw[:, :, y : y + self.side, x : x + self.side].cpu()

    @torch.no_grad()
    def score(self, row: int) -> int:
        """Test images in the image's cluster after its patch was pasted on them, less those before."""
        patch, cluster = self.patch(row).to(self.device), self.own[row]
        spare = self.tests.shape[-1] - self.side + 1
        places = torch.randint(spare, (2, len(self.tests)), generator=self.seed.child(row).torch()).to(self.device)
        at = torch.arange(self.side, device=self.device)
        pasted = self.tests.clone()
        image = torch.arange(len(pasted), device=self.device)[:, None, None]
        rows, columns = (places[0][:, None] + at)[:, :, None], (places[1][:, None] + at)[:, None, :]
        pasted[image, :, rows, columns] = patch[0].permute(1, 2, 0)
        after = torch.cat([self._cluster(some) for some in torch.split(pasted, 256)])
        return int((after == cluster).sum()) - int((self.before == cluster).sum())

    def _cluster(self, raw: Tensor) -> Tensor:
        x = (raw.float() / 255).contiguous(memory_format=torch.channels_last)
        return (normalize(self.quick(x).float(), dim=1) @ self.centres.T).argmax(1)

    def _cam(self, raw: Tensor, cluster: Tensor) -> Tensor:
        """Grad-CAM of the cosine with the image's centre, at the size of the image."""
        with torch.enable_grad():
            x = (raw.float() / 255).requires_grad_(True)
            seen: list[Tensor] = []
            hook = self.block.register_forward_hook(lambda part, inputs, output: seen.append(output))
            try:
                logit = (normalize(self.encoder(x).float(), dim=1) * self.centres[cluster]).sum()
            finally:
                hook.remove()
            (slope,) = torch.autograd.grad(logit, seen[0])
        cam = (slope.mean(dim=(2, 3), keepdim=True) * seen[0].detach()).sum(1, keepdim=True).relu()
        grown: Tensor = interpolate(cam.float(), size=raw.shape[-2:], mode="bilinear", align_corners=False)
        return grown[:, 0]


def _map_block(encoder: Encoder, raw: Tensor, least: int) -> torch.nn.Module:
    """The last block that gives maps of at least `least` pixels."""
    shapes: dict[int, Sequence[int]] = {}
    blocks = blocks_of(encoder.module)
    hooks = [
        block.register_forward_hook(lambda part, inputs, output, i=i: shapes.__setitem__(i, output.shape))
        for i, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            encoder(raw.float() / 255)
    finally:
        for hook in hooks:
            hook.remove()
    fitting = [i for i, shape in shapes.items() if len(shape) == 4 and min(shape[2:]) >= least]
    if not fitting:
        what = f"a {type(encoder.module).__name__} gives no maps of {least} pixels"
        raise DataError("patchsearch", what, "use a convolutional encoder, or lower `cam_side`")
    return blocks[max(fitting)]
