"""The examples in docstrings run and say what they say they do."""

import doctest
import importlib
import pkgutil

import pytest

import cupel

MODULES = sorted(m.name for m in pkgutil.walk_packages(cupel.__path__, "cupel.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    assert failed == 0, "see the output above"
