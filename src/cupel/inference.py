"""A frozen encoder at work: embeddings of a data set, triggered copies of one, and an encoder with a head."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cupel.errors import DataError
from cupel.metrics import predicted_class
from cupel.progress import say, track
from cupel.protocols import Encoder, Images, Trigger
from cupel.seeds import Seed
from cupel.types import Dataset, Pixels

__all__ = ["FrozenProbe", "classify", "device_of", "evaluating", "features", "triggered"]

MIN_COSINE = 0.9999
"""Half precision must agree with float32 this well, on every image of the first batch."""


@dataclass(frozen=True, eq=False)
class FrozenProbe:
    """A classifier: a head on the embeddings of an encoder.

    Args:
        encoder: Left as it is.
        head: Takes raw embeddings `[batch, width]`; whatever scaling it needs is inside.
    """

    encoder: Encoder
    head: nn.Module

    def __call__(self, x: Images, /) -> Float[Tensor, "batch classes"]:
        """Logits of images in [0, 1]. Gradients flow through both parts."""
        logits: Tensor = self.head(self.encoder(x))
        return logits


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter or buffer lives; the CPU if it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode inside the `with`; afterwards every part has the mode it had."""
    before = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in before:
            part.training = mode


def features(
    encoder: Encoder,
    data: Dataset | Tensor,
    *,
    batch_size: int = 512,
    dtype: torch.dtype = torch.float32,
    label: str | None = None,
) -> Float[Tensor, "row width"]:
    """Embeddings of all images, in eval mode and without gradients.

    Args:
        encoder: Any; its parameters, statistics and modes stay as they are.
        data: A data set, or images `[n, 3, height, width]`: uint8, or floating point in [0, 1].
        batch_size: Images per forward pass; changes the result by rounding at most.
        dtype: `torch.float32`, or `torch.bfloat16` for autocast. Autocast is checked on the first batch: unless each
            embedding has a cosine of at least 0.9999 with that in float32, float32 is used for all and a line says so.
        label: Name under which progress is shown; None = silent.

    Returns:
        float32 on the device of the encoder.

    Raises:
        DataError: the images are not of the encoder's input size (resizing is the loader's business), or an
            embedding is not finite.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"features in {dtype}? only float32 and bfloat16")
    inputs: Tensor | Pixels = data.inputs if isinstance(data, Dataset) else data
    name = data.name if isinstance(data, Dataset) else "images"
    size, n = encoder.input_size, len(inputs)
    if n and tuple(inputs.shape[-2:]) != (size, size):
        got = "×".join(str(side) for side in inputs.shape[-2:])
        what = f"images are {got}, the encoder takes {size}×{size}"
        raise DataError(name, what, f"load the data at size {size}, or use an encoder of that size")
    device = device_of(encoder.module)
    out = torch.empty(n, encoder.width, device=device)
    with torch.no_grad(), evaluating(encoder.module), _progress(label, n) as advance:
        for start in range(0, n, batch_size):
            end = min(start + batch_size, n)
            raw = inputs[start:end] if isinstance(inputs, Tensor) else inputs[torch.arange(start, end)]
            x = _in_unit_range(raw, device)
            if start == 0 and dtype == torch.bfloat16:
                dtype = _checked(encoder, x, name)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                out[start:end] = encoder(x).float()
            advance(end)
    if bad := int((~out.isfinite()).any(dim=1).sum()):
        what = f"{bad} of {n} embeddings are not finite numbers"
        raise DataError(name, what, "the encoder has diverged: train it again with a lower learning rate")
    return out


def classify(head: nn.Module, embeddings: Float[Tensor, "row width"], *, batch_size: int = 4096) -> Int[Tensor, " row"]:
    """Predicted classes of embeddings, int64 on the CPU; ties go to the smallest class index.

    Args:
        head: In whatever mode; used in eval mode.
        embeddings: As `features` gives them, on the head's device.
        batch_size: Rows at a time.
    """
    with torch.no_grad(), evaluating(head):
        parts = [predicted_class(head(block)).cpu() for block in torch.split(embeddings, batch_size) if len(block)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def triggered(data: Dataset, trigger: Trigger[Tensor], seed: Seed, *, block: int = 512) -> Dataset:
    """The same rows with the trigger on every image.

    Images in one tensor are stamped at once, block by block. Images that decode when indexed stay so: the stamp is put
    on when they are read. Both give the same pixels, since a trigger draws from (seed, id) alone.

    Args:
        data: Left as it is; labels and ids are kept.
        trigger: Works on uint8 images.
        seed: Handed to the trigger unchanged.
        block: Images at a time.

    Raises:
        DataError: the trigger changed shape or type of the images.
    """
    stamped = _Stamped(data.inputs, trigger, data.ids, seed, block, data.name)
    name = f"{data.name}, triggered"
    if isinstance(data.inputs, Tensor):
        return data.with_inputs(stamped[torch.arange(len(data))], name)
    return dataclasses.replace(data, inputs=stamped, name=name)


@dataclass(frozen=True, eq=False)
class _Stamped:
    """`Pixels` that carry a trigger."""

    source: Tensor | Pixels
    trigger: Trigger[Tensor]
    ids: Tensor
    seed: Seed
    block: int
    name: str

    @property
    def shape(self) -> Sequence[int]:
        return self.source.shape

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any, /) -> Tensor:
        chosen = torch.arange(len(self))[rows]
        blocks = torch.split(chosen.reshape(-1), self.block)
        stamped = torch.cat([self._stamp(part) for part in blocks])
        return stamped if chosen.ndim else stamped[0]

    def _stamp(self, rows: Tensor) -> Tensor:
        raw = self.source[rows]
        done = self.trigger(raw, self.ids[rows].tolist(), self.seed) if len(rows) else raw
        if done.shape != raw.shape or done.dtype != raw.dtype:
            what = f"the trigger turned {raw.dtype} {tuple(raw.shape)} into {done.dtype} {tuple(done.shape)}"
            raise DataError(self.name, what, "a trigger must keep shape and type")
        return done

    def content(self) -> list[bytes]:
        digests = []
        for rows in torch.split(torch.arange(len(self)), self.block):
            pixels = self._stamp(rows).contiguous().numpy()
            digests += [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in pixels]
        return digests


def _in_unit_range(raw: Tensor, device: torch.device) -> Tensor:
    x = raw.to(device, non_blocking=True).to(memory_format=torch.channels_last)
    return x.float().div_(255) if x.dtype == torch.uint8 else x.float()


def _checked(encoder: Encoder, x: Tensor, name: str) -> torch.dtype:
    exact = encoder(x).float()
    with torch.autocast(x.device.type, torch.bfloat16):
        rough = encoder(x).float()
    # two rows of zeros agree, though their cosine is 0
    cosine = cosine_similarity(exact, rough, dim=1).where((exact != rough).any(dim=1), 1.0)
    worst = float(cosine.min())
    if worst >= MIN_COSINE:
        return torch.bfloat16
    say(f"  {name}: embeddings in float32; in bfloat16 the worst cosine was {worst:.5f}, below {MIN_COSINE}")
    return torch.float32


@contextlib.contextmanager
def _progress(label: str | None, total: int) -> Iterator[Any]:
    if label is None:
        yield lambda done: None
        return
    with track(label, total) as advance:
        yield advance
