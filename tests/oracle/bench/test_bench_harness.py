"""The stopwatch of the benchmarks, on made-up clocks and loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from benchmarks import workloads
from benchmarks.findings import Finding, against, table
from benchmarks.harness import (
    Guard,
    Load,
    Timing,
    busy_seconds,
    family_seconds,
    interleave,
    ratio,
    read_load,
    share_of_others,
)
from benchmarks.machine import fit_line, forward_flops

from cupel.pretrain import SimCLR

STAT = """cpu  1000 20 300 5000 70 6 5 40 11 0
cpu0 500 10 150 2500 35 3 2 20 5 0
intr 1 2 3
"""


def process(pid: int, parent: int, user: int, system: int, ended_user: int = 0, ended_system: int = 0) -> str:
    before = f"{pid} (a ) name) S {parent} 1 1 0 -1 4194304 100 0 0 0"
    return f"{before} {user} {system} {ended_user} {ended_system} 20 0 1 0 999 1000 10"


def test_busy_is_all_but_idle_and_waiting_for_the_disk() -> None:
    assert busy_seconds(STAT, 0.01) == pytest.approx((1000 + 20 + 300 + 6 + 5 + 40) / 100)


def test_own_time_is_that_of_descendants_and_of_those_that_ended() -> None:
    stats = {
        10: process(10, 1, 100, 10, 7, 3),
        11: process(11, 10, 50, 5),
        12: process(12, 11, 1, 1),
        13: process(13, 1, 9_000, 0),  # a stranger
    }
    assert family_seconds(stats, 10, 0.01) == pytest.approx((100 + 10 + 7 + 3 + 50 + 5 + 1 + 1) / 100)
    assert family_seconds(stats, 99, 0.01) == 0


def test_share_of_others() -> None:
    before = Load(busy=10.0, own=4.0, at=100.0)
    assert share_of_others(before, Load(12.0, 5.8, 101.0), cores=2) == pytest.approx(0.1)
    assert share_of_others(before, Load(11.0, 5.5, 101.0), cores=2) == 0  # ticks are coarse: never below zero


def test_the_real_load_counts_this_process() -> None:
    before = read_load()
    if before is None:
        pytest.skip("no /proc on this machine")
    a = torch.randn(400, 400)
    while (after := read_load()) is not None and after.own == before.own:
        a @ a
    assert after is not None
    assert after.own > before.own
    assert after.busy >= before.busy


class Machine:
    """A clock that only moves when somebody works or sleeps; `others` use the given share of two cores."""

    def __init__(self, others: Iterator[float]) -> None:
        self.others, self.busy, self.own, self.now, self.slept = others, 0.0, 0.0, 0.0, 0.0

    def load(self) -> Load:
        return Load(self.busy, self.own, self.now)

    def work(self, seconds: float) -> float:
        self.now += seconds
        self.own += seconds
        self.busy += seconds + next(self.others) * 2 * seconds
        return seconds

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.busy += next(self.others) * 2 * seconds

    def guard(self, patience: float = 10.0) -> Guard:
        return Guard(limit=0.06, patience=patience, window=0.5, cores=2, load=self.load, sleep=self.sleep)


def test_the_guard_waits_until_the_machine_is_idle() -> None:
    machine = Machine(iter([0.9, 0.5, 0.02]))
    guard = machine.guard()
    guard.wait()
    assert machine.slept == 1.5
    assert guard.patience == 8.5


def test_the_guard_stops_waiting_when_its_patience_is_used_up() -> None:
    machine = Machine(iter([0.9] * 100))
    guard = machine.guard(patience=2.0)
    guard.wait()
    assert machine.slept == 2.0
    guard.wait()
    assert machine.slept == 2.0


@pytest.mark.parametrize(("others", "kept"), [(0.05, True), (0.07, False)])
def test_a_sample_counts_only_if_others_used_little(others: float, kept: bool) -> None:
    machine = Machine(iter([others] * 10))
    assert machine.guard(patience=0).watch(lambda: machine.work(1.0)) == (1.0, kept)


def test_variants_are_measured_in_turn_and_crowded_samples_again() -> None:
    # calls: warm-up a, b; then a, b, a (crowded), b, a
    machine = Machine(iter([0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0]))
    order: list[str] = []
    times = {"a": iter([9.0, 1.0, 50.0, 3.0]), "b": iter([9.0, 4.0, 6.0])}

    def run(name: str) -> float:
        order.append(name)
        return machine.work(next(times[name]))

    found = interleave(
        {name: lambda name=name: run(name) for name in "ab"},
        machine.guard(patience=0),
        samples=2,
        retries=2,
        least=0,
    )
    assert "".join(order) == "ababab" + "a"
    assert found == {"a": Timing((1.0, 3.0), (50.0,)), "b": Timing((4.0, 6.0))}
    assert found["a"].median == 2
    value = ratio(found["b"], found["a"])
    assert (value.value, value.low, value.high) == (2.5, 4 / 3, 6.0)


def test_retries_are_bounded_and_distrust_is_shown() -> None:
    machine = Machine(iter([0.9] * 100))
    found = interleave({"a": lambda: machine.work(1.0)}, machine.guard(patience=0), samples=3, retries=2, least=0)
    assert found["a"] == Timing((), (1.0,) * 5)
    assert not found["a"].trusted
    assert found["a"].median == 1.0
    row = against("job", "a over a", {"x": found["a"], "y": found["a"]}, "x", "y", goal=0.5)
    assert row.samples == "0 kept, 10 discarded: CROWDED"
    assert "CROWDED" in table({}, [row])


def test_short_calls_are_repeated_within_a_sample() -> None:
    calls: list[int] = []

    def run() -> float:
        calls.append(1)
        return 0.25

    guard = Guard(patience=0, load=lambda: None)
    found = interleave({"a": run}, guard, samples=2, retries=0, least=1e-9)
    assert len(calls) == 3
    assert found["a"].clean == (0.25, 0.25)


def test_goals_hold_in_their_direction() -> None:
    row = Finding("job", "what", 2.0, "×", goal=3.0)
    assert row.reached is False
    assert replace(row, at_most=True).reached is True
    assert replace(row, goal=None).reached is None
    assert "**missed**" in table({"threads": 2}, [row])


def test_lines() -> None:
    exact = fit_line([1, 2, 4], [5.0, 7.0, 11.0])
    assert (exact.intercept, exact.slope, exact.r2) == pytest.approx((3.0, 2.0, 1.0))
    assert fit_line([0, 1, 2, 3], [0.0, 1.0, 0.0, 1.0]).r2 == pytest.approx(0.2)


def test_flops_of_one_convolution() -> None:
    conv = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)
    assert forward_flops(conv, 8) == 2 * 8 * 8 * 5 * 3 * 9


def test_the_clock_of_fit_leaves_out_the_first_step() -> None:
    learner, recipe = workloads.pretraining(workloads.DIGITS16, 4)
    ends: list[float] = []

    class Counting(workloads.Clocked):
        def after_step(self) -> None:
            super().after_step()
            ends.append(self.ends[-1])

    assert isinstance(recipe, SimCLR)
    seconds = workloads.fit_seconds(Counting(learner), workloads.dataset(workloads.images(8, 16)), recipe, 3)()
    assert len(ends) == 4
    assert 0 < seconds <= (ends[-1] - ends[0]) / 3 * 1.01
