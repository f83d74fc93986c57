"""Timings that can be trusted on a machine that others use too: variants in turn, and only while nobody else works."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

__all__ = ["Guard", "Load", "Run", "Timing", "busy_seconds", "interleave", "ratio", "read_load", "share_of_others"]

_PROC = Path("/proc")

Run = Callable[[], float | None]
"""One call of a variant. Returns the seconds that count, or None = those from its start to its end."""


class Load(NamedTuple):
    """CPU time used so far, in seconds, and when it was read.

    Args:
        busy: By everything on the machine, time stolen by other guests of the host included; all cores together.
        own: By this process and its descendants.
        at: Clock, in seconds.
    """

    busy: float
    own: float
    at: float


def busy_seconds(stat: str, tick: float) -> float:
    """CPU time that is neither idle nor waiting for a disk, from the text of `/proc/stat`."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.splitlines()[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) * tick


def family_seconds(stats: Mapping[int, str], root: int, tick: float) -> float:
    """CPU time of a process, of its descendants, and of those of them that have ended.

    Args:
        stats: Text of `/proc/PID/stat` by PID.
        root: PID of the process.
        tick: Length of a tick in seconds.
    """
    parents, seconds = {}, {}
    for pid, text in stats.items():
        fields = text.rpartition(")")[2].split()  # the name in brackets may hold blanks and brackets
        parents[pid], seconds[pid] = int(fields[1]), sum(map(int, fields[11:15])) * tick
    family, fresh = {root}, {root}
    while fresh := {pid for pid, parent in parents.items() if parent in fresh} - family:
        family |= fresh
    return sum(seconds.get(pid, 0.0) for pid in family)


def read_load() -> Load | None:
    """The load until now; None where there is no `/proc`."""
    tick = 1 / os.sysconf("SC_CLK_TCK")
    stats = {}
    try:
        busy = busy_seconds((_PROC / "stat").read_text(), tick)
    except OSError:
        return None
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                stats[int(entry.name)] = (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
    return Load(busy, family_seconds(stats, os.getpid(), tick), time.perf_counter())


def share_of_others(before: Load, after: Load, cores: int) -> float:
    """Part of all CPU time between two readings that went to other processes, in [0, 1]."""
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, others / (cores * max(1e-9, after.at - before.at))))


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of a variant, one number per sample.

    Args:
        clean: Samples during which the rest of the machine was idle.
        crowded: The discarded ones.
    """

    clean: tuple[float, ...]
    crowded: tuple[float, ...] = ()

    @property
    def trusted(self) -> bool:
        """At least one sample is clean; otherwise the numbers below are those of the crowded ones."""
        return bool(self.clean)

    @property
    def _used(self) -> tuple[float, ...]:
        return self.clean or self.crowded

    @property
    def median(self) -> float:
        return statistics.median(self._used)

    @property
    def low(self) -> float:
        return min(self._used)

    @property
    def high(self) -> float:
        return max(self._used)


class Ratio(NamedTuple):
    """How many times as long, with the extremes that the samples allow."""

    value: float
    low: float
    high: float


def ratio(longer: Timing, shorter: Timing) -> Ratio:
    """Median over median, and the smallest and largest quotient of any two samples."""
    return Ratio(longer.median / shorter.median, longer.low / shorter.high, longer.high / shorter.low)


@dataclass
class Guard:
    """Waits for an idle machine and judges samples.

    Args:
        limit: Largest share of the CPU that the rest of the machine may use.
        patience: Seconds of waiting in all; when they are used up, samples are taken at once and judged all the same.
        window: Seconds over which idleness is measured.
        cores: Of the machine.
        load, sleep: Replaced in tests.
    """

    limit: float = 0.06
    patience: float = 60.0
    window: float = 0.2
    cores: int = field(default_factory=lambda: os.cpu_count() or 1)
    load: Callable[[], Load | None] = read_load
    sleep: Callable[[float], None] = time.sleep

    def wait(self) -> None:
        """Return when the whole machine, this process's own workers included, is idle, or patience has run out."""
        while self.patience > 0 and (before := self.load()) is not None:
            self.sleep(self.window)
            self.patience -= self.window
            after = self.load()
            if after is None or (after.busy - before.busy) / (self.cores * (after.at - before.at)) < self.limit:
                return

    def watch(self, run: Callable[[], float]) -> tuple[float, bool]:
        """The result of `run`, and whether the rest of the machine was idle meanwhile."""
        self.wait()
        before = self.load()
        seconds = run()
        after = self.load()
        return seconds, before is None or after is None or share_of_others(before, after, self.cores) < self.limit


def interleave(
    variants: Mapping[str, Run], guard: Guard, *, samples: int = 3, retries: int = 2, least: float = 0.4
) -> dict[str, Timing]:
    """Time the variants in turn until each has enough clean samples.

    Args:
        variants: By name; each is called once before, to warm up.
        guard: Judges the samples.
        samples: Clean samples wanted.
        retries: Further samples that may be taken where some were discarded.
        least: Seconds that a sample must last: shorter calls are repeated within it.
    """
    calls = {name: max(1, math.ceil(least / _warm_up(run))) for name, run in variants.items()}
    clean: dict[str, list[float]] = {name: [] for name in variants}
    crowded: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(samples + retries):
        for name, run in variants.items():
            if len(clean[name]) < samples:
                seconds, idle = guard.watch(partial(_seconds, run, calls[name]))
                (clean if idle else crowded)[name].append(seconds / calls[name])
    return {name: Timing(tuple(clean[name]), tuple(crowded[name])) for name in variants}


def _warm_up(run: Run) -> float:
    start = time.perf_counter()
    run()
    return max(1e-9, time.perf_counter() - start)


def _seconds(run: Run, calls: int) -> float:
    total = 0.0
    for _ in range(calls):
        start = time.perf_counter()
        counted = run()
        total += time.perf_counter() - start if counted is None else counted
    return total
