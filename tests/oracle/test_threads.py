"""Sharing out cores: quotas, readings, and the guard on a made-up clock."""

from __future__ import annotations

import os

import pytest

from cupel.progress import reporting
from cupel.threads import Load, ThreadGuard, fair_threads, others_busy, read_load, share, usable_cpus


@pytest.mark.parametrize(
    ("text", "most"),
    [("max 100000", None), ("150000 100000", 2), ("100000 100000", 1), ("20000 100000", 1), ("rubbish", None)],
)
def test_the_quota_of_the_control_group_counts(tmp_path, text, most):
    (tmp_path / "cpu.max").write_text(text)
    mine = len(os.sched_getaffinity(0))
    assert usable_cpus(tmp_path) == (mine if most is None else min(mine, most))
    assert usable_cpus(tmp_path / "none") == mine


def test_workers_share_the_cores():
    assert [share(n, cpus=6) for n in (0, 1, 2, 3, 4, 7)] == [6, 6, 3, 2, 1, 1]


def test_load_is_read_from_the_first_line(tmp_path):
    hertz = os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(f"cpu  {hertz} {hertz} {hertz} 999 999 {hertz} {hertz} 0 0 0\ncpu0 1 1 1 1 1 1 1\n")
    load = read_load(tmp_path)
    assert load is not None
    assert load.all == 5.0
    assert read_load(tmp_path / "none") is None


def test_others_are_all_but_this_process():
    assert others_busy(Load(10, 4, 0), Load(16, 6, 2)) == 2.0
    assert others_busy(Load(10, 4, 0), Load(11, 6, 2)) == 0.0
    assert others_busy(None, Load(1, 1, 1)) == 0.0


@pytest.mark.parametrize(
    ("wanted", "environment", "cpus", "busy", "threads"),
    [
        (2, {}, 2, 0.2, 2),
        (2, {}, 2, 0.9, 1),
        (2, {}, 2, 5.0, 1),
        (8, {}, 2, 0.0, 2),
        (8, {}, 8, 3.1, 5),
        (2, {"OMP_NUM_THREADS": "2"}, 2, 2.0, 2),
    ],
)
def test_threads_at_the_start(wanted, environment, cpus, busy, threads):
    found, said = fair_threads(wanted, environment, cpus, busy)
    assert found == threads
    assert (said is not None) == (found < min(wanted, cpus))


class Machine:
    """A clock and a load that the test drives."""

    def __init__(self):
        self.time, self.others, self.own, self.threads, self.said = 0.0, 0.0, 0.0, 2, []

    def load(self):
        return Load(self.own + self.others, self.own, self.time)

    def go(self, guard, seconds, busy):
        self.time += seconds
        self.own += seconds
        self.others += busy * seconds
        guard.step()

    def say(self, text):
        self.said.append(text)

    def guard(self):
        return ThreadGuard(
            lambda: self.threads, lambda n: setattr(self, "threads", n), load=self.load, now=lambda: self.time
        )


def run(steps):
    machine = Machine()
    with reporting(machine):
        guard = machine.guard()
        for seconds, busy in steps:
            machine.go(guard, seconds, busy)
    return machine


def test_a_collapse_lowers_the_threads_once_and_says_so():
    machine = run([(0.1, 0.0)] * 30 + [(5.0, 1.0)] * 5)
    assert machine.threads == 1
    assert len(machine.said) == 1
    assert "50 times as long" in machine.said[0]
    assert "1 thread" in machine.said[0]


@pytest.mark.parametrize(
    "steps",
    [
        [(0.1, 0.0)] * 30 + [(5.0, 0.0)] * 5,  # slow of itself: nobody else is there
        [(0.1, 1.0)] * 30 + [(0.3, 1.0)] * 10,  # others are there, but it is not that slow
        ([(0.1, 1.0)] * 10 + [(5.0, 1.0)]) * 4,  # one long step now and then: a monitor
    ],
)
def test_what_is_no_collapse_is_left_alone(steps):
    machine = run(steps)
    assert machine.threads == 2
    assert machine.said == []
