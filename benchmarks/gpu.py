"""`make bench-gpu`: training steps on a GPU, as shares of what its matrix units and its memory can do.

    python -m benchmarks.gpu [--device cpu --tiny] [--out FOLDER]

Whole steps of `cupel.train.fit`, timed on the device between the ends of steps; eager, compiled, and compiled into CUDA
graphs. Rate and bandwidth of the device are measured in the same process.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import machine, workloads
from benchmarks.findings import GPU, Finding, table, write
from cupel.encoders import Architecture, Fast, ResNet18
from cupel.protocols import Batch
from cupel.seeds import Seed
from cupel.train import autocast, fit
from cupel.types import Dataset

__all__ = ["Traffic", "main"]

_WARM = 5  # steps before the clock starts: choice of algorithms, compilation, optimiser state

VARIANTS = {"eager": None, "compiled": "default", "CUDA graphs": "reduce-overhead"}
"""Modes of `torch.compile`; the last also records CUDA graphs."""


class Case(NamedTuple):
    """What is trained.

    Args:
        name: In words.
        architecture: Builds the encoder.
        batch: Images per step; SimCLR makes two views of each.
    """

    name: str
    architecture: Architecture
    batch: int


LARGE = ResNet18(stem="imagenet", input_size=224, normalisation="imagenet")
CASES = [Case("ResNet-18, 32 px", workloads.RN18, 512), Case("ResNet-18, 224 px", LARGE, 256)]
TINY = [Case("fast encoder, 16 px", Fast(width=4, input_size=16), 8)]


class Traffic(TorchDispatchMode):
    """Adds up the sizes of all tensors that operators read and write.

    That is what an eager step moves if nothing stays in a cache; views move nothing. Fused kernels move less, so for
    compiled variants the share of the bandwidth is that of an equal eager step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, torch.Tensor)]
            self.bytes += sum(one.numel() * one.element_size() for one in tensors)
        return out


def mark(device: torch.device) -> Any:
    """This moment on the device: an event on its stream, or the clock on the CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one `mark` to another."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def per_call(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of a call, after one that warms up."""
    run()
    start = mark(device)
    for _ in range(calls):
        run()
    return between(start, mark(device)) / calls


def compiled(learner: Any, mode: str) -> None:
    """Let a learner run its network compiled; the weights are shared."""
    name = "encode" if hasattr(learner, "encode") else "network"
    network = getattr(learner, name)
    setattr(learner, name, torch.compile(getattr(network, "module", network), mode=mode, dynamic=False))


def step_seconds(learner: Any, data: Dataset, recipe: Any, steps: int, device: torch.device) -> float:
    """Seconds of a step of `fit`."""
    clocked = workloads.Clocked(learner, partial(mark, device))
    fit(clocked, data, dataclasses.replace(recipe, steps=_WARM + steps), Seed(0), label="bench", device=device)
    return between(clocked.ends[_WARM - 1], clocked.ends[-1]) / steps


def step_bytes(learner: Any, data: Dataset, recipe: Any, device: torch.device) -> int:
    """Bytes that forward and backward pass of an eager step read and write."""
    rows = torch.arange(recipe.batch_size)
    batch = Batch(data.inputs[rows].to(device), rows, Seed(0))
    with Traffic() as traffic:
        with autocast(recipe.precision, device):
            loss, _ = learner.loss(batch)
        loss.backward()
    return int(traffic.bytes)


class Limits(NamedTuple):
    """What the device can do: FLOP/s of a large bf16 product, bytes/s of a copy (read and written)."""

    flops: float
    bandwidth: float


def limits(device: torch.device, tiny: bool) -> Limits:
    """Measured."""
    side, calls = (256, 2) if tiny else (8192, 50)
    a, b = machine.gemm(torch.bfloat16, side, str(device))
    source = torch.empty(2**16 if tiny else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product = per_call(lambda: a @ b, device, calls)
    copy = per_call(lambda: target.copy_(source), device, calls)
    return Limits(2 * side**3 / product, 2 * source.numel() / copy)


def measure(case: Case, job: str, variant: str, device: torch.device, steps: int, most: Limits) -> Finding:
    """One row: images/s of whole steps, and their shares of the two limits."""
    data = workloads.dataset(workloads.images(4 * case.batch, case.architecture.input_size))
    learner: Any
    recipe: Any
    if job == "SimCLR":
        learner, recipe = workloads.pretraining(case.architecture, case.batch, str(device))
        passes = 2 * case.batch
    else:
        learner, recipe = workloads.implanting(case.architecture, case.batch, data, str(device))
        passes = 3 * case.batch + 1
    forward = machine.forward_flops(learner.state["encoder"] if job == "SimCLR" else learner.state,
                                    case.architecture.input_size)  # fmt: skip
    moved = step_bytes(learner, data, recipe, device)
    mode = VARIANTS[variant]
    if mode is not None:
        compiled(learner, mode)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = step_seconds(learner, data, recipe, steps, device)
    note = (
        f"batch {case.batch}; {1e3 * seconds:.1f} ms; {3 * forward * passes / seconds / most.flops:.1%} of the bf16 "
        f"product's rate; {moved / seconds / most.bandwidth:.1%} of the copy's bandwidth, counted as eager"
    )
    if device.type == "cuda":
        note += f"; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return Finding(job, f"{job} step, {case.name}, {variant}", case.batch / seconds, "images/s", note=note)


def main(arguments: list[str] | None = None) -> int:
    """Measure every case; 2 = there is no such device."""
    parser = argparse.ArgumentParser(description="Training steps as shares of what the device can do.")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, …; cpu with --tiny shows that everything runs")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, eager")
    parser.add_argument("--out", type=Path, help="folder for gpu.json and gpu.md; default: results/benchmarks, and "
                        ".benchmarks with --tiny")  # fmt: skip
    given = parser.parse_args(arguments)
    out = given.out or Path(".benchmarks" if given.tiny else "results/benchmarks")
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench-gpu: torch sees no CUDA device; run it on a machine that has one", file=sys.stderr)
        return 2
    most = limits(device, given.tiny)
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor(),
        "torch": torch.__version__,
        "bf16_gemm_tflops": round(most.flops / 1e12, 3),
        "copy_gb_per_second": round(most.bandwidth / 1e9, 1),
    }
    if given.tiny:
        about["tiny"] = "smallest sizes: the numbers mean nothing"
    findings = []
    for case in TINY if given.tiny else CASES:
        for job in ("SimCLR", "BadEncoder"):
            for variant in ["eager"] if given.tiny else VARIANTS:
                try:
                    findings.append(measure(case, job, variant, device, 3 if given.tiny else 40, most))
                except Exception as error:  # a compiler may fail in any way; the other rows are still worth having
                    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    findings.append(Finding(job, f"{job} step, {case.name}, {variant}", 0.0, "failed", note=reason))
                    if variant == "eager":
                        raise
                torch.compiler.reset()
                print(f"  {findings[-1].what}: {findings[-1].value:.0f} {findings[-1].unit}", flush=True)
                write(out, "gpu", about, findings, GPU)
    print("\n" + table(about, findings, GPU))
    return 0


if __name__ == "__main__":
    sys.exit(main())
