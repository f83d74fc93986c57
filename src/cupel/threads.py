"""Cores shared out: threads that are more than the free cores wait for each other and get nowhere.

Measured on two cores with torch 2.15, a training step of a small network: 25 ms with two threads, 42 ms with one, on an
idle machine; two such processes at once, with two threads each, 300 to 4,500 ms (`OMP_WAIT_POLICY=PASSIVE`: 2,200 to
3,000), with one thread each 43 ms. Two threads beside one busy single-threaded process: 55 to 62 ms.

Why no waiting policy helps: with both threads on one core, 99 % of a step of 15 s went to `convolution_backward`,
although OpenMP waited passively. Its kernel spins at barriers of its own, and each then lasts a time slice (4 ms).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cupel.progress import say

__all__ = [
    "Load",
    "ThreadGuard",
    "allowed_cores",
    "fair_threads",
    "guarded",
    "others_busy",
    "read_load",
    "settle",
    "share",
    "usable_cpus",
]


_LOOK = 0.15  # seconds in which the load of others is measured


class Load(NamedTuple):
    """CPU seconds used so far on the cores of this process: by everybody, and by this process; and when it was read."""

    all: float
    own: float
    at: float


def usable_cpus(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores this process may use: its affinity, cut by the quotas of its control groups; at least 1.

    Args:
        root: Where control groups are mounted.
        own: The file that names those of this process.
    """
    cpus = len(allowed_cores())
    return max(1, min(cpus, _quota(root, own) or cpus))


def allowed_cores() -> set[int]:
    """Numbers of the cores that this process may run on."""
    try:
        return set(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return set(range(os.cpu_count() or 1))


def _quota(root: Path, own: Path) -> int | None:
    """The tightest quota of the process's group and of those above it, in whole cores; None = unlimited."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        lines = []
    folders = {root}  # inside a container the group is often mounted there, whatever its name
    for _, controllers, name in (line for line in lines if len(line) == 3):
        tops = [root, root / "unified"] if not controllers else [root / controllers, root / "cpu"]
        if not controllers or "cpu" in controllers.split(","):
            here = Path(name.lstrip("/"))
            folders |= {top / part for top in tops for part in (here, *here.parents)}
    found = [quota for folder in folders if (quota := _quota_of(folder)) is not None]
    return min(found, default=None)


def _quota_of(folder: Path) -> int | None:
    """Version 2 keeps both numbers in one file, version 1 in two; no quota is `max` there and -1 here."""
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / file).read_text() for file in files).split()[:2]
            if quota not in ("max", "-1"):
                return -(-int(quota) // int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def share(workers: int, cpus: int | None = None) -> int:
    """Threads for each of several workers that run side by side, so that all together do not exceed the cores.

    Example:
        >>> share(2, cpus=8), share(16, cpus=8)
        (4, 1)
    """
    return max(1, (usable_cpus() if cpus is None else cpus) // max(1, workers))


def read_load(proc: Path = Path("/proc"), cores: Collection[int] | None = None) -> Load | None:
    """The load until now; None where the system does not tell.

    Args:
        proc: Where the kernel tells.
        cores: Numbers of the cores looked at; None = those of this process. Where one is not listed, all count.
    """
    try:
        lines = [line.split() for line in (proc / "stat").read_text().splitlines() if line.startswith("cpu")]
        listed = {name: _busy(fields) for name, *fields in lines}
        wanted = [f"cpu{number}" for number in (allowed_cores() if cores is None else cores)]
        ticks = sum(listed[name] for name in wanted) if listed.keys() >= set(wanted) else listed["cpu"]
    except (OSError, ValueError, KeyError):
        return None
    return Load(ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), time.perf_counter())


def _busy(fields: Sequence[str]) -> int:
    user, nice, system, _idle, _wait, irq, softirq = map(int, fields[:7])
    return user + nice + system + irq + softirq


def _free(cpus: int, busy: float, cores: int) -> int:
    """Of `cpus` cores that may be used at a time, those left over when others keep `busy` of `cores` busy."""
    return max(1, min(cpus, cores - round(busy)))


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
    cores: int | None = None,
) -> tuple[int, str | None]:
    """How many threads to use at the start of a command, and what to tell the user if that is fewer than wanted.

    Args:
        wanted: What torch would use.
        environment: `OMP_NUM_THREADS` there is the user's own choice and stands.
        cpus: Usable cores.
        busy: Cores that others keep busy.
        cores: Cores on which `busy` was counted, more than `cpus` where there is a quota; None = `cpus`.

    Example:
        >>> fair_threads(8, {}, cpus=4, busy=0.0), fair_threads(2, {"OMP_NUM_THREADS": "2"}, cpus=2, busy=1.0)[0]
        ((4, None), 2)
    """
    if "OMP_NUM_THREADS" in environment:
        return wanted, None
    cores = cpus if cores is None else cores
    free = _free(cpus, busy, cores)
    if free >= min(wanted, cpus):
        return min(wanted, cpus), None
    what = f"other processes keep {busy:.1f} of {cores} cores busy; using {free} thread{'s' if free > 1 else ''}"
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
            fewer = max(1, min(self.get() - 1, _free(usable_cpus(), busy, len(allowed_cores()))))
            self.put(fewer)
            say(
                f"  steps take {seconds / self.fastest:.0f} times as long as before, for other processes keep "
                f"{busy:.1f} cores busy; going on with {fewer} thread{'s' if fewer > 1 else ''}"
            )
            self.fastest = float("inf")


def guarded(device: str, get: Callable[[], int], put: Callable[[int], None]) -> ThreadGuard | None:
    """A guard for a loop on the CPU; none elsewhere, and none where `OMP_NUM_THREADS` says what the user wants."""
    return ThreadGuard(get, put) if device == "cpu" and "OMP_NUM_THREADS" not in os.environ else None


def settle() -> None:
    """Gives torch no more threads than cores that are free, and says so where that is fewer than it had."""
    import torch  # this module is read by commands that need no torch

    before = read_load()
    time.sleep(_LOOK)
    busy, cores = others_busy(before, read_load()), len(allowed_cores())
    threads, said = fair_threads(torch.get_num_threads(), os.environ, usable_cpus(), busy, cores)
    torch.set_num_threads(threads)
    if said:
        say(said)
