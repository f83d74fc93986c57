"""`make bench`: every hot path beside the plain way, the bare network and the machine, as one table.

python -m benchmarks.whole [--quick] [--only NAME …] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks import machine
from benchmarks.bench import Bench
from benchmarks.findings import Finding, table, write
from benchmarks.jobs import JOBS

MINUTES = 9.0  # no job starts later


def main() -> None:
    """Run the jobs and write what they found, after each of them."""
    parser = argparse.ArgumentParser(description="Ratios of the hot paths, measured within one run.")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one sample: shows that everything runs")
    names = list(JOBS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="folder for cpu.json and cpu.md; default: results/benchmarks, and "
                        ".benchmarks for a part of the jobs or a quick run")  # fmt: skip
    given = parser.parse_args()
    part = given.quick or list(given.only) != names
    out = given.out or Path(".benchmarks" if part else "results/benchmarks")
    start = time.monotonic()
    about = machine.describe()
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    bench, findings = Bench(quick=given.quick), list[Finding]()
    if given.quick:
        about["quick"] = "smallest sizes, one sample, nobody waited for: the numbers mean nothing"
    late = []
    for name in (name for name in JOBS if name in given.only):
        if time.monotonic() - start > 60 * MINUTES:
            late.append(name)
            continue
        print(f"{name} ({time.monotonic() - start:.0f} s)", flush=True)
        findings += JOBS[name](bench)
        write(out, "cpu", about, findings)
    print("\n" + table(about, findings))
    print(f"{time.monotonic() - start:.0f} s" + (f"; out of time, not measured: {', '.join(late)}" if late else ""))


if __name__ == "__main__":
    main()
