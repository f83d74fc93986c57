"""What commands share: encoders and images by name, records, lines for people."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

import cupel
from cupel.data import load, splits_of
from cupel.encoders import ENCODERS, Architecture, ImageEncoder
from cupel.encoders.storage import load_encoder
from cupel.errors import DataError, LabelsWithheld, SettingsError, UsageError, did_you_mean
from cupel.files import write_arrays
from cupel.protocols import Scanner
from cupel.records import Record
from cupel.scan import SCANNERS
from cupel.seeds import Seed
from cupel.settings import OneOf, parse, settings
from cupel.types import Dataset
from cupel.verdicts import Verdict
from cupel.vet import (
    default_chain,
    scanner_label,
)
from cupel.vet.spoken import counted_alarms

__all__ = [
    "CODES",
    "about",
    "encoder_at",
    "images_at",
    "line",
    "record_of",
    "save",
    "scanners_named",
    "settings_of",
    "spoken_shortly",
    "values_of",
]

CODES = {"clean-by-test": 0, "suspicious": 1, "backdoored": 1, "inconclusive": 3}
"""Exit codes by verdict."""
_MOST_IMAGES = 2500  # more do not sharpen an inversion


@settings
class _Named:
    encoder: Annotated[Architecture, OneOf(ENCODERS)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def settings_of(pairs: Sequence[str], where: str) -> dict[str, Any]:
    """`key=value` strings as a mapping."""
    made = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise SettingsError(where, f"'{pair}' has no '='", "write key=value")
        made[key.strip()] = _value(text)
    return made


def encoder_at(path: str, arch: str | None) -> ImageEncoder:
    """The encoder in a checkpoint; `arch` = name and `key=value` pairs, None = the file says."""
    architecture = None
    if arch is not None:
        name, *pairs = arch.split(",")
        architecture = parse(_Named, {"encoder": {"method": name, **settings_of(pairs, "--arch")}}, "--arch").encoder
    if not Path(path).exists():
        raise DataError(path, "no such file or folder", "give a checkpoint")
    return load_encoder(path, architecture)


def images_at(source: str, encoder: ImageEncoder) -> Dataset:
    """The images of a source at the encoder's size, drawn from it where there are many."""
    data = load(source, size=encoder.input_size, split=splits_of(source)[0])
    if len(data) > _MOST_IMAGES:
        rows = torch.randperm(len(data), generator=Seed(0).child("images").torch())[:_MOST_IMAGES]
        data = data.subset(rows.sort().values)
    return data


def scanners_named(names: Sequence[str], budget: str) -> list[Scanner]:
    """The scanners of these names, several of which may stand in one text; without any, the default chain."""
    chain = {scanner_label(one): one for one in default_chain(budget)}
    made = []
    for name in [part.strip() for text in names for part in text.split(",")]:
        if name not in {**SCANNERS, **chain}:
            raise UsageError("--scanner", f"unknown scanner '{name}'", did_you_mean(name, {**SCANNERS, **chain}))
        cls: Any = SCANNERS.get(name)
        scanner: Scanner = chain[name] if name in chain else cls.preset(budget)
        if scanner.needs:
            what = f"needs {' and '.join(sorted(scanner.needs))}, which a label-free scan does not give"
            free = ", ".join(one for one in {**chain, **SCANNERS} if one in chain or not _needs(SCANNERS[one]))
            error = LabelsWithheld if "labels" in scanner.needs else UsageError
            raise error(name, what, f"name it in an experiment and `cupel run` that, or choose one of {free}")
        made.append(scanner)
    return made or list(chain.values())


def _needs(cls: Any) -> frozenset[str]:
    return frozenset(cls.needs)


def record_of(command: str, name: str, seed: int, start: float, **fields: Any) -> Record:
    """A record of a command that began at `start`."""
    return Record(
        command=command, name=name, cupel=cupel.__version__, seed=seed, device="cpu",
        threads=torch.get_num_threads(), seconds={"total": round(time.monotonic() - start, 3)}, **fields,
    )  # fmt: skip


def line(label: str, text: str) -> None:
    """Print a line for people."""
    print(f"{label:<10}{text}" if len(label) < 10 else f"{label}\n{'':<10}{text}")


def about(encoder: ImageEncoder, path: str, images: Dataset) -> None:
    """Print what is looked at."""
    source = encoder.card.source
    sha = str(source.get("sha256", ""))[:12]
    line("file", f"{Path(path).name}" + (f"  sha256 {sha}…" if sha else "") + "  nothing executed")
    kind = encoder.card.architecture["method"]
    line("model", f"{kind}, {encoder.width} dimensions, {encoder.input_size}×{encoder.input_size} px")
    if encoder.card.manifest is not None:
        line("manifest", f"says it was backdoored with {encoder.card.manifest.get('attack')}; not for deployment")
    line("data", f"{len(images)} images of {images.name}, labels not read")


def spoken_shortly(verdict: Verdict) -> str:
    """A verdict in three lines."""
    alarms = "" if verdict.false_alarm is None else f"; {counted_alarms(*verdict.false_alarm)}"
    return (
        f"{verdict.verdict.upper()}  score {verdict.score:.3f}, threshold {verdict.threshold:.3f}{alarms}"
        f"\n{'':<10}{verdict.reason}\n{'':<10}tested: {verdict.tested}"
    )


def values_of(verdict: Verdict) -> dict[str, Any]:
    """A verdict as it stands in result.json, with the memory it took."""
    return {**verdict.to_json(), "peak_memory_mib": verdict.peak_memory_mib}


def save(record: Record, arrays: dict[str, np.ndarray[Any, Any]], folder: Path) -> Record:
    """Write result.json and evidence.npz."""
    if arrays:
        write_arrays(folder / "evidence.npz", arrays)
        record = dataclasses.replace(record, arrays="evidence.npz")
    record.write(folder / "result.json")
    return record
