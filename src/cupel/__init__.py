"""Cupel measures, finds and removes backdoors in pre-trained encoders.

`import cupel` is light: what `cupel.api` offers is loaded when it is first touched.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    api = importlib.import_module("cupel.api") if not name.startswith("_") else None
    if api is None or name not in api.__all__:
        raise AttributeError(f"module 'cupel' has no attribute '{name}'")
    return getattr(api, name)
