"""Peak memory of a job in a process of its own: `python -m benchmarks.memory JOB SIDE…` prints it as JSON.

Jobs: `nothing` (interpreter and torch), `simclr`, `badencoder`, `features` (each `ours` or `port`, and a batch), and
`fit` (ours on the fast encoder; number of images, side and batch), for how memory grows.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import Run

__all__ = ["Peak", "peak"]


class Peak(NamedTuple):
    """Largest resident sizes in MiB, and seconds.

    Args:
        main: Of the process.
        worker: Of its largest child; 0 where it had none.
        seconds: From the start of the interpreter to the end of the job.
        setup: Seconds of it before the job's first step.
    """

    main: float
    worker: float
    seconds: float
    setup: float


def peak(job: str, *arguments: object) -> Peak:
    """Run a job in a child and return what it says."""
    command = [sys.executable, "-m", "benchmarks.memory", job, *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr.strip()}")
    main, worker, working = json.loads(done.stdout.splitlines()[-1])
    seconds = time.perf_counter() - start
    return Peak(main, worker, seconds, seconds - working)


def _run(job: str, arguments: list[str]) -> float:
    """Seconds from the first step on."""
    import torch

    if job == "nothing":
        torch.zeros(1)
        return 0.0
    from benchmarks import workloads as ours
    from benchmarks.straight import frozen, training
    from cupel.encoders import Fast
    from cupel.inference import features
    from cupel.seeds import Seed

    if job == "fit":
        n, side, batch = map(int, arguments)
        raw = ours.images(n, side)
        learner, recipe = ours.pretraining(Fast(input_size=side), batch)
        step = ours.fit_seconds(learner, ours.dataset(raw), recipe, 2)
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    # two steps on either side: in the second the optimiser's state is there as well
    which, n = arguments[0], int(arguments[1])
    raw = ours.images(4 * n)
    runs: list[Run]
    if job == "simclr" and which == "ours":
        learner, recipe = ours.pretraining(ours.RN18, n)
        runs = [ours.fit_seconds(learner, ours.dataset(raw), recipe, 1)]
    elif job == "simclr":
        runs = [training.simclr_step(ours.RN18.build(Seed(0)).module.backbone, 512, raw, n)] * 2
    elif job == "badencoder" and which == "ours":
        data = ours.dataset(raw)
        attacker, attack = ours.implanting(ours.RN18, n, data)
        runs = [ours.fit_seconds(attacker, data, attack, 1)]
    elif job == "badencoder":
        clean, own = (ours.RN18.build(Seed(0)).module.backbone for _ in range(2))
        runs = [training.badencoder_step(clean, own, raw, ours.images(1, seed=1), n)] * 2
    elif which == "ours":
        encoder = ours.RN18.build(Seed(0))
        runs = [lambda: ours.nothing(features(encoder, ours.dataset(raw)))]
    else:
        runs = [frozen.extraction(ours.RN18.build(Seed(0)).module.backbone, raw, min(n, 256))]
    start = time.perf_counter()
    for run in runs:
        run()
    return time.perf_counter() - start


def _own_peak() -> float:
    """MiB. The size in `getrusage` survives `exec`, so a small child of a large process would show its parent's."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return round(int(found[1]) / 1024, 1)
    return _mebibytes(resource.RUSAGE_SELF)


def _mebibytes(who: int) -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(who).ru_maxrss / unit, 1)


if __name__ == "__main__":
    worked = _run(sys.argv[1], sys.argv[2:])
    for child in multiprocessing.active_children():  # loader workers: counted once they have ended
        child.terminate()
        child.join()
    print(json.dumps([_own_peak(), _mebibytes(resource.RUSAGE_CHILDREN), worked]))
