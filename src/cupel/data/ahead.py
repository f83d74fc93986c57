"""Batches of pixels on the device, made ready while the model works on the batches before."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from cupel.data.decode import quiet_pillow
from cupel.types import Pixels

__all__ = ["ahead"]

Rows = TypeVar("Rows", Tensor, slice)


@contextlib.contextmanager
def ahead(
    inputs: Tensor | Pixels, batches: Iterable[Rows], device: torch.device | str, *, depth: int = 2
) -> Iterator[Iterator[tuple[Rows, Tensor]]]:
    """Read the given batches in order; those that must be decoded are decoded in the background.

    Where the pixels wait:

    - One tensor and the CPU: there is nothing to read ahead, a batch is `inputs[rows]`.
    - One tensor and CUDA: copied to the device once if it fits into half of the memory that is free there.
    - Images that decode when indexed, and tensors too large for the device: one thread reads the next `depth` batches
      (decoding shares each of them out over more threads, see `LazyImages`). At any time at most `depth` + 1 batches
      are in memory, among them the one that was handed out last. For CUDA they are pinned, so that copying does not
      wait for the device.

    Leaving the `with`, for whatever reason, ends the thread; that waits for the batch being read.

    Args:
        inputs: uint8 `[n, 3, height, width]`, or images that decode to that; a tensor may have any type.
        batches: Rows of each batch, int64 or slices; they are asked for as reading goes on, from the caller's thread.
        device: Where batches are put.
        depth: Batches read ahead, ≥ 1; more help only where the time per batch varies much.

    Yields:
        An iterator over pairs of rows as given and pixels, the same pixels as `inputs[rows]`. What goes wrong with a
        batch is raised when that batch is asked for, not before.

    Example:
        >>> images = torch.arange(4, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 1, 1)
        >>> with ahead(images, [torch.tensor([2, 0]), torch.tensor([1, 3])], "cpu") as batches:
        ...     [pixels[:, 0, 0, 0].tolist() for rows, pixels in batches]
        [[2, 0], [1, 3]]
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    device = torch.device(device)
    if isinstance(inputs, Tensor) and (device.type != "cuda" or inputs.is_cuda or _fits(inputs, device)):
        yield _resident(inputs.to(device), batches)
        return
    # Pillow is silenced here, since the filters of `warnings` are no business of a thread
    with quiet_pillow(), ThreadPoolExecutor(1, "cupel-ahead") as reader:
        try:
            yield _read(reader, inputs, iter(batches), device, depth)
        finally:
            reader.shutdown(cancel_futures=True)


def _fits(inputs: Tensor, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return 2 * inputs.nbytes <= free


def _resident(inputs: Tensor, batches: Iterable[Rows]) -> Iterator[tuple[Rows, Tensor]]:
    for rows in batches:
        if isinstance(rows, Tensor) and inputs.is_cuda:
            yield rows, inputs[rows.pin_memory().to(inputs.device, non_blocking=True)]
        else:
            yield rows, inputs[rows]


def _read(
    reader: ThreadPoolExecutor, inputs: Tensor | Pixels, batches: Iterator[Rows], device: torch.device, depth: int
) -> Iterator[tuple[Rows, Tensor]]:
    def make(rows: Rows) -> Tensor:
        pixels = inputs[rows]
        return pixels.pin_memory() if device.type == "cuda" else pixels

    waiting = deque[tuple[Rows, Future[Tensor]]]()
    while True:
        for rows in islice(batches, depth - len(waiting)):
            waiting.append((rows, reader.submit(make, rows)))
        if not waiting:
            return
        rows, future = waiting.popleft()
        pixels = future.result()
        del future  # it holds the batch as well
        yield rows, pixels.to(device, non_blocking=True)
        del pixels
