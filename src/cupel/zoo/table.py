"""The tables of a zoo: what each scanner and the chain find in the half that no threshold was read off."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cupel.zoo.calibration import Calibration
from cupel.zoo.entries import Entry, Folders
from cupel.zoo.prices import Price, prices
from cupel.zoo.statistics import (
    Confusion,
    auroc,
    auroc_interval,
    lower_bound,
    smallest_found,
    tpr_at_fpr,
    upper_bound,
)

__all__ = ["CHAIN", "Row", "Tables", "tables"]

CHAIN = "chain"
FPR, POWER = 0.05, 0.9

Score = Callable[[Entry], float | None]
"""Robust standard deviations above clean encoders; None = not scanned, or nothing to compare with."""


@dataclass(frozen=True)
class Judge:
    """One scanner, or several of which the worst counts.

    Args:
        name: Of the scanner, or `chain`.
        parts: Names of its scanners.
        z: See `Score`.
        says: Whether it calls an entry backdoored; None = it was not scanned.
    """

    name: str
    parts: Sequence[str]
    z: Score
    says: Callable[[Entry], bool | None]


@dataclass(frozen=True)
class Row:
    """One scanner on one group of backdoored encoders against all clean ones of the same half.

    Args:
        scanner: Name, or `chain`.
        half: Which half.
        group: `reachable` (working patches and blends), `weak` (attack success below a half), `hard`, a zoo
            (`zoo:…`), or an attack's family (`family:…`).
        positives, negatives: Encoders.
        auroc, low, high: With its 95 % interval; None = one kind is missing.
        tpr_at_fpr: Best TPR at FPR ≤ 5 %, wherever that threshold lies.
        confusion: As a scan with the calibrations of the other half says; see `Calibration.says`.
        absolute: Found and false alarms of the same scans read without references (verdict `backdoored`; of the chain,
            by any of its scanners).
        inconclusive: Scans that said nothing; they count as not found.
    """

    scanner: str
    half: str
    group: str
    positives: int
    negatives: int
    auroc: float | None
    low: float | None
    high: float | None
    tpr_at_fpr: float | None
    confusion: Confusion
    absolute: tuple[int, int]
    inconclusive: int

    @property
    def false_alarm_bound(self) -> float | None:
        """Upper 95 % bound of the share of clean encoders that are called backdoored."""
        return upper_bound(self.confusion.false_alarms, self.negatives) if self.negatives else None

    @property
    def found_bound(self) -> float | None:
        """Lower 95 % bound of the share of backdoored encoders that are found."""
        return lower_bound(self.confusion.found, self.positives) if self.positives else None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        made = {**asdict(self), "confusion": self.confusion._asdict()}
        return {**made, "false_alarm_bound": self.false_alarm_bound, "found_bound": self.found_bound}


@dataclass(frozen=True)
class Tables:
    """Everything that `cupel zoo table` tells.

    Args:
        rows: Test half first.
        costs: By scanner: median seconds, mean images forward and backward, largest memory.
        smallest: By scanner: area, found and tried; None = not even the largest patch.
        overlaps: By scanner: number of inverted triggers, median IoU, median distance.
        without: AUROC on the calibration half of the chain, and of the chain without each of its scanners.
        prices: What smaller budgets lose against the next larger one.
        levels: By scanner: how many entries were compared on which level.
        counts: Encoders by half and kind.
        failed: Name and reason.
        missing: Members that have not been tried.
    """

    rows: tuple[Row, ...]
    costs: dict[str, dict[str, float | None]]
    smallest: dict[str, tuple[float, int, int] | None]
    overlaps: dict[str, dict[str, float | int]]
    without: dict[str, float | None]
    prices: tuple[Price, ...]
    levels: dict[str, dict[str, int]]
    counts: dict[str, dict[str, int]]
    failed: tuple[tuple[str, str], ...]
    missing: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "rows": [one.to_json() for one in self.rows]}


def tables(found: Folders, calibrations: dict[str, Calibration]) -> Tables:
    """All tables.

    Args:
        found: The zoos.
        calibrations: By scanner, each made of the same entries.
    """
    judges = {name: Judge(name, [name], _memo(one.z), one.says) for name, one in calibrations.items()}
    chain = [judges[name] for name in found.chain if name in judges]
    everyone = [*judges.values(), *([_together(chain)] if chain else [])]
    rows = [
        _row(judge, half, group, members, found.entries)
        for half in ("test", "calibration")
        for group, members in _groups([one for one in found.entries if one.half == half])
        for judge in everyone
    ]
    test = [one for one in found.entries if one.half == "test"]
    return Tables(
        rows=tuple(row for row in rows if row is not None),
        costs={name: _cost(name, found.entries) for name in judges},
        smallest={judge.name: _smallest(judge, test) for judge in everyone},
        overlaps={name: made for name in judges if (made := _overlaps(name, test))},
        without=_without(chain, [one for one in found.entries if one.half == "calibration"]),
        prices=prices(list(judges), found.entries),
        levels={name: _levels(one, found.entries) for name, one in calibrations.items()},
        counts={half: _counts([one for one in found.entries if one.half == half]) for half in ("calibration", "test")},
        failed=tuple((one.name, one.reason) for one in found.failed),
        missing=found.missing,
    )


def _memo(score: Score) -> Score:
    known: dict[tuple[str, str], float | None] = {}

    def look(entry: Entry) -> float | None:
        key = (entry.zoo, entry.name)
        if key not in known:
            known[key] = score(entry)
        return known[key]

    return look


def _together(judges: Sequence[Judge]) -> Judge:
    """The chain of several scanners: the largest z of those that have one; backdoored where one of them says so."""

    def z(entry: Entry) -> float | None:
        return max((found for one in judges if (found := one.z(entry)) is not None), default=None)

    def says(entry: Entry) -> bool | None:
        said = [word for one in judges if (word := one.says(entry)) is not None]
        return any(said) if said else None

    return Judge(CHAIN, [part for one in judges for part in one.parts], z, says)


def _groups(entries: Sequence[Entry]) -> list[tuple[str, list[Entry]]]:
    bad = [one for one in entries if one.backdoored]
    reachable = [one for one in bad if one.effective and not one.hard]
    groups = [
        ("reachable", reachable),
        ("weak", [one for one in bad if not one.effective and not one.hard]),
        ("hard", [one for one in bad if one.hard]),
    ]
    zoos = dict.fromkeys(one.zoo for one in reachable)
    if len(zoos) > 1:
        groups += [(f"zoo:{zoo}", [one for one in reachable if one.zoo == zoo]) for zoo in zoos]
    families = dict.fromkeys(one.family for one in bad)
    groups += [(f"family:{name}", [one for one in bad if one.family == name]) for name in families]
    return [(name, members) for name, members in groups if members]


def _row(judge: Judge, half: str, group: str, members: Sequence[Entry], entries: Sequence[Entry]) -> Row | None:
    zoos = {one.zoo for one in members}
    clean = [one for one in entries if one.half == half and not one.backdoored and one.zoo in zoos]
    scored = [(one, z) for one in [*members, *clean] if (z := judge.z(one)) is not None]
    high = [z for one, z in scored if one.backdoored]
    low = [z for one, z in scored if not one.backdoored]
    if not high and not low:
        return None
    both = bool(high) and bool(low)
    said = [{one.scans[part].verdict for part in judge.parts if part in one.scans} for one, _ in scored]
    words = [(one.backdoored, "backdoored" in found) for (one, _), found in zip(scored, said, strict=True)]
    low_end, high_end = auroc_interval(high, low) if both else (None, None)
    return Row(
        scanner=judge.name,
        half=half,
        group=group,
        positives=len(high),
        negatives=len(low),
        auroc=auroc(high, low) if both else None,
        low=low_end,
        high=high_end,
        tpr_at_fpr=tpr_at_fpr(high, low, FPR) if both else None,
        confusion=Confusion.of(
            *([bool(judge.says(one)) for one, _ in scored if one.backdoored is kind] for kind in (True, False))
        ),
        absolute=(sum(bad and hit for bad, hit in words), sum(hit and not bad for bad, hit in words)),
        inconclusive=said.count({"inconclusive"}),
    )


def _cost(scanner: str, entries: Sequence[Entry]) -> dict[str, float | None]:
    scans = [one.scans[scanner] for one in entries if scanner in one.scans]
    if not scans:
        return {}
    forward = [one.forward for one in scans if one.forward is not None]
    backward = [one.backward for one in scans if one.backward is not None]
    memory = [one.memory_mib for one in scans if one.memory_mib is not None]
    return {
        "seconds": statistics.median(one.seconds for one in scans),
        "forward_images": statistics.fmean(forward) if forward else None,
        "backward_images": statistics.fmean(backward) if backward else None,
        "memory_mib": max(memory) if memory else None,
    }


def _smallest(judge: Judge, entries: Sequence[Entry]) -> tuple[float, int, int] | None:
    tried = [
        (one.area, said)
        for one in entries
        if one.effective
        and one.stamp
        and not one.hard
        and one.area is not None
        and (said := judge.says(one)) is not None
    ]
    return smallest_found([area for area, _ in tried], [hit for _, hit in tried], POWER)


def _overlaps(scanner: str, entries: Sequence[Entry]) -> dict[str, float | int]:
    scans = [one.scans[scanner] for one in entries if scanner in one.scans and one.stamp]
    iou = [one.iou for one in scans if one.iou is not None]
    distance = [one.distance for one in scans if one.distance is not None]
    if not iou:
        return {}
    return {"n": len(iou), "iou": statistics.median(iou), "distance": statistics.median(distance)}


def _without(chain: Sequence[Judge], entries: Sequence[Entry]) -> dict[str, float | None]:
    cases = {CHAIN: list(chain)} | ({f"without {one.name}": [x for x in chain if x is not one] for one in chain})
    made: dict[str, float | None] = {}
    for name, members in cases.items():
        judge = _together(members)
        scored = [(one, z) for one in entries if (z := judge.z(one)) is not None]
        high = [z for one, z in scored if one.effective and not one.hard]
        low = [z for one, z in scored if not one.backdoored]
        made[name] = auroc(high, low) if high and low else None
    return made


def _levels(calibration: Calibration, entries: Sequence[Entry]) -> dict[str, int]:
    groups = [calibration.group(one) for one in entries if calibration.scanner in one.scans]
    names = ["none" if one is None else one.level for one in groups]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _counts(entries: Sequence[Entry]) -> dict[str, int]:
    bad = [one for one in entries if one.backdoored]
    return {
        "clean": len(entries) - len(bad),
        "fine_tuned": sum(one.attacked and not one.backdoored for one in entries),
        "backdoored": len(bad),
        "reachable": sum(one.effective and not one.hard for one in bad),
        "weak": sum(not one.effective and not one.hard for one in bad),
        "hard": sum(one.hard for one in bad),
    }
