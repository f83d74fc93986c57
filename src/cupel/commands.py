"""What the commands do that take a model in hand: read, work, write, say; each returns its exit code."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

import cupel
from cupel import threads
from cupel.data import load, splits_of
from cupel.encoders import ENCODERS, Architecture, ImageEncoder
from cupel.encoders.storage import load_encoder, save_encoder
from cupel.errors import DataError, LabelsWithheld, SettingsError, UsageError, did_you_mean
from cupel.experiment import cells, plan, read_experiment, run_cells
from cupel.experiment.run import cell_name
from cupel.experiment.store import Store
from cupel.files import write_arrays, write_json
from cupel.metrics import check_labels
from cupel.protocols import Purifier, Scanner
from cupel.purify import PURIFIERS, label_free
from cupel.records import Record
from cupel.report import load_cells, write_report
from cupel.scan import SCANNERS
from cupel.seeds import Seed
from cupel.settings import OneOf, parse, settings
from cupel.types import Dataset, Evidence, Verdict
from cupel.vet import (
    default_chain,
    junit,
    purify_encoder,
    sarif,
    scan_encoder,
    scan_evidence,
    scanner_label,
    spoken,
)
from cupel.vet.spoken import counted_alarms

__all__ = ["demo", "purify", "run", "scan"]

_CODES = {"clean-by-test": 0, "suspicious": 1, "backdoored": 1, "inconclusive": 3}
_MOST_IMAGES = 2500  # more do not sharpen an inversion


@settings
class _Named:
    encoder: Annotated[Architecture, OneOf(ENCODERS)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _settings_of(pairs: Sequence[str], where: str) -> dict[str, Any]:
    """`key=value` strings as a mapping."""
    made = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise SettingsError(where, f"'{pair}' has no '='", "write key=value")
        made[key.strip()] = _value(text)
    return made


def _encoder(path: str, arch: str | None) -> ImageEncoder:
    architecture = None
    if arch is not None:
        name, *pairs = arch.split(",")
        architecture = parse(_Named, {"encoder": {"method": name, **_settings_of(pairs, "--arch")}}, "--arch").encoder
    if not Path(path).exists():
        raise DataError(path, "no such file or folder", "give a checkpoint")
    return load_encoder(path, architecture)


def _images(source: str, encoder: ImageEncoder) -> Dataset:
    data = load(source, size=encoder.input_size, split=splits_of(source)[0])
    if len(data) > _MOST_IMAGES:
        rows = torch.randperm(len(data), generator=Seed(0).child("images").torch())[:_MOST_IMAGES]
        data = data.subset(rows.sort().values)
    return data


def _scanners(names: Sequence[str], budget: str) -> list[Scanner]:
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


def _record(command: str, name: str, seed: int, start: float, **fields: Any) -> Record:
    return Record(
        command=command, name=name, cupel=cupel.__version__, seed=seed, device="cpu",
        threads=torch.get_num_threads(), seconds={"total": round(time.monotonic() - start, 3)}, **fields,
    )  # fmt: skip


def _line(label: str, text: str) -> None:
    print(f"{label:<10}{text}" if len(label) < 10 else f"{label}\n{'':<10}{text}")


def _about(encoder: ImageEncoder, path: str, images: Dataset) -> None:
    source = encoder.card.source
    sha = str(source.get("sha256", ""))[:12]
    _line("file", f"{Path(path).name}" + (f"  sha256 {sha}…" if sha else "") + "  nothing executed")
    kind = encoder.card.architecture["method"]
    _line("model", f"{kind}, {encoder.width} dimensions, {encoder.input_size}×{encoder.input_size} px")
    if encoder.card.manifest is not None:
        _line("manifest", f"says it was backdoored with {encoder.card.manifest.get('attack')}; not for deployment")
    _line("data", f"{len(images)} images of {images.name}, labels not read")


def _spoken(verdict: Verdict) -> str:
    alarms = "" if verdict.false_alarm is None else f"; {counted_alarms(*verdict.false_alarm)}"
    return (
        f"{verdict.verdict.upper()}  score {verdict.score:.3f}, threshold {verdict.threshold:.3f}{alarms}"
        f"\n{'':<10}{verdict.reason}\n{'':<10}tested: {verdict.tested}"
    )


def _values(verdict: Verdict) -> dict[str, Any]:
    """A verdict as it stands in result.json, with the memory it took."""
    return {**verdict.to_json(), "peak_memory_mib": verdict.peak_memory_mib}


def _evidence_arrays(verdict: Verdict, which: str) -> dict[str, np.ndarray[Any, Any]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for i, one in enumerate(verdict.evidence):
        arrays |= {f"inverted/{which}/{i}/mask": one.mask, f"inverted/{which}/{i}/pattern": one.pattern}
    return arrays


def _save(record: Record, arrays: dict[str, np.ndarray[Any, Any]], folder: Path) -> Record:
    """Write result.json and evidence.npz."""
    if arrays:
        write_arrays(folder / "evidence.npz", arrays)
        record = dataclasses.replace(record, arrays="evidence.npz")
    record.write(folder / "result.json")
    return record


def scan(
    encoder: str, images: str, arch: str | None, names: Sequence[str], budget: str, seed: int, out: Path, form: str
) -> int:
    """`cupel scan`."""
    start = time.monotonic()
    threads.settle()
    scanners = _scanners(names, budget)
    model = _encoder(encoder, arch)
    data = _images(images, model)
    if form == "text":
        _about(model, encoder, data)
    verdict, each = scan_encoder(model, data, scanners, Seed(seed).child("scan"))
    extra = {"scans": {"scanned": {name: _values(one) for name, one in each}}, "file": model.card.source}
    record = _record("scan", Path(encoder).name, seed, start, verdicts={"scanned": _values(verdict)}, extra=extra)
    arrays = _evidence_arrays(verdict, "scanned")
    record = _save(record, arrays, out)
    write_report([(record, arrays)], out / "report.html", title=f"Scan of {Path(encoder).name}")
    code = _CODES[verdict.verdict]
    if form == "json":
        print(json.dumps(record.to_json(), indent=1))
    elif form == "sarif":
        print(json.dumps(sarif(encoder, model.card.source, each, code), indent=1))
    elif form == "junit":
        print(junit(encoder, each, record.seconds["total"]))
    else:
        for label, text in spoken(verdict, each):
            _line(label, text)
        _line("report", f"{out / 'report.html'}  {out / 'result.json'}")
    return code


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
        wanted = _settings_of(changes, "--set")
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
    scanners = _scanners(names, budget)
    model = _encoder(encoder, arch)
    data, labelled = _images(images, model), None if labels is None else _labelled(labels, model)
    if form == "text":
        _about(model, encoder, data)
        if labelled is not None:
            _line("labels", f"{len(labelled)} images of {labelled.name}, {labelled.num_classes} classes")
    made = purify_encoder(model, data, purifier, scanners, Seed(seed), before=before, labelled=labelled)
    save_encoder(made.encoder, out)
    verdicts = {"scanned": made.before.to_json(), "purified": made.after.to_json()}
    extra = {"rounds": made.rounds, "drift": made.drift, "residue": made.residue, "file": model.card.source}
    record = _record("purify", Path(encoder).name, seed, start, verdicts=verdicts, extra=extra)
    write_json(out.parent / "result.json", record.to_json())
    if form == "json":
        print(json.dumps(record.to_json(), indent=1))
    else:
        _line("before", _spoken(made.before))
        _line("after", _spoken(made.after))
        _line("drift", f"{made.drift:.4f} mean 1 − cosine of clean embeddings; {made.rounds} round(s)")
        if made.residue:
            _line("residue", "concentration under the first scan's trigger {:.3f} → {:.3f}".format(*made.residue))
        _line("", "A clean re-scan alone does not prove that the backdoor is gone.")
        _line("written", f"{out}  {out.parent / 'result.json'}")
    return _CODES[made.after.verdict]


def run(source: str, out: Path | None, changes: Sequence[str], dry_run: bool) -> int:
    """`cupel run`."""
    data, where = read_experiment(source)
    found = cells(data, where, changes)
    out = out or Path("runs") / found[0][1].name
    if dry_run:
        store = Store(out / "store")
        for point, experiment in found:
            print(cell_name(experiment, point))
            for step in plan(experiment):
                print(f"  {'stored' if store.has(step.stage, step.key) else 'to do ':<7} {step.key[:12]}  {step.name}")
        return 0
    threads.settle()
    return _run(found, out, "run")


def _run(found: Sequence[Any], out: Path, command: str) -> int:
    start = time.monotonic()
    records = run_cells(found, out, command=command)
    summary = records[0]
    if len(records) > 1:
        metrics = {f"{r.name}/{k}": m for r in records for k, m in r.metrics.items()}
        rows = [{"name": r.name, "status": r.status, "reason": r.reason} for r in records]
        summary = _record(command, found[0][1].name, records[0].seed, start, metrics=metrics, extra={"cells": rows})
    elif summary.arrays is not None:
        summary = dataclasses.replace(summary, arrays=f"cells/{summary.arrays}")
    failed = [r for r in records if r.status == "failed"]
    if failed:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in failed)
        summary = dataclasses.replace(summary, status="failed", reason=reasons)
    summary.write(out / "result.json")
    write_report(load_cells(out), out / "report.html", title=found[0][1].name)
    for record in records:
        _summarise(record)
    _line("report", f"{out / 'report.html'}  {out / 'result.json'}")
    if failed:
        return max(int(r.extra.get("exit_code", 2)) for r in failed) if len(records) == 1 else 2
    return 0


def _summarise(record: Record) -> None:
    print(f"\n{record.name}" + ("" if record.status == "done" else f"  {record.status.upper()}: {record.reason}"))
    for name, metric in record.metrics.items():
        shown = (
            "not measurable" if metric.value is None else f"{metric.value:7.2%}  [{metric.low:.2%}, {metric.high:.2%}]"
        )
        print(f"  {name:<44}{shown}  n {metric.n}, seeds {metric.seeds}")
    for which, verdict in record.verdicts.items():
        numbers = f"score {verdict['score']:.3f}, threshold {verdict['threshold']:.3f}"
        print(f"  scan of {which:<36}{verdict['verdict']}  {numbers}")
    if "total" in record.seconds:
        print(f"  {record.seconds['total']:.1f} s")


def demo(out: Path, seed: int, data: str) -> int:
    """`cupel demo`."""
    threads.settle()
    content, where = read_experiment(f"demo-{data}")
    return _run(cells(content, where, [f"seed={seed}"]), out, "demo")
