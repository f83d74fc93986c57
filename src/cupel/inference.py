"""A frozen encoder at work: embeddings of a data set, triggered copies of one, and an encoder with a head."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cupel.data.ahead import ahead
from cupel.encoders import ImageEncoder
from cupel.errors import DataError
from cupel.feature_store import active_store
from cupel.folding import bf16_pays, inference_copy
from cupel.metrics import predicted_class
from cupel.progress import say, track
from cupel.protocols import Encoder, Images, Trigger
from cupel.seeds import Seed
from cupel.types import Dataset, Pixels

__all__ = ["COMPARED", "FrozenProbe", "classify", "device_of", "evaluating", "features", "in_bf16", "triggered"]

MIN_COSINE = 0.9999
"""bfloat16 must agree with float32 this well, on each of the images compared."""
COMPARED = 32
"""Images compared; sets that are not larger are done in float32 at once."""
_STORED = 256  # fewer embeddings are made faster than found again


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
    dtype: torch.dtype | None = None,
    store: bool = True,
    label: str | None = None,
) -> Float[Tensor, "row width"]:
    """Embeddings of all images, in eval mode and without gradients.

    Args:
        encoder: Any; its parameters, statistics and modes stay as they are.
        data: A data set, or images `[n, 3, height, width]`: uint8, or floating point in [0, 1].
        batch_size: Images per forward pass; changes the result by rounding at most.
        dtype: `torch.float32` = the encoder as it is. `torch.bfloat16` = a copy with its BatchNorms folded, in bfloat16
            (`cupel.folding`); 32 images are compared first: unless each embedding has a cosine of at least 0.9999 with
            that in float32, float32 is used for all and a line says so. None = bfloat16 where the hardware computes in
            it and there are more than 32 images, else float32.
        store: Inside `cupel.feature_store.storing_features`, keep the result and take it from there; False for an
            encoder that is still being trained.
        label: Name under which progress is shown; None = silent.

    Returns:
        float32 on the device of the encoder.

    Raises:
        DataError: the images are not of the encoder's input size (resizing is the loader's business), or an
            embedding is not finite.
    """
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"features in {dtype}? only float32 and bfloat16")
    inputs: Tensor | Pixels = data.inputs if isinstance(data, Dataset) else data
    name = data.name if isinstance(data, Dataset) else "images"
    size, n = encoder.input_size, len(inputs)
    if n and tuple(inputs.shape[-2:]) != (size, size):
        got = "×".join(str(side) for side in inputs.shape[-2:])
        what = f"images are {got}, the encoder takes {size}×{size}"
        raise DataError(name, what, f"load the data at size {size}, or use an encoder of that size")
    device, kept = device_of(encoder.module), active_store()
    if kept is None or not store or n < _STORED or not _has_content(encoder, data):
        out = torch.empty(n, encoder.width, device=device)
        return _embed(encoder, inputs, name, out, batch_size, dtype, label)
    assert isinstance(encoder, ImageEncoder)
    assert isinstance(data, Dataset)
    key = kept.key(encoder, data, dtype)
    found = kept.find(key)
    if found is None or found.shape != (n, encoder.width):
        with kept.new(key, n, encoder.width) as out:
            _embed(encoder, inputs, name, out, batch_size, dtype, label)
        found = kept.find(key)
    return found.to(device) if found is not None else out


def _has_content(encoder: Encoder, data: Dataset | Tensor) -> bool:
    """Whether encoder and images can be hashed; a stamp that is put on while reading would be put on twice."""
    return isinstance(encoder, ImageEncoder) and isinstance(data, Dataset) and not isinstance(data.inputs, _Stamped)


@torch.no_grad()
def _embed(
    encoder: Encoder,
    inputs: Tensor | Pixels,
    name: str,
    out: Tensor,
    batch_size: int,
    dtype: torch.dtype | None,
    label: str | None,
) -> Tensor:
    """Fill `out` with embeddings."""
    n, device = len(inputs), device_of(encoder.module)
    if dtype is None:
        dtype = torch.bfloat16 if n > COMPARED and bf16_pays(device) else torch.float32
    starts = range(0, n, batch_size)
    blocks: list[Any] = [slice(start, min(start + batch_size, n)) for start in starts]
    if not isinstance(inputs, Tensor):
        blocks = [torch.arange(n)[block] for block in blocks]
    network: Callable[[Tensor], Tensor] = encoder
    with evaluating(encoder.module), _progress(label, n) as advance, ahead(inputs, blocks, device) as batches:
        for start, (rows, raw) in zip(starts, batches, strict=True):
            x = _in_unit_range(raw, device)
            if start == 0 and dtype == torch.bfloat16:
                network = in_bf16(encoder, x, name)
            out[rows] = network(x)
            advance(start + len(raw))
    if bad := int((~out.isfinite()).any(dim=1).sum()):
        what = f"{bad} of {n} embeddings are not finite numbers"
        raise DataError(name, what, "the encoder has diverged: train it again with a lower learning rate")
    return out


def in_bf16(encoder: Encoder, x: Images, name: str) -> Callable[[Images], Tensor]:
    """A frozen bfloat16 copy of the encoder with folded BatchNorms if it agrees with it on `x`, else the encoder.

    Args:
        encoder: In eval mode.
        x: Images in [0, 1]; up to 32 of them are compared.
        name: Of the images, for the line that says that float32 is used.
    """
    some = x[:: max(1, len(x) // COMPARED)][:COMPARED]
    quick, device = inference_copy(encoder, torch.bfloat16), x.device.type

    def network(x: Images) -> Tensor:
        with torch.autocast(device, torch.bfloat16):  # for encoders that could not be folded
            return quick(x).float()

    with torch.no_grad():
        exact, rough = encoder(some).float(), network(some)
    # two rows of zeros agree, though their cosine is 0
    cosine = cosine_similarity(exact, rough, dim=1).where((exact != rough).any(dim=1), 1.0)
    worst = float(cosine.min())
    if worst >= MIN_COSINE:
        return network
    say(f"  {name}: embeddings in float32; in bfloat16 the worst cosine was {worst:.5f}, below {MIN_COSINE}")
    return encoder


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


@contextlib.contextmanager
def _progress(label: str | None, total: int) -> Iterator[Any]:
    if label is None:
        yield lambda done: None
        return
    with track(label, total) as advance:
        yield advance
