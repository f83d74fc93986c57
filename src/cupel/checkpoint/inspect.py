"""What is in a checkpoint, without running anything in it and without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cupel.checkpoint.contents import open_contents
from cupel.checkpoint.tensors import TensorInfo
from cupel.checkpoint.text import clean, shown

__all__ = ["FileVerdict", "Inspection", "inspect_file"]

FileVerdict = Literal["ok", "suspicious", "unsafe-file"]


@dataclass(frozen=True)
class Inspection:
    """What a file holds and what it asks for.

    Args:
        path: As given.
        format: `safetensors`, `torch-zip`, `torch-legacy`, `torchscript`, `pickle`, `cupel-folder` or `folder`.
        sha256, size: Digest and bytes of the file (in a folder, of the file in it).
        tensors: In the order of the file.
        stubs: Globals beyond tensors and plain containers. None was imported.
        metadata: Of a safetensors header.
        card: What Cupel wrote about the encoder; None for files of others.
        verdict: `unsafe-file` = asks for code to be run; `suspicious` = names something on no list, or is built
            oddly; `ok` = neither. It speaks of the file, not of how the encoder in it behaves.
        reasons: A sentence each for a verdict other than `ok`.
    """

    path: Path
    format: str
    sha256: str
    size: int
    tensors: tuple[TensorInfo, ...]
    stubs: tuple[str, ...]
    metadata: Mapping[str, str]
    card: dict[str, Any] | None
    verdict: FileVerdict
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "path": clean(str(self.path), 4000),
            "format": self.format,
            "sha256": self.sha256,
            "size": self.size,
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            "stubs": list(self.stubs),
            "metadata": dict(self.metadata),
            "card": self.card,
            "tensors": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in self.tensors],
        }

    def to_text(self, max_tensors: int = 20) -> str:
        """Lines for a terminal; control characters in names are escaped.

        Args:
            max_tensors: How many tensors are listed.
        """
        lines = [
            f"file      {shown(self.path, 4000)}",
            f"format    {self.format}, {self.size:,} bytes, sha256 {self.sha256}",
            f"tensors   {len(self.tensors)}",
        ]
        for tensor in self.tensors[:max_tensors]:
            lines.append(
                f"          {shown(tensor.name)}  {tensor.dtype}  {'x'.join(map(str, tensor.shape)) or 'scalar'}"
            )
        if len(self.tensors) > max_tensors:
            lines.append(f"          … and {len(self.tensors) - max_tensors} more")
        if self.card is not None:
            lines.append(f"card      {shown(', '.join(f'{k}={v}' for k, v in self.card.items()), 1000)}")
        lines += [f"metadata  {shown(k)}={shown(v)}" for k, v in self.metadata.items() if k != "cupel"]
        if self.stubs:
            lines.append(f"stubs     {shown(', '.join(self.stubs), 1000)} (none was imported)")
        note = " (of the file; how the encoder behaves was not tested)" if self.verdict == "ok" else ""
        lines.append(f"verdict   {self.verdict}" + note)
        lines += [f"          {shown(reason)}" for reason in self.reasons]
        return "\n".join(lines)


def inspect_file(path: str | Path) -> Inspection:
    """Say what is in a checkpoint.

    The globals of a pickle are held against an allowlist. Naming one that is known to run code makes the file unsafe
    whether it is called or only handed on; any other that is on no list makes it suspicious.

    Args:
        path: A file, whatever its name says it is, or a folder with one safetensors file.

    Raises:
        CheckpointError: missing, empty, cut off, damaged, or no checkpoint at all. A damaged file that also asks for
            code to be run is reported as unsafe instead.
    """
    contents = open_contents(path)
    if contents.problem is not None and not contents.unsafe:
        raise contents.problem
    reasons = [*contents.unsafe, *contents.oddities]
    if contents.problem is not None:
        reasons.append(contents.problem.what)
    verdict: FileVerdict = "unsafe-file" if contents.unsafe else "suspicious" if contents.oddities else "ok"
    return Inspection(
        path=contents.path,
        format=contents.format,
        sha256=contents.sha256,
        size=contents.size,
        tensors=tuple(TensorInfo(name, view.dtype, view.shape) for name, view in contents.tensors.items()),
        stubs=tuple(contents.stubs),
        metadata=contents.metadata,
        card=contents.card,
        verdict=verdict,
        reasons=tuple(reasons),
    )
