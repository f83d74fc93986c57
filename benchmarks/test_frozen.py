"""Embeddings and probes for pytest-benchmark, small; nothing is asserted about time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import workloads
from cupel.inference import features
from cupel.probe import Knn, Linear
from cupel.seeds import Seed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_features(benchmark: Any, dtype: torch.dtype) -> None:
    encoder, data = workloads.FAST32.build(Seed(0)), workloads.dataset(workloads.images(1024))
    benchmark.pedantic(lambda: features(encoder, data, dtype=dtype), rounds=5, warmup_rounds=1)


def test_linear(benchmark: Any) -> None:
    x, y = workloads.clusters(5_000)
    benchmark.pedantic(lambda: Linear().fit_features(x, y, 10, Seed(0)), rounds=5, warmup_rounds=1)


def test_knn(benchmark: Any) -> None:
    x, y = workloads.clusters(5_000)
    queries, _ = workloads.clusters(500, seed=1)
    head = Knn().fit_features(x, y, 10, Seed(0))
    benchmark.pedantic(lambda: head(queries), rounds=5, warmup_rounds=1)
