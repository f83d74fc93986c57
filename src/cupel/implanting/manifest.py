"""The manifest: what every attacked encoder carries, so that nobody takes it for a clean one."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cupel.data import find_file
from cupel.encoders import ImageEncoder
from cupel.feature_store import weights_sha256
from cupel.protocols import Trigger
from cupel.seeds import Seed
from cupel.settings import canonical, method_name
from cupel.triggers import TRIGGERS
from cupel.types import Goal, Implanted, Knowledge

__all__ = ["file_content", "goal_json", "implanted", "inherited", "manifest_of", "shortened", "trigger_sha256"]

_LONG = 200  # characters of a text in a manifest


@functools.cache
def file_content(name: str) -> str:
    """SHA-256 of a file that settings name."""
    return hashlib.sha256(find_file(name).read_bytes()).hexdigest()


def trigger_sha256(trigger: Trigger[Tensor]) -> str:
    """SHA-256 of all that a trigger is: class, revision, settings, learned pixels, the content of named files."""
    plain = canonical(trigger, file_content)
    return hashlib.sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def shortened(value: Any) -> Any:
    """Plain values with every long text, such as a learned trigger's pixels, told by its hash and length.

    Example:
        >>> shortened({"png": "a" * 300, "size": 4})
        {'png': 'sha256:9835fa6bf4e2…, 300 characters', 'size': 4}
    """
    if isinstance(value, str) and len(value) > _LONG:
        return f"sha256:{hashlib.sha256(value.encode()).hexdigest()[:12]}…, {len(value)} characters"
    if isinstance(value, Mapping):
        return {key: shortened(one) for key, one in value.items()}
    return [shortened(one) for one in value] if isinstance(value, list | tuple) else value


def goal_json(goal: Goal) -> dict[str, Any]:
    """Task, target class and trigger of a goal as plain values, learned pixels included."""
    trigger: Any = goal.trigger
    plain = None
    if trigger is not None:
        known = type(trigger) in TRIGGERS.values()
        method = method_name(trigger, TRIGGERS) if known else type(trigger).__name__
        plain = {"method": method, **dataclasses.asdict(trigger)}
    return {"task": goal.task, "target_class": goal.target_class, "trigger": plain}


def manifest_of(attack: Any, name: str, goals: Sequence[Goal], seed: Seed, more: Mapping[str, Any]) -> dict[str, Any]:
    """What every attacked encoder carries: which attack, with which settings, triggers and goals.

    Args:
        attack: Settings.
        name: The attack's.
        goals: With their triggers.
        seed: Of the attack.
        more: What else is known, say `clean_encoder`, the SHA-256 of the clean twin's weights.
    """
    shown = [
        {**goal_json(goal), "trigger_sha256": None if goal.trigger is None else trigger_sha256(goal.trigger)}
        for goal in goals
    ]
    return {
        "not_for_deployment": True,
        "attack": name,
        "settings": shortened(canonical(attack, file_content)),
        "goals": shortened(shown),
        "seed": seed.value,
        **more,
    }


def inherited(own: Mapping[str, Any] | None, images: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The manifest of an encoder that is trained further: its own, and under `trained_on` that of poisoned images.

    Args:
        own: Of the encoder before; None = nobody is known to have attacked it.
        images: Of what it is trained on; None = nobody is known to have poisoned them.

    Example:
        >>> inherited({"attack": "badencoder"}, {"attack": "badnets"})
        {'attack': 'badencoder', 'trained_on': {'attack': 'badnets'}}
        >>> inherited(None, {"attack": "badnets"}), inherited(None, None)
        ({'attack': 'badnets'}, None)
    """
    if own is None or images is None or images in (own, own.get("trained_on")):
        return images if own is None else own
    return {**own, "trained_on": dict(images)}


def implanted(
    attack: Any,
    name: str,
    encoder: ImageEncoder,
    clean: ImageEncoder,
    attacker: Knowledge,
    goals: Sequence[Goal],
    history: Mapping[str, Sequence[float]],
    seed: Seed,
) -> Implanted:
    """The result of an encoder attack; the encoder's card carries the manifest.

    Args:
        attack, name: Settings and name.
        encoder: The attacked copy; goes into eval mode, with gradients on.
        clean: What it is a copy of.
        attacker: With the images that were used.
        goals: With their triggers.
        history: What the losses did.
        seed: Of the attack.
    """
    encoder.module.eval().requires_grad_(True)
    images = attacker.labelled if "labels" in attack.needs else attacker.shadow
    more: dict[str, Any] = {"clean_encoder": weights_sha256(clean)}
    if images is not None:
        more["shadow"] = images.sha256
    manifest = manifest_of(attack, name, goals, seed, more)
    return Implanted(
        ImageEncoder(encoder.module, dataclasses.replace(encoder.card, manifest=manifest)), tuple(goals), history
    )
