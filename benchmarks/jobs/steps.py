"""Training steps: against the straight port, against the bare network, against the machine."""

from __future__ import annotations

import importlib.util

import torch

from benchmarks import machine, workloads
from benchmarks.bench import Bench
from benchmarks.findings import Finding, against
from benchmarks.harness import Run, ratio
from benchmarks.straight import augmenting, training
from cupel.augment import SimCLRAugment
from cupel.encoders import Architecture
from cupel.inference import in_bf16
from cupel.seeds import Seed

__all__ = ["augmentation", "badencoder", "pipeline", "roofline", "simclr"]


def simclr(bench: Bench) -> list[Finding]:
    """A whole step on ResNet-18."""
    pairs = bench.size(64, 4)
    raw = workloads.images(8 * pairs)
    port = training.simclr_step(workloads.RN18.build(Seed(0)).module.backbone, 512, raw, pairs)
    variants: dict[str, Run] = {"port": port}
    for name, separate in (("cupel", False), ("cupel, separate views", True)):
        learner, recipe = workloads.pretraining(workloads.RN18, pairs, separate_views=separate)
        variants[name] = workloads.fit_seconds(learner, workloads.dataset(raw), recipe, bench.size(2, 1))
    found = bench.measure(variants)
    note = f"{pairs} pairs on both sides: with the usual 256 a step of the port lasts too long to be sampled"
    return [
        against("simclr", "SimCLR step, ResNet-18", found, "port", "cupel", goal=3.3, note=note),
        against("simclr", "SimCLR step, ResNet-18, a forward pass per view", found, "port", "cupel, separate views",
                note="as the port, so BatchNorm sees the same batches"),
    ]  # fmt: skip


def badencoder(bench: Bench) -> list[Finding]:
    """A whole step on ResNet-18 and on the wider fast encoder."""
    findings = []
    cases: list[tuple[str, Architecture, int, float | None]] = [
        ("ResNet-18", workloads.RN18, bench.size(64, 4), 5.3),
        ("fast encoder, width 64", workloads.FAST64, bench.size(128, 8), None),
    ]
    for name, architecture, batch, goal in cases:
        raw = workloads.images(8 * batch)
        data = workloads.dataset(raw)
        learner, recipe = workloads.implanting(architecture, batch, data)
        clean, own = (architecture.build(Seed(0)).module.backbone for _ in range(2))
        port = training.badencoder_step(clean, own, raw, workloads.images(1, seed=1), batch)
        ours = workloads.fit_seconds(learner, data, recipe, bench.size(3, 1))
        found = bench.measure({"port": port, "cupel": ours})
        note = f"batch {batch}; as published, one augmented reference per image; clean embeddings made before"
        findings.append(against("badencoder", f"BadEncoder step, {name}", found, "port", "cupel", goal=goal, note=note))
    return findings


def augmentation(bench: Bench) -> list[Finding]:
    """SimCLR's views of 32-pixel images."""
    raw = workloads.images(bench.size(512, 32))
    augment, seed = SimCLRAugment(), Seed(0)

    def ours() -> None:
        augment(raw, seed.torch())

    variants: dict[str, Run] = {
        "Pillow": augmenting.by_pillow(raw),
        "torchvision v2": augmenting.by_v2(raw),
        "cupel": ours,
    }
    if importlib.util.find_spec("kornia"):
        variants["kornia"] = augmenting.by_kornia(raw)
    found = bench.measure(variants)
    goals = {"Pillow": 10.0, "kornia": 5.0}
    note = f"{len(raw)} views; crop, flip, colours, grey; to float32 in [0, 1]"
    rate = len(raw) / found["cupel"].median
    own = {"cupel": found["cupel"]}
    made = [Finding("augmentation", "Views made by Cupel", rate, "views/s", note=note, timings=own)]
    for name in variants:
        if name != "cupel":
            what = f"Augmentation against {name}" + ("" if name == "kornia" else ", image by image")
            made.append(against("augmentation", what, found, name, "cupel", goal=goals.get(name), note=note))
    return made


