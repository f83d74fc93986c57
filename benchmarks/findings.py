"""What a run of the benchmarks found, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Timing, ratio

__all__ = ["CPU", "GPU", "Finding", "against", "table", "write"]

CPU = """Written by `make bench`. Ratios of variants that ran in turn in one process: medians of samples during which
the rest of the machine was idle."""
GPU = "Written by `make bench-gpu`. Whole training steps, timed by events on the device after five steps of warming up."


@dataclass(frozen=True)
class Finding:
    """One number.

    Args:
        job: Group it belongs to.
        what: In words.
        value: The number.
        unit: `×`, `%`, `s`, `MiB`, …
        low, high: Extremes of the samples; equal to `value` where there is one.
        goal: What is to be reached; None = none was set.
        at_most: The goal is an upper bound.
        note: Sizes, and what is left out.
        timings: Seconds by variant.
    """

    job: str
    what: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    goal: float | None = None
    at_most: bool = False
    note: str = ""
    timings: Mapping[str, Timing] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the goal is."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    @property
    def samples(self) -> str:
        """Kept and discarded samples; `crowded` where none could be kept."""
        if not self.timings:
            return ""
        kept = min(len(one.clean) for one in self.timings.values())
        discarded = sum(len(one.crowded) for one in self.timings.values())
        return f"{kept} kept, {discarded} discarded" + ("" if kept else ": CROWDED")


def against(
    job: str,
    what: str,
    timings: Mapping[str, Timing],
    plain: str,
    ours: str,
    *,
    goal: float | None = None,
    note: str = "",
) -> Finding:
    """How many times as long `plain` takes as `ours`."""
    found = ratio(timings[plain], timings[ours])
    used = {name: timings[name] for name in (plain, ours)}
    return Finding(job, what, found.value, "×", found.low, found.high, goal, note=note, timings=used)


def _shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.1f} %"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}".rstrip()


def table(about: Mapping[str, Any], findings: Sequence[Finding], how: str = CPU) -> str:
    """Markdown.

    Args:
        about: Of the machine.
        findings: One row each.
        how: What they are and how they were measured.
    """
    lines = [
        "# Speed on this machine",
        "",
        f"{how} `benchmarks/NOTES.md` says what is compared.",
        "",
        ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about.items()),
        "",
        "| what | found | range | goal | samples | note |",
        "|---|---|---|---|---|---|",
    ]
    for one in findings:
        span = "" if one.low is None or one.high is None else f"{_shown(one.low, '')}–{_shown(one.high, '')}"
        if one.unit == "%" and one.low is not None and one.high is not None:
            span = f"{100 * one.low:.1f}–{100 * one.high:.1f}"
        goal = ""
        if one.goal is not None:
            sign, word = ("≤" if one.at_most else "≥"), ("reached" if one.reached else "**missed**")
            goal = f"{sign} {_shown(one.goal, one.unit)}: {word}"
        times = "; ".join(f"{name} {_shown(t.median, 's')}" for name, t in one.timings.items())
        note = ". ".join(part for part in (one.note, times) if part)
        lines.append(f"| {one.what} | {_shown(one.value, one.unit)} | {span} | {goal} | {one.samples} | {note} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, name: str, about: Mapping[str, Any], findings: Sequence[Finding], how: str = CPU) -> None:
    """`<name>.json` and `<name>.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{**asdict(one), "reached": one.reached, "samples": one.samples} for one in findings]
    text = json.dumps({"machine": dict(about), "findings": plain}, indent=1, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(table(about, findings, how), encoding="utf-8")
