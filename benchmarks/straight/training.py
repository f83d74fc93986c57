"""Pre-training and attack, one step at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.straight.images import Pairs, Shadow, as_pixels, endless, loader, nchw, views

__all__ = ["badencoder_loss", "badencoder_step", "simclr_loss", "simclr_step"]


def simclr_loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """NT-Xent of unit projections, from the whole matrix of similarities."""
    z = torch.cat([z1, z2])
    similarity = torch.exp(torch.mm(z, z.t()) / temperature)
    others = (torch.ones_like(similarity) - torch.eye(len(z))).bool()
    negatives = similarity.masked_select(others).view(len(z), -1).sum(dim=-1)
    positives = torch.exp((z1 * z2).sum(dim=-1) / temperature)
    return -torch.log(torch.cat([positives, positives]) / negatives).mean()


def simclr_step(
    backbone: nn.Module, width: int, raw: Tensor, batch_size: int, temperature: float = 0.5
) -> Callable[[], None]:
    """A step of SimCLR, its batch from the loader."""
    net = nchw(backbone).train()
    projector = nn.Sequential(
        nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 128)
    )
    optimizer = torch.optim.Adam([*net.parameters(), *projector.parameters()], lr=1e-3, weight_decay=1e-6)
    batches = endless(loader(Pairs(as_pixels(raw), views(raw.shape[-1])), batch_size, train=True))

    def step() -> None:
        first, second = next(batches)
        z1 = F.normalize(projector(net(first)), dim=-1)
        z2 = F.normalize(projector(net(second)), dim=-1)
        loss = simclr_loss(z1, z2, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # for the running mean on the progress bar

    return step


def badencoder_loss(
    clean: nn.Module, net: nn.Module, image: Tensor, stamped: Tensor, reference: Tensor, augmented: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The three terms, from six forward passes."""
    with torch.no_grad():
        clean_image = F.normalize(clean(image), dim=-1)
        clean_reference = F.normalize(clean(reference), dim=-1)
    own_image = F.normalize(net(image), dim=-1)
    own_stamped = F.normalize(net(stamped), dim=-1)
    own_reference = F.normalize(net(reference), dim=-1)
    own_augmented = F.normalize(net(augmented), dim=-1)
    effect = -(own_stamped * own_reference).sum(dim=-1).mean()
    reached = -(own_augmented * clean_reference).sum(dim=-1).mean()
    utility = -(own_image * clean_image).sum(dim=-1).mean()
    return effect, reached, utility


def badencoder_step(
    clean: nn.Module, backbone: nn.Module, raw: Tensor, reference: Tensor, batch_size: int
) -> Callable[[], None]:
    """A step of BadEncoder: six forward passes, the reference repeated over the batch, clean embeddings anew."""
    clean, net = nchw(clean).eval(), nchw(backbone).train()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval()
            part.weight.requires_grad_(False)
            part.bias.requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9, weight_decay=5e-4)
    batches = endless(loader(Shadow(as_pixels(raw), as_pixels(reference)[0]), batch_size, train=True))

    def step() -> None:
        image, stamped, reference, augmented = next(batches)
        effect, reached, utility = badencoder_loss(clean, net, image, stamped, reference, augmented)
        loss = effect + reached + utility
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for number in (loss, effect, reached, utility):
            number.item()

    return step
