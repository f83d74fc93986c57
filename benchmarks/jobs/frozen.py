"""Frozen encoders and probes, against the straight port, scikit-learn and faiss."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch.nn.functional import cross_entropy, normalize

from benchmarks import workloads
from benchmarks.bench import Bench
from benchmarks.findings import Finding, against
from benchmarks.harness import Run, ratio
from benchmarks.straight import frozen
from cupel.inference import features
from cupel.probe import Knn, Linear, Mlp2
from cupel.probe.linear import column_scale
from cupel.seeds import Seed

__all__ = ["extraction", "knn", "linear", "mlp"]


def extraction(bench: Bench) -> list[Finding]:
    """Embeddings of ResNet-18."""
    rows, batch = bench.size(1536, 128), bench.size(256, 32)
    raw = workloads.images(rows)
    encoder = workloads.RN18.build(Seed(0))
    port = frozen.extraction(encoder.copy().module.backbone, raw, batch)
    data = workloads.dataset(raw)

    def ours() -> None:
        features(encoder, data)

    found = bench.measure({"port": port, "cupel": ours}, samples=2)
    note = f"{rows} images; the port in batches of {batch}; comparing bf16 with float32 is part of Cupel's time"
    return [against("features", "Embeddings, ResNet-18", found, "port", "cupel", goal=3.1, note=note)]


def linear(bench: Bench) -> list[Finding]:
    """Logistic regression to convergence, on unit embeddings with standardised columns."""
    rows = bench.size(50_000, 2_000)
    x, y = workloads.clusters(rows)
    probe = Linear(subsample=1.0)
    heads: dict[str, Any] = {}

    def ours() -> None:
        heads["cupel"] = probe.fit_features(x, y, 10, Seed(0))

    def theirs() -> None:
        solver = LogisticRegression(C=1 / (rows * probe.l2), max_iter=probe.max_steps, tol=1e-5)
        heads["scikit-learn"] = make_pipeline(Normalizer(), StandardScaler(), solver).fit(x.numpy(), y.numpy())

    port = frozen.linear_epoch(normalize(x, dim=1), y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's word that more steps could be taken
        found = bench.measure({"scikit-learn": theirs, "epoch of the port": port, "cupel": ours}, samples=2)
    _, inverse = column_scale(normalize(x, dim=1))
    with torch.no_grad():
        head = heads["cupel"]
        weight = next(iter(head.parameters())) / inverse  # the standardisation is multiplied into it
        own = float(cross_entropy(head(x), y) + probe.l2 / 2 * weight.square().sum())
    logits = torch.from_numpy(heads["scikit-learn"].decision_function(x.numpy()))
    penalty = probe.l2 / 2 * float((heads["scikit-learn"][-1].coef_ ** 2).sum())
    reached = f"loss reached: cupel {own:.5f}, scikit-learn {float(cross_entropy(logits, y)) + penalty:.5f}"
    seconds = found["cupel"]
    epochs, low, high = (100 * one for one in ratio(found["epoch of the port"], seconds))
    note = f"{rows} × 512, 10 classes; scaling included on both sides; {reached}"
    layer = "the port's 100 epochs are worked out from one"
    used = {name: found[name] for name in ("epoch of the port", "cupel")}
    return [
        Finding("linear", "Linear probe to convergence", seconds.median, "s", seconds.low, seconds.high, 1.0, True,
                f"{rows} × 512", {"cupel": seconds}),
        against("linear", "Linear probe against scikit-learn", found, "scikit-learn", "cupel", note=note),
        Finding("linear", "Linear probe against 100 epochs of a linear layer", epochs, "×", low, high, note=layer,
                timings=used),
    ]  # fmt: skip


def mlp(bench: Bench) -> list[Finding]:
    """An epoch of the downstream classifier 512-512-256-10 with its published batch size."""
    x, y = workloads.clusters(bench.size(50_000, 1_000))
    probe = Mlp2(epochs=1)

    def ours() -> None:
        probe.fit_features(x, y, 10, Seed(0))

    found = bench.measure({"port": frozen.mlp_epoch(normalize(x, dim=1), y), "cupel": ours})
    note = f"{len(x)} embeddings, batch {probe.batch_size}, Adam"
    return [against("mlp", "Downstream classifier, one epoch", found, "port", "cupel", note=note)]


def knn(bench: Bench) -> list[Finding]:
    """200 nearest neighbours by cosine."""
    x, y = workloads.clusters(bench.size(50_000, 2_000))
    queries, _ = workloads.clusters(bench.size(2_000, 100), seed=1)
    head = Knn().fit_features(x, y, 10, Seed(0))
    bank, unit = normalize(x, dim=1).numpy(), normalize(queries, dim=1).numpy()

    def ours() -> None:
        with torch.no_grad():
            head(queries)

    brute = NearestNeighbors(n_neighbors=200, algorithm="brute", metric="cosine").fit(bank)
    variants: dict[str, Run] = {"scikit-learn": lambda: workloads.nothing(brute.kneighbors(unit)), "cupel": ours}
    if importlib.util.find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(bank.shape[1])
        index.add(bank)
        variants["faiss"] = lambda: workloads.nothing(index.search(unit, 200))
    found = bench.measure(variants)
    note = f"{len(queries)} queries, {len(x)} × 512; Cupel's time includes the vote"
    return [
        against("knn", f"k-NN against {name}", found, name, "cupel", note=note) for name in variants if name != "cupel"
    ]
