"""The numbers in a checkpoint as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupel.checkpoint.contents import Contents, open_contents
from cupel.checkpoint.text import shown
from cupel.errors import CheckpointError, UnsafeFile

__all__ = ["TensorFile", "read_tensors"]


@dataclass(frozen=True, eq=False)
class TensorFile:
    """The tensors of a checkpoint.

    Args:
        tensors: By flat dotted name, wrapping keys included (`state_dict.module.conv1.weight`); bfloat16 as float32.
        card: What Cupel wrote about the encoder; None for files of others.
        sha256: Of the file.
        format: As `Inspection.format`.
        stubs: Globals that were stepped over, never imported.
    """

    tensors: dict[str, np.ndarray[Any, Any]]
    card: dict[str, Any] | None
    sha256: str
    format: str
    stubs: tuple[str, ...]


def read_tensors(path: str | Path) -> TensorFile:
    """Read every tensor of a checkpoint, running nothing in it.

    Args:
        path: safetensors, a torch checkpoint of any age, a bare pickle, or a folder with one safetensors file.

    Returns:
        Arrays of their own memory; the file may change afterwards.

    Raises:
        UnsafeFile: the file asks for code to be run.
        CheckpointError: missing, empty, cut off, damaged, hostile or without tensors, or a value is NaN or infinite.
            `code` names the reason.
    """
    contents = open_contents(path)
    where = shown(path, 4000)
    if contents.unsafe:
        what = f"is unsafe: {shown('; '.join(contents.unsafe[:5]))}; nothing was run"
        raise UnsafeFile(where, what, "do not load it with torch.load either", code="unsafe-file")
    if contents.problem is not None:
        raise contents.problem
    if contents.format == "torchscript":
        raise CheckpointError(where, "is TorchScript, which holds code", "ask for its state_dict", code="unsupported")
    if not contents.tensors:
        raise CheckpointError(where, "holds no tensors", "give a checkpoint of weights", code="no-tensors")
    arrays = _arrays(contents, where)
    return TensorFile(arrays, contents.card, contents.sha256, contents.format, tuple(contents.stubs))


def _arrays(contents: Contents, where: str) -> dict[str, np.ndarray[Any, Any]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    bad: dict[str, int] = {}
    for name, view in contents.tensors.items():
        array = arrays[name] = view.read(where, name)
        if array.dtype.kind in "fc" and (count := array.size - int(np.count_nonzero(np.isfinite(array)))):
            bad[name] = count
    if bad:
        name, count = next(iter(bad.items()))
        more = f" (and {len(bad) - 1} more tensors)" if len(bad) > 1 else ""
        what = f"tensor '{shown(name)}' holds {count} values that are NaN or infinite{more}"
        raise CheckpointError(where, what, "the training diverged or the file is damaged", code="non-finite")
    return arrays
