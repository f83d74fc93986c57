"""BatchNorms of an encoder that is tuned: which of them move, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import nn

__all__ = ["BatchNorm", "batch_norms", "set_batch_norm", "statistics_kept"]

BatchNorm = Literal["frozen", "eval_affine", "train"]
"""`frozen` = stored statistics, affine part fixed; `eval_affine` = stored statistics, affine part trained; `train` =
statistics of the batch, and the stored ones move."""


def batch_norms(module: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """BatchNorms by name."""
    found = module.named_modules()
    return {name: part for name, part in found if isinstance(part, nn.modules.batchnorm._BatchNorm)}


def set_batch_norm(module: nn.Module, mode: BatchNorm, *, trained: bool = True) -> None:
    """Put all BatchNorms of a module in the mode; without `trained` their affine parts are fixed in any mode."""
    for norm in batch_norms(module).values():
        norm.train(mode == "train")
        norm.requires_grad_(trained and mode != "frozen")


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside the `with`, BatchNorms in train mode use the batch's statistics but store nothing."""
    norms = [norm for norm in batch_norms(module).values() if norm.training and norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
