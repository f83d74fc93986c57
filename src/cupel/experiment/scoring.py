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

__all__ = ["compared", "score", "score_own", "score_swapped"]

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
        return _counts(head, h, test, target)

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


@torch.no_grad()
def _counts(head: nn.Module, h: Mapping[str, Tensor], test: Dataset, target: int) -> Counts:
    """What a head says of embeddings of the test images (`test`), of triggered ones (`hit`), and of each distorted."""
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
            made[f"attack_success_rate@{distortion}"] = metrics.attack_success_rate(said, test.labels, target)
    return made


def score_swapped(
    encoder: Encoder, given: Encoder, train: Dataset, test: Dataset, hit: Dataset | None, target: int, probe: Probe,
    head_seeds: int, seed: Seed,
) -> dict[str, list[tuple[int, int]]]:  # fmt: skip
    """Heads that were fitted on the encoder as given, put on the purified one: counts as `metric@old_head`.

    This tells how far embeddings moved. Empty where the probe trains an encoder of its own.

    Args:
        encoder: Purified.
        given: Before that.
        train, test, hit, target, probe, head_seeds, seed: As for `score`.
    """
    frozen: Any = probe if hasattr(probe, "fit_features") else None
    if frozen is None:
        return {}
    h_train = features(given, train)
    h = _embedded(encoder, test, hit)
    by_seed: dict[str, list[tuple[int, int]]] = {}
    for i in range(head_seeds):
        head = frozen.fit_features(h_train, train.labels, train.num_classes, seed.child("head", i))
        for name, count in _counts(head, h, test, target).items():
            by_seed.setdefault(f"{name}@old_head", []).append(count)
    return by_seed


def score_own(
    encoder: Encoder, head: nn.Module, test: Dataset, hit: Dataset | None, target: int
) -> dict[str, list[tuple[int, int]]]:
    """Counts of the head that was tuned along with the encoder, as `metric@own_head`."""
    found = _counts(head, _embedded(encoder, test, hit), test, target)
    return {f"{name}@own_head": [count] for name, count in found.items()}


def compared(encoder: Encoder, given: Encoder, twin: Encoder, test: Dataset, hit: Dataset | None) -> dict[str, float]:
    """Mean cosines of a purified encoder's embeddings to those of the encoder as given and of the clean twin."""
    sets = {"clean": test} if hit is None else {"clean": test, "triggered": hit}
    found = {}
    for name, data in sets.items():
        h = features(encoder, data)
        found[f"{name}_to_given_cosine"] = float(metrics.mean_cosine(h, features(given, data)))
        found[f"{name}_to_twin_cosine"] = float(metrics.mean_cosine(h, features(twin, data)))
    return found


def _embedded(encoder: Encoder, test: Dataset, hit: Dataset | None) -> dict[str, Tensor]:
    h = {"test": features(encoder, test)}
    return h if hit is None else {**h, "hit": features(encoder, hit)}
