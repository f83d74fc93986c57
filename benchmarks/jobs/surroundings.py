"""What stands around the network: large images on disk, and a whole demo with its imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from benchmarks import workloads
from benchmarks.bench import Bench
from benchmarks.findings import Finding, against
from cupel.data import LazyImages
from cupel.data.sources import locate
from cupel.encoders import ResNet18
from cupel.inference import features
from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = ["demo", "reading"]


def reading(bench: Bench) -> list[Finding]:
    """JPEG files of ImageNet's usual size, decoded to 224 px as they are needed, against ResNet-18."""
    n, batch = bench.size(96, 16), bench.size(32, 8)
    with tempfile.TemporaryDirectory() as folder:
        _write_jpegs(Path(folder), n)
        stored = _stored(folder, 224)
        resident = Dataset(stored.inputs[torch.arange(n)], stored.labels_, stored.ids, "resident")
        encoder = ResNet18(stem="imagenet", input_size=224, normalisation="imagenet").build(Seed(0))
        learner, recipe = workloads.pretraining(
            ResNet18(stem="imagenet", input_size=224, normalisation="imagenet"), bench.size(16, 4)
        )

        def read() -> None:
            for rows in torch.split(torch.arange(n), batch):
                stored.inputs[rows]

        def embed(data: Dataset) -> None:
            features(encoder, data, batch_size=batch)

        found = bench.measure(
            {
                "reading alone": read,
                "embedding, resident": lambda: embed(resident),
                "embedding, from files": lambda: embed(stored),
                "SimCLR step, resident": workloads.fit_seconds(learner, resident, recipe, 2),
                "SimCLR step, from files": workloads.fit_seconds(learner, stored, recipe, 2),
            },
            samples=2,
        )
    rate = n / found["reading alone"].median
    step = recipe.batch_size / found["SimCLR step, resident"].median
    note = f"{n} JPEGs of 500 × 375 to 224 px; {rate:.0f} images/s, of which the training takes {step:.0f}"
    files = "SimCLR step, from files"
    both = {name: found[name] for name in ("reading alone", "SimCLR step, resident")}
    what = "Images read, over images trained on (SimCLR, ResNet-18, 224 px)"
    return [
        Finding("reading", what, rate / step, "×", goal=1.0, note=note, timings=both),
        against("reading", "Images read, over images embedded", found, "embedding, resident", "reading alone"),
        against(
            "reading", "Embedding from files, over from memory", found, "embedding, from files", "embedding, resident"
        ),
        against("reading", "SimCLR step from files, over from memory", found, files, "SimCLR step, resident"),
    ]


def _stored(folder: str, side: int) -> Dataset:
    """The images of a folder, decoded when they are indexed; `load` would keep so few in memory."""
    listing = locate(folder, "train").read(side, None)
    rows = torch.arange(len(listing.labels))
    lazy = LazyImages(listing.images, rows, (side, side), resize=True)
    return Dataset(lazy, torch.full((len(rows),), -1), rows, "files")


def _write_jpegs(folder: Path, n: int) -> None:
    """Smooth colours with some grain: about 60 KiB each, as photographs have."""
    smooth = torch.nn.functional.interpolate(workloads.images(n, 64).float(), size=(375, 500), mode="bilinear")
    for i, one in enumerate(smooth):
        grain = torch.randn(375, 500, 1, generator=Seed(i).torch()) * 12
        pixels = (one.permute(1, 2, 0) + grain).clamp(0, 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=90)


def demo(bench: Bench) -> list[Finding]:
    """`cupel demo` as a user starts it, by stage, and what no stage accounts for."""
    imports = bench.measure({"import": lambda: _python("-c", "import cupel.commands"),
                             "interpreter": lambda: _python("-c", "pass")}, least=0.0)  # fmt: skip
    if bench.quick:
        return [Finding("demo", "Imports of a command", imports["import"].median, "s", timings=imports)]
    with tempfile.TemporaryDirectory() as folder:
        seconds = _python("-m", "cupel", "demo", "--out", folder)
        record = json.loads((Path(folder) / "result.json").read_text())
    stages = {name: value for name, value in record["seconds"].items() if name != "total"}
    around = seconds - sum(stages.values())
    parts = ", ".join(f"{name} {value:.1f}" for name, value in stages.items())
    print(f"    cupel demo {seconds:.1f} s: {parts}; around the stages {around:.1f}", flush=True)
    note = "once, whatever else the machine was doing"
    return [
        Finding("demo", "`cupel demo`, wall clock", seconds, "s", goal=90.0, at_most=True, note=f"{note}; {parts}"),
        Finding(
            "demo", "of which imports and overhead", around, "s", goal=12.0, at_most=True, note="outside of all stages"
        ),
        Finding("demo", "of which imports", imports["import"].median, "s", timings=imports),
    ]


def _python(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=dict(os.environ))
    return time.perf_counter() - start
