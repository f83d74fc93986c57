"""The jobs of `benchmarks.whole`, by name, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.bench import Bench
from benchmarks.findings import Finding
from benchmarks.jobs.frozen import extraction, knn, linear, mlp
from benchmarks.jobs.growth import memory, scaling
from benchmarks.jobs.steps import augmentation, badencoder, pipeline, roofline, simclr
from benchmarks.jobs.surroundings import demo, reading

__all__ = ["JOBS"]

JOBS: Mapping[str, Callable[[Bench], list[Finding]]] = {
    "simclr": simclr,
    "badencoder": badencoder,
    "features": extraction,
    "augmentation": augmentation,
    "pipeline": pipeline,
    "roofline": roofline,
    "linear": linear,
    "mlp": mlp,
    "knn": knn,
    "reading": reading,
    "memory": memory,
    "scaling": scaling,
    "demo": demo,
}
