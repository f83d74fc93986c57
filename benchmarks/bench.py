"""What a job of the benchmarks is handed: sizes, and a stopwatch that prints what it measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.harness import Guard, Run, Timing, interleave

__all__ = ["Bench"]

T = TypeVar("T")


@dataclass(frozen=True)
class Bench:
    """How thoroughly to measure.

    Args:
        quick: Smallest sizes, one sample, no waiting: only shows that everything runs.
        patience: Seconds that a call of `measure` may wait for an idle machine.
    """

    quick: bool = False
    patience: float = 20.0

    def size(self, full: T, quick: T) -> T:
        """The one that counts."""
        return quick if self.quick else full

    def measure(self, variants: Mapping[str, Run], *, samples: int = 3, least: float = 0.4) -> dict[str, Timing]:
        """Time the variants in turn."""
        guard = Guard(patience=0.0 if self.quick else self.patience)
        if self.quick:
            samples, least = 1, 0.0
        found = interleave(variants, guard, samples=samples, retries=0 if self.quick else 2, least=least)
        for name, timing in found.items():
            kept = f"{len(timing.clean)} kept, {len(timing.crowded)} discarded"
            print(f"    {name:<34} {timing.median:9.4f} s  ({timing.low:.4f}–{timing.high:.4f}; {kept})", flush=True)
        return found
