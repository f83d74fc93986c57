"""Pictures and maps for the report, kept as arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cupel.encoders import ImageEncoder
from cupel.inference import features, triggered
from cupel.probe import Linear
from cupel.seeds import Seed
from cupel.types import Dataset, Goal

__all__ = ["describe", "flat_map"]

_SHOWN, _MAPPED, _MAPPED_TRIGGERED = 8, 400, 100
Array = np.ndarray[Any, Any]


def flat_map(h: Tensor) -> tuple[Tensor, Tensor]:
    """The two principal directions of normalised embeddings `[n, d]`, as (mean `[d]`, axes `[d, 2]`).

    The sign of an axis is fixed by its largest entry, so that equal inputs give equal maps.
    """
    u = F.normalize(h.double(), dim=1)
    mean = u.mean(dim=0)
    _, _, v = torch.linalg.svd(u - mean, full_matrices=False)
    axes = v[:2].T
    sign = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
    return mean, axes * sign


def describe(
    encoders: Mapping[str, ImageEncoder],
    train: Dataset,
    test: Dataset,
    goal: Goal | None,
    references: Array | None,
    probe: Any,
    seed: Seed,
    stand_ins: Mapping[str, Mapping[str, Array]] | None = None,
) -> dict[str, Array]:
    """Arrays that the report shows: images with and without trigger, and a 2-D map of the embeddings per encoder.

    Args:
        encoders: By name: `clean`, `backdoored`, `purified`.
        train, test: Of the first downstream task.
        goal: With its test-time trigger; None for an experiment without attack.
        references: uint8 `[r, 3, height, width]`.
        probe: Gives the predictions shown under the images; a linear one does where it trains an encoder of its own.
        seed: Choice of the images shown.
        stand_ins: By encoder, embeddings of stand-ins for triggered images: `stand_in/ball` and `stand_in/window`.

    Returns:
        `images/…`, `trigger/…`, `reference`, `map/<encoder>/points` and `/group` (−1 reference, −2 triggered, −3 and
        −4 stand-ins of a ball and of a window, else class).
    """
    rows = torch.randperm(len(test), generator=seed.child("rows").torch())
    mapped = test.subset(rows[:_MAPPED])
    shown = test.subset(rows[:_SHOWN])
    pixels = shown.inputs[torch.arange(len(shown))]
    arrays: dict[str, Array] = {
        "images/clean": _hwc(pixels),
        "images/labels": shown.labels.numpy(),
        "map/classes": np.asarray(test.classes or [str(c) for c in range(test.num_classes)]),
    }
    stamped = None
    if goal is not None and goal.trigger is not None:
        draw = seed.child("trigger")
        arrays["images/triggered"] = _hwc(goal.trigger(pixels, shown.ids.tolist(), draw))
        stamped = triggered(mapped.subset(torch.arange(min(_MAPPED_TRIGGERED, len(mapped)))), goal.trigger, draw)
        if known := getattr(goal.trigger, "mask_and_pattern", lambda size: None)(pixels.shape[-1]):
            mask, pattern = known
            arrays["trigger/mask"] = np.asarray(mask, dtype=np.float32)
            arrays["trigger/pattern"] = np.asarray(pattern).transpose(1, 2, 0)
        which = "backdoored" if "backdoored" in encoders else next(iter(encoders))
        encoder = encoders[which]
        shown_by = probe if hasattr(probe, "fit_features") else Linear()
        fitted = shown_by.fit_features(features(encoder, train), train.labels, train.num_classes, seed.child("head"))
        with torch.no_grad():
            arrays["images/predicted_clean"] = fitted(features(encoder, pixels)).argmax(1).numpy()
            hit = torch.from_numpy(arrays["images/triggered"].transpose(0, 3, 1, 2).copy())
            arrays["images/predicted_triggered"] = fitted(features(encoder, hit)).argmax(1).numpy()
    if references is not None:
        arrays["reference"] = _hwc(torch.from_numpy(np.array(references)))
    for name, encoder in encoders.items():
        h = features(encoder, mapped)
        mean, axes = flat_map(h)
        parts, groups = [h], [mapped.labels]
        if stamped is not None:
            parts.append(features(encoder, stamped))
            groups.append(torch.full((len(stamped),), -2))
        if references is not None:
            parts.append(features(encoder, torch.from_numpy(np.array(references))))
            groups.append(torch.full((len(references),), -1))
        for kind, group in (("ball", -3), ("window", -4)):
            if (found := (stand_ins or {}).get(name, {}).get(f"stand_in/{kind}")) is not None:
                parts.append(torch.from_numpy(np.array(found[:_MAPPED_TRIGGERED])).to(h.device))
                groups.append(torch.full((len(parts[-1]),), group))
        points = (F.normalize(torch.cat(parts).double(), dim=1) - mean) @ axes
        arrays[f"map/{name}/points"] = points.float().numpy()
        arrays[f"map/{name}/group"] = torch.cat(groups).numpy()
    return arrays


def _hwc(pixels: Tensor) -> Array:
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
