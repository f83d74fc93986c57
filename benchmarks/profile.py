"""Where the time of a step goes: `python -m benchmarks.profile simclr`, `badencoder` or `features`."""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import workloads
from benchmarks.harness import Run
from cupel.encoders import Architecture
from cupel.inference import features
from cupel.seeds import Seed

ENCODERS: dict[str, Architecture] = {
    "resnet18": workloads.RN18,
    "fast32": workloads.FAST32,
    "fast64": workloads.FAST64,
    "digits16": workloads.DIGITS16,
}


def main() -> None:
    """Profile three steps after two of warming up, and print the operators by their own time."""
    parser = argparse.ArgumentParser(description="Operators of a step by their own time.")
    parser.add_argument("job", choices=["simclr", "badencoder", "features"])
    parser.add_argument("--encoder", choices=list(ENCODERS), default="resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=25, help="lines to print")
    given = parser.parse_args()
    architecture = ENCODERS[given.encoder]
    data = workloads.dataset(workloads.images(8 * given.batch, architecture.input_size))
    run: Run
    if given.job == "simclr":
        learner, recipe = workloads.pretraining(architecture, given.batch)
        run = workloads.fit_seconds(learner, data, recipe, 2)
    elif given.job == "badencoder":
        attacker, attack = workloads.implanting(architecture, given.batch, data)
        run = workloads.fit_seconds(attacker, data, attack, 2)
    else:
        encoder = architecture.build(Seed(0))
        run = lambda: workloads.nothing(features(encoder, data))
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=given.rows, max_name_column_width=50))
    print(f"{torch.get_num_threads()} thread(s); `fit` trained for 3 steps, the first included")


if __name__ == "__main__":
    main()
