"""The content-addressed store: artefacts by key, written once, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cupel.encoders import ImageEncoder
from cupel.encoders.storage import load_encoder, save_encoder
from cupel.errors import CupelError
from cupel.files import atomic_folder, read_json, write_arrays, write_json
from cupel.progress import say

__all__ = ["Artefact", "Store"]


@dataclass(frozen=True)
class Artefact:
    """What a step made.

    Args:
        values: Plain JSON values.
        arrays: Small arrays (curves, pictures, triggers).
        encoder: The model, where the step makes one.
        seconds: How long the step took when it was run.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    encoder: ImageEncoder | None = None
    seconds: float = 0.0


class Store:
    """A folder with one sub-folder per artefact, named by stage and key.

    Args:
        root: Made when first written to.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def folder(self, stage: str, key: str) -> Path:
        """Where an artefact stands or would stand."""
        return self.root / stage / key

    def workspace(self, stage: str, key: str) -> Path:
        """Where a running step keeps its checkpoint; removed when the artefact is saved."""
        return self.root / "running" / f"{stage}-{key}.safetensors"

    def has(self, stage: str, key: str) -> bool:
        """Whether the artefact is there, without reading it."""
        return (self.folder(stage, key) / "artefact.json").is_file()

    def find(self, stage: str, key: str) -> Artefact | None:
        """Read an artefact; a damaged one is removed with a word, so that it is made again."""
        folder = self.folder(stage, key)
        if not self.has(stage, key):
            return None
        try:
            note = read_json(folder / "artefact.json")
            arrays: dict[str, np.ndarray[Any, Any]] = {}
            if note["has_arrays"]:
                with np.load(folder / "arrays.npz", allow_pickle=False) as file:
                    arrays = {name: file[name] for name in file.files}
            encoder = load_encoder(folder / "encoder.safetensors") if note["has_encoder"] else None
            return Artefact(note["values"], arrays, encoder, note["seconds"])
        except (CupelError, OSError, ValueError, KeyError, EOFError) as error:
            say(f"  {stage} {key}: damaged in the store ({error}); making it again")
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def save(self, stage: str, key: str, artefact: Artefact) -> None:
        """Write an artefact whole or not at all.

        Raises:
            MachineError: disk full, read-only, …
        """
        with atomic_folder(self.folder(stage, key)) as part:
            if artefact.encoder is not None:
                save_encoder(artefact.encoder, part / "encoder.safetensors")
            if artefact.arrays:
                write_arrays(part / "arrays.npz", artefact.arrays)
            note = {
                "values": artefact.values,
                "has_arrays": bool(artefact.arrays),
                "has_encoder": artefact.encoder is not None,
                "seconds": artefact.seconds,
            }
            write_json(part / "artefact.json", note)
        self.workspace(stage, key).unlink(missing_ok=True)
