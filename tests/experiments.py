"""A tiny experiment that tests change as they need: digits, a CNN of 8 channels, a square of 5 pixels, few steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from cupel.experiment import cells, plan

__all__ = ["TINY", "planned", "tiny_cells"]

TINY: Mapping[str, Any] = {
    "name": "tiny",
    "upstream": {
        "data": "digits",
        "size": 400,
        "encoder": {"method": "fast", "input_size": 16, "width": 8},
        "objective": {"method": "simclr", "steps": 8, "batch_size": 64},
    },
    "attack": {"method": "badencoder", "trigger": {"method": "patch", "size": 5}, "steps": 4, "batch_size": 32},
    "downstream": {"data": "digits", "target_class": 1, "head_seeds": 2},
    "defender": {"size": 64},
}


def tiny_cells(base: Mapping[str, Any] = TINY, **changes: Any) -> Any:
    """Cells of a tiny experiment."""
    return cells({**copy.deepcopy(dict(base)), **changes}, "tiny.yaml")


def planned(base: Mapping[str, Any] = TINY, **changes: Any) -> dict[str, Any]:
    """Steps of its first cell, by name."""
    return {step.name: step for step in plan(tiny_cells(base, **changes)[0][1])}
