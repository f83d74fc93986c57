"""What downstream classifiers on an encoder say of clean and of triggered test images, as counts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from cupel import metrics
from cupel.inference import features
from cupel.protocols import Encoder, Probe
from cupel.seeds import Seed
from cupel.types import Dataset

__all__ = ["score"]

Counts = dict[str, tuple[int, int]]


def score(
    encoder: Encoder,
    train: Dataset,
    test: Dataset,
    hit: Dataset | None,
    target: int,
    probe: Probe,
    head_seeds: int,
    seed: Seed,
    *,
    distorted: Mapping[str, tuple[Dataset | None, Dataset | None]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Fit one head per head seed and count.

    Args:
        encoder: Left as it is.
        train, test: Labelled.
        hit: The test images with the trigger; None = no attack.
        target: Class that the trigger shall lead to.
        probe: Where it offers `fit_features`, embeddings are made once for all head seeds; else it trains an encoder of
            its own each time.
        head_seeds: How many.
        seed: Of the heads.
        distorted: By name of a distortion: the test images, and those with the trigger; None = nothing to measure.

    Returns:
        `counts` (right or hit, total) by metric and head seed, those under a distortion as `metric@distortion`;
        `tails` of heads that were watched while they trained; `companions`, label-free numbers of the given encoder.
    """
    sets = {"test": test} if hit is None else {"test": test, "hit": hit}
    for name, (plain, stamped) in distorted.items():
        sets |= {f"test@{name}": plain} if plain is not None else {}
        sets |= {f"hit@{name}": stamped} if stamped is not None else {}
    frozen: Any = probe if hasattr(probe, "fit_features") else None

    def counts(head: nn.Module, h: dict[str, Tensor]) -> Counts:
        with torch.no_grad():
            made = {"accuracy": metrics.accuracy(head(h["test"]).argmax(1), test.labels)}
            if "hit" in h:
                said = head(h["hit"]).argmax(1)
                made["attack_success_rate"] = metrics.attack_success_rate(said, test.labels, target)
                made["attack_success_rate_all"] = metrics.attack_success_rate_all(said, test.labels, target)
                made["robust_accuracy"] = metrics.robust_accuracy(said, test.labels, target)
            for name in (one for one in h if "@" in one):
                kind, _, distortion = name.partition("@")
                said = head(h[name]).argmax(1)
                if kind == "test":
                    made[f"accuracy@{distortion}"] = metrics.accuracy(said, test.labels)
                else:
                    count = metrics.attack_success_rate(said, test.labels, target)
                    made[f"attack_success_rate@{distortion}"] = count
        return made

    h = {name: features(encoder, data) for name, data in sets.items()}
    h_train = features(encoder, train) if frozen else None
    by_seed: dict[str, list[tuple[int, int]]] = {}
    tails: list[dict[str, Any]] = []
    for i in range(head_seeds):
        draw, history = seed.child("head", i), list[Counts]()
        if frozen:

            def watch(head: nn.Module, history: list[Counts] = history) -> Counts:
                history.append(counts(head, h))
                return history[-1]

            found = counts(frozen.fit_features(h_train, train.labels, train.num_classes, draw, watch=watch), h)
        else:
            made = probe.fit(encoder, train, draw)
            found = counts(made.head, {name: features(made.encoder, one, store=False) for name, one in sets.items()})
        for name, count in found.items():
            by_seed.setdefault(name, []).append(count)
        if history:
            tails.append({name: metrics.tail([one[name] for one in history]) for name in history[0]})
    companions = {
        "clean_concentration": float(metrics.concentration(h["test"])),
        "feature_std": float(metrics.feature_std(h["test"])),
    }
    if hit is not None:
        companions["triggered_to_clean_cosine"] = float(metrics.mean_cosine(h["hit"], h["test"]))
        companions["triggered_concentration"] = float(metrics.concentration(h["hit"]))
    return {"counts": by_seed, "tails": tails, "companions": companions}
