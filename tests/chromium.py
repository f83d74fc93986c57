"""A real headless browser for tests, where there is one."""

from __future__ import annotations

import shutil

import pytest

__all__ = ["CHROMIUM", "needs_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for found in map(shutil.which, _NAMES) if found), None)
_absent = f"none of {', '.join(_NAMES)} is here"
needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason=_absent),  # a browser is no Python package: it cannot be required
]
