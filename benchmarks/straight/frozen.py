"""A frozen encoder at work: embeddings, and classifiers on them, all from loaders."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.straight.images import Plain, as_pixels, loader, nchw, plain

__all__ = ["extraction", "linear_epoch", "mlp_epoch"]


def extraction(backbone: nn.Module, raw: Tensor, batch_size: int) -> Callable[[], None]:
    """Embeddings of all images."""
    net = nchw(backbone).eval()
    batches = loader(Plain(as_pixels(raw), plain()), batch_size, train=False)

    def extract() -> None:
        with torch.no_grad():
            torch.cat([F.normalize(net(batch), dim=1) for batch in batches])

    return extract


def _epoch(
    head: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, batch_size: int, shuffle: bool
) -> Callable[[], None]:
    batches = loader(TensorDataset(x, y), batch_size, train=shuffle)
    criterion = nn.CrossEntropyLoss()

    def epoch() -> None:
        head.train()
        for inputs, labels in batches:
            optimizer.zero_grad()
            loss = criterion(head(inputs), labels)
            loss.backward()
            optimizer.step()

    return epoch


def mlp_epoch(x: Tensor, y: Tensor, classes: int = 10, batch_size: int = 64) -> Callable[[], None]:
    """An epoch of the classifier 512-512-256-10 on embeddings."""
    width = x.shape[1]
    head = nn.Sequential(
        nn.Linear(width, 512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, classes)
    )
    return _epoch(head, torch.optim.Adam(head.parameters(), lr=1e-4), x, y, batch_size, shuffle=False)


def linear_epoch(x: Tensor, y: Tensor, classes: int = 10, batch_size: int = 256) -> Callable[[], None]:
    """An epoch of a linear layer trained by Adam on embeddings."""
    head = nn.Linear(x.shape[1], classes)
    return _epoch(head, torch.optim.Adam(head.parameters(), lr=1e-3), x, y, batch_size, shuffle=True)
