"""Zoos: seeded sets of clean and of backdoored encoders, and what scanners find in them."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Built", "Member", "Tables", "Zoo", "build", "packaged_zoos", "read_entries", "read_zoo", "tables"]

_HOMES = {
    "Built": "attempt", "Member": "file", "Tables": "table", "Zoo": "file", "build": "making", "packaged_zoos": "file",
    "read_entries": "entries", "read_zoo": "file", "tables": "table",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    # the command line imports this package for its help, which must not wait for torch
    if name in _HOMES:
        return getattr(importlib.import_module(f"cupel.zoo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cupel.zoo' has no attribute '{name}'")
