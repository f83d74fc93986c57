"""Encoders on disk: written as safetensors with a card, read from files that are assumed hostile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from cupel.checkpoint import TensorFile, match_keys, read_tensors, write_safetensors
from cupel.encoders import ENCODERS, Architecture, Fast, ImageEncoder, ResNet18, ResNet50
from cupel.encoders.image import Card
from cupel.errors import CheckpointError, CupelError
from cupel.files import write_json
from cupel.seeds import Seed
from cupel.settings import OneOf, parse, settings

__all__ = ["architecture_of", "load_encoder", "save_encoder"]

MANIFEST = "backdoor_manifest.json"


@settings
class _Built:
    """How the architecture stands in a card."""

    encoder: Annotated[Architecture, OneOf(ENCODERS)]


def save_encoder(encoder: ImageEncoder, path: str | Path) -> None:
    """Write an encoder atomically; a backdoored one gets its manifest beside it too.

    Raises:
        MachineError: disk full, read-only, ….
    """
    path = Path(path)
    state = encoder.module.backbone.state_dict()
    tensors = {name: value.detach().cpu().contiguous().numpy() for name, value in state.items()}
    write_safetensors(path, tensors, encoder.card.to_json())
    if encoder.card.manifest is not None:
        write_json(path.parent / MANIFEST, dict(encoder.card.manifest))


def load_encoder(
    path: str | Path, architecture: Architecture | None = None, allow_missing: Sequence[str] = ()
) -> ImageEncoder:
    """Read an encoder; nothing in the file is executed, and no half-loaded model is ever returned.

    Args:
        path: safetensors or a torch checkpoint, whatever its suffix; or a folder that holds `encoder.safetensors`.
        architecture: What it is; None = from its card, else guessed from its tensors.
        allow_missing: Patterns of keys that may be absent.

    Raises:
        CheckpointError: unreadable, damaged, missing or unexpected keys.
        UnsafeFile: the file asks for code to be run.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    file = read_tensors(path)
    claimed = _card(file, path)
    if architecture is None and claimed is not None:
        architecture = parse(_Built, {"encoder": dict(claimed.architecture)}, f"{path.name}.card").encoder
    if architecture is None:
        architecture = architecture_of(file, path)
    encoder = architecture.build(Seed(0))
    expected = {name: tuple(value.shape) for name, value in encoder.module.backbone.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in file.tensors.items()}
    counters = [name for name in expected if name.endswith("num_batches_tracked")]
    keys = match_keys(found, expected, path.name, [*allow_missing, *counters])
    state = {name: torch.from_numpy(np.array(file.tensors[there])) for name, there in keys.names.items()}
    encoder.module.backbone.load_state_dict(state, strict=False)  # match_keys was strict, and says what was missing
    source = {"file": path.name, "sha256": file.sha256, "prefix": keys.prefix, "ignored": list(keys.ignored)}
    if claimed is None:
        return ImageEncoder(encoder.module, dataclasses.replace(encoder.card, source=source))
    card = dataclasses.replace(
        encoder.card, recipe=claimed.recipe, source=claimed.source or source, manifest=claimed.manifest
    )
    return ImageEncoder(encoder.module, card)


def _card(file: TensorFile, path: Path) -> Card | None:
    if file.card is None:
        return None
    fields = {k: v for k, v in file.card.items() if k != "schema"}
    try:
        card = Card(**fields)
    except TypeError as error:
        raise CheckpointError(path, f"has a damaged card ({error})", "name the architecture with --arch") from None
    if not isinstance(card.architecture, Mapping) or not all(
        isinstance(one, Mapping | None) for one in (card.recipe, card.source, card.manifest)
    ):
        raise CheckpointError(path, "has a damaged card", "name the architecture with --arch")
    return card


def architecture_of(file: TensorFile, path: Path) -> Architecture:
    """Guess the architecture from names and shapes.

    Raises:
        CheckpointError: nothing fits; the line names what was tried.
    """
    found: dict[str, tuple[int, ...]] = {name: tuple(value.shape) for name, value in file.tensors.items()}
    first: Any = next((shape for name, shape in found.items() if len(shape) == 4 and shape[1] == 3), None)
    candidates: list[Architecture] = []
    if first is not None:
        width, side = first[0], first[2]
        by_stem: dict[int, list[Architecture]] = {
            4: [Fast(width=width)],
            3: [ResNet18(width_multiplier=width / 64)],
            7: [ResNet18(stem="imagenet", input_size=224, normalisation="imagenet"), ResNet50()],
        }
        candidates = by_stem.get(side, [])
    for candidate in candidates:
        expected = {k: tuple(v.shape) for k, v in candidate.build(Seed(0)).module.backbone.state_dict().items()}
        try:
            match_keys(found, expected, path.name, [k for k in expected if k.endswith("num_batches_tracked")])
        except CupelError:
            continue
        return candidate
    raise CheckpointError(
        path,
        "its tensors fit no known architecture",
        f"name it with --arch ({', '.join(ENCODERS)})",
        code="unknown-architecture",
    )
