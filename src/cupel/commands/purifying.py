"""`cupel purify`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupel import threads
from cupel.commands.shared import (
    CODES,
    about,
    encoder_at,
    images_at,
    line,
    record_of,
    scanners_named,
    settings_of,
    spoken_shortly,
)
from cupel.data import load, splits_of
from cupel.encoders import ImageEncoder
from cupel.encoders.storage import save_encoder
from cupel.errors import DataError, UsageError, did_you_mean
from cupel.files import write_json
from cupel.metrics import check_labels
from cupel.protocols import Purifier
from cupel.purify import PURIFIERS, label_free
from cupel.records import Record
from cupel.seeds import Seed
from cupel.settings import parse
from cupel.types import Dataset
from cupel.verdicts import Evidence, Verdict
from cupel.vet import (
    purify_encoder,
    scan_evidence,
)

__all__ = ["purify"]


def _saved_scan(folder: Path) -> tuple[Verdict, list[str]]:
    """The verdict of an earlier scan with its evidence, and the scanners it was made with."""
    record = Record.read(folder / "result.json")
    if "scanned" not in record.verdicts or record.arrays is None:
        raise DataError(folder, "holds no scan with evidence", "give the --out folder of `cupel scan`")
    plain = dict(record.verdicts["scanned"])
    try:
        with np.load(folder / record.arrays, allow_pickle=False) as file:
            arrays = {k.replace("inverted/scanned/", "inverted/"): file[k] for k in file.files}
        evidence: list[Evidence] = scan_evidence(plain, arrays)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(folder / record.arrays, f"is damaged ({type(error).__name__})", "scan again") from None
    known = {k: plain[k] for k in ("verdict", "score", "threshold", "tested", "details", "reason")}
    scans = record.extra.get("scans")
    each = scans.get("scanned") if isinstance(scans, Mapping) else None
    return Verdict(**known, evidence=tuple(evidence)), list(each) if isinstance(each, Mapping) else []


def _purifier(name: str, budget: str, changes: Sequence[str], labels: bool) -> Purifier:
    """A purifier by name, with changed settings; `labels` tells whether there are labelled images for it."""
    if name not in PURIFIERS:
        raise UsageError("--purifier", f"unknown purifier '{name}'", did_you_mean(name, PURIFIERS))
    cls: Any = PURIFIERS[name]
    made = cls.preset(budget)
    if changes:
        wanted = settings_of(changes, "--set")
        checked = parse(cls, wanted, "--set")
        made = dataclasses.replace(made, **{key: getattr(checked, key) for key in wanted})
    if "labels" in made.needs and not labels:
        todo = "give labelled images by --labels, or choose a label-free purifier: " + ", ".join(label_free())
        raise UsageError("--purifier", f"'{name}' needs labels", todo)
    if labels and "labels" not in made.needs:
        raise UsageError("--labels", f"purifier '{name}' reads no labels", "leave the option out")
    purifier: Purifier = made
    return purifier


def _labelled(source: str, encoder: ImageEncoder) -> Dataset:
    """All images of a source, each of which must have a label."""
    data = load(source, size=encoder.input_size, split=splits_of(source)[0])
    check_labels(data.labels, data.num_classes, data.name)
    return data


def purify(
    encoder: str, images: str, out: Path, arch: str | None, name: str, evidence: Path | None, labels: str | None,
    budget: str, changes: Sequence[str], seed: int, form: str,
) -> int:  # fmt: skip
    """`cupel purify`."""
    start = time.monotonic()
    threads.settle()
    if out.suffix != ".safetensors":
        raise UsageError("--out", f"'{out}' does not end in .safetensors", "weights are written in that format only")
    if out.resolve() == Path(encoder).resolve():
        raise UsageError("--out", f"'{out}' is the encoder itself", "give another file: the given one stays as it is")
    purifier = _purifier(name, budget, changes, labels is not None)
    before, names = _saved_scan(evidence) if evidence else (None, [])
    scanners = scanners_named(names, budget)
    model = encoder_at(encoder, arch)
    data, labelled = images_at(images, model), None if labels is None else _labelled(labels, model)
    if form == "text":
        about(model, encoder, data)
        if labelled is not None:
            line("labels", f"{len(labelled)} images of {labelled.name}, {labelled.num_classes} classes")
    made = purify_encoder(model, data, purifier, scanners, Seed(seed), before=before, labelled=labelled)
    save_encoder(made.encoder, out)
    verdicts = {"scanned": made.before.to_json(), "purified": made.after.to_json()}
    extra = {
        "rounds": made.rounds, "drift": made.drift, "residue": made.residue, "file": model.card.source,
        "defences": {f"purify {name}": {"images": len(data if labelled is None else labelled), **made.cost}},
    }  # fmt: skip
    record = record_of("purify", Path(encoder).name, seed, start, verdicts=verdicts, extra=extra)
    write_json(out.parent / "result.json", record.to_json())
    if form == "json":
        print(json.dumps(record.to_json(), indent=1))
    else:
        line("before", spoken_shortly(made.before))
        line("after", spoken_shortly(made.after))
        line("drift", f"{made.drift:.4f} mean 1 − cosine of clean embeddings; {made.rounds} round(s)")
        if made.residue:
            line("residue", "concentration under the first scan's trigger {:.3f} → {:.3f}".format(*made.residue))
        took = "{forward_images:,} images forward, {backward_images:,} backward, without the scans".format(**made.cost)
        memory = made.cost["peak_memory_mib"]
        line("cost", took + ("" if memory is None else f"; {memory:.0f} MiB of memory at most"))
        line("", "A clean re-scan alone does not prove that the backdoor is gone.")
        line("written", f"{out}  {out.parent / 'result.json'}")
    return CODES[made.after.verdict]
