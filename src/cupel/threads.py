"""Cores shared out: threads that are more than the free cores wait for each other and get nowhere.

Measured on two cores with torch 2.15, a training step of a small network: 25 ms with two threads, 42 ms with one, on an
idle machine; two such processes at once, with two threads each, 300 to 4,500 ms (`OMP_WAIT_POLICY=PASSIVE`: 2,200 to
3,000), with one thread each 43 ms. Two threads beside one busy single-threaded process: 55 to 62 ms.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from cupel.progress import say

__all__ = ["Load", "ThreadGuard", "fair_threads", "others_busy", "read_load", "share", "usable_cpus"]


class Load(NamedTuple):
    """CPU seconds used so far on all cores: by everybody, and by this process; and when that was read."""

    all: float
    own: float
    at: float


def usable_cpus(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores this process may use: its affinity, cut by the quota of its control group; at least 1."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    return max(1, min(cpus, _quota(root) or cpus))


def _quota(root: Path) -> int | None:
    try:
        quota, period = (root / "cpu.max").read_text().split()[:2]
        return None if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def share(workers: int, cpus: int | None = None) -> int:
    """Threads for each of several workers that run side by side, so that all together do not exceed the cores.

    Example:
        >>> share(2, cpus=8), share(16, cpus=8)
        (4, 1)
    """
    return max(1, (usable_cpus() if cpus is None else cpus) // max(1, workers))


def read_load(proc: Path = Path("/proc")) -> Load | None:
    """The load until now; None where the system does not tell."""
    try:
        fields = (proc / "stat").read_text().splitlines()[0].split()[1:]
        user, nice, system, _idle, _wait, irq, softirq = map(int, fields[:7])
    except (OSError, ValueError, IndexError):
        return None
    ticks = user + nice + system + irq + softirq
    return Load(ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter())


def others_busy(before: Load | None, after: Load | None) -> float:
    """Cores that other processes kept busy between two readings; 0 where that is not known."""
    if before is None or after is None or after.at <= before.at:
        return 0.0
    return max(0.0, ((after.all - before.all) - (after.own - before.own)) / (after.at - before.at))


def fair_threads(
    wanted: int,
    environment: Mapping[str, str],
    cpus: int,
    busy: float,
) -> tuple[int, str | None]:
    """How many threads to use at the start of a command, and what to tell the user if that is fewer than wanted.

    Args:
        wanted: What torch would use.
        environment: `OMP_NUM_THREADS` there is the user's own choice and stands.
        cpus: Usable cores.
        busy: Cores that others keep busy.

    Example:
        >>> fair_threads(8, {}, cpus=4, busy=0.0), fair_threads(2, {"OMP_NUM_THREADS": "2"}, cpus=2, busy=1.0)[0]
        ((4, None), 2)
    """
    if "OMP_NUM_THREADS" in environment:
        return wanted, None
    free = max(1, cpus - round(busy))
    if free >= min(wanted, cpus):
        return min(wanted, cpus), None
    what = f"other processes keep {busy:.1f} of {cpus} cores busy; using {free} thread{'s' if free > 1 else ''}"
    return free, f"{what} (OMP_NUM_THREADS=… decides otherwise)"


class ThreadGuard:
    """Watches the steps of a loop, and lowers the number of threads when they fight with other processes for cores.

    A step that takes `slower` times as long as the fastest so far, while others keep half a core busy or more, twice in
    a row, is taken for that. The number of threads changes results in the last bits, so the user is told.

    Args:
        get, put: Read and set the number of threads.
        slower: Factor.
        load, now: Replaced in tests.
    """

    def __init__(
        self,
        get: Callable[[], int],
        put: Callable[[int], None],
        *,
        slower: float = 6.0,
        load: Callable[[], Load | None] = read_load,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.get, self.put, self.slower, self.load, self.now = get, put, slower, load, now
        self.fastest, self.slow, self.last = float("inf"), 0, now()
        self.before = load()

    def step(self) -> None:
        """Call after each step."""
        now = self.now()
        seconds, self.last = now - self.last, now
        self.fastest = min(self.fastest, seconds)
        self.slow = self.slow + 1 if seconds > self.slower * self.fastest else 0
        if self.slow == 0:
            if self.before is None or now - self.before.at > 1.0:
                self.before = self.load()
            return
        if self.slow < 2 or self.get() == 1:
            return
        after = self.load()
        busy, self.before, self.slow = others_busy(self.before, after), after, 0
        if busy >= 0.5:
            fewer = max(1, min(self.get() - 1, usable_cpus() - round(busy)))
            self.put(fewer)
            say(
                f"  steps take {seconds / self.fastest:.0f} times as long as before, for other processes keep "
                f"{busy:.1f} cores busy; going on with {fewer} thread{'s' if fewer > 1 else ''}"
            )
            self.fastest = float("inf")
