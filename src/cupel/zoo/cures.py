"""What purifiers did to the backdoored encoders of zoos: reading the records, and counting the goals that were met."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cupel.errors import DataError
from cupel.files import read_json
from cupel.records import Record, mean_interval
from cupel.zoo.entries import EFFECTIVE, MANIFEST
from cupel.zoo.parts import GIVEN, TWIN
from cupel.zoo.purifying import FOLDER

__all__ = ["Cure", "Summary", "Values", "read_cures", "summaries"]

EXCESS, LOSS, ROBUST, RETUNED = 0.05, 0.02, 0.9, 0.10
"""Goals: attack success above the baseline, accuracy lost, share of the twin's robust accuracy, retuned success above
the twin's."""
_ROUNDING = 1e-9
LARGE = 0.06  # share of the image from which a patch counts as large


@dataclass(frozen=True)
class Values:
    """Means over heads (and retunings); None = not measured.

    Args:
        accuracy, asr, robust: Of new heads on the encoder.
        retuned: Attack success after retuning.
        retuned_accuracy: Accuracy after it.
        to_twin: Mean cosine of clean embeddings to the clean twin's.
        old_accuracy, old_asr: Of heads that were fitted on the encoder as given, put on the purified one.
        seconds: Of purification.
        forward, backward: Images through an encoder in purification.
        memory: Most that the process held, in MiB.
    """

    accuracy: float
    asr: float
    robust: float
    retuned: float | None = None
    retuned_accuracy: float | None = None
    to_twin: float | None = None
    old_accuracy: float | None = None
    old_asr: float | None = None
    seconds: float | None = None
    forward: float | None = None
    backward: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Cure:
    """One backdoored encoder with all that was made of it.

    Args:
        name, zoo, family, half: Of the encoder.
        area: Share of the image that the trigger changes; None = not known.
        given, twin: As given, and its clean twin.
        purified: By purifier.
    """

    name: str
    zoo: str
    family: str
    half: str
    area: float | None
    given: Values
    twin: Values
    purified: Mapping[str, Values]

    @property
    def works(self) -> bool:
        """Whether there was a backdoor to remove."""
        return self.given.asr >= EFFECTIVE

    def removed(self, name: str) -> bool:
        """Attack success near the clean twin's, without much loss of accuracy against the encoder as given."""
        one = self.purified[name]
        return one.asr <= self.twin.asr + EXCESS + _ROUNDING and one.accuracy >= self.given.accuracy - LOSS - _ROUNDING

    def robust(self, name: str) -> bool:
        """Triggered images are recognised nearly as often as by the clean twin."""
        return self.purified[name].robust >= ROBUST * self.twin.robust - _ROUNDING

    def lasting(self, name: str) -> bool | None:
        """A few poisoned images wake it hardly more than they teach the clean twin; None = not measured."""
        after, twin = self.purified[name].retuned, self.twin.retuned
        return None if after is None or twin is None else after <= twin + RETUNED + _ROUNDING


@dataclass(frozen=True)
class Summary:
    """One purifier on one group of encoders.

    Args:
        purifier, group: Names.
        encoders: How many.
        means: By value: mean and 95 % t-interval over encoders (None below three).
        removed, robust, lasting: How many met each goal.
        measured: Of how many retuning was measured.
    """

    purifier: str
    group: str
    encoders: int
    means: Mapping[str, tuple[float, float | None, float | None]]
    removed: int
    robust: int
    lasting: int
    measured: int


def read_cures(folders: Sequence[Path]) -> tuple[list[Cure], list[tuple[str, str]]]:
    """Encoders that purifiers were tried on, and what failed, as name and reason.

    Raises:
        DataError: a damaged file.
    """
    found: list[Cure] = []
    failed: list[tuple[str, str]] = []
    for folder in folders:
        for member in read_json(folder / MANIFEST)["members"]:
            path = folder / FOLDER / f"{member}.json"
            if path.is_file():
                record = Record.read(path)
                failed += [(record.name, note) for note in ([record.reason] if record.reason else record.notes)]
                if record.status == "done":
                    found.append(_cure(record))
    return found, failed


