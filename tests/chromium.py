"""A real headless browser for tests, where there is one."""

from __future__ import annotations

import shutil

import pytest

__all__ = ["CHROMIUM", "needs_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for found in map(shutil.which, _NAMES) if found), None)
needs_browser = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium, which is no Python package and cannot be required"),
]