def pipeline(bench: Bench) -> list[Finding]:
    """How much of a step in `fit` is the network itself."""
    cases: list[tuple[str, Architecture, int, int, float]] = [
        ("ResNet-18", workloads.RN18, bench.size(64, 4), bench.size(2, 1), 0.95),
        ("fast encoder, 32 px", workloads.FAST32, bench.size(128, 16), bench.size(10, 2), 0.92),
        ("fast encoder, 16 px (demo)", workloads.DIGITS16, bench.size(128, 16), bench.size(20, 2), 0.92),
    ]
    findings = []
    for name, architecture, pairs, steps, goal in cases:
        side = architecture.input_size
        learner, recipe = workloads.pretraining(architecture, pairs)
        raw = workloads.images(8 * pairs, side)
        views = torch.cat([raw[:pairs], raw[:pairs]]).float().div_(255).contiguous(memory_format=torch.channels_last)
        whole = workloads.fit_seconds(learner, workloads.dataset(raw), recipe, steps)
        found = bench.measure({"bare": workloads.bare_step(learner, views, recipe), "whole": whole}, samples=4)
        value, low, high = ratio(found["bare"], found["whole"])
        note = f"{pairs} pairs; forward, backward and optimiser on resident views / a SimCLR step of `fit`"
        findings.append(
            Finding("pipeline", f"Pipeline efficiency, {name}", value, "%", low, high, goal, note=note, timings=found)
        )
    return findings


def roofline(bench: Bench) -> list[Finding]:
    """FLOP/s of whole steps and of inference, as a share of a large matrix product's in bf16."""
    pairs, batch, rows = bench.size(64, 4), bench.size(64, 4), bench.size(256, 64)
    side = bench.size(2048, 512)
    a, b = machine.gemm(torch.bfloat16, side)
    learner, recipe = workloads.pretraining(workloads.RN18, pairs)
    shadow = workloads.dataset(workloads.images(8 * batch))
    attacker, attack = workloads.implanting(workloads.RN18, batch, shadow)
    encoder = workloads.RN18.build(Seed(0))
    x = (workloads.images(rows).float() / 255).contiguous(memory_format=torch.channels_last)
    network = in_bf16(encoder, x, "noise")

    def infer() -> None:
        with torch.no_grad():
            network(x)

    steps = bench.size(2, 1)
    found = bench.measure(
        {
            "bf16 product": lambda: workloads.nothing(a @ b),
            "SimCLR": workloads.fit_seconds(learner, workloads.dataset(workloads.images(8 * pairs)), recipe, steps),
            "BadEncoder": workloads.fit_seconds(attacker, shadow, attack, steps),
            "inference": infer,
        }
    )
    forward = machine.forward_flops(encoder.module, 32)
    work = {
        "SimCLR": (3 * forward * 2 * pairs, 0.30, f"{pairs} pairs; training counted as 3 forward passes"),
        "BadEncoder": (3 * forward * (3 * batch + 1), 0.42, f"batch {batch}: 3 passes each and one for the reference"),
        "inference": (forward * rows, 0.47, f"the network of `features` on a resident batch of {rows}"),
    }
    peak = 2 * side**3 / found["bf16 product"].median
    yardstick = {"once": found["bf16 product"]}
    findings = [Finding("roofline", f"bf16 matrix product, {side}²", peak / 1e12, "TFLOP/s", timings=yardstick)]
    for name, (flops, goal, note) in work.items():
        timing = found[name]
        value, low, high = (flops / seconds / peak for seconds in (timing.median, timing.high, timing.low))
        note = f"{note}; {flops / timing.median / 1e12:.2f} TFLOP/s; {forward / 1e9:.3f} GFLOP per forward pass"
        what = f"Share of the bf16 product's rate, {name}, ResNet-18"
        findings.append(Finding("roofline", what, value, "%", low, high, goal, note=note, timings={name: timing}))
    return findings
