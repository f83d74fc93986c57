"""`cupel scan`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cupel import threads
from cupel.commands.shared import (
    CODES,
    about,
    encoder_at,
    images_at,
    line,
    record_of,
    save,
    scanners_named,
    values_of,
)
from cupel.report import write_report
from cupel.seeds import Seed
from cupel.types import Dataset
from cupel.verdicts import Verdict
from cupel.vet import (
    evidence_arrays,
    junit,
    sarif,
    scan_encoder,
    spoken,
)

__all__ = ["scan"]


def scan(
    encoder: str, images: str, arch: str | None, names: Sequence[str], budget: str, seed: int, out: Path, form: str
) -> int:
    """`cupel scan`."""
    start = time.monotonic()
    threads.settle()
    scanners = scanners_named(names, budget)
    model = encoder_at(encoder, arch)
    data = images_at(images, model)
    if form == "text":
        about(model, encoder, data)
    verdict, each = scan_encoder(model, data, scanners, Seed(seed).child("scan"))
    extra = {"scans": {"scanned": {name: values_of(one) for name, one in each}}, "file": model.card.source}
    record = record_of("scan", Path(encoder).name, seed, start, verdicts={"scanned": values_of(verdict)}, extra=extra)
    arrays = evidence_arrays(verdict, "inverted/scanned") | _paths_left_out(verdict, each) | _shown(data)
    record = save(record, arrays, out)
    write_report([(record, arrays)], out / "report.html", title=f"Scan of {Path(encoder).name}")
    code = CODES[verdict.verdict]
    if form == "json":
        print(json.dumps(record.to_json(), indent=1))
    elif form == "sarif":
        print(json.dumps(sarif(encoder, model.card.source, each, code), indent=1))
    elif form == "junit":
        print(junit(encoder, each, record.seconds["total"]))
    else:
        for label, text in spoken(verdict, each):
            line(label, text)
        line("report", f"{out / 'report.html'}  {out / 'result.json'}")
    return code


def _paths_left_out(verdict: Verdict, each: Sequence[tuple[str, Verdict]]) -> dict[str, np.ndarray[Any, Any]]:
    """Paths of the inversions whose triggers are not in the verdict that counts: `scans/scanned/<scanner>/<i>/path`."""
    kept = {id(one) for one in verdict.evidence}
    return {
        f"scans/scanned/{name}/{i}/path": one.path
        for name, said in each
        for i, one in enumerate(said.evidence)
        if one.path is not None and id(one) not in kept
    }


def _shown(data: Dataset) -> dict[str, np.ndarray[Any, Any]]:
    """The first image, uint8 `[1, height, width, 3]`, for the page to put the triggers on."""
    first = data.inputs[torch.arange(min(1, len(data)))].permute(0, 2, 3, 1)
    return {"images/scanned": first.contiguous().numpy()} if len(data) else {}
