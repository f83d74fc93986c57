"""Every table of methods, and settings of each method that are small enough for a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from cupel.attack import ATTACKS
from cupel.attack.inactive import FilterTraining
from cupel.certify import CERTIFIERS
from cupel.encoders import ENCODERS
from cupel.inversion.classwise import ClassSearch
from cupel.optimizers import Recipe
from cupel.pretrain import OBJECTIVES
from cupel.probe import PROBES
from cupel.purify import PURIFIERS
from cupel.scan import FILTERS, SCANNERS
from cupel.scan.patch_classifier import PatchClassifier
from cupel.triggers import TRIGGERS

__all__ = ["METHODS", "TABLES", "methods", "tiny"]

TABLES: Mapping[str, Mapping[str, type]] = {
    "attacks": ATTACKS,
    "objectives": OBJECTIVES,
    "probes": PROBES,
    "scanners": SCANNERS,
    "filters": FILTERS,
    "purifiers": PURIFIERS,
    "certifiers": CERTIFIERS,
    "triggers": TRIGGERS,
    "encoders": ENCODERS,
}

METHODS = [
    pytest.param(stage, name, cls, id=f"{stage}-{name}")
    for stage, table in TABLES.items()
    for name, cls in table.items()
    if cls.__module__.startswith("cupel.")  # other packages' methods are theirs to test
]

# by the fields' names, so that a new method is tested without a word here
_SMALL: Mapping[str, Any] = {
    "batch_size": 16, "epochs": 1, "images": 48, "input_size": 16, "l1_draws": 2, "max_steps": 20, "num_seeds": 2,
    "pgd_steps": 1, "poison_rate": 0.1, "size": 4, "steps": 2, "width": 4, "width_multiplier": 0.0625,
    "adapt": Recipe(steps=2, batch_size=16), "filter_training": FilterTraining(steps=2, batch_size=16),
    "filter_width": 4, "neurons": 2, "rehearsal": Recipe(steps=2, batch_size=16),
    "autoencoder": Recipe(steps=2, batch_size=16),
    "head_epochs": 1, "information_steps": 2, "isolation_epochs": 1, "patch": 2, "projector_epochs": 1, "rounds": 1,
    "search": ClassSearch(steps=6, images_per_step=32, success=0.3), "teacher_epochs": 1, "training_bands": 2,
    "tuning_epochs": 0, "u": 0.5, "unlearning_epochs": 1, "warmup_epochs": 0,
    "picture_steps": ((2, 4.0, 4.0),), "pictures_per_class": 4, "trigger_images": 40, "trigger_steps": 5,
    "blends": 1, "clusters": 8, "max_clusters": 4, "num_clusters": 3, "queries": 4, "repeats": 1, "shadows": 16,
    "stamps": 3, "stride": 0.5, "test_images": 16, "top": 3,
    "classifier": PatchClassifier(steps=2, batch_size=16, ensemble=1, width=4),
}  # fmt: skip


def methods(stage: str) -> list[Any]:
    """Parameters (name, class) for the methods of one table."""
    return [pytest.param(name, cls, id=name) for name, cls in TABLES[stage].items()]


def tiny(cls: Any, **changes: Any) -> Any:
    """A method with few steps and small sizes."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{**{k: v for k, v in _SMALL.items() if k in names}, **changes})
