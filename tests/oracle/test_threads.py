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
    none = tmp_path / "none"
    assert usable_cpus(tmp_path, none) == (mine if most is None else min(mine, most))
    assert usable_cpus(none, none) == mine


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr("cupel.threads.allowed_cores", lambda: set(range(8)))


BOX = {"cpu,cpuacct/box/cpu.cfs_quota_us": "400000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"}
GROUPS = [
    ("0::/slice/job\n", {"slice/job/cpu.max": "300000 100000"}, 3),
    ("0::/slice/job\n", {"slice/job/cpu.max": "max 100000", "slice/cpu.max": "200000 100000"}, 2),  # the one above
    ("0::/slice/job\n", {"slice/other/cpu.max": "100000 100000"}, 8),  # not this process's
    ("3:cpuset:/x\n2:cpu,cpuacct:/box\n0::/\n", BOX, 4),
    ("3:cpuset:/box\n2:cpu,cpuacct:/x\n0::/\n", BOX, 8),
    ("2:cpu,cpuacct:/far/away\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ("2:cpu:/box\n", {"cpu/box/cpu.cfs_quota_us": "-1", "cpu/box/cpu.cfs_period_us": "100000"}, 8),
]


@pytest.mark.parametrize(("own", "files", "cpus"), GROUPS)
def test_quotas_of_both_versions_and_of_groups_above(tmp_path, eight_cores, own, files, cpus):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cpus(tmp_path, tmp_path / "own") == cpus


def test_workers_share_the_cores():
    assert [share(n, cpus=6) for n in (0, 1, 2, 3, 4, 7)] == [6, 6, 3, 2, 1, 1]


def test_load_is_of_the_own_cores_or_of_all_where_one_is_not_listed(tmp_path):
    hertz = os.sysconf("SC_CLK_TCK")
    whole = f"cpu  {hertz} {hertz} {hertz} 999 999 {hertz} {hertz} 0 0 0"
    each = f"cpu0 1 1 1 9 9 1 1 0 0 0\ncpu1 {2 * hertz} 0 0 9 9 0 0 0 0 0"
    (tmp_path / "stat").write_text(f"{whole}\n{each}\nintr 5\n")
    seen = [read_load(tmp_path, cores) for cores in ({0}, {0, 1}, {0, 7})]
    assert [load and load.all for load in seen] == pytest.approx([5 / hertz, 5 / hertz + 2, 5.0])
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


def test_a_busy_host_leaves_a_small_quota_alone():
    assert fair_threads(4, {}, cpus=4, busy=40.0, cores=64) == (4, None)
    assert fair_threads(4, {}, cpus=4, busy=62.0, cores=64)[0] == 2


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
