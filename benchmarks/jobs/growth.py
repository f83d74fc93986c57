"""Memory, and how time and memory grow."""

from __future__ import annotations

from functools import partial

from benchmarks import machine, workloads
from benchmarks.bench import Bench
from benchmarks.findings import Finding
from benchmarks.harness import Run
from benchmarks.memory import peak
from cupel.encoders import Fast, ImageEncoder
from cupel.inference import features
from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = ["memory", "scaling"]


def memory(bench: Bench) -> list[Finding]:
    """Peak resident size in a process of its own, ours (two steps) over the port's (one: it takes too long for two)."""
    floor = peak("nothing").main
    print(f"    interpreter and torch alone            {floor:8.0f} MiB", flush=True)
    findings = [Finding("memory", "Interpreter and torch alone", floor, "MiB", note="contained in all sizes below")]
    sizes = {"simclr": bench.size(256, 4), "badencoder": bench.size(128, 4), "features": bench.size(256, 32)}
    for job, n in sizes.items():
        ours, port = peak(job, "ours", n), peak(job, "port", n)
        print(f"    {job:<12} cupel {ours.main:6.0f} MiB, port {port.main:6.0f} MiB", flush=True)
        above = (ours.main - floor) / max(1.0, port.main - floor)
        note = (
            f"ResNet-18, batch {n}: {ours.main:.0f} MiB against {port.main:.0f} MiB and a worker of {port.worker:.0f} "
            f"MiB, which is not counted; above the floor {above:.2f}"
        )
        goal, value = (0.65 if job != "features" else None), ours.main / port.main
        findings.append(Finding("memory", f"Peak memory, {job}", value, "× port", goal=goal, at_most=True, note=note))
    return findings


def scaling(bench: Bench) -> list[Finding]:
    """Time and memory against batch, image size and number of images: lines, with intercept and R²."""
    findings = []

    def line(what: str, x: list[float], y: list[float], unit: str, per: str) -> None:
        found = machine.fit_line(x, y)
        points = ", ".join(f"{a:g}: {b:.4g}" for a, b in zip(x, y, strict=True))
        note = f"R² of the line; {found.intercept:.4g} {unit} + {found.slope:.4g} {unit} per {per}; {points}"
        findings.append(Finding("scaling", what, found.r2, "R²", note=note))

    steps = bench.size(4, 1)
    batches = bench.size([32, 64, 128, 256], [8, 16, 32])
    sides = bench.size([16, 24, 32, 48, 64], [16, 24, 32])
    variants: dict[str, Run] = {}
    for batch in batches:
        learner, recipe = workloads.pretraining(workloads.FAST32, batch)
        data = workloads.dataset(workloads.images(4 * batch))
        variants[f"{batch} pairs"] = workloads.fit_seconds(learner, data, recipe, steps)
    for side in sides:
        learner, recipe = workloads.pretraining(Fast(input_size=side), batches[1])
        data = workloads.dataset(workloads.images(4 * batches[1], side))
        variants[f"{side} px"] = workloads.fit_seconds(learner, data, recipe, steps)
    counts = bench.size([1000, 2000, 4000, 8000], [100, 200, 400])
    encoder = workloads.FAST32.build(Seed(0))
    for n in counts:
        variants[f"{n} images"] = partial(_embed, encoder, workloads.dataset(workloads.images(n)))
    found = {name: timing.median for name, timing in bench.measure(variants, samples=2).items()}
    line("SimCLR step against batch, fast encoder", list(batches), [found[f"{n} pairs"] for n in batches], "s", "pair")
    areas = [float(side * side) for side in sides]
    line("SimCLR step against image area", areas, [found[f"{side} px"] for side in sides], "s", "pixel")
    line("Embedding against number of images", list(counts), [found[f"{n} images"] for n in counts], "s", "image")

    many = bench.size([2_000, 10_000, 40_000], [200, 400])
    wide = bench.size([64, 128, 256], [16, 32])
    by_count = {n: peak("fit", n, 32, wide[0]) for n in many}
    by_batch = {batch: peak("fit", 4 * wide[-1], 32, batch) for batch in wide}
    line("Peak memory against number of images", list(many), [one.main for one in by_count.values()], "MiB", "image")
    what = "Start of the interpreter to the first step, images made, against their number"
    line(what, list(many), [one.setup for one in by_count.values()], "s", "image")
    line("Peak memory against batch", list(wide), [one.main for one in by_batch.values()], "MiB", "pair")
    return findings


def _embed(encoder: ImageEncoder, data: Dataset) -> None:
    features(encoder, data)