def _cure(record: Record) -> Cure:
    try:
        note = record.extra["zoo"]
        made = {name: _values(one) for name, one in note["purified"].items() if "accuracy" in one["metrics"]}
        given, twin = made.pop(GIVEN), made.pop(TWIN)
        return Cure(record.name, note["zoo"], note["family"], note["half"], note["area"], given, twin, made)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(record.name, f"is a damaged record of purifiers ({error})", "purify again") from error


def _values(one: Mapping[str, Any]) -> Values:
    def value(name: str) -> float | None:
        return one["metrics"][name]["value"] if name in one["metrics"] else None

    return Values(
        accuracy=float(one["metrics"]["accuracy"]["value"]),
        asr=float(one["metrics"]["attack_success_rate"]["value"]),
        robust=float(one["metrics"]["robust_accuracy"]["value"]),
        retuned=value("retuned_attack_success_rate"),
        retuned_accuracy=value("retuned_accuracy"),
        to_twin=one.get("companions", {}).get("clean_to_twin_cosine"),
        old_accuracy=value("accuracy@old_head"),
        old_asr=value("attack_success_rate@old_head"),
        seconds=one.get("seconds"),
        **{name: one.get("cost", {}).get(key) for name, key in _COSTS.items()},
    )


_COSTS = {"forward": "forward_images", "backward": "backward_images", "memory": "peak_memory_mib"}
_OPTIONAL = {
    "retuned": "retuned", "to twin": "to_twin", "old accuracy": "old_accuracy", "old asr": "old_asr",
    "seconds": "seconds", "forward": "forward", "backward": "backward", "memory": "memory",
}  # fmt: skip


def summaries(cures: Sequence[Cure]) -> list[Summary]:
    """Every purifier on the encoders whose backdoor worked: all of them, by zoo, by family, and large patches."""
    works = [one for one in cures if one.works]
    names = dict.fromkeys(name for one in works for name in one.purified)
    groups = [("all", works)]
    groups += [(f"zoo:{zoo}", [x for x in works if x.zoo == zoo]) for zoo in dict.fromkeys(x.zoo for x in works)]
    groups += [(f"family:{f}", [x for x in works if x.family == f]) for f in dict.fromkeys(x.family for x in works)]
    groups.append(("large patches", [x for x in works if x.area is not None and LARGE <= x.area < 0.5]))
    return [
        _summary(name, group, some)
        for group, members in groups
        for name in names
        if (some := [one for one in members if name in one.purified])
    ]


def _summary(name: str, group: str, cures: Sequence[Cure]) -> Summary:
    columns = {
        "accuracy": [one.purified[name].accuracy for one in cures],
        "accuracy given": [one.given.accuracy for one in cures],
        "asr": [one.purified[name].asr for one in cures],
        "asr given": [one.given.asr for one in cures],
        "asr twin": [one.twin.asr for one in cures],
        "robust": [one.purified[name].robust for one in cures],
        "robust twin": [one.twin.robust for one in cures],
        "retuned twin": [x for one in cures if (x := one.twin.retuned) is not None],
    }
    for column, key in _OPTIONAL.items():
        columns[column] = [x for one in cures if (x := getattr(one.purified[name], key)) is not None]
    lasting = [x for one in cures if (x := one.lasting(name)) is not None]
    return Summary(
        purifier=name,
        group=group,
        encoders=len(cures),
        means={key: _mean(values) for key, values in columns.items() if values},
        removed=sum(one.removed(name) for one in cures),
        robust=sum(one.robust(name) for one in cures),
        lasting=sum(lasting),
        measured=len(lasting),
    )


def _mean(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    middle = statistics.fmean(values)
    return (middle, *mean_interval(values)) if len(values) >= 3 else (middle, None, None)
