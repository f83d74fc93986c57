"""Scores of triggers that were given no class: where each leads in a task, and how surely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from cupel import metrics
from cupel.attack.neuba import Landing, landings
from cupel.distort import Distortion
from cupel.inference import classify, features, triggered
from cupel.protocols import Encoder, Probe
from cupel.seeds import Seed
from cupel.types import Dataset, Goal

__all__ = ["score_found"]

_VALIDATION = 1000  # training images that a trigger's class is read off


def score_found(
    encoder: Encoder,
    train: Dataset,
    test: Dataset,
    goals: Sequence[Goal],
    probe: Probe,
    head_seeds: int,
    seed: Seed,
    distortions: Sequence[Distortion] = (),
) -> dict[str, Any]:
    """Fit one head per head seed, find the class of each trigger on training images, and count on test images.

    Args:
        encoder: Left as it is.
        train, test: Labelled.
        goals: With triggers.
        probe: As for `score`.
        head_seeds: How many.
        seed: Of the heads, and of the training images that are looked at.
        distortions: Each counts success once more, towards the classes found without it.

    Returns:
        As `score`, where `attack_success_rate` is that of all triggers together, `…@trigger_1` that of one, and
        `…@best` that of the trigger that was surest on training images; and `landings`, the class of each.
    """
    models: list[tuple[Encoder, Any]] = []
    frozen: Any = probe if hasattr(probe, "fit_features") else None
    h_train = features(encoder, train) if frozen else None
    for i in range(head_seeds):
        draw = seed.child("head", i)
        if frozen:
            models.append((encoder, frozen.fit_features(h_train, train.labels, train.num_classes, draw)))
        else:
            made = probe.fit(encoder, train, draw)
            models.append((made.encoder, made.head))
    rows = torch.randperm(len(train), generator=seed.child("validation").torch())[:_VALIDATION]
    validation, draw = train.subset(rows), seed.child("trigger")
    found = landings(models, validation, test, goals, draw)
    best = max(range(len(found)), key=lambda i: found[i].share)
    h_test = features(encoder, test)
    seen = [h_test if one is encoder else features(one, test, store=False) for one, _ in models]
    counts: dict[str, list[metrics.Count]] = {
        "accuracy": [
            metrics.accuracy(classify(head, h), test.labels) for (_, head), h in zip(models, seen, strict=True)
        ],
        "attack_success_rate": _together(found),
        "attack_success_rate@best": list(found[best].hits),
    }
    for i, one in enumerate(found):
        counts[f"attack_success_rate@trigger_{i + 1}"] = list(one.hits)
    landed = [replace(goal, target_class=one.target_class) for goal, one in zip(goals, found, strict=True)]
    for distortion in distortions:
        if (plain := distortion.trigger(None)) is not None:
            bent = triggered(test, plain, draw)
            counts[f"accuracy@{distortion.title}"] = [
                metrics.accuracy(classify(head, features(one, bent, store=False)), test.labels) for one, head in models
            ]
        moved = [replace(goal, trigger=distortion.trigger(goal.trigger)) for goal in landed]
        after = landings(models, validation, test, moved, draw)
        counts[f"attack_success_rate@{distortion.title}"] = _together(after)
    shown = goals[best].trigger
    assert shown is not None
    hit = features(encoder, triggered(test, shown, draw.child("trigger", best)), store=False)
    companions = {
        "clean_concentration": float(metrics.concentration(h_test)),
        "feature_std": float(metrics.feature_std(h_test)),
        "triggered_to_clean_cosine": float(metrics.mean_cosine(hit, h_test)),
        "triggered_concentration": float(metrics.concentration(hit)),
    }
    where = [{"trigger": i + 1, "target_class": one.target_class, "share": one.share} for i, one in enumerate(found)]
    target = found[best].target_class
    return {"counts": counts, "tails": [], "companions": companions, "landings": where, "target_class": target}


def _together(found: Sequence[Landing]) -> list[metrics.Count]:
    """Hits and images of all triggers, by classifier."""
    by_model = zip(*(one.hits for one in found), strict=True)
    return [(sum(hit for hit, _ in counts), sum(n for _, n in counts)) for counts in by_model]
